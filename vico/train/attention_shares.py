"""Where a checkpoint's attention goes when it answers: to the adapter prompt, the video, the text.

A head's weights over the rows that it sees sum to 1, those over the prompt to 1 as well, times
|tanh(gate1)|. A share is a part of both together, so the three shares of a head sum to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vico.data.evaluation_batches import EvaluationChunks
from vico.data.types import Question
from vico.distributed.world import World
from vico.errors import TrainingError, UserError
from vico.model.attention.shares import VideoShares, all_rows_wanted
from vico.model.block_runners import attending_by
from vico.model.vico import ViCo
from vico.train.build import Inputs
from vico.train.config import RunConfig
from vico.train.engine import Engine
from vico.train.evaluate import CHUNKS_PER_STOP_CHECK
from vico.train.heat_map import gates_by_layer
from vico.train.progress_bar import ProgressBar

PARTS = ("prompt", "video", "text")


@dataclass(frozen=True)
class AttentionShares:
    """Means over the rows of text behind the video of some questions with all their options."""

    num_questions: int
    num_rows: int
    video_rows: float  # the share of video rows among those that a row sees
    shares_L3H: Tensor  # fp64: of each layer and head, in the order of PARTS

    def means(self) -> dict[str, float]:
        """Over heads and layers."""
        return dict(zip(PARTS, self.shares_L3H.mean(dim=(0, 2)).tolist(), strict=True))

    def to_json(self) -> dict[str, Any]:
        """The means over heads: of all layers, and of each."""
        layers = [
            {"layer": layer, **dict(zip(PARTS, row, strict=True))}
            for layer, row in enumerate(self.shares_L3H.mean(dim=2).tolist())
        ]
        return {
            "n": self.num_questions,
            "rows": self.num_rows,
            "video_rows": self.video_rows,
            **self.means(),
            "layers": layers,
        }

    def curves(self) -> dict[str, float]:
        """Of all layers, and of each."""
        result = self.to_json()
        curves = {f"attention/{part}": result[part] for part in PARTS}
        for row in result["layers"]:
            curves |= {f"attention/{part}/layer_{row['layer']:02}": row[part] for part in PARTS}
        return curves

    def table(self) -> str:
        """As text for people."""
        result = self.to_json()
        lines = [
            f"attention of {self.num_rows:,} rows of text behind the video, of "
            f"{self.num_questions} questions (of the rows that they see {self.video_rows:.2%} are "
            "video):",
            f"  {'':<12}" + "".join(f"{part:>10}" for part in PARTS),
        ]
        for row in (*result["layers"], result):
            name = f"layer {row['layer']}" if "layer" in row else "all layers"
            lines.append(f"  {name:<12}" + "".join(f"{row[part]:>10.2%}" for part in PARTS))
        return "\n".join(lines)


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """`count` of them, evenly over their order; all where they are fewer."""
    count = min(count, len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


def measure_attention(
    engine: Engine,
    inputs: Inputs,
    split: str,
    count: int,
    config: RunConfig,
    world: World,
) -> AttentionShares:
    """Run `count` questions with all their options, and sum attention a layer at a time.

    A collective: every rank gets all, the same bits for any number of ranks. Raises UserError, on
    all ranks, as an evaluation does; TrainingError where attention is not finite.
    """
    questions = spread(inputs.questions[split], count)
    if not questions:
        raise UserError(f"--split {split}: has no questions; name another")
    video_LH, num_rows, num_video = _count(engine, inputs, questions, config, world)
    shares_L3H = _shares(video_LH / num_rows, engine.gates())
    if not shares_L3H.isfinite().all():
        raise TrainingError(
            "the attention is not finite; try --precision bf16 or fp32, or another checkpoint"
        )
    return AttentionShares(len(questions), int(num_rows), num_video / num_rows, shares_L3H)


def _shares(video_LH: Tensor, gates: dict[str, Tensor]) -> Tensor:
    """[L, 3, H] in the order of PARTS. `video_LH`: of the weights over the rows of the stream."""
    prompt_LH = torch.zeros_like(video_LH)  # layers without adapter have no prompt
    for layer, gates_H in gates_by_layer(gates, "gate1").items():
        prompt_LH[layer] = torch.from_numpy(gates_H).abs()
    return torch.stack([prompt_LH, video_LH, 1 - video_LH], dim=1) / (1 + prompt_LH)[:, None]


def measured_attention(
    engine: Engine, inputs: Inputs, config: RunConfig, world: World
) -> dict[str, Any]:
    """{"attention": of --attention_shares questions of --split}, and prints it as a table.

    Empty without the flag. A collective; raises as `measure_attention` does.
    """
    if config.attention_shares is None:
        return {}
    count, split = config.attention_shares, config.split
    shares = measure_attention(engine, inputs, split, count, config, world)
    world.print_rank0(f"{split} {shares.table()}")
    return {"attention": {"split": split, **shares.to_json()}}


def _count(
    engine: Engine,
    inputs: Inputs,
    questions: Sequence[Question],
    config: RunConfig,
    world: World,
) -> tuple[Tensor, float, float]:
    """Sums over the rows of all chunks: fp64 [L, H] of weights on the video, and as VideoShares."""
    chunks = EvaluationChunks(
        questions,
        inputs.datasets,
        num_slots=config.max_feats,
        rank=world.rank,
        world_size=world.size,
    )
    model, counter = engine.module, VideoShares()
    assert isinstance(model, ViCo)
    llama, num_chunks = inputs.weights.config, len(chunks) * world.size
    video_KLH = torch.zeros(num_chunks, llama.n_layers, llama.n_heads, dtype=torch.float64)
    rows_K2 = torch.zeros(num_chunks, 2, dtype=torch.float64)
    engine.train(False)
    what = f"the attention of {len(questions)} questions"
    bar = ProgressBar(f"measuring {what}", len(chunks), "batch", world.is_main)
    with torch.no_grad(), attending_by(model, counter), bar:
        for number in range(len(chunks)):
            world.set_phase(f"batch {number + 1} of the attention")
            chunk = chunks[number]
            with world.raise_together():
                if chunk.error is not None:
                    raise chunk.error
            assert chunk.batch is not None
            engine.forward(all_rows_wanted(chunk.batch).to(world.device))
            video_LH = counter.take()
            if chunk.questions:  # no dummy
                place = number * world.size + world.rank
                video_KLH[place] = video_LH
                rows_K2[place] = torch.tensor([counter.num_rows, counter.num_video])
            bar.advance()
            if (number + 1) % CHUNKS_PER_STOP_CHECK == 0:
                world.raise_if_stopped(f"stopped in the measurement of {what}; start it again")
    world.sum(video_KLH)  # each chunk is one rank's, so no bit changes
    world.sum(rows_K2)
    is_real = rows_K2[:, 0] > 0
    num_rows, num_video = rows_K2[is_real].sum(dim=0).tolist()
    return video_KLH[is_real].sum(dim=0), num_rows, num_video
