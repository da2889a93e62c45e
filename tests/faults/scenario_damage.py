"""A finished run's newest checkpoint, damaged in every way: the next start finds it, says it, and goes on from an older one."""

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
TITLE = "bit flips, truncations, changed sets of files: all found before the first step, none loaded, an older one chosen"
MINUTES = (0.5, 4.0)
FLIPS = (60, 1000)  # and as many truncations
OLDER = 8
FILES = (WEIGHTS, OPTIMIZER, STATE)
Damage = Callable[[Path], object]  # what it gives back is not used
Case = tuple[str, Damage]


def run(scale: Scale) -> Result:
    world = ToyRun.make(scale.folder / "world")
    for stage in (2, 3):
        undisturbed(world, stage)
    out, other = world.folder / "undisturbed2", world.folder / "undisturbed3"
    config = parse(world.flags(2, out), "vico train", "").resolve()
    rng, failures = random.Random(scale.seed), []
    num = FLIPS[not scale.quick]
    kinds = {"flip": _flips(out, rng, num), "cut": _cuts(out, rng, num), "files": _sets(out, other)}
    counts = {}
    for kind, cases in kinds.items():
        counts[kind] = 0
        for what, damage in cases:
            counts[kind] += 1
            if fault := _fault(out, config, damage):
                failures.append(f"{what}: {fault}")
    if fault := _real_start(world, out):
        failures.append(fault)
    total = sum(counts.values()) + 1
    return Result(total - len(failures), total, {"failures": failures, **counts, "real_starts": 1})


def _newest(out: Path) -> Path:
    return out / f"checkpoint-{LAST_STEP}"


def _fault(out: Path, config: RunConfig, damage: Damage) -> str:
    """What goes wrong with the damaged run; empty: nothing. The damage is undone."""
    newest, kept = _newest(out), out.with_name("kept")
    shutil.copytree(newest, kept)
    note = OutputDir(out).latest.read_bytes()
    damage(newest)
    try:
        found = find_start(config)
    except CheckpointError as error:
        return f"no older one was chosen: {error}"
    except UserError as error:
        return f"refused: {error}"
    finally:
        shutil.rmtree(newest, ignore_errors=True)
        kept.rename(newest)
        OutputDir(out).latest.write_bytes(note)
    assert found.checkpoint is not None
    older = read_checkpoint(out / f"checkpoint-{OLDER}")
    if found.checkpoint.path != older.path:
        return f"{found.checkpoint.path.name} was loaded"
    if not all(
        torch.equal(found.checkpoint.weights[name], value) for name, value in older.weights.items()
    ):
        return "other tensors were loaded than those of the older checkpoint"
    told = " ".join(found.notes)
    return "" if "passed over" in told and newest.name in told else "nothing was said"


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
    """Fifty sets of files that no save has left: `other` is a run of its own, with the same settings."""
    older, theirs = out / f"checkpoint-{OLDER}", other / f"checkpoint-{LAST_STEP}"
    for name in FILES:
        for what, change in (
            ("gone", _gone),
            ("a folder", _folder),
            ("a link to nowhere", _link),
            ("renamed", _renamed),
            ("doubled", _doubled),
        ):
            yield f"{name} is {what}", partial(change, name)
        sources = {
            f"that of step {step}": out / f"checkpoint-{step}" / name for step in (2, 4, 6, OLDER)
        }
        sources |= {
            f"{source} of step {OLDER}": older / source for source in FILES if source != name
        }
        sources |= {f"that of another run's step {OLDER}": other / f"checkpoint-{OLDER}" / name}
        if name == STATE:
            sources |= {"another run's": theirs / name}
        for what, source in sources.items():
            yield f"{name} is {what}", partial(_holding, name, source.read_bytes())
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


def _real_start(world: ToyRun, out: Path) -> str:
    """One damaged checkpoint met by the whole program: said before the first step, and the run ends as it should."""
    good = (_newest(out) / WEIGHTS).read_bytes()
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    (_newest(out) / WEIGHTS).write_bytes(damaged)
    run = start_training(world.flags(2, out))
    codes, said = run.wait(), run.output
    before = said.partition("\nsteps: ")[0]
    if (
        codes != [0, 0]
        or "damaged (its sha256 is not the recorded one)" not in before
        or f"resuming from step {OLDER}" not in said
    ):
        return f"a real start ended with {codes}: {said[-300:]!r}"
    return (
        ""
        if (_newest(out) / WEIGHTS).read_bytes() == good
        else "a real start behind damage ended in other bits"
    )
