"""Writes an adapter as a folder that a model hub takes: weights, adapter_config.json, model card.

adapter_config.json has the keys that PEFT's PeftConfig knows, and no 'peft_type': PEFT looks an
unknown one up and fails (0.21). What is ViCo's own stands in 'auto_mapping', which PeftConfig
keeps. Without a 'peft_type', PEFT refuses to make a model of the weights, which it could not run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from vico.checkpoint.format import CARD, CONFIG, FORMAT, WEIGHTS, Checkpoint
from vico.checkpoint.write import check_written
from vico.io.atomic import make_folder, write_folder, write_new
from vico.io.digest import digest_bytes


def export(
    checkpoint: Checkpoint, target: Path, base_model: str, settings: Mapping[str, Any], card: str
) -> None:
    """Write the folder `target`, which must not exist. Raises UserError or DiskError.

    `base_model`: the LLaMA's name. `settings`: those of the run that others may see.
    """
    weights = checkpoint.weights
    digests = {name: checkpoint.fingerprints[name] for name in sorted(checkpoint.fingerprints)}
    metadata = {"format": "pt", "base_model_name_or_path": base_model, **digests}
    data = safetensors.torch.save(weights, metadata)
    record = {
        "format": FORMAT,
        "adapter_type": "VICO",
        "step": checkpoint.state.step,
        "shapes": {name: list(value.shape) for name, value in weights.items()},
        "settings": dict(settings),
        "fingerprints": digests,
        "files": {WEIGHTS: {"bytes": len(data), "sha256": digest_bytes(data)}},
    }
    own = {"parent_library": "vico.model.vico", "base_model_class": "ViCo", "vico": record}
    config = {
        "base_model_name_or_path": base_model,
        "revision": None,
        "task_type": None,
        "inference_mode": True,
        "auto_mapping": own,
    }

    def fill(folder: Path) -> None:
        write_new(folder / WEIGHTS, data)
        write_new(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        write_new(folder / CARD, card.encode())

    make_folder(target.parent)
    write_folder(target, fill, check_written)
