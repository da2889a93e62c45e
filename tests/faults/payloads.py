"""Pickles that make a canary file when they are loaded, and the files that can hold them."""

import builtins
import cProfile
import functools
import gzip
import io
import logging
import marshal
import os
import pathlib
import pickle
import runpy
import shelve
import shutil
import signal
import sqlite3
import subprocess
import tarfile
import tempfile
import timeit
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Of torch < 1.6: magic number and version, and the empty list of storages behind the content.
OLD_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2)
NO_KEYS = pickle.dumps([], protocol=2)


class Call:
    """Pickled, this is a call of `function`; its arguments may be such calls."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def payloads(canary: Path) -> dict[str, bytes]:
    """By what they call: pickles that make the file or folder `canary`."""
    c, touch = str(canary), ["touch", str(canary)]
    code = f"open({c!r}, 'w').close()"
    script = canary.with_suffix(".py")
    script.write_text(code)
    compiled = marshal.dumps(compile(code, "x", "exec"))
    calls = {
        "os.mkdir": Call(os.mkdir, c),
        "os.makedirs": Call(os.makedirs, c),
        "os.mknod": Call(os.mknod, c),
        "os.open": Call(os.open, c, os.O_CREAT | os.O_WRONLY),
        "os.symlink": Call(os.symlink, "/", c),
        "os.system": Call(os.system, f"touch {c}"),
        "os.popen": Call(os.popen, f"touch {c}"),
        "os.execvp": Call(os.execvp, "touch", touch),
        "os.spawnvp": Call(os.spawnvp, os.P_WAIT, "touch", touch),
        "os.posix_spawnp": Call(os.posix_spawnp, "touch", touch, {}),
        "subprocess.Popen": Call(subprocess.Popen, touch),
        "subprocess.run": Call(subprocess.run, touch),
        "subprocess.check_output": Call(subprocess.check_output, touch),
        "exec": Call(builtins.exec, code),
        "eval": Call(builtins.eval, f"__import__('os').mkdir({c!r})"),
        "open": Call(builtins.open, c, "w"),
        "io.FileIO": Call(io.FileIO, c, "w"),
        "Path.touch": Call(pathlib.Path.touch, canary),
        "Path.write_text": Call(pathlib.Path.write_text, canary, "x"),
        "shutil.copy": Call(shutil.copy, str(script), c),
        "runpy.run_path": Call(runpy.run_path, str(script)),
        "timeit.timeit": Call(timeit.timeit, code, "pass", timeit.default_timer, 1),
        "cProfile.run": Call(cProfile.run, code, c + ".prof"),
        "functools.reduce": Call(functools.reduce, os.mkdir, [c, 0o777]),
        "list(map(...))": Call(list, Call(map, os.mkdir, [c])),
        "exec of marshalled code": Call(builtins.exec, Call(marshal.loads, compiled)),
        "torch.save": Call(torch.save, {}, c),
        "numpy.save": Call(np.save, Call(io.FileIO, c, "w"), 1),
        "numpy.memmap": Call(np.memmap, c, "uint8", "w+", 0, (1,)),
        "logging.FileHandler": Call(logging.FileHandler, c),
        "sqlite3.connect": Call(sqlite3.connect, c),
        "zipfile.ZipFile": Call(zipfile.ZipFile, c, "w"),
        "tarfile.open": Call(tarfile.open, c, "w"),
        "gzip.open": Call(gzip.open, c, "w"),
        "shelve.open": Call(shelve.open, c),
        "tempfile.mkdtemp": Call(tempfile.mkdtemp, "", canary.name, str(canary.parent)),
    }
    written = {name: pickle.dumps({"model": call}, protocol=2) for name, call in calls.items()}
    by_hand = {  # opcodes that today's pickler no longer writes
        "os.system, protocol 0": f"cos\nsystem\n(S'touch {c}'\ntR.".encode(),
        "os.system, INST": f"(S'touch {c}'\nios\nsystem\n.".encode(),
    }
    return {**written, **by_hand}


def bites(payload: bytes, canary: Path) -> bool:
    """Whether the payload makes the canary: unpickles it without care, in another process."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(20)
        try:
            pickle.loads(payload)
            subprocess.run(["sleep", "0.1"], check=False)  # what it started may take a moment
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return canary_is_there(canary)


def canary_is_there(canary: Path) -> bool:
    """Removes it, too. Some libraries add to the name that they are given."""
    is_there = False
    for path in list(canary.parent.iterdir()):
        if path.name.startswith(canary.name) and path.suffix != ".py":
            is_there = True
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return is_there


# Files


def as_zip(payload: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (("data.pkl", payload), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def as_old(payload: bytes) -> bytes:
    """torch's format before 1.6: five pickles, of which the fourth is the content."""
    return OLD_START + pickle.dumps({"little_endian": True}, protocol=2) + payload + NO_KEYS


def as_old_system(payload: bytes) -> bytes:
    """The same, with the payload in the place of the machine's properties."""
    return OLD_START + payload + pickle.dumps({}, protocol=2) + NO_KEYS


def as_tar(payload: bytes) -> bytes:
    """torch's format before 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def of_size(name: str, size: int) -> bytes:
    """A pickle of some 40 bytes that calls the class with a number, by which it takes memory."""
    module, _, last = name.rpartition(".")
    number = b"\x8a\x08" + size.to_bytes(8, "little")
    return b"\x80\x02c" + f"{module}\n{last}\n".encode() + number + b"\x85R."


def as_npy(payload: bytes) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (117 - len(header)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + payload


def as_safetensors(payload: bytes) -> bytes:
    return len(payload).to_bytes(8, "little") + payload


def as_it_is(payload: bytes) -> bytes:
    return payload


Carrier = Callable[[bytes], bytes]
CARRIERS: tuple[Carrier, ...] = (as_zip, as_old, as_old_system, as_tar, as_npy, as_it_is)
