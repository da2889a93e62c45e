"""One grouped-query backbone on the disk, in every layout, written by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from reference import oracle_files
from vico.model.config import VOCABULARY, LlamaConfig, backbone_shapes
from vico.model.weights.hf import stored_name, stored_rows

CONFIG = LlamaConfig(64, 2, 4, 400, 32, n_kv_heads=2, ffn_dim_multiplier=1.3)
PARAMS = {
    **{"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2},
    **{"multiple_of": 32, "ffn_dim_multiplier": 1.3, "vocab_size": 400},
}
HF_CONFIG = {
    **{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": CONFIG.hidden_dim, "vocab_size": 400, "rms_norm_eps": 1e-5},
}
FILES: dict[str, tuple[str, str, Callable[[dict[str, Tensor], Path], None]]] = {
    "HF": ("model", ".safetensors", safetensors.torch.save_file),
    "torch": ("pytorch_model", ".bin", torch.save),
}


def write_layouts(folder: Path, num_spare: int = 0) -> dict[str, Path]:
    """Layout -> its folder in `folder`. `num_spare`: rows behind the 400 of the vocabulary."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, shape in backbone_shapes(CONFIG).items():
        scaled = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        tensors[name] = scaled + ("norm" in name)
    for name in VOCABULARY:
        spare = torch.randn(num_spare, CONFIG.dim, generator=generator)
        tensors[name] = torch.cat([tensors[name], spare])
    write_meta(folder / "one", tensors, 1, embeddings_dim=1)
    write_meta(folder / "two", tensors, 2, embeddings_dim=1)
    write_meta(folder / "two of LLaMA-3", tensors, 2, embeddings_dim=0)
    write_hugging_face(folder, tensors)
    return {path.name: path for path in folder.iterdir()}


def write_meta(
    folder: Path, tensors: dict[str, Tensor], num_shards: int, embeddings_dim: int
) -> None:
    folder.mkdir()
    params = PARAMS | {"vocab_size": len(tensors[VOCABULARY[1]])}
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(num_shards):
        shard = {}
        for name, tensor in tensors.items():
            is_embeddings = "tok_embeddings" in name
            dim = embeddings_dim if is_embeddings else oracle_files.shard_dim(name)
            shard[name] = tensor if dim is None else tensor.chunk(num_shards, dim)[rank].clone()
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")


def write_hugging_face(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Of one file, and of two: "HF" and "HF in files", "torch" and "torch in files"."""
    config = json.dumps(HF_CONFIG | {"vocab_size": len(tensors[VOCABULARY[0]])})
    stored = {}
    for name, tensor in tensors.items():
        is_rotated = "wq" in name or "wk" in name
        rows = stored_rows(tensor, 16).contiguous() if is_rotated else tensor
        stored[stored_name(name)] = rows
    for layout, (stem, suffix, save) in FILES.items():
        single, split = folder / layout, folder / f"{layout} in files"
        for path in (single, split):
            path.mkdir()
            (path / "config.json").write_text(config)
        save(stored, single / f"{stem}{suffix}")
        names, weight_map = sorted(stored), {}
        for i, part in enumerate((names[:7], names[7:])):
            file_name = f"{stem}-{i}{suffix}"
            save({name: stored[name] for name in part}, split / file_name)
            weight_map |= dict.fromkeys(part, file_name)
        index = json.dumps({"weight_map": weight_map})
        (split / f"{stem}{suffix}.index.json").write_text(index)
