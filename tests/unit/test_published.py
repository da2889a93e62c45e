"""Checkpoints of the lineage (.pth): what is in them arrives or is refused by name; and nothing in them is ever run."""

import argparse
import pathlib
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference import oracle, oracle_files
from support.checkpoints import LLAMA, SHAPES, Payload, refusal, same
from vico.checkpoint.format import MOMENTS, Checkpoint, TrainState
from vico.checkpoint.validate import validate_for_model
from vico.cli.flags import parse
from vico.errors import CheckpointError
from vico.model.config import trainable_shapes
from vico.train.resume import read_checkpoint

PARAMS = {"dim": 32, "n_layers": 3, "n_heads": 4, "norm_eps": 1e-6}


def lineage(
    path: Path, steps: int = 0, adapted: int = 3, **more: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A lineage file after this many updates (0: `model` alone); returns weights and moments."""
    trainables = oracle.init_trainables(
        PARAMS, oracle.Hyper(adapter_layer=adapted), random_gates=True
    )
    optimizer = oracle.make_optimizer(trainables, oracle.Hyper())
    for _ in range(steps):
        for parameter in trainables.values():
            parameter.grad = torch.rand_like(parameter)
        optimizer.step()
    oracle_files.save_lineage(path, trainables, optimizer if steps else None, **more)
    states = (
        {name: optimizer.state[parameter] for name, parameter in trainables.items()}
        if steps
        else {}
    )
    return {n: t.detach() for n, t in trainables.items()}, {
        f"{n}.{m}": state[m] for n, state in states.items() for m in MOMENTS
    }


def changed(path: Path, change: Callable[[Any], Any], **how: Any) -> Path:
    with torch.serialization.safe_globals([argparse.Namespace, type(Path())]):
        content = torch.load(path, weights_only=True)
    result = change(content)
    torch.save(content if result is None else result, path, **how)
    return path


def test_a_lineage_file_with_model_alone_is_a_new_start(tmp_path: Path) -> None:
    weights, _ = lineage(tmp_path / "a.pth")
    found = validate_for_model(read_checkpoint(tmp_path / "a.pth"), SHAPES, LLAMA.n_layers)
    assert list(found.weights) == list(SHAPES) and same(found.weights, weights)
    assert (
        found.moments is None
        and found.published_optimizer is None
        and found.state == TrainState()
        and found.notes == ()
    )


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_lineage_file_with_optimizer_goes_on(tmp_path: Path, how: dict[str, bool]) -> None:
    args = argparse.Namespace(
        batch_size=8,
        blr=0.09,
        dataset="star",
        max_feats=10,
        resume="",
        device="cuda",
        lr=None,
        rank=3,
    )
    args.output_dir, args.llama_model_path = pathlib.PosixPath("x"), "./pretrained/llama"
    weights, moments = lineage(tmp_path / "a.pth", steps=3, epoch=4, args=args)
    found = validate_for_model(
        read_checkpoint(changed(tmp_path / "a.pth", lambda content: None, **how)),
        SHAPES,
        LLAMA.n_layers,
    )
    assert found.published_optimizer is not None
    assert found.published_optimizer.epoch == 4 and found.state == TrainState(num_updates=3)
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
    found = validate_for_model(read_checkpoint(tmp_path / "a.pth"), shapes, LLAMA.n_layers)
    assert found.notes == (
        f"{tmp_path}/a.pth: ignored 4 gates of layers below the adapted ones, which nothing uses",
    )
    assert (
        found.weights.keys() == shapes.keys()
        and same(found.weights, weights)
        and same(found.moments, moments)
    )
    changed(
        tmp_path / "a.pth",
        lambda c: c["model"].update({"layers.3.attention.gate1": torch.zeros(1, 4, 1, 1)}),
    )
    assert "1 unexpected (layers.3.attention.gate1)" in refusal(tmp_path / "a.pth", shapes), (
        "there is no such layer"
    )


EMBEDDING = "temporal_emb.weight"


LINEAGE_FAULTS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda c: {"weights": c}, "has no 'model' dict of tensors; a published checkpoint has one"),
    (lambda c: c["model"], "has no 'model' dict of tensors"),
    (lambda c: [c], "has no 'model' dict of tensors"),
    (
        lambda c: c.update(model={}),
        "9 missing (adapter_query.weight, visual_proj.weight, temporal_emb.weight, layers.0",
    ),
    (
        lambda c: [c["model"].pop(EMBEDDING)] and c,
        "tensors: 1 missing (temporal_emb.weight)); give those of the run that wrote it",
    ),
    (lambda c: c["model"].update(extra=torch.zeros(1)), "1 unexpected (extra)"),
    (
        lambda c: c.update(model={f"module.{k}": v for k, v in c["model"].items()}),
        "9 missing (adapter_query.weight",
    ),
    (
        lambda c: c["model"].update({EMBEDDING: torch.zeros(5, 32)}),
        "1 misshapen (temporal_emb.weight [5, 32] instead of [10, 32])",
    ),
    (
        lambda c: c["model"].update({EMBEDDING: torch.zeros(10, 32).int()}),
        "'model' entry 'temporal_emb.weight' is no dense tensor of float",
    ),
    (
        lambda c: c["model"].update({EMBEDDING: torch.zeros(10, 32).to_sparse()}),
        "is no dense tensor of floating-point numbers",
    ),
    (
        lambda c: c["model"].update({EMBEDDING: torch.zeros(10, 32, device="meta")}),
        "is no dense tensor of floating-point numbers",
    ),
    (
        lambda c: c["model"].update({EMBEDDING: "text"}),
        "'model' entry 'temporal_emb.weight' is no dense tensor",
    ),
    (lambda c: c["model"].update({7: torch.zeros(1)}), "'model' entry 7 is no dense tensor"),
    (
        lambda c: c["model"].update({EMBEDDING: torch.full((10, 32), torch.inf)}),
        "'temporal_emb.weight' holds NaN or infinite values",
    ),
    (
        lambda c: c["model"].update({EMBEDDING: torch.full((10, 32), 1e300, dtype=torch.float64)}),
        "holds NaN or infinite values",
    ),
    (lambda c: c.update(epoch=-1), "'epoch' is -1, not a whole number"),
    (lambda c: c.update(epoch=True), "'epoch' is True, not a whole number"),
    (
        lambda c: c.update(optimizer="x"),
        "'optimizer' is not AdamW's state for the tensors of 'model'; drop it to start anew from 'model'",
    ),
    (lambda c: c["optimizer"].update(param_groups=[]), "'optimizer' is not AdamW's state"),
    (lambda c: c["optimizer"].update(state={}), "'optimizer' holds states of steps [], not of one"),
    (
        lambda c: c["optimizer"]["state"][0].update(step=torch.tensor(9.0)),
        "'optimizer' holds states of steps [2, 9], not of one",
    ),
    (
        lambda c: (
            [s.update(step=torch.tensor(torch.inf)) for s in c["optimizer"]["state"].values()] and c
        ),
        "'optimizer' is not AdamW's state",
    ),
    (
        lambda c: [c["optimizer"]["state"].pop(0)] and c,
        "the optimizer's state lacks 'adapter_query.weight.exp_avg'",
    ),
    (
        lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
        "'adapter_query.weight.exp_avg' of the optimizer's state has shape [3]",
    ),
    (
        lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(30, 32).int()),
        "'adapter_query.weight.exp_avg' is no dense tensor",
    ),
    (
        lambda c: c["optimizer"]["state"][0]["exp_avg"].fill_(torch.nan) is None or c,
        "'adapter_query.weight.exp_avg' holds NaN",
    ),
]


@pytest.mark.parametrize(("change", "part"), LINEAGE_FAULTS)
def test_lineage_files_are_read_strictly(
    tmp_path: Path, change: Callable[[Any], Any], part: str
) -> None:
    lineage(tmp_path / "a.pth", steps=2)
    message = refusal(changed(tmp_path / "a.pth", change))
    assert message.startswith(f"{tmp_path}/a.pth: ") and part in message


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(model={k: v.half() for k, v in c["model"].items()}),
        lambda c: c.update(model={k: torch.nn.Parameter(v) for k, v in c["model"].items()}),
        lambda c: c.update(
            args=argparse.Namespace(
                max_feats=10**9, batch_size=-1, lr="nan", sub=True, seed=None, epochs=[1]
            )
        ),
        lambda c: c.update(args={"max_feats": 3}),
        lambda c: c.update(scaler=None, extra="text"),
    ],
)
def test_what_lineage_files_may_hold(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    weights, moments = lineage(tmp_path / "a.pth", steps=2)
    found = validate_for_model(
        read_checkpoint(changed(tmp_path / "a.pth", change)), SHAPES, LLAMA.n_layers
    )
    assert all(
        torch.allclose(found.weights[n], t, atol=1e-2) and found.weights[n].dtype == torch.float32
        for n, t in weights.items()
    )
    assert same(found.moments, moments)
    assert found.settings.keys() <= {"batch_size", "epochs", "dataset", "max_feats"}
    parse([], "vico eval", "").resolve(found.settings)


def everything(found: Checkpoint) -> list[Any]:
    fit = validate_for_model(found, SHAPES, LLAMA.n_layers)
    return [*fit.weights.values(), *(fit.moments or {}).values()]


def test_a_flipped_bit_in_a_lineage_file_is_found_or_harmless(tmp_path: Path) -> None:
    lineage(tmp_path / "a.pth", steps=2)
    whole, before = (
        (tmp_path / "a.pth").read_bytes(),
        everything(read_checkpoint(tmp_path / "a.pth")),
    )
    rng, found = random.Random(0), 0
    at = [
        *rng.choices(range(len(whole)), k=120),
        *rng.choices(range(len(whole) - 4000, len(whole)), k=120),
    ]  # the zip's directory, too
    for place in at:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        (tmp_path / "a.pth").write_bytes(damaged)
        try:
            after = everything(read_checkpoint(tmp_path / "a.pth"))
        except CheckpointError:
            found += 1
        else:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), place
    assert found > 120


# ---- nothing is run --------------------------------------------------------------------------------------------------


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
    changed(
        tmp_path / "a.pth",
        lambda c: PLACES[place](c, Payload(canary)),
        _use_new_zipfile_serialization=zipped,
    )
    assert (
        "holds the Python object posix.mkdir, refused because loading it can run code"
        in refusal(tmp_path / "a.pth")
    )
    assert not canary.exists()


def test_pickles_under_other_names_are_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors", tmp_path / "noname"):
        path.write_bytes(pickle.dumps(Payload(canary)))
        refusal(path)
    assert not canary.exists()
