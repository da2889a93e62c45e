"""`vico ask`: put a question about a video to a checkpoint, or many by a file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vico.cli.asked import (
    GENERATION,
    VideoSource,
    add_generation_flags,
    add_video_flags,
    generation_settings,
    open_model,
)
from vico.cli.flags import make_parser, read_words, require_resume
from vico.cli.parser import SettingsParser, path_argument
from vico.cli.with_world import with_world
from vico.data.datasets import count_equal_options
from vico.data.readers import rows, schema
from vico.data.readers.rows import RowError
from vico.data.types import Question
from vico.errors import UserError, fail, show
from vico.generation.settings import GenerationSettings
from vico.io import log
from vico.io.atomic import require_writable, write_lines

if TYPE_CHECKING:  # they import torch, which is slow; a mistyped flag is reported before
    from vico.distributed.world import World
    from vico.generation.generate import Generated
    from vico.train.asking import Answer

USAGE = '--resume CHECKPOINT --features F --video_id ID "QUESTION" --options A B ... [FLAGS]'
FREE = (
    "note: without --options the answer is a generated text; this is outside the method, whose "
    "training never saw such a prompt"
)
DESCRIPTION = (
    "Ask a checkpoint (--resume) which of 2 to 26 options answers a question about a video. "
    "Settings come from the checkpoint, as for `vico eval`; a flag that is given wins. The answer "
    "is the option with the lowest score, the mean cross-entropy of its target tokens, as `vico "
    "eval` chooses. An option's probability is the softmax over the options of minus the sum of "
    "its target tokens' cross-entropies; both rank alike where all options have as many target "
    "tokens. The last line printed is a JSON object with answer, probabilities and scores. "
    "Example: vico ask --resume runs/a --features clips.pth --video_id 0017 'what does the dog "
    "chase' --options 'a ball' 'a cat'. "
    "In place of --features F --video_id ID, --video X.mp4 --encoder CLIP_FOLDER takes a video."
)
GROUP = "asking"
# Flags of this command: the name of each is known by `typed`.
ONE = ("video_id", "options")  # of one question on the command line


@dataclass(frozen=True)
class Request:
    """What is asked, as the flags say it."""

    question: str | None  # None: `questions` holds them
    options: tuple[str, ...]  # empty: a text is generated
    questions: Path | None
    source: VideoSource
    output: Path | None
    generation: GenerationSettings

    def read(self) -> tuple[list[Question], list[str]]:
        """The questions, and how a file of them was read. Raises UserError."""
        if self.questions is not None:
            questions = schema.read_file(self.questions)
            notes = list(questions.notes)
            if equal := count_equal_options(questions):
                notes.append(f"{equal} of {len(questions)} questions offer one text twice")
            return questions, [f"{self.questions.name}: {note}" for note in notes]
        assert self.question is not None and self.source.id is not None
        return [one_question(self.question, self.options, self.source.id)], []


def main(argv: list[str]) -> int:
    """Run the command on this rank; returns the exit code."""
    parser = make_parser("vico ask", DESCRIPTION, prints=False, usage=USAGE, add_own=_add_own)
    line, typed, words = read_words(parser, argv)
    request = _request(typed, words, parser)
    require_resume(line, "to ask")

    def work(world: "World") -> None:
        model = open_model(line, world)
        with world.raise_together():
            features = request.source.read_for(model)
            questions, notes = request.read()
        for note in notes:
            world.print_rank0(note)
        if request.questions is None and not request.options:
            (generated,) = model.answer_freely(questions, features, request.generation)
            world.print_rank0(FREE)
            world.print_rank0(f"{questions[0].question}\n  {generated.text}")
            world.print_rank0(json.dumps(free_record(questions[0], generated)))
            return
        answers = model.ask(questions, features)
        with world.raise_together():
            if world.is_main:
                _report(answers, request)

    return with_world(line, work)


def free_record(question: Question, generated: "Generated") -> dict[str, Any]:
    """One JSON object, of a question without options."""
    return {
        "video": question.video,
        "question": question.question,
        "answer": generated.text,
        "probabilities": None,
        "generated": True,
        "is_cut": generated.is_cut,
    }


def one_question(question: str, options: Sequence[str], video: str) -> Question:
    """Raises UserError for texts that cannot be asked."""
    place = "the question"
    try:
        rows.question_field({"question": question}, "question")
        for i, option in enumerate(options):
            rows.question_field({f"option {i + 1}": option}, f"option {i + 1}")
    except RowError as problem:
        raise UserError(f"{problem}; write it as a text in quotes") from None
    if options and not schema.MIN_OPTIONS <= len(options) <= schema.MAX_OPTIONS:
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
        help="the answers to choose from, 2 to 26; the question stands before this flag. Without "
        "it a text is generated, which is outside the method",
    )
    add_video_flags(group)
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
    add_generation_flags(parser)


def _request(typed: Mapping[str, Any], words: Sequence[str], parser: SettingsParser) -> Request:
    """Raises UserError for flags that contradict each other, or a question that is missing."""
    if flags := [word for word in words if word.startswith("-") and " " not in word]:
        parser.refuse_unknown(flags)
    many = typed.get("questions") is not None
    source = VideoSource.of(typed)
    if many:
        _refuse_with_questions(typed, words)
    else:
        _require_one(typed, words, source)
    request = Request(
        question=None if many else words[0],
        options=tuple(typed.get("options", ())),
        questions=typed.get("questions"),
        source=source,
        output=typed.get("output"),
        generation=generation_settings(typed),
    )
    for name in GENERATION:
        if name in typed and (many or request.options):
            raise UserError(
                f"--{name}: is for a generated answer, and these are chosen among options; leave "
                "it out"
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


def _require_one(typed: Mapping[str, Any], words: Sequence[str], source: VideoSource) -> None:
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
    if source.id is None:
        raise UserError(
            "--video_id is missing: name the video of --features that is asked about, or a video "
            "file by --video and --encoder"
        )


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
