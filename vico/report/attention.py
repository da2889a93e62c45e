"""The charts of --attention_shares: where attention goes by layer, and how that changed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vico.report.charts import Chart, colour, epoch_chart, layout_of
from vico.report.language import Measured, saved_measures
from vico.report.load import Run, number
from vico.train.run_log import Record

PARTS = {"prompt": "adapter prompt", "video": "video", "text": "text"}
OVER_TIME = ("prompt", "video")  # the text has the rest


def attention_charts(runs: Sequence[Run]) -> list[Chart]:
    """Shares after each epoch, means over all layers; then of each run's layers."""
    charts = []
    for part in OVER_TIME:
        title = f"Attention: {PARTS[part]}"
        caption = (
            f"{title}: its share of the attention of text behind the video, after each epoch, in "
            "percent. The mean over layers and heads. From log.txt (attention)."
        )
        charts += epoch_chart(runs, title, caption, _share_of(part))
    for run in runs:
        charts += _layer_chart(run)
    return charts


def _share_of(part: str) -> Callable[[Record], float | None]:
    return lambda record: _percent(record.get("attention"), part)


def _percent(shares: object, part: str) -> float | None:
    value = number(shares.get(part)) if isinstance(shares, dict) else None
    return None if value is None else 100 * value


def _layer_chart(run: Run) -> list[Chart]:
    """A bar per layer, of the newest evaluation that has it, else of what was measured afterwards.

    No chart where neither is.
    """
    found = [saved_measures(run, "attention")]
    for record in run.epochs:
        shares = record.get("attention")
        if isinstance(shares, dict):
            found.append(Measured("training", number(record["step"]), shares))
    measured = [one for one in found if one is not None and _rows(one.values)]
    if not measured:
        return []
    newest = measured[-1]
    rows = _rows(newest.values)
    traces = []
    for i, (part, name) in enumerate(PARTS.items()):
        trace = {
            "type": "bar",
            "name": name,
            "x": list(range(len(rows))),
            "y": [float(f"{row[part]:.4g}") for row in rows],
            "marker": {"color": colour(i)},
            "hovertemplate": f"layer %{{x}}, {name}: %{{y:.1f}} %<extra></extra>",
        }
        traces.append(trace)
    caption = (
        f"{run.name}, {newest}: where the attention of text behind the video goes, by layer, the "
        "lowest is 0. The mean over heads. From log.txt, or cognition.json (attention)."
    )
    layout = layout_of("layer", "%", barmode="stack")
    return [Chart(f"Attention by layer: {run.name}", caption, traces, layout)]


def _rows(shares: Mapping[str, Any]) -> list[dict[str, float]]:
    """The percents of each layer; empty where it has not all of them."""
    layers = shares.get("layers")
    rows = []
    for layer in layers if isinstance(layers, list) else ():
        row = {part: percent for part in PARTS if (percent := _percent(layer, part)) is not None}
        if len(row) < len(PARTS):
            return []
        rows.append(row)
    return rows
