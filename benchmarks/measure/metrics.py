"""From times to metrics: FLOPs that are useful, FLOPs that run, and their share of a peak rate.

P is the number of parameters of the layers' matrix products. The backbone is frozen, so a training
step needs 2 P FLOPs per token forward and 2 P for the gradient of the input, none for weights:
4 P, not 6 P.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measure.spreads import UNKNOWN, ratio_spread, spread
from benchmarks.measure.workload import ScoringWork, TrainingWork
from vico.data.types import TokenSequence
from vico.io import log
from vico.model.batch import PackedBatch, Segment
from vico.model.config import LlamaConfig

FORMULAS = {
    "P": "parameters of the layers' products: layers x (4 dim^2 + 3 dim hidden), "
    "less where heads share keys and values",
    "real_tokens": "tokens of all sequences, each counted whole, without padding",
    "padded_tokens": "rows that run through the layers: with padding, a shared prefix once",
    "target_tokens": "tokens that have a loss",
    "MFU": "4 P x real tokens/s / peak of the datasheet (scoring: 2 P)",
    "HFU": "FLOPs of the products that run / seconds / peak: 4 P per row (scoring: 2 P), "
    "4 V dim per row of the head (2), 12 dim per layer and pair of query and key (4); "
    "rows that the last layer leaves out and recomputation are not counted",
    "share_of_measured_ceiling": "4 P x real tokens/s / the rate of the matrix product "
    "measured in this run (scoring: 2 P)",
}


def layer_parameters(config: LlamaConfig) -> int:
    """P: the parameters of all layers' matrix products."""
    return config.n_layers * config.num_block_parameters


@dataclass(frozen=True)
class WorkCounts:
    """How much one timed piece of work was."""

    real_tokens: int
    padded_tokens: int
    target_tokens: int
    samples: int
    questions: int
    useful_flops: float
    run_flops: float


def _useful_flops(config: LlamaConfig, real_tokens: int, training: bool) -> float:
    return (4 if training else 2) * layer_parameters(config) * real_tokens


def _run_flops(
    config: LlamaConfig,
    rows: int,
    head_rows: int,
    attention_pairs: float,
    skipped: float,
    training: bool,
) -> float:
    """`skipped`: parameters times rows that the last layer leaves out."""
    layers = layer_parameters(config) * rows - skipped
    head = config.vocab_size * config.dim * head_rows
    attention = config.n_layers * config.heads_dim * attention_pairs
    return (4 if training else 2) * (layers + head) + (12 if training else 4) * attention


def count_plain(
    config: LlamaConfig, work: TrainingWork | ScoringWork, limits: tuple[int, int]
) -> WorkCounts:
    """Counts of the baseline: it pads VQA and captions to `limits`, its head runs on every row."""
    vqa: Sequence[TokenSequence]
    captions: Sequence[TokenSequence]
    if isinstance(work, TrainingWork):
        vqa, captions = work.vqa, work.cap
        num_questions = len(vqa) or len(captions)
    else:
        vqa, captions = [option for options in work.questions for option in options], ()
        num_questions = len(work.questions)
    training = isinstance(work, TrainingWork)
    sequences = [*vqa, *captions]
    rows = len(vqa) * limits[0] + len(captions) * limits[1]
    pairs = len(vqa) * limits[0] ** 2 + len(captions) * limits[1] ** 2
    return WorkCounts(
        real_tokens=work.num_real_tokens,
        padded_tokens=rows,
        target_tokens=sum(len(s.targets) for s in sequences),
        samples=len(sequences),
        questions=num_questions,
        useful_flops=_useful_flops(config, work.num_real_tokens, training),
        run_flops=_run_flops(config, rows, rows, pairs, 0, training),
    )


def count_packed(
    config: LlamaConfig,
    batches: Sequence[PackedBatch],
    samples: int,
    questions: int,
    training: bool,
) -> WorkCounts:
    """Counts of packed streams: the last layer and the head run on rows that predict a target."""
    rows = sum(batch.num_rows for batch in batches)
    head_rows = sum(len(batch.wanted_rows_R) for batch in batches)
    real_tokens = sum(batch.num_real_tokens for batch in batches)
    pairs = float(sum(visible_pairs(batch.segments) for batch in batches))
    # wq, wo and the feed-forward; keys and values need all rows.
    last_layer = config.dim * (2 * config.heads_dim + 3 * config.hidden_dim)
    skipped = (rows - head_rows) * last_layer
    return WorkCounts(
        real_tokens=real_tokens,
        padded_tokens=rows,
        target_tokens=sum(len(batch.target_tasks) for batch in batches),
        samples=samples,
        questions=questions,
        useful_flops=_useful_flops(config, real_tokens, training),
        run_flops=_run_flops(config, rows, head_rows, pairs, skipped, training),
    )


def visible_pairs(segments: Sequence[Segment]) -> int:
    """Pairs of query and key in one layer of a packed stream."""
    ancestor_rows = [0] * len(segments)
    total = 0
    for i, segment in enumerate(segments):
        rows = segment.stop - segment.start
        if segment.parent is not None:
            parent = segments[segment.parent]
            ancestor_rows[i] = ancestor_rows[segment.parent] + parent.stop - parent.start
        total += rows * ancestor_rows[i] + rows * (rows + 1) // 2
    return total


def rates(
    seconds: Sequence[float],
    counts: Sequence[WorkCounts],
    peak_tflops: float | None,
    ceiling_tflops: float,
    num_devices: int = 1,
) -> dict[str, Any]:
    """Spreads over the timed pieces of work; shares are of all devices together."""

    def per_second(field: str) -> dict[str, float]:
        return ratio_spread([getattr(c, field) for c in counts], seconds)

    def share(field: str, tflops: float | None) -> dict[str, float] | str:
        if tflops is None:
            return UNKNOWN
        peak = tflops * 1e12 * num_devices
        return spread([getattr(c, field) / s / peak for c, s in zip(counts, seconds, strict=True)])

    fields = ("real_tokens", "padded_tokens", "target_tokens", "samples", "questions")
    return {
        "seconds": spread(seconds),
        **{f"{field}_per_second": per_second(field) for field in fields},
        "mfu": share("useful_flops", peak_tflops),
        "hfu": share("run_flops", peak_tflops),
        "share_of_measured_ceiling": share("useful_flops", ceiling_tflops),
    }


def print_formulas() -> None:
    for name, formula in FORMULAS.items():
        log.info(f"  {name} = {formula}")
