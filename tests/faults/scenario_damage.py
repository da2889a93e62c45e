"""A damaged newest checkpoint: the next start finds it, notes it, and resumes from an older one."""

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from faults.result import Result, Scale
from support.toy_run import LAST_STEP, ToyRun, start_training, undisturbed
from vico.checkpoint.format import OPTIMIZER, STATE, WEIGHTS
from vico.checkpoint.read import read as read_checkpoint
from vico.cli.flags import parse
from vico.errors import CheckpointError, UserError
from vico.io.output_dir import OutputDir
from vico.train.config import RunConfig
from vico.train.resume import find_start

NAME = "damage"
TITLE = "flipped bits, cut and mixed files: found before the first step, an older one is chosen"
MINUTES = (0.1, 4.0)
FLIPS = (60, 1000)  # and as many truncations
OLDER = 8
FILES = (WEIGHTS, OPTIMIZER, STATE)
Damage = Callable[[Path], object]  # its return value is ignored
Case = tuple[str, Damage]


def run(scale: Scale) -> Result:
    toy = ToyRun.make(scale.folder / "toy")
    for stage in (2, 3):
        undisturbed(toy, stage)
    out, other = toy.folder / "undisturbed2", toy.folder / "undisturbed3"
    config = parse(toy.flags(2, out), "vico train", "").resolve()
    rng, failures = random.Random(scale.seed), []
    num = FLIPS[not scale.quick]
    kinds = {"flip": _flips(out, rng, num), "cut": _cuts(out, rng, num), "files": _sets(out, other)}
    counts = {}
    for kind, cases in kinds.items():
        counts[kind] = 0
        for what, damage in cases:
            counts[kind] += 1
            if fault := _find_fault(out, config, damage):
                failures.append(f"{what}: {fault}")
    if fault := _real_start(toy, out):
        failures.append(fault)
    total = sum(counts.values()) + 1
    return Result(total - len(failures), total, {"failures": failures, **counts, "real_starts": 1})


def _newest(out: Path) -> Path:
    return out / f"checkpoint-{LAST_STEP}"


def _find_fault(out: Path, config: RunConfig, damage: Damage) -> str:
    """What goes wrong at a start behind the damage; empty: nothing. The damage is undone."""
    newest, kept = _newest(out), out.with_name("kept")
    shutil.copytree(newest, kept)
    latest = OutputDir(out).latest
    note = latest.read_bytes()
    damage(newest)
    try:
        start = find_start(config)
    except CheckpointError as error:
        return f"no older one was chosen: {error}"
    except UserError as error:
        return f"refused: {error}"
    finally:
        shutil.rmtree(newest, ignore_errors=True)
        kept.rename(newest)
        latest.write_bytes(note)
    chosen, older = start.checkpoint, read_checkpoint(out / f"checkpoint-{OLDER}")
    assert chosen is not None
    if chosen.path != older.path:
        return f"{chosen.path.name} was loaded"
    if not all(torch.equal(chosen.weights[name], value) for name, value in older.weights.items()):
        return "other tensors were loaded than those of the older checkpoint"
    notes = " ".join(start.notes)
    return "" if "passed over" in notes and newest.name in notes else "nothing was noted"


def _flips(out: Path, rng: random.Random, num: int) -> Iterator[Case]:
    for _ in range(num):
        name = rng.choice(FILES)
        place, bit = rng.randrange((_newest(out) / name).stat().st_size), rng.randrange(8)

        def damage(folder: Path, name: str = name, place: int = place, bit: int = bit) -> None:
            data = bytearray((folder / name).read_bytes())
            data[place] ^= 1 << bit
            (folder / name).write_bytes(data)

        yield f"bit {bit} of byte {place} of {name} flipped", damage


def _cuts(out: Path, rng: random.Random, num: int) -> Iterator[Case]:
    for number in range(num):
        name = rng.choice(FILES)
        size = (_newest(out) / name).stat().st_size
        length = (0, 1, 10, size - 1, size - 22)[number] if number < 5 else rng.randrange(size)

        def damage(folder: Path, name: str = name, length: int = length) -> None:
            (folder / name).write_bytes((folder / name).read_bytes()[:length])

        yield f"{name} cut to {length} bytes", damage


def _sets(out: Path, other: Path) -> Iterator[Case]:
    """Fifty sets of files that no save leaves. `other` is another run with the same settings."""
    older, theirs = out / f"checkpoint-{OLDER}", other / f"checkpoint-{LAST_STEP}"
    changes = {
        "gone": _gone,
        "a folder": _folder,
        "a link to nowhere": _link,
        "renamed": _renamed,
        "doubled": _doubled,
    }
    for name in FILES:
        for what, change in changes.items():
            yield f"{name} is {what}", partial(change, name)
        sources = {}
        for step in (2, 4, 6, OLDER):
            sources[f"that of step {step}"] = out / f"checkpoint-{step}" / name
        for source in FILES:
            if source != name:
                sources[f"{source} of step {OLDER}"] = older / source
        sources[f"that of another run's step {OLDER}"] = other / f"checkpoint-{OLDER}" / name
        if name == STATE:
            sources["another run's"] = theirs / name
        for what, path in sources.items():
            yield f"{name} is {what}", partial(_holding, name, path.read_bytes())
        for text in (b"", b"{}", b"\xff" * 100, b"<html>quota exceeded</html>"):
            yield f"{name} holds {text[:6]!r}", partial(_holding, name, text)
    yield "the checkpoint is that of another step", partial(_copied, older)
    yield "the checkpoint is that of another run", partial(_copied, theirs)
    yield "the checkpoint is gone", shutil.rmtree
    yield "a stray file", partial(_holding, "pytorch_model.bin", b"")


def _gone(name: str, folder: Path) -> None:
    (folder / name).unlink()


def _folder(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def _link(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")


def _renamed(name: str, folder: Path) -> None:
    (folder / name).rename(folder / f"{name}.old")


def _doubled(name: str, folder: Path) -> None:
    shutil.copy(folder / name, folder / f"copy of {name}")


def _holding(name: str, data: bytes, folder: Path) -> None:
    (folder / name).write_bytes(data)


def _copied(source: Path, folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(source, folder)


def _real_start(toy: ToyRun, out: Path) -> str:
    """One damage met by the whole program: noted before the first step; the end is the same."""
    path = _newest(out) / WEIGHTS
    expected = path.read_bytes()
    damaged = bytearray(expected)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    run = start_training(toy.flags(2, out))
    codes, output = run.wait(), run.output
    before = output.partition("training steps")[0]
    noted = "damaged (its sha256 is not the recorded one)" in before
    if codes != [0, 0] or not noted or f"resuming from step {OLDER}" not in output:
        return f"a real start ended with {codes}: {output[-300:]!r}"
    return "" if path.read_bytes() == expected else "a real start ended in other bits"
