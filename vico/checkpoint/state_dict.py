"""The adapter's tensors in a state_dict as people hold it.

A wrapper of the model (DistributedDataParallel, torch.compile) prefixes every name; who saves the
whole model saves the frozen LLaMA, too. Whatever is left out is counted and said.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vico.errors import CheckpointError, show
from vico.io.safe_load import is_float_tensor

# These come before the gates of the layers.
FIRST = ("adapter_query.weight", "visual_proj.weight", "temporal_emb.weight")
GATE = re.compile(r"layers\.(\d+)\.attention\.gate[12]")
# Where a file of torch holds its tensors: the published code, Lightning, others, DeepSpeed.
HOLDERS = ("model", "state_dict", "model_state_dict", "module")
# The frozen tensors, under Meta's names and under Hugging Face's.
_BACKBONE = re.compile(
    r"(tok_embeddings|norm|output)\.weight|rope\.freqs"
    r"|layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123]|attention_norm|ffn_norm)\.weight"
    r"|layers\.\d+\.attention\.inner_attention\.rope\.freqs"
    r"|lm_head\.weight|(model\.)?(embed_tokens|norm)\.weight"
    r"|(model\.)?layers\.\d+\.(self_attn|mlp|\w+_layernorm)\b.*"
)
# LLaMA-Adapter has one gate per layer; its second version adds these to the LLaMA's layers.
_LLAMA_ADAPTER = re.compile(r"layers\.\d+\.attention\.gate|.*\.(lora_\w+|w[qo]_bias|w\d_bias).*")
ITSELF = "its entry"
MAX_SHOWN = 3


def find_tensors(content: object, path: Path) -> tuple[Mapping[Any, Any], str, tuple[str, ...]]:
    """(the dict of tensors in a torch file, what messages call its entries, notes).

    A file that is such a dict itself may hold other entries; they are passed over. Raises
    CheckpointError.
    """
    if isinstance(content, dict):
        for holder in HOLDERS:
            if isinstance(content.get(holder), dict):
                taken = f"{path}: has no 'model'; its tensors are taken from '{holder}'"
                return content[holder], f"'{holder}' entry", () if holder == "model" else (taken,)
        tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            notes = [f"{path}: has no 'model'; its tensors are taken from the file itself"]
            if others := [show(name) for name in content if name not in tensors]:
                notes.append(f"{path}: passed over {len(others)} entries without tensors")
                notes[-1] += f" ({', '.join(others[:MAX_SHOWN])})"
            return tensors, ITSELF, tuple(notes)
    names = ", ".join(map(show, list(content)[:MAX_SHOWN])) if isinstance(content, dict) else ""
    raise CheckpointError(
        f"{path}: has no 'model' dict of tensors; a published checkpoint has one, or is such a "
        f"dict itself, and this is a {type(content).__name__}{names and f' with {names}'}; "
        "name the file that the training saved"
    )


def adapter_tensors(
    tensors: Mapping[Any, Any], path: Path, entry: str = ITSELF
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(the tensors without the frozen LLaMA's, by their own names; notes on what was left out).

    In the order of `tensors`, which an optimizer refers to. `entry` is what messages call one.
    Raises CheckpointError.
    """
    renamed, prefix = _without_prefix(tensors, path)
    notes = [f"{path}: names begin with '{prefix}', which is left out"] if prefix else []
    weights, num_frozen = dict[str, Tensor](), 0
    for name, value in renamed.items():
        if isinstance(name, str) and _BACKBONE.fullmatch(name):
            num_frozen += 1
        elif isinstance(name, str) and is_float_tensor(value):
            weights[name] = value.detach()
        else:
            raise CheckpointError(
                f"{path}: {entry} {show(name)} is no dense tensor of floating-point numbers"
            )
    if num_frozen and not weights:
        raise CheckpointError(
            f"{path}: holds {num_frozen} tensors of a LLaMA and none of an adapter; name a "
            "checkpoint of ViCo by --resume, and the LLaMA by --llama_model_path and --model"
        )
    if num_frozen:
        notes.append(
            f"{path}: passed over {num_frozen} tensors of the frozen LLaMA; the one of --model "
            "is used"
        )
    _refuse_llama_adapter(weights, path)
    return weights, tuple(notes)


def _without_prefix(tensors: Mapping[Any, Any], path: Path) -> tuple[dict[Any, Any], str]:
    """(the tensors by their own names, the prefix that wrappers of the model had added)."""
    names = [name for name in tensors if isinstance(name, str)]
    prefixes = {name.removesuffix(own) for own in FIRST for name in names if name.endswith(own)}
    prefix = min(prefixes, default="", key=len)
    if not prefix.endswith("."):  # none, or another name that ends alike
        return dict(tensors), ""
    renamed: dict[Any, Any] = {}
    for name, value in tensors.items():
        own = name.removeprefix(prefix) if isinstance(name, str) else name
        if own in renamed:
            raise CheckpointError(
                f"{path}: holds {show(own)} with and without the prefix '{prefix}'; keep one"
            )
        renamed[own] = value
    return renamed, prefix


def _refuse_llama_adapter(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError for a file of LLaMA-Adapter: its names are alike, its model is not."""
    foreign = [name for name in weights if _LLAMA_ADAPTER.fullmatch(name)]
    if not foreign or any(GATE.fullmatch(name) for name in weights):
        return
    missing = [name for name in FIRST if name not in weights]
    missing.append("gate1 and gate2 of every layer")
    query = weights.get(FIRST[0])
    shape = "" if query is None else f", and {FIRST[0]} {list(query.shape)}"
    raise CheckpointError(
        f"{path}: was made for another model, LLaMA-Adapter: it has {len(foreign)} tensors like "
        f"{foreign[0]}{shape}, and lacks {', '.join(missing)}; a checkpoint of ViCo is expected: "
        "name one, or leave --resume out to train from scratch"
    )
