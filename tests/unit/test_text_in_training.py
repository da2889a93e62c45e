"""--text in training: what the adapter does to plain text, measured with each evaluation."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.toy_dataset import ToyData
from support.training import Run
from vico.cli.flags import parse
from vico.cli.main import main
from vico.report.gates import opening_charts
from vico.report.language import text_charts
from vico.report.load import load_runs
from vico.train.heat_map import gate_values

STEPS = "--batch_size 10 --epochs 2 --warmup_epochs 1 --lr 0.02 --bias 0.7".split()
TEXT = "a man and a dog run. the cat smiles? why does the man hold it.\n" * 12
MEASURES = ("perplexity_frozen", "perplexity_adapted", "kl_per_token", "top1_agreement")

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    (tmp_path / "long.txt").write_text(TEXT)
    (tmp_path / "short.txt").write_text("the dog smiles.\n")
    return [str(tmp_path / "long.txt"), str(tmp_path / "short.txt")]


def train(toy: ToyData, out: Path, *flags: str) -> int:
    return main(["train", *toy.flags, *STEPS, "--output_dir", str(out), *flags])


def refused(capfd: pytest.CaptureFixture[str]) -> str:
    error = capfd.readouterr().err
    assert error.startswith("vico: error: ") and error.count("\n") == 1
    return error


def test_it_is_measured_and_changes_nothing(
    toy: ToyData, tmp_path: Path, texts: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """The numbers are those of `vico cognition`: in log.txt, as curves and in the report."""
    assert train(toy, tmp_path / "without") == 0
    assert train(toy, tmp_path / "with", "--text", *texts) == 0
    without, run = Run(tmp_path / "without"), Run(tmp_path / "with")
    for name, value in without.tensors(4).items():
        assert torch.equal(run.tensors(4)[name], value), name
    assert run.epochs[-1].keys() - without.epochs[-1].keys() == {"cognition"}

    capfd.readouterr()
    checkpoint = str(run.folder / "checkpoint-4")
    assert main(["cognition", "--resume", checkpoint, "--text", *texts]) == 0
    expected = json.loads(capfd.readouterr().out.splitlines()[-1])
    logged = run.epochs[-1]["cognition"]
    assert logged["kl_per_token"] > 0
    assert {name: expected[name] for name in logged if name != "files"} == {
        name: value for name, value in logged.items() if name != "files"
    }
    for path in texts:
        assert logged["files"][path] == expected["files"][path]

    board = EventAccumulator(str(run.folder / "runs"))
    board.Reload()
    for name in MEASURES:
        of_all = board.Scalars(f"cognition/{name}")
        assert [event.step for event in of_all] == [2, 4]
        assert of_all[-1].value == pytest.approx(logged[name])
        of_short = board.Scalars(f"cognition/short.txt/{name}")[-1].value
        assert of_short == pytest.approx(logged["files"][texts[1]][name])
    charts = {chart.title: chart for chart in text_charts(load_runs([run.folder]))}
    points = charts["Plain text: KL(frozen || adapted)"].data[0]
    assert points["x"] == [2, 4] and points["y"][-1] == pytest.approx(logged["kl_per_token"], 1e-4)

    gates = assert_gates_are_logged(run)
    for kind, of in (("gate1", np.abs), ("gate2", np.asarray)):
        for layer, heads in enumerate(gates[kind]):
            events = board.Scalars(f"gates/{kind}/layer_{layer:02}")
            assert [event.step for event in events] == [2, 4]
            assert events[-1].value == pytest.approx(of(heads).mean(), rel=1e-5)


def assert_gates_are_logged(run: Run) -> dict[str, npt.NDArray[np.float64]]:
    """Each head's in log.txt, as in the checkpoints, and in the report over time."""
    (loaded,) = load_runs([run.folder])
    assert loaded.gates_over_time is not None and not any("log.txt" in n for n in loaded.notes)
    charts = opening_charts(loaded, loaded.gates_over_time)
    gates = {}
    for kind, chart in zip(("gate1", "gate2"), charts, strict=True):
        (trace,) = chart.data
        assert trace["x"] == ["2", "4"] and trace["y"][0] == "layer 0, head 0"
        for column, record in enumerate(run.epochs):
            values = gate_values(run.tensors(record["step"]), kind)
            assert values is not None and list(map(int, record["gates"][kind])) == [0, 1, 2]
            assert np.allclose(list(record["gates"][kind].values()), values, rtol=1e-3)
            shown = [row[column] for row in trace["z"]]
            assert np.allclose(shown, values.flatten(), rtol=1e-3)
            gates[kind] = values
    return gates


def test_other_texts_are_another_run(
    toy: ToyData, tmp_path: Path, texts: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """A run without --text may get one; a run with one keeps it."""
    out = tmp_path / "out"
    assert train(toy, out, "--max_steps", "2") == 0
    assert train(toy, out, "--max_steps", "3", "--text", *texts) == 0
    Path(texts[1]).write_text("the cat smiles.\n", encoding="utf-8")
    capfd.readouterr()
    assert train(toy, out, "--text", *texts) == 2
    error = capfd.readouterr().err
    assert "was written by a run with other settings or files (data;" in error
    assert "data text" in error
    assert train(toy, out, "--text", *texts, "--allow_change", "data") == 0


@pytest.mark.parametrize("first", [[], ["--no_eval"]])
def test_kept_texts_are_compared_with_and_without_evaluation(
    toy: ToyData,
    tmp_path: Path,
    texts: list[str],
    capfd: pytest.CaptureFixture[str],
    first: list[str],
) -> None:
    """They are trained on: evaluation may begin and end, and the objective stays."""
    out = tmp_path / "out"
    then = [] if first else ["--no_eval"]
    assert train(toy, out, "--text", texts[0], "--keep", "1", *first, "--max_steps", "2") == 0
    capfd.readouterr()
    assert train(toy, out, "--text", texts[1], "--keep", "1", *then) == 2
    error = capfd.readouterr().err
    assert "was written by a run with other settings or files (data;" in error
    assert "data text" in error and "data train" not in error
    assert train(toy, out, "--text", texts[0], "--keep", "1", *then, "--max_steps", "3") == 0


@pytest.mark.parametrize("between", [[], ["--no_eval"]])
def test_texts_are_remembered_through_a_start_without(
    toy: ToyData,
    tmp_path: Path,
    texts: list[str],
    capfd: pytest.CaptureFixture[str],
    between: list[str],
) -> None:
    """One curve is of one text, also where some epochs measured none."""
    out = tmp_path / "out"
    assert train(toy, out, "--max_steps", "2", "--text", texts[0]) == 0
    assert train(toy, out, "--max_steps", "3", *between) == 0
    capfd.readouterr()
    assert train(toy, out, "--text", texts[1]) == 2
    assert "data text" in capfd.readouterr().err
    weights = str(out / "checkpoint-3" / "adapter_model.safetensors")
    anew = ["--resume", weights, "--max_steps", "1"]
    assert train(toy, tmp_path / "anew", "--text", texts[1], *anew) == 0, "a new run of its weights"
    assert train(toy, out, "--text", texts[0]) == 0


def test_keep_is_added_to_a_run_without(toy: ToyData, tmp_path: Path, texts: list[str]) -> None:
    """At the end of an epoch; the settings of the run do not fit this start's --no_eval."""
    out = tmp_path / "out"
    assert train(toy, out, "--no_eval", "--max_steps", "2") == 0
    words = ["--no_eval", "--allow_change", "keep", "--text", *texts, "--keep"]
    assert train(toy, out, *words) == 0
    losses = [step.get("keep_loss") for step in Run(out).steps]
    assert losses[:2] == [None, None] and all(loss is not None for loss in losses[2:])


def test_with_init_eval(
    toy: ToyData, tmp_path: Path, texts: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """The untrained model changes no text; a checkpoint says what the log of its run says."""
    out = tmp_path / "out"
    words = ["--text", *texts, "--init_eval"]
    assert train(toy, out, "--max_steps", "2", *words) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    untrained = json.loads(lines[0])
    assert untrained["split"] == "val" and untrained["cognition"]["kl_per_token"] == 0
    logged = Run(out).epochs[-1]["cognition"]
    assert logged["kl_per_token"] > 0 and logged["tokens"] == untrained["cognition"]["tokens"]
    checkpoint = ["--resume", str(out / "checkpoint-2")]
    assert train(toy, out, *words, *checkpoint) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["cognition"] == logged
    assert main(["eval", *checkpoint, "--text", *texts]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["cognition"] == logged
    assert main(["eval", *checkpoint]) == 0
    assert "cognition" not in json.loads(capfd.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["absent.txt"], "absent.txt: no such file; plain text should be there"),
        (["blank.txt"], "blank.txt: is empty"),
        (["latin.txt"], "latin.txt:1: not UTF-8 (byte 0xe9 at offset 0)"),
        (["a.txt", "a.txt"], "--text: a.txt is there twice"),
        (["a.txt", "--no_eval"], "--text a.txt: must be left out with --no_eval"),
    ],
)
def test_bad_texts_are_one_line(
    toy: ToyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a man.")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for command in ("train", "check"):
        words_of = [command, *toy.flags, "--output_dir", "out", "--text", *words]
        assert main(words_of) == 2
        assert expected in refused(capfd)


def test_a_file_is_named_once(
    toy: ToyData, tmp_path: Path, texts: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """By whatever path: a link of either kind, and a way around. It would count twice."""
    (tmp_path / "link.txt").symlink_to(texts[0])
    (tmp_path / "hard.txt").hardlink_to(texts[0])
    (tmp_path / "x").mkdir()
    for name in ("link.txt", "hard.txt", "x/../long.txt"):
        again = str(tmp_path / name)
        for command in ("train", "check"):
            words = ["--output_dir", str(tmp_path / "out"), "--text", *texts, again]
            assert main([command, *toy.flags, *words]) == 2
            line = f"--text {again}: is the same file as {texts[0]}; name each file once"
            assert line in refused(capfd)


def test_check_finds_every_bad_text(
    toy: ToyData, tmp_path: Path, texts: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    bad = {name: tmp_path / f"{name}.txt" for name in ("bad8", "nothere", "empty")}
    bad["bad8"].write_bytes("é".encode("latin-1"))
    bad["empty"].write_text("")
    words = ["--output_dir", str(tmp_path / "out"), "--text", texts[0], *map(str, bad.values())]
    assert main(["check", *toy.flags, *words, texts[1]]) == 2
    captured = capfd.readouterr()
    error = captured.err
    assert error.count("\n") == 3
    assert "bad8.txt:1: not UTF-8" in error and f"{bad['empty']}: is empty" in error
    assert f"{bad['nothere']}: no such file" in error
    assert all(f"tokens of {path}" in captured.out for path in texts)
    assert "3 error(s)" in captured.out


def test_a_recipe_names_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, or a list; with variables. The flag wins, and --print_config writes it back."""
    monkeypatch.setenv("BOOKS", "/books")
    recipe = tmp_path / "recipe.yaml"
    one, several = (Path("/books/a.txt"),), (Path("/books/a.txt"), Path("/b$c.txt"))
    for text, expected in (("$BOOKS/a.txt", one), ("[$BOOKS/a.txt, /b$$c.txt]", several)):
        recipe.write_text(f"text: {text}\n")
        assert parse(["--config", str(recipe)], "vico train", "").resolve().text == expected
    words = ["--config", str(recipe), "--text", "/x.txt", "/y.txt"]
    given = parse(words, "vico train", "").resolve()
    assert given.text == (Path("/x.txt"), Path("/y.txt"))
    assert parse(["text=/z.txt"], "vico train", "").resolve().text == (Path("/z.txt"),)
