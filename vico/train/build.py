"""What a run reads, checked before anything is built; and the model under DeepSpeed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico.checkpoint.fingerprint import Sources
from vico.checkpoint.format import Checkpoint
from vico.checkpoint.validate import validate_for_model
from vico.data.features import Features, common_width
from vico.data.micro_batches import DatasetInputs
from vico.data.readers import captions as caption_files
from vico.data.readers.captions import Captions
from vico.data.text_windows import NO_TEXTS, Texts
from vico.data.types import Question
from vico.distributed.topology import has_large_nodes
from vico.distributed.world import World, set_collective_timeout
from vico.io import log
from vico.io.atomic import require_writable
from vico.io.file_cache import FileCache
from vico.io.input_files import InputFiles
from vico.model.attention.backends import choose_attention
from vico.model.block_runners import choose_block_runners
from vico.model.config import QUANTIZED_BYTES, trainable_shapes
from vico.model.interfaces import MakeLinear
from vico.model.llama import FrozenLinear
from vico.model.ops import triton_ops
from vico.model.ops.fp8 import Rows8, quantize_rows
from vico.model.quantized_linear import Fp8Linear, QuantizedLinear, quantized_linear
from vico.model.vico import ViCo
from vico.model.weights.load import Weights
from vico.planner.estimate import FROZEN_SHARDS, IN_NODES
from vico.train import input_notes, preflight, zero_stage
from vico.train.backbone import DTYPES
from vico.train.config import RunConfig
from vico.train.engine import Engine, is_partitioned, load_parameter, zero_init
from vico.train.optim import make_optimizer
from vico.train.preflight import BackboneFiles, Part


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened and checked."""

    weights: Weights
    datasets: dict[str, DatasetInputs]  # by name
    questions: dict[str, list[Question]]  # by split, of all data sets
    dropped: dict[str, list[Question]]  # by split: left out by --missing_features drop
    num_adapted: int  # layers
    trainable_shapes: dict[str, tuple[int, ...]]
    ds_config: dict[str, Any]
    stage: str  # which ZeRO stage, and why
    max_tokens: int | None  # the planner's, where none is given
    notes: tuple[str, ...]
    tokenizer_path: Path
    texts: Texts  # of --text, for a run with a split
    files: InputFiles  # to be compared with the disk before anything is saved
    cache: FileCache  # to be flushed once all ranks agree that nothing is wrong

    @property
    def counts(self) -> dict[str, int]:
        """How many questions of each split are used, and how many captions."""
        used = {f"{split} questions": len(q) for split, q in self.questions.items()}
        return {**used, "captions": sum(len(d.captions) for d in self.datasets.values())}

    @property
    def num_without_caption(self) -> int:
        """Training questions that the caption task leaves out."""
        if not any(inputs.captions for inputs in self.datasets.values()):
            return 0
        return sum(
            q.video not in self.datasets[q.dataset].captions for q in self.questions["train"]
        )

    def sources(self, splits: Sequence[str]) -> Sources:
        """What the fingerprints of a run over these splits are taken of."""
        questions = {split: self.questions[split] for split in splits}
        texts = self.texts.files
        return Sources(self.weights, self.tokenizer_path, self.datasets, questions, texts)


@dataclass(frozen=True)
class _Opened:
    """What a run reads besides its data sets."""

    config: RunConfig
    files: InputFiles
    cache: FileCache
    backbone: BackboneFiles
    stage: zero_stage.Choice
    texts: Texts

    def inputs(
        self,
        feature_width: int,
        datasets: dict[str, DatasetInputs],
        questions: dict[str, list[Question]],
        dropped: dict[str, list[Question]],
        notes: Sequence[str] = (),
    ) -> Inputs:
        """`notes`: on the data sets."""
        backbone, config = self.backbone, self.config
        sizes = (backbone.num_adapted, config.adapter_len, config.max_feats, feature_width)
        return Inputs(
            weights=backbone.weights,
            datasets=datasets,
            questions=questions,
            dropped=dropped,
            num_adapted=backbone.num_adapted,
            trainable_shapes=trainable_shapes(backbone.weights.config, *sizes),
            ds_config=self.stage.ds_config,
            stage=self.stage.name,
            max_tokens=self.stage.max_tokens,
            notes=(*self.stage.notes, *backbone.notes, *notes),
            tokenizer_path=backbone.tokenizer_path,
            texts=self.texts,
            files=self.files,
            cache=self.cache,
        )


def _open(config: RunConfig, splits: Sequence[str], world: World) -> _Opened:
    """Raises UserError."""
    files, cache = preflight.input_files(config, splits), FileCache(reread=config.verify)
    backbone = preflight.open_backbone(config)
    llama, hardware = backbone.weights.config, zero_stage.hardware(world.members)
    stage = zero_stage.choose(
        config,
        llama,
        world.size,
        hardware,
        training="train" in splits,
        large_nodes=has_large_nodes(world.members),
    )
    texts = preflight.read_texts(config, backbone) if splits else NO_TEXTS
    return _Opened(config, files, cache, backbone, stage, texts)


def read_inputs(config: RunConfig, splits: tuple[str, ...], world: World) -> Inputs:
    """Open and check every file of a run; nothing is computed yet. Raises UserError.

    No collective runs inside: the ranks agree afterwards.
    """
    require_writable(config.output_dir)
    opened = _open(config, splits, world)
    read = _Reader(config, splits, opened.backbone, opened.cache, world)
    datasets = {name: read.dataset(name) for name in config.dataset_names}
    notes = [*read.notes, *input_notes.shared_video_notes(config, read.used)]
    if "train" in splits:
        notes += input_notes.mixture_notes(config, read.used)
    opened.files.check_unchanged()
    return opened.inputs(
        common_width({name: d.features for name, d in datasets.items()}),
        datasets,
        preflight.joined(read.used, splits),
        preflight.joined(read.dropped, splits),
        notes,
    )


def read_backbone(
    config: RunConfig, feature_width: int, world: World
) -> tuple[Inputs, BackboneFiles]:
    """As `read_inputs`, of no data set: for questions that no split holds.

    `feature_width`: of the checkpoint. Raises UserError; no collective runs inside.
    """
    opened = _open(config, (), world)
    return opened.inputs(feature_width, {}, {}, {}), opened.backbone


class _Reader:
    """Reads and checks the files of one data set after the other."""

    def __init__(
        self,
        config: RunConfig,
        splits: Sequence[str],
        backbone: BackboneFiles,
        cache: FileCache,
        world: World,
    ) -> None:
        self._config, self._splits = config, splits
        self._backbone, self._cache, self._world = backbone, cache, world
        self._progress = log.ProgressLog(world.set_phase, world.is_main)
        self._features: dict[str, Features] = {}
        self.used: dict[Part, list[Question]] = {}
        self.dropped: dict[Part, list[Question]] = {}
        self.notes: list[str] = []

    def dataset(self, name: str) -> DatasetInputs:
        """Raises UserError."""
        config = self._config
        prompts = self._backbone.prompts(config, name)
        annotated = {}
        for split in self._splits:
            training = "train" in self._splits
            annotated[split] = preflight.read_split(config, name, split, training)
        features = self._features[name] = preflight.open_features(config, name)
        common_width(self._features)
        self.notes += input_notes.annotation_notes(config, name, annotated)
        for split, questions in annotated.items():
            chosen = preflight.with_features(config, config.label(name, split), questions, features)
            self.used[name, split], self.dropped[name, split] = chosen
        captions = Captions()
        if config.cap and "train" in annotated:
            used, label = self.used[name, "train"], config.label(name, "train")
            captions = preflight.read_captions(config, name, annotated, used, prompts)
            self.notes += caption_files.notes(label, captions, used)
        inputs = DatasetInputs(features, prompts, captions)
        for split in self._splits:
            self._check(name, split, inputs)
        self.notes += features.notes
        if captions:
            self._measure_captions(name, inputs)
        return inputs

    def _check(self, name: str, split: str, inputs: DatasetInputs) -> None:
        config, world, used = self._config, self._world, self.used[name, split]
        past_end = preflight.check_features(
            config, used, inputs.features, self._cache, world.rank, world.size, self._progress
        )
        measured = preflight.measure_questions(
            config, name, split, used, self._backbone, inputs.prompts, self._cache, self._progress
        )
        label, dropped = config.label(name, split), self.dropped[name, split]
        self.notes += input_notes.split_notes(config, label, used, dropped, past_end, measured)

    def _measure_captions(self, name: str, inputs: DatasetInputs) -> None:
        lengths = preflight.measure_captions(
            self._config,
            inputs.captions,
            self.used[name, "train"],
            self._backbone,
            inputs.prompts,
            self._cache,
            self._progress,
        )
        label = self._config.label(name, "train")
        self.notes += input_notes.caption_notes(self._config, label, lengths)


def fit(checkpoint: Checkpoint, inputs: Inputs) -> Checkpoint:
    """`checkpoint` with the tensors of this model. Raises CheckpointError where it has others."""
    return validate_for_model(checkpoint, inputs.trainable_shapes, inputs.weights.config.n_layers)


def build_engine(
    config: RunConfig, inputs: Inputs, trainables: dict[str, Tensor], world: World
) -> Engine:
    """The model, with the backbone of the files and these trainables, under DeepSpeed.

    A collective of all ranks.
    """
    with world.raise_together():
        dtype = DTYPES[config.precision]
        attend, attention = choose_attention(config.attention, world.device, dtype)
    model = _make_model(config, inputs, dtype, world)
    _load_weights(model, inputs.weights, trainables, dtype, world)
    recomputed = config.num_checkpointed
    num_checkpointed = len(model.layers) if recomputed is None else recomputed
    no_graphs = why_no_graphs(inputs.ds_config, config.quantize)
    graphs = choose_block_runners(model, attend, num_checkpointed, no_graphs)
    description = f"{attention}, {triton_ops.describe(world.device)}, {graphs}"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == set(inputs.trainable_shapes), "only what the modules declare is trained"
    optimizer = make_optimizer(list(trained.values()), config.weight_decay)
    world.set_phase("building the engine")
    engine = Engine(model, optimizer, inputs.ds_config, dtype, description)
    set_collective_timeout(world.timeout)  # DeepSpeed has made groups of its own
    return engine


def _make_model(config: RunConfig, inputs: Inputs, dtype: torch.dtype, world: World) -> ViCo:
    """The model without values; under ZeRO-3 each rank holds its part of each parameter."""
    linear: MakeLinear = FrozenLinear
    if config.quantize is not None:
        linear = quantized_linear(config.quantize)
    with zero_init(inputs.ds_config, world.device, frozen_group(inputs.ds_config, world)):
        return ViCo(
            inputs.weights.config,
            inputs.num_adapted,
            config.adapter_len,
            config.max_feats,
            config.tau,
            dtype,
            linear,
            feature_width=inputs.trainable_shapes["visual_proj.weight"][1],
        )


def frozen_group(ds_config: dict[str, Any], world: World) -> Any:
    """The ranks over which ZeRO-3 divides a frozen weight; None: all of them. A collective."""
    return world.node_group() if ds_config.get(FROZEN_SHARDS) == IN_NODES else None


def _load_weights(
    model: ViCo, weights: Weights, trainables: dict[str, Tensor], dtype: torch.dtype, world: World
) -> None:
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear | Fp8Linear)
    }
    for name, parameter in model.named_parameters():
        world.set_phase(f"loading {name}")
        if name in trainables:
            load_parameter(parameter, partial(_slice, trainables[name]))
        elif name.rpartition(".")[0] not in linears:
            load_parameter(parameter, partial(weights.read_slice, name))
    for name, linear in linears.items():
        world.set_phase(f"loading {name}")
        if isinstance(linear, Fp8Linear) and is_partitioned(linear.codes):
            read = partial(weights.read_slice, f"{name}.weight")
            _load_partition(linear, read, world.device)
        else:
            linear.fill(weights.read(f"{name}.weight").to(world.device).to(dtype))


def _load_partition(
    linear: Fp8Linear, read: Callable[[int, int], Tensor], device: torch.device
) -> None:
    """Each rank quantizes the rows that its part lies in."""
    num_columns = linear.shape[1]

    @lru_cache(maxsize=1)  # the same rows twice, if the ranks divide their number
    def quantized(first: int, last: int) -> Rows8:
        rows = read(first * num_columns, last * num_columns).view(-1, num_columns)
        return quantize_rows(rows.to(device).to(linear.dtype))

    def codes(start: int, stop: int) -> Tensor:
        first, last = start // num_columns, -(-stop // num_columns)
        numbers = quantized(first, last).numbers_TK.view(torch.uint8).flatten()
        return numbers[start - first * num_columns : stop - first * num_columns]

    load_parameter(linear.codes, codes)
    load_parameter(linear.scale, lambda start, stop: quantized(start, stop).scale_T1.flatten())


def why_no_graphs(ds_config: dict[str, Any], quantize: str | None = None) -> str | None:
    """Why the blocks cannot be captured as CUDA graphs, or not be replayed. None: they can."""
    if quantize in QUANTIZED_BYTES:
        return "--quantize makes weights at every use"
    if ds_config.get("flops_profiler", {}).get("enabled"):
        return "DeepSpeed's flops_profiler waits behind every module"
    if ds_config["zero_optimization"]["stage"] == 3:
        return "ZeRO-3 gathers weights at every use"
    return None


def _slice(value: Tensor, start: int, stop: int) -> Tensor:
    return value.flatten()[start:stop]
