"""One writer per output_dir: a lock that the kernel lets go of when the process that holds it ends, however it ends."""

import fcntl
import os
import socket
import time
from io import TextIOWrapper
from pathlib import Path

from vico.errors import DiskError

NAME = ".vico-lock"
_held: dict[Path, TextIOWrapper] = {}  # open for as long as the process lives


def take(output_dir: Path) -> str | None:
    """Lock the folder, which must be there, for this process; a note where its file system knows no locks.

    Raises DiskError naming the run that holds it. POSIX locks: child processes do not inherit them, and network file
    systems pass them on to the other hosts.
    """
    path = output_dir / NAME
    if path in _held:
        return None
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as problem:
        raise DiskError(f"{path}: cannot be written ({problem.strerror}); mend the permissions, or choose another --output_dir") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read(200).strip() or "another run"
        file.close()
        raise DiskError(f"{output_dir}: in use by {owner}; wait for it, or choose another --output_dir") from None
    except OSError as problem:
        file.close()
        return f"{output_dir}: cannot be locked ({problem.strerror}); make sure that no second run uses it"
    file.truncate(0)
    job = f", SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}{job}\n")
    file.flush()
    _held[path] = file
    return None
