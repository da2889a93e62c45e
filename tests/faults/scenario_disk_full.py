"""A disk that fills up at every place of a save: the checkpoint before it stays whole, and nothing half-written stays at all."""

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
from support.toy_run import ToyRun, difference, last_line, newest_step, start_training, stray_files
from vico.errors import DiskError

NAME = "disk_full"
TITLE = "a disk that is full at 21 sizes: the checkpoint before is whole, no stray file behind the next start; and one real run"
MINUTES = (0.5, 0.5)
SIZES = 21
KIB = 1024


def run(scale: Scale) -> Result:
    torch.set_num_threads(1)  # processes are forked
    mounts = _can_mount(scale.folder)
    save_both(scale.folder / "measured", 1)
    one = sum(
        path.stat().st_size for path in (scale.folder / "measured").rglob("*") if path.is_file()
    )
    failures, refused = [], 0
    for number in range(SIZES):
        # From no room for anything new to room for all of it: what two steps hold, the best of each replaced.
        size = (
            one + 16 * KIB + round(number / (SIZES - 1) * 1.2 * one)
            if mounts
            else round(number / (SIZES - 1) * one / 3)
        )
        code, fault = _store(scale.folder / f"disk{number}", size, mounts)
        refused += code
        if fault:
            failures.append(f"{size} bytes: {fault}")
    if not 0 < refused < SIZES:
        failures.append(f"{refused} of {SIZES} sizes were too small, so the sizes test nothing")
    real_runs = int(mounts)  # without a small disk there is none to make, and none is counted
    if mounts and (fault := _real_run(scale.folder)):
        failures.append(f"a real run: {fault}")
    facts = {
        "failures": failures,
        "how": "tmpfs" if mounts else "RLIMIT_FSIZE",
        "sizes_too_small": refused,
        "real_runs": real_runs,
    }
    return Result(max(0, SIZES + real_runs - len(failures)), SIZES + real_runs, facts)


def _store(out: Path, size: int, mounts: bool) -> tuple[bool, str]:
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
        said = os.read(pipe, 1)
        os.close(pipe)
        if said not in (b"1", b"2"):
            return True, "the save ended in something else than a DiskError"
        if said == b"1" and stray_files(out):
            return True, f"left behind already by the save itself: {stray_files(out)}"
        return said == b"1", fault_after(out, int(said))


def _real_run(folder: Path) -> str:
    """It ends with one line and 6; with more room the same command goes on to the undisturbed end."""
    world, out = ToyRun.make(folder / "world"), folder / "out"
    out.mkdir()
    flags = world.flags(2, out)
    with _disk(
        out, 3_500 * KIB, mounts=True
    ):  # a checkpoint takes 920 KiB, and the best one as much
        run = start_training(flags)
        codes = run.wait()
        if (
            codes != [6, 6]
            or len(run.errors) != 1
            or "No space left on device" not in run.errors[0]
        ):
            return f"ended with {codes}: {run.errors or last_line(run.output)}"
        if not newest_step(out):
            return "no checkpoint was left"
        subprocess.run(["mount", "-o", f"remount,size={64 * 1024 * KIB}", str(out)], check=True)
        again = start_training(flags)
        codes = again.wait()
        return (
            difference(world, 2, out)
            if codes == [0, 0]
            else f"with more room it ended with {codes}: {last_line(again.output)}"
        )


@contextmanager
def _disk(folder: Path, size: int, mounts: bool) -> Iterator[None]:
    if not mounts:
        yield
        return
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "vico-selftest", str(folder)], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _can_mount(folder: Path) -> bool:
    place = folder / "mounted"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "vico-selftest", str(place)], capture_output=True, check=False
    ).returncode:
        return False
    return subprocess.run(["umount", str(place)], capture_output=True, check=False).returncode == 0
