"""Whether tensors fit a model, or are a whole adapter: which, of what shapes, and in what words."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from support.errors import refusal
from vico.checkpoint import convert, validate
from vico.checkpoint.format import Checkpoint
from vico.checkpoint.validate import validate_for_model

PATH = Path("c.pth")
GATE = "layers.1.attention.gate1"
SHAPES = {"adapter_query.weight": (2, 4), "visual_proj.weight": (4, 3), GATE: (1, 2, 1, 1)}


def fitting(**changes: Tensor) -> Checkpoint:
    weights = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    return Checkpoint(PATH, {**weights, **changes})


def fits(weights: dict[str, Tensor]) -> Checkpoint:
    return validate_for_model(fitting(**weights), SHAPES, num_layers=2)


def test_gates_that_are_not_used() -> None:
    """Those below the adapted layers; one of no layer of the model is wrong."""
    found = fits({"layers.0.attention.gate2": torch.ones(1)})
    assert list(found.weights) == list(SHAPES)
    said = "ignored 1 gates of layers below the adapted ones, which nothing uses"
    assert found.notes == (f"c.pth: {said}",)
    remedy = "give those of the run that wrote it"
    flags = "--model, --adapter_layer, --adapter_len and --max_feats"
    for layer, gate in ((1, 2), (2, 1)):
        name = f"layers.{layer}.attention.gate{gate}"
        assert refusal(fits, {name: torch.ones(1, 2, 1, 1)}) == (
            f"c.pth: does not fit {flags} (tensors: 1 unexpected ({name})); {remedy}"
        )


def test_a_model_without_gates_has_none_that_is_unused() -> None:
    assert validate._unused_gates({GATE: torch.ones(1)}, {"a": (1,)}, 2) == set()


def test_shapes_of_gates() -> None:
    """A number for each head, however it is written."""
    for shape in ((2,), (1, 2, 1)):
        found = fits({GATE: torch.tensor([3.0, 4.0]).reshape(shape).half()})
        assert found.weights[GATE].tolist() == [[[[3]], [[4]]]]
        assert found.weights[GATE].dtype == torch.float32
        said = f"1 gates of shape {list(shape)} taken as [1, 2, 1, 1]"
        assert found.notes == (f"c.pth: {said}",)
    moments = {f"{GATE}.exp_avg": torch.zeros(2), "a": torch.zeros(1)}
    reshaped, _ = validate._with_gate_shapes(moments, SHAPES)
    assert reshaped[f"{GATE}.exp_avg"].shape == (1, 2, 1, 1) and reshaped["a"].shape == (1,)


def test_features_of_another_width() -> None:
    said = (
        "c.pth: was trained on features 5 wide, and these are 3 wide; name those of the same "
        "encoder by --features, or train anew"
    )
    name = "visual_proj.weight"
    assert refusal(fits, {name: torch.ones(4, 5)}) == said
    for shape in ((3, 5), (4,), (4, 3, 1)):  # of another model
        misshapen = f"(tensors: 1 misshapen ({name} {list(shape)} instead of [4, 3]))"
        assert misshapen in refusal(fits, {name: torch.ones(shape)})


def test_five_faults_are_shown() -> None:
    for number, more in ((5, ""), (6, ", ...")):
        names = [str(i) for i in range(number)]
        shown = f"{number} {{}} (0, 1, 2, 3, 4{more})"
        tensors, shapes = dict.fromkeys(names, torch.zeros(1)), dict.fromkeys(names, (2,))
        assert validate._faults({}, shapes) == [shown.format("missing")]
        assert validate._faults(tensors, {}) == [shown.format("unexpected")]
    some = {"a": (1,), "b": (2,)}
    assert validate._faults({"b": torch.zeros(1), "c": torch.zeros(1)}, some) == [
        "1 missing (a)",
        "1 unexpected (c)",
        "1 misshapen (b [1] instead of [2])",
    ]


def test_moments_of_a_checkpoint() -> None:
    """Of every tensor, in fp32; squares have no negative mean, and the other may have one."""
    moments = {}
    for name, shape in SHAPES.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            moments[f"{name}.{moment}"] = torch.zeros(shape).double()
    moments[f"{GATE}.exp_avg"] -= 1
    whole = validate_for_model(replace(fitting(), moments=moments), SHAPES, 2).moments
    assert whole is not None and list(whole) == list(moments)
    assert {value.dtype for value in whole.values()} == {torch.float32}
    key = f"{GATE}.exp_avg_sq"
    for value, said in (
        (None, f"the optimizer's state lacks '{key}'"),
        (
            torch.tensor([0.0, -1e-9]),
            f"'{key}' of the optimizer's state, a mean of squares, is negative",
        ),
        (
            torch.zeros(3),
            f"'{key}' of the optimizer's state has shape [3], unlike its tensor",
        ),
        (torch.zeros(2).int(), f"'{key}' is no dense tensor of floating-point numbers"),
        (torch.tensor([0, torch.nan]), f"'{key}' holds NaN or infinite values"),
    ):
        changed = {**moments, key: value}
        if value is None:
            del changed[key]
        bad = replace(fitting(), moments=changed)
        assert refusal(validate_for_model, bad, SHAPES, 2) == (
            f"c.pth: {said}; use another checkpoint"
        )


def test_whole_adapters() -> None:
    """The tensors outside the layers and a pair of gates of each layer, all finite."""
    first = ["adapter_query.weight", "visual_proj.weight", "temporal_emb.weight"]
    gates = [f"layers.{i}.attention.gate{j}" for i in (0, 1) for j in (1, 2)]
    whole = {name: torch.zeros(1) for name in [*first, *gates]}
    convert.check_adapter(whole, PATH)
    for names, more, said in (
        (gates[:3], {}, "lacks layers.1.attention.gate2"),
        (gates[1:], {}, "lacks layers.0.attention.gate1"),
        (gates, {"z": 0, "y": 0, "x": 0, "w": 0}, "holds unknown w, x, y"),
        ([], {}, "lacks gates"),
        (gates[:1], {"x": 0}, "lacks layers.0.attention.gate2"),
    ):
        weights = {**{name: torch.zeros(1) for name in [*first, *names]}, **more}
        message = refusal(convert.check_adapter, weights, PATH)
        assert message == f"c.pth: {said}; an adapter of ViCo's is expected"
    whole[gates[3]] = torch.tensor([torch.inf])
    said = f"'{gates[3]}' holds NaN or infinite values; use another checkpoint"
    assert refusal(convert.check_adapter, whole, PATH) == f"c.pth: {said}"
    none = f"{PATH}: lacks {', '.join(sorted(first))}; an adapter of ViCo's is expected"
    assert refusal(convert.check_adapter, {}, PATH) == none
