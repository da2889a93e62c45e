"""How measures of tokens become the numbers of a text, of ranges of positions, and of curves."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from faults.emulated_ranks import EmulatedWorld, Exchange
from support.errors import refusal
from vico.data.text_windows import Text, Texts, Window, text_sequence
from vico.distributed import signals
from vico.model.batch import PackedBatch
from vico.train import cognition
from vico.train.cognition import LOGGED, Measured, TextMeasures, measure_texts, measured_texts

POSITIONS = [1, 2, 3, 4, 15, 16, 63, 64, 255, 256, 1023, 1024, 4095, 4096, 5000]


def column(frozen: float, adapted: float, kl: float, *counts: float) -> Tensor:
    return torch.tensor([[frozen], [adapted], [kl], *[[count] for count in counts]]).double()


def measures(*sizes: int, names: tuple[str, ...] = ("a.txt", "b.txt")) -> TextMeasures:
    """Texts of so many tokens and twice as many bytes; of each, every other token agrees."""
    texts, columns = [], []
    for number, (size, name) in enumerate(zip(sizes, names, strict=False), start=1):
        texts.append(Text(Path(name), [5] * size, 2 * size))
        for i in range(size):
            columns.append(column(number, 2 * number, number / 4, i % 2, i % 3 == 0, i % 4 == 0))
    positions = torch.tensor((POSITIONS * 2)[: sum(sizes)])
    return TextMeasures(texts, torch.cat(columns, dim=1), positions)


def test_all_numbers_of_a_text() -> None:
    """Means over its tokens; bits by its bytes."""
    (part,) = measures(8).to_json()["files"].values()
    assert part == pytest.approx(
        {
            "tokens": 8,
            "perplexity_frozen": math.e,
            "perplexity_adapted": math.e**2,
            "kl_per_token": 0.25,
            "top1_agreement": 4 / 8,
            "top1_accuracy_frozen": 3 / 8,
            "top1_accuracy_adapted": 2 / 8,
            "bits_per_byte_frozen": 0.5 / math.log(2),
            "bits_per_byte_adapted": 1 / math.log(2),
        }
    )


def test_texts_together_and_apart() -> None:
    """Together every token counts alike; the log has no positions and no bytes of all."""
    both = measures(6, 2)
    whole, summary = both.to_json(), both.summary()
    frozen = math.exp((6 * 1 + 2 * 2) / 8)
    assert whole["tokens"] == 8 and whole["perplexity_frozen"] == pytest.approx(frozen)
    assert whole["kl_per_token"] == pytest.approx((6 * 0.25 + 2 * 0.5) / 8)
    assert whole["bits_per_byte_frozen"] == pytest.approx(10 / 16 / math.log(2))
    assert [part["tokens"] for part in whole["files"].values()] == [6, 2]
    assert whole["files"]["b.txt"]["perplexity_frozen"] == pytest.approx(math.exp(2))
    assert list(whole["files"]) == ["a.txt", "b.txt"] == list(summary["files"])
    assert whole.keys() - summary.keys() == {
        "positions",
        "bits_per_byte_frozen",
        "bits_per_byte_adapted",
    }
    assert all(whole[name] == summary[name] for name in summary)


def test_ranges_of_positions() -> None:
    """Each begins at four times the last; their tokens are measured apart."""
    alone = measures(15)
    rows = alone.to_json()["positions"]
    assert [(row["first"], row["last"], row["tokens"]) for row in rows] == [
        (1, 1, 1),
        (2, 3, 2),
        (4, 15, 2),
        (16, 63, 2),
        (64, 255, 2),
        (256, 1023, 2),
        (1024, 4095, 2),
        (4096, 5000, 2),
    ]
    assert [row["top1_agreement"] for row in rows] == [0, *[0.5] * 7]
    assert "bits_per_byte_frozen" not in rows[0]
    short = TextMeasures(alone.texts, alone.measures_6N[:, :2], torch.tensor([1, 5]))
    assert [row["last"] for row in short._positions()] == [1, 5], "no empty ranges"


def test_curves_of_texts() -> None:
    """One text has no curves of its own; equal names are told apart by their folders."""
    assert LOGGED == ("perplexity_frozen", "perplexity_adapted", "kl_per_token", "top1_agreement")
    assert measures(4).curves() == pytest.approx(
        {
            "cognition/perplexity_frozen": math.e,
            "cognition/perplexity_adapted": math.e**2,
            "cognition/kl_per_token": 0.25,
            "cognition/top1_agreement": 0.5,
        }
    )
    curves = measures(4, 2, 2, names=("x/a.txt", "b.txt", "y/a.txt")).curves()
    assert len(curves) == 4 * 4
    kl = {name: value for name, value in curves.items() if name.endswith("kl_per_token")}
    assert kl == {
        "cognition/kl_per_token": (4 * 0.25 + 2 * 0.5 + 2 * 0.75) / 8,
        "cognition/x/a.txt/kl_per_token": 0.25,
        "cognition/b.txt/kl_per_token": 0.5,
        "cognition/y/a.txt/kl_per_token": 0.75,
    }


def test_the_table_for_people() -> None:
    """A row per text, one of all where there are several, and one per range of positions."""
    long = "a name of more than twenty letters.txt"
    assert measures(2, 2, names=(long, "b.txt")).table().splitlines() == [
        "perplexity of the frozen and the adapted model, KL per token (nats; 0: unchanged), same "
        "likeliest token:",
        "                             tokens    frozen   adapted        KL  same top",
        "  a name of more than twe         2     2.718     7.389   0.25000    50.00%",
        "  b.txt                           2     7.389    54.598   0.50000    50.00%",
        "  all texts                       4     4.482    20.086   0.37500    50.00%",
        "the same by position in the window (1: the first token behind BOS):",
        "  positions 1 to 1                1     2.718     7.389   0.25000     0.00%",
        "  positions 2 to 3                2     4.482    20.086   0.37500    50.00%",
        "  positions 4 to 4                1     7.389    54.598   0.50000   100.00%",
    ]
    assert "all texts" not in measures(4).table()


def test_a_text_that_the_frozen_model_does_not_know() -> None:
    """It needs more bits per byte than random bytes do; columns stay apart whatever it needs."""
    per_token, text = 8 * math.log(2), [Text(Path("a.txt"), [5], 1)]  # its token is a byte
    for factor, is_known in ((0.99, True), (1.01, False)):
        part = column(factor * per_token, 1.0, 0, 0, 0, 0)
        table = TextMeasures(text, part, torch.tensor([1])).table()
        notes = [line for line in table.splitlines() if line.startswith("note: ")]
        assert [("does not know such text" in note) for note in notes] == [True] * (not is_known)
    wide = TextMeasures(text, column(800.0, 700.0, 0, 0, 0, 0), torch.ones(1))
    (row,) = (line for line in wide.table().splitlines() if line.startswith("  a.txt"))
    assert row.split() == ["a.txt", "1", "1.8e+308", "1.01e+304", "0.00000", "0.00%"]


def test_a_perplexity_above_all_floats() -> None:
    """It is the largest one: JSON has no infinity."""
    result = Measured.of(column(800.0, 700.0, 0, 0, 0, 0)).to_json()
    assert result["perplexity_frozen"] == pytest.approx(sys.float_info.max, rel=1e-12)
    assert result["perplexity_adapted"] == pytest.approx(math.exp(700.0))


# ---- the texts, run through a model -------------------------------------------------------------


class Comparer:
    """In the engine's place: a token's measures are 1 to 6 times its id."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.num_batches = factor, 0

    def train(self, mode: bool) -> None:
        assert not mode

    def compare(self, batch: PackedBatch) -> Tensor:
        assert not torch.is_grad_enabled()
        self.num_batches += 1
        assert batch.features_VFC.shape == (0, 10, 768), "no clip, of the model's shape"
        factors = torch.arange(1, 7).double()[:, None] * self.factor
        return batch.token_target_ids_N.double() * factors


def inputs_of(*sizes: int) -> Any:
    """Texts of so many tokens, no two alike, in windows of 512."""
    files, first = [], 100
    for number, size in enumerate(sizes):
        files.append(Text(Path(f"{number}.txt"), list(range(first, first + size)), size))
        first += size
    shapes = {"temporal_emb.weight": (10, 8), "visual_proj.weight": (8, 768)}
    return SimpleNamespace(texts=Texts(tuple(files), 1, 512), trainable_shapes=shapes)


def alone() -> EmulatedWorld:
    return EmulatedWorld(0, 1, torch.device("cpu"), None)


def test_every_token_is_measured_in_its_place() -> None:
    """In double precision, as the model has compared it."""
    inputs = inputs_of(1000, 3, 600)
    engine: Any = Comparer(0.1)
    found = measure_texts(engine, inputs.texts, inputs, alone())
    ids = torch.arange(100, 1703).double()
    assert torch.equal(found.measures_6N, ids * (torch.arange(1, 7).double()[:, None] * 0.1))
    windows = [511, 489, 3, 511, 89]
    assert found.positions_N.tolist() == [p for n in windows for p in range(1, n + 1)]
    assert found.texts == inputs.texts.files


def test_texts_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    inputs = inputs_of(20)
    engine: Any = Comparer(1e-3)
    result = measured_texts(engine, inputs, alone())
    assert result.keys() == {"cognition"} and result["cognition"]["tokens"] == 20
    assert "positions 16 to 20" in capsys.readouterr().out
    assert measured_texts(engine, inputs_of(), alone()) == {}


def test_losses_that_are_not_finite() -> None:
    inputs = inputs_of(20)
    for factor in (math.inf, math.nan):
        engine: Any = Comparer(factor)
        message = refusal(measure_texts, engine, inputs.texts, inputs, alone())
        assert message.startswith("the losses of the texts are not finite; try --precision bf16")


def test_a_stop_is_taken_between_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each few of them: every look makes the ranks wait for each other."""
    inputs = inputs_of(400_000)
    engine: Any = Comparer()
    monkeypatch.setattr(cognition, "CHUNKS_PER_STOP_CHECK", 3)
    monkeypatch.setattr(signals, "stop_requested", lambda: 15 if engine.num_batches > 3 else 0)
    with pytest.raises(signals.Stopped) as stopped:
        measure_texts(engine, inputs.texts, inputs, alone())
    assert engine.num_batches == 6
    assert str(stopped.value).startswith("stopped in the measurement of 400,000 tokens of text; ")


@pytest.mark.parametrize("size", [2, 5])
def test_ranks_share_the_windows(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    """All get every measure, in the places of one rank; who has none repeats one in vain."""
    inputs = inputs_of(1000, 3, 8000)
    engine: Any = Comparer()
    expected = measure_texts(engine, inputs.texts, inputs, alone()).measures_6N
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"measuring 9,003 tokens of text: {engine.num_batches} batch(s) to do"
    assert any(f": batch 1/{engine.num_batches}  " in line for line in said)
    first = replace(alone(), size=size, exchange=Exchange(size))
    engines: list[Any] = [Comparer() for _ in range(size)]

    def work(rank: int) -> Tensor:
        world = replace(first, rank=rank)
        return measure_texts(engines[rank], inputs.texts, inputs, world).measures_6N

    with ThreadPoolExecutor(size) as pool:
        for found in pool.map(work, range(size)):
            assert torch.equal(found, expected)
    assert {one.num_batches for one in engines} == {math.ceil(engine.num_batches / size)}
    assert capsys.readouterr().out.count("batch(s) to do") == 1, "rank 0 shows it"


def test_equal_beginnings_run_once_if_asked_for() -> None:
    rows: list[int] = []

    class Counter(Comparer):
        def compare(self, batch: PackedBatch) -> Tensor:
            rows.append(batch.num_rows)
            return super().compare(batch)

    made = [
        Window(0, 1, text_sequence((1, 5, 6, 7), 3)),
        Window(1, 2, text_sequence((1, 5, 6, 8), 3)),
    ]
    engine: Any = Counter()
    for more in ({}, {"share": False}, {"share": True}):
        found = cognition.measure_windows(engine, made, inputs_of(), alone(), "x", **more)
        assert found[0].tolist() == [7, 8]
    assert rows == [6, 6, 3]
