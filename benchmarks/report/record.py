"""One JSON file per run of a suite: what ran, where, on which code, and every single time."""

import argparse
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.measure.hardware import hardware
from benchmarks.paths import ROOT
from vico.io import log
from vico.io.atomic import write_text

PACKAGES = ("torch", "deepspeed", "numpy", "flash-attn", "triton")
CODE = ("vico", "benchmarks/*.py")  # pathspecs of git, in which * matches folders too


def new_record(suite: str, config: dict[str, Any]) -> dict[str, Any]:
    """The fields that every record begins with."""
    # Launchers add --local_rank.
    words = [word for word in sys.argv[1:] if not word.startswith(("--local_rank", "--local-rank"))]
    return {
        "suite": suite,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"bash benchmarks/run.sh {shlex.join(words)}",
        "config": config,
        "git_commit": git_commit(),
        "versions": versions(),
        "hardware": hardware(),
    }


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """All flags as JSON values; paths within the checkout are relative to it."""
    values = dict(vars(args))
    for name, value in values.items():
        if isinstance(value, Path):
            inside = value.is_relative_to(ROOT)
            values[name] = str(value.relative_to(ROOT) if inside else value)
    return values


def git_commit() -> str:
    """The commit, followed by "-dirty" if tracked or new files of the code differ from it.

    $VICO_COMMIT replaces it, for a copy of the code without its repository.
    """
    if "VICO_COMMIT" in os.environ:
        return os.environ["VICO_COMMIT"]
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", *CODE)
    except (OSError, subprocess.CalledProcessError):
        return "n/a"
    return head + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    completed = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    return completed.stdout.strip()


def versions() -> dict[str, str]:
    """Of Python, and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_record(record: dict[str, Any], folder: Path) -> Path:
    """Writes a new file in `folder`, then prints the record as the last line of stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = record["date"].replace(":", "").replace("+0000", "Z")
    path = folder / f"{record['suite']}-{stamp}.json"
    for number in itertools.count(2):  # of the same second
        if not path.exists():
            break
        path = folder / f"{record['suite']}-{stamp}_{number}.json"  # sorts behind the first
    write_text(path, json.dumps(record, indent=1) + "\n")
    log.info(f"record: {path}")
    print(json.dumps(record), flush=True)
    return path
