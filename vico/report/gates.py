"""The charts of the gates: where they stand now, and how they opened."""

import itertools
from typing import Any

import numpy as np

from vico.report.charts import Chart, layout_of
from vico.report.load import Gates, GatesOverTime, Run, number

MAX_COLUMNS = 60  # evaluations of a chart over time...
MAX_CELLS = 60_000  # ...and its cells
GATE_TITLES = {
    "gate1": "Adapter gates (tanh of gate1)",
    "gate2": "Video gates (gate2, a logit)",
}
GATE_MEANINGS = {
    "gate1": "how much a head attends to the adapter prompts, from -1 to 1; 0 is closed",
    "gate2": "what is added to a head's attention score of text on video frames",
}


def gate_charts(run: Run, gates: Gates) -> list[Chart]:
    """A heat map for each kind of gate: a row per layer, the lowest below, a column per head."""
    charts = []
    for kind, values in gates.values.items():
        z = []
        for row in values.tolist():
            z.append([number(float(f"{value:.4g}")) for value in row])
        hover = "adapted layer %{y}, head %{x}: %{z:.3f}<extra></extra>"
        trace = {**_heat_map(z, hover), "xgap": 1, "ygap": 1}
        layout = layout_of("head", "", showlegend=False)
        layout["yaxis"] |= {"title": {"text": "adapted layer"}, "dtick": _tick(len(z))}
        layout["xaxis"]["dtick"] = _tick(len(z[0]))
        caption = (
            f"{run.name}, step {gates.step:,}: {GATE_MEANINGS[kind]}. Layers and heads count from "
            f"0. From {gates.checkpoint}."
        )
        title = f"{GATE_TITLES[kind]}: {run.name}"
        charts.append(Chart(title, caption, [trace], layout, 170 + min(400, 22 * len(z))))
    return charts


def _heat_map(z: list[list[float | None]], hover: str) -> dict[str, Any]:
    known = [abs(value) for value in itertools.chain(*z) if value is not None]
    largest = max(known, default=0.0) or 1.0
    return {
        "type": "heatmap",
        "z": z,
        "zmin": -largest,
        "zmax": largest,
        "hovertemplate": hover,
        "colorscale": [[0, "--negative"], [0.5, "--neutral"], [1, "--positive"]],
        "colorbar": {"thickness": 10},
    }


def opening_charts(run: Run, gates: GatesOverTime) -> list[Chart]:
    """For each kind of gate a column per evaluation and a row per head, the lowest layer below.

    No chart of a single evaluation: that is what `gate_charts` shows.
    """
    if len(gates.steps) < 2:
        return []
    num_heads = gates.values["gate1"].shape[2]
    heads = [f"layer {layer}, head {i}" for layer in gates.layers for i in range(num_heads)]
    columns = max(2, min(len(gates.steps), MAX_COLUMNS, MAX_CELLS // len(heads)))
    shown = np.linspace(0, len(gates.steps) - 1, columns).round().astype(int)
    steps = [f"{gates.steps[i]:,.0f}" for i in shown]
    left_out = len(gates.steps) - columns
    rest = f" {left_out} evaluations between them are left out." if left_out else ""
    charts = []
    for kind, values in gates.values.items():
        z = values[shown].reshape(columns, -1).T.tolist()
        trace = _heat_map(z, "%{y}, step %{x}: %{z:.3f}<extra></extra>")
        layout = layout_of("step", "", showlegend=False)
        layout["xaxis"]["type"] = "category"
        firsts = range(0, len(heads), num_heads * _tick(len(gates.layers)))
        layout["yaxis"] |= {
            "type": "category",
            "title": {"text": "layer, a row per head"},
            "tickvals": [heads[i] for i in firsts],
            "ticktext": [str(gates.layers[i // num_heads]) for i in firsts],
        }
        caption = (
            f"{run.name}: {GATE_MEANINGS[kind]}. A column per evaluation. Layers count from 0, the "
            f"lowest is below. From log.txt.{rest}"
        )
        title = f"{GATE_TITLES[kind]} over time: {run.name}"
        height = 170 + min(400, 8 * len(heads))
        charts.append(Chart(title, caption, [trace | {"x": steps, "y": heads}], layout, height))
    return charts


def _tick(count: int) -> int:
    return max(1, -(-count // 16))
