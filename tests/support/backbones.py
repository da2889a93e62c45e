"""Random backbones of every kind, written by transformers, and a LLaMA-3 tokenizer.

ViCo's logits of a plain text are compared with those of transformers.
"""

import base64
import math
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from support.toy_dataset import WORDS
from vico.data.tokenizer import LLAMA_3_SPECIAL, LLAMA_3_WORDS
from vico.model.attention.backends import KERNELS
from vico.model.attention.blockwise import attend_blocks
from vico.model.attention.masks import Attend, attention_mask
from vico.model.attention.reference import attend_plain
from vico.model.attention.varlen import PackedAttention
from vico.model.batch import Segment
from vico.model.block_runners import choose_block_runners
from vico.model.config import LlamaConfig, trainable_shapes
from vico.model.interfaces import Context, MakeLinear
from vico.model.llama import FrozenLinear, rotary_angles
from vico.model.quantized_linear import Fp8Linear, QuantizedLinear
from vico.model.vico import ViCo, initial_trainables
from vico.model.weights.load import Weights

# fp32 through two layers in another order of sums; measured: 1.1e-6 of the largest logit.
LOGITS_RTOL = 1e-5
LENGTH = 24
NUM_PIECES = 340  # pieces of the LLaMA-3 tokenizer, special ones not counted
ROPE_3 = {"rope_type": "llama3", "rope_theta": 500000.0}
ROPE_3_1 = ROPE_3 | {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Where turns are counted in so short a context, the blend between fast and slow frequencies is in
# sight.
STRETCHED = ROPE_3_1 | {"original_max_position_embeddings": 16, "factor": 4.0}
LLAMA_3 = {"num_key_value_heads": 2, "vocab_size": 1024}
KINDS: dict[str, dict[str, Any]] = {
    "LLaMA-1": {},
    "LLaMA-2-70B": {"num_key_value_heads": 2, "intermediate_size": 256},
    "LLaMA-3": LLAMA_3 | {"rope_parameters": ROPE_3 | {"rope_type": "default"}},
    "LLaMA-3.1": {"num_key_value_heads": 1, "rope_parameters": ROPE_3_1},
    "stretched": {"rope_parameters": STRETCHED},
    "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "wide heads": {"num_key_value_heads": 2, "head_dim": 32},
    "narrow heads": {"head_dim": 6},
    "Mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
}
ATTENTIONS: dict[str, Attend] = {
    "blocks": attend_blocks,
    "plain": attend_plain,
    "packed": PackedAttention(KERNELS["sdpa"]),
}
every_attention = pytest.mark.parametrize("attend", ATTENTIONS.values(), ids=ATTENTIONS)


def make_hugging_face(
    folder: Path, kind: dict[str, Any], shard_size: str = "1GB"
) -> PreTrainedModel:
    """A random model, written by transformers itself."""
    sizes: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {"intermediate_size": 192, "vocab_size": 400, "rms_norm_eps": 1e-5}
    torch.manual_seed(7)
    config = AutoConfig.for_model(**{**sizes, **kind})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 1 / math.sqrt(parameter.shape[-1]))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


class Ungrouped:
    """The same model without grouped-query attention: a key and value head per query head.

    `of`: a model, whose linear layers may be quantized; then the values that it computes with.
    """

    def __init__(self, weights: Weights, of: ViCo | None = None) -> None:
        self.folder, self._weights, config = weights.folder, weights, weights.config
        self._model = of
        self._head_dim, self._group_size = config.head_dim, config.n_heads // config.kv_heads
        self.config = LlamaConfig(**{**vars(config), "n_kv_heads": None})

    def read(self, name: str) -> Tensor:
        if self._model is None:
            tensor = self._weights.read(name)
        else:
            tensor = attrgetter(name)(self._model).detach()
        if not name.endswith(("wk.weight", "wv.weight")):
            return tensor
        heads = tensor.unflatten(0, (-1, self._head_dim))
        return heads.repeat_interleave(self._group_size, 0).flatten(0, 1)

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name).flatten()[start:stop]


def make_model(
    weights: Weights | Ungrouped,
    attend: Attend = attend_blocks,
    num_adapted: int | None = None,
    gate1: float = 0.0,
    linear: MakeLinear = FrozenLinear,
) -> ViCo:
    num_adapted = num_adapted or weights.config.n_layers
    shapes = trainable_shapes(weights.config, num_adapted, 10, 10)
    trainables = initial_trainables(shapes, bias=0.7, seed=0)
    for name, value in trainables.items():
        if name.endswith("gate1"):
            value.fill_(gate1)
    model = ViCo(weights.config, num_adapted, 10, 10, 100.0, torch.float32, linear)
    quantized = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear | Fp8Linear)
    }
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in quantized:
            parameter.data.copy_(trainables[name] if name in trainables else weights.read(name))
    for name, module in quantized.items():
        module.fill(weights.read(f"{name}.weight").float())
    choose_block_runners(model, attend)
    return model


def logits(
    weights: Weights, ids: Tensor, attend: Attend = attend_blocks, num_adapted: int | None = None
) -> Tensor:
    """[T, W] of a plain text: at gate1 = 0, and without a video, the adapter changes nothing."""
    model, config = make_model(weights, attend, num_adapted), weights.config
    segments = (Segment(0, len(ids), None, False, False),)
    positions = torch.arange(len(ids))
    rotary = rotary_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    prompts_GAD = model.adapter_query.weight.unflatten(0, (-1, 10))
    context = Context(rotary, attention_mask(segments), attend)
    with torch.no_grad():
        h_TD = model.trunk(model.tok_embeddings(ids), prompts_GAD, context, positions)
        return h_TD @ model.output.weight.t()


def text(weights: Weights) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(weights.config.vocab_size, (LENGTH,), generator=generator)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def byte_letters() -> dict[int, str]:
    """How byte-level pieces are written in JSON.

    Printable bytes are written as themselves, the others as letters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def make_llama_3_tokenizers(tiktoken_file: Path, json_file: Path) -> None:
    """One tokenizer of LLaMA-3's recipe, in Meta's kind of file and in Hugging Face's."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA_3_WORDS), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=NUM_PIECES, initial_alphabet=alphabet, show_progress=False
    )
    texts = [f"Question: {a} the {b}?\nAnswer: The answer is (A)" for a in WORDS for b in WORDS]
    model.train_from_iterator(texts, trainer)
    write_tiktoken(tiktoken_file, model.get_vocab())
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    special += [f"<|reserved_special_token_{i}|>" for i in range(LLAMA_3_SPECIAL - 2)]
    model.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in special])
    # What LLaMA-3's own file also does, and the method does not want: BOS in front, blanks trimmed
    # from offsets, texts cut.
    template = tokenizers.processors.TemplateProcessing(
        "<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", NUM_PIECES)]
    )
    byte_level = tokenizers.processors.ByteLevel(trim_offsets=True)
    model.post_processor = tokenizers.processors.Sequence([byte_level, template])
    model.enable_truncation(5)
    model.save(str(json_file))


def write_tiktoken(path: Path, vocabulary: dict[str, int]) -> None:
    """A line per piece: its bytes in base64, and its rank."""
    assert len(vocabulary) == NUM_PIECES
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}
    lines = []
    for piece, rank in sorted(vocabulary.items(), key=lambda item: item[1]):
        raw = bytes(bytes_of[letter] for letter in piece)
        lines.append(base64.b64encode(raw) + b" %d\n" % rank)
    path.write_bytes(b"".join(lines))
