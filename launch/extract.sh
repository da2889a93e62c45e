#!/usr/bin/env bash
""":"
# Features of videos: one file in two languages. bash reads the next lines, which start one
# rank per device of this node, and nothing below them. Each rank is Python running this same file,
# where these lines are a string. So `deepspeed launch/extract.sh`, torchrun and plain
# `python launch/extract.sh` (one rank) work too. For the flags: `bash launch/extract.sh --help`.
exec bash "$(dirname "$(readlink -f "$0")")/start.sh" "$0" "$@"
: <<'# The end'
":"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a spawned data worker imports this file too
    # Before installed packages: the script runs the checkout that it is part of.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from vico.cli.main import console

    console(["extract", *sys.argv[1:]])
# The end
