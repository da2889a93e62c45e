"""Sums of attention over chunks and ranks, and the shares that follow; notes on the backbone."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from faults.emulated_ranks import EmulatedWorld, Exchange
from support.errors import refusal
from vico.data.evaluation_batches import Chunk
from vico.data.packing import Example, pack
from vico.data.types import VIDEO_SLOT, Question, TokenSequence
from vico.distributed import signals
from vico.errors import UserError
from vico.model.attention.blockwise import attend_blocks
from vico.model.attention.shares import VideoShares, all_rows_wanted
from vico.model.block_runners import attending_by, choose_block_runners
from vico.model.config import LlamaConfig
from vico.model.vico import ViCo
from vico.train import attention_shares, backbone
from vico.train.attention_shares import AttentionShares, measure_attention, spread
from vico.train.config import RunConfig

SLOTS, LAYERS, HEADS = 2, 2, 2
CPU = torch.device("cpu")
LLAMA = LlamaConfig(dim=16, n_layers=LAYERS, n_heads=HEADS, vocab_size=40, multiple_of=16)


def chunk_of(questions: tuple[int, ...], *lengths: int) -> Chunk:
    """A sequence for each number of tokens behind the video."""
    examples = []
    for i, length in enumerate(lengths):
        tokens = (1, *[VIDEO_SLOT] * SLOTS, *range(3 + i, 3 + i + length))
        targets = range(len(tokens) - 1, len(tokens))
        examples.append(Example(TokenSequence("vqa", tokens, targets, 1), 0, 0))
    generator = torch.Generator().manual_seed(lengths[0])
    return Chunk(questions, pack(examples, torch.randn(1, SLOTS, 768, generator=generator)))


CHUNKS = [chunk_of((0, 1), 3, 4), chunk_of((2,), 6), chunk_of((3,), 2, 5)]
DUMMY = chunk_of((), 9)


class Engine:
    """Of a small model of its own."""

    def __init__(self, model: ViCo) -> None:
        self.module, self.modes, self.num_forwards = model, list[bool](), 0

    def train(self, mode: bool) -> None:
        self.modes.append(mode)

    def gates(self) -> dict[str, Tensor]:
        return WEIGHTS

    def forward(self, batch: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        self.num_forwards += 1
        losses: Tensor = self.module(batch)
        return losses


@pytest.fixture(scope="module")
def model() -> ViCo:
    made = ViCo(LLAMA, LAYERS, 2, SLOTS, 100.0, torch.float32)
    generator = torch.Generator().manual_seed(2)
    for parameter in made.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    choose_block_runners(made, attend_blocks)
    return made


WEIGHTS = {
    f"layers.{layer}.attention.gate1": torch.tensor([0.5, -2.0]).view(1, HEADS, 1, 1) * (layer + 1)
    for layer in range(LAYERS)
}
QUESTIONS = [Question(i, str(i), "v", "CW", "why", ("a", "b"), 0) for i in range(4)]
INPUTS: Any = SimpleNamespace(
    datasets={}, weights=SimpleNamespace(config=LLAMA), questions={"val": QUESTIONS, "test": []}
)


def measure(
    model: ViCo, shares: list[list[Chunk]], monkeypatch: pytest.MonkeyPatch
) -> list[AttentionShares]:
    """By emulated ranks that have these chunks."""

    def chunks(questions: Any, datasets: Any, *, num_slots: int, rank: int, world_size: int) -> Any:
        assert (questions, datasets, num_slots) == (QUESTIONS, {}, 7)
        assert world_size == len(shares)
        return shares[rank]

    monkeypatch.setattr(attention_shares, "EvaluationChunks", chunks)
    size = len(shares)
    first = EmulatedWorld(0, size, CPU, None, exchange=Exchange(size))
    config = RunConfig(max_feats=7)

    def work(rank: int) -> AttentionShares:
        engine: Any = Engine(copy.deepcopy(model))
        world = replace(first, rank=rank)
        found = measure_attention(engine, INPUTS, "val", 9, config, world)
        assert engine.modes == [False] and engine.num_forwards == len(shares[rank])
        return found

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, range(size)))


def test_shares_are_means_over_the_rows_of_all_chunks(
    model: ViCo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits for any number of ranks; a rank without a chunk runs one that counts not."""
    counter, sums_LH = VideoShares(), torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    num_rows, num_video = 0, 0.0
    for chunk in CHUNKS:
        assert chunk.batch is not None
        with torch.no_grad(), attending_by(model, counter):
            model(all_rows_wanted(chunk.batch))
        sums_LH += counter.take()
        num_rows, num_video = num_rows + counter.num_rows, num_video + counter.num_video
    (alone,) = measure(model, [CHUNKS], monkeypatch)
    assert (alone.num_questions, alone.num_rows) == (4, num_rows)
    assert alone.video_rows == pytest.approx(num_video / num_rows)
    video_LH = sums_LH / num_rows
    for layer in range(LAYERS):
        gates_H = torch.tensor([0.5, -2.0]).double().mul(layer + 1).tanh().abs()
        prompt, video, text = alone.shares_L3H[layer]
        whole_H = 1 + gates_H
        assert torch.allclose(prompt, gates_H / whole_H)
        assert torch.allclose(video, video_LH[layer] / whole_H)
        assert torch.allclose(text, (1 - video_LH[layer]) / whole_H)
    shared = [[CHUNKS[0], CHUNKS[2]], [CHUNKS[1], DUMMY]]
    for found in measure(model, shared, monkeypatch):
        assert torch.equal(found.shares_L3H, alone.shares_L3H)
        assert (found.num_rows, found.video_rows) == (alone.num_rows, alone.video_rows)


def test_a_layer_without_adapter_has_no_prompt() -> None:
    video_LH = torch.tensor([[0.25, 0.5], [0.25, 0.5]]).double()
    only = {"layers.1.attention.gate1": torch.tensor([100.0, 0.0]).view(1, 2, 1, 1)}
    assert attention_shares._shares(video_LH, only).tolist() == [
        [[0.0, 0.0], [0.25, 0.5], [0.75, 0.5]],
        [[0.5, 0.0], [0.125, 0.5], [0.375, 0.5]],
    ]


def test_measurements_that_are_refused(model: ViCo, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Chunk((), None, UserError("v is damaged"))
    assert refusal(measure, model, [[CHUNKS[0], broken]], monkeypatch) == "v is damaged"
    for gate in (float("nan"), float("inf")):
        wrong = copy.deepcopy(model)
        wrong.tok_embeddings.weight.data[:] = gate
        said = refusal(measure, wrong, [CHUNKS], monkeypatch)
        assert said == (
            "the attention is not finite; try --precision bf16 or fp32, or another checkpoint"
        )
    engine: Any = None
    world = EmulatedWorld(0, 1, CPU, None)
    said = refusal(measure_attention, engine, INPUTS, "test", 9, RunConfig(), world)
    assert said == "--split test: has no questions; name another"


def test_a_stop_is_looked_for_every_eight_batches(
    model: ViCo, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([0, 15])
    monkeypatch.setattr(signals, "stop_requested", lambda: next(answers))
    with pytest.raises(signals.Stopped) as stopped:
        measure(model, [CHUNKS[1:2] * 20], monkeypatch)
    assert not [*answers], "the second look is the last"
    assert str(stopped.value) == (
        "stopped in the measurement of the attention of 4 questions; start it again"
    )


def test_shares_for_people() -> None:
    """Means over heads; of all layers at the end."""
    shares = [[[0.0, 0.5], [0.5, 0.25], [0.5, 0.25]], [[0.25, 0.75], [0.25, 0.0], [0.5, 0.25]]]
    found = AttentionShares(3, 1200, 0.125, torch.tensor(shares).double())
    assert found.to_json() == {
        "n": 3,
        "rows": 1200,
        "video_rows": 0.125,
        "prompt": 0.375,
        "video": 0.25,
        "text": 0.375,
        "layers": [
            {"layer": 0, "prompt": 0.25, "video": 0.375, "text": 0.375},
            {"layer": 1, "prompt": 0.5, "video": 0.125, "text": 0.375},
        ],
    }
    assert found.table().splitlines() == [
        "attention of 1,200 rows of text behind the video, of 3 questions (of the rows that they "
        "see 12.50% are video):",
        "                  prompt     video      text",
        "  layer 0         25.00%    37.50%    37.50%",
        "  layer 1         50.00%    12.50%    37.50%",
        "  all layers      37.50%    25.00%    37.50%",
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60))
def test_questions_are_spread(total: int, count: int) -> None:
    """The first is among them, none twice, and gaps differ by one at most."""
    questions: Any = range(total)
    found: Any = spread(questions, count)
    assert len(found) == min(count, total) and found[0] == 0
    ends = [*found, total]
    gaps = {after - before for before, after in pairwise(ends)}
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


# ---- the backbone -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "flags", "said"),
    [
        (None, {"max_seq_len": 10**6}, None),
        (384, {"max_seq_len": 384}, None),
        (383, {"max_seq_len": 384}, "--max_seq_len"),
        (383, {"max_seq_len": 300}, "--max_cap_len"),
        (383, {"max_seq_len": 300, "cap": 0}, None),
        (383, {"max_seq_len": 300, "init_eval": True}, "--max_cap_len"),
        (383, {"max_seq_len": 300, "init_eval": True, "resume": Path("c")}, None),
    ],
)
def test_sequences_fit_the_window(
    window: int | None, flags: dict[str, Any], said: str | None
) -> None:
    """Captions too, where they are trained on."""
    llama, folder = replace(LLAMA, sliding_window=window), Path("llama/7B")
    config = RunConfig(max_cap_len=384, **flags)
    if said is None:
        backbone.require_window(config, llama, folder)
        return
    assert refusal(backbone.require_window, config, llama, folder) == (
        "llama/7B: sliding_window is 383 tokens, and sequences may have 384; ViCo computes no "
        f"window: set {said} 383 or less"
    )


def test_notes_on_the_files_of_a_backbone() -> None:
    tokenizer: Any = SimpleNamespace(
        vocab_size=40, has_bos=True, eos=2, name_of=lambda token: f"<{token}>"
    )
    weights: Any = SimpleNamespace(folder=Path("llama/7B"), num_rows=40)
    path = Path("llama/tokenizer.model")
    assert backbone.notes(weights, tokenizer, path) == []
    weights.num_rows, tokenizer.has_bos = 64, False
    assert backbone.notes(weights, tokenizer, path) == [
        "llama/7B: the embeddings have 64 rows and tokenizer.model has 40 pieces: the last 24 rows "
        "are passed over, as if the model had none",
        "llama/tokenizer.model: has no begin token; sequences begin with the end token, '<2>'",
    ]
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    assert dtypes == backbone.DTYPES
