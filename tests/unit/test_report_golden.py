"""The page of a small world, to the letter: its tables, sentences, charts and data.

A changed line here is another page for a user. Renew the file with
`VICO_RENEW_REPORT=1 bash tests/run.sh tests/unit/test_report_golden.py`, and read the diff.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.report_runs import Report, write_lines
from vico.cli.report import main
from vico.report.charts import accuracy_chart
from vico.report.gates import opening_charts
from vico.report.load import GatesOverTime, load_runs
from vico.report.results import Row
from vico.report.statistics import Share

GOLDEN = Path(__file__).resolve().parent / "golden" / "report.out"
RENEW = "VICO_RENEW_REPORT=1 bash tests/run.sh tests/unit/test_report_golden.py"


def write_logs(run: Path, factor: float) -> None:
    """Four steps and two evaluations, with all that a run may log."""
    steps, epochs = [], []
    for step in range(1, 5):
        loss = factor / step
        record: dict[str, Any] = {"step": step, "loss": loss, "vqa_loss": loss / 3, "lr": 0.01}
        record |= {"keep_loss": None, "real_tokens": 900 * step, "step_seconds": 0.25 * factor}
        steps.append(record)
    for step in (2, 4):
        gates = {str(layer): [step / 8, -layer / 4] for layer in (1, 2)}
        record = {"step": step, "val_acc": 0.25 * factor, "val_n": 12, "val_cider": step / 3}
        record["cognition"] = {"kl_per_token": 0.02 * step, "top1_agreement": 1 - step / 100}
        epochs.append(record | {"gates": {"gate1": gates, "gate2": gates}})
    write_lines(run / "steps.jsonl", steps)
    write_lines(run / "log.txt", epochs)


def small_page(folder: Path) -> str:
    """Its sections and data, a line for each element and number."""
    report = Report(folder, 12)
    report.write_questions()
    runs = []
    for name, wrong_every, factor in (("a", 3, 1.5), ("b", 4, 2.0), ("c", 3, 1.0)):
        runs.append(report.write_run(name, wrong_every, lr=0.01 * factor, seed=1))
        write_logs(runs[-1], factor)
    report.write_captions(runs[0], "a man in")
    target = folder / "report.html"
    assert main([*map(str, runs), "--output", str(target)]) == 0
    text = target.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    body = re.sub(r"<(style|script)\b.*?</\1>", "", text, flags=re.S)
    body = re.sub(r"written \d{4}-\d\d-\d\d \d\d:\d\d", "written T", body)
    body = re.sub(r"script-src [^;]*", "script-src H", body)
    lines = [line for line in body.replace("<", "\n<").splitlines() if line.strip()]
    lines.append(json.dumps(json.loads(data), indent=0, ensure_ascii=False))
    return "\n".join(lines).replace(str(folder), "FOLDER") + "\n"


def test_the_page_is_as_committed(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    found = small_page(tmp_path)
    if os.environ.get("VICO_RENEW_REPORT"):
        GOLDEN.write_text(found, encoding="utf-8")
    expected = GOLDEN.read_text(encoding="utf-8").splitlines()
    for number, (was, now) in enumerate(zip(expected, found.splitlines(), strict=False), 1):
        assert now == was, f"{GOLDEN.name}:{number} differs; if that is meant: {RENEW}"
    assert len(found.splitlines()) == len(expected), RENEW


def test_dots_differ_in_colour_then_in_symbol(tmp_path: Path) -> None:
    """Of eight runs, half of which have answered; a group's dots lie evenly about its line."""
    runs = load_runs([Report(tmp_path, 3).write_run("run", 2)]) * 8
    chart = accuracy_chart("val", ["p"], runs, [Row("type", True, [Share(1, 2), None] * 4)])
    marks = [(trace["marker"]["color"], trace["marker"]["symbol"]) for trace in chart.data]
    assert marks == [("--run-0", 0), ("--run-2", 0), ("--run-4", 0), ("--run-0", 1)]
    assert [trace["y"] for trace in chart.data] == [[0.21875], [0.09375], [-0.03125], [-0.15625]]


def test_gates_over_many_evaluations(tmp_path: Path) -> None:
    """No more than 60,000 cells, evenly spread, with the first and the last; one is no curve."""
    (run,) = load_runs([Report(tmp_path, 3).write_run("run", 2)])
    layers = list(range(40))
    for num_steps, heads, columns in ((60, 25, 60), (61, 25, 60), (100, 50, 30), (5, 1000, 2)):
        steps = [float(step) for step in range(1000, 1000 + num_steps)]
        values = np.zeros((num_steps, 40, heads)) + np.arange(num_steps)[:, None, None]
        (chart,) = opening_charts(run, GatesOverTime(steps, layers, {"gate1": values}))
        (trace,) = chart.data
        assert (len(trace["x"]), trace["x"][0]) == (columns, "1,000")
        assert trace["x"][-1] == f"{999 + num_steps:,}" and len(trace["z"]) == 40 * heads
        assert trace["z"][0][-1] == num_steps - 1 and trace["y"][heads] == "layer 1, head 0"
        assert chart.layout["yaxis"]["ticktext"] == [str(layer) for layer in range(0, 40, 3)]
        assert chart.layout["yaxis"]["tickvals"][1] == "layer 3, head 0" and chart.height == 570
        left_out = f" {num_steps - columns} evaluations between them are left out."
        assert chart.caption.endswith(left_out) == (num_steps > columns)
    one = GatesOverTime([1.0], layers, {"gate1": np.zeros((1, 40, 2))})
    assert opening_charts(run, one) == []
