"""What the adapter does to plain language: the adapted model against the frozen one.

Both predict the same text, without a video and with the adapter in place as in a question. The
frozen model is the same one without prompts and gates, so the weights are loaded once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vico.data.micro_batches import DatasetInputs
from vico.data.text_windows import Text, TextChunks, Texts, Window
from vico.data.types import Question
from vico.distributed.world import World
from vico.errors import TrainingError
from vico.train.build import Inputs
from vico.train.config import RunConfig
from vico.train.engine import Engine
from vico.train.evaluate import CHUNKS_PER_STOP_CHECK, score
from vico.train.progress_bar import ProgressBar

# Where the ranges of positions begin that are reported apart.
POSITION_RANGES = (1, 2, 4, 16, 64, 256, 1024, 4096)
LOGGED = ("perplexity_frozen", "perplexity_adapted", "kl_per_token", "top1_agreement")
BITS_OF_ANY_BYTE = 8  # of a model that knows nothing: a text of random bytes has as many
NUM_MEASURES = 6  # of a token, by compare_predictions of model/ops/logits.py


@dataclass(frozen=True)
class Measured:
    """Sums over tokens, by which any part of a text is described."""

    num_tokens: int
    losses_frozen: float  # sum of cross-entropies, nats
    losses_adapted: float
    kl: float  # sum of KL(frozen || adapted), nats
    num_agreeing: int  # tokens where both models find the same one the likeliest
    num_right_frozen: int  # tokens that the model found the likeliest
    num_right_adapted: int

    @classmethod
    def of(cls, measures_6N: Tensor) -> "Measured":
        frozen, adapted, kl, *counts = measures_6N.sum(dim=1).tolist()
        return cls(measures_6N.shape[1], frozen, adapted, kl, *map(int, counts))

    def to_json(self, num_bytes: int | None = None) -> dict[str, Any]:
        """`num_bytes`: of the whole text, which tells the bits per byte."""
        n = self.num_tokens
        result = {
            "tokens": n,
            "perplexity_frozen": _exp(self.losses_frozen / n),
            "perplexity_adapted": _exp(self.losses_adapted / n),
            "kl_per_token": self.kl / n,
            "top1_agreement": self.num_agreeing / n,
            "top1_accuracy_frozen": self.num_right_frozen / n,
            "top1_accuracy_adapted": self.num_right_adapted / n,
        }
        if num_bytes is not None:
            for name in ("frozen", "adapted"):
                bits = getattr(self, f"losses_{name}") / math.log(2)
                result[f"bits_per_byte_{name}"] = bits / num_bytes
        return result


def _exp(mean_loss: float) -> float:
    """The perplexity of a mean cross-entropy. The largest float where it is above all floats."""
    return math.exp(min(mean_loss, math.log(math.nextafter(math.inf, 0))))


@dataclass(frozen=True)
class TextMeasures:
    """Every token of some texts, measured."""

    texts: Sequence[Text]
    measures_6N: Tensor  # float64, on the host, in the order of the texts
    positions_N: Tensor  # int64: of each token in its window; BOS is 0

    def to_json(self) -> dict[str, Any]:
        """All texts together; then each, and each range of positions."""
        result = Measured.of(self.measures_6N).to_json(sum(t.num_bytes for t in self.texts))
        result["files"] = {str(text.path): part for text, part in self._files()}
        result["positions"] = self._positions()
        return result

    def summary(self) -> dict[str, Any]:
        """What the log of a training has: of all texts together, and of each."""
        in_all = Measured.of(self.measures_6N).to_json()
        return {**in_all, "files": {str(text.path): part for text, part in self._files()}}

    def curves(self) -> dict[str, float]:
        """Of all texts together and, where there are several, of each under its name."""
        in_all = Measured.of(self.measures_6N).to_json()
        curves = {f"cognition/{name}": in_all[name] for name in LOGGED}
        files = self._files() if len(self.texts) > 1 else []
        names = [text.path.name for text, _ in files]
        for text, part in files:
            is_unique = names.count(text.path.name) == 1
            label = text.path.name if is_unique else str(text.path)
            curves |= {f"cognition/{label}/{name}": part[name] for name in LOGGED}
        return curves

    def _files(self) -> list[tuple[Text, dict[str, Any]]]:
        parts = self.measures_6N.split([len(t.token_ids) for t in self.texts], dim=1)
        pairs = zip(self.texts, parts, strict=True)
        return [(text, Measured.of(part).to_json(text.num_bytes)) for text, part in pairs]

    def _positions(self) -> list[dict[str, Any]]:
        """Of the ranges of positions that hold a token: how much context a token has counts."""
        rows = []
        for first, after in zip(POSITION_RANGES, (*POSITION_RANGES[1:], math.inf), strict=True):
            inside_N = (self.positions_N >= first) & (self.positions_N < after)
            if inside_N.any():
                last = int(self.positions_N[inside_N].max())
                part = Measured.of(self.measures_6N[:, inside_N])
                rows.append({"first": first, "last": last, **part.to_json()})
        return rows

    def table(self) -> str:
        """As text for people, with a note on each text that the frozen model does not know."""
        head = f"  {'':<24}{'tokens':>9}{'frozen':>10}{'adapted':>10}{'KL':>10}{'same top':>10}"
        rows = [
            "perplexity of the frozen and the adapted model, KL per token (nats; 0: unchanged), "
            "same likeliest token:",
            head,
        ]
        files = self._files()
        for text, part in files:
            rows.append(_row(text.path.name, part))
        if len(self.texts) > 1:
            rows.append(_row("all texts", Measured.of(self.measures_6N).to_json()))
        rows.append("the same by position in the window (1: the first token behind BOS):")
        for part in self._positions():
            rows.append(_row(f"positions {part['first']} to {part['last']}", part))
        for text, part in files:
            if (bits := part["bits_per_byte_frozen"]) > BITS_OF_ANY_BYTE:
                rows.append(
                    f"note: {text.path}: the frozen model needs {bits:.1f} bits per byte, where "
                    f"random bytes need {BITS_OF_ANY_BYTE}: it does not know such text, so these "
                    "numbers say little; take a text like those that it was trained on"
                )
        return "\n".join(rows)


def _row(name: str, part: dict[str, Any]) -> str:
    frozen, adapted = (_short(part[f"perplexity_{model}"]) for model in ("frozen", "adapted"))
    agreement = part["top1_agreement"]
    return (
        f"  {name[:23]:<24}{part['tokens']:>9,}{frozen:>10}{adapted:>10}"
        f"{part['kl_per_token']:>10.5f}{agreement:>10.2%}"
    )


def _short(perplexity: float) -> str:
    """At most nine characters, so that columns stay apart."""
    return f"{perplexity:.3f}" if perplexity < 99_999 else f"{perplexity:.3g}"


def measure_texts(engine: Engine, texts: Texts, inputs: Inputs, world: World) -> TextMeasures:
    """Run the frozen and the adapted model over every token. A collective: all ranks get all.

    The numbers are the same for any number of ranks, bit for bit. Raises TrainingError for losses
    that are not finite, Stopped on a stop signal.
    """
    made = texts.windows()
    what = f"{made[-1].stop:,} tokens of text"
    table_6N = measure_windows(engine, made, inputs, world, what)
    positions_N = torch.cat([torch.arange(1, w.stop - w.start + 1) for w in made])
    return TextMeasures(texts.files, table_6N, positions_N)


def measured_texts(engine: Engine, inputs: Inputs, world: World) -> dict[str, Any]:
    """{"cognition": of the texts of --text, as log.txt has it}, and prints it as a table.

    Empty where there are none. A collective; raises as `measure_texts` does.
    """
    if not inputs.texts.files:
        return {}
    measures = measure_texts(engine, inputs.texts, inputs, world)
    world.print_rank0(measures.table())
    return {"cognition": measures.summary()}


def measure_windows(
    engine: Engine,
    made: Sequence[Window],
    inputs: Inputs,
    world: World,
    what: str,
    share: bool = False,
) -> Tensor:
    """`compare_predictions` float64 [6, N] of the windows' targets, in their order.

    A collective: all ranks give the same windows and get all measures. `what`: named by the
    progress. `share`: equal beginnings of windows run once. Raises as `measure_texts` does.
    """
    num_slots = inputs.trainable_shapes["temporal_emb.weight"][0]
    width = inputs.trainable_shapes["visual_proj.weight"][1]
    no_features = torch.zeros(0, num_slots, width)
    chunks = TextChunks(made, no_features, world.rank, world.size, share)
    table_6N = torch.zeros(NUM_MEASURES, made[-1].stop, dtype=torch.float64)
    engine.train(False)
    with (
        torch.no_grad(),
        ProgressBar(f"measuring {what}", len(chunks), "batch", world.is_main) as bar,
    ):
        for number in range(len(chunks)):
            chunk = chunks[number]
            world.set_phase(f"batch {number + 1} of the texts")
            measures_6n = engine.compare(chunk.batch.to(world.device)).cpu()
            if chunk.windows:
                table_6N[:, chunk.windows[0].start : chunk.windows[-1].stop] = measures_6n
            bar.advance()
            if (number + 1) % CHUNKS_PER_STOP_CHECK == 0:
                world.raise_if_stopped(f"stopped in the measurement of {what}; start it again")
    world.sum(table_6N)  # each token is one rank's, so no bit changes
    if not table_6N.isfinite().all():
        raise TrainingError(
            "the losses of the texts are not finite; try --precision bf16 or fp32, or another "
            "checkpoint"
        )
    return table_6N


def scores_without_video(
    engine: Engine, inputs: Inputs, config: RunConfig, world: World
) -> tuple[list[list[float]], list[list[float]]]:
    """Option scores of config.split's questions by their text alone: (frozen, adapted) model.

    A collective.
    """
    bare = without_video(inputs)
    questions: Sequence[Question] = inputs.questions[config.split]
    label = f"{config.split} (without video)"
    adapted = score(engine, bare, questions, label, config, world, num_slots=0)
    with engine.closed_gates():
        frozen = score(engine, bare, questions, label, config, world, num_slots=0)
    return frozen, adapted


def without_video(inputs: Inputs) -> Inputs:
    """With prompts that have no video slots; for `score` with num_slots=0."""
    datasets = {}
    for name, d in inputs.datasets.items():
        datasets[name] = DatasetInputs(d.features, d.prompts.without_video(), {})
    return replace(inputs, datasets=datasets)
