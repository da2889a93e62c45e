"""Putting the rooms together: what a run reads, checked before anything is built, and the engine it runs on."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vico.config import RunConfig
from vico.data import captions as caption_files
from vico.data.batches import count_shortened
from vico.data.datasets import DATASETS, count_equal_options, read_questions
from vico.data.features import Features
from vico.data.prompts import Prompts
from vico.data.tokenizer import Tokenizer, find_tokenizer
from vico.dist import World, limit_waiting
from vico.engine import Engine, construction, fill, read_config
from vico.errors import UserError
from vico.files import require_writable
from vico.model import kernels
from vico.model.attention_packed import choose
from vico.model.backbone import Weights, holds_weights, open_weights
from vico.model.vico import ViCo, trainable_shapes
from vico.optim import make_optimizer
from vico.records import Question

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Inputs:
    weights: Weights
    prompts: Prompts
    features: Features
    questions: dict[str, list[Question]]  # by split
    captions: dict[str, str]  # empty without the caption task
    num_adapted: int  # adapted layers
    trainable_shapes: dict[str, tuple[int, ...]]
    ds_config: dict[str, Any]
    notes: tuple[str, ...]


def read_inputs(config: RunConfig, splits: tuple[str, ...], world: World) -> Inputs:
    """Open and check every file of a run; nothing is computed yet. Raises UserError. No collectives: ranks agree after it."""
    require_writable(config.output_dir)
    ds_config = read_config(config.deepspeed, config.precision, config.batch_size, config.accum_iter, world.size)
    model_folder = _model_folder(config)
    tokenizer = Tokenizer(find_tokenizer(config.llama_model_path, model_folder))
    weights = open_weights(model_folder, tokenizer.num_pieces)
    num_adapted = config.adapter_layer or weights.shape.n_layers
    if num_adapted > weights.shape.n_layers:
        raise UserError(f"--adapter_layer {num_adapted}: the model has {weights.shape.n_layers} layers; leave it out to adapt all")
    dataset, folder = DATASETS[config.dataset], config.dataset_folder
    prompts = Prompts(tokenizer, config.max_feats, config.max_seq_len, config.max_cap_len, dialogue=dataset.has_dialogue)
    questions = {split: read_questions(config.dataset, folder, split, subtitles=config.sub) for split in splits}
    features = Features(folder / "clipvitl14.pth")
    captions: dict[str, str] = {}
    if config.cap and "train" in splits:
        captions = caption_files.read(folder, config.captions)
        caption_files.check(captions, questions["train"], caption_files.find(folder, config.captions))
        prompts.caption(captions[questions["train"][0].video])  # a --max_cap_len below any caption is known at once
    notes = []
    for split, asked in questions.items():
        notes += _split_notes(config, split, asked, features, prompts, world)
    shapes = trainable_shapes(weights.shape, num_adapted, config.adapter_len, config.max_feats)
    return Inputs(weights, prompts, features, questions, captions, num_adapted, shapes, ds_config, tuple(notes))


def _model_folder(config: RunConfig) -> Path:
    folder = config.llama_model_path / config.model
    if not os.path.isdir(folder):
        there = sorted(p.name for p in config.llama_model_path.glob("*/") if holds_weights(p))
        hint = f"--model can be {', '.join(there)}" if there else "it must hold LLaMA weights of Meta or Hugging Face"
        raise UserError(f"{folder}: no such folder of weights; {hint}")
    return folder


def _split_notes(config: RunConfig, split: str, asked: list[Question], features: Features, prompts: Prompts, world: World) -> list[str]:
    """What a user should know about a split. Raises UserError for questions without features, or too long for any prompt."""
    past_end = features.check(asked)
    features.check_finite(asked[world.rank :: world.size], config.max_feats)
    shortened = count_shortened(asked, prompts, config.tasks if split == "train" else ("vqa",))
    counts = {
        f"shortened to fit --max_seq_len {config.max_seq_len} (dialogue first, then options; answers never)": shortened,
        "about a clip that lies past the end of its video's features: zeros in its slots": past_end,
        "with two equal options": count_equal_options(asked),
    }
    return [f"{split}: {len(asked)} questions"] + [f"{split}: {n} of {len(asked)} questions {what}" for what, n in counts.items() if n]


def build_engine(config: RunConfig, inputs: Inputs, trainables: dict[str, Tensor], world: World) -> Engine:
    """The model with the backbone from the files and these trainables, under DeepSpeed. A collective of all ranks."""
    with world.agreeing():
        dtype = DTYPES[config.precision]
        attend, description = choose(config.attention, world.device, dtype)
        description += f", {kernels.describe(world.device)}"
    with construction(inputs.ds_config, world.device):
        model = ViCo(inputs.weights.shape, inputs.num_adapted, config.adapter_len, config.max_feats, config.tau, dtype)
    for name, parameter in model.named_parameters():
        world.doing(f"loading {name}")
        value = trainables.get(name)
        fill(parameter, partial(inputs.weights.read_slice, name) if value is None else partial(_slice, value))
    model.attend = attend
    model.num_checkpointed = len(model.layers) if config.num_checkpointed is None else config.num_checkpointed
    _require_declared(model, inputs.trainable_shapes)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], config.weight_decay)
    engine = Engine(model, optimizer, inputs.ds_config, dtype, description)
    limit_waiting(world.timeout)
    return engine


def _slice(value: Tensor, start: int, stop: int) -> Tensor:
    return value.flatten()[start:stop]


def _require_declared(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found == set(shapes), "the trainables are those that the modules declare, and no others"
