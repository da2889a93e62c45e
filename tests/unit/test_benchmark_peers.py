"""The benchmarks' peers: transformers with PEFT computes what ViCo computes with its gates at 0."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.baseline.models import gates_at_zero, make_pair, take_gradients
from benchmarks.baseline.peers import HfModel, Peer, PeerKind, PeerScoring
from benchmarks.baseline.variants import Packed
from benchmarks.measure.lengths import MAX_CAP_LEN, Lengths
from benchmarks.measure.workload import SyntheticWorkload
from benchmarks.report.sections import cpu_section
from benchmarks.suites import cpu, cpu_peers
from vico.model.config import LlamaConfig

CPU = torch.device("cpu")
TINY = cpu.geometries(tiny=True)["7b_geometry"]
WORK = SyntheticWorkload(TINY.vocab_size)
ROUNDING = 1e-5


def make_fast(config: LlamaConfig = TINY) -> Packed:
    return Packed(make_pair(config)[1], CPU)


@pytest.mark.parametrize("adapter", ["LoRA", "AdaptionPrompt"])
@pytest.mark.parametrize("layout", ["longest", "sorted", "packed"])
def test_peers_train(adapter: str, layout: str) -> None:
    """Every layout gives the losses and the video's gradient of ViCo without gates."""
    fast, training = make_fast(), WORK.training(0, 3)
    with gates_at_zero(fast.model):
        losses = fast.train(training)
        exact = take_gradients(fast.model)["visual_proj.weight"]
    assert fast.train(training) != losses
    kind = PeerKind("x", adapter, layout, own_products=layout == "sorted")
    peer = Peer(kind, HfModel(fast.model, kind), CPU)
    assert peer.train(training) == pytest.approx(losses, rel=ROUNDING)
    gradients = take_gradients(peer.model)
    assert (gradients["visual_proj"] - exact).abs().max() < ROUNDING * exact.abs().max()
    adapted = {name for name in gradients if "lora" in name or "adaption" in name}
    assert len(adapted) == TINY.n_layers * (4 if adapter == "LoRA" else 2)


def test_peers_score() -> None:
    """lm-eval's way and a cached prompt give ViCo's scores; the letters are one of their tokens."""
    fast, scoring = make_fast(), WORK.scoring(0, 1)
    kind = cpu_peers.KINDS[cpu_peers.SCORING_KIND]
    peer = PeerScoring(HfModel(fast.model, kind), CPU)
    with gates_at_zero(fast.model):
        exact = fast.score(scoring)
    for way in (peer.each_option, peer.cached_prompt):
        assert (way(scoring) - exact).abs().max() < ROUNDING
    letters = []
    for options in scoring.questions:
        stops = [len(option.tokens) - 2 for option in options]
        pairs = zip(options, stops, strict=True)
        letters.append(tuple(replace(s, targets=range(stop - 1, stop)) for s, stop in pairs))
    # Losses of the letters are minus their logits, up to a constant of each question.
    offsets = peer.each_option(replace(scoring, questions=tuple(letters))) - peer.letters(scoring)
    assert float((offsets - offsets[:, :1]).abs().max()) < ROUNDING


def test_rounds(tmp_path: Path) -> None:
    """Each peer is timed in each round, and the report names the fastest beside plain."""
    fast = make_fast()
    peers = cpu_peers.CpuPeers(fast)
    training, scoring = WORK.training(0, 2), WORK.scoring(0, 1)
    assert cpu_peers.is_equal(peers.differences(training, scoring))
    for index in range(2):
        peers.run_round({"train": training}, scoring, index)
    ratios = peers.ratios({"train": [1.0, 2.0], "score": [1.0, 1.0]})
    assert {len(seconds) for seconds in peers.seconds["train"].values()} == {2}
    assert set(ratios["train"]) == {kind.name for kind in cpu_peers.KINDS}
    assert len(ratios["score"]) == 3
    fastest = cpu_peers.best(ratios["train"])
    assert fastest["median"] == min(ratio["median"] for ratio in ratios["train"].values())

    geometry = {"workload": "toy", "figures": {"fast": {}}, "peers": ratios}
    record: dict[str, Any] = {
        "geometries": {"wide": geometry},
        "ratios": {"train_wide": 3.0, "score_wide": 4.0},
        "peer_ratios": {"train_wide": fastest},
    }
    text = "\n".join(cpu_section(record, tmp_path).lines)
    (train,) = (line for line in text.splitlines() if line.startswith("| train_wide"))
    (score,) = (line for line in text.splitlines() if line.startswith("| score_wide"))
    assert fastest["peer"] in train and "not measured" in score


def test_difference_found() -> None:
    """A peer whose losses or scores are not numbers, or differ, is refused."""
    good = {"loss_relative": 0.0, "gradient_relative": 0.0, "score_absolute": 0.0}
    assert cpu_peers.is_equal(good)
    for key in good:
        assert not cpu_peers.is_equal(good | {key: float("inf")})
    fast, training, scoring = make_fast(), WORK.training(0, 2), WORK.scoring(0, 1)
    peers = cpu_peers.CpuPeers(fast)
    with torch.no_grad():
        fast.model.visual_proj.weight.mul_(1.1)
    assert not cpu_peers.is_equal(peers.differences(training, scoring))


def test_long_captions() -> None:
    """The second set has longer captions and the same questions; none exceeds the limit."""
    long = SyntheticWorkload(TINY.vocab_size, lengths=Lengths.load().with_long_captions())
    work, short = long.training(0, 64), WORK.training(0, 64)
    assert work.vqa[0].tokens == short.vqa[0].tokens
    lengths = [len(caption.tokens) for caption in work.cap]
    assert min(lengths) >= 200 and max(lengths) <= MAX_CAP_LEN
    assert 295 < sum(lengths) / len(lengths) < 320
