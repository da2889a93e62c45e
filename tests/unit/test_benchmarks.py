"""The benchmark harness in small: the plain baseline is the method, the suite compares, and what differs is not reported."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.baseline.plain import PlainViCo
from benchmarks.baseline.variants import (
    Packed,
    Plain,
    Variant,
    fill,
    make_fast,
    make_pair,
    random_weights,
    take_gradients,
    with_vico_products,
)
from benchmarks.measure.clocks import peak_growth
from benchmarks.measure.workload import (
    Lengths,
    RealWorkload,
    ScoringWork,
    SyntheticWorkload,
    TrainingWork,
)
from benchmarks.suites import cpu
from reference import oracle, oracle_files
from support.toy_dataset import ToyData
from vico.data.prompts import Prompts
from vico.data.tokenizer import Tokenizer
from vico.data.types import VIDEO_SLOT, Question
from vico.model.weights.meta import MetaWeights

CPU = torch.device("cpu")
TINY = cpu.geometries(tiny=True)["7b_geometry"]
FLAGS = ["cpu", "--tiny", "--rounds", "2"]
# Rounding of fp32 through two or three layers.
LOSS_RTOL, SCORE_ATOL, GRAD_RTOL = 1e-6, 1e-5, 1e-5


def test_the_plain_baseline_is_the_method(toy: ToyData) -> None:
    """Losses, gradients and scores of the baseline against the oracle, which shares no code with it."""
    hyper = oracle.Hyper(bias=0.7, max_seq_len=256)
    weights, params = (
        oracle_files.load_meta(toy.llama / "tiny"),
        MetaWeights(toy.llama / "tiny", toy.tokenizer.vocab_size()),
    )
    trainables = oracle.init_trainables(weights[0], hyper, random_gates=True)
    model = PlainViCo(params.config, hyper.adapter_len, hyper.max_feats, torch.float32)
    fill(
        model,
        {
            n: trainables[n].detach() if n in trainables else params.read(n).float()
            for n, _ in model.named_parameters()
        },
    )
    prompts = Prompts(Tokenizer(toy.llama / "tokenizer.model"), 10, 160, 384, False)
    items = toy.items("train")[:4]
    asked = [
        Question(i, "0", "v", "CW", item.question, tuple(item.options), item.answer)
        for i, item in enumerate(items)
    ]
    features = torch.stack([oracle.frames(item.features, 10) for item in items])
    options = tuple(tuple(prompts.vqa(q, a) for a in range(5)) for q in asked)
    vqa = tuple(o[item.answer] for o, item in zip(options, items, strict=True))
    work = TrainingWork(vqa, tuple(prompts.caption(item.caption or "") for item in items), features)

    total, expected, _ = oracle.step_losses(weights, toy.tokenizer, trainables, items, hyper)
    total.backward()
    plain = Plain(model, CPU)
    assert plain.train(work) == pytest.approx(
        [float(v.detach()) for v in expected.values()], rel=LOSS_RTOL
    )
    gradients = take_gradients(model)
    assert set(gradients) == set(trainables)
    for name, gradient in gradients.items():
        grad = trainables[name].grad
        assert (
            grad is not None and float((gradient - grad).abs().max() / grad.abs().max()) < GRAD_RTOL
        ), name
    with torch.no_grad():
        scores = torch.tensor(
            [
                oracle.score_options(weights, toy.tokenizer, trainables, item, hyper)
                for item in items
            ]
        )
    assert (
        plain.score(ScoringWork(options, tuple(range(4)), features)) - scores
    ).abs().max() < SCORE_ATOL


def test_variants_compute_the_same() -> None:
    plain, fast = make_pair(TINY)
    variants: list[Variant] = [
        Plain(plain, CPU),
        Plain(plain, CPU, longest=True, name="longest"),
        Plain(with_vico_products(plain), CPU, name="products"),
        Packed(fast, CPU, share=False, name="apart"),
        Packed(fast, CPU),
    ]
    workload = SyntheticWorkload(TINY.vocab_size)
    result = cpu.run_round(variants, workload.training(0, 4), workload.scoring(0, 2), 0)
    assert cpu.is_equal(cpu.differences(result, "plain"))
    assert len({tuple(row.tolist()) for row in result.scores["plain"]}) > 1
    assert all(seconds > 0 for by_name in result.seconds.values() for seconds in by_name.values())


def test_synthetic_sequences_have_the_methods_structure() -> None:
    lengths = Lengths.load()
    work, again = (SyntheticWorkload(TINY.vocab_size).scoring(3, 2) for _ in range(2))
    assert work.questions == again.questions and torch.equal(work.features_VFC, again.features_VFC)
    assert work.questions != SyntheticWorkload(TINY.vocab_size).scoring(4, 2).questions
    for options in work.questions:
        assert (
            len({o.tokens[:-3] for o in options}) == 1 and len({o.tokens[-3] for o in options}) == 5
        )
        for sequence in options:
            assert (
                sequence.tokens.count(VIDEO_SLOT) == 10
                and sequence.tokens[sequence.video_start] == VIDEO_SLOT
            )
            assert (
                sequence.video_start == lengths.vqa_instruction
                and len(sequence.tokens) in lengths.vqa_total
            )
            assert list(sequence.targets) == list(
                range(len(sequence.tokens) - 4, len(sequence.tokens))
            )
    training = SyntheticWorkload(TINY.vocab_size).training(0, 8)
    assert all(80 <= len(c.targets) + 3 - 1 <= 250 for c in training.cap)
    assert {c.tokens[: lengths.common_instruction] for c in training.cap} == {
        training.vqa[0].tokens[: lengths.common_instruction]
    }


def test_real_files(toy: ToyData) -> None:
    flags = (toy.folder / "data", "nextqa", "val", toy.llama / "tokenizer.model")
    work = RealWorkload(*flags, vocab_size=10**6, seed=0, limits=(256, 384)).scoring(0, 2)
    small = RealWorkload(*flags, vocab_size=300, seed=0, limits=(256, 384)).scoring(0, 2)
    assert len(work.questions) == len(work.clips) and set(work.clips) == {0, 1}
    for real, made in zip(work.questions, small.questions, strict=True):
        assert [len(s.tokens) for s in real] == [len(s.tokens) for s in made]
        assert len({s.tokens for s in made}) == 5 and max(max(s.tokens) for s in made) < 300


def test_cpu_suite_writes_its_record(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run.main([*FLAGS, "--waterfall", "--profile", "--results", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads(next(tmp_path.glob("cpu-*.json")).read_text())
    assert record["equal"] is True
    assert set(record["ratios"]) == {
        "train_wide",
        "score_wide",
        "train_7b_geometry",
        "score_7b_geometry",
        "peak_memory_wide",
    }
    assert {
        "suite",
        "date",
        "command",
        "config",
        "git_commit",
        "versions",
        "hardware",
        "ceilings",
    } <= set(record)
    wide = record["geometries"]["wide"]
    assert len(wide["cpu_seconds"]["train"]["plain"]) == len(wide["rounds"]) == 2
    assert (
        set(wide["rounds"][0]["losses"])
        == set(wide["rounds"][0]["predictions"])
        == set(wide["figures"])
    )
    assert "backbone products" in wide["time_split"]["fast"]["train"]
    assert (
        record["memory"]["plain"]["growth_mib"] > 0
        and record["memory"]["plain"]["held_mib"] > record["memory"]["fast"]["held_mib"]
    )
    assert "vqa " in out and "train_wide" in out

    written = str(next(tmp_path.glob("cpu-*.json")))
    assert run.main(["report", written, "--out", str(tmp_path / "report")]) == 0
    drawn = json.loads(capfd.readouterr().out.splitlines()[-1])["plots"]
    assert [Path(plot).name for plot in drawn] == ["memory.png", "waterfall.png", "time-split.png"]
    assert all(Path(plot).read_bytes().startswith(b"\x89PNG") for plot in drawn)


@pytest.mark.parametrize("where", ["loss", "score", "gradient", "nan"])
def test_what_differs_is_not_reported(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    train, score = Packed.train, Packed.score

    def other_train(self: Packed, work: TrainingWork) -> list[float]:
        losses = train(self, work)
        if where == "gradient":
            gradient = self.model.visual_proj.weight.grad
            assert gradient is not None
            gradient.mul_(1.01)
        return {"loss": [losses[0] * (1 + 1e-4), losses[1]], "nan": [losses[0], float("nan")]}.get(
            where, losses
        )

    def other_score(self: Packed, work: ScoringWork) -> torch.Tensor:
        return score(self, work) + (0.01 if where == "score" else 0.0)

    monkeypatch.setattr(Packed, "train", other_train)
    monkeypatch.setattr(Packed, "score", other_score)
    assert run.main([*FLAGS, "--results", str(tmp_path)]) == 1
    out, err = capfd.readouterr()
    record = json.loads(out.splitlines()[-1])
    assert record["equal"] is False and record["ratios"] == {}
    assert not any(
        "cpu_seconds" in measured or "figures" in measured
        for measured in record["geometries"].values()
    )
    assert "do not compute the same" in err


def test_fast_model_takes_the_baselines_weights() -> None:
    plain, fast = make_pair(TINY)
    assert (
        dict(plain.named_parameters()).keys()
        == dict(fast.named_parameters()).keys()
        == random_weights(make_fast(TINY, torch.float32)).keys()
    )


def test_peak_growth_sees_what_is_freed_again() -> None:
    measured = peak_growth(lambda: torch.ones(64 * 2**20 // 4).sum().item())
    if measured["peak_was_reset"]:
        assert 60 < measured["growth_mib"] < 80
