"""Features whose numbers overflow in one question of one rank, forward or backward: every rank stops in that step, before its update."""

import csv
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from faults.result import Result, Scale
from support.toy_run import RANKS, ToyRun, last_line, newest_step, start_training, steps_logged
from vico.checkpoint.read import read
from vico.data.features import Features
from vico.io.output_dir import OutputDir
from vico.io.safe_load import load_tensors

NAME = "nan"
TITLE = "a loss, gradient or score that is not finite on one rank: all ranks stop in that step, naming rank, step and question"
MINUTES = (0.7, 3.5)
CASES = (3, 15)
KINDS = ("loss", "gradient", "score")
# In fp16, whose largest number is 65,504. The first is finite in the file, and the projection of it no longer; that of the
# second is a few thousand, and what the objective over frames sends back from it at --tau 1 a few hundred thousand.
HUGE, LARGE = 1e30, 1e5


def run(scale: Scale) -> Result:
    world = ToyRun.make(scale.folder / "world")
    num = CASES[not scale.quick]

    def case(number: int) -> tuple[str, int, int]:
        kind, stage = KINDS[number % 3], (2, 3)[number % 2]
        rng = random.Random(f"{scale.seed} {number}")
        problem, rank, step = _case(world, stage, kind, scale.folder / f"case{number}", rng)
        return f"case {number}, {kind}: {problem}" if problem else "", rank, step

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(case, range(num)))
    failures = [problem for problem, _, _ in results if problem]
    return Result(
        num - len(failures),
        num,
        {"failures": failures, "ranks_and_steps": [result[1:] for result in results]},
    )


def _case(
    world: ToyRun, stage: int, kind: str, folder: Path, rng: random.Random
) -> tuple[str, int, int]:
    """(what is wrong, the rank and the step that were named)."""
    score = kind == "score"
    spoilt = ToyRun(Path(shutil.copytree(world.folder, folder)))
    data = folder / "data" / "nextqa"
    with (data / ("val.csv" if score else "train.csv")).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    row = rng.choice(rows)
    if not score:  # one question alone is about the spoilt video
        rows[rows.index(row)] = row = {**row, "video": "spoilt"}
        with (data / "train.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, row.keys())
            writer.writeheader()
            writer.writerows(rows)
        captions = (data / "llava_v15_13b_n6.json").read_text(encoding="utf-8")
        (data / "llava_v15_13b_n6.json").write_text(
            '{"spoilt": "The boy is happy.", ' + captions[1:], encoding="utf-8"
        )
    path = data / "clipvitl14.pth"
    features = {**load_tensors(path, "the features"), row["video"]: _spoilt(kind, rng)}
    torch.save(features, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)  # the old one is still mapped
    Features(path)  # as far as the files go, nothing is wrong
    out = folder / "out"
    how = [
        "--precision",
        "fp16",
        "--seed",
        str(rng.randrange(1000)),
        *(("--qav", "--tau", "1") if kind == "gradient" else ()),
    ]
    ended = start_training([*spoilt.flags(stage, out), *how])
    codes = ended.wait()
    if codes != [4] * RANKS or len(ended.errors) != 1:
        return f"ended with {codes}: {ended.errors or last_line(ended.output)}", -1, -1
    for checkpoint in OutputDir(out).step_checkpoints():
        read_back = read(checkpoint)
        if not all(
            value.isfinite().all()
            for value in (*read_back.weights.values(), *(read_back.moments or {}).values())
        ):
            return f"{checkpoint.name} holds a number that is not finite", -1, -1
    if score:
        named = re.search(
            rf"first question \S+ of video '{row['video']}'", ended.errors[0]
        )  # all that are about it have such scores
        return "" if named else f"the question is not named: {ended.errors}", -1, newest_step(out)
    said = re.search(
        rf"the {kind} is not finite on rank (\d) in step (\d+) \(questions ([^)]*)\); the update was not made",
        ended.errors[0],
    )
    if said is None or f"{row['video']}/{row['qid']}" not in said[3]:
        return f"rank, step or question is not named: {ended.errors}", -1, -1
    if steps_logged(out) != int(said[2]) - 1:
        return (
            f"step {said[2]} was named, and {steps_logged(out)} steps were done",
            int(said[1]),
            int(said[2]),
        )
    return "", int(said[1]), int(said[2])


def _spoilt(kind: str, rng: random.Random) -> torch.Tensor:
    """A video's features: 12 frames, all finite."""
    if kind != "gradient":
        return torch.full((12, 768), HUGE)
    return LARGE * torch.nn.functional.normalize(
        torch.randn(12, 768, generator=torch.Generator().manual_seed(rng.randrange(1000))), dim=1
    )
