"""Three local tasks of lm-evaluation-harness, and a checkpoint on a LLaMA that it can read too."""

import json
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from support.asked_world import AskedWorld
from support.backbones import NUM_PIECES, make_hugging_face, make_llama_3_tokenizers
from support.toy_dataset import ToyData
from vico.data.tokenizer import LLAMA_3_SPECIAL

VOCABULARY = NUM_PIECES + LLAMA_3_SPECIAL
# The shape of AskedWorld's checkpoint; two heads share their keys.
KIND = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 88,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "bos_token_id": NUM_PIECES,
    "eos_token_id": NUM_PIECES + 1,
}
NAMES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
QUESTIONS = [
    {"text": "the man holds the", "choices": [" dog", " red ball", " cat smiles"], "label": 1},
    {"text": "what does the cat hold? the ", "choices": ["ball", "dog"], "label": 0},
    {"text": "", "choices": ["a dog runs", "a cat runs", "a man"], "label": 2},
    {"text": "why does the dog run", "choices": ["?", " the ball.", " a man"], "label": 0},
]
TEXTS = ["a man and a dog run. the cat smiles? " * 5, "the red ball.", "why\u00e9 the dog"]
STOP = "h"  # in no special token's name
OPENINGS = ["the man", "a dog runs and the", "why does the cat", "a ball. what"]


@dataclass
class _Tokenizer:
    """The one question that AskedWorld asks."""

    def vocab_size(self) -> int:
        return VOCABULARY


def make_world(folder: Path, toy: ToyData, gates: float) -> tuple[AskedWorld, PreTrainedModel]:
    """A checkpoint, and its frozen LLaMA by transformers, in `folder`/llama/tiny."""
    llama = folder / "llama" / "tiny"
    reference = make_hugging_face(llama, KIND)
    make_llama_3_tokenizers(folder / "tokenizer.model", llama / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": NAMES["eos_token"]}
    (llama / "tokenizer_config.json").write_text(json.dumps(config | NAMES))
    other: Any = copy(toy)
    other.llama, other.tokenizer = llama.parent, _Tokenizer()
    return AskedWorld(folder / "world", other, gates), reference


def write_tasks(folder: Path, targets: list[str]) -> list[str]:
    """Names of tasks of each kind in `folder`. `targets`: of the texts that follow OPENINGS."""
    folder.mkdir()
    openings = [{"text": a, "target": b} for a, b in zip(OPENINGS, targets, strict=True)]
    kinds: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "local_choice": (
            QUESTIONS,
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{text}}",
                "doc_to_choice": "choices",
                "doc_to_target": "label",
                "target_delimiter": "",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            },
        ),
        "local_text": (
            [{"text": text} for text in TEXTS],
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
            },
        ),
        "local_write": (
            openings,
            {
                "output_type": "generate_until",
                "doc_to_text": "{{text}}",
                "doc_to_target": "{{target}}",
                "generation_kwargs": {"until": [STOP], "max_gen_toks": 12, "do_sample": False},
                "metric_list": [{"metric": "exact_match"}],
            },
        ),
    }
    for name, (rows, task) in kinds.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = {"task": name, "dataset_path": "json", "test_split": "test"}
        common |= {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | task))
    return list(kinds)
