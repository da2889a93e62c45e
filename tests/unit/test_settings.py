"""Settings as plain values: saved and read again, paths, and which of them define a run."""

import dataclasses
import json
import runpy
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.command_line import error_of, parse_line, recipe
from support.processes import ROOT
from vico.checkpoint.format import Checkpoint, TrainState
from vico.cli.evaluate import on_replaced_predictions, settings_of
from vico.cli.flags import CommandLine, parse, training_notes
from vico.errors import UserError
from vico.train import config as configs
from vico.train.config import RunConfig
from vico.train.identity import NOT_IDENTITY
from vico.train.resume import differences, refuse_changes
from vico.train.settings import evaluated_split, settings_from, training_splits
from vico.train.start import Run

RULES = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    kind, choices = configs.value_type(annotation)
    if choices:
        return st.sampled_from(choices)
    paths = st.text("ab/.é ", min_size=1, max_size=9).filter(str.strip).map(Path)
    strategies: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(1, 400),
        float: st.floats(1e-6, 1e6),
        str: st.text(st.characters(codec="utf-8"), max_size=5),
        Path: paths,
        tuple: st.lists(paths, max_size=3, unique=True).map(tuple),
    }
    optional = type(None) in getattr(annotation, "__args__", ())
    return strategies[kind] | st.none() if optional else strategies[kind]


HINTS = typing.get_type_hints(RunConfig, include_extras=True)
SETTINGS = {name: values_of(hint) for name, hint in HINTS.items()}
SETTINGS |= {
    "report_to": st.sampled_from(["none", "all", "wandb, tensorboard"]),
    "allow_change": st.sampled_from([None, "lr", "data, backbone"]),
    "checkpoint_activations": st.sampled_from(["none", "full", "7"]),
    "dataset": st.sampled_from(["nextqa", "star", "tvqa", "intentqa"]),
}


@RULES
@given(values=st.fixed_dictionaries({}, optional=SETTINGS))
def test_saved_settings_round_trip(values: dict[str, Any]) -> None:
    subtitles = values.get("sub", False) and values.get("dataset") == "tvqa"
    values |= {"max_seq_len": 512, "sub": subtitles}
    if values.get("no_eval"):
        values |= {"eval_captions": None, "text": (), "attention_shares": None}  # refused
    if not values.get("text"):
        values["keep"] = None
    config = CommandLine(values, (), False).resolve()
    again = settings_from(config.to_json(), "args.json")
    assert RunConfig(**again) == config and differences(config.to_json(), config) == []
    assert CommandLine({}, (), False).resolve(again) == config


def test_flags_win_over_saved_settings() -> None:
    """And saved settings win over defaults."""
    line = CommandLine({"seed": 5}, (), False)
    config = line.resolve({"seed": 3, "epochs": 7})
    assert (config.seed, config.epochs, config.batch_size) == (5, 7, 64)


def test_a_table_of_runs_switches_off(tmp_path: Path) -> None:
    """A cell that says no, in a row of launch/slurm/table.py, wins over the recipe."""
    table = runpy.run_path(str(ROOT / "launch" / "slurm" / "table.py"))
    columns = ["vaq", "no_shuffle", "qav", "sub", "lr"]
    row = table["_read_row"](tmp_path, 1, columns, ["no", "no", "yes", "", "0.1"])
    assert row.flags == ["--no-vaq", "--shuffle", "--qav", "--lr=0.1"]


def test_evaluation_ignores_how_a_run_saved(tmp_path: Path) -> None:
    """An earlier version accepted numbers that are out of range now."""
    settings = {"save_steps": -5, "save_total_limit": -1, "epochs": 7}
    checkpoint = Checkpoint(tmp_path / "run" / "checkpoint-1", {}, settings=settings)
    config, _ = settings_of(checkpoint, CommandLine({}, (), False))
    assert (config.save_steps, config.epochs) == (None, 7)


def test_evaluation_keeps_the_predictions_of_the_run(tmp_path: Path) -> None:
    """Other settings are said; another data set has a file of its own."""
    run = tmp_path / "run"
    saved = {"dataset": "nextqa", "precision": "bf16", "seed": 1}
    checkpoint = Checkpoint(run / "checkpoint-1", {}, settings=saved)

    def notes_for(**given: Any) -> list[str]:
        return on_replaced_predictions(checkpoint, given)

    assert notes_for(dataset="star") == [], "no run is there"
    run.mkdir()
    (run / "args.json").write_text("{}", encoding="utf-8")
    assert notes_for() == notes_for(dataset="nextqa", batch_size=3) == []
    assert notes_for(dataset="star", split="test") == []
    assert notes_for(dataset="star", output_dir=tmp_path / "other") == []
    (note,) = notes_for(precision="fp32")
    assert note.startswith("note: --precision fp32: unlike the run, whose predictions_val.jsonl")


def test_settings_that_do_less_than_they_seem_to() -> None:
    (note,) = training_notes(RunConfig(epochs=5))
    assert "--warmup_epochs 40 is above --epochs 5" in note and "rises to 12.5% of its peak" in note
    enough = RunConfig(epochs=40, split="test")
    (note,) = training_notes(enough)
    assert note.startswith("--split test: epochs are evaluated on val; ")
    assert training_notes(dataclasses.replace(enough, init_eval=True)) == []
    scored = dataclasses.replace(enough, epochs=5, init_eval=True, resume=Path("checkpoint"))
    assert training_notes(scored) == []


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = parse_line("--data_path d --deepspeed my/ds.json --output_dir /abs")
    config = line.resolve()
    assert config.data_path == tmp_path / "d"
    assert config.deepspeed == f"{tmp_path}/my/ds.json"
    assert config.output_dir == Path("/abs")
    assert parse([], "vico train", "").resolve().deepspeed == "auto"


def test_home_and_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe's paths know ~ and $NAME, those of flags ~: the shell does the rest for them."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ROOT_", "/scratch")
    monkeypatch.setenv("EMPTY_", "")
    text = "data_path: ~/d\nresume: $ROOT_/c$$\ncaptions: ${ROOT_}/c.json\ndeepspeed: ~/ds.json\n"
    config = parse_line(recipe(tmp_path, text)).resolve()
    home = tmp_path / "home"
    assert (config.data_path, config.deepspeed) == (home / "d", f"{home}/ds.json")
    assert (config.resume, config.captions) == (Path("/scratch/c$"), Path("/scratch/c.json"))
    flags = parse_line("--output_dir=~/o --data_path=~ --deepspeed=~/x --resume='/a$b'").resolve()
    assert (flags.output_dir, flags.data_path, flags.resume) == (home / "o", home, Path("/a$b"))
    assert flags.deepspeed == f"{home}/x"
    assert parse_line("--model '~$x'").resolve().model == "~$x", "no path"
    for value, fault in (
        ("$NOWHERE_/x", "the variable NOWHERE_ is not set"),
        ("$EMPTY_/x", "the variable EMPTY_ is not set"),
        ("a$/x", "write $$ for a dollar sign"),
        ("~nobody_/x", "no such home folder"),
    ):
        error = error_of(recipe(tmp_path, f"output_dir: {value}\n"))
        assert error.startswith(f"--config {tmp_path}/recipe.yaml: output_dir: '{value}': ")
        assert fault in error
    assert "--output_dir: '~nobody_/x': no such home" in error_of("--output_dir=~nobody_/x")
    assert settings_from({"data_path": "/a/$b/~"}, "args.json")["data_path"] == Path("/a/$b/~")


def test_captions_may_be_named_by_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--captions NAME is in the current folder or, where it is not there, in the dataset's."""
    folder = tmp_path / "data" / "star"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    line = parse_line("--dataset star --captions mine.json")
    assert line.resolve().captions == tmp_path / "mine.json"
    (folder / "mine.json").touch()
    assert line.resolve().captions == folder / "mine.json"
    (tmp_path / "mine.json").touch()
    assert line.resolve().captions == tmp_path / "mine.json"


def test_differences_change_the_numbers() -> None:
    """Settings that change no result, such as paths, may differ."""
    saved = RunConfig().to_json()
    now = RunConfig(
        seed=1,
        lr=0.5,
        num_workers=9,
        data_path=Path("else"),
        output_dir=Path("else"),
        max_steps=3,
        deepspeed="zero3",
        split="test",
    )
    assert differences(saved, now) == [("lr", "null", "0.5"), ("seed", "0", "1")]
    assert differences({}, RunConfig()), "missing settings differ"
    assert differences({**RunConfig().to_json(), "keep": 0.0}, RunConfig()) == [], "0 is off"


IDENTITY = [f.name for f in dataclasses.fields(RunConfig) if f.name not in NOT_IDENTITY]


@pytest.mark.parametrize("name", IDENTITY)
def test_changed_identity_is_refused(name: str) -> None:
    """Unless --allow_change names the setting."""
    config = RunConfig(dataset="tvqa", max_seq_len=512)  # which allow --sub
    before = config.to_json()
    value = before[name]
    kind, choices = configs.value_type(HINTS[name])
    if choices:
        other = next(choice for choice in choices if choice != value)
    else:
        other = {bool: not value, str: "other", int: 300, float: 0.37}[kind]
    text = (Path("a.txt"),) if name == "keep" else ()
    now = dataclasses.replace(config, **{"text": text, name: other})
    assert differences(before, now) == [(name, json.dumps(value), json.dumps(other))]
    with pytest.raises(UserError, match=rf"^x \({name}; table below\); .* --allow_change {name}$"):
        refuse_changes("x", differences(before, now), "remedy")
    assert differences(before, dataclasses.replace(now, allow_change=name)) == []


def test_the_split_that_epochs_are_evaluated_on(tmp_path: Path) -> None:
    """val, or test where it is asked for and there is no val."""
    folder = tmp_path / "nextqa"
    folder.mkdir()
    plain = RunConfig(data_path=tmp_path, dataset="nextqa")
    asked = dataclasses.replace(plain, split="test")
    assert evaluated_split(asked) == evaluated_split(plain) == "val", "neither is there"
    (folder / "test.csv").touch()
    assert (evaluated_split(asked), evaluated_split(plain)) == ("test", "val")
    assert training_splits(asked) == ("train", "test")
    (folder / "val.csv").touch()
    assert evaluated_split(asked) == "val" and training_splits(asked) == ("train", "val")
    silent = dataclasses.replace(asked, no_eval=True)
    assert evaluated_split(silent) is None and training_splits(silent) == ("train",)


@pytest.mark.parametrize(
    ("max_steps", "last", "limit"),
    [(None, 12, "--epochs"), (7, 7, "--max_steps"), (99, 12, "--epochs")],
)
def test_where_a_run_ends(max_steps: int | None, last: int, limit: str) -> None:
    config = RunConfig(epochs=3, max_steps=max_steps)
    values = {"config": config, "steps": SimpleNamespace(steps_per_epoch=4)}
    ends = ((last - 1, False, False), (last, True, False), (last, False, True))
    for step, due, is_complete in ends:
        run = object.__new__(Run)
        run.__dict__.update(values, state=TrainState(step=step, evaluation_due=due))
        assert (run.last_step, run.limit, run.is_complete) == (last, limit, is_complete)
