"""Our checkpoints come back bit for bit or not at all, and appear whole or not at all."""

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

from support.checkpoints import LLAMA, SHAPES, Payload, refusal, same, values
from vico.checkpoint.format import OPTIMIZER, STATE, WEIGHTS, TrainState
from vico.checkpoint.read import read
from vico.checkpoint.validate import validate_for_model
from vico.checkpoint.write import RunIdentity, prune, save
from vico.errors import DiskError, UserError
from vico.io.atomic import repair_folder, require_writable, write_folder, write_text
from vico.io.output_dir import OutputDir
from vico.train.config import RunConfig
from vico.train.resume import read_checkpoint

CONFIG = RunConfig(seed=7, adapter_layer=3, lr=0.1, max_seq_len=100)
RUN = RunIdentity("", CONFIG.to_json(), {})
PROGRESS = TrainState(12, 32, 11, 0.1 + 0.2, [1 / 3, 2e-9], [5, 7])


@pytest.fixture
def own(tmp_path: Path) -> Path:
    save(tmp_path / "run" / "checkpoint-12", *values(SHAPES, 1), PROGRESS, RUN)
    return tmp_path / "run" / "checkpoint-12"


# ---- ours ------------------------------------------------------------------------------------------------------------


def test_ours_come_back_bit_for_bit(own: Path) -> None:
    found = validate_for_model(read(own), SHAPES, LLAMA.n_layers)
    weights, moments = values(SHAPES, 1)
    assert same(found.weights, weights) and same(found.moments, moments)
    assert (
        list(found.weights) == list(SHAPES)
        and found.moments is not None
        and list(found.moments) == list(moments)
    )
    assert found.state == PROGRESS and found.notes == () and found.published_optimizer is None
    assert RunConfig(**read_checkpoint(own).settings) == CONFIG
    assert sorted(path.name for path in own.iterdir()) == sorted([WEIGHTS, OPTIMIZER, STATE])
    assert [path.name for path in own.parent.iterdir()] == [own.name]


@settings(max_examples=25, deadline=None)
@given(
    step=st.integers(0, 2**60),
    best=st.none() | st.floats(0, 1),
    sums=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4),
    scale=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
def test_any_progress_and_any_number_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    step: int,
    best: float | None,
    sums: list[float],
    scale: float,
) -> None:
    folder, progress = (
        tmp_path_factory.mktemp("any") / "c",
        TrainState(step, 3, step // 2, best, sums, [1] * len(sums)),
    )
    weights, moments = {"a": torch.tensor([[scale, -0.0]])}, {"a.exp_avg": torch.zeros(2, 1)}
    save(folder, weights, moments, progress, RUN)
    found = read(folder)
    assert found.state == progress and same(found.weights, weights) and same(found.moments, moments)


def test_strided_values_are_saved_whole(tmp_path: Path) -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    save(tmp_path / "c", {"a": wide.T, "b": wide[:, 1:3]}, {}, TrainState(), RUN)
    assert same(
        read(tmp_path / "c").weights, {"a": wide.T.contiguous(), "b": wide[:, 1:3].contiguous()}
    )


def test_weights_alone_are_a_new_start(own: Path) -> None:
    found = validate_for_model(read(own / WEIGHTS), SHAPES, LLAMA.n_layers)
    assert (
        same(found.weights, values(SHAPES, 1)[0])
        and found.moments is None
        and found.state == TrainState()
        and found.settings == {}
    )


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE])
def test_a_flipped_bit_is_found(own: Path, name: str) -> None:
    whole = (own / name).read_bytes()
    rng = random.Random(name)
    for _ in range(120):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (own / name).write_bytes(damaged)
        assert name in refusal(own)


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE])
def test_a_file_cut_anywhere_is_found(own: Path, name: str) -> None:
    whole = (own / name).read_bytes()
    for size in {0, 1, 10, *range(0, len(whole), len(whole) // 40), len(whole) - 3}:
        (own / name).write_bytes(whole[:size])
        assert name in refusal(own), size
    (own / name).unlink()
    assert name in refusal(own)


def test_files_of_two_steps_are_not_one_checkpoint(own: Path, tmp_path: Path) -> None:
    save(tmp_path / "other", *values(SHAPES, 2), dataclasses.replace(PROGRESS, step=24), RUN)
    for name in (WEIGHTS, OPTIMIZER, STATE):
        mixed = shutil.copytree(own, tmp_path / f"mixed {name}")
        shutil.copy(tmp_path / "other" / name, mixed / name)
        assert "damaged (its sha256 is not the recorded one); use another checkpoint" in refusal(
            mixed
        )


def test_a_state_of_another_version_says_so(own: Path) -> None:
    state = json.loads((own / STATE).read_text())
    for change in ({"format": 2}, {"format": None}):
        (own / STATE).write_text(json.dumps(state | change))
        assert "so another version wrote it" in refusal(own)
    (own / STATE).write_text("[]")
    assert refusal(own).startswith("state.json:1: column 1: a list where a JSON object is expected")


def test_what_is_no_checkpoint(tmp_path: Path, own: Path) -> None:
    assert refusal(tmp_path / "nowhere").endswith(
        "nowhere: no such checkpoint; --resume takes a checkpoint folder or a .pth file"
    )
    assert refusal(Path("x" * 5000)).endswith(
        "no such checkpoint; --resume takes a checkpoint folder or a .pth file"
    )
    assert refusal(own.parent).endswith(f"run/state.json: no such file; did you mean {own}?")
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").endswith(
        "state.json: no such file; a checkpoint is a folder with state.json"
    )
    (tmp_path / "a.safetensors").write_text("<html>")
    assert "a.safetensors: damaged (" in refusal(tmp_path / "a.safetensors")


def test_the_newest_has_the_highest_step(tmp_path: Path) -> None:
    assert (
        OutputDir(tmp_path / "nowhere").step_checkpoints()
        == OutputDir(tmp_path).step_checkpoints()
        == []
    )
    for name in (
        "checkpoint-9",
        "checkpoint-100",
        "checkpoint-20",
        "checkpoint_best",
        "checkpoint-x",
        ".checkpoint-999.vico-tmp",
    ):
        (tmp_path / name).mkdir()
    assert [path.name for path in OutputDir(tmp_path).step_checkpoints()] == [
        "checkpoint-100",
        "checkpoint-20",
        "checkpoint-9",
    ]
    (tmp_path / "checkpoint-300").touch()
    assert [path.name for path in OutputDir(tmp_path).step_checkpoints()] == [
        "checkpoint-100",
        "checkpoint-20",
        "checkpoint-9",
    ]
    others = {"checkpoint_best", "checkpoint-x", ".checkpoint-999.vico-tmp", "checkpoint-300"}
    prune(OutputDir(tmp_path), 1, 20)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-100",
        "checkpoint-20",
        *others,
    }, "100 is none of those that 20 follows"
    prune(OutputDir(tmp_path), 1, 100)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-100", *others}


def test_links_in_the_place_of_checkpoints(own: Path, tmp_path: Path) -> None:
    """They go, and what they lead to stays."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint-12").symlink_to(own)
    (out / "checkpoint_best").symlink_to(own)
    for name in ("checkpoint-13", "checkpoint_best", "checkpoint_best"):
        save(out / name, *values(SHAPES, 1), dataclasses.replace(PROGRESS, step=13), RUN)
    prune(OutputDir(out), 1, 13)
    assert {path.name for path in out.iterdir()} == {"checkpoint-13", "checkpoint_best"} and not (
        out / "checkpoint_best"
    ).is_symlink()
    assert read(own).state == PROGRESS and repair_folder(out) == []


def test_a_checkpoint_is_its_files_under_its_name(own: Path) -> None:
    """Sets of files that no save has written are refused before anything of them is used."""
    shutil.copytree(own, own.with_name("checkpoint-13"))
    assert "holds the checkpoint of step 12, so it was renamed or copied over" in refusal(
        own.with_name("checkpoint-13")
    )
    (own / "optimizer-1.safetensors").touch()
    assert "holds 'optimizer-1.safetensors', which is no part of a checkpoint" in refusal(own)


# ---- the folder appears whole, or not at all -------------------------------------------------------------------------


def test_a_save_that_fails_leaves_the_old_one(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        if path.name == OPTIMIZER:
            raise OSError(28, "No space left on device")
        return written(path, data)

    written = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        DiskError,
        match=r"checkpoint-12: cannot be written \(No space left on device: [\d,]+ bytes free\); free space",
    ) as caught:
        save(own, *values(SHAPES, 2), PROGRESS, RUN)
    assert caught.value.exit_code == 6
    assert same(read(own).weights, values(SHAPES, 1)[0]) and [
        p.name for p in own.parent.iterdir()
    ] == [own.name]


@pytest.mark.parametrize(
    ("place", "passing", "number"),
    [
        ("os.fsync", 1, errno.EIO),
        ("pathlib.Path.rename", 1, errno.EACCES),
        ("pathlib.Path.rename", 2, errno.EXDEV),
    ],
)
def test_a_disk_that_refuses_leaves_the_old_one(
    own: Path, monkeypatch: pytest.MonkeyPatch, place: str, passing: int, number: int
) -> None:
    """A flush, the way aside of the old one, and the way of the new one to its place."""
    module, _, name = place.rpartition(".")
    passings, works = [passing], getattr(os if module == "os" else Path, name)

    def refuses(*args: Any) -> Any:
        passings[0] -= 1
        if passings[0] == 0:
            raise OSError(number, os.strerror(number))
        return works(*args)

    monkeypatch.setattr(place, refuses)
    with pytest.raises(
        DiskError,
        match=rf"checkpoint-12: cannot be written \({os.strerror(number)}\); free space or fix",
    ):
        save(own, *values(SHAPES, 2), PROGRESS, RUN)
    assert passings[0] <= 0
    assert same(read(own).weights, values(SHAPES, 1)[0]) and [
        p.name for p in own.parent.iterdir()
    ] == [own.name]


def test_a_save_replaces_the_older_one_whole(own: Path) -> None:
    (own / "stray").touch()
    save(own, *values(SHAPES, 2), PROGRESS, RUN)
    assert same(read(own).weights, values(SHAPES, 2)[0])
    assert not (own / "stray").exists() and [p.name for p in own.parent.iterdir()] == [own.name]


def test_what_a_killed_save_left_is_mended_and_nothing_else(tmp_path: Path) -> None:
    theirs = [tmp_path / name for name in (".bashrc.old", ".cache.tmp", ".git.old", "notes.tmp")]
    for path in theirs:
        path.mkdir()
    for name in (
        ".checkpoint-1.vico-old",
        ".checkpoint-2.vico-tmp",
        ".checkpoint_best.vico-old",
        "checkpoint_best",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".log.txt.vico-tmp").touch()
    repair_folder(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        *(p.name for p in theirs),
        "checkpoint-1",
        "checkpoint_best",
    }
    assert (tmp_path / "checkpoint-1" / "file").read_text() == ".checkpoint-1.vico-old"
    assert (tmp_path / "checkpoint_best" / "file").read_text() == "checkpoint_best"


def test_other_faults_of_writing_are_not_hidden(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "c", fill)
    with pytest.raises(DiskError, match=r"none/a.txt: cannot be written \(No such file"):
        write_text(tmp_path / "none" / "a.txt", "x")


def test_where_nothing_can_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for good in (tmp_path, tmp_path / "new" / "deep"):
        require_writable(good)
    for bad in (
        tmp_path / "file",
        tmp_path / "file" / "new",
        tmp_path / "link",
        tmp_path / ("x" * 300),
    ):
        with pytest.raises(UserError, match="choose another"):
            require_writable(bad)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "link"}


def test_pickles_under_its_names_are_not_run(tmp_path: Path, own: Path) -> None:
    canary = tmp_path / "canary"
    for path in (own / STATE, own / WEIGHTS, own / OPTIMIZER):
        path.write_bytes(pickle.dumps(Payload(canary)))
        refusal(own)
    assert not canary.exists()
