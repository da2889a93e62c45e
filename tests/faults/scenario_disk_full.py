"""A disk that fills up anywhere in a save: the checkpoint before it stays whole, with no strays."""

import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from faults.result import Result, Scale
from faults.small_store import fault_after, in_child, save_both
from support.toy_run import (
    ToyRun,
    difference,
    last_line,
    newest_step,
    start_training,
    stray_files,
)
from vico.errors import DiskError

NAME = "disk_full"
TITLE = "a disk full at 21 sizes and in a real run: the checkpoint before is whole, no strays"
MINUTES = (0.2, 0.5)
SIZES = 21
KIB = 1024
# A checkpoint takes 920 KiB, and the best one as much.
REAL_DISK, REAL_DISK_WITH_ROOM = 3_500 * KIB, 64 * 1024 * KIB


def run(scale: Scale) -> Result:
    torch.set_num_threads(1)  # processes are forked
    mounts = _can_mount(scale.folder)
    save_both(scale.folder / "measured", 1)
    files = [path for path in (scale.folder / "measured").rglob("*") if path.is_file()]
    bytes_per_step = sum(path.stat().st_size for path in files)
    failures, num_full = [], 0
    for number in range(SIZES):
        size = _disk_size(number / (SIZES - 1), bytes_per_step, mounts)
        full, fault = _save_on_disk(scale.folder / f"disk{number}", size, mounts)
        num_full += full
        if fault:
            failures.append(f"{size} bytes: {fault}")
    if not 0 < num_full < SIZES:
        failures.append(f"{num_full} of {SIZES} sizes were too small, so the sizes test nothing")
    # Without a small disk no real run can be made, and none is counted.
    real_runs = int(mounts)
    if mounts and (fault := _real_run(scale.folder)):
        failures.append(f"a real run: {fault}")
    facts = {
        "failures": failures,
        "how": "tmpfs" if mounts else "RLIMIT_FSIZE",
        "sizes_too_small": num_full,
        "real_runs": real_runs,
    }
    total = SIZES + real_runs
    return Result(max(0, total - len(failures)), total, facts)


def _disk_size(share: float, bytes_per_step: int, mounts: bool) -> int:
    """From room for nothing new (`share` 0) to room for all of step 2 (1).

    A disk holds both steps, with the best checkpoint replaced. A limit is that of one file.
    """
    if not mounts:
        return round(share * bytes_per_step / 3)
    return bytes_per_step + 16 * KIB + round(share * 1.2 * bytes_per_step)


def _save_on_disk(out: Path, size: int, mounts: bool) -> tuple[bool, str]:
    """(whether the disk was too small for step 2, what is wrong then)."""
    out.mkdir()
    with _disk(out, size, mounts):
        save_both(out, 1)

        def work(pipe: int) -> None:
            if not mounts:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            try:
                save_both(out, 2)
                os.write(pipe, b"2")
            except DiskError:
                os.write(pipe, b"1")

        pid, pipe = in_child(work)
        os.waitpid(pid, 0)
        step = os.read(pipe, 1)
        os.close(pipe)
        if step not in (b"1", b"2"):
            return True, "the save ended in something else than a DiskError"
        if step == b"1" and (strays := stray_files(out)):
            return True, f"left behind by the save itself: {strays}"
        return step == b"1", fault_after(out, int(step))


def _real_run(folder: Path) -> str:
    """It ends with one line and 6; with more room the same command reaches the undisturbed end."""
    toy, out = ToyRun.make(folder / "toy"), folder / "out"
    out.mkdir()
    flags = toy.flags(2, out)
    with _disk(out, REAL_DISK, mounts=True):
        run = start_training(flags)
        codes = run.wait()
        errors = run.errors
        if codes != [6, 6] or len(errors) != 1 or "No space left on device" not in errors[0]:
            return f"ended with {codes}: {errors or last_line(run.output)}"
        if not newest_step(out):
            return "no checkpoint was left"
        remount = ["mount", "-o", f"remount,size={REAL_DISK_WITH_ROOM}", str(out)]
        subprocess.run(remount, check=True)
        rerun = start_training(flags)
        if rerun.wait() != [0, 0]:
            return f"with more room it ended with {rerun.codes}: {last_line(rerun.output)}"
        return difference(toy, 2, out)


@contextmanager
def _disk(folder: Path, size: int, mounts: bool) -> Iterator[None]:
    if not mounts:
        yield
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "vico-selftest", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _can_mount(folder: Path) -> bool:
    place = folder / "mounted"
    place.mkdir()
    for command in (["mount", "-t", "tmpfs", "vico-selftest", str(place)], ["umount", str(place)]):
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return False
    return True
