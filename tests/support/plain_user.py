"""Calls as a user whom permissions bind: root may read and write everything."""

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

NOBODY = 65534
T = TypeVar("T")


@contextmanager
def folder_of_anyone() -> Iterator[Path]:
    """A new folder that every user may enter and write: pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder)


def is_bound_by_permissions() -> bool:
    """Whether this is no root, or one without its rights, as `.ci/run` makes it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    rights = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return int(rights.split()[1], 16) == 0


def as_plain_user(call: Callable[[], T]) -> T:
    """The result of `call`, or its exception: in a child that is not root, or here by no root."""
    if is_bound_by_permissions():
        return call()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(call, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    has_failed, result = pickle.loads(answer)
    if has_failed:
        raise result
    returned: T = result
    return returned


def _answer(call: Callable[[], T], writing: int) -> None:
    try:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        answer = pickle.dumps((False, call()))
    except BaseException as problem:
        answer = pickle.dumps((True, problem))
    with open(writing, "wb") as pipe:
        pipe.write(answer)
    os._exit(0)
