"""The charts of the page, to the number: what is drawn of small runs counted by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vico.report.charts import (
    Chart,
    accuracy_chart,
    colour,
    confusion_chart,
    label,
    speed_charts,
    training_charts,
)
from vico.report.gates import gate_charts
from vico.report.language import text_charts
from vico.report.load import Gates, Run
from vico.report.results import Row
from vico.report.statistics import Share

# Wilson's interval of 3 right answers of 4, in percent.
LOW, HIGH = 30.064, 95.441


def run(name: str = "a", **parts: Any) -> Run:
    return Run(name, Path(name), **parts)


def titled(charts: list[Chart], title: str) -> Chart:
    (found,) = [chart for chart in charts if chart.title == title]
    return found


def test_a_curve_of_each_run() -> None:
    first = run("<a>", steps=[{"step": 1, "loss": 2.123456}, {"step": 2, "loss": None}])
    second = run("b", steps=[{"step": step, "loss": float(step)} for step in (3, 4, 5)])
    chart = titled(training_charts([first, second]), "Training loss, all tasks")
    assert chart.to_json()["height"] == 300
    one, three = chart.data
    assert one == {
        "type": "scatter",
        "mode": "markers",  # a line of one point is not seen
        "name": "&lt;a&gt;",
        "x": [1],
        "y": [2.1235],
        "line": {"color": "--run-0", "width": 2, "dash": "solid"},
        "marker": {"color": "--run-0", "size": 7},
    }
    assert (three["mode"], three["x"], three["y"]) == ("lines", [3, 4, 5], [3.0, 4.0, 5.0])
    assert three["line"]["color"] == "--run-1"
    assert chart.layout == {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": ""}},
        "showlegend": True,
    }
    assert "Each point" not in chart.caption
    assert not titled(training_charts([first]), chart.title).layout["showlegend"]


@pytest.mark.parametrize(
    ("num_steps", "size", "num_points"), [(300, 1, 300), (301, 2, 151), (900, 3, 300)]
)
def test_a_long_curve_is_of_means(num_steps: int, size: int, num_points: int) -> None:
    steps = [{"step": step, "lr": 1.0} for step in range(1, num_steps + 1)]
    chart = titled(training_charts([run(steps=steps)]), "Learning rate")
    assert len(chart.data[0]["x"]) == num_points
    assert (f"mean of up to {size} steps" in chart.caption) == (size > 1)


def test_runs_differ_in_colour_then_in_dash() -> None:
    runs = [run(f"run {i}", steps=[{"step": 1, "loss": 1.0}]) for i in range(26)]
    traces = titled(training_charts(runs), "Training loss, all tasks").data
    drawn = [(trace["line"]["color"], trace["line"]["dash"]) for trace in traces]
    assert len(set(drawn[:24])) == 24
    assert drawn[5:7] == [("--run-5", "solid"), ("--run-0", "dash")]
    assert drawn[24:] == drawn[:2]
    assert colour(13) == "--run-1"


def test_speed_is_tokens_by_seconds() -> None:
    steps = [
        {"step": 1, "real_tokens": 600, "step_seconds": 4.0},
        {"step": 2, "real_tokens": 600, "step_seconds": 0.0},  # no speed
        {"step": 3, "real_tokens": 0, "step_seconds": 2.0},
        {"step": 4, "step_seconds": 2.0},
    ]
    (chart,) = speed_charts([run(steps=steps)])
    assert (chart.data[0]["x"], chart.data[0]["y"]) == ([1, 3], [150.0, 0.0])
    assert speed_charts([run(steps=steps[1:2])]) == []


def test_measures_after_each_epoch() -> None:
    epochs = [
        {"step": 10, "val_cider": 0.5, "cognition": {"kl_per_token": 0.25}},
        {"step": 20, "val_cider": 0.75, "cognition": None},
        {"step": None, "val_cider": 0.9},
    ]
    charts = training_charts([run(epochs=epochs)])
    of_texts = text_charts([run(epochs=epochs)])
    cider = titled(charts, "Captions: CIDEr")
    assert (cider.data[0]["x"], cider.data[0]["y"]) == ([10, 20], [0.5, 0.75])
    assert cider.data[0]["mode"] == "lines+markers"
    assert not cider.layout["showlegend"]
    kl = titled(of_texts, "Plain text: KL(frozen || adapted)")
    assert (kl.data[0]["x"], kl.data[0]["y"]) == ([10], [0.25])
    assert len(charts) == len(of_texts) == 1


@pytest.mark.parametrize(
    ("length", "shown"),
    [(32, "0123456789" * 3 + "01"), (33, "012345678901234…7890123456789012")],
)
def test_a_long_label_is_cut_in_its_middle(length: int, shown: str) -> None:
    assert label(("0123456789" * 4)[:length]) == shown


def test_accuracies_are_drawn_from_above() -> None:
    rows = [
        Row("all", False, [Share(3, 4), Share(1, 2)]),
        Row("<why>", True, [Share(3, 4), None]),
    ]
    chart = accuracy_chart("NExT-QA", ["x", "y"], [run("a"), run("b")], rows)
    one, two = chart.data
    assert one["x"] == [75.0, 75.0]
    assert one["y"] == [0.125, 1.125]  # beside each other, 0.25 apart
    assert two["y"] == [0.875]
    assert one["text"] == ["3 of 4, 30.1 to 95.4 %"] * 2
    assert one["error_x"]["arrayminus"] == pytest.approx([75 - LOW] * 2, abs=1e-3)
    assert one["error_x"]["array"] == pytest.approx([HIGH - 75] * 2, abs=1e-3)
    assert not one["error_x"]["symmetric"]
    assert chart.layout["yaxis"] == {
        "tickvals": [0, 1],
        "ticktext": ["&lt;why&gt;", "<b>all</b>"],
        "range": [-0.7, 1.7],
    }
    assert chart.layout["showlegend"]
    assert chart.height == 130 + 2 * 26
    assert "From x, y." in chart.caption
    assert "more" not in chart.caption


@pytest.mark.parametrize(("num_rows", "rest"), [(40, ""), (43, " The table below has 3 more.")])
def test_many_types_are_left_to_the_table(num_rows: int, rest: str) -> None:
    rows = [Row(str(i), True, [Share(1, 2)] * 3) for i in range(num_rows)]
    chart = accuracy_chart("set", ["x"], [run("a"), run("b"), run("c")], rows)
    assert chart.layout["yaxis"]["ticktext"] == [str(i) for i in reversed(range(40))]
    assert chart.caption.endswith(f"From x.{rest}")
    assert chart.height == 130 + 40 * 39  # three runs need more room


def test_confusions_are_shares_of_their_row() -> None:
    chart = confusion_chart("set", "x", run("a"), [[2, 1], [0, 0]])
    (trace,) = chart.data
    assert trace["z"] == [[66.67, 33.33], [0.0, 0.0]]
    assert trace["text"] == [["2", "1"], ["0", "0"]]
    assert trace["x"] == trace["y"] == ["A", "B"]
    assert (trace["zmin"], trace["zmax"]) == (0, 100)
    assert chart.layout["yaxis"]["autorange"] == "reversed"
    assert not chart.layout["showlegend"]


@pytest.mark.parametrize(
    ("size", "last", "has_text"), [(10, "J", True), (11, "K", False), (26, "Z", False)]
)
def test_letters_of_options(size: int, last: str, has_text: bool) -> None:
    table = [[1] * size for _ in range(size)]
    (trace,) = confusion_chart("set", "x", run("a"), table).data
    assert trace["x"][-1] == last
    assert bool(trace["texttemplate"]) == has_text


def test_after_z_options_are_numbers() -> None:
    (trace,) = confusion_chart("set", "x", run("a"), [[1] * 27] * 27).data
    assert trace["x"][25:] == ["Z", "27"]


@pytest.mark.parametrize(
    ("layers", "heads", "ticks", "height"),
    [(1, 16, (1, 1), 192), (17, 32, (2, 2), 544), (19, 33, (2, 3), 570)],
)
def test_gates_share_a_symmetric_scale(
    layers: int, heads: int, ticks: tuple[int, int], height: int
) -> None:
    values = np.zeros((layers, heads))
    values[0, :3] = [0.25, -0.512345, np.nan]
    gates = Gates("checkpoint-7", 7, {"gate1": values})
    (chart,) = gate_charts(run("a", gates=gates), gates)
    (trace,) = chart.data
    assert trace["z"][0][:3] == [0.25, -0.5123, None]
    assert (trace["zmin"], trace["zmax"]) == (-0.5123, 0.5123)
    assert (chart.layout["yaxis"]["dtick"], chart.layout["xaxis"]["dtick"]) == ticks
    assert chart.height == height


def test_closed_gates_have_a_scale() -> None:
    gates = Gates("checkpoint-7", 7, {"gate1": np.zeros((2, 2))})
    (trace,) = gate_charts(run("a"), gates)[0].data
    assert (trace["zmin"], trace["zmax"]) == (-1.0, 1.0)
