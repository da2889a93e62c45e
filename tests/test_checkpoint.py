"""Checkpoints come back bit for bit or not at all: ours and the lineage's; and nothing in them is ever run."""

import argparse
import dataclasses
import json
import os
import pathlib
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from vico.checkpoint import OPTIMIZER, STATE, WEIGHTS, Checkpoint, Progress, fitted, prune, read, save, step_folders
from vico.config import RunConfig, parse
from vico.errors import CheckpointError, DiskError, UserError
from vico.files import mend_folders, require_writable, write_folder, write_text
from vico.model.llama import LlamaShape
from vico.model.vico import trainable_shapes

LLAMA = LlamaShape(dim=32, n_layers=3, n_heads=4, vocab_size=400)
PARAMS = {"dim": 32, "n_layers": 3, "n_heads": 4, "norm_eps": 1e-6}
SHAPES = trainable_shapes(LLAMA, num_adapted=3, adapter_len=10, num_slots=10)
MOMENTS = ("exp_avg", "exp_avg_sq")
CONFIG = RunConfig(seed=7, adapter_layer=3, lr=0.1, max_seq_len=100)
PROGRESS = Progress(12, 32, 11, 0.1 + 0.2, [1 / 3, 2e-9], [5, 7])


def values(shapes: dict[str, tuple[int, ...]], seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return weights, {f"{name}.{m}": torch.rand(shape, generator=generator) for name, shape in shapes.items() for m in MOMENTS}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    save(tmp_path / "run" / "checkpoint-12", *values(SHAPES, 1), PROGRESS, CONFIG)
    return tmp_path / "run" / "checkpoint-12"


def refusal(path: Path, shapes: dict[str, tuple[int, ...]] = SHAPES) -> str:
    with pytest.raises(CheckpointError) as caught:
        fitted(read(path), shapes, LLAMA.n_layers)
    assert caught.value.exit_code == 3
    return str(caught.value)


def same(a: dict[str, Tensor] | None, b: dict[str, Tensor] | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


# ---- ours ------------------------------------------------------------------------------------------------------------


def test_ours_come_back_bit_for_bit(own: Path) -> None:
    found = fitted(read(own), SHAPES, LLAMA.n_layers)
    weights, moments = values(SHAPES, 1)
    assert same(found.weights, weights) and same(found.moments, moments)
    assert list(found.weights) == list(SHAPES) and found.moments is not None and list(found.moments) == list(moments)
    assert found.progress == PROGRESS and found.notes == () and found.lineage_epoch is None
    assert RunConfig(**found.settings) == CONFIG
    assert sorted(path.name for path in own.iterdir()) == sorted([WEIGHTS, OPTIMIZER, STATE])
    assert [path.name for path in own.parent.iterdir()] == [own.name]


@settings(max_examples=25, deadline=None)
@given(
    step=st.integers(0, 2**60), best=st.none() | st.floats(0, 1), sums=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4),
    scale=st.floats(width=32, allow_nan=False, allow_infinity=False),
)  # fmt: skip
def test_any_progress_and_any_number_come_back(
    tmp_path_factory: pytest.TempPathFactory, step: int, best: float | None, sums: list[float], scale: float
) -> None:
    folder, progress = tmp_path_factory.mktemp("any") / "c", Progress(step, 3, step // 2, best, sums, [1] * len(sums))
    weights, moments = {"a": torch.tensor([[scale, -0.0]])}, {"a.exp_avg": torch.zeros(2, 1)}
    save(folder, weights, moments, progress, CONFIG)
    found = read(folder)
    assert found.progress == progress and same(found.weights, weights) and same(found.moments, moments)


def test_strided_values_are_saved_whole(tmp_path: Path) -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    save(tmp_path / "c", {"a": wide.T, "b": wide[:, 1:3]}, {}, Progress(), CONFIG)
    assert same(read(tmp_path / "c").weights, {"a": wide.T.contiguous(), "b": wide[:, 1:3].contiguous()})


def test_weights_alone_are_a_new_start(own: Path) -> None:
    found = fitted(read(own / WEIGHTS), SHAPES, LLAMA.n_layers)
    assert same(found.weights, values(SHAPES, 1)[0]) and found.moments is None and found.progress == Progress() and found.settings == {}


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
    save(tmp_path / "other", *values(SHAPES, 2), dataclasses.replace(PROGRESS, step=24), CONFIG)
    for name in (WEIGHTS, OPTIMIZER, STATE):
        mixed = shutil.copytree(own, tmp_path / f"mixed {name}")
        shutil.copy(tmp_path / "other" / name, mixed / name)
        assert "damaged (its sha256 is not the recorded one); use another checkpoint" in refusal(mixed)


def test_a_state_of_another_version_says_so(own: Path) -> None:
    state = json.loads((own / STATE).read_text())
    for change in ({"format": 2}, {"format": None}):
        (own / STATE).write_text(json.dumps(state | change))
        assert "so another version wrote it" in refusal(own)
    (own / STATE).write_text("[]")
    assert refusal(own).startswith("state.json:1: column 1: a list where a JSON object is expected")


def test_what_is_no_checkpoint(tmp_path: Path, own: Path) -> None:
    assert refusal(tmp_path / "nowhere").endswith("nowhere: no such checkpoint; --resume takes a checkpoint folder or a .pth file")
    assert refusal(Path("x" * 5000)).endswith("no such checkpoint; --resume takes a checkpoint folder or a .pth file")
    assert refusal(own.parent).endswith(f"run/state.json: no such file; did you mean {own}?")
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").endswith("state.json: no such file; a checkpoint is a folder with state.json")
    (tmp_path / "a.safetensors").write_text("<html>")
    assert "a.safetensors: damaged (" in refusal(tmp_path / "a.safetensors")


def test_the_newest_has_the_highest_step(tmp_path: Path) -> None:
    assert step_folders(tmp_path / "nowhere") == step_folders(tmp_path) == []
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint_best", "checkpoint-x", ".checkpoint-999.vico-tmp"):
        (tmp_path / name).mkdir()
    assert [path.name for path in step_folders(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]
    prune(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-100", "checkpoint_best", "checkpoint-x", ".checkpoint-999.vico-tmp"}


def test_a_checkpoint_is_its_files_under_its_name(own: Path) -> None:
    """Sets of files that no save has written are refused before anything of them is used."""
    shutil.copytree(own, own.with_name("checkpoint-13"))
    assert "holds the checkpoint of step 12, so it was renamed or copied over" in refusal(own.with_name("checkpoint-13"))
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
    with pytest.raises(DiskError, match=r"checkpoint-12: cannot be written \(No space left on device\); free space") as caught:
        save(own, *values(SHAPES, 2), PROGRESS, CONFIG)
    assert caught.value.exit_code == 6
    assert same(read(own).weights, values(SHAPES, 1)[0]) and [p.name for p in own.parent.iterdir()] == [own.name]


def test_a_save_replaces_the_older_one_whole(own: Path) -> None:
    (own / "stray").touch()
    save(own, *values(SHAPES, 2), PROGRESS, CONFIG)
    assert same(read(own).weights, values(SHAPES, 2)[0])
    assert not (own / "stray").exists() and [p.name for p in own.parent.iterdir()] == [own.name]


def test_what_a_killed_save_left_is_mended_and_nothing_else(tmp_path: Path) -> None:
    theirs = [tmp_path / name for name in (".bashrc.old", ".cache.tmp", ".git.old", "notes.tmp")]
    for path in theirs:
        path.mkdir()
    for name in (".checkpoint-1.vico-old", ".checkpoint-2.vico-tmp", ".checkpoint_best.vico-old", "checkpoint_best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".log.txt.vico-tmp").touch()
    mend_folders(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {*(p.name for p in theirs), "checkpoint-1", "checkpoint_best"}
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
    for bad in (tmp_path / "file", tmp_path / "file" / "new", tmp_path / "link", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="choose another"):
            require_writable(bad)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "link"}


# ---- the lineage's ---------------------------------------------------------------------------------------------------


def lineage(path: Path, steps: int = 0, adapted: int = 3, **more: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A lineage file after this many updates (0: `model` alone); returns weights and moments."""
    trainables = oracle.init_trainables(PARAMS, oracle.Hyper(adapter_layer=adapted), random_gates=True)
    optimizer = oracle.make_optimizer(trainables, oracle.Hyper())
    for _ in range(steps):
        for parameter in trainables.values():
            parameter.grad = torch.rand_like(parameter)
        optimizer.step()
    oracle.save_lineage(path, trainables, optimizer if steps else None, **more)
    states = {name: optimizer.state[parameter] for name, parameter in trainables.items()} if steps else {}
    return {n: t.detach() for n, t in trainables.items()}, {f"{n}.{m}": state[m] for n, state in states.items() for m in MOMENTS}


def changed(path: Path, change: Callable[[Any], Any], **how: Any) -> Path:
    with torch.serialization.safe_globals([argparse.Namespace, type(Path())]):
        content = torch.load(path, weights_only=True)
    result = change(content)
    torch.save(content if result is None else result, path, **how)
    return path


def test_a_lineage_file_with_model_alone_is_a_new_start(tmp_path: Path) -> None:
    weights, _ = lineage(tmp_path / "a.pth")
    found = fitted(read(tmp_path / "a.pth"), SHAPES, LLAMA.n_layers)
    assert list(found.weights) == list(SHAPES) and same(found.weights, weights)
    assert found.moments is None and found.lineage_epoch is None and found.progress == Progress() and found.notes == ()


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_lineage_file_with_optimizer_goes_on(tmp_path: Path, how: dict[str, bool]) -> None:
    args = argparse.Namespace(batch_size=8, blr=0.09, dataset="star", max_feats=10, resume="", device="cuda", lr=None, rank=3)
    args.output_dir, args.llama_model_path = pathlib.PosixPath("x"), "./pretrained/llama"
    weights, moments = lineage(tmp_path / "a.pth", steps=3, epoch=4, args=args)
    found = fitted(read(changed(tmp_path / "a.pth", lambda content: None, **how)), SHAPES, LLAMA.n_layers)
    assert found.lineage_epoch == 4 and found.progress == Progress(num_updates=3)
    assert same(found.weights, weights) and same(found.moments, moments)
    assert found.settings == {
        "batch_size": 8,
        "blr": 0.09,
        "dataset": "star",
        "max_feats": 10,
        "llama_model_path": Path("pretrained/llama"),
    }


def test_gates_below_the_adapted_layers_are_left_out_and_said(tmp_path: Path) -> None:
    shapes = trainable_shapes(LLAMA, num_adapted=1, adapter_len=10, num_slots=10)
    weights, moments = lineage(tmp_path / "a.pth", steps=2, adapted=1, lower_gates=2)
    found = fitted(read(tmp_path / "a.pth"), shapes, LLAMA.n_layers)
    assert found.notes == (f"{tmp_path}/a.pth: ignored 4 gates of layers below the adapted ones, which nothing uses",)
    assert found.weights.keys() == shapes.keys() and same(found.weights, weights) and same(found.moments, moments)
    changed(tmp_path / "a.pth", lambda c: c["model"].update({"layers.3.attention.gate1": torch.zeros(1, 4, 1, 1)}))
    assert "1 unexpected (layers.3.attention.gate1)" in refusal(tmp_path / "a.pth", shapes), "there is no such layer"


EMBEDDING = "temporal_emb.weight"


LINEAGE_FAULTS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda c: {"weights": c}, "has no 'model' dict of tensors; a lineage checkpoint has one"),
    (lambda c: c["model"], "has no 'model' dict of tensors"),
    (lambda c: [c], "has no 'model' dict of tensors"),
    (lambda c: c.update(model={}), "9 missing (adapter_query.weight, visual_proj.weight, temporal_emb.weight, layers.0"),
    (lambda c: [c["model"].pop(EMBEDDING)] and c, "tensors: 1 missing (temporal_emb.weight)); give those of the run that wrote it"),
    (lambda c: c["model"].update(extra=torch.zeros(1)), "1 unexpected (extra)"),
    (lambda c: c.update(model={f"module.{k}": v for k, v in c["model"].items()}), "9 missing (adapter_query.weight"),
    (lambda c: c["model"].update({EMBEDDING: torch.zeros(5, 32)}), "1 misshapen (temporal_emb.weight [5, 32] instead of [10, 32])"),
    (lambda c: c["model"].update({EMBEDDING: torch.zeros(10, 32).int()}), "'model' entry 'temporal_emb.weight' is no dense tensor of float"),
    (lambda c: c["model"].update({EMBEDDING: torch.zeros(10, 32).to_sparse()}), "is no dense tensor of floating-point numbers"),
    (lambda c: c["model"].update({EMBEDDING: torch.zeros(10, 32, device="meta")}), "is no dense tensor of floating-point numbers"),
    (lambda c: c["model"].update({EMBEDDING: "text"}), "'model' entry 'temporal_emb.weight' is no dense tensor"),
    (lambda c: c["model"].update({7: torch.zeros(1)}), "'model' entry 7 is no dense tensor"),
    (lambda c: c["model"].update({EMBEDDING: torch.full((10, 32), torch.inf)}), "'temporal_emb.weight' holds NaN or infinite values"),
    (lambda c: c["model"].update({EMBEDDING: torch.full((10, 32), 1e300, dtype=torch.float64)}), "holds NaN or infinite values"),
    (lambda c: c.update(epoch=-1), "'epoch' is -1, not a whole number"),
    (lambda c: c.update(epoch=True), "'epoch' is True, not a whole number"),
    (lambda c: c.update(optimizer="x"), "'optimizer' is not AdamW's state for the tensors of 'model'; drop it to start anew from 'model'"),
    (lambda c: c["optimizer"].update(param_groups=[]), "'optimizer' is not AdamW's state"),
    (lambda c: c["optimizer"].update(state={}), "'optimizer' holds states of steps [], not of one"),
    (lambda c: c["optimizer"]["state"][0].update(step=torch.tensor(9.0)), "'optimizer' holds states of steps [2, 9], not of one"),
    (lambda c: [s.update(step=torch.tensor(torch.inf)) for s in c["optimizer"]["state"].values()] and c, "'optimizer' is not AdamW's state"),
    (lambda c: [c["optimizer"]["state"].pop(0)] and c, "the optimizer's state lacks 'adapter_query.weight.exp_avg'"),
    (lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)), "'adapter_query.weight.exp_avg' of the optimizer's state has shape [3]"),
    (lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(30, 32).int()), "'adapter_query.weight.exp_avg' is no dense tensor"),
    (lambda c: c["optimizer"]["state"][0]["exp_avg"].fill_(torch.nan) is None or c, "'adapter_query.weight.exp_avg' holds NaN"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "part"), LINEAGE_FAULTS)
def test_lineage_files_are_read_strictly(tmp_path: Path, change: Callable[[Any], Any], part: str) -> None:
    lineage(tmp_path / "a.pth", steps=2)
    message = refusal(changed(tmp_path / "a.pth", change))
    assert message.startswith(f"{tmp_path}/a.pth: ") and part in message


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(model={k: v.half() for k, v in c["model"].items()}),
        lambda c: c.update(model={k: torch.nn.Parameter(v) for k, v in c["model"].items()}),
        lambda c: c.update(args=argparse.Namespace(max_feats=10**9, batch_size=-1, lr="nan", sub=True, seed=None, epochs=[1])),
        lambda c: c.update(args={"max_feats": 3}),
        lambda c: c.update(scaler=None, extra="text"),
    ],
)
def test_what_lineage_files_may_hold(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    weights, moments = lineage(tmp_path / "a.pth", steps=2)
    found = fitted(read(changed(tmp_path / "a.pth", change)), SHAPES, LLAMA.n_layers)
    assert all(torch.allclose(found.weights[n], t, atol=1e-2) and found.weights[n].dtype == torch.float32 for n, t in weights.items())
    assert same(found.moments, moments)
    assert found.settings.keys() <= {"batch_size", "epochs", "dataset", "max_feats"}
    parse([], "vico eval", "").resolve(found.settings)


def everything(found: Checkpoint) -> list[Any]:
    fit = fitted(found, SHAPES, LLAMA.n_layers)
    return [*fit.weights.values(), *(fit.moments or {}).values()]


def test_a_flipped_bit_in_a_lineage_file_is_found_or_harmless(tmp_path: Path) -> None:
    lineage(tmp_path / "a.pth", steps=2)
    whole, before = (tmp_path / "a.pth").read_bytes(), everything(read(tmp_path / "a.pth"))
    rng, found = random.Random(0), 0
    at = [*rng.choices(range(len(whole)), k=120), *rng.choices(range(len(whole) - 4000, len(whole)), k=120)]  # the zip's directory, too
    for place in at:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        (tmp_path / "a.pth").write_bytes(damaged)
        try:
            after = everything(read(tmp_path / "a.pth"))
        except CheckpointError:
            found += 1
        else:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), place
    assert found > 120


# ---- nothing is run --------------------------------------------------------------------------------------------------


class Payload:
    """Pickled, this is a call of os.mkdir with the canary's path."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.canary),)


class State(Payload):
    """A Namespace whose state is built by a call of os.mkdir."""

    def __reduce__(self) -> Any:
        return argparse.Namespace, (), {"lr": Payload(self.canary)}


PLACES: dict[str, Callable[[Any, Any], Any]] = {
    "whole": lambda c, bomb: bomb,
    "model": lambda c, bomb: c.update(model=bomb),
    "tensor": lambda c, bomb: c["model"].update({EMBEDDING: bomb}),
    "key": lambda c, bomb: c["model"].update({(bomb,): torch.zeros(1)}),
    "args": lambda c, bomb: c.update(args=bomb),
    "setting": lambda c, bomb: c.update(args=argparse.Namespace(lr=bomb)),
    "state of args": lambda c, bomb: c.update(args=State(bomb.canary)),
    "optimizer": lambda c, bomb: c.update(optimizer=bomb),
    "moment": lambda c, bomb: c["optimizer"]["state"][0].update(exp_avg=bomb),
    "epoch": lambda c, bomb: c.update(epoch=bomb),
    "scaler": lambda c, bomb: c.update(scaler=bomb),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, place: str, zipped: bool) -> None:
    canary = tmp_path / "canary"
    lineage(tmp_path / "a.pth", steps=2)
    changed(tmp_path / "a.pth", lambda c: PLACES[place](c, Payload(canary)), _use_new_zipfile_serialization=zipped)
    assert "holds the Python object posix.mkdir, refused because loading it can run code" in refusal(tmp_path / "a.pth")
    assert not canary.exists()


def test_pickles_under_other_names_are_not_run(tmp_path: Path, own: Path) -> None:
    canary = tmp_path / "canary"
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors", tmp_path / "noname", own / STATE, own / WEIGHTS, own / OPTIMIZER):
        path.write_bytes(pickle.dumps(Payload(canary)))
        refusal(own if path.parent == own else path)
    assert not canary.exists()
