"""Published .pth files: read completely or refused by name, and no code in them is run."""

import argparse
import pathlib
import pickle
import random
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference import oracle, oracle_files
from support.checkpoints import LLAMA, SHAPES, Payload, same, validation_error
from vico.checkpoint.format import MOMENTS, Checkpoint, TrainState
from vico.checkpoint.validate import validate_for_model
from vico.cli.flags import parse
from vico.errors import CheckpointError
from vico.model.config import trainable_shapes
from vico.train.saved_run import read_checkpoint

PARAMS = {"dim": 32, "n_layers": 3, "n_heads": 4, "norm_eps": 1e-6}


def write_published(
    path: Path, steps: int = 0, adapted: int = 3, **more: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A published file after this many updates (0: `model` alone); returns weights and moments."""
    hyper = oracle.Hyper(adapter_layer=adapted)
    trainables = oracle.init_trainables(PARAMS, hyper, random_gates=True)
    optimizer = oracle.make_optimizer(trainables, oracle.Hyper())
    for _ in range(steps):
        for parameter in trainables.values():
            parameter.grad = torch.rand_like(parameter)
        optimizer.step()
    oracle_files.save_published(path, trainables, optimizer if steps else None, **more)
    weights = {name: parameter.detach() for name, parameter in trainables.items()}
    moments = {}
    if steps:
        for name, parameter in trainables.items():
            for moment in MOMENTS:
                moments[f"{name}.{moment}"] = optimizer.state[parameter][moment]
    return weights, moments


def rewrite(path: Path, change: Callable[[Any], Any], **save_options: Any) -> Path:
    """Save the file's content again after `change`, which edits it or returns another."""
    with torch.serialization.safe_globals([argparse.Namespace, type(Path())]):
        content = torch.load(path, weights_only=True)
    result = change(content)
    torch.save(content if result is None else result, path, **save_options)
    return path


def validated(path: Path, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Checkpoint:
    return validate_for_model(read_checkpoint(path), shapes, LLAMA.n_layers)


def test_model_alone_starts_a_new_run(tmp_path: Path) -> None:
    weights, _ = write_published(tmp_path / "a.pth")
    checkpoint = validated(tmp_path / "a.pth")
    assert list(checkpoint.weights) == list(SHAPES) and same(checkpoint.weights, weights)
    assert checkpoint.moments is None and checkpoint.published_optimizer is None
    assert checkpoint.state == TrainState() and checkpoint.notes == ()


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath"])
def test_paths_of_any_python_and_system(tmp_path: Path, module: str, name: str) -> None:
    """Python 3.13 writes pathlib._local; Windows writes paths that cannot be opened here."""
    path_class = type(name, (), {"__module__": module, "__reduce__": _as_path})
    holder = types.ModuleType(module)
    setattr(holder, name, path_class)
    args = argparse.Namespace(seed=5, llama_model_path=path_class())
    weights, _ = write_published(tmp_path / "b.pth")
    known = sys.modules.get(module)
    sys.modules[module] = holder
    try:
        torch.save({"model": weights, "args": args}, tmp_path / "a.pth")
    finally:
        sys.modules.pop(module)
        if known is not None:
            sys.modules[module] = known
    assert f"{module}\n{name}".encode() in pickle_of(tmp_path / "a.pth")
    assert validated(tmp_path / "a.pth").settings == {"seed": 5}


def _as_path(self: Any) -> tuple[type, tuple[str, str]]:
    """As pathlib pickles a path: by its class and parts."""
    return type(self), ("pretrained", "llama")


def pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


@pytest.mark.parametrize("save_options", [{}, {"_use_new_zipfile_serialization": False}])
def test_optimizer_is_resumed(tmp_path: Path, save_options: dict[str, bool]) -> None:
    args = argparse.Namespace(batch_size=8, blr=0.09, dataset="star", max_feats=10)
    args.resume, args.device, args.lr, args.rank = "", "cuda", None, 3
    args.output_dir, args.llama_model_path = pathlib.PosixPath("x"), "./pretrained/llama"
    path = tmp_path / "a.pth"
    weights, moments = write_published(path, steps=3, epoch=4, args=args)
    checkpoint = validated(rewrite(path, lambda content: None, **save_options))
    assert checkpoint.published_optimizer is not None
    assert checkpoint.published_optimizer.epoch == 4
    assert checkpoint.state == TrainState(num_updates=3)
    assert same(checkpoint.weights, weights) and same(checkpoint.moments, moments)
    expected = {"batch_size": 8, "blr": 0.09, "dataset": "star", "max_feats": 10}
    expected["llama_model_path"] = Path("pretrained/llama")
    assert checkpoint.settings == expected


def test_gates_below_the_adapted_layers(tmp_path: Path) -> None:
    """They are left out, with a note."""
    path = tmp_path / "a.pth"
    shapes = trainable_shapes(LLAMA, num_adapted=1, adapter_len=10, num_slots=10)
    weights, moments = write_published(path, steps=2, adapted=1, lower_gates=2)
    checkpoint = validated(path, shapes)
    note = f"{path}: ignored 4 gates of layers below the adapted ones, which nothing uses"
    assert checkpoint.notes == (note,)
    assert checkpoint.weights.keys() == shapes.keys()
    assert same(checkpoint.weights, weights) and same(checkpoint.moments, moments)
    gate_of_no_layer = {"layers.3.attention.gate1": torch.zeros(1, 4, 1, 1)}
    rewrite(path, lambda content: content["model"].update(gate_of_no_layer))
    assert "1 unexpected (layers.3.attention.gate1)" in validation_error(path, shapes)


EMBEDDING = "temporal_emb.weight"


def model_with(**tensors: Any) -> Callable[[Any], Any]:
    """A change that sets entries of 'model'."""
    return lambda content: content["model"].update(tensors)


def with_embedding(value: Any) -> Callable[[Any], Any]:
    return model_with(**{EMBEDDING: value})


def with_first_moment(value: Any) -> Callable[[Any], Any]:
    return lambda content: content["optimizer"]["state"][0].update(exp_avg=value)


def without_embedding(content: Any) -> None:
    del content["model"][EMBEDDING]


def with_nan_moment(content: Any) -> None:
    content["optimizer"]["state"][0]["exp_avg"].fill_(torch.nan)


ALL_MISSING = "9 missing (adapter_query.weight, visual_proj.weight, temporal_emb.weight, layers.0"
FAULTS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda c: {"weights": c}, "has no 'model' dict of tensors; a published checkpoint has one"),
    (lambda c: [c], "is such a dict itself, and this is a list; name the file that the training"),
    (lambda c: {"lr": 1, "epoch": 3}, "and this is a dict with 'lr', 'epoch'; name the file"),
    (lambda c: c.update(model={}), ALL_MISSING),
    (
        without_embedding,
        "tensors: 1 missing (temporal_emb.weight)); give those of the run that wrote it",
    ),
    (model_with(extra=torch.zeros(1)), "1 unexpected (extra)"),
    (
        with_embedding(torch.zeros(5, 32)),
        "1 misshapen (temporal_emb.weight [5, 32] instead of [10, 32])",
    ),
    (
        with_embedding(torch.zeros(10, 32).int()),
        "'model' entry 'temporal_emb.weight' is no dense tensor of float",
    ),
    (
        with_embedding(torch.zeros(10, 32).to_sparse()),
        "is no dense tensor of floating-point numbers",
    ),
    (
        with_embedding(torch.zeros(10, 32, device="meta")),
        "is no dense tensor of floating-point numbers",
    ),
    (with_embedding("text"), "'model' entry 'temporal_emb.weight' is no dense tensor"),
    (
        lambda c: c["model"].update({7: torch.zeros(1)}),
        "'model' entry 7 is no dense tensor",
    ),
    (
        with_embedding(torch.full((10, 32), torch.inf)),
        "'temporal_emb.weight' holds NaN or infinite values",
    ),
    (
        with_embedding(torch.full((10, 32), 1e300, dtype=torch.float64)),
        "holds NaN or infinite values",
    ),
    (lambda c: c.update(epoch=-1), "'epoch' is -1, not a whole number"),
    (lambda c: c.update(epoch=True), "'epoch' is True, not a whole number"),
    (
        with_first_moment(torch.zeros(30, 32).int()),
        "'adapter_query.weight.exp_avg' is no dense tensor",
    ),
    (with_nan_moment, "'adapter_query.weight.exp_avg' holds NaN"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_faults(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    write_published(tmp_path / "a.pth", steps=2)
    error = validation_error(rewrite(tmp_path / "a.pth", change))
    assert error.startswith(f"{tmp_path}/a.pth: ") and message in error


ODD_ARGS = argparse.Namespace(max_feats=10**9, batch_size=-1, lr="nan", sub=True, seed=None)
ODD_ARGS.epochs = [1]
HARMLESS: list[Callable[[Any], Any]] = [
    lambda c: c.update(model={k: v.half() for k, v in c["model"].items()}),
    lambda c: c.update(model={k: torch.nn.Parameter(v) for k, v in c["model"].items()}),
    lambda c: c.update(args=ODD_ARGS),
    lambda c: c.update(args={"max_feats": 3}),
    lambda c: c.update(scaler=None, extra="text"),
]


@pytest.mark.parametrize("change", HARMLESS)
def test_harmless_changes(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    weights, moments = write_published(tmp_path / "a.pth", steps=2)
    checkpoint = validated(rewrite(tmp_path / "a.pth", change))
    for name, tensor in weights.items():
        assert torch.allclose(checkpoint.weights[name], tensor, atol=1e-2)
        assert checkpoint.weights[name].dtype == torch.float32
    assert same(checkpoint.moments, moments)
    assert checkpoint.settings.keys() <= {"batch_size", "epochs", "dataset", "max_feats"}
    parse([], "vico eval", "").resolve(checkpoint.settings)


def tensors_of(path: Path) -> list[Tensor]:
    checkpoint = validated(path)
    return [*checkpoint.weights.values(), *(checkpoint.moments or {}).values()]


def test_flipped_bits(tmp_path: Path) -> None:
    """Each is noticed or harmless; the zip's directory, at the end, is hit as often as the rest."""
    path = tmp_path / "a.pth"
    write_published(path, steps=2)
    content, tensors = path.read_bytes(), tensors_of(path)
    rng, num_noticed = random.Random(0), 0
    offsets = rng.choices(range(len(content)), k=120)
    offsets += rng.choices(range(len(content) - 4000, len(content)), k=120)
    for offset in offsets:
        damaged = bytearray(content)
        damaged[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            after = tensors_of(path)
        except CheckpointError:
            num_noticed += 1
        else:
            assert all(map(torch.equal, tensors, after)), offset
            assert len(after) == len(tensors), offset
    assert num_noticed > 120


class State(Payload):
    """A Namespace whose state is built by a call of os.mkdir."""

    def __reduce__(self) -> Any:
        return argparse.Namespace, (), {"lr": Payload(self.canary)}


PLACES: dict[str, Callable[[Any, Any], Any]] = {
    "whole": lambda c, payload: payload,
    "model": lambda c, payload: c.update(model=payload),
    "tensor": lambda c, payload: c["model"].update({EMBEDDING: payload}),
    "key": lambda c, payload: c["model"].update({(payload,): torch.zeros(1)}),
    "args": lambda c, payload: c.update(args=payload),
    "setting": lambda c, payload: c.update(args=argparse.Namespace(lr=payload)),
    "state of args": lambda c, payload: c.update(args=State(payload.canary)),
    "optimizer": lambda c, payload: c.update(optimizer=payload),
    "moment": lambda c, payload: c["optimizer"]["state"][0].update(exp_avg=payload),
    "epoch": lambda c, payload: c.update(epoch=payload),
    "scaler": lambda c, payload: c.update(scaler=payload),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_code_is_refused(tmp_path: Path, place: str, zipped: bool) -> None:
    canary, path = tmp_path / "canary", tmp_path / "a.pth"
    write_published(path, steps=2)

    def plant(content: Any) -> Any:
        return PLACES[place](content, Payload(canary))

    rewrite(path, plant, _use_new_zipfile_serialization=zipped)
    message = "holds the Python object posix.mkdir, refused because loading it can run code"
    assert message in validation_error(path)
    assert not canary.exists()


def test_pickles_under_other_names(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors", tmp_path / "noname"):
        path.write_bytes(pickle.dumps(Payload(canary)))
        validation_error(path)
    assert not canary.exists()
