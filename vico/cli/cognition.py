"""`vico cognition`: what a checkpoint's adapter does to plain language."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vico.cli.asked import open_model
from vico.cli.flags import make_parser, read_flags, require_resume
from vico.cli.parser import SettingsParser, path_argument, positive_int
from vico.cli.with_world import with_world
from vico.errors import UserError
from vico.io import log
from vico.io.atomic import make_folder, require_writable, write_json
from vico.io.output_dir import OutputDir
from vico.io.paths import exists, is_folder
from vico.io.text import read_json_object
from vico.model.config import DEFAULT_WINDOW

if TYPE_CHECKING:  # they import torch, which is slow; a mistyped flag is reported before
    from vico.distributed.world import World
    from vico.train.asking import AskedModel
    from vico.train.build import Inputs

USAGE = (
    "--resume CHECKPOINT [--text FILE ...] [--questions] [--attention_shares [N]] "
    "[--tasks TASK ...] [FLAGS]"
)
DESCRIPTION = (
    "Measure what a checkpoint's adapter (--resume) does to plain language. The frozen LLaMA and "
    "the adapted one predict the same text, without a video: perplexity of both, KL(frozen || "
    "adapted) per token in nats, how often both find the same token the likeliest, per file and by "
    "position in the window. --questions also answers the questions of --split by their text "
    "alone, with and without the adapter. --tasks runs tasks of lm-evaluation-harness on both. "
    "--attention_shares says where the adapted model's attention goes. "
    "Settings come from the checkpoint, as for `vico eval`. "
    "The last line printed is a JSON object; cognition.json beside the checkpoint, or in "
    "--output_dir, keeps it for `vico report`. "
    "Examples: vico cognition --resume runs/a --text book.txt news.txt; vico cognition --resume "
    "runs/a --questions --attention_shares; vico cognition --resume runs/a --tasks arc_easy."
)
MIN_WINDOW = 2  # BOS and a token


@dataclass(frozen=True)
class Request:
    """What is measured, as the flags say it."""

    texts: tuple[Path, ...]
    window: int | None  # None: as `usual_window` of data/text_windows.py
    questions: bool
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    attention: bool = False

    def window_of(self, longest: int | None, default: int) -> int:
        """Positions of a window. `longest`: that the model sees. Raises UserError."""
        from vico.data.text_windows import usual_window

        if self.window is None:
            return usual_window(longest, default)
        if longest is not None and self.window > longest:
            raise UserError(
                f"--window {self.window}: this model sees {longest} tokens; lower it to that"
            )
        return self.window


def main(argv: list[str]) -> int:
    """Run the command on this rank; returns the exit code."""
    parser = make_parser("vico cognition", DESCRIPTION, prints=False, usage=USAGE, add_own=_add_own)
    line, typed = read_flags(parser, argv)
    request = _request(line.given, typed)
    require_resume(line, "to measure")

    def work(world: "World") -> None:
        from vico.train.attention_shares import measured_attention

        model = open_model(line, world)
        with world.raise_together():
            saved = _read_saved(OutputDir(model.config.output_dir))
        result: dict[str, Any] = {}
        if request.texts:
            result["texts"] = _measure_texts(request, model, world)
        if request.tasks:
            result["tasks"] = _run_tasks(request, model)
        if request.questions or request.attention:
            inputs = _read_split(model, world)
        if request.questions:
            result["without_video"] = _measure_questions(model, inputs, world)
        if request.attention:
            result |= measured_attention(model.engine, inputs, model.config, world)
        with world.raise_together():
            if world.is_main:
                _save(model, saved, result)
        world.print_rank0(json.dumps({**result.pop("texts", {}), **result}))

    return with_world(line, work)


def _read_saved(folder: OutputDir) -> dict[str, Any]:
    """What earlier calls have measured. Raises UserError, before hours of measuring."""
    require_writable(folder.path)
    if not exists(folder.cognition):
        return {}
    return read_json_object(folder.cognition, "what `vico cognition` measured before; remove it")


def _save(model: "AskedModel", saved: dict[str, Any], result: Mapping[str, Any]) -> None:
    """Each part replaces what an earlier call has measured of it. Raises DiskError."""
    of = {"checkpoint": model.checkpoint.path.name, "step": model.checkpoint.state.step}
    folder = OutputDir(model.config.output_dir)
    make_folder(folder.path)
    parts = {part: {**of, "measured": found} for part, found in result.items()}
    write_json(folder.cognition, saved | parts)
    log.info(f"{folder.cognition}: holds these numbers, for `vico report`")


def _add_own(parser: SettingsParser) -> None:
    add = parser.add_argument_group("cognition").add_argument
    add(
        "--window",
        type=positive_int,
        metavar="N",
        help="positions of a window, its BOS included; texts are cut into windows that do not "
        f"overlap (default: {DEFAULT_WINDOW})",
    )
    add(
        "--questions",
        action="store_true",
        help="the accuracy on --split without the video, with and without the adapter (default "
        "without --text, --tasks and --attention_shares)",
    )
    text = "of lm-evaluation-harness, by its names: hellaswag,arc_easy (extra: lm-eval)"
    add("--tasks", nargs="+", metavar="TASK", help=text)
    text = "a folder of further tasks; its files may run code, so it must be one you trust"
    add("--include_path", type=path_argument, metavar="FOLDER", help=text)
    text = "examples before each question of a task (default: what the task says, else 0)"
    add("--num_fewshot", type=int, metavar="N", help=text)
    text = "only the first N documents of each task (default: all)"
    add("--limit", type=positive_int, metavar="N", help=text)


def _request(given: Mapping[str, Any], typed: Mapping[str, Any]) -> Request:
    """Raises UserError for a window without room for a token."""
    texts = given.get("text", ())
    attention = given.get("attention_shares") is not None
    window = typed.get("window")
    if window is not None and window < MIN_WINDOW:
        raise UserError(
            f"--window {window}: has no room for a token behind BOS; {MIN_WINDOW} is the least"
        )
    names = tuple(part for word in typed.get("tasks", ()) for part in word.split(",") if part)
    _check_tasks(typed, names)
    if window is not None and not (texts or names):
        raise UserError(f"--window {window}: needs texts or tasks; name some by --text or --tasks")
    return Request(
        texts,
        window,
        typed.get("questions", False) or not (texts or names or attention),
        names,
        typed.get("include_path"),
        typed.get("num_fewshot"),
        typed.get("limit"),
        attention,
    )


def _check_tasks(typed: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises UserError for flags of tasks that cannot be followed."""
    if not names:
        for flag in ("tasks", "include_path", "num_fewshot", "limit"):
            if flag in typed:
                raise UserError(f"--{flag}: needs tasks; name some by --tasks hellaswag,arc_easy")
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--tasks: needs the package lm_eval, which is not installed; pip install '.[lm-eval]'"
        )
    if typed.get("num_fewshot", 0) < 0:
        raise UserError(f"--num_fewshot {typed['num_fewshot']}: must be 0 or more")
    folder = typed.get("include_path")
    if folder is not None and not is_folder(folder):
        raise UserError(f"--include_path {folder}: no such folder; it holds the files of tasks")


def _run_tasks(request: Request, model: "AskedModel") -> dict[str, Any]:
    # Imports lm_eval, an extra.
    from vico.train.language_tasks import DEFAULT_CONTEXT, TaskRequest, run_tasks, tasks_table

    longest = model.inputs.weights.config.sliding_window
    context = request.window_of(longest, DEFAULT_CONTEXT)
    wanted = TaskRequest(
        request.tasks, request.include_path, request.num_fewshot, request.limit, context
    )
    metrics = run_tasks(model, wanted)
    model.world.print_rank0(tasks_table(metrics))
    return metrics


def _measure_texts(request: Request, model: "AskedModel", world: "World") -> dict[str, Any]:
    from vico.data.text_windows import open_texts
    from vico.train.cognition import measure_texts

    with world.raise_together():
        window = request.window_of(model.inputs.weights.config.sliding_window, DEFAULT_WINDOW)
        texts = open_texts(request.texts, model.tokenizer, window)
    measures = measure_texts(model.engine, texts, model.inputs, world)
    world.print_rank0(measures.table())
    return {"window": window, **measures.to_json()}


def _read_split(model: "AskedModel", world: "World") -> "Inputs":
    """The questions of --split, with all that they are asked with. Raises UserError."""
    from vico.train.build import read_inputs

    config = replace(model.config, text=(), keep=None)  # texts have been measured
    with world.raise_together():
        inputs = read_inputs(config, (config.split,), world)
    for note in inputs.notes:
        if note not in model.notes:  # how the rows were read; the others have been printed
            world.print_rank0(note)
    return inputs


def _measure_questions(model: "AskedModel", inputs: "Inputs", world: "World") -> dict[str, Any]:
    """Accuracies of both models."""
    from vico.train.cognition import scores_without_video
    from vico.train.evaluate import require_answers, summarize_split

    config = model.config
    questions = inputs.questions[config.split]
    with world.raise_together():
        require_answers(questions, config.split)
    result: dict[str, Any] = {"split": config.split, "n": len(questions)}
    scores = scores_without_video(model.engine, inputs, config, world)
    for name, of_model in zip(("frozen", "adapted"), scores, strict=True):
        evaluation = summarize_split(inputs, config.split, config, of_model)
        world.print_rank0(
            f"{config.split} accuracy of {evaluation.used} by their text alone, {name} model:\n"
            f"{evaluation.table()}"
        )
        result |= {f"{key}_{name}": value for key, value in evaluation.accuracies.items()}
        result[f"loss_{name}"] = evaluation.loss  # of the right options
    return result


if __name__ == "__main__":  # `python -m vico.cli.cognition`, or this file
    from vico.cli.main import console

    console(command="cognition")
