"""Numbers that overflow in one question of one rank: every rank stops in that step, unupdated."""

import csv
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from faults.result import Result, Scale
from support.toy_run import (
    RANKS,
    ToyRun,
    last_line,
    newest_step,
    start_training,
    steps_logged,
)
from vico.checkpoint.read import read
from vico.data.features import Features
from vico.io.output_dir import OutputDir
from vico.io.safe_load import load_tensors

NAME = "nan"
TITLE = "a loss, gradient or score that is not finite: rank, step and question are named"
MINUTES = (0.3, 3.5)
CASES = (3, 15)
KINDS = ("loss", "gradient", "score")
# In fp16, whose largest number is 65,504. HUGE is finite in the file, but its projection is not.
# The projection of LARGE is a few thousand, but the gradient of the objective over frames at
# --tau 1 is a few hundred thousand.
HUGE, LARGE = 1e30, 1e5
SPOILT_VIDEO = "spoilt"


def run(scale: Scale) -> Result:
    toy = ToyRun.make(scale.folder / "toy")
    num = CASES[not scale.quick]

    def case(number: int) -> tuple[str, int, int]:
        kind, stage = KINDS[number % 3], (2, 3)[number % 2]
        rng = random.Random(f"{scale.seed} {number}")
        spoilt = ToyRun(Path(shutil.copytree(toy.folder, scale.folder / f"case{number}")))
        problem, rank, step = _case(spoilt, stage, kind, rng)
        return f"case {number}, {kind}: {problem}" if problem else "", rank, step

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(case, range(num)))
    failures = [problem for problem, _, _ in results if problem]
    ranks_and_steps = [(rank, step) for _, rank, step in results]
    facts = {"failures": failures, "ranks_and_steps": ranks_and_steps}
    return Result(num - len(failures), num, facts)


def _case(toy: ToyRun, stage: int, kind: str, rng: random.Random) -> tuple[str, int, int]:
    """(what is wrong, the rank and the step that were named; -1: none)."""
    row = _spoil(toy.folder / "data" / "nextqa", kind, rng)
    out = toy.folder / "out"
    flags = [*toy.flags(stage, out), "--precision", "fp16", "--seed", str(rng.randrange(1000))]
    if kind == "gradient":
        flags += ["--qav", "--tau", "1"]
    run = start_training(flags)
    codes = run.wait()
    if codes != [4] * RANKS or len(run.errors) != 1:
        return f"ended with {codes}: {run.errors or last_line(run.output)}", -1, -1
    (error,) = run.errors
    if name := _spoilt_checkpoint(out):
        return f"{name} holds a number that is not finite", -1, -1
    if kind == "score":  # all questions about the video have such scores
        named = re.search(rf"first question \S+ of video '{row['video']}'", error)
        return "" if named else f"the question is not named: {error}", -1, newest_step(out)
    where = rf"the {kind} is not finite on rank (\d) in step (\d+) \(questions ([^)]*)\)"
    said = re.search(rf"{where}; the update was not made", error)
    if said is None or f"{row['video']}/{row['qid']}" not in said[3]:
        return f"rank, step or question is not named: {error}", -1, -1
    rank, step = int(said[1]), int(said[2])
    done = steps_logged(out)
    problem = "" if done == step - 1 else f"step {step} was named, and {done} steps were done"
    return problem, rank, step


def _spoil(data: Path, kind: str, rng: random.Random) -> dict[str, str]:
    """Make the features of one video overflow; returns the row of a question about it.

    One training question alone is about it; where scores must overflow, it is a video of val.
    """
    table = data / ("val.csv" if kind == "score" else "train.csv")
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    row = rng.choice(rows)
    if kind != "score":
        row["video"] = SPOILT_VIDEO
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, row.keys())
            writer.writeheader()
            writer.writerows(rows)
        captions = data / "llava_v15_13b_n6.json"
        others = captions.read_text(encoding="utf-8").removeprefix("{")
        text = f'{{"{SPOILT_VIDEO}": "The boy is happy.", {others}'
        captions.write_text(text, encoding="utf-8")
    path = data / "clipvitl14.pth"
    features = {**load_tensors(path, "the features"), row["video"]: _overflowing(kind, rng)}
    torch.save(features, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)  # the old one is still mapped
    Features(path)  # the file itself is valid
    return row


def _overflowing(kind: str, rng: random.Random) -> torch.Tensor:
    """[12, 768], all finite: a video's features."""
    if kind != "gradient":
        return torch.full((12, 768), HUGE)
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    frames = torch.randn(12, 768, generator=generator)
    return LARGE * torch.nn.functional.normalize(frames, dim=1)


def _spoilt_checkpoint(out: Path) -> str:
    """The name of a checkpoint with a number that is not finite; empty: there is none."""
    for path in OutputDir(out).step_checkpoints():
        checkpoint = read(path)
        tensors = [*checkpoint.weights.values(), *(checkpoint.moments or {}).values()]
        if not all(value.isfinite().all() for value in tensors):
            return path.name
    return ""
