"""`vico ablate`: what the video, the adapter prompts and other settings are worth, as one table."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vico.cli.flags import make_parser, read_flags, require_resume
from vico.cli.parser import SettingsParser, path_argument
from vico.cli.with_world import with_world
from vico.data.types import Question
from vico.errors import UserError, one_line, show
from vico.io.output_dir import OutputDir
from vico.report.statistics import pair, wilson

if TYPE_CHECKING:  # they import torch, which is slow; a mistyped flag is reported before
    from vico.distributed.world import World
    from vico.train.evaluate import Evaluation

DESCRIPTION = (
    "Take one thing at a time away from a checkpoint (--resume), and measure its accuracy on "
    "--split: with the frames of another video, without the video, without the adapter prompts "
    "(their gates closed), without both. --runs adds what other runs have predicted there: one "
    "trained without captions shows what these are worth. Each accuracy comes with an interval of "
    "95 % (Wilson), its distance to the checkpoint's, and the p-value of that (McNemar). Settings "
    "come from the checkpoint, as for `vico eval`. The last line printed is a JSON object."
)
UNUSED = ("text", "keep", "attention_shares")  # no row of the table depends on them
Key = tuple[str, int, str, str]  # data set, index, qid, video


@dataclass(frozen=True)
class Condition:
    """A row of the table. `is_right`: of each question, in the order of the split."""

    name: str
    title: str
    is_right: list[bool]
    loss: float | None = None  # the mean score of the right options; of a run it is not read

    def to_json(self, trained: "Condition") -> dict[str, Any]:
        """`trained`: what it is compared with."""
        right, n = sum(self.is_right), len(self.is_right)
        paired = pair(trained.is_right, self.is_right)
        result: dict[str, Any] = {"acc": right / n, "interval": list(wilson(right, n))}
        if self.loss is not None:
            result["loss"] = self.loss
        return {**result, "difference": paired.difference, "p_value": paired.p_value}


def main(argv: list[str]) -> int:
    """Run the command on this rank; returns the exit code."""
    parser = make_parser("vico ablate", DESCRIPTION, add_own=_add_own)
    line, typed = read_flags(parser, argv)
    require_resume(line, "to take apart")
    runs: Sequence[Path] = typed.get("runs", ())
    _refuse_repeated(runs)
    _refuse_unused(typed)

    def work(world: "World") -> None:
        from vico.cli.evaluate import settings_of
        from vico.train.ablation import CONDITIONS, ablate
        from vico.train.build import build_engine
        from vico.train.evaluate import require_answers
        from vico.train.rank_consistency import require_same_files
        from vico.train.saved_run import read_for_evaluation
        from vico.train.start import open_evaluation

        with world.raise_together():
            checkpoint = read_for_evaluation(line.given["resume"])
            config, notes = settings_of(checkpoint, line)
        require_same_files(world, config)
        config = replace(config, text=(), keep=None, attention_shares=None)  # of a recipe
        inputs, checkpoint = open_evaluation(config, checkpoint, world)
        questions = inputs.questions[config.split]
        with world.raise_together():
            require_answers(questions, config.split)
            of_runs = [_of_run(run, config.split, questions) for run in runs]
        for note in (*notes, *checkpoint.notes, *inputs.notes):
            world.print_rank0(note)
        engine = build_engine(config, inputs, checkpoint.weights, world)
        found = ablate(engine, inputs, config, world)
        measured = [_measured(name, CONDITIONS[name], of) for name, of in found.items()]
        result = _result(config.split, questions, measured, of_runs)
        world.print_rank0(_table(result, measured, of_runs))
        world.print_rank0(json.dumps(result))

    return with_world(line, work)


def _add_own(parser: SettingsParser) -> None:
    parser.add_argument_group("ablation").add_argument(
        "--runs",
        nargs="+",
        type=path_argument,
        metavar="RUN",
        help="the --output_dir of runs that have evaluated the same split",
    )


def _refuse_repeated(runs: Sequence[Path]) -> None:
    """Raises UserError for a run that is named twice: the table would count it twice."""
    first: dict[str, Path] = {}
    for run in runs:
        other = first.setdefault(os.path.realpath(run), run)
        if other is not run:
            raise UserError(f"--runs {run}: is the same run as {other}; name each run once")


def _refuse_unused(typed: Mapping[str, Any]) -> None:
    """Raises UserError for what is given in vain. A recipe may hold it, for other commands."""
    for name in UNUSED:
        if typed.get(name):
            raise UserError(
                f"--{name}: changes nothing that `vico ablate` measures; leave it out (`vico "
                "cognition` measures texts and attention)"
            )


def _of_run(run: Path, split: str, questions: Sequence[Question]) -> Condition:
    """Raises UserError where the run has not predicted just these questions."""
    path = OutputDir(run).predictions(split)
    several = len({question.dataset for question in questions}) > 1
    predicted = _read_by_key(path, several)
    wanted = [(q.dataset if several else "", q.index, q.qid, q.video) for q in questions]
    differing = set(wanted) ^ predicted.keys()
    if differing:
        raise UserError(
            f"{path}: holds other questions than --split {split}: {len(differing)} are in one of "
            f"both, as {_named(min(differing))}; evaluate that run on this split"
        )
    is_right: list[bool] = []
    for question, key in zip(questions, wanted, strict=True):
        record = predicted[key]
        if record.get("answer") not in (None, question.answer):
            raise UserError(
                f"{path}: the right answer of {_named(key)} is {record['answer']} there, and "
                f"{question.answer} in --split {split}; evaluate that run on these questions"
            )
        is_right.append(record["prediction"] == question.answer)
    return Condition(str(run), str(run), is_right)


def _read_by_key(path: Path, several: bool) -> dict[Key, dict[str, Any]]:
    """The predictions of a run. `several`: data sets. Raises UserError for a repeated one."""
    from vico.train.predictions import read_predictions

    predicted: dict[Key, dict[str, Any]] = {}
    for record in read_predictions(path):
        name = record.get("dataset", "") if several else ""
        key = (name, record["index"], record["qid"], record["video"])
        if predicted.setdefault(key, record) is not record:
            raise UserError(f"{path}: {_named(key)} is there twice; evaluate that run again")
    return predicted


def _named(key: Key) -> str:
    dataset, index, qid, video = key
    of = f"{dataset} " if dataset else ""
    return f"{of}number {index} ({show(qid)} of video {show(video)})"


def _measured(name: str, title: str, evaluation: "Evaluation") -> Condition:
    pairs = zip(evaluation.questions, evaluation.predictions, strict=True)
    is_right = [prediction == question.answer for question, prediction in pairs]
    return Condition(name, title, is_right, evaluation.loss)


def _result(
    split: str,
    questions: Sequence[Question],
    measured: Sequence[Condition],
    of_runs: Sequence[Condition],
) -> dict[str, Any]:
    """The first condition is what the others are compared with.

    Runs have a key of their own: the folder of one may be called like a condition.
    """
    chance = sum(1 / len(question.options) for question in questions) / len(questions)
    return {
        "split": split,
        "n": len(questions),
        "chance": chance,
        "conditions": {row.name: row.to_json(measured[0]) for row in measured},
        "runs": {row.name: row.to_json(measured[0]) for row in of_runs},
    }


def _table(
    result: Mapping[str, Any], measured: Sequence[Condition], of_runs: Sequence[Condition]
) -> str:
    lines = [
        f"{result['split']} accuracy of {result['n']} questions (chance: {result['chance']:.2%}):",
        f"  {'':<32}{'accuracy':>10}{'95 %':>18}{'difference':>13}{'p':>9}",
    ]
    rows = [(condition.title, result["conditions"][condition.name]) for condition in measured]
    rows += [(run.title, result["runs"][run.name]) for run in of_runs]
    for i, (title, row) in enumerate(rows):
        low, high = row["interval"]
        line = f"  {one_line(title)[-31:]:<32}{row['acc']:>10.2%}"
        line += f"{f'{low:.1%} to {high:.1%}':>18}"
        if i > 0:
            line += f"{row['difference']:>+13.2%}{row['p_value']:>9.2g}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":  # `python -m vico.cli.ablate`, or this file
    from vico.cli.main import console

    console(command="ablate")
