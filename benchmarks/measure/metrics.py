"""From times to figures: which FLOPs are useful, which are run, and their share of a peak. Each formula stands here once.

P is the number of parameters of the layers' products. The backbone is frozen, so a training step needs 2 P FLOPs per token
forward and 2 P for the gradient of the input, none for weights: 4 P, not 6 P.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measure.clocks import spread
from benchmarks.measure.workload import ScoringWork, TrainingWork
from vico.data.types import TokenSequence
from vico.model.batch import PackedBatch, Segment
from vico.model.config import LlamaConfig

UNKNOWN = "n/a"
FORMULAS = {
    "P": "layers x (4 dim^2 + 3 dim hidden), less where heads share keys and values: the parameters of the layers' products",
    "real_tokens": "tokens of all sequences, each counted whole, padding never",
    "padded_tokens": "rows that run through the layers: padding included, a shared beginning once",
    "target_tokens": "tokens that carry a loss",
    "MFU": "4 P x real tokens/s / peak of the datasheet (scoring: 2 P)",
    "HFU": "FLOPs of the products that run / seconds / peak: 4 P per row (scoring: 2 P), 4 V dim per row of the head (2), "
    "12 dim per layer and pair of query and key (4); the last layer's unasked rows left out; recomputation not counted",
    "share_of_measured_ceiling": "4 P x real tokens/s / the rate of the matrix product measured in this run (scoring: 2 P)",
}


def layer_parameters(shape: LlamaConfig) -> int:
    keys_and_values = 2 * shape.dim * shape.head_dim * shape.kv_heads
    return shape.n_layers * (2 * shape.dim**2 + keys_and_values + 3 * shape.dim * shape.hidden_dim)


def all_parameters(shape: LlamaConfig) -> int:
    """Of the frozen backbone."""
    return (
        layer_parameters(shape)
        + 2 * shape.vocab_size * shape.dim
        + (2 * shape.n_layers + 1) * shape.dim
    )


@dataclass(frozen=True)
class Amount:
    """How much one timed piece of work was."""

    real_tokens: int
    padded_tokens: int
    target_tokens: int
    samples: int
    questions: int
    useful_flops: float
    run_flops: float


def _run_flops(
    shape: LlamaConfig, rows: int, head_rows: int, pairs: float, spared: float, training: bool
) -> float:
    """`spared`: parameters times rows that the last layer leaves out."""
    layers = layer_parameters(shape) * rows - spared
    head = shape.vocab_size * shape.dim * head_rows
    attention = shape.n_layers * shape.dim * pairs
    return (4 if training else 2) * (layers + head) + (12 if training else 4) * attention


def of_plain(
    shape: LlamaConfig, work: TrainingWork | ScoringWork, limits: tuple[int, int]
) -> Amount:
    """The baseline pads VQA and captions to `limits` and runs the head on every row."""
    training = isinstance(work, TrainingWork)
    if isinstance(work, TrainingWork):
        batches: tuple[tuple[tuple[TokenSequence, ...], int], ...]
        batches, questions = (
            ((work.vqa, limits[0]), (work.cap, limits[1])),
            len(work.vqa) or len(work.cap),
        )
    else:
        batches, questions = (
            ((tuple(s for q in work.questions for s in q), limits[0]),),
            len(work.questions),
        )
    rows, pairs = (
        sum(len(s) * width for s, width in batches),
        sum(len(s) * width**2 for s, width in batches),
    )
    sequences = [s for group, _ in batches for s in group]
    useful = (4 if training else 2) * layer_parameters(shape) * work.num_real_tokens
    run = _run_flops(shape, rows, rows, pairs, 0, training)
    return Amount(
        work.num_real_tokens,
        rows,
        sum(len(s.targets) for s in sequences),
        len(sequences),
        questions,
        useful,
        run,
    )


def of_packed(
    shape: LlamaConfig, batches: Sequence[PackedBatch], samples: int, questions: int, training: bool
) -> Amount:
    rows, wanted = sum(b.num_rows for b in batches), sum(len(b.wanted_rows_R) for b in batches)
    real, targets = (
        sum(b.num_real_tokens for b in batches),
        sum(len(b.target_tasks) for b in batches),
    )
    in_last = (
        2 * shape.dim**2 + 3 * shape.dim * shape.hidden_dim
    )  # wq, wo and the feed-forward; keys and values need all rows
    pairs = float(sum(visible_pairs(b.segments) for b in batches))
    useful = (4 if training else 2) * layer_parameters(shape) * real
    run = _run_flops(shape, rows, wanted, pairs, (rows - wanted) * in_last, training)
    return Amount(real, rows, targets, samples, questions, useful, run)


def visible_pairs(segments: Sequence[Segment]) -> int:
    """Pairs of query and key in one layer of a packed stream."""
    above = [0] * len(segments)  # rows of each segment's ancestors
    total = 0
    for i, segment in enumerate(segments):
        rows = segment.stop - segment.start
        if segment.parent is not None:
            parent = segments[segment.parent]
            above[i] = above[segment.parent] + parent.stop - parent.start
        total += rows * above[i] + rows * (rows + 1) // 2
    return total


def rates(
    seconds: Sequence[float],
    amounts: Sequence[Amount],
    peak_tflops: float | None,
    ceiling_tflops: float,
    devices: int = 1,
) -> dict[str, Any]:
    """Spreads over the timed pieces; shares are of all `devices` together."""

    def per_second(name: str) -> dict[str, float]:
        return spread([getattr(a, name) / s for a, s in zip(amounts, seconds, strict=True)])

    def share(name: str, tflops: float | None) -> dict[str, float] | str:
        if tflops is None:
            return UNKNOWN
        return spread(
            [
                getattr(a, name) / s / (tflops * 1e12 * devices)
                for a, s in zip(amounts, seconds, strict=True)
            ]
        )

    return {
        "seconds": spread(seconds),
        **{
            f"{name}_per_second": per_second(name)
            for name in ("real_tokens", "padded_tokens", "target_tokens", "samples", "questions")
        },
        "mfu": share("useful_flops", peak_tflops),
        "hfu": share("run_flops", peak_tflops),
        "share_of_measured_ceiling": share("useful_flops", ceiling_tflops),
    }


def median_of(figure: Any) -> float | None:
    """The median of a spread, or None of "n/a"."""
    return float(figure["median"]) if isinstance(figure, dict) else None


def say_formulas() -> None:
    for name, formula in FORMULAS.items():
        print(f"  {name} = {formula}", flush=True)
