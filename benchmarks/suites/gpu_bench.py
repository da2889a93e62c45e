"""The `gpu` suite's models under test, the steps they run, and where their samples come from."""

import argparse
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.baseline.models import make_shared_pair
from benchmarks.baseline.variants import Packed, Plain, scoring_batches, training_batch
from benchmarks.measure.lengths import MAX_CAP_LEN, MAX_SEQ_LEN, NUM_OPTIONS, Lengths
from benchmarks.measure.metrics import WorkCounts, count_packed, count_plain
from benchmarks.measure.workload import ScoringWork, SyntheticWorkload, TrainingWork
from vico.io import log
from vico.model.attention.backends import choose_attention
from vico.model.batch import PackedBatch
from vico.model.block_runners import choose_block_runners
from vico.model.config import MAX_GRAPH_ROWS, LlamaConfig
from vico.model.ops import triton_ops
from vico.train.backbone import DTYPES
from vico.train.optim import make_optimizer

LIMITS = (MAX_SEQ_LEN, MAX_CAP_LEN)
VARIANTS = ("plain", "fast")
LONG = "both_long"  # the kind of training steps with the longer captions
Result = list[float] | torch.Tensor  # losses, or scores


@dataclass(frozen=True)
class Item:
    """What a data worker sends: the work, and for the fast variant its packed streams."""

    work: TrainingWork | ScoringWork
    batches: tuple[PackedBatch, ...] = ()

    def pin_memory(self) -> "Item":
        return Item(self.work, tuple(batch.pin_memory() for batch in self.batches))

    @property
    def num_questions(self) -> int:
        if isinstance(self.work, ScoringWork):
            return len(self.work.questions)
        return len(self.work.vqa) or len(self.work.cap)

    @property
    def num_sequences(self) -> int:
        if isinstance(self.work, ScoringWork):
            return NUM_OPTIONS * len(self.work.questions)
        return len(self.work.vqa) + len(self.work.cap)


@dataclass(frozen=True)
class WorkItems(Dataset[Item]):
    """Steps of one kind, by index."""

    workload: SyntheticWorkload
    kind: str  # "vqa", "cap", "both", LONG (training), or "score"
    num: int  # questions of a training step, videos of a scoring step
    packed: bool
    score_tokens: int

    def __getitem__(self, index: int) -> Item:
        if self.kind == "score":
            scoring = self.workload.scoring(index, self.num)
            if not self.packed:
                return Item(scoring)
            return Item(scoring, tuple(scoring_batches(scoring, score_tokens=self.score_tokens)))
        work = self.workload.training(index, self.num)
        if self.kind == "vqa":
            work = replace(work, cap=())
        elif self.kind == "cap":
            work = replace(work, vqa=())
        return Item(work, (training_batch(work),) if self.packed else ())


@dataclass(frozen=True)
class Bench:
    """The models under test, and what a measurement of them needs."""

    plain: Plain
    fast: Packed
    optimizer: torch.optim.Optimizer
    config: LlamaConfig
    workload: SyntheticWorkload
    long_workload: SyntheticWorkload  # with the longer captions
    device: torch.device
    args: argparse.Namespace
    peak_tflops: float | None
    ceiling_tflops: float

    def dataset(self, kind: str, num: int, variant: str) -> WorkItems:
        workload = self.long_workload if kind == LONG else self.workload
        return WorkItems(workload, kind, num, variant == "fast", self.args.score_tokens)

    def items(self, kind: str, num: int, variant: str, count: int) -> Iterator[Item]:
        """The first `count` steps, from data workers."""
        loader = DataLoader(
            self.dataset(kind, num, variant),
            sampler=range(count),
            batch_size=None,
            num_workers=self.args.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    def run(self, variant: str, item: Item) -> Result:
        """One step: forward, backward, update; or the scores of some videos."""
        if isinstance(item.work, ScoringWork):
            if variant == "plain":
                return self.plain.score(item.work)
            return self.fast.score_batches(item.batches)
        if variant == "plain":
            losses = self.plain.train(item.work)
        else:
            losses = self.fast.train_batch(item.batches[0])
        # The learning rate is 0: the update does all of its work, and both variants keep the
        # same weights.
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses

    def count(self, variant: str, item: Item) -> WorkCounts:
        """How much work a step is."""
        if variant == "plain":
            return count_plain(self.config, item.work, LIMITS)
        training = isinstance(item.work, TrainingWork)
        num_sequences, num_questions = item.num_sequences, item.num_questions
        return count_packed(self.config, item.batches, num_sequences, num_questions, training)

    def capture_graphs(self, kind: str, num: int, count: int) -> None:
        """Runs each size of these training steps twice, which captures it as CUDA graphs.

        A training run captures once and replays for hours.
        """
        graphs = self.fast.model.graphed
        if graphs is None or kind == "score":
            return
        for item in self.items(kind, num, "fast", count):
            short = [batch for batch in item.batches if batch.num_rows < MAX_GRAPH_ROWS]
            for _ in range(2):
                if not all(graphs.is_captured(batch.segments) for batch in short):
                    self.run("fast", item)

    def discard_graphs(self) -> None:
        """The next step launches its kernels one by one.

        Only then does the profiler know them, and the allocator count their memory.
        """
        model = self.fast.model
        choose_block_runners(model, model.attend, model.num_checkpointed)
        gc.collect()


def make_bench(
    args: argparse.Namespace,
    config: LlamaConfig,
    device: torch.device,
    peak_tflops: float | None,
    ceiling_tflops: float,
) -> Bench:
    dtype = DTYPES[args.precision]
    plain, fast = make_shared_pair(config, dtype, device, args.seed)
    attend, reason = choose_attention(args.attention, device, dtype)
    graphs = choose_block_runners(fast, attend)
    log.info(f"fast: {reason}, {triton_ops.describe(device)}, {graphs}")
    long_lengths = Lengths.load().with_long_captions()
    optimizer = make_optimizer([p for p in fast.parameters() if p.requires_grad], weight_decay=0.14)
    return Bench(
        Plain(plain, device),
        Packed(fast, device, score_tokens=args.score_tokens),
        optimizer,
        config,
        SyntheticWorkload(config.vocab_size, seed=args.seed),
        SyntheticWorkload(config.vocab_size, seed=args.seed, lengths=long_lengths),
        device,
        args,
        peak_tflops,
        ceiling_tflops,
    )
