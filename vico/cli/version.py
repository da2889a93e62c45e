"""Which ViCo this is: its version and, in a checkout with git, the commit."""

import subprocess
from pathlib import Path

from vico.io.paths import exists

VERSION = "0.1.0"  # that of setup.py
ROOT = Path(__file__).resolve().parents[2]
GIT_SECONDS = 10


def version() -> str:
    """Such as "0.1.0 (commit 759abf6, changed)"."""
    commit = _commit()
    return f"{VERSION} (commit {commit})" if commit else VERSION


def _commit() -> str:
    """Of this checkout; empty without git or where it does not answer."""
    if not exists(ROOT / ".git"):
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=, changed"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
