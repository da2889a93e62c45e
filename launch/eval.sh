#!/usr/bin/env bash
""":"
# Evaluation of a checkpoint: one file, two languages. For bash these lines start one rank per device of this node, and nothing below them is read.
# Each rank is Python running this same file, for which these lines are a text; so `deepspeed launch/eval.sh`, torchrun and plain
# `python launch/eval.sh` (one rank) work too. Flags are those of `bash launch/eval.sh --help`.
exec bash "$(dirname "$(readlink -f "$0")")/start.sh" "$0" "$@"
: <<'# The end'
":"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a data worker that is spawned reads this file as well
    # Before anything that is installed: these scripts run the checkout they lie in, from any directory.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from vico.cli.main import console

    console(["eval", *sys.argv[1:]])
# The end
