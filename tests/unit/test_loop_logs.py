"""What a start of a training run logs and says, and what it finds of earlier starts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from support.errors import refusal
from support.run_without_model import run_of
from vico.checkpoint import restart_limit
from vico.checkpoint.format import TrainState
from vico.checkpoint.write import RunIdentity
from vico.io.atomic import write_json, write_lines
from vico.train import loop
from vico.train.start import Run


def open_log(run: Run, capsys: pytest.CaptureFixture[str]) -> tuple[Any, int | None, list[str]]:
    """The log, the step to save at, and what is said."""
    run.output_dir.path.mkdir(exist_ok=True)
    log, early_save = loop._open_log(run)
    log.close()
    return log, early_save, capsys.readouterr().out.splitlines()


def test_the_log_of_a_new_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its settings and what follows from them are in args.json at once."""
    run = run_of(tmp_path / "out")
    log, early_save, said = open_log(run, capsys)
    assert (said, early_save, log.args_due) == ([], None, None)
    args = json.loads(run.output_dir.args.read_text())
    facts = {"world_size": 1, "steps_per_epoch": 4, "peak_lr": 0.5, "run": "r"}
    assert args == run.config.to_json() | facts


def test_the_log_of_a_run_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps after its checkpoint are redone; new settings wait for the first save."""
    out = tmp_path / "out"
    new = run_of(out, state=TrainState(step=3), resume=Path("/first.pth"))
    open_log(new, capsys)
    write_lines(new.output_dir.steps, [{"step": n} for n in range(1, 8)])
    before = new.output_dir.args.read_text()
    state = TrainState(step=3)
    run = run_of(out, state=state, weight_decay=0.2)
    log, early_save, said = open_log(run, capsys)
    assert early_save == 5, "killed: half of the four steps that were lost"
    assert said == [
        "resuming from step 3 (4 step(s) to redo)",
        "note: the last start was killed at step 8, before it saved; this one saves at step 5 "
        "already",
    ]
    assert new.output_dir.args.read_text() == before
    assert (log.args_due["resume"], log.args_due["weight_decay"]) == ("/first.pth", 0.2)
    restart_limit.clear(run.output_dir)
    named = run_of(out, state=TrainState(step=3), resume=out)
    log, early_save, said = open_log(named, capsys)
    assert (log.args_due["resume"], early_save) == ("/first.pth", None)
    assert said == ["resuming from step 3"], "no later step is left"
    restart_limit.clear(run.output_dir)
    other = run_of(out, state=TrainState(step=3), resume=Path("/other.pth"))
    assert open_log(other, capsys)[0].args_due["resume"] == "/other.pth"


def test_a_run_that_saved_nothing_begins_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "out")
    open_log(run, capsys)
    write_lines(run.output_dir.steps, [{"step": 1}, {"step": 2}])
    restart_limit.clear(run.output_dir)
    assert open_log(run, capsys)[2] == [
        "no checkpoint had been saved yet: starting at step 1 again (2 step(s) to redo); "
        "--save_steps saves more often"
    ]


def test_records_that_are_missing_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run from step 1 all are expected; of one that began elsewhere, those from there on."""
    run = run_of(tmp_path / "out", state=TrainState(step=3))
    open_log(run, capsys)
    restart_limit.clear(run.output_dir)
    write_lines(run.output_dir.steps, [{"step": 2}, {"step": 3}])
    says = f"note: {run.output_dir.steps}: lacks 1 of 3 step(s) up to step 3; they are not repeated"
    assert open_log(run, capsys)[2] == [says, "resuming from step 3"]
    restart_limit.clear(run.output_dir)
    args = json.loads(run.output_dir.args.read_text())
    write_json(run.output_dir.args, args | {"resume": "/first.pth"})
    assert open_log(run, capsys)[2] == ["resuming from step 3"]


def test_another_run_in_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It began while this one was starting."""
    run = run_of(tmp_path / "out")
    open_log(run, capsys)
    other = dataclasses.replace(run, identity=RunIdentity("other", {}, {}))
    assert refusal(loop._open_log, other) == (
        f"{tmp_path}/out: another run began and wrote here while this one was starting; "
        "choose another --output_dir"
    )


def test_the_lines_of_a_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On rank 0: what runs how, and which steps; the division by tokens where there is one."""
    state = TrainState(step=3)
    loop._print_start(run_of(tmp_path, epochs=2, state=state, precision="bf16"))
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    lines = ["zero: ZeRO-2", "precision: bf16", "computed by: plain"]
    lines.append("steps: 4 to 8, 4 per epoch, 8 questions each")
    assert said == lines
    loop._print_start(run_of(tmp_path, max_tokens=12345, state=state))
    last = capsys.readouterr().out.splitlines()[-1]
    assert " ".join(last.split()) == "micro-batches: at most 12,345 tokens each"
    loop._print_start(run_of(tmp_path, rank=1))
    assert capsys.readouterr().out == ""


def test_the_end_of_an_attempt(tmp_path: Path) -> None:
    """Rank 0 forgets the count of failures; no later failure of the process counts."""
    for rank, is_left in ((1, True), (0, False)):
        run = run_of(tmp_path, rank=rank)
        run.output_dir.attempts.touch()
        restart_limit.enter_steps(run.output_dir, run.state)
        loop._end_attempt(run)
        assert run.output_dir.attempts.exists() == is_left and restart_limit._entered == []
