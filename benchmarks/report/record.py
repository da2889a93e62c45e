"""One JSON file per run under results/: what ran, where, on which code, and every single time."""

import argparse
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

from benchmarks.measure.clocks import hardware
from vico.io.atomic import write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "deepspeed", "numpy", "flash-attn", "triton")


def new_record(suite: str, config: dict[str, Any]) -> dict[str, Any]:
    """The fields that every record begins with."""
    words = [
        word for word in sys.argv[1:] if not word.startswith(("--local_rank", "--local-rank"))
    ]  # launchers add it
    return {
        "suite": suite,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"bash benchmarks/run.sh {shlex.join(words)}",
        "config": config,
        "git_commit": git_commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in PACKAGES if (found := _version(name))},
        },
        "hardware": hardware(),
    }


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """All flags as JSON takes them; paths within the checkout as seen from it."""

    def text(path: Path) -> str:
        return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)

    return {
        key: text(value) if isinstance(value, Path) else value for key, value in vars(args).items()
    }


def git_commit() -> str:
    """The commit, "-dirty" behind it where tracked files of the code differ from it; where the code is a copy, $VICO_COMMIT says it."""
    if "VICO_COMMIT" in os.environ:
        return os.environ["VICO_COMMIT"]
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "vico", "benchmarks/*.py"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "n/a"
    return head + ("-dirty" if changed.stdout.strip() else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write(record: dict[str, Any], folder: Path = RESULTS) -> Path:
    """A new file in `folder`, then the record as the last line of stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = record["date"].replace(":", "").replace("+0000", "Z")
    path = folder / f"{record['suite']}-{stamp}.json"
    write_text(path, json.dumps(record, indent=1) + "\n")
    print(f"record: {path}", flush=True)
    print(json.dumps(record), flush=True)
    return path
