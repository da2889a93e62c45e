"""The charts of the page, as plotly's figures in plain JSON. Each says what it shows.

A colour that begins with -- is a variable of page.css, which charts.js looks up: it differs
between light and dark.
"""

import html
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vico.report.load import Run, accuracy_of, number, trained_datasets
from vico.report.results import Row
from vico.report.statistics import Share, bucket_means
from vico.train.run_log import Record

NUM_COLOURS = 6  # --run-0 to --run-5 of page.css
DASHES = ("solid", "dash", "dot", "dashdot")
MAX_POINTS = 300  # of a curve
MAX_GROUPS = 40  # rows of a chart; the table has all
MAX_NAME = 32  # characters of a label in a chart
LOSSES = {
    "loss": "Training loss, all tasks",
    "vqa_loss": "Training loss: answer (vqa)",
    "cap_loss": "Training loss: caption (cap)",
    "vaq_loss": "Training loss: question (vaq)",
    "qav_loss": "Training loss: video (qav)",
    "keep_loss": "Training loss: KL(frozen || adapted) of plain text (keep)",
}
CAPTION_METRICS = {"cider": "CIDEr", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L", "meteor": "METEOR"}
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """`caption`: what it shows, and from which files. `height` in pixels."""

    title: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 300

    def to_json(self) -> dict[str, Any]:
        return {"data": self.data, "layout": self.layout, "height": self.height}


def label(text: str) -> str:
    """A text from a file for plotly, which reads a few HTML tags; shortened in its middle."""
    if len(text) > MAX_NAME:
        text = f"{text[: MAX_NAME // 2 - 1]}…{text[-MAX_NAME // 2 :]}"
    return html.escape(text, quote=False)


def colour(run: int) -> str:
    return f"--run-{run % NUM_COLOURS}"


def training_charts(runs: Sequence[Run]) -> list[Chart]:
    """Losses per task, learning rate and validation accuracy, of those that were logged."""
    charts = _validation_chart(runs)
    names = itertools.chain(*(trained_datasets(run.settings) for run in runs))
    for dataset in dict.fromkeys(names):
        charts += _validation_chart(runs, dataset)
    charts += _caption_charts(runs)
    for key, title in LOSSES.items():
        what = "the weighted sum of the tasks' losses" if key == "loss" else "mean over its targets"
        charts += _step_chart(runs, title, f"{what}, per step", _value_of(key))
    charts += _step_chart(runs, "Learning rate", "that of each step", _value_of("lr"))
    return charts


def speed_charts(runs: Sequence[Run]) -> list[Chart]:
    return _step_chart(
        runs,
        "Tokens per second",
        "tokens of each step by its seconds, of all ranks together",
        _speed,
    )


def _value_of(key: str) -> Callable[[Record], float | None]:
    return lambda record: number(record.get(key))


def _speed(record: Record) -> float | None:
    tokens, seconds = number(record.get("real_tokens")), number(record.get("step_seconds"))
    return number(tokens / seconds) if tokens is not None and seconds else None


def _step_chart(
    runs: Sequence[Run], title: str, what: str, value: Callable[[Record], float | None]
) -> list[Chart]:
    """A line per run over its steps; no chart where no run has a value."""
    traces, largest = [], 1
    for i, run in enumerate(runs):
        points: Curve = []
        for record in run.steps:
            x, y = number(record["step"]), value(record)
            if x is not None and y is not None:
                points.append((x, y))
        if points:
            means, size = bucket_means(points, MAX_POINTS)
            largest = max(largest, size)
            traces.append(_line(i, run.name, means))
    if not traces:
        return []
    mean = f" Each point is the mean of up to {largest} steps." if largest > 1 else ""
    caption = f"{title}: {what}. From steps.jsonl.{mean}"
    return [Chart(title, caption, traces, layout_of("step", "", showlegend=len(runs) > 1))]


def _line(i: int, name: str, points: Curve, **more: Any) -> dict[str, Any]:
    dash = DASHES[i // NUM_COLOURS % len(DASHES)]
    return {
        "type": "scatter",
        "mode": "lines" if len(points) > 1 else "markers",
        "name": label(name),
        "x": [x for x, _ in points],
        "y": [float(f"{y:.5g}") for _, y in points],
        "line": {"color": colour(i), "width": 2, "dash": dash},
        "marker": {"color": colour(i), "size": 7},
        **more,
    }


def layout_of(x_title: str, y_title: str, **more: Any) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x_title}},
        "yaxis": {"title": {"text": y_title}},
        "showlegend": True,
        **more,
    }


def _validation_chart(runs: Sequence[Run], dataset: str = "") -> list[Chart]:
    """Accuracy after each epoch, of all questions or of one data set of a mixture."""
    name = f"{dataset}_acc" if dataset else "acc"
    traces = []
    for i, run in enumerate(runs):
        points, shares = [], []
        for record in run.epochs:
            x, found = number(record["step"]), accuracy_of(record, name)
            if x is not None and found is not None:
                accuracy, n = found
                points.append((x, 100 * accuracy))
                shares.append(Share(round(accuracy * n), int(n)) if n and 1 <= n < 1e12 else None)
        if points:
            bars = {**_bars(shares), "color": colour(i), "thickness": 1, "width": 3}
            traces.append(_line(i, run.name, points, mode="lines+markers", error_y=bars))
    if not traces:
        return []
    title = f"Validation accuracy: {dataset}" if dataset else "Validation accuracy"
    caption = (
        f"{title}: share of right answers after each epoch, in percent, with Wilson's interval of "
        f"95 %. From log.txt (val_{name}, or test_{name} where epochs were evaluated on test)."
    )
    return [Chart(title, caption, traces, layout_of("step", "%", showlegend=len(runs) > 1))]


def _bars(shares: Sequence[Share | None]) -> dict[str, Any]:
    """Error bars in percent; none where the number of questions is unknown."""
    below, above = [], []
    for share in shares:
        low, high = share.interval if share is not None else (0.0, 0.0)
        below.append(100 * (share.value - low) if share is not None else 0.0)
        above.append(100 * (high - share.value) if share is not None else 0.0)
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below}


def _caption_charts(runs: Sequence[Run]) -> list[Chart]:
    """Metrics of captions after each epoch, of those that were logged."""
    charts = []
    for key, title in CAPTION_METRICS.items():
        caption = f"{title} of captions after each epoch. From log.txt (val_{key})."
        charts += epoch_chart(runs, f"Captions: {title}", caption, _value_of(f"val_{key}"))
    return charts


def epoch_chart(
    runs: Sequence[Run], title: str, caption: str, value: Callable[[Record], float | None]
) -> list[Chart]:
    """A line per run over its evaluations; no chart where no run has a value."""
    traces = []
    for i, run in enumerate(runs):
        points = []
        for record in run.epochs:
            x, y = number(record["step"]), value(record)
            if x is not None and y is not None:
                points.append((x, y))
        if points:
            traces.append(_line(i, run.name, points, mode="lines+markers"))
    if not traces:
        return []
    return [Chart(title, caption, traces, layout_of("step", "", showlegend=len(runs) > 1))]


def accuracy_chart(
    set_name: str, files: Sequence[str], runs: Sequence[Run], rows: list[Row]
) -> Chart:
    """A dot per run and group, with its interval."""
    left_out = max(0, len(rows) - MAX_GROUPS)
    shown = list(reversed(rows[:MAX_GROUPS]))
    traces = []
    spread = 0.5 / max(1, len(runs))
    for i, run in enumerate(runs):
        xs, ys, shares, texts = [], [], [], []
        for y, row in enumerate(shown):
            share = row.shares[i]
            if share is not None:
                low, high = share.interval
                xs.append(100 * share.value)
                ys.append(y - spread * (i - (len(runs) - 1) / 2))
                shares.append(share)
                texts.append(f"{share.right} of {share.n}, {100 * low:.1f} to {100 * high:.1f} %")
        if xs:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": label(run.name),
                    "x": xs,
                    "y": ys,
                    "text": texts,
                    "hovertemplate": "%{x:.1f} % (%{text})<extra></extra>",
                    "marker": {"color": colour(i), "size": 9, "symbol": i // NUM_COLOURS},
                    "error_x": _bars(shares) | {"color": colour(i), "thickness": 1.5, "width": 4},
                }
            )
    names = [label(row.name) if row.is_part else f"<b>{label(row.name)}</b>" for row in shown]
    axis = {
        "tickvals": list(range(len(shown))),
        "ticktext": names,
        "range": [-0.7, len(shown) - 0.3],
    }
    layout = layout_of("accuracy, %", "", yaxis=axis, showlegend=len(runs) > 1)
    rest = f" The table below has {left_out} more." if left_out else ""
    caption = (
        f"Accuracy on {set_name} by type of question: the dot is the share of right answers, the "
        f"bar Wilson's interval of 95 %. From {', '.join(files)}.{rest}"
    )
    height = 130 + len(shown) * max(26, 13 * len(runs))
    return Chart(f"Accuracy by type: {set_name}", caption, traces, layout, height)


def confusion_chart(set_name: str, file: str, run: Run, table: list[list[int]]) -> Chart:
    """Right answers in rows, given ones in columns, by position."""
    letters = [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(table))]
    shares, counts = [], []
    for row in table:
        total = max(1, sum(row))
        shares.append([round(100 * n / total, 2) for n in row])
        counts.append([f"{n:,}" for n in row])
    trace = {
        "type": "heatmap",
        "z": shares,
        "x": letters,
        "y": letters,
        "zmin": 0,
        "zmax": 100,
        "text": counts,
        "texttemplate": "%{text}" if len(table) <= 10 else "",
        "hovertemplate": "right %{y}, given %{x}: %{text} (%{z:.1f} % of the row)<extra></extra>",
        "colorscale": [[0, "--heat-0"], [1, "--heat-1"]],
        "colorbar": {"title": {"text": "% of row"}, "thickness": 10},
    }
    axis = {"title": {"text": "right answer"}, "autorange": "reversed", "type": "category"}
    layout = layout_of("given answer", "", yaxis=axis, showlegend=False)
    layout["xaxis"]["type"] = "category"
    caption = (
        f"{run.name} on {set_name}: how often the option in each position was given (columns) "
        f"where the right one was in another (rows), as counts. From {file}."
    )
    return Chart(f"Options: {run.name}", caption, [trace], layout, 340)
