"""Evaluation is exact: every question once, the same predictions for all batches and ranks.

The real `evaluate` runs on emulated ranks with a scorer in the engine's place. Then real commands
on one and two ranks, with a real model, write their prediction files.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from faults.damage_tables import rows
from faults.emulated_ranks import EmulatedWorld, Exchange, Scorer, loss_of, token_bytes
from faults.result import Result, Scale
from support.processes import launch
from support.run_fixture import CHECKPOINT, VAL, RunFixture, make_run_fixture
from support.warm_process import WarmProcess
from vico.cli.flags import parse
from vico.data import evaluation_batches
from vico.data.evaluation_batches import guess_tokens
from vico.data.readers.nextqa import GROUPS
from vico.data.types import Question
from vico.distributed.world import World
from vico.errors import UserError
from vico.train.build import Inputs, read_inputs
from vico.train.config import RunConfig
from vico.train.evaluate import Evaluation, evaluate

NAME = "evaluation"
TITLE = "equal counts and bytes over numbers of questions, batches and ranks"
MINUTES = (0.3, 4.0)
BATCHES, RANKS, MAX_QUESTIONS = (1, 2, 3, 5, 8), range(1, 9), 33
QUICK_NUMBERS = (0, 1, 2, 7, 9, 16, 33)
REAL = {
    True: [(3, "zero3")],
    False: [(1, "zero2"), (1, "zero3"), (2, "zero3"), (3, "zero3"), (33, "zero2"), (33, "zero3")],
}
TYPES = ("CW", "CH", "TN", "TC", "TP", "DL", "DC", "DO")


def run(scale: Scale) -> Result:
    numbers = QUICK_NUMBERS if scale.quick else range(MAX_QUESTIONS + 1)
    cases = list(itertools.product(numbers, BATCHES, RANKS))
    real = REAL[scale.quick]
    with WarmProcess() as warm:
        fixture = make_run_fixture(scale.folder / "fixture", warm)
        failures = emulate(fixture, cases)
        for num_questions, stage in real:
            if fault := try_real(fixture, num_questions, stage, warm):
                failures.append(f"{num_questions} questions, {stage}, 1 and 2 real ranks: {fault}")
    total = len(cases) + len(real)
    facts = {"emulated": len(cases), "real": len(real), "failures": failures}
    return Result(total - len(failures), total, facts)


# ---- emulated ranks -----------------------------------------------------------------------------


def emulate(fixture: RunFixture, cases: Sequence[tuple[int, int, int]]) -> list[str]:
    """The faults of these (number of questions, questions per batch, ranks)."""
    config, inputs = read_fixture(fixture)
    questions, faults = make_questions(), []
    size = guess_tokens(questions[0])  # of each question: all are equally long
    default = evaluation_batches.EVALUATION_TOKENS
    try:
        for num_questions, batch, ranks in cases:
            evaluation_batches.EVALUATION_TOKENS = batch * size
            if fault := try_case(config, inputs, questions[:num_questions], ranks):
                case = f"{num_questions} questions, {batch} per batch, {ranks} ranks"
                faults.append(f"{case}: {fault}")
    finally:
        evaluation_batches.EVALUATION_TOKENS = default
    return faults


def read_fixture(fixture: RunFixture) -> tuple[RunConfig, Inputs]:
    config = parse(fixture.flags, "vico eval", "").resolve()
    return config, read_inputs(config, ("val",), World(0, 1, torch.device("cpu"), None))


def make_questions() -> list[Question]:
    """Of equal length, sorted by type, so that batches hold one type each."""
    questions = []
    for i in range(MAX_QUESTIONS):
        video, kind = f"10000{i % 2}", TYPES[i * len(TYPES) // MAX_QUESTIONS]
        options = tuple(f"thing {i:02d} {k}" for k in range(5))
        question = Question(i, str(i), video, kind, f"why {i:03d}", options, i * 7 % 5)
        questions.append(dataclasses.replace(question, dataset="nextqa"))
    return questions


def try_case(
    config: RunConfig, inputs: Inputs, questions: list[Question], ranks: int
) -> str | None:
    """What is wrong on the emulated ranks; None: nothing."""
    results = evaluate_on_ranks(config, inputs, questions, ranks)
    if not questions:
        refused = all(isinstance(result, UserError) for result in results)
        return None if refused else f"no question, and no clear answer: {results}"
    expected = expected_text(inputs, questions)
    for result in results:
        if not isinstance(result, Evaluation):
            return f"{type(result).__name__}: {result}"
        text = "".join(json.dumps(record) + "\n" for record in result.records())
        if text != expected:
            return "other predictions than those of each question alone"
        if fault := wrong_counts(result, questions):
            return fault
    return None


def evaluate_on_ranks(
    config: RunConfig, inputs: Inputs, questions: list[Question], ranks: int
) -> list[Any]:
    """What `evaluate` returns, or raises, on each of the ranks."""
    exchange = Exchange(ranks)
    inputs = dataclasses.replace(inputs, questions={"val": questions}, dropped={"val": []})

    def run_rank(rank: int) -> Any:
        world = EmulatedWorld(rank, ranks, torch.device("cpu"), None, exchange=exchange)
        try:
            return evaluate(Scorer(), inputs, "val", config, world)  # type: ignore[arg-type]
        except UserError as problem:  # the ranks have agreed on it
            return problem
        except Exception as problem:
            exchange.barrier.abort()
            return problem

    with contextlib.redirect_stdout(io.StringIO()), ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run_rank, range(ranks)))


def expected_text(inputs: Inputs, questions: list[Question]) -> str:
    """The predictions of each question alone, without the code that divides and gathers."""
    lines = []
    for question in questions:
        scores = _scores_alone(inputs, question)
        record = {
            "index": question.index,
            "qid": question.qid,
            "video": question.video,
            "type": question.type,
            "scores": scores,
            "answer": question.answer,
            "prediction": scores.index(min(scores)),
        }
        lines.append(json.dumps(record) + "\n")
    return "".join(lines)


_cached_scores: dict[str, list[float]] = {}


def _scores_alone(inputs: Inputs, question: Question) -> list[float]:
    """The mean loss of each option's targets."""
    if question.qid not in _cached_scores:
        scores = []
        for answer in range(len(question.options)):
            sequence = inputs.datasets[question.dataset].prompts.vqa(question, answer)
            tokens = [max(token, 0) for token in sequence.tokens]
            losses = []
            for target in sequence.targets:
                digest = hashlib.sha256(token_bytes(tokens[: target + 1])).digest()
                losses.append(loss_of(digest))
            scores.append(sum(losses) / len(losses))
        _cached_scores[question.qid] = scores
    return _cached_scores[question.qid]


def wrong_counts(evaluation: Evaluation, questions: list[Question]) -> str | None:
    """Compares with counts of single predictions."""
    scored, right = Counter[str](), Counter[str]()
    for question, prediction in zip(questions, evaluation.predictions, strict=True):
        group = GROUPS[question.type]
        scored[group] += 1
        right[group] += prediction == question.answer
    counts = {group: (right[group], number) for group, number in scored.items()}
    n = len(questions)
    accuracies = {group: right[group] / scored[group] for group in scored}
    results = {"n": n, "n_total": n, "acc": sum(right.values()) / n, **accuracies}
    if evaluation.counts != counts or evaluation.results() != results:
        return f"counts {evaluation.counts} for {counts}"
    total = sum(number for _, number in evaluation.counts.values())
    return None if total == n else "the types' questions are not all"


# ---- real ranks ---------------------------------------------------------------------------------


def try_real(fixture: RunFixture, num_questions: int, stage: str, warm: WarmProcess) -> str | None:
    """`vico eval` in one process and by launch/eval.sh on two ranks: equal files, byte for byte."""
    _write_questions(fixture, num_questions)
    texts, results = [], []
    for ranks in (1, 2):
        out = fixture.folder / f"out{ranks}"
        shutil.rmtree(out, ignore_errors=True)
        line = f"eval --resume {{fixture}}/{CHECKPOINT} --deepspeed {stage}"
        command = [*fixture.command(line), "--output_dir", str(out)]
        code, stdout, stderr = _evaluate(command, ranks, fixture.folder, warm)
        if code != 0:
            return f"exit code {code} on {ranks} rank(s): {stderr[-300:]}"
        texts.append((out / "predictions_val.jsonl").read_bytes())
        json_lines = [line for line in stdout.splitlines() if line.startswith("{")]
        results.append(json.loads(json_lines[-1]))
    records = [json.loads(line) for line in texts[0].splitlines()]
    with (fixture.folder / VAL).open(encoding="utf-8", newline="") as file:
        ids = [row["qid"] for row in csv.DictReader(file)]
    num_right = sum(record["answer"] == record["prediction"] for record in records)
    expected = (num_questions, num_right / num_questions)
    same_results = all((result["n"], result["acc"]) == expected for result in results)
    faults = {
        "the files of 1 and 2 ranks differ": texts[0] != texts[1],
        "not every question once, in the file's order": [r["qid"] for r in records] != ids,
        f"results {results} for {num_right} of {num_questions}": not same_results,
    }
    return "; ".join(what for what, is_so in faults.items() if is_so) or None


def _write_questions(fixture: RunFixture, num_questions: int) -> None:
    changes = []
    for i in range(num_questions):
        change = {"question": f"why {i}", "video": f"10000{i % 2}"}
        changes.append({**change, "type": TYPES[i % len(TYPES)], "answer": str(i % 5)})
    rows(*changes)(fixture)


def _evaluate(
    command: list[str], ranks: int, cwd: Path, warm: WarmProcess
) -> tuple[int | None, str, str]:
    """(exit code, stdout, stderr)."""
    if ranks == 1:
        result = warm.run(command, cwd)
        return result.code, result.stdout, result.stderr
    run = launch("eval.sh", *command[1:], ranks=ranks, cwd=cwd)
    (code,) = run.wait()
    return code, run.stdouts[0], run.stderrs[0]
