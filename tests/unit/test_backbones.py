"""Backbones of every kind against `transformers`, grouped queries in training, and whole runs."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from support.backbones import (
    KINDS,
    LENGTH,
    LOGITS_RTOL,
    NUM_PIECES,
    Ungrouped,
    distance,
    every_attention,
    logits,
    make_hugging_face,
    make_llama_3_tokenizers,
    make_model,
    text,
)
from support.processes import succeeds
from support.toy_dataset import ToyData, records
from vico.cli.flags import parse
from vico.data.packing import Example, pack
from vico.data.types import VIDEO_SLOT, TokenSequence
from vico.distributed.world import World
from vico.model.attention.masks import Attend
from vico.model.attention.reference import attend_plain
from vico.model.batch import PackedBatch
from vico.model.config import RopeScaling, trainable_shapes
from vico.model.llama import rotary_angles
from vico.model.weights.load import open_weights
from vico.train.build import read_inputs

GRADIENT_RTOL = 1e-5  # as LOGITS_RTOL


@every_attention
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, attend: Attend, tmp_path: Path) -> None:
    reference = make_hugging_face(tmp_path, KINDS[kind])
    weights = open_weights(tmp_path, None)
    with torch.no_grad():
        expected = reference(text(weights)[None]).logits[0]
    assert distance(logits(weights, text(weights), attend), expected) < LOGITS_RTOL


def test_files_that_transformers_split(tmp_path: Path) -> None:
    reference = make_hugging_face(tmp_path, KINDS["LLaMA-2-70B"], shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    weights = open_weights(tmp_path, 400)
    with torch.no_grad():
        expected = reference(text(weights)[None]).logits[0]
    assert distance(logits(weights, text(weights)), expected) < LOGITS_RTOL


def test_rope_scaling_changes_the_angles() -> None:
    """The cases above could not tell it from none if it changed nothing at their length."""
    positions, scaling = torch.arange(LENGTH), RopeScaling(4.0, 1.0, 4.0, 16)
    plain = rotary_angles(positions, 16, 500000.0)
    scaled = rotary_angles(positions, 16, 500000.0, scaling)
    assert (plain - scaled).abs().amax(dim=(0, 1)).gt(1e-3).sum() >= 3


def test_fewer_adapted_layers_run_all_layers(tmp_path: Path) -> None:
    reference = make_hugging_face(tmp_path, KINDS["LLaMA-2-70B"] | {"num_hidden_layers": 3})
    weights = open_weights(tmp_path, None)
    with torch.no_grad():
        expected = reference(text(weights)[None]).logits[0]
    assert distance(logits(weights, text(weights), num_adapted=1), expected) < LOGITS_RTOL


def video_batch(vocab_size: int) -> PackedBatch:
    """Sequences with a video, two of which share a prompt, and every kind of target."""
    generator = torch.Generator().manual_seed(2)

    def ids(count: int) -> list[int]:
        return torch.randint(vocab_size, (count,), generator=generator).tolist()

    video = [VIDEO_SLOT] * 10
    examples = []
    for clip in range(2):
        head, tail = [*ids(5), *video], ids(4)
        for task in range(2):
            tokens = (*head, *tail, *ids(6))
            examples.append(Example(TokenSequence("vqa", tokens, range(19, 25), 5), clip, task))
        tokens = (*ids(7), *video, 2)
        examples.append(Example(TokenSequence("qav", tokens, range(7, 17), 7), clip, 3))
    return pack(examples, torch.randn(2, 10, 768, generator=generator), share=True)


@every_attention
@pytest.mark.parametrize("kind", ["LLaMA-2-70B", "wide heads", "narrow heads"])
def test_gradients_under_grouped_queries(kind: str, attend: Attend, tmp_path: Path) -> None:
    """Of every trainable, against the same model without groups."""
    make_hugging_face(tmp_path, KINDS[kind])
    weights = open_weights(tmp_path, None)
    batch = video_batch(weights.config.vocab_size)
    results = []
    for model in (
        make_model(weights, attend, gate1=0.4),
        make_model(Ungrouped(weights), attend_plain, gate1=0.4),
    ):
        losses = model(batch)
        losses.mean().backward()
        trainables = {n: p for n, p in model.named_parameters() if p.requires_grad}
        results.append((losses.detach(), {name: p.grad for name, p in trainables.items()}))
    (losses, gradients), (expected_losses, expected) = results
    assert distance(losses, expected_losses) < LOGITS_RTOL
    assert set(gradients) == set(trainable_shapes(weights.config, 2, 10, 10))
    for name, gradient in gradients.items():
        assert gradient is not None and expected[name] is not None, name
        assert expected[name].abs().max() > 0, name
        assert distance(gradient, expected[name]) < GRADIENT_RTOL, name


def test_a_run_opens_hugging_face_weights(toy: ToyData, tmp_path: Path) -> None:
    """With the tokenizer in the model's own folder, as after a download."""
    make_hugging_face(tmp_path / "hf", {"vocab_size": toy.tokenizer.vocab_size()})
    shutil.copy(toy.llama / "tokenizer.model", tmp_path / "hf")
    flags = [*toy.flags, "--output_dir", str(tmp_path / "out")]
    flags += ["--llama_model_path", str(tmp_path), "--model", "hf"]
    config = parse(flags, "vico train", "").resolve()
    inputs = read_inputs(config, ("train",), World(0, 1, torch.device("cpu"), None))
    assert inputs.weights.config.n_layers == inputs.num_adapted == 2


def test_a_llama_3_is_trained_and_scored(toy: ToyData, tmp_path: Path) -> None:
    """From flags to accuracy.

    Grouped queries, another rotary base, Hugging Face's files and Meta's tokenizer beside them.
    """
    folder = tmp_path / "8B"
    make_hugging_face(folder, KINDS["LLaMA-3"] | {"vocab_size": NUM_PIECES + 256})
    make_llama_3_tokenizers(folder / "tokenizer.model", folder / "tokenizer.json")
    flags = [*toy.flags, "--llama_model_path", str(tmp_path)]
    flags += "--model 8B --max_seq_len 512 --max_cap_len 512 --vaq --qav".split()
    flags += "--adapter_layer 1 --batch_size 4 --max_steps 2 --deepspeed zero3".split()
    succeeds("train", *flags, "--output_dir", str(tmp_path / "out"))
    steps = records(tmp_path / "out" / "steps.jsonl")
    assert len(steps) == 2 and all(math.isfinite(step["loss"]) for step in steps)
    assert "val_acc" in records(tmp_path / "out" / "log.txt")[-1]
