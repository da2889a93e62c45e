"""Evaluation is exact: every question once and the same predictions, byte for byte, whatever the batches and the ranks.

The real `evaluate` runs on emulated ranks, one thread each, with a scorer that sees the packed tokens alone; then real
commands on one and two ranks, with a real model, write their prediction files.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faults.damage import rows
from faults.result import Result, Scale
from support.run_fixture import CHECKPOINT, VAL, RunFixture, make_run_fixture
from support.warm_process import WarmProcess
from vico.cli.flags import parse
from vico.data import evaluation_batches
from vico.data.evaluation_batches import guess_tokens
from vico.data.readers.nextqa import GROUPS
from vico.data.types import Question
from vico.distributed.world import World
from vico.errors import UserError
from vico.model.batch import PackedBatch
from vico.train.build import Inputs, read_inputs
from vico.train.config import RunConfig
from vico.train.evaluate import Evaluation, evaluate

NAME = "evaluation"
TITLE = "equal counts and bytes over numbers of questions, batches and ranks"
MINUTES = (0.8, 4.0)
BATCHES, RANKS, MOST = (1, 2, 3, 5, 8), range(1, 9), 33
QUICK_NUMBERS = (0, 1, 2, 7, 9, 16, 33)
REAL = {
    True: [(3, "zero3")],
    False: [(1, "zero2"), (1, "zero3"), (2, "zero3"), (3, "zero3"), (33, "zero2"), (33, "zero3")],
}
ROOT = Path(__file__).resolve().parents[2]
TYPES = ("CW", "CH", "TN", "TC", "TP", "DL", "DC", "DO")


@dataclass
class Meeting:
    """Where the threads of emulated ranks exchange values."""

    size: int
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        found = [self.values[r] for r in range(self.size)]
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class EmulatedWorld(World):
    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def sum(self, values: Tensor) -> Tensor:
        return values.copy_(torch.stack(self.meeting.exchange(self.rank, values.clone())).sum(0))

    def max(self, value: int) -> int:
        return int(max(self.meeting.exchange(self.rank, value)))

    @contextlib.contextmanager
    def raise_together(self) -> Iterator[None]:
        error: UserError | None = None
        try:
            yield
        except UserError as problem:
            error = problem
        for found in self.meeting.exchange(self.rank, error):
            if found is not None:
                raise found


class Scorer:
    """In the engine's place: a target's loss follows from the tokens before it and its own, and from nothing else.

    So a question that meets another's batch, order or rank has other losses as soon as its tokens are mixed up.
    """

    def train(self, mode: bool) -> None:
        pass

    def forward(self, batch: PackedBatch) -> Tensor:
        ids = batch.token_ids_T.tolist()
        begun: list[Any] = []  # of each segment, the digest of all that stands before it
        for segment in batch.segments:
            parent = segment.parent
            state = hashlib.sha256() if parent is None else begun[parent].copy()
            if parent is not None:
                state.update(
                    _bytes(ids[batch.segments[parent].start : batch.segments[parent].stop])
                )
            begun.append(state)
        losses = []
        for place, wanted in zip(
            batch.token_targets_N.tolist(), batch.token_target_ids_N.tolist(), strict=True
        ):
            row = int(batch.wanted_rows_R[place])
            index = next(
                i for i, segment in enumerate(batch.segments) if segment.start <= row < segment.stop
            )
            state = begun[index].copy()
            state.update(_bytes([*ids[batch.segments[index].start : row + 1], wanted]))
            losses.append(_loss(state.digest()))
        return torch.tensor(losses)


def _bytes(ids: list[int]) -> bytes:
    return b"".join(i.to_bytes(4, "big") for i in ids)


def _loss(digest: bytes) -> float:
    """A number that fp32 holds exactly, and whose sums are exact."""
    return int.from_bytes(digest[:3], "big") / 2**20


def run(scale: Scale) -> Result:
    with WarmProcess() as warm:
        fixture = make_run_fixture(scale.folder / "fixture", warm)
        cases = list(
            itertools.product(QUICK_NUMBERS if scale.quick else range(MOST + 1), BATCHES, RANKS)
        )
        faults = emulate(fixture, cases)
        real = REAL[scale.quick]
        for n, stage in real:
            if fault := try_real(fixture, n, stage, warm):
                faults.append(f"{n} questions, {stage}, 1 and 2 real ranks: {fault}")
    total = len(cases) + len(real)
    return Result(
        total - len(faults), total, {"emulated": len(cases), "real": len(real), "failures": faults}
    )


def emulate(fixture: RunFixture, cases: Sequence[tuple[int, int, int]]) -> list[str]:
    """The faults of these (number of questions, questions per batch, ranks)."""
    config, inputs = open_home(fixture)
    questions, faults = make_questions(), []
    size = guess_tokens(questions[0])  # of each question: all are equally long
    was = evaluation_batches.EVALUATION_TOKENS
    try:
        for n, batch, ranks in cases:
            evaluation_batches.EVALUATION_TOKENS = batch * size
            if fault := try_case(config, inputs, questions[:n], ranks):
                faults.append(f"{n} questions, {batch} per batch, {ranks} ranks: {fault}")
    finally:
        evaluation_batches.EVALUATION_TOKENS = was
    return faults


def open_home(fixture: RunFixture) -> tuple[RunConfig, Inputs]:
    config = parse(fixture.flags, "vico eval", "").resolve()
    return config, read_inputs(config, ("val",), World(0, 1, torch.device("cpu"), None))


def make_questions() -> list[Question]:
    """Of equal length, sorted by type, so that batches hold one type each."""
    made = []
    for i in range(MOST):
        options = tuple(f"thing {i:02d} {k}" for k in range(5))
        made.append(
            Question(
                i,
                str(i),
                f"10000{i % 2}",
                TYPES[i * len(TYPES) // MOST],
                f"why {i:03d}",
                options,
                i * 7 % 5,
            )
        )
    return made


def try_case(
    config: RunConfig, inputs: Inputs, questions: list[Question], ranks: int
) -> str | None:
    found = on_ranks(config, inputs, questions, ranks)
    if not questions:
        return (
            None
            if all(isinstance(f, UserError) for f in found)
            else f"no question, and no clear answer: {found}"
        )
    if wrong := next((f for f in found if not isinstance(f, Evaluation)), None):
        return f"{type(wrong).__name__}: {wrong}"
    texts = {"".join(json.dumps(record) + "\n" for record in f.records()) for f in found}
    if texts != {expected_text(config, inputs, questions)}:
        return "other predictions than those of each question alone"
    return next((fault for f in found if (fault := wrong_counts(f, questions))), None)


def on_ranks(config: RunConfig, inputs: Inputs, questions: list[Question], ranks: int) -> list[Any]:
    """What `evaluate` gives, or raises, on each of the ranks."""
    meeting = Meeting(ranks)
    asked = dataclasses.replace(inputs, questions={"val": questions}, dropped={"val": []})

    def rank_of(rank: int) -> Any:
        world = EmulatedWorld(rank, ranks, torch.device("cpu"), None, meeting=meeting)
        try:
            return evaluate(Scorer(), asked, "val", config, world)  # type: ignore[arg-type]
        except UserError as problem:  # on which the ranks have agreed
            return problem
        except Exception as problem:
            meeting.barrier.abort()
            return problem

    with contextlib.redirect_stdout(io.StringIO()), ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(rank_of, range(ranks)))


def expected_text(config: RunConfig, inputs: Inputs, questions: list[Question]) -> str:
    """The predictions of each question asked alone: by none of the code that divides, gathers and counts."""
    lines = []
    for q in questions:
        scores = _scores_alone(config, inputs, q)
        right = {"answer": q.answer, "prediction": scores.index(min(scores))}
        lines.append(
            json.dumps(
                {
                    "index": q.index,
                    "qid": q.qid,
                    "video": q.video,
                    "type": q.type,
                    "scores": scores,
                    **right,
                }
            )
            + "\n"
        )
    return "".join(lines)


_known: dict[str, list[float]] = {}


def _scores_alone(config: RunConfig, inputs: Inputs, q: Question) -> list[float]:
    if q.qid not in _known:
        scores = []
        for answer in range(len(q.options)):
            sequence = inputs.prompts.vqa(q, answer)
            tokens = [max(t, 0) for t in sequence.tokens]
            losses = [
                _loss(hashlib.sha256(_bytes(tokens[: t + 1])).digest()) for t in sequence.targets
            ]
            scores.append(sum(losses) / len(losses))
        _known[q.qid] = scores
    return _known[q.qid]


def wrong_counts(found: Evaluation, questions: list[Question]) -> str | None:
    """Against counts of single predictions."""
    right = Counter(
        GROUPS[q.type] for q, p in zip(questions, found.predictions, strict=True) if p == q.answer
    )
    asked = Counter(GROUPS[q.type] for q in questions)
    plain = {group: (right[group], n) for group, n in asked.items()}
    n = len(questions)
    results = {
        "n": n,
        "n_total": n,
        "acc": sum(right.values()) / n,
        **{group: right[group] / asked[group] for group in asked},
    }
    if found.counts != plain or found.results() != results:
        return f"counts {found.counts} for {plain}"
    return (
        None
        if sum(a for _, a in found.counts.values()) == n
        else "the types' questions are not all"
    )


def try_real(fixture: RunFixture, n: int, stage: str, warm: WarmProcess) -> str | None:
    """`vico eval` of a real model in one process, and by launch/eval.sh on two ranks: the same file, byte for byte."""
    rows(
        *(
            {
                "question": f"why {i}",
                "video": f"10000{i % 2}",
                "type": TYPES[i % 8],
                "answer": str(i % 5),
            }
            for i in range(n)
        )
    )(fixture)
    texts, results = [], []
    for ranks in (1, 2):
        out = fixture.folder / f"out{ranks}"
        shutil.rmtree(out, ignore_errors=True)
        command = [
            *fixture.command(f"eval --resume {{fixture}}/{CHECKPOINT} --deepspeed {stage}"),
            "--output_dir",
            str(out),
        ]
        if ranks == 1:
            ended = warm.run(command, fixture.folder)
            code, said, err = ended.code, ended.out, ended.err
        else:
            environment = {**os.environ, "VICO_RANKS": "2", "OMP_NUM_THREADS": "1"}
            words = ["bash", str(ROOT / "launch" / "eval.sh"), *command[1:]]
            done = subprocess.run(
                words,
                cwd=fixture.folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            code, said, err = done.returncode, done.stdout, done.stderr
        if code != 0:
            return f"exit code {code} on {ranks} rank(s): {err[-300:]}"
        texts.append((out / "predictions_val.jsonl").read_bytes())
        results.append(json.loads([line for line in said.splitlines() if line.startswith("{")][-1]))
    records = [json.loads(line) for line in texts[0].splitlines()]
    with (fixture.folder / VAL).open(encoding="utf-8", newline="") as file:
        ids = [row["qid"] for row in csv.DictReader(file)]
    right = sum(r["answer"] == r["prediction"] for r in records)
    faults = {
        "the files of 1 and 2 ranks differ": texts[0] != texts[1],
        "not every question once, in the file's order": [r["qid"] for r in records] != ids,
        f"results {results} for {right} of {n}": any(
            (r["n"], r["acc"]) != (n, right / n) for r in results
        ),
    }
    return "; ".join(what for what, so in faults.items() if so) or None
