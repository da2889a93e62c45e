"""`vico report`: what is read of runs that are whole, partial or damaged, and the page's safety."""

import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from support.errors import refusal
from support.report_runs import EVIL, Report, write_lines
from vico.cli.report import main
from vico.report.gates import opening_charts
from vico.report.load import Run, load_runs, run_names
from vico.report.questions import QuestionSet, join
from vico.report.results import ALL, accuracies, confusions, differences
from vico.report.statistics import Share, wilson

SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


class Tags(HTMLParser):
    """What a parser takes for elements and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes |= {name for name, _ in attrs}


def report(tmp_path: Path, num_questions: int = 40, **options: Any) -> Report:
    made = Report(tmp_path, num_questions, **options)
    made.write_questions()
    return made


def loaded(*paths: Path) -> tuple[list[Run], list[QuestionSet], list[str]]:
    runs = load_runs(list(paths))
    sets, notes = join(runs)
    return runs, sets, notes


def page_of(tmp_path: Path, *paths: Path) -> str:
    target = tmp_path / "report.html"
    assert main([*map(str, paths), "--output", str(target)]) == 0
    return target.read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, Any]:
    found = DATA.search(page)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_accuracies_differences_and_confusions(tmp_path: Path) -> None:
    made = report(tmp_path)
    paths = [made.write_run("a", wrong_every=4), made.write_run("b", wrong_every=5)]
    _, sets, notes = loaded(*paths)
    assert notes == [] and [questions.name for questions in sets] == ["nextqa val"]
    rows = {row.name: row for row in accuracies(sets[0], 2)}
    assert rows[ALL].shares == [Share(30, 40), Share(32, 40)]
    assert rows["CW"].shares == [Share(0, 10), Share(8, 10)]
    assert rows["D"].shares == [Share(10, 10), Share(8, 10)]
    assert [row.name for row in rows.values() if row.is_part] == ["CH", "CW"]
    found = {one.group: one.paired for one in differences(sets[0], 2)}
    assert list(found) == [ALL, "C", "T", "D"]
    paired = found[ALL]
    assert (paired.both, paired.only_first, paired.only_second, paired.neither) == (24, 6, 8, 2)
    table = confusions(sets[0], 2)[0]
    assert [sum(row) for row in table] == [8] * 5
    assert sum(table[i][(i + 1) % 5] for i in range(5)) == 10
    assert sets[0].items[3].text is not None
    assert sets[0].items[3].text.options[4] == "he runs 4 times in 3"


def test_an_evaluation_alone_is_joined_to_its_run(tmp_path: Path) -> None:
    """It has no args.json: its data set is that of the run with the same questions."""
    made = report(tmp_path)
    run, alone = made.write_run("a", wrong_every=4), tmp_path / "alone"
    made.write_predictions(alone, wrong_every=3)
    runs, sets, _ = loaded(run, alone)
    assert [questions.name for questions in sets] == ["nextqa val"]
    assert differences(sets[0], 2)[0].paired.n == 40
    assert any("no args.json, so its settings are unknown" in note for note in runs[1].notes)
    assert any("no steps.jsonl" in note for note in runs[1].notes)
    _, sets, notes = loaded(alone)
    assert sets[0].name == "val" and sets[0].items[0].text is None
    assert notes == ["val: no file names its data set, so its questions are shown by id"]


def test_changed_questions_are_not_compared(tmp_path: Path) -> None:
    """Another right answer or number of options is another question."""
    made = report(tmp_path)
    first, second = made.write_run("a", wrong_every=4), made.write_run("b", wrong_every=4)
    path = second / "predictions_val.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["answer"] = (lines[0]["answer"] + 1) % 5
    lines[1]["scores"] = lines[1]["scores"][:4]
    lines[1]["answer"] = lines[1]["prediction"] = 0
    write_lines(path, lines)
    _, sets, notes = loaded(first, second)
    assert len(sets[0].items) == 42 and differences(sets[0], 2)[0].paired.n == 38
    assert notes == [
        "nextqa val: 2 of 42 questions are shown by id: the data set does not have them with "
        "this answer and number of options"
    ]


def test_a_mixture_and_another_data_set(tmp_path: Path) -> None:
    made = report(tmp_path)
    run = made.write_run("a", wrong_every=4, dataset="nextqa,star:2")
    lines = [json.loads(x) for x in (run / "predictions_val.jsonl").read_text().splitlines()]
    for line in lines[:10]:
        line["dataset"] = "star"
    for line in lines[10:]:
        line["dataset"] = "nextqa"
    write_lines(run / "predictions_val.jsonl", lines)
    without = [{**line, "answer": None, "dataset": "tvqa"} for line in lines]
    write_lines(run / "predictions_tvqa_test.jsonl", without)
    write_lines(run / "predictions_star_val.jsonl", lines[:10])
    _, sets, notes = loaded(run)
    numbers = {questions.name: len(questions.items) for questions in sets}
    assert numbers == {"star val": 10, "nextqa val": 30, "tvqa test": 40}
    assert notes[0] == (
        "a: predictions_star_val.jsonl is not shown: predictions_val.jsonl has answers to the "
        "same questions"
    )
    assert accuracies(sets[2], 1) == []
    assert "No right answers are given" in page_of(tmp_path, run)


def test_damage_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    made = report(tmp_path)
    run = made.write_run("a", wrong_every=4)
    made.write_captions(run, "a dog")
    damaged = {"predictions_val.jsonl": '{"index": 1', "steps.jsonl": '{"step": 41, "lo'}
    damaged |= {"captions_val.jsonl": '{"video": 3}', "log.txt": '{"step": "x"}'}
    for name, line in damaged.items():
        with (run / name).open("a") as file:
            file.write(line + "\n")
    with (run / "captions_val.jsonl").open("a") as file:
        file.write((run / "captions_val.jsonl").read_text().splitlines()[0] + "\n")
    (run / "args.json").write_text("{")
    (run / "runs").mkdir()
    for name in ("predictions_test.jsonl", "captions_test.jsonl", "runs/events.out.tfevents.1"):
        os.mkfifo(run / name)
    (run / "runs" / "events.out.tfevents.2").write_bytes(b"no events")
    (run / "checkpoint-3").mkdir()
    runs, sets, _ = loaded(run)
    notes = "\n".join(runs[0].notes)
    assert "predictions_val.jsonl: 1 damaged line(s) left out, first: " in notes
    assert "captions_val.jsonl: 1 damaged line(s) left out, first: captions_val.jsonl:7: " in notes
    assert "steps.jsonl: 1 damaged line(s) left out" in notes
    assert "log.txt: 1 damaged line(s) left out" in notes
    assert "its settings are not shown: args.json:1: column " in notes
    assert "runs/events.out.tfevents.2 is shown up to where it is damaged or ends (" in notes
    assert "1 caption(s) left out: of a video with several the last is shown" in notes
    assert "predictions_test.jsonl is not shown: " in notes and "a device or a pipe" in notes
    assert "its gates are not shown: " in notes and "none of its 1 checkpoints" in notes
    assert len(sets[0].items) == 40 and len(runs[0].steps) == 40 and len(runs[0].captions) == 6
    page = page_of(tmp_path, run)
    assert "What is missing" in page and "1 damaged line(s) left out" in page


def test_values_of_any_kind_make_a_page(tmp_path: Path) -> None:
    """Logs may hold what no chart can show; a text may be half a surrogate pair."""
    made = report(tmp_path)
    run = made.write_run("a", wrong_every=4, model="\ud800", dataset=["nextqa"])
    odd = [
        "1e199",
        "-1e199",
        "1e308",
        "NaN",
        "Infinity",
        '"x"',
        "null",
        "[1]",
        "1e999",
        "9" * 400,
        "true",
        "{}",
    ]
    keys = ("loss", "lr", "val_n", "real_tokens", "grad_norm")
    lines = []
    for step, value in enumerate(odd):
        values = ", ".join(f'"{key}": {value}' for key in keys)
        lines.append(f'{{"step": {step}, "val_acc": 0.5, "step_seconds": 1e-199, {values}}}')
    for name in ("steps.jsonl", "log.txt"):
        (run / name).write_text("\n".join([*lines, f'{{"step": {"9" * 400}, "loss": 1.5}}']))
    page = page_of(tmp_path, run)
    assert "\\ud800" in page and data_of(page)["charts"]


def test_texts_stay_texts(tmp_path: Path) -> None:
    """No text of a file ends the data, a tag or an attribute."""
    made = report(tmp_path, 8, video=EVIL)
    name = "<b onclick=alert(1)>run&"
    run = made.write_run(name, wrong_every=2, model=EVIL)
    made.write_captions(run, EVIL)
    page = page_of(tmp_path, run)
    data = data_of(page)
    assert data["questions"][0]["video"] == f"{EVIL}0" and data["runs"] == [name]
    assert EVIL not in page and "\u2028" not in DATA.search(page)[1]  # type: ignore[index]
    tags = Tags()
    tags.feed(page)
    assert {"b", "img"}.isdisjoint(tags.names) and "onclick" not in tags.attributes
    assert tags.names.count("script") == 4


def test_policy_allows_the_scripts_alone(tmp_path: Path) -> None:
    page = page_of(tmp_path, report(tmp_path).write_run("a", wrong_every=4))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()) for s in SCRIPT.findall(page)]
    assert rules["script-src"] == " ".join(f"'sha256-{digest.decode()}'" for digest in digests)
    assert not re.search(r'(src|href)="(?!#|data:)', page.split("<script", 1)[0])


def test_accuracies_of_a_mixture_on_test(tmp_path: Path) -> None:
    """Epochs may be evaluated on test, and a mixture has an accuracy of each data set."""
    made = report(tmp_path)
    run = made.write_run("a", wrong_every=4, dataset="nextqa,star")
    line = {"test_acc": 0.5, "test_n": 40, "test_star_acc": 0.25, "test_star_n": 8}
    write_lines(run / "log.txt", [{"step": 9, **line}, {"step": 18, **line, "val_cider": 0.3}])
    page = page_of(tmp_path, run)
    titles = re.findall(r"<h4>([^<]+)</h4>", page)
    expected = ["Validation accuracy", "Validation accuracy: star", "Captions: CIDEr"]
    assert [title for title in titles if title in expected] == expected
    chart = data_of(page)["charts"][titles.index("Validation accuracy: star")]
    assert chart["data"][0]["y"] == [25, 25]
    assert chart["data"][0]["error_y"]["array"][0] == pytest.approx(100 * (wilson(2, 8)[1] - 0.25))


def test_speed_and_memory(tmp_path: Path) -> None:
    """Memory and evaluation are read from TensorBoard's files, up to where one is cut off."""
    run = report(tmp_path).write_run("a", wrong_every=4)
    board = SummaryWriter(str(run / "runs"))
    for step, gib in enumerate((1.5, 2.25, 2.0)):
        board.add_scalar("memory/host_peak_gib", gib, step)
        board.add_scalar("perf/eval_questions_per_second", 50.0, step)
        board.add_scalar("train/loss", 1.0, step)
    board.close()
    expected = {"memory/host_peak_gib": [1.5, 2.25, 2.0]}
    expected["perf/eval_questions_per_second"] = [50.0] * 3
    assert load_runs([run])[0].performance == expected
    page = page_of(tmp_path, run)
    row = re.findall(r"<td>([^<]*)</td>", page.split("Speed, and peak memory")[-1])[:7]
    assert row == ["40", "0.3", "3,000", "0.0033", "50", "2.25", "–"]
    (events,) = (run / "runs").iterdir()
    events.write_bytes(events.read_bytes()[:-60])
    loaded_run = load_runs([run])[0]
    assert loaded_run.performance["memory/host_peak_gib"] == [1.5, 2.25, 2.0]
    assert "truncated record" in loaded_run.notes[-1]


def test_names_tell_runs_apart() -> None:
    assert run_names([Path("/x/a/out"), Path("/x/b/out")]) == ["a/out", "b/out"]
    assert run_names([Path("/x/a/out"), Path("/x/a/in")]) == ["out", "in"]


def test_many_runs(tmp_path: Path) -> None:
    """The summary compares each with the best, the table all of them."""
    made = report(tmp_path)
    paths = [made.write_run(f"run{i}", n) for i, n in enumerate((3, 4, 5, 7, 10, 20, 40))]
    page = page_of(tmp_path / "new" / "folder", *paths)
    best = re.findall(r'class="finding">nextqa val: (\w+) is [\d.]+ points above (\w+) ', page)
    assert best == [("run6", f"run{i}") for i in range(6)]
    assert page.count("→") == 7 * 6 // 2 * 4
    assert {trace["name"] for trace in data_of(page)["charts"][0]["data"]} == {
        f"run{i}" for i in range(7)
    }


def test_the_same_settings_differ_nowhere(tmp_path: Path) -> None:
    made = report(tmp_path)
    runs = [made.write_run("a", 4, lr=0.1), made.write_run("b", 4, lr=0.1, output_dir="/elsewhere")]
    assert "The runs have the same settings." in page_of(tmp_path, *runs)
    (runs[1] / "args.json").write_text(json.dumps({"dataset": "nextqa", "lr": 0.2}))
    page = page_of(tmp_path, *runs)
    assert "Settings that differ" in page and "The runs have the same settings." not in page


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = report(tmp_path)
    run, target = made.write_run("a", wrong_every=4), str(tmp_path / "report.html")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty: holds no run (no args.json, log" in refusal(
        main, [str(run), str(empty), "--output", target]
    )
    nowhere = str(tmp_path / "nowhere")
    assert "nowhere: no such folder; name" in refusal(main, [nowhere, "--output", target])
    twice = [str(run), f"{run}/../a", "--output", target]
    assert "is named twice; name each run once" in refusal(main, twice)
    file = str(run / "log.txt")
    assert "log.txt: is a file, not a folder" in refusal(main, [file, "--output", target])
    assert "is there already and is no report" in refusal(main, [str(run), "--output", file])
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    message = refusal(main, [str(run), "--output", target])
    assert (
        message.startswith("vico report needs plotly; run: pip install") and "[report]" in message
    )
    assert not Path(target).exists()


def test_an_earlier_report_is_replaced(tmp_path: Path) -> None:
    run = report(tmp_path).write_run("a", wrong_every=4)
    first = page_of(tmp_path, run)
    assert page_of(tmp_path, run).split("written")[0] == first.split("written")[0]
    link, aim = tmp_path / "link.html", tmp_path / "aim"
    aim.write_text(first)
    link.symlink_to(aim)
    main([str(run), "--output", str(link)])
    assert aim.read_text() == first and not link.is_symlink()


def test_gates_over_time(tmp_path: Path) -> None:
    """A column per evaluation, many of them thinned; absent and damaged ones are counted."""
    run = Report(tmp_path, 3).write_run("run", 2)
    assert "log.txt has no gates (it is of an earlier version)" in "\n".join(
        load_runs([run])[0].notes
    )
    lines: list[dict[str, Any]] = []
    for step in range(1, 101):
        layers = {layer: [step / 100, -step / 50] for layer in ("1", "2")}
        lines.append({"step": step, "gates": {"gate1": layers, "gate2": layers}})
    for damaged in ({}, {"gate1": {"1": [1, 2]}}, {"gate1": 1, "gate2": 2}, [1], "x"):
        lines.append({"step": len(lines) + 1, "gates": damaged})
    for values in ([0.5], [0.5, None], [0.5, "1"], [0.5, 10**300]):
        layers = {"1": [1, 2], "2": values}
        lines.append({"step": len(lines) + 1, "gates": {"gate1": layers, "gate2": layers}})
    lines.append({"step": len(lines) + 1})
    layers = {layer: [1, 2] for layer in ("1", "2")}
    lines.append({"step": len(lines) + 1, "gates": {"gate1": layers, "gate2": layers}})
    write_lines(run / "log.txt", lines[100:105])
    assert "log.txt: the gates of all lines are damaged" in load_runs([run])[0].notes
    write_lines(run / "log.txt", lines)
    (loaded_run,) = load_runs([run])
    assert "log.txt: the gates of 10 line(s) are absent or damaged" in loaded_run.notes
    opened = loaded_run.gates_over_time
    assert opened is not None and opened.layers == [1, 2] and len(opened.steps) == 101
    chart, _ = opening_charts(loaded_run, opened)
    (trace,) = chart.data
    assert trace["y"][-1] == "layer 2, head 1" and trace["zmax"] == 2
    assert len(trace["x"]) == 60 and (trace["x"][0], trace["x"][-1]) == ("1", "111")
    assert [row[0] for row in trace["z"]] == [0.01, -0.02, 0.01, -0.02]
    assert "41 evaluations between them are left out" in chart.caption
