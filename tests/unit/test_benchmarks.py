"""The benchmarks' baseline, workload and `cpu` suite, with a toy model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import run
from benchmarks.baseline.models import (
    make_fast,
    make_pair,
    random_weights,
    set_weights,
    take_gradients,
    with_vico_products,
)
from benchmarks.baseline.plain import PlainViCo
from benchmarks.baseline.variants import Packed, Plain, Variant
from benchmarks.measure.lengths import Lengths
from benchmarks.measure.memory import peak_growth
from benchmarks.measure.real_workload import RealWorkload
from benchmarks.measure.workload import ScoringWork, SyntheticWorkload, TrainingWork
from benchmarks.suites import cpu, cpu_rounds
from reference import oracle, oracle_files
from support.toy_dataset import ToyData
from vico.data.prompts import Prompts
from vico.data.tokenizer import Tokenizer
from vico.data.types import VIDEO_SLOT, Question, TokenSequence
from vico.model.weights.meta import MetaWeights

CPU = torch.device("cpu")
TINY = cpu.geometries(tiny=True)["7b_geometry"]
FLAGS = ["cpu", "--tiny", "--rounds", "2", "--no_peers"]
# Rounding of fp32 through two or three layers.
LOSS_RTOL, SCORE_ATOL, GRAD_RTOL = 1e-6, 1e-5, 1e-5
PNG = b"\x89PNG"


def test_plain_against_oracle(toy: ToyData) -> None:
    """The baseline's losses, gradients and scores are those of the oracle, which shares no code."""
    hyper = oracle.Hyper(bias=0.7, max_seq_len=256)
    weights = oracle_files.load_meta(toy.llama / "tiny")
    trainables = oracle.init_trainables(weights[0], hyper, random_gates=True)
    items = toy.items("train")[:4]
    plain = Plain(make_baseline(toy, hyper, trainables), CPU)
    training, scoring = make_work(toy, items)

    total, expected, _ = oracle.step_losses(weights, toy.tokenizer, trainables, items, hyper)
    total.backward()
    losses = [float(loss.detach()) for loss in expected.values()]
    assert plain.train(training) == pytest.approx(losses, rel=LOSS_RTOL)
    gradients = take_gradients(plain.model)
    assert set(gradients) == set(trainables)
    for name, gradient in gradients.items():
        exact = trainables[name].grad
        assert exact is not None, name
        assert float((gradient - exact).abs().max() / exact.abs().max()) < GRAD_RTOL, name
    rows = []
    with torch.no_grad():
        for item in items:
            rows.append(oracle.score_options(weights, toy.tokenizer, trainables, item, hyper))
    assert (plain.score(scoring) - torch.tensor(rows)).abs().max() < SCORE_ATOL


def make_baseline(toy: ToyData, hyper: oracle.Hyper, trainables: dict[str, Tensor]) -> PlainViCo:
    backbone = MetaWeights(toy.llama / "tiny", toy.tokenizer.vocab_size())
    model = PlainViCo(backbone.config, hyper.adapter_len, hyper.max_feats, torch.float32)
    weights = {}
    for name, _ in model.named_parameters():
        is_trainable = name in trainables
        weights[name] = trainables[name].detach() if is_trainable else backbone.read(name).float()
    set_weights(model, weights)
    return model


def make_work(toy: ToyData, items: list[Any]) -> tuple[TrainingWork, ScoringWork]:
    """The same questions and captions to train on and to score."""
    prompts = Prompts(Tokenizer(toy.llama / "tokenizer.model"), 10, 160, 384, False)
    vqa: list[TokenSequence] = []
    questions = []
    for i, item in enumerate(items):
        fields = (item.question, tuple(item.options), item.answer)
        question = Question(i, "0", "v", "CW", *fields)
        options = tuple(prompts.vqa(question, answer) for answer in range(5))
        vqa.append(options[item.answer])
        questions.append(options)
    captions = tuple(prompts.caption(item.caption or "") for item in items)
    features = torch.stack([oracle.frames(item.features, 10) for item in items])
    clips = tuple(range(len(items)))
    training = TrainingWork(tuple(vqa), captions, features)
    return training, ScoringWork(tuple(questions), clips, features)


def test_variants_agree() -> None:
    """All steps between plain and fast compute the same."""
    plain, fast = make_pair(TINY)
    variants: list[Variant] = [
        Plain(plain, CPU),
        Plain(plain, CPU, longest=True, name="longest"),
        Plain(with_vico_products(plain), CPU, name="products"),
        Packed(fast, CPU, share=False, name="apart"),
        Packed(fast, CPU),
    ]
    workload = SyntheticWorkload(TINY.vocab_size)
    training, scoring = workload.training(0, 4), workload.scoring(0, 2)
    result = cpu_rounds.run_round(variants, {"train": training}, scoring, 0)
    assert cpu_rounds.is_equal(cpu_rounds.differences(result, "plain"))
    assert len({tuple(row.tolist()) for row in result.scores["plain"]}) > 1
    for by_variant in result.seconds.values():
        assert all(seconds > 0 for seconds in by_variant.values())


def test_synthetic_scoring() -> None:
    """Questions have the structure and the lengths of the method's prompts, and follow the seed."""
    lengths = Lengths.load()
    work, again = (SyntheticWorkload(TINY.vocab_size).scoring(3, 2) for _ in range(2))
    assert work.questions == again.questions
    assert torch.equal(work.features_VFC, again.features_VFC)
    assert work.questions != SyntheticWorkload(TINY.vocab_size).scoring(4, 2).questions
    for options in work.questions:
        assert len({option.tokens[:-3] for option in options}) == 1
        assert len({option.tokens[-3] for option in options}) == 5
        for option in options:
            num_tokens = len(option.tokens)
            assert option.tokens.count(VIDEO_SLOT) == 10
            assert option.tokens[option.video_start] == VIDEO_SLOT
            assert option.video_start == lengths.vqa_instruction
            assert num_tokens in lengths.vqa_total
            assert list(option.targets) == list(range(num_tokens - 4, num_tokens))


def test_synthetic_training() -> None:
    """Captions have the assumed lengths; both tasks begin with the same instruction."""
    common = Lengths.load().common_instruction
    training = SyntheticWorkload(TINY.vocab_size).training(0, 8)
    assert all(80 <= len(caption.targets) + 3 - 1 <= 250 for caption in training.cap)
    beginnings = {caption.tokens[:common] for caption in training.cap}
    assert beginnings == {training.vqa[0].tokens[:common]}


def test_real_files(toy: ToyData) -> None:
    """A small vocabulary keeps the sequences' lengths and the options' differences."""
    source = (toy.folder / "data", "nextqa", "val", toy.llama / "tokenizer.model")
    work = RealWorkload(*source, vocab_size=10**6, seed=0, limits=(256, 384)).scoring(0, 2)
    small = RealWorkload(*source, vocab_size=300, seed=0, limits=(256, 384)).scoring(0, 2)
    assert len(work.questions) == len(work.clips) and set(work.clips) == {0, 1}
    for options, renumbered in zip(work.questions, small.questions, strict=True):
        lengths = [len(option.tokens) for option in options]
        assert lengths == [len(option.tokens) for option in renumbered]
        assert len({option.tokens for option in renumbered}) == 5
        assert max(max(option.tokens) for option in renumbered) < 300


def test_cpu_suite(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The suite writes its record, and the report draws it."""
    assert run.main([*FLAGS, "--waterfall", "--profile", "--results", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    record = json.loads(out.splitlines()[-1])
    path = next(tmp_path.glob("cpu-*.json"))
    assert record == json.loads(path.read_text())
    assert record["equal"] is True
    ratios = set("train_wide train_long_wide score_wide".split())
    ratios |= {key.replace("wide", "7b_geometry") for key in ratios}
    assert set(record["ratios"]) == {*ratios, "peak_memory_wide"}
    facts = "suite date command config git_commit versions hardware ceilings"
    assert set(facts.split()) <= set(record)
    wide = record["geometries"]["wide"]
    assert len(wide["cpu_seconds"]["train"]["plain"]) == len(wide["rounds"]) == 2
    first = wide["rounds"][0]
    assert set(first["losses"]) == set(first["predictions"]) == set(wide["figures"])
    assert "backbone products" in wide["time_split"]["fast"]["train"]
    plain, fast = record["memory"]["plain"], record["memory"]["fast"]
    assert plain["growth_mib"] > 0
    assert plain["held_mib"] > fast["held_mib"]
    assert "vqa " in out and "train_wide" in out

    assert run.main(["report", str(path), "--out", str(tmp_path / "report")]) == 0
    plots = [Path(p) for p in json.loads(capfd.readouterr().out.splitlines()[-1])["plots"]]
    assert [plot.name for plot in plots] == ["memory.png", "waterfall.png", "time-split.png"]
    assert all(plot.read_bytes().startswith(PNG) for plot in plots)


@pytest.mark.parametrize("where", ["loss", "score", "gradient", "nan"])
def test_difference_refused(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A variant that computes something else ends the suite with 1 and without times."""
    train, score = Packed.train, Packed.score

    def wrong_train(self: Packed, work: TrainingWork) -> list[float]:
        vqa, cap = train(self, work)
        if where == "gradient":
            gradient = self.model.visual_proj.weight.grad
            assert gradient is not None
            gradient.mul_(1.01)
        if where == "loss":
            vqa *= 1 + 1e-4
        return [vqa, float("nan") if where == "nan" else cap]

    def wrong_score(self: Packed, work: ScoringWork) -> Tensor:
        return score(self, work) + (0.01 if where == "score" else 0.0)

    monkeypatch.setattr(Packed, "train", wrong_train)
    monkeypatch.setattr(Packed, "score", wrong_score)
    assert run.main([*FLAGS, "--results", str(tmp_path)]) == 1
    out, err = capfd.readouterr()
    record = json.loads(out.splitlines()[-1])
    assert record["equal"] is False and record["ratios"] == {}
    for measured in record["geometries"].values():
        assert not {"cpu_seconds", "figures"} & set(measured)
    assert "do not compute the same" in err


def test_parameter_names() -> None:
    """The fast model takes the baseline's weights by name."""
    plain, fast = make_pair(TINY)
    names = dict(plain.named_parameters()).keys()
    assert names == dict(fast.named_parameters()).keys()
    assert names == random_weights(make_fast(TINY, torch.float32)).keys()


def test_peak_growth() -> None:
    """Memory that is freed before the call ends counts."""
    measured = peak_growth(lambda: torch.ones(64 * 2**20 // 4).sum().item())
    if measured["peak_was_reset"]:
        assert 60 < measured["growth_mib"] < 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: suite"),
        (["disk"], "argument suite: invalid choice: 'disk'"),
        (["cpu", "--bogus"], "unknown flag --bogus; see benchmarks/run.sh cpu --help"),
        (["cpu", "--data_path", "data"], "--data_path needs --tokenizer"),
    ],
)
def test_bad_flags(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A mistake in the command is one line, with exit code 2."""
    assert run.main(words) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"vico: error: {message}") and err.count("\n") == 1
