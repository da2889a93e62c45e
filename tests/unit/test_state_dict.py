"""Published weights as people hold them: wrapped, bare, with a LLaMA inside, another optimizer."""

import argparse
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from support.checkpoints import LLAMA, SHAPES, random_state, same, validation_error
from vico.checkpoint.format import MOMENTS, Checkpoint
from vico.checkpoint.published import ALLOWED_CLASSES
from vico.checkpoint.validate import validate_for_model
from vico.cli.convert import convert
from vico.io import numpy_scalars
from vico.io.safe_load import load_tensors
from vico.model.config import backbone_shapes
from vico.train.saved_run import read_checkpoint

WEIGHTS, _ = random_state(SHAPES, 1)
GATES = [name for name in WEIGHTS if "gate" in name]


def read(path: Path) -> Checkpoint:
    return validate_for_model(read_checkpoint(path), SHAPES, LLAMA.n_layers)


def saved(path: Path, content: Any, **save_options: Any) -> Path:
    torch.save(content, path, **save_options)
    return path


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def with_gates(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {**WEIGHTS, **{name: WEIGHTS[name].reshape(shape) for name in GATES}}


def hugging_face_names() -> dict[str, Tensor]:
    names = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"):
        names.append(f"model.layers.0.{part}.weight")
    return dict.fromkeys(names, torch.zeros(2, dtype=torch.int8))


BACKBONE = {name: torch.zeros(1).expand(1) for name in backbone_shapes(LLAMA)}
OPTIMIZER = {"state": {}, "param_groups": []}
LAYOUTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "DDP": ({"model": prefixed("module.", WEIGHTS)}, ("names begin with 'module.', which is",)),
    "compiled DDP": (
        {"model": prefixed("_orig_mod.module.", WEIGHTS)},
        ("names begin with '_orig_mod.module.'",),
    ),
    "bare": (dict(WEIGHTS), ("has no 'model'; its tensors are taken from the file itself",)),
    "bare DDP with other entries": (
        {**prefixed("module.", WEIGHTS), "best": 0.5, "note": "x"},
        (
            "its tensors are taken from the file itself",
            "passed over 2 entries without tensors ('best', 'note')",
            "names begin with 'module.'",
        ),
    ),
    "Lightning": (
        {"state_dict": prefixed("model.", WEIGHTS), "epoch": 3},
        ("its tensors are taken from 'state_dict'", "names begin with 'model.'"),
    ),
    "DeepSpeed": (
        {"module": dict(WEIGHTS)},
        ("its tensors are taken from 'module'",),
    ),
    "backbone": (
        {"model": prefixed("module.", {**BACKBONE, **WEIGHTS})},
        (
            "names begin with 'module.'",
            f"passed over {len(BACKBONE)} tensors of the frozen LLaMA; the one of --model is used",
        ),
    ),
    "Hugging Face's backbone": (
        {"model": {**WEIGHTS, **hugging_face_names()}},
        ("passed over 6 tensors of the frozen LLaMA",),
    ),
    "gates [H]": (
        {"model": with_gates((4,))},
        ("6 gates of shape [4] taken as [1, 4, 1, 1]",),
    ),
    "gates [1, H]": ({"model": with_gates((1, 4))}, ("6 gates of shape [1, 4] taken as",)),
    "numpy": ({"model": WEIGHTS, "best": np.float64(0.5), "seen": np.int64(3)}, ()),
    "empty optimizer": (
        {"model": WEIGHTS, "optimizer": OPTIMIZER, "epoch": 3},
        (
            "its 'optimizer' is not used: it holds no state of AdamW, because it is empty; "
            "training starts anew from 'model'",
        ),
    ),
    "optimizer without an epoch": (
        {"model": WEIGHTS, "optimizer": OPTIMIZER},
        ("its 'optimizer' is not used: the file has no 'epoch'",),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_layouts(tmp_path: Path, name: str, zipped: bool) -> None:
    """Each holds the same weights, and says what was left out."""
    content, notes = LAYOUTS[name]
    path = saved(tmp_path / "a.pth", content, _use_new_zipfile_serialization=zipped)
    checkpoint = read(path)
    assert same(checkpoint.weights, WEIGHTS) and list(checkpoint.weights) == list(SHAPES)
    assert checkpoint.moments is None and checkpoint.published_optimizer is None
    assert len(checkpoint.notes) == len(notes)
    for found, expected in zip(checkpoint.notes, notes, strict=True):
        assert found.startswith(f"{path}: ") and expected in found


def test_safetensors_and_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of weights alone is read by the same rules, and `vico convert` says them too."""
    path, target = tmp_path / "a.safetensors", tmp_path / "a.pth"
    save_file({**prefixed("module.", with_gates((4,))), "module.norm.weight": torch.ones(2)}, path)
    checkpoint = read(path)
    assert same(checkpoint.weights, WEIGHTS) and len(checkpoint.notes) == 3
    convert(path, target)
    shown = capsys.readouterr().out
    assert "passed over 1 tensors of the frozen LLaMA" in shown and "'module.'" in shown
    assert same(read(target).weights, WEIGHTS)


def adamw(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """A file with AdamW's state after `change`; a result of `change` is the state instead."""
    states: dict[Any, Any] = {}
    for number, value in enumerate(WEIGHTS.values()):
        states[number] = {"step": torch.tensor(2.0)}
        states[number] |= {moment: torch.ones_like(value) for moment in MOMENTS}
    state = {"state": states, "param_groups": [{"params": list(states)}]}
    changed = change(state)
    optimizer = state if changed is None else changed
    return {"model": WEIGHTS, "optimizer": optimizer, "epoch": np.int64(4)}


def sgd(state: dict[str, Any]) -> None:
    for values in state["state"].values():
        values.clear()
        values["momentum_buffer"] = None


OTHERS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda s: "x", "it holds no state of AdamW for the tensors of 'model'"),
    (lambda s: s.update(param_groups=[]), "it is of 0 tensors, and 'model' has 9"),
    (lambda s: s["state"].clear(), "it holds no state of AdamW, because it is empty"),
    (lambda s: s["state"].pop(0) is None, "it lacks the state of adapter_query.weight"),
    (
        lambda s: s["state"][0].update(step=torch.tensor(9.0)),
        "it holds states of steps [2, 9], not of one",
    ),
    (
        lambda s: [v.update(step=torch.tensor(torch.inf)) for v in s["state"].values()] and None,
        "it holds no state of AdamW",
    ),
    (sgd, "it holds momentum_buffer where AdamW's has step, exp_avg, exp_avg_sq"),
    (
        lambda s: s["state"][0].update(max_exp_avg_sq=torch.ones(1)),
        "it holds step, exp_avg, exp_avg_sq, max_exp_avg_sq where AdamW's has",
    ),
    (
        lambda s: s["state"][0].update(exp_avg=torch.zeros(3)),
        "the exp_avg of adapter_query.weight has shape [3], and the tensor [30, 32]",
    ),
]


@pytest.mark.parametrize(("change", "reason"), OTHERS)
def test_other_optimizers(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    """They are not used, which is said: training starts anew from 'model'."""

    def changed(state: dict[str, Any]) -> Any:
        result = change(state)
        return result if isinstance(result, str) else None

    checkpoint = read(saved(tmp_path / "a.pth", adamw(changed)))
    assert same(checkpoint.weights, WEIGHTS) and checkpoint.moments is None
    assert checkpoint.published_optimizer is None and checkpoint.state.num_updates == 0
    (note,) = checkpoint.notes
    assert note.startswith(f"{tmp_path}/a.pth: its 'optimizer' is not used: {reason}")


def test_optimizer_of_wrapped_weights(tmp_path: Path) -> None:
    """With a prefix, gates [H] and a LLaMA inside, AdamW's state is still each tensor's own."""
    content = adamw(lambda state: None)
    for number, name in enumerate(WEIGHTS):
        state = content["optimizer"]["state"][number]
        state["step"] = 2  # of torch before 1.12
        if name in GATES:
            state |= {moment: torch.full((4,), float(number)) for moment in MOMENTS}
    content["model"] = prefixed("module.", {**BACKBONE, **with_gates((4,))})
    checkpoint = read(saved(tmp_path / "a.pth", content))
    assert checkpoint.published_optimizer is not None and checkpoint.moments is not None
    assert (checkpoint.published_optimizer.epoch, checkpoint.state.num_updates) == (4, 2)
    for number, name in enumerate(WEIGHTS):
        expected = float(number) if name in GATES else 1.0
        assert (checkpoint.moments[f"{name}.exp_avg"] == expected).all()
        assert checkpoint.moments[f"{name}.exp_avg"].shape == SHAPES[name]


def test_llama_adapter_is_another_model(tmp_path: Path) -> None:
    """Its own file has one gate per layer, and no video."""
    content = {"adapter_query.weight": torch.zeros(30, 32)}
    content |= {f"layers.{i}.attention.gate": torch.zeros(1, 4, 1, 1) for i in range(3)}
    error = validation_error(saved(tmp_path / "a.pth", content))
    assert "was made for another model, LLaMA-Adapter: it has 3 tensors like layers.0." in error
    assert "adapter_query.weight [30, 32], and lacks visual_proj.weight, temporal_emb.w" in error
    assert "gate1 and gate2 of every layer" in error and "leave --resume out" in error


def test_what_cannot_be_told(tmp_path: Path) -> None:
    error = validation_error(saved(tmp_path / "a.pth", dict(BACKBONE)))
    assert f"holds {len(BACKBONE)} tensors of a LLaMA and none of an adapter" in error
    twice = {**WEIGHTS, **prefixed("module.", WEIGHTS)}
    assert "9 unexpected (module." in validation_error(saved(tmp_path / "b.pth", twice))
    mixed = {"a.x": torch.zeros(1), "x": torch.zeros(1), "a.adapter_query.weight": torch.zeros(1)}
    error = validation_error(saved(tmp_path / "c.pth", mixed))
    assert "holds 'x' with and without the prefix 'a.'; keep one" in error
    gates = {**WEIGHTS, GATES[0]: torch.zeros(2, 2)}
    error = validation_error(saved(tmp_path / "d.pth", {"model": gates}))
    assert f"1 misshapen ({GATES[0]} [2, 2] instead of [1, 4, 1, 1])" in error


class Scalar:
    """Pickled as a number of numpy, under the name that `module` gives the function."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __reduce__(self) -> Any:
        return sys.modules[self.module].scalar, (np.dtype("f8"), np.float64(0.1).tobytes())


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numbers_of_numpy(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any kind and byte order, as numpy 1 and 2 write them; texts become None."""
    values = [np.float64(0.1), np.float32(0.5), np.int64(-3), np.bool_(True), np.uint8(7)]
    content = {"values": values, "text": np.str_("x"), "big": np.array(3, ">i4")[()]}
    content["args"] = argparse.Namespace(lr=Scalar(module))
    with monkeypatch.context() as patch:
        if module == "numpy.core.multiarray":  # numpy 2 has no function of this name
            function = types.new_class("scalar", (), {}, lambda ns: ns.update(__module__=module))
            holder = types.ModuleType(module)
            holder.scalar = function  # type: ignore[attr-defined]
            patch.setitem(sys.modules, module, holder)
        torch.save(content, tmp_path / "a.pth")
    read_back = load_tensors(tmp_path / "a.pth", "the checkpoint", ALLOWED_CLASSES)
    assert read_back["values"] == [0.1, 0.5, -3, True, 7] and read_back["text"] is None
    assert read_back["big"] == 3 and read_back["args"].lr == 0.1
    assert [type(value) for value in read_back["values"]] == [float, float, int, bool, int]


def test_other_calls_of_numpy(tmp_path: Path) -> None:
    """Arrays are not built, and a number of another size than its bytes is damage."""
    path = saved(tmp_path / "a.pth", {"model": {**WEIGHTS, "x": np.ones(3)}})
    assert "holds the Python object numpy._core.multiarray._reconstruct" in validation_error(path)
    with pytest.raises(ValueError, match="a number of 8 bytes has 3"):
        numpy_scalars.scalar(numpy_scalars.DType("f8"), b"abc")
    text = numpy_scalars.DType("S9")
    assert numpy_scalars.scalar(text, b"abc") is None and numpy_scalars.scalar(text) is None
    assert numpy_scalars.scalar(7, b"abc") is None
