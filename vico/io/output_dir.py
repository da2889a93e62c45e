"""One writer per output_dir: a lock that the kernel lets go of when the process that holds it ends, however it ends."""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

from vico.errors import DiskError, InUseError

NAME = ".vico-lock"
_held: dict[Path, int] = {}  # descriptors, open for as long as the process lives


def take(output_dir: Path) -> str | None:
    """Lock the folder, which must be there, for this process; a note where its file system knows no locks.

    Raises InUseError naming the run that holds it. POSIX locks: child processes do not inherit them, and network file
    systems pass them on to the other hosts.
    """
    path = output_dir / NAME
    if path in _held:
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as problem:
        raise DiskError(
            f"{path}: cannot be written ({problem.strerror}); mend the permissions, or choose another --output_dir"
        ) from None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another run"
        os.close(descriptor)
        raise InUseError(
            f"{output_dir}: in use by {owner}; wait for it, or choose another --output_dir"
        ) from None
    except OSError as problem:
        os.close(descriptor)
        return f"{output_dir}: cannot be locked ({problem.strerror}); make sure that no second run uses it"
    job = f", SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    owner = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}{job}\n"
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(descriptor, 0)
        os.write(descriptor, owner.encode())
    _held[path] = descriptor
    return None
