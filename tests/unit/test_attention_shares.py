"""Where attention goes: against the oracle's own scores, in float64, a sequence at a time."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference import oracle
from reference.oracle_sequences import OracleSequence
from support.asked_world import AskedWorld
from support.backbones import KINDS, Ungrouped, make_hugging_face, make_model
from support.toy_dataset import ToyData
from vico.cli import cognition
from vico.cli.flags import make_parser, read_flags
from vico.cli.main import main
from vico.data.packing import Example, pack
from vico.data.types import VIDEO_SLOT, TokenSequence
from vico.model.attention import shares
from vico.model.block_runners import attending_by
from vico.model.config import backbone_shapes
from vico.model.weights.load import open_weights

SLOTS = 10  # of make_model
# Two options of a question, a prompt without common beginning, and a text without video.
PROMPTS = [(1, 5, 6, 7, 8, 9), (1, 5, 6, 7, 8, 11, 12), (1, 20, 21, 22)]
TEXT = (1, 30, 31, 32)
VIDEO_START = 2


def sequences() -> list[TokenSequence]:
    made = []
    for before_and_after in PROMPTS:
        before, after = before_and_after[:VIDEO_START], before_and_after[VIDEO_START:]
        tokens = (*before, *[VIDEO_SLOT] * SLOTS, *after)
        made.append(TokenSequence("vqa", tokens, range(len(tokens) - 1, len(tokens)), VIDEO_START))
    return [*made, TokenSequence("text", TEXT, range(1, len(TEXT)), len(TEXT))]


class Spy:
    """In the place of `oracle.attention`: the share of each head and query on the video."""

    def __init__(self) -> None:
        self.attention, self.shares_HS = oracle.attention, list[Tensor]()

    def __call__(
        self,
        model: oracle.Model,
        trainables: oracle.Trainables,
        layer: int,
        x: Tensor,
        prompts: Tensor | None,
        video_bias: Tensor,
    ) -> Tensor:
        (_, weights), name = model, f"layers.{layer}.attention"
        q, k = (
            oracle.rotary((x @ weights[f"{name}.{m}.weight"].T).view(len(x), 4, -1).transpose(0, 1))
            for m in ("wq", "wk")
        )
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        if prompts is not None:
            scores = scores + trainables[f"{name}.gate2"].view(-1, 1, 1) * video_bias
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        weights_HSS = scores.masked_fill(future, -math.inf).softmax(-1)
        self.shares_HS.append(weights_HSS[..., VIDEO_START : VIDEO_START + SLOTS].sum(-1))
        return self.attention(model, trainables, layer, x, prompts, video_bias)


@pytest.mark.parametrize("kind", ["LLaMA-1", "LLaMA-2-70B"])
@pytest.mark.parametrize("num_adapted", [1, 2])
def test_shares_are_the_oracles(
    kind: str, num_adapted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every layer and head, grouped ones too, with and without an adapter; shared rows once."""
    make_hugging_face(tmp_path, KINDS[kind])
    weights = open_weights(tmp_path, None)
    model = make_model(weights, num_adapted=num_adapted, gate1=0.5)
    for name, value in model.named_parameters():
        if name.endswith("gate2"):
            value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    features = torch.randn(1, SLOTS, 768, generator=torch.Generator().manual_seed(3))
    batch = pack([Example(sequence, 0, 0) for sequence in sequences()], features)
    assert batch.num_rows < sum(len(s.tokens) for s in sequences()), "options share rows"
    monkeypatch.setattr(shares, "ROWS_AT_A_TIME", 2)
    counter = shares.VideoShares()
    with torch.no_grad():
        before = model(batch)
        with attending_by(model, counter):
            model(shares.all_rows_wanted(batch))
        assert torch.equal(model(batch), before), "the model runs as before"

    whole = Ungrouped(weights)
    backbone = {name: whole.read(name).double() for name in backbone_shapes(whole.config)}
    trained = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
    params = {"n_heads": 4, "norm_eps": 1e-5, "n_layers": 2}
    expected_LH, num_rows, num_video, seen = torch.zeros(2, 4).double(), 0, 0.0, set()
    spy = Spy()
    monkeypatch.setattr(oracle, "attention", spy)
    for sequence in sequences()[:-1]:
        spy.shares_HS = []
        ids = [-1 if token == VIDEO_SLOT else token for token in sequence.tokens]
        one = OracleSequence("vqa", ids, [], VIDEO_START)
        oracle.trunk((params, backbone), trained, one, features[0].double(), oracle.Hyper())
        for row in range(VIDEO_START + SLOTS, len(ids) - 1):  # the last token is no input
            if tuple(ids[: row + 1]) not in seen:
                seen.add(tuple(ids[: row + 1]))
                expected_LH += torch.stack([of_layer[:, row] for of_layer in spy.shares_HS])
                num_rows, num_video = num_rows + 1, num_video + SLOTS / (row + 1)
    assert counter.num_rows == num_rows
    assert counter.num_video == pytest.approx(num_video, rel=1e-6)
    assert torch.allclose(counter.take(), expected_LH, rtol=1e-5, atol=1e-7)


def measured(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["cognition", *map(str, words)]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "without_video" not in result
    return dict(result["attention"])


@pytest.mark.usefixtures("in_this_process")
def test_the_command(toy: ToyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The three shares of a layer are one whole; a closed gate gives the prompt nothing."""
    asked = AskedWorld(tmp_path / "open", toy)
    result = measured(capsys, "--resume", asked.run, "--attention_shares")
    assert result["split"] == "val" and result["n"] == len(asked.rows) < 64
    assert [row["layer"] for row in result["layers"]] == [0, 1, 2]
    for row in (*result["layers"], result):
        assert row["prompt"] > 0 and row["video"] > 0
        assert row["prompt"] + row["video"] + row["text"] == pytest.approx(1)
    few = measured(capsys, "--resume", asked.run, "--attention_shares", 7)
    assert few["n"] == 7 and few["rows"] < result["rows"]
    closed = AskedWorld(tmp_path / "closed", toy, gates=0.0)
    of_closed = measured(capsys, "--resume", closed.run, "--attention_shares")
    assert of_closed["prompt"] == 0 and of_closed["layers"][0]["video"] > 0
    assert main(["cognition", "--resume", str(closed.run), "--attention_shares", "0"]) == 2
    assert "--attention_shares" in capsys.readouterr().err


def test_a_bare_flag_leaves_the_override_behind_it() -> None:
    parser = make_parser(
        "vico cognition", "", prints=False, usage=cognition.USAGE, add_own=cognition._add_own
    )
    line, _ = read_flags(parser, ["--attention_shares", "split=test"])
    assert line.given == {"attention_shares": 64, "split": "test"}
