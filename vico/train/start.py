"""Everything before the first step: check the files, build the model, find the position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch.utils.data import DataLoader

from vico.checkpoint.format import Checkpoint, TrainState
from vico.checkpoint.write import RunIdentity
from vico.data.batching import TrainingSteps
from vico.data.dataloader import start_forkserver
from vico.data.evaluation_batches import Chunk
from vico.data.text_windows import NO_TEXTS, KeptTexts, Texts
from vico.distributed.world import World
from vico.io import log, streams
from vico.io.failpoints import reached
from vico.io.output_dir import OutputDir
from vico.model.vico import initial_trainables
from vico.train import reporters, shared_digests
from vico.train.build import Inputs, build_engine, fit, read_inputs
from vico.train.config import RunConfig
from vico.train.engine import Engine
from vico.train.eval_captions import CaptionedVideos
from vico.train.evaluate import chunk_loader
from vico.train.optim import learning_rate, peak_learning_rate
from vico.train.rank_consistency import require_same_files, require_same_start
from vico.train.resume import (
    find_start,
    keep_max_tokens,
    notes_of_uncompared,
    refuse_other_function,
    start_state,
    with_text_of,
)
from vico.train.settings import training_splits


@dataclass(frozen=True)
class Run:
    """A run that is ready to train. Only `state` changes while it runs."""

    config: RunConfig
    world: World
    output_dir: OutputDir
    inputs: Inputs
    engine: Engine
    steps: TrainingSteps
    state: TrainState
    identity: RunIdentity
    from_scratch: bool  # no checkpoint was loaded
    evaluated_split: str | None  # after each epoch
    captioned_videos: CaptionedVideos | None = None  # with each evaluation

    @property
    def measured_texts(self) -> Texts:
        """With each evaluation."""
        return NO_TEXTS if self.evaluated_split is None else self.inputs.texts

    @cached_property
    def evaluation_batches(self) -> DataLoader[Chunk]:
        """Of the evaluated split. Its workers live as long as the run: they open many files."""
        assert self.evaluated_split is not None
        questions = self.inputs.questions[self.evaluated_split]
        return chunk_loader(self.inputs, questions, self.config, self.world, keep_workers=True)

    @property
    def last_step(self) -> int:
        steps = self.config.epochs * self.steps.steps_per_epoch
        return min(steps, self.config.max_steps or steps)

    @property
    def limit(self) -> str:
        """The flag that ends the run at `last_step`."""
        whole = self.config.epochs * self.steps.steps_per_epoch
        return "--max_steps" if self.last_step < whole else "--epochs"

    @property
    def is_complete(self) -> bool:
        return self.state.step >= self.last_step and not self.state.evaluation_due

    @property
    def peak_lr(self) -> float:
        config = self.config
        return peak_learning_rate(config.lr, config.blr, self.steps.questions_per_step)

    def lr(self, step: int) -> float:
        """The learning rate of the update after `step` steps."""
        config, steps_per_epoch = self.config, self.steps.steps_per_epoch
        warmup, epochs = config.warmup_epochs, config.epochs
        return learning_rate(step, steps_per_epoch, self.peak_lr, config.min_lr, warmup, epochs)


def start(config: RunConfig, world: World) -> Run:
    """Check all files, find the checkpoint to start from, build the model. A collective.

    Raises UserError, on all ranks, for bad input.
    """
    output_dir = OutputDir(config.output_dir)
    _claim(output_dir, world)
    if output_dir.has_run():
        streams.keep_lost_output(output_dir.lost_output)
    require_same_files(world, config)
    world.set_phase("reading the inputs")
    if config.num_workers:
        start_forkserver()
    own_splits = training_splits(config)
    splits = tuple(dict.fromkeys((*own_splits, config.split if config.init_eval else "train")))
    with world.raise_together():
        if world.is_main:
            reporters.chosen(config.report_to)  # before minutes of loading
        found = find_start(config)
        config = keep_max_tokens(config, found, on_gpu=world.device.type == "cuda")
        inputs = read_inputs(config, splits, world)
        reached("inputs")
        checkpoint = fit(found.checkpoint, inputs) if found.checkpoint else None
        captioned = _captioned_videos(config, inputs, own_splits)
    require_same_start(world, checkpoint, found.notes, inputs.counts)
    if world.is_first_of_host:
        inputs.cache.flush()
    of_captions = [] if captioned is None else [captioned.note]
    of_checkpoint = checkpoint.notes if checkpoint else ()
    for note in (*found.notes, *inputs.notes, *of_captions, *of_checkpoint):
        world.print_rank0(note)
    if inputs.max_tokens is not None:
        config = replace(config, max_tokens=inputs.max_tokens)
    steps = _training_steps(config, inputs, world)
    # Before the weights, which take minutes to load: may this run continue that checkpoint?
    fingerprints, state = _check_continuation(config, world, inputs, checkpoint, steps, own_splits)
    if checkpoint is None:
        trainables = initial_trainables(inputs.trainable_shapes, config.bias, config.seed)
    else:
        trainables = checkpoint.weights
    engine = build_engine(config, inputs, trainables, world)
    with world.raise_together():
        inputs.files.check_unchanged()  # the weights have been read a second time
    features = [dataset.features for dataset in inputs.datasets.values()]
    inputs.files.watch_only([path for opened in features for path in opened.paths])
    if checkpoint is not None and checkpoint.moments is not None:
        engine.set_moments(checkpoint.moments, state.num_updates)
    identity = RunIdentity(found.run_id, config.to_json(), fingerprints)
    parts = (config, world, output_dir, inputs, engine, steps, state, identity)
    run = Run(*parts, checkpoint is None, _evaluated_split(own_splits), captioned)
    if checkpoint is not None and checkpoint.moments is not None and not checkpoint.published:
        for note in _notes_of_other_epochs(run, checkpoint.settings.get("epochs")):
            world.print_rank0(note)
    return run


def _evaluated_split(splits: Sequence[str]) -> str | None:
    return splits[1] if len(splits) > 1 else None


def _captioned_videos(
    config: RunConfig, inputs: Inputs, splits: Sequence[str]
) -> CaptionedVideos | None:
    """Of --eval_captions. Raises UserError."""
    split = _evaluated_split(splits)
    if config.eval_captions is None or split is None:
        return None
    return CaptionedVideos(inputs, split, config.eval_captions, config.max_feats)


def _notes_of_other_epochs(run: Run, before: object) -> list[str]:
    """A note where the checkpoint's run had another number of epochs: its schedule was another."""
    now, step = run.config.epochs, run.state.step
    if not isinstance(before, int) or before == now or step == 0:
        return []
    earlier = replace(run, config=replace(run.config, epochs=before))
    return [
        f"note: --epochs {before} -> {now}: the learning-rate schedule spans all {now} epochs, so "
        f"step {step + 1} takes {run.lr(step):.2e}, where step {step} took "
        f"{earlier.lr(step - 1):.2e}; that is not the run of {now} epochs from the start"
    ]


def open_evaluation(
    config: RunConfig, checkpoint: Checkpoint, world: World
) -> tuple[Inputs, Checkpoint]:
    """The checked files of config.split, and `checkpoint` with this model's tensors. A collective.

    Raises UserError, on all ranks, for bad input.
    """
    with world.raise_together():
        inputs = read_inputs(config, (config.split,), world)
    return inputs, fit_and_compare(config, checkpoint, inputs, world)


def fit_and_compare(
    config: RunConfig, checkpoint: Checkpoint, inputs: Inputs, world: World
) -> Checkpoint:
    """`checkpoint` with this model's tensors, if it was trained with these files. A collective.

    Raises UserError, on all ranks, where it was not.
    """
    with world.raise_together():
        checkpoint = fit(checkpoint, inputs)
    require_same_start(world, checkpoint, (), inputs.counts)
    recorded = checkpoint.fingerprints
    hosts = {member.host for member in world.members}
    if not recorded and len(hosts) <= 1 and not config.verify:
        return checkpoint  # there is nothing to compare with
    fingerprints = _fingerprints(config, inputs, tuple(inputs.questions), recorded, world)
    with world.raise_together():
        notes = refuse_other_function(checkpoint, config, fingerprints)
    for note in (*notes, *notes_of_uncompared(checkpoint, fingerprints)):
        world.print_rank0(note)
    return checkpoint


def _claim(output_dir: OutputDir, world: World) -> None:
    """Claim the folder on rank 0 where it holds a run, before anything is read from it."""
    with world.raise_together():
        if world.is_main and output_dir.has_run():
            for note in output_dir.claim():
                log.info(note)


def _fingerprints(
    config: RunConfig,
    inputs: Inputs,
    splits: Sequence[str],
    recorded: Mapping[str, str],
    world: World,
) -> dict[str, str]:
    """Of all that a run over these splits reads, the same on all hosts. A collective."""
    sources, files, cache = inputs.sources(splits), inputs.files, inputs.cache
    fingerprints = shared_digests.of_run(sources, recorded, files, cache, world, config.verify)
    if world.is_first_of_host:
        inputs.cache.flush()
    return fingerprints


def _training_steps(config: RunConfig, inputs: Inputs, world: World) -> TrainingSteps:
    return TrainingSteps(
        inputs.questions["train"],
        inputs.datasets,
        config.datasets,
        num_slots=config.max_feats,
        tasks=config.tasks,
        micro_batch_size=config.batch_size,
        accumulation=config.accum_iter,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        shuffle=not config.no_shuffle,
        crop=config.caption_crop == "sentence",
        max_tokens=config.max_tokens or None,
        kept=KeptTexts(inputs.texts) if config.keep else None,
    )


def _check_continuation(
    config: RunConfig,
    world: World,
    inputs: Inputs,
    checkpoint: Checkpoint | None,
    steps: TrainingSteps,
    splits: Sequence[str],
) -> tuple[dict[str, str], TrainState]:
    """(fingerprints of all inputs, the training state to start from). A collective."""
    recorded = checkpoint.fingerprints if checkpoint else {}
    fingerprints = _fingerprints(config, inputs, splits, recorded, world)
    with world.raise_together():
        state = start_state(
            checkpoint, steps.steps_per_epoch, steps.questions_per_step, config, fingerprints
        )
    if checkpoint is not None:
        for note in notes_of_uncompared(checkpoint, fingerprints):
            world.print_rank0(note)
    return with_text_of(checkpoint, fingerprints), state
