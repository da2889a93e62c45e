"""Checkpoint folders: read back bit for bit or refused, and written whole or not at all."""

import dataclasses
import errno
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.checkpoints import LLAMA, SHAPES, Payload, random_state, same, validation_error
from vico.checkpoint import write
from vico.checkpoint.format import OPTIMIZER, STATE, WEIGHTS, TrainState
from vico.checkpoint.read import STATE_RULES, read
from vico.checkpoint.validate import validate_for_model
from vico.checkpoint.write import RunIdentity, prune, save
from vico.errors import DiskError, UserError
from vico.io.atomic import repair_folder, require_writable, write_folder, write_text
from vico.io.output_dir import OutputDir
from vico.train.config import RunConfig
from vico.train.saved_run import read_checkpoint

CONFIG = RunConfig(seed=7, adapter_layer=3, lr=0.1, max_seq_len=100)
RUN = RunIdentity("", CONFIG.to_json(), {})
STATE_AT_12 = TrainState(12, 32, 11, 0.1 + 0.2, [1 / 3, 2e-9], [5, 7])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(tmp_path / "run" / "checkpoint-12", *random_state(SHAPES, 1), STATE_AT_12, RUN)
    return tmp_path / "run" / "checkpoint-12"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(checkpoint: Path) -> None:
    validated = validate_for_model(read(checkpoint), SHAPES, LLAMA.n_layers)
    weights, moments = random_state(SHAPES, 1)
    assert same(validated.weights, weights) and same(validated.moments, moments)
    assert list(validated.weights) == list(SHAPES)
    assert validated.moments is not None and list(validated.moments) == list(moments)
    assert validated.state == STATE_AT_12 and validated.notes == ()
    assert validated.published_optimizer is None
    assert RunConfig(**read_checkpoint(checkpoint).settings) == CONFIG
    assert names_in(checkpoint) == sorted([WEIGHTS, OPTIMIZER, STATE])
    assert names_in(checkpoint.parent) == [checkpoint.name]


@settings(max_examples=25, deadline=None)
@given(
    step=st.integers(0, 2**60),
    best=st.none() | st.floats(0, 1),
    sums=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4),
    scale=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
def test_round_trip_of_any_number(
    tmp_path_factory: pytest.TempPathFactory,
    step: int,
    best: float | None,
    sums: list[float],
    scale: float,
) -> None:
    folder = tmp_path_factory.mktemp("any") / "c"
    state = TrainState(step, 3, step // 2, best, sums, [1] * len(sums))
    weights, moments = {"a": torch.tensor([[scale, -0.0]])}, {"a.exp_avg": torch.zeros(2, 1)}
    save(folder, weights, moments, state, RUN)
    saved = read(folder)
    assert saved.state == state
    assert same(saved.weights, weights) and same(saved.moments, moments)


def test_strided_tensors(tmp_path: Path) -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    strided = {"a": wide.T, "b": wide[:, 1:3]}
    save(tmp_path / "c", strided, {}, TrainState(), RUN)
    contiguous = {name: tensor.contiguous() for name, tensor in strided.items()}
    assert same(read(tmp_path / "c").weights, contiguous)


def test_weights_alone_start_a_new_run(checkpoint: Path) -> None:
    validated = validate_for_model(read(checkpoint / WEIGHTS), SHAPES, LLAMA.n_layers)
    assert same(validated.weights, random_state(SHAPES, 1)[0])
    assert validated.moments is None
    assert validated.state == TrainState() and validated.settings == {}


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE])
def test_flipped_bit(checkpoint: Path, name: str) -> None:
    whole = (checkpoint / name).read_bytes()
    rng = random.Random(name)
    for _ in range(120):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (checkpoint / name).write_bytes(damaged)
        assert name in validation_error(checkpoint)


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE])
def test_truncated_file(checkpoint: Path, name: str) -> None:
    whole = (checkpoint / name).read_bytes()
    for size in {0, 1, 10, *range(0, len(whole), len(whole) // 40), len(whole) - 3}:
        (checkpoint / name).write_bytes(whole[:size])
        assert name in validation_error(checkpoint), size
    (checkpoint / name).unlink()
    assert name in validation_error(checkpoint)


def test_files_of_two_steps(checkpoint: Path, tmp_path: Path) -> None:
    """A file of another step's checkpoint counts as damage."""
    state = dataclasses.replace(STATE_AT_12, step=24)
    save(tmp_path / "other", *random_state(SHAPES, 2), state, RUN)
    for name in (WEIGHTS, OPTIMIZER, STATE):
        mixed = shutil.copytree(checkpoint, tmp_path / f"mixed {name}")
        shutil.copy(tmp_path / "other" / name, mixed / name)
        message = "damaged (its sha256 is not the recorded one); use another checkpoint"
        assert message in validation_error(mixed)


def test_state_of_another_version(checkpoint: Path) -> None:
    state = json.loads((checkpoint / STATE).read_text())
    for change in ({"format": 2}, {"format": None}):
        (checkpoint / STATE).write_text(json.dumps(state | change))
        assert "so another version wrote it" in validation_error(checkpoint)
    (checkpoint / STATE).write_text("[]")
    message = "state.json:1: column 1: a list where a JSON object is expected"
    assert validation_error(checkpoint).startswith(message)


def test_not_a_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    error = "no such checkpoint; --resume takes a checkpoint folder or a .pth file"
    assert validation_error(tmp_path / "nowhere").endswith(f"nowhere: {error}")
    assert validation_error(Path("x" * 5000)).endswith(error)
    (checkpoint.parent / "args.json").touch()
    error = "run/state.json: no such file; this run has saved no checkpoint"
    assert validation_error(checkpoint.parent).endswith(error)
    (tmp_path / "empty").mkdir()
    error = "state.json: no such file; a checkpoint is a folder with state.json"
    assert validation_error(tmp_path / "empty").endswith(error)
    (tmp_path / "a.safetensors").write_text("<html>")
    assert "a.safetensors: damaged (" in validation_error(tmp_path / "a.safetensors")


def test_order_and_pruning(tmp_path: Path) -> None:
    """The newest checkpoint has the highest step."""
    assert OutputDir(tmp_path / "nowhere").step_checkpoints() == []
    assert OutputDir(tmp_path).step_checkpoints() == []
    others = ["checkpoint_best", "checkpoint-x", ".checkpoint-999.vico-tmp"]
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", *others):
        (tmp_path / name).mkdir()
    newest_first = ["checkpoint-100", "checkpoint-20", "checkpoint-9"]
    assert [path.name for path in OutputDir(tmp_path).step_checkpoints()] == newest_first
    (tmp_path / "checkpoint-300").touch()
    assert [path.name for path in OutputDir(tmp_path).step_checkpoints()] == newest_first
    others.append("checkpoint-300")
    prune(OutputDir(tmp_path), 1, 20)
    left = sorted(["checkpoint-100", "checkpoint-20", *others])
    assert names_in(tmp_path) == left, "a run at step 20 did not write checkpoint-100"
    prune(OutputDir(tmp_path), 1, 100)
    assert names_in(tmp_path) == sorted(["checkpoint-100", *others])


def test_links_instead_of_folders(checkpoint: Path, tmp_path: Path) -> None:
    """Links are replaced or removed, and what they point to stays."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint-12").symlink_to(checkpoint)
    (out / "checkpoint_best").symlink_to(checkpoint)
    state = dataclasses.replace(STATE_AT_12, step=13)
    for name in ("checkpoint-13", "checkpoint_best", "checkpoint_best"):
        save(out / name, *random_state(SHAPES, 1), state, RUN)
    prune(OutputDir(out), 1, 13)
    assert names_in(out) == ["checkpoint-13", "checkpoint_best"]
    assert not (out / "checkpoint_best").is_symlink()
    assert read(checkpoint).state == STATE_AT_12 and repair_folder(out) == []


def test_renamed_or_extended_folder(checkpoint: Path) -> None:
    """Sets of files that no save has written are refused before anything of them is used."""
    shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-13"))
    message = "holds the checkpoint of step 12, so it was renamed or copied over"
    assert message in validation_error(checkpoint.with_name("checkpoint-13"))
    (checkpoint / "optimizer-1.safetensors").touch()
    message = "holds 'optimizer-1.safetensors', which is no part of a checkpoint"
    assert message in validation_error(checkpoint)


def assert_old_checkpoint(checkpoint: Path) -> None:
    """A save that failed has changed nothing and left nothing behind."""
    assert same(read(checkpoint).weights, random_state(SHAPES, 1)[0])
    assert names_in(checkpoint.parent) == [checkpoint.name]


def test_full_disk(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_new = write.write_new

    def fail_on_optimizer(path: Path, data: bytes) -> None:
        if path.name == OPTIMIZER:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_new(path, data)

    monkeypatch.setattr(write, "write_new", fail_on_optimizer)
    reason = r"No space left on device: [\d,]+ bytes free"
    message = rf"checkpoint-12: cannot be written \({reason}\); free space"
    with pytest.raises(DiskError, match=message) as caught:
        save(checkpoint, *random_state(SHAPES, 2), STATE_AT_12, RUN)
    assert caught.value.exit_code == 6
    assert_old_checkpoint(checkpoint)


WRITE_FAULTS = [
    ("os.fsync", 1, errno.EIO),
    ("pathlib.Path.rename", 1, errno.EACCES),
    ("pathlib.Path.rename", 2, errno.EXDEV),
]


@pytest.mark.parametrize(("function", "failing_call", "error_number"), WRITE_FAULTS)
def test_failing_system_call(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    failing_call: int,
    error_number: int,
) -> None:
    """A flush, the rename that moves the old folder aside, or the one that moves the new one in."""
    module, _, name = function.rpartition(".")
    original = getattr(os if module == "os" else Path, name)
    reason = os.strerror(error_number)
    num_calls = 0

    def fail_once(*args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == failing_call:
            raise OSError(error_number, reason)
        return original(*args)

    monkeypatch.setattr(function, fail_once)
    message = rf"checkpoint-12: cannot be written \({reason}\); free space or fix"
    with pytest.raises(DiskError, match=message):
        save(checkpoint, *random_state(SHAPES, 2), STATE_AT_12, RUN)
    assert num_calls >= failing_call
    assert_old_checkpoint(checkpoint)


def test_save_replaces_the_folder(checkpoint: Path) -> None:
    (checkpoint / "stray").touch()
    save(checkpoint, *random_state(SHAPES, 2), STATE_AT_12, RUN)
    assert same(read(checkpoint).weights, random_state(SHAPES, 2)[0])
    assert not (checkpoint / "stray").exists()
    assert names_in(checkpoint.parent) == [checkpoint.name]


def test_repair_after_a_kill(tmp_path: Path) -> None:
    """What a killed save left is repaired; other files with similar names stay."""
    users = [".bashrc.old", ".cache.tmp", ".git.old", "notes.tmp"]
    for name in users:
        (tmp_path / name).mkdir()
    unfinished = [".checkpoint-1.vico-old", ".checkpoint-2.vico-tmp", ".checkpoint_best.vico-old"]
    for name in (*unfinished, "checkpoint_best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".log.txt.vico-tmp").touch()
    assert repair_folder(tmp_path) == [
        "checkpoint-1 put back",
        ".checkpoint_best.vico-old removed",
        ".checkpoint-2.vico-tmp removed",
        ".log.txt.vico-tmp removed",
    ]
    assert names_in(tmp_path) == sorted([*users, "checkpoint-1", "checkpoint_best"])
    assert (tmp_path / "checkpoint-1" / "file").read_text() == ".checkpoint-1.vico-old"
    assert (tmp_path / "checkpoint_best" / "file").read_text() == "checkpoint_best"


def test_other_exceptions_pass(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "c", fill)
    with pytest.raises(DiskError, match=r"none/a.txt: cannot be written \(No such file"):
        write_text(tmp_path / "none" / "a.txt", "x")


def test_require_writable(tmp_path: Path) -> None:
    """It answers before anything is written, and leaves nothing behind."""
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to("nowhere")
    for good in (tmp_path, tmp_path / "new" / "deep"):
        require_writable(good)
    for bad in (file, file / "new", link, tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="choose another"):
            require_writable(bad)
    assert names_in(tmp_path) == ["file", "link"]


def test_pickles_are_not_run(tmp_path: Path, checkpoint: Path) -> None:
    canary = tmp_path / "canary"
    for path in (checkpoint / STATE, checkpoint / WEIGHTS, checkpoint / OPTIMIZER):
        path.write_bytes(pickle.dumps(Payload(canary)))
        validation_error(checkpoint)
    assert not canary.exists()


def test_what_a_state_may_hold() -> None:
    """Counts fit 64 bits; losses and accuracies are finite."""
    for count in (0, 1, 2**63 - 1):
        assert STATE_RULES["step"](count) and STATE_RULES["epoch_target_counts"]([count])
    for value in (-1, 2**63, 1.0, True, None, "1"):
        assert not STATE_RULES["num_updates"](value)
        assert not STATE_RULES["epoch_target_counts"]([3, value])
    assert STATE_RULES["epoch_loss_sums"]([0, -1.5]) and STATE_RULES["best_accuracy"](None)
    for number in (float("nan"), float("inf"), True, "1"):
        assert not STATE_RULES["epoch_loss_sums"]([1.0, number])
        assert not STATE_RULES["best_accuracy"](number)
    assert not STATE_RULES["epoch_loss_sums"](1.0) and not STATE_RULES["evaluation_due"](0)
