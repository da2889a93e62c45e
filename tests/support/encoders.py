"""Small seeded image encoders in Hugging Face's layout, in place of CLIP's real weights."""

from pathlib import Path
from typing import Any

import torch

SIDE = 32  # of a picture
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
}


def make_clip(folder: Path, width: int = 24) -> Path:
    """A whole CLIP with its preprocessing, as the hub has it."""
    import transformers

    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 50, "projection_dim": width, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        vision_config={**SIZES, "projection_dim": width},
        text_config={**text, "bos_token_id": 0, "pad_token_id": 0},
        projection_dim=width,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=side
    ).save_pretrained(folder)
    return folder


def make_siglip(folder: Path) -> Path:
    """SigLIP's vision tower, without a preprocessor's file."""
    import transformers

    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(**SIZES)
    transformers.SiglipVisionModel(config).save_pretrained(folder)
    return folder
