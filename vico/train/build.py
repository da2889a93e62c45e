"""What a run reads, checked before anything is built; and the model under DeepSpeed."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vico.checkpoint.format import Checkpoint
from vico.checkpoint.validate import validate_for_model
from vico.data.datasets import read_questions
from vico.data.features import Features
from vico.data.prompts import Prompts
from vico.data.types import Question
from vico.distributed.world import World, set_collective_timeout
from vico.io.atomic import require_writable
from vico.io.file_cache import FileCache
from vico.model.attention.backends import choose_attention
from vico.model.block_runners import choose_block_runners
from vico.model.config import trainable_shapes
from vico.model.interfaces import MakeLinear
from vico.model.llama import FrozenLinear
from vico.model.ops import triton_ops
from vico.model.quantized_linear import QuantizedLinear
from vico.model.vico import ViCo
from vico.model.weights.load import Weights
from vico.train import preflight, zero_stage
from vico.train.config import RunConfig
from vico.train.engine import Engine, load_parameter, zero_init
from vico.train.optim import make_optimizer

FEATURES_FILE = "clipvitl14.pth"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened and checked."""

    weights: Weights
    prompts: Prompts
    features: Features
    questions: dict[str, list[Question]]  # by split
    dropped: dict[str, list[Question]]  # by split: left out by --missing_features drop
    captions: dict[str, str]  # empty without the caption task
    num_adapted: int  # layers
    trainable_shapes: dict[str, tuple[int, ...]]
    ds_config: dict[str, Any]
    stage: str  # which ZeRO stage, and why
    notes: tuple[str, ...]
    cache: FileCache  # to be flushed once all ranks agree that nothing is wrong


def read_inputs(config: RunConfig, splits: tuple[str, ...], world: World) -> Inputs:
    """Open and check every file of a run; nothing is computed yet. Raises UserError.

    No collective runs inside: the ranks agree afterwards.
    """
    require_writable(config.output_dir)
    cache = FileCache()
    backbone = preflight.open_backbone(config)
    llama = backbone.weights.config
    training = "train" in splits
    hardware = zero_stage.hardware(world.members)
    choice = zero_stage.choose(config, llama, world.size, hardware, training)
    prompts, folder = backbone.prompts(config), config.dataset_folder
    annotated = {}
    for split in splits:
        annotated[split] = read_questions(config.dataset, folder, split, subtitles=config.sub)
    features = Features(folder / FEATURES_FILE)
    questions, dropped, notes = {}, {}, [*choice.notes]
    for split in splits:
        questions[split], dropped[split] = preflight.with_features(
            config, split, annotated[split], features
        )
    captions: dict[str, str] = {}
    if config.cap and training:
        captions = preflight.read_captions(config, questions["train"], prompts)
    for split in splits:
        used = questions[split]
        past_end = preflight.check_features(config, used, features, cache, world.rank, world.size)
        lengths = preflight.measure_questions(config, split, used, backbone, prompts, cache)
        notes += preflight.split_notes(config, split, used, dropped[split], past_end, lengths)
    if captions:
        lengths = preflight.measure_captions(
            config, captions, questions["train"], backbone, prompts, cache
        )
        notes += preflight.caption_notes(config, lengths)
    notes += preflight.shared_video_notes(questions)
    shapes = trainable_shapes(llama, backbone.num_adapted, config.adapter_len, config.max_feats)
    return Inputs(
        weights=backbone.weights,
        prompts=prompts,
        features=features,
        questions=questions,
        dropped=dropped,
        captions=captions,
        num_adapted=backbone.num_adapted,
        trainable_shapes=shapes,
        ds_config=choice.ds_config,
        stage=choice.name,
        notes=tuple(notes),
        cache=cache,
    )


def fit(checkpoint: Checkpoint, inputs: Inputs) -> Checkpoint:
    """`checkpoint` with the tensors of this model. Raises CheckpointError where it has others."""
    return validate_for_model(checkpoint, inputs.trainable_shapes, inputs.weights.config.n_layers)


def build_engine(
    config: RunConfig, inputs: Inputs, trainables: dict[str, Tensor], world: World
) -> Engine:
    """The model with the backbone from the files and these trainables, under DeepSpeed. A collective of all ranks."""
    with world.raise_together():
        dtype = DTYPES[config.precision]
        attend, description = choose_attention(config.attention, world.device, dtype)
        description += f", {triton_ops.describe(world.device)}"
    linear: MakeLinear = (
        FrozenLinear if config.quantize is None else partial(QuantizedLinear, kind=config.quantize)
    )
    with zero_init(inputs.ds_config, world.device):
        model = ViCo(
            inputs.weights.config,
            inputs.num_adapted,
            config.adapter_len,
            config.max_feats,
            config.tau,
            dtype,
            linear,
        )
    for name, parameter in model.named_parameters():
        world.set_phase(f"loading {name}")
        value = trainables.get(name)
        load_parameter(
            parameter,
            partial(inputs.weights.read_slice, name) if value is None else partial(_slice, value),
        )
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            world.set_phase(f"loading {name}")
            module.fill(inputs.weights.read(f"{name}.weight").to(world.device, dtype))
    num_checkpointed = (
        len(model.layers) if config.num_checkpointed is None else config.num_checkpointed
    )
    no_graphs = why_no_graphs(inputs.ds_config, config.quantize)
    description += f", {choose_block_runners(model, attend, num_checkpointed, no_graphs)}"
    _require_declared(model, inputs.trainable_shapes)
    optimizer = make_optimizer(
        [p for p in model.parameters() if p.requires_grad], config.weight_decay
    )
    world.set_phase("building the engine")
    engine = Engine(model, optimizer, inputs.ds_config, dtype, description)
    set_collective_timeout(world.timeout)
    return engine


def why_no_graphs(ds_config: dict[str, Any], quantize: str | None = None) -> str | None:
    """Why CUDA graphs of the blocks cannot be captured, or not be replayed. None: they can."""
    if quantize is not None:
        return "--quantize makes weights at every use"
    if ds_config.get("flops_profiler", {}).get("enabled"):
        return "DeepSpeed's flops_profiler waits behind every module"
    return (
        "ZeRO-3 gathers weights at every use"
        if ds_config["zero_optimization"]["stage"] == 3
        else None
    )


def _slice(value: Tensor, start: int, stop: int) -> Tensor:
    return value.flatten()[start:stop]


def _require_declared(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found == set(shapes), "the trainables are those that the modules declare, and no others"
