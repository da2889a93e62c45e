"""What adapters did to plain language: charts of --text, and tables of all that was measured.

The newest evaluation of log.txt has what training measured, cognition.json what `vico cognition`
measured afterwards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from vico.report.charts import Chart, epoch_chart
from vico.report.load import Run, number
from vico.report.markup import element, table
from vico.report.sections import NONE, run_name
from vico.train.run_log import Record

TEXT_MEASURES = {
    "kl_per_token": ("Plain text: KL(frozen || adapted)", "nats per token; 0: nothing has changed"),
    "perplexity_adapted": ("Plain text: perplexity of the adapted model", "of all files of --text"),
    "perplexity_frozen": (
        "Plain text: perplexity of the frozen model",
        "the same after each epoch",
    ),
    "top1_agreement": ("Plain text: same likeliest token", "share of tokens, of both models"),
}
TABLE = (
    "Plain text by the frozen and the adapted model. KL(frozen || adapted) is in nats per token, "
    "and 0 where nothing has changed. Perplexities of different texts do not compare"
)


@dataclass(frozen=True)
class Measured:
    """What was measured of a run, and when. `where`: a checkpoint, or the log."""

    where: str
    step: float | None
    values: Mapping[str, Any]

    def __str__(self) -> str:
        return self.where if self.step is None else f"{self.where}, step {self.step:,.0f}"


def text_charts(runs: Sequence[Run]) -> list[Chart]:
    """What the adapter does to plain text after each epoch, of runs with --text."""
    charts = []
    for key, (title, what) in TEXT_MEASURES.items():
        caption = f"{title}, after each epoch: {what}. From log.txt (cognition)."
        charts += epoch_chart(runs, title, caption, _text_measure(key))
    return charts


def _text_measure(key: str) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        measures = record.get("cognition")
        return number(measures.get(key)) if isinstance(measures, dict) else None

    return value


def language_tables(runs: Sequence[Run]) -> list[Element]:
    """Of texts, of questions without video, and of tasks; with what a reader must know of them."""
    parts = [element("p", text, class_="finding") for text in _warnings(runs)]
    for make in (_text_table, _question_table, _task_table):
        made = make(runs)
        if made is not None:
            parts.append(made)
    return parts


def _warnings(runs: Sequence[Run]) -> list[str]:
    """Which curves do not compare, or are of the text that was trained on."""
    logged = {run.name: _files(measured) for run in runs if (measured := _logged(run)) is not None}
    warnings = []
    if len({_contents(files) for files in logged.values()}) > 1:
        named = "; ".join(f"{name}: {_names(files)}" for name, files in logged.items())
        warnings.append(
            f"The runs have measured different texts ({named}), so their curves and perplexities "
            "do not compare."
        )
    for run in runs:
        if run.name in logged and number(run.settings.get("keep")):
            warnings.append(
                f"{run.name} has trained on the text that its curves measure "
                f"({_names(logged[run.name])}, by --keep). How far that carries, vico cognition "
                "measures on another --text."
            )
    return warnings


def _contents(files: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """What tells texts apart, wherever they lie: their names and sizes."""
    return tuple(sorted(f"{Path(path).name} {part.get('tokens')}" for path, part in files.items()))


def _names(files: Mapping[str, Any]) -> str:
    return ", ".join(Path(path).name for path in files)


def _logged(run: Run) -> Measured | None:
    """Of the newest evaluation of a run with --text."""
    for record in reversed(run.epochs):
        if isinstance(values := record.get("cognition"), dict):
            return Measured("training", number(record["step"]), values)
    return None


def saved_measures(run: Run, part: str) -> Measured | None:
    """What `vico cognition` has measured."""
    saved = _part(run.cognition, part)
    values = _part(saved, "measured")
    if not values:
        return None
    return Measured(str(saved.get("checkpoint")), number(saved.get("step")), values)


def _files(measured: Measured) -> dict[str, dict[str, Any]]:
    """{path: its numbers}, of those that have some."""
    files = _part(measured.values, "files")
    return {path: part for path, part in files.items() if isinstance(part, dict)}


def _text_table(runs: Sequence[Run]) -> Element | None:
    header = (
        "run;text;measured;tokens;perplexity, frozen;perplexity, adapted;KL per token;"
        "same likeliest token"
    )
    rows: list[list[str | Element]] = []
    for i, run in enumerate(runs):
        for measured in filter(None, (_logged(run), saved_measures(run, "texts"))):
            for path, part in _files(measured).items():
                cells = [_cell(part, "tokens", ",.0f"), _cell(part, "perplexity_frozen", ",.4g")]
                cells.append(_cell(part, "perplexity_adapted", ",.4g"))
                cells.append(_cell(part, "kl_per_token", ".4f"))
                cells.append(_cell(part, "top1_agreement", ".1%"))
                rows.append([run_name(i, run.name), Path(path).name, str(measured), *cells])
    return table(TABLE, header.split(";"), rows) if rows else None


def _question_table(runs: Sequence[Run]) -> Element | None:
    rows: list[list[str | Element]] = []
    for i, run in enumerate(runs):
        if (measured := saved_measures(run, "without_video")) is not None:
            of = measured.values
            cells = [_cell(of, "n", ",.0f"), _cell(of, "acc_frozen", ".1%")]
            cells.append(_cell(of, "acc_adapted", ".1%"))
            rows.append([run_name(i, run.name), str(of.get("split")), str(measured), *cells])
    caption = "Accuracy by the text of the questions alone, without the video"
    header = "run;split;measured;questions;frozen;adapted"
    return table(caption, header.split(";"), rows) if rows else None


def _task_table(runs: Sequence[Run]) -> Element | None:
    rows: list[list[str | Element]] = []
    for i, run in enumerate(runs):
        if (measured := saved_measures(run, "tasks")) is not None:
            for task, metric, values in _metrics(measured.values):
                rows.append([run_name(i, run.name), task, metric, str(measured), *values])
    caption = "Tasks of lm-evaluation-harness, by its own metrics"
    header = "run;task;metric;measured;frozen;adapted"
    return table(caption, header.split(";"), rows) if rows else None


def _metrics(tasks: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """(task, metric, [frozen, adapted]) of each number that both models have."""
    for task, models in tasks.items():
        frozen, adapted = (_part(models, name) for name in ("frozen", "adapted"))
        for metric in frozen:
            values = [_cell(metrics, metric, ".4g") for metrics in (frozen, adapted)]
            if NONE not in values:
                yield task, metric, values


def _part(values: object, key: str) -> dict[str, Any]:
    """The object of this name; empty where there is none."""
    part = values.get(key) if isinstance(values, dict) else None
    return part if isinstance(part, dict) else {}


def _cell(values: Mapping[str, Any], key: str, form: str) -> str:
    value = number(values.get(key))
    return NONE if value is None else format(value, form).replace("%", " %")
