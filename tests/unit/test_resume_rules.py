"""Which checkpoint a start takes, what of its state it keeps, and which changes it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.errors import refusal
from vico.checkpoint.format import Checkpoint, PublishedOptimizer, TrainState
from vico.checkpoint.write import RunIdentity, save
from vico.errors import UserError
from vico.io.output_dir import OutputDir
from vico.train.config import RunConfig
from vico.train.resume import (
    RECORDED_FIRST,
    differences,
    find_start,
    keep_max_tokens,
    notes_of_uncompared,
    refuse_changes,
    refuse_other_function,
    run_id_of,
    start_state,
)
from vico.train.saved_run import Start, newest_usable, read_for_evaluation

STATE = TrainState(4, 8, 4, None, [1.5, 2.5], [3, 4])
FINGERPRINTS = {
    "backbone": "b",
    "data train questions": "q",
    "data train features": "f",
    "data val questions": "v",
    "data val features": "w",
    "data features": "a",
    "data captions": "c",
    "data train captions": "t",
}


def config_of(out: Path, **more: Any) -> RunConfig:
    return RunConfig(output_dir=out, **more)


def save_steps(out: Path, *steps: int, run: str = "r", **state: Any) -> None:
    """A run with these checkpoints and its args.json."""
    config = config_of(out)
    out.mkdir(exist_ok=True)
    args = {**config.to_json(), "run": run, "steps_per_epoch": 3}
    (out / "args.json").write_text(json.dumps(args))
    for step in steps:
        identity = RunIdentity(run, config.to_json(), {})
        save(out / f"checkpoint-{step}", {}, {}, TrainState(step=step, **state), identity)


def change_args(out: Path, **values: Any) -> None:
    path = out / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- where a start begins -----------------------------------------------------------------------


def test_a_new_run_and_a_named_checkpoint(tmp_path: Path) -> None:
    """Of another run's folder the newest is taken, with a note; a new run has an id of its own."""
    other, out = tmp_path / "other", tmp_path / "out"
    save_steps(other, 2, 6)
    new = find_start(config_of(out))
    assert new.checkpoint is None and new.notes == () and len(new.run_id) == 12
    named = find_start(config_of(out, resume=other / "checkpoint-2"))
    assert named.checkpoint is not None and named.checkpoint.state.step == 2
    assert named.notes == () and named.run_id not in ("r", new.run_id)
    newest = find_start(config_of(out, resume=other))
    assert newest.checkpoint is not None and newest.checkpoint.state.step == 6
    assert newest.notes == (f"--resume {other}: its newest checkpoint, {other}/checkpoint-6",)
    assert len(newest.run_id) == 12 and newest.run_id != "r"


@pytest.mark.parametrize("name", ["log.txt", "steps.jsonl", "checkpoint_best", "checkpoint-3"])
def test_files_of_a_run_that_is_not_known(name: str, tmp_path: Path) -> None:
    """They would be overwritten. Other files are left alone, and so is what is not written."""
    for harmless in ("notes.txt", "checkpoint_best.pth"):
        (tmp_path / harmless).touch()
    assert find_start(config_of(tmp_path)).checkpoint is None
    legacy = config_of(tmp_path, save_legacy=True)
    assert refusal(find_start, legacy).startswith(f"{tmp_path}/checkpoint_best.pth: is of another")
    path = tmp_path / name
    path.mkdir() if name == "checkpoint-3" else path.symlink_to("nowhere")
    message = refusal(find_start, config_of(tmp_path))
    assert message.startswith(f"{path}: is of another program or run (there is no args.json")


def test_an_own_run_goes_on(tmp_path: Path) -> None:
    """From its newest undamaged checkpoint, under its id."""
    out = tmp_path / "out"
    save_steps(out, 2, 4, 10)
    for resume in (None, out, out / "checkpoint-10"):
        start = find_start(config_of(out, resume=resume))
        assert start.checkpoint is not None and start.checkpoint.state.step == 10
        assert (start.run_id, start.notes) == ("r", ())
    message = refusal(find_start, config_of(out, resume=out / "checkpoint-4"))
    assert message == (
        f"{out}: holds a run with checkpoint-10 that did not start from --resume "
        f"{out}/checkpoint-4; leave --resume out to continue that run, or choose another "
        "--output_dir"
    )
    change_args(out, resume="/a.pth")
    start = find_start(config_of(out, resume=Path("/a.pth")))
    assert start.checkpoint is not None and start.checkpoint.state.step == 10
    (out / "checkpoint-10" / "state.json").write_text("{}")
    start = find_start(config_of(out))
    assert start.checkpoint is not None and start.checkpoint.state.step == 4
    first, using = start.notes
    assert first.startswith(f"passed over: {out}/checkpoint-10/state.json: 'format' is None")
    assert "use another checkpoint" not in first and using == f"using {out}/checkpoint-4"
    assert "'format' is None" in refusal(find_start, config_of(out, resume=out / "checkpoint-10"))


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    """It ended before its first save, or they are gone; the run stays the same one."""
    out, other = tmp_path / "out", tmp_path / "other"
    save_steps(out)
    save_steps(other, 6, run="o")
    start = find_start(config_of(out))
    assert start == Start(run_id="r")
    start = find_start(config_of(out, resume=other))
    assert start.checkpoint is not None and (start.run_id, len(start.notes)) == ("r", 1)
    OutputDir(out).latest.write_text('{"step": 7}')
    message = refusal(find_start, config_of(out))
    assert "its checkpoints are gone, up to checkpoint-7, which was saved last" in message
    save_steps(out, 3)
    start = find_start(config_of(out))
    gone = f"passed over: {out}/checkpoint-7: is gone, though it was saved last"
    assert start.notes == (gone, f"using {out}/checkpoint-3")
    OutputDir(out).latest.write_text('{"step": 3}')
    assert find_start(config_of(out)).notes == ()


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_steps(out, 5, run="other")
    save_steps(out, 2)
    start = find_start(config_of(out))
    assert start.checkpoint is not None and start.checkpoint.state.step == 2
    assert "is of another run ('other' and not r), so it was copied here" in start.notes[0]
    shutil.rmtree(out / "checkpoint-2")
    message = refusal(find_start, config_of(out))
    assert message.startswith(f"{out}: none of its 1 checkpoints can be used (")
    assert message.endswith("choose another --output_dir to start anew")
    start = newest_usable([out / "checkpoint-5"], OutputDir(out))
    assert start.checkpoint is not None and start.notes == (), "of any run"


def test_the_best_checkpoint_is_gone(tmp_path: Path) -> None:
    save_steps(tmp_path, 3, best_accuracy=0.625)
    (note,) = find_start(config_of(tmp_path)).notes
    assert note.startswith(f"{tmp_path}/checkpoint_best: is gone; the best epoch so far had 62.50%")
    (tmp_path / "checkpoint_best").mkdir()
    assert find_start(config_of(tmp_path)).notes == ()


def test_what_is_evaluated(tmp_path: Path) -> None:
    """Of a run's folder its best checkpoint, else the newest; a checkpoint by itself, silently."""
    out = tmp_path / "run"
    save_steps(out, 3, 6)
    best = tmp_path / "run" / "checkpoint_best"
    found = read_for_evaluation(out)
    assert found.state.step == 6
    assert found.notes == (f"--resume {out}: its newest checkpoint, {out}/checkpoint-6",)
    shutil.copytree(out / "checkpoint-3", best)
    found = read_for_evaluation(out)
    assert found.state.step == 3
    assert found.notes == (f"--resume {out}: its best checkpoint, {best}",)
    shutil.rmtree(out / "checkpoint-3"), shutil.rmtree(out / "checkpoint-6")
    assert read_for_evaluation(out).state.step == 3, "a folder with nothing but its best"
    assert read_for_evaluation(best).notes == ()
    evaluates = config_of(tmp_path / "new", init_eval=True, resume=out)
    start = find_start(evaluates)
    assert start.checkpoint is not None and start.checkpoint.path == best


# ---- its settings -------------------------------------------------------------------------------


def test_other_settings_are_refused(tmp_path: Path) -> None:
    """What defines the run: paths and the division into micro-batches do not."""
    save_steps(tmp_path, 4)
    same = dict(batch_size=1, num_workers=3, data_path=Path("/x"), attention="plain")
    assert find_start(config_of(tmp_path, **same)).run_id == "r"
    with pytest.raises(UserError) as refused:
        find_start(config_of(tmp_path, seed=3, blr=0.5, batch_size=1))
    assert str(refused.value) == (
        f"{tmp_path}: holds a run with other settings (blr, seed; table below); choose another "
        "--output_dir, or allow it by --allow_change blr,seed"
    )
    blr = json.dumps(RunConfig().blr)
    assert refused.value.table == (
        ("changed", "was", "is"),
        ("blr", blr, "0.5"),
        ("seed", "0", "3"),
    )
    allowed = config_of(tmp_path, seed=3, blr=0.5, allow_change="seed, blr")
    assert find_start(allowed).run_id == "r"


@pytest.mark.parametrize(
    ("step", "epochs", "refused"),
    [(6, 3, False), (7, 3, False), (5, 3, True), (6, 1, True), (5, 2, False), (None, 3, True)],
)
def test_more_epochs(step: int | None, epochs: int, refused: bool, tmp_path: Path) -> None:
    """A run of two epochs of three steps takes more once it has done all six of its own."""
    save_steps(tmp_path, *([] if step is None else [step]))
    change_args(tmp_path, epochs=2)
    config = config_of(tmp_path, epochs=epochs)
    if refused:
        assert "(epochs; table below)" in refusal(find_start, config)
    else:
        find_start(config)
    change_args(tmp_path, steps_per_epoch=None)
    assert epochs == 2 or "(epochs; table below)" in refusal(find_start, config)


def test_a_table_of_changes() -> None:
    refuse_changes("here", [], "do this")
    changes = [("data train questions", "a", "b"), ("data features", "c", "d"), ("seed", "0", "1")]
    message = refusal(refuse_changes, "here", changes, "do this")
    assert message == (
        "here (data, seed; table below); do this, or allow it by --allow_change data,seed"
    )
    assert differences(RunConfig().to_json(), RunConfig()) == []


def test_the_limit_of_tokens_stays(tmp_path: Path) -> None:
    """Micro-batches are divided as at first: by what the run records, else by --batch_size."""
    out, no_start = tmp_path / "out", Start()

    def kept(start: Start = no_start, on_gpu: bool = False, **flags: Any) -> int | None:
        return keep_max_tokens(config_of(out, **flags), start, on_gpu).max_tokens

    def start_of(moments: Any, **settings: Any) -> Start:
        return Start(Checkpoint(Path("c"), {}, moments=moments, settings=settings))

    assert kept() is None and kept(on_gpu=True) is None, "a new run: the planner chooses"
    assert kept(start_of({}, max_tokens=700)) == 700
    assert kept(start_of({}, max_tokens=700), max_tokens=90) == 90
    assert kept(start_of(None, max_tokens=700), on_gpu=True) is None, "weights alone"
    assert kept(start_of({}), on_gpu=True) == 0 and kept(start_of({})) is None
    save_steps(out)
    assert kept(on_gpu=True) == 0 and kept() is None
    change_args(out, max_tokens=300)
    assert kept(on_gpu=True) == 300 and kept(start_of({}, max_tokens=700)) == 300


# ---- its state ----------------------------------------------------------------------------------


def checkpoint_of(out: Path, **fields: Any) -> Checkpoint:
    """Of a run in `out`, after the first step of its second epoch of three."""
    values = {"moments": {}, "state": STATE, "settings": RunConfig().to_json()}
    values["fingerprints"] = FINGERPRINTS
    return Checkpoint(out / "checkpoint-4", {}, **{**values, **fields})


def state_of(start: Checkpoint | None, config: RunConfig, **changes: str) -> TrainState:
    now = FINGERPRINTS | {name.replace("_", " "): value for name, value in changes.items()}
    return start_state(start, 3, 8, config, now)


def test_a_fresh_state(tmp_path: Path) -> None:
    """Of a new run, of weights alone, and behind a finished epoch of a published optimizer."""
    config = config_of(tmp_path, vaq=True)
    fresh = TrainState(0, 8, 0, None, [0.0] * 3, [0] * 3)
    assert state_of(None, config) == fresh
    assert state_of(checkpoint_of(tmp_path, moments=None), config) == fresh
    published = checkpoint_of(
        tmp_path, published_optimizer=PublishedOptimizer(4, {}), state=TrainState(num_updates=99)
    )
    assert state_of(published, config) == dataclasses.replace(fresh, step=15, num_updates=99)


def test_a_state_goes_on(tmp_path: Path) -> None:
    """The best accuracy is one of this run and of these questions."""
    best = dataclasses.replace(STATE, best_accuracy=0.5)
    own = checkpoint_of(tmp_path, state=best)
    assert state_of(own, config_of(tmp_path)) == best
    assert state_of(own, config_of(tmp_path / "other")) == STATE
    by_test = {name.replace("val", "test"): value for name, value in FINGERPRINTS.items()}
    on_test = dataclasses.replace(own, fingerprints=by_test)
    assert state_of(on_test, config_of(tmp_path)) == STATE, "evaluated on another split before"
    message = refusal(start_state, own, 3, 16, config_of(tmp_path), FINGERPRINTS)
    assert message.startswith(
        f"{own.path}: was written with 8 questions per step, and this run would have 16; choose"
    )


def test_tasks_change_between_epochs(tmp_path: Path) -> None:
    """Not inside one, whose sums are of the tasks before; nor before its evaluation."""
    config = config_of(tmp_path, vaq=True, allow_change="vaq")
    message = refusal(state_of, checkpoint_of(tmp_path), config)
    assert "is inside an epoch with 2 task(s), and this run has 3; vqa, cap -> vqa, cap, vaq" in (
        message
    )
    ended = dataclasses.replace(STATE, step=6)
    state = state_of(checkpoint_of(tmp_path, state=ended), config)
    assert (state.step, state.epoch_loss_sums, state.epoch_target_counts) == (6, [0.0] * 3, [0] * 3)
    due = dataclasses.replace(ended, evaluation_due=True)
    assert "is inside an epoch" in refusal(state_of, checkpoint_of(tmp_path, state=due), config)
    same = state_of(checkpoint_of(tmp_path, state=due), config_of(tmp_path))
    assert same == due, "the same tasks"


def test_other_files_of_a_run(tmp_path: Path) -> None:
    """What was recorded and is another now; captions where both runs read them."""
    start = checkpoint_of(tmp_path)
    config = config_of(tmp_path)
    for name in FINGERPRINTS:
        message = refusal(state_of, start, config, **{name.replace(" ", "_"): "x"})
        assert message.startswith(f"{start.path}: was written by a run with other settings or ")
        assert f"({name.split()[0]}; table below); give the same, or start a new run from" in (
            message
        )
        allowed = config_of(tmp_path, allow_change=name.split()[0])
        assert state_of(start, allowed, **{name.replace(" ", "_"): "x"}) == STATE
    ended = dataclasses.replace(STATE, step=6)
    without = config_of(tmp_path, cap=0, allow_change="cap")
    assert state_of(checkpoint_of(tmp_path, state=ended), without, data_captions="x").step == 6
    assert "seed" in refusal(state_of, start, config_of(tmp_path, seed=1))


def test_what_earlier_versions_did_not_record(tmp_path: Path) -> None:
    """It is not compared, and that is said; of several data sets everything is compared."""
    old = checkpoint_of(tmp_path, fingerprints=dict.fromkeys(RECORDED_FIRST, "a"))
    now = {**dict.fromkeys(RECORDED_FIRST, "a"), "tokenizer": "t", "data val features": "f"}
    assert notes_of_uncompared(old, now) == [
        f"note: {old.path}: an earlier version wrote it and did not record tokenizer: these are "
        "not compared"
    ]
    assert start_state(old, 3, 8, config_of(tmp_path), now) == STATE
    assert notes_of_uncompared(checkpoint_of(tmp_path, fingerprints={}), now) == []
    assert notes_of_uncompared(checkpoint_of(tmp_path), FINGERPRINTS) == []
    several = {**now, "data star: val features": "s"}
    message = refusal(start_state, old, 3, 8, config_of(tmp_path), several)
    assert "(data; table below)" in message
    later = {**now, "data train captions": "t", "data star: train captions": "s"}
    assert start_state(old, 3, 8, config_of(tmp_path), later) == STATE
    recorded = dataclasses.replace(old, fingerprints={**now, "data train captions": "t"})
    assert "data; table" in refusal(start_state, recorded, 3, 8, config_of(tmp_path), later)


def test_another_evaluated_split_is_noted(tmp_path: Path) -> None:
    """Then only what concerns training is compared."""
    start = checkpoint_of(tmp_path)
    by_test = {name.replace("val", "test"): value for name, value in FINGERPRINTS.items()}
    by_test |= {"data features": "other", "data captions": "other"}
    note = (
        f"note: {start.path}: epochs were evaluated on val, and are on {{}} now: of the data, "
        "training questions, their features and captions are compared"
    )
    assert notes_of_uncompared(start, by_test) == [note.format("test")]
    assert start_state(start, 3, 8, config_of(tmp_path), by_test) == STATE
    alone = {name: value for name, value in by_test.items() if "test" not in name}
    assert notes_of_uncompared(start, alone) == [note.format("no split")]
    assert start_state(start, 3, 8, config_of(tmp_path), alone) == STATE
    for name in ("data train questions", "data train features", "data train captions", "backbone"):
        refusal(start_state, start, 3, 8, config_of(tmp_path), by_test | {name: "x"})
    kept = dataclasses.replace(start, fingerprints={**FINGERPRINTS, "data text": "t"})
    for now in (by_test, alone):
        message = refusal(start_state, kept, 3, 8, config_of(tmp_path), now | {"data text": "x"})
        assert "(data; table below)" in message
        assert start_state(kept, 3, 8, config_of(tmp_path), now | {"data text": "t"}) == STATE
    known = {name: value for name, value in FINGERPRINTS.items() if "train captions" not in name}
    (earlier,) = notes_of_uncompared(checkpoint_of(tmp_path, fingerprints=known), alone)
    assert earlier.endswith("questions and their features are compared, and captions are not")
    of_evaluation = {"data test questions": "x"}
    assert notes_of_uncompared(start, of_evaluation) == [], "no training"


def test_an_evaluation_by_other_files(tmp_path: Path) -> None:
    """The backbone and, of the same questions, the features must be those of the run."""
    start, config = checkpoint_of(tmp_path), config_of(tmp_path)
    now = {name: FINGERPRINTS[name] for name in FINGERPRINTS if "train" not in name}
    assert refuse_other_function(start, config, now) == []
    for name in ("backbone", "data val features"):
        message = refusal(refuse_other_function, start, config, now | {name: "x"})
        assert message == (
            f"{start.path}: was trained with other files ({name.split()[0]}; table below); "
            f"evaluate it with those, or allow it by --allow_change {name.split()[0]}"
        )
    other = now | {"data val questions": "x", "data val features": "x"}
    (note,) = refuse_other_function(start, config, other)
    assert note.startswith("note: the val questions are not those of the run that wrote")
    assert refuse_other_function(start, config_of(tmp_path, split="test"), other) == []
    assert refuse_other_function(checkpoint_of(tmp_path, fingerprints={}), config, other) == []
    assert refuse_other_function(start, config, {"backbone": "b"}) == []


def test_the_id_of_a_run() -> None:
    assert [run_id_of(saved) for saved in ({"run": "x"}, {"run": None}, {})] == ["x", "", ""]
