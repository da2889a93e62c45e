"""`vico ask`: put a question about a video to a checkpoint, or many by a file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vico.cli.flags import CommandLine, make_parser, read_words, require_resume
from vico.cli.parser import SettingsParser, path_argument
from vico.cli.with_world import with_world
from vico.data.datasets import find_dataset
from vico.data.readers import rows, schema
from vico.data.readers.rows import RowError
from vico.data.types import Question
from vico.errors import UserError, fail, show
from vico.io import log
from vico.io.atomic import require_writable, write_lines
from vico.train.config import RunConfig

if TYPE_CHECKING:  # they import torch, which is slow; a mistyped flag is reported before
    from vico.checkpoint.format import Checkpoint
    from vico.data.features import Features
    from vico.distributed.world import World
    from vico.train.asking import Answer, AskedModel

USAGE = '--resume CHECKPOINT (--features F --video_id ID) "QUESTION" --options A B [...] [FLAGS]'
DESCRIPTION = (
    "Ask a checkpoint (--resume) which of 2 to 26 options answers a question about a video. "
    "Settings come from the checkpoint, as for `vico eval`; a flag that is given wins. The answer "
    "is the option with the lowest score, the mean cross-entropy of its target tokens, as `vico "
    "eval` chooses. An option's probability is the softmax over the options of minus the sum of "
    "its target tokens' cross-entropies; both rank alike where all options have as many target "
    "tokens. The last line printed is a JSON object with answer, probabilities and scores. "
    "Example: vico ask --resume runs/a --features clips.pth --video_id 0017 'what does the dog "
    "chase' --options 'a ball' 'a cat'."
)
GROUP = "asking"
# Flags of this command: the name of each is known by `typed`.
ONE = ("video_id", "options")  # of one question on the command line


@dataclass(frozen=True)
class Request:
    """What is asked, as the flags say it."""

    question: str | None  # None: `questions` holds them
    options: tuple[str, ...]
    questions: Path | None
    features: Path | None  # None: those of the run's data set
    video_id: str | None
    output: Path | None

    def read(self) -> tuple[list[Question], list[str]]:
        """The questions, and how a file of them was read. Raises UserError."""
        if self.questions is not None:
            questions = schema.read_file(self.questions)
            return questions, [f"{self.questions.name}: {note}" for note in questions.notes]
        assert self.question is not None and self.video_id is not None
        return [one_question(self.question, self.options, self.video_id)], []


def main(argv: list[str]) -> int:
    """Run the command on this rank; returns the exit code."""
    parser = make_parser("vico ask", DESCRIPTION, prints=False, usage=USAGE, add_own=_add_own)
    line, typed, words = read_words(parser, argv)
    request = _request(typed, words, parser)
    require_resume(line, "to ask")

    def work(world: "World") -> None:
        model = open_model(line, world)
        with world.raise_together():
            features = open_features(model, request.features)
            questions, notes = request.read()
        for note in notes:
            world.print_rank0(note)
        answers = model.ask(questions, features)
        with world.raise_together():
            if world.is_main:
                _report(answers, request)

    return with_world(line, work)


def open_model(line: CommandLine, world: "World") -> "AskedModel":
    """The checkpoint of --resume, checked against its files; says what a user should know.

    A collective; the weights are not loaded yet. Raises UserError.
    """
    from vico.cli.evaluate import settings_of
    from vico.train.asking import AskedModel
    from vico.train.rank_consistency import require_same_files
    from vico.train.saved_run import read_for_evaluation

    with world.raise_together():
        checkpoint = read_for_evaluation(line.given["resume"])
        # Features that are asked about are not those of the run's data set.
        given = {name: value for name, value in line.given.items() if name != "features"}
        asked = replace(line, given=given)
        checkpoint, absent = without_absent_datasets(checkpoint, asked)
        config, notes = settings_of(checkpoint, asked)
    require_same_files(world, config)
    for note in (*absent, *notes):
        world.print_rank0(note)
    model = AskedModel(config, checkpoint, world)
    for note in model.notes:
        world.print_rank0(note)
    return model


def without_absent_datasets(
    checkpoint: "Checkpoint", line: CommandLine
) -> tuple["Checkpoint", list[str]]:
    """(the checkpoint, notes): without its data sets where their folders are not at hand.

    A question about a video needs none of them. Raises UserError for one that a flag names.
    """
    values = {**checkpoint.settings, **line.given}
    known = {name: values[name] for name in ("dataset", "data_path") if name in values}
    config = RunConfig(**known)
    try:
        for name in config.dataset_names:
            find_dataset(name, config.folder_of(name))
    except UserError:
        if "dataset" in line.given:
            raise
        of_dataset = ("dataset", "sub", "features")
        settings = {k: v for k, v in checkpoint.settings.items() if k not in of_dataset}
        note = (
            f"note: {config.data_path}: does not hold {config.dataset}, on which the checkpoint "
            "was trained; prompts are those without a dialogue"
        )
        return replace(checkpoint, settings=settings), [note]
    return checkpoint, []


def open_features(model: "AskedModel", path: Path | None) -> "Features":
    """Those at `path`, or those of the run's one data set. Raises UserError."""
    from vico.data.features import Features
    from vico.train import preflight

    config = model.config
    if path is not None:
        features = Features(path)
    elif len(config.datasets) == 1:
        features = preflight.open_features(config, config.dataset_names[0])
    else:
        raise UserError(
            "--features is missing: the checkpoint was trained on several data sets; name the "
            "features of the video"
        )
    model.require_width(features)
    return features


def one_question(question: str, options: Sequence[str], video: str) -> Question:
    """Raises UserError for texts that cannot be asked."""
    place = "the question"
    try:
        rows.question_field({"question": question}, "question")
        for i, option in enumerate(options):
            rows.question_field({f"option {i + 1}": option}, f"option {i + 1}")
    except RowError as problem:
        raise UserError(f"{problem}; write it as a text in quotes") from None
    if not schema.MIN_OPTIONS <= len(options) <= schema.MAX_OPTIONS:
        raise UserError(
            f"--options: {len(options)} options, not {schema.MIN_OPTIONS} to {schema.MAX_OPTIONS}; "
            "put each into quotes"
        )
    repeated = [option for i, option in enumerate(options) if option in options[:i]]
    if repeated:
        fail(f"--options: {show(repeated[0])} is there twice; each option needs a text of its own")
    return Question(0, "0", video, rows.UNKNOWN, question, tuple(options), None, place=place)


def _add_own(parser: SettingsParser) -> None:
    group = parser.add_argument_group(GROUP)
    add = group.add_argument
    add(
        "--options",
        nargs="+",
        metavar="TEXT",
        help="the answers to choose from, 2 to 26; the question stands before this flag",
    )
    add(
        "--video_id",
        metavar="ID",
        help="the video of --features that the question is about (without --features: of the "
        "run's own features)",
    )
    add(
        "--questions",
        type=path_argument,
        metavar="FILE",
        help="many questions: a table in the general schema (.jsonl, .csv, .json, .parquet) with "
        "video, question and options; with answers too, the accuracy is reported",
    )
    add(
        "--output",
        type=path_argument,
        metavar="FILE",
        help="where the answers to --questions go, a JSON object per line (default: printed)",
    )


def _request(typed: Mapping[str, Any], words: Sequence[str], parser: SettingsParser) -> Request:
    """Raises UserError for flags that contradict each other, or a question that is missing."""
    if flags := [word for word in words if word.startswith("-") and " " not in word]:
        parser.refuse_unknown(flags)
    many = typed.get("questions") is not None
    if many:
        _refuse_with_questions(typed, words)
    else:
        _require_one(typed, words)
    request = Request(
        question=None if many else words[0],
        options=tuple(typed.get("options", ())),
        questions=typed.get("questions"),
        features=typed.get("features"),
        video_id=typed.get("video_id"),
        output=typed.get("output"),
    )
    if request.question is not None:
        one_question(request.question, request.options, "")
    if request.output is not None:
        require_writable(request.output.parent, "the folder of --output")
    return request


def _refuse_with_questions(typed: Mapping[str, Any], words: Sequence[str]) -> None:
    if words:
        raise UserError(
            f"{show(words[0])}: a question beside --questions; put it into that file, or leave "
            "--questions out"
        )
    for name in ONE:
        if name in typed:
            raise UserError(
                f"--{name}: is said by each row of --questions; leave one of the two out"
            )


def _require_one(typed: Mapping[str, Any], words: Sequence[str]) -> None:
    example = 'vico ask --resume RUN --features F --video_id ID "what is it" --options "a" "b"'
    if not words:
        raise UserError(f"the question is missing: it stands before --options, as in {example}")
    if len(words) > 1:
        raise UserError(
            f"unexpected word {show(words[1])}: put the question into quotes, and the options "
            f"behind --options, as in {example}"
        )
    if "output" in typed:
        raise UserError("--output: is for the answers to --questions; one answer is printed")
    if "options" not in typed:
        raise UserError(f"--options is missing: name the answers to choose from, as in {example}")
    if not str(typed.get("video_id", "")).strip():
        raise UserError("--video_id is missing: name the video of --features that is asked about")


def _report(answers: Sequence["Answer"], request: Request) -> None:
    """Raises DiskError."""
    if request.questions is None:
        (answer,) = answers
        log.info("\n".join([answer.question.question, *answer.lines()]))
        log.info(_how_scored(answers))
        log.info(json.dumps(answer.record()))
        return
    records = []
    for answer in answers:
        question = answer.question
        record = {"index": question.index, "qid": question.qid, **answer.record()}
        if question.answer is not None:
            record["right"] = answer.index == question.answer
        records.append(record)
    if request.output is None:
        for record in records:
            log.info(json.dumps(record))
    else:
        write_lines(request.output, records)
        log.info(f"{request.output}: {len(records)} answers")
    log.info(_how_scored(answers))
    log.info(json.dumps(_summary(answers)))


def _summary(answers: Sequence["Answer"]) -> dict[str, Any]:
    summary: dict[str, Any] = {"n": len(answers)}
    if all(answer.question.answer is not None for answer in answers):
        right = sum(answer.index == answer.question.answer for answer in answers)
        summary["acc"] = right / len(answers)
    return summary


def _how_scored(answers: Sequence["Answer"]) -> str:
    """The last bits of a score depend on what else is in its forward."""
    known = sum(answer.in_evaluation for answer in answers)
    return (
        f"{known} of {len(answers)} asked in their batch of the checkpoint's evaluation, with the "
        "very scores of `vico eval`; the others as an evaluation of them alone"
    )


if __name__ == "__main__":  # `python -m vico.cli.ask`, or this file
    from vico.cli.main import console

    console(command="ask")
