"""--keep: the divergence from the frozen model as a task of the step, against the oracle."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reference import oracle, oracle_files
from reference.oracle_sequences import OracleSequence
from support.backbones import ATTENTIONS, KINDS, Ungrouped, make_hugging_face, make_model
from support.planning import LENGTHS, VICO_CONFIGS
from support.toy_dataset import ToyData
from support.training import Run
from vico.cli.flags import as_flag, parse
from vico.cli.main import main
from vico.data.packing import Example, pack
from vico.data.text_windows import KEPT_TOKENS, KeptTexts, Text, Texts, text_sequence
from vico.data.types import VIDEO_SLOT, TokenSequence
from vico.model.batch import PackedBatch
from vico.model.config import KEPT_WEIGHT
from vico.model.interfaces import MakeLinear
from vico.model.llama import FrozenLinear
from vico.model.ops import fp8
from vico.model.quantized_linear import quantized_linear
from vico.model.vico import ViCo
from vico.model.weights.load import open_weights
from vico.planner.estimate import estimate_memory
from vico.planner.gpu_specs import GPUS, Hardware
from vico.planner.request import PlanRequest
from vico.planner.speed import estimate_speed

STEPS = "--batch_size 5 --epochs 2 --warmup_epochs 1 --lr 0.02 --bias 0.7 --no_eval".split()
TEXT = "a man and a dog run. the cat smiles? why does the man hold it.\n" * 12
TEXTS = ((1, 7, 8, 9, 30, 31), (1, 40, 41, 42), (1, 7, 8, 9, 50))


def batch_with_texts() -> PackedBatch:
    """A question with a video, and three texts; two begin alike."""
    tokens = (1, 5, VIDEO_SLOT, VIDEO_SLOT, 6, 7, 8)
    question = Example(TokenSequence("vqa", tokens, range(5, 7), 2), 0, 0)
    texts = [Example(text_sequence(tokens), 0, 1) for tokens in TEXTS]
    generator = torch.Generator().manual_seed(3)
    features_VFC = torch.randn(1, 2, 768, generator=generator)
    return pack([question, *texts], features_VFC, texts=pack(texts, features_VFC[:0]))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_losses_and_gradients_are_the_oracles(toy: ToyData, attention: str) -> None:
    """By full logits and plain autograd in float64; the question's losses stay as they were."""
    model = make_model(open_weights(toy.llama / "tiny", None), ATTENTIONS[attention])
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if "gate" in name:
            value.data = torch.randn(value.shape, generator=generator)
    batch = batch_with_texts()
    losses = model(batch)
    is_text = batch.target_tasks == 1
    losses[is_text].sum().backward()
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    params, weights = oracle_files.load_meta(toy.llama / "tiny", torch.float64)
    trained = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
    trained["temporal_emb.weight"] = trained["temporal_emb.weight"][:0]
    frozen = {n: v * 0 if n.endswith("gate1") else v for n, v in trained.items()}
    for value in trained.values():
        value.requires_grad_()
    expected: list[Tensor] = []
    for tokens in TEXTS:
        sequence = OracleSequence("caption", list(tokens), [], len(tokens))
        no_video = torch.zeros(0, 768, dtype=torch.float64)
        p, q = (
            (
                oracle.trunk((params, weights), values, sequence, no_video, oracle.Hyper())
                @ weights["output.weight"].T
            ).log_softmax(-1)[:-1]
            for values in (frozen, trained)
        )
        expected.append((p.detach().exp() * (p.detach() - q)).sum(-1))
    divergences = torch.cat(expected)
    divergences.sum().backward()
    assert torch.allclose(losses[is_text].double(), divergences, rtol=1e-4, atol=1e-6)
    for name in ("adapter_query.weight", *(n for n in own if n.endswith("gate1"))):
        gradient = trained[name].grad
        assert gradient is not None and gradient.abs().max() > 0
        assert (own[name].double() - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name

    without = model(replace(batch, texts=None))
    assert torch.equal(without[~is_text], losses[~is_text])


@pytest.mark.parametrize("kind", ["grouped", "8bit", "nf4", "fp8"])
def test_twins_of_other_backbones(kind: str, tmp_path: Path) -> None:
    """Grouped heads: a model with a key and value head per query head. Quantized weights: the model
    of their dequantized values. Both with the whole score matrix, full logits and plain autograd.
    fp8, which rounds every input of a product: its own hidden states, with full logits.
    """
    if kind == "fp8" and (reason := fp8.why_not(torch.device("cpu"), torch.float32)):
        pytest.skip(reason)
    make_hugging_face(tmp_path, KINDS["LLaMA-2-70B"])
    weights = open_weights(tmp_path, None)
    linear: MakeLinear = FrozenLinear
    if kind != "grouped":
        linear = quantized_linear(kind)  # type: ignore[arg-type]
    own = make_model(weights, linear=linear, gate1=0.5)
    twin = own
    if kind != "fp8":
        twin = make_model(Ungrouped(weights, of=own), ATTENTIONS["plain"], gate1=0.5)
    batch = batch_with_texts()
    is_text = batch.target_tasks == 1
    losses = own(batch)[is_text]
    losses.sum().backward()
    gradients = {name: p.grad.clone() for name, p in own.named_parameters() if p.grad is not None}
    own.zero_grad()
    expected = divergences_of(twin, batch)
    expected.sum().backward()
    assert torch.allclose(losses, expected, rtol=1e-4, atol=1e-6) and (losses > 1e-4).all()
    for name, parameter in twin.named_parameters():
        if name == "adapter_query.weight" or name.endswith("gate1"):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0
            error = (gradients[name] - parameter.grad).abs().max()
            assert error <= 1e-5 * parameter.grad.abs().max(), name


def divergences_of(model: ViCo, batch: PackedBatch) -> Tensor:
    """KL(frozen || adapted) of the texts' targets, by full logits of both passes."""
    assert batch.texts is not None
    projected_VFD = model.visual_proj(batch.features_VFC)
    prompts_GAD = model._prompts(torch.device("cpu"))
    q_RD = model._hidden(batch, prompts_GAD, projected_VFD)
    with torch.no_grad():
        p_RD = model._hidden(batch.texts, None, projected_VFD)
    q_ND = q_RD[batch.token_rows_N][batch.target_tasks == 1]
    p_ND = p_RD[batch.texts.token_rows_N]
    p_NW, q_NW = ((h @ model.output.weight.T).log_softmax(-1) for h in (p_ND, q_ND))
    return (p_NW.exp() * (p_NW - q_NW)).sum(-1)


def test_windows_are_drawn_from_all_places() -> None:
    """Each text by its places; a short one whole. BOS comes before."""
    long, short = list(range(100, 100 + KEPT_TOKENS + 2)), [7, 8]
    kept = KeptTexts(Texts((Text(Path("a"), long, 1), Text(Path("b"), short, 1)), 1, 9))
    rng = np.random.default_rng(0)
    drawn = {kept.draw(rng).tokens for _ in range(200)}
    expected = {(1, *long[i : i + KEPT_TOKENS]) for i in range(3)}
    assert drawn == {*expected, (1, 7, 8)}


def train(toy: ToyData, out: Path, *flags: str) -> int:
    return main(["train", *toy.flags, *STEPS, "--output_dir", str(out), *flags])


@pytest.mark.usefixtures("in_this_process")
def test_resumed_and_divided_otherwise(toy: ToyData, tmp_path: Path) -> None:
    """Cut in two: the same bits. In other micro-batches: the same up to the order of sums."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    flags = ["--text", str(text), "--keep", "3"]
    assert train(toy, tmp_path / "whole", *flags) == 0
    whole = Run(tmp_path / "whole")
    assert train(toy, tmp_path / "cut", *flags, "--max_steps", "3") == 0
    assert train(toy, tmp_path / "cut", *flags) == 0
    cut = Run(tmp_path / "cut")
    for name, value in whole.tensors(8).items():
        assert torch.equal(cut.tensors(8)[name], value), name
    divided = ["--batch_size", "1", "--accum_iter", "5"]
    assert train(toy, tmp_path / "divided", *flags, *divided) == 0
    other = Run(tmp_path / "divided")
    for record, same in zip(whole.steps, other.steps, strict=True):
        assert record["keep_targets"] == same["keep_targets"] > 0
        assert record["keep_loss"] == pytest.approx(same["keep_loss"], rel=1e-4, abs=1e-6)
        total = record["vqa_loss"] + 0.5 * record["cap_loss"] + 3 * record["keep_loss"]
        assert record["loss"] == pytest.approx(total)
    assert whole.steps[-1]["keep_loss"] > 0 and whole.steps[0]["keep_loss"] < 1e-6


@pytest.mark.usefixtures("in_this_process")
def test_it_needs_texts(toy: ToyData, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(toy, tmp_path / "out", "--keep", "1") == 2
    assert "--keep 1.0: must be given together with --text FILE" in capfd.readouterr().err
    assert train(toy, tmp_path / "out", "--keep", "-1") == 2
    assert "--keep -1.0: must be 0 or more" in capfd.readouterr().err


def test_without_a_number(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The flag, KEY=VALUE and a recipe mean the same weight; a number, and its absence, as ever."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("keep: true\ntext: /a.txt\n", encoding="utf-8")
    text = ["--text", "/a.txt"]
    for words in (
        ["--keep", *text],
        [*text, "--keep"],
        [*text, "--keep", "lr=1e-3"],
        ["keep=true", *text],
        ["--config", str(recipe)],
    ):
        assert parse(words, "vico train", "").resolve().keep == KEPT_WEIGHT, words
    assert parse(["--keep", "3", *text], "vico train", "").resolve().keep == 3
    assert parse(text, "vico train", "").resolve().keep is None
    assert "keep" not in parse(text, "vico train", "").resolve().tasks
    own = ["--config", str(recipe)]
    for off in ("--keep 0", "--keep none", "--keep False", "keep=false", "keep=0"):
        assert parse([*own, *off.split()], "vico train", "").resolve().keep is None, off
    assert parse(["--keep", "true", *text], "vico train", "").resolve().keep == KEPT_WEIGHT
    recipe.write_text("keep: false\nattention_shares: false\n", encoding="utf-8")
    assert parse(own, "vico train", "").resolve() == parse([], "vico train", "").resolve()

    assert as_flag("keep", "true") == "--keep"
    plans = []
    for words in (["--keep"], ["--keep", "7"], []):
        assert main(["plan", "--gpu", "H100", "--json", *words]) == 0
        plans.append(json.loads(capfd.readouterr().out))
    assert plans[0] == plans[1] != plans[2]
    assert main(["plan", "--gpu", "H100", "--keep", "1e16"]) == 2
    assert "1e16 must be 0 to 1e+15" in capfd.readouterr().err


def test_a_plan_counts_it() -> None:
    """More memory and time for the same questions; test_keep_memory.py has how much."""
    hardware = Hardware(GPUS["H100"], 1)
    without = PlanRequest("7B", VICO_CONFIGS["7B"], hardware, LENGTHS)
    with_texts = replace(without, lengths=replace(LENGTHS, text=KEPT_TOKENS + 1))
    heads, seconds = [], []
    for request in (without, with_texts):
        heads.append(estimate_memory(request, "zero2", 0, request.batch_tokens).head)
        speed, _ = estimate_speed(request, "zero2", 0, request.batch_tokens)
        assert speed is not None
        seconds.append(speed.epoch_seconds)
    assert heads[1] > heads[0] and 1.2 * seconds[0] < seconds[1] < 1.4 * seconds[0]
