"""The model against the oracle: losses, option scores and the gradient of every trainable."""

import pytest
import torch
from torch import Tensor

from reference import oracle, oracle_files
from support.toy_dataset import ToyData
from vico.data.packing import Example, pack
from vico.data.prompts import Prompts
from vico.data.tokenizer import Tokenizer
from vico.data.types import Question
from vico.model.attention.backends import KERNELS
from vico.model.attention.blockwise import attend_blocks
from vico.model.attention.masks import Attend
from vico.model.attention.reference import attend_plain
from vico.model.attention.varlen import PackedAttention
from vico.model.batch import PackedBatch
from vico.model.block_runners import choose_block_runners
from vico.model.config import trainable_shapes
from vico.model.vico import ViCo, initial_trainables
from vico.model.weights.meta import MetaWeights

TASKS = ("vqa", "cap", "vaq", "qav")
# Rounding of fp32 through three layers; measured here: losses 2e-7, gradients 6e-6 of the largest, scores 2e-6.
LOSS_RTOL, GRAD_RTOL, SCORE_ATOL = 1e-6, 1e-5, 1e-5
# bf16 keeps 8 bits (4e-3) and a random tiny model does not average: measured losses 1.3e-3, gradients 6e-2 and, for gate2, 0.25.
BF16_LOSS_RTOL, BF16_GRAD_RTOL, BF16_GATE2_RTOL = 5e-3, 0.12, 0.5
Setup = tuple[ToyData, oracle.Model, oracle.Hyper, oracle.Trainables]


@pytest.fixture(scope="module", params=[3, 2], ids=["all-layers", "top-2-of-3"])
def setup(toy: ToyData, request: pytest.FixtureRequest) -> Setup:
    hyper = oracle.Hyper(adapter_layer=request.param, bias=0.7, vaq=True, qav=True)
    model = oracle_files.load_meta(toy.llama / "tiny")
    return toy, model, hyper, oracle.init_trainables(model[0], hyper, random_gates=True)


def make_model(setup: Setup, dtype: torch.dtype, attend: Attend) -> ViCo:
    toy, _, hyper, trainables = setup
    weights = MetaWeights(toy.llama / "tiny", toy.tokenizer.vocab_size())
    model = ViCo(
        weights.config,
        hyper.adapter_layer or 3,
        hyper.adapter_len,
        hyper.max_feats,
        hyper.tau,
        dtype,
    )
    for name, parameter in model.named_parameters():
        parameter.data.copy_(
            trainables[name].detach() if name in trainables else weights.read(name)
        )
    choose_block_runners(model, attend)
    return model


def make_batch(setup: Setup, num: int, share: bool, scoring: bool) -> PackedBatch:
    toy = setup[0]
    prompts = Prompts(Tokenizer(toy.llama / "tokenizer.model"), 10, 512, 384, False)
    items = toy.items("train")[:num]
    examples = []
    for i, item in enumerate(items):
        question = Question(i, "0", "v", "CW", item.question, item.options, item.answer)
        if scoring:
            examples += [Example(prompts.vqa(question, a), i, 0) for a in range(5)]
            continue
        for t, task in enumerate(TASKS):
            sequence = (
                prompts.caption(item.caption or "")
                if task == "cap"
                else prompts.question_sequence(task, question, item.answer)
            )
            examples.append(Example(sequence, i, t))
    return pack(examples, torch.stack([oracle.frames(item.features, 10) for item in items]), share)


def losses_and_gradients(model: ViCo, batch: PackedBatch) -> tuple[list[float], dict[str, Tensor]]:
    losses = model(batch)
    means = [losses[batch.target_tasks == t].mean() for t in range(len(TASKS))]
    (means[0] + 0.5 * means[1] + means[2] + means[3]).backward()
    return [m.item() for m in means], {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def oracle_losses_and_gradients(setup: Setup, num: int) -> tuple[list[float], dict[str, Tensor]]:
    toy, model, hyper, trainables = setup
    for value in trainables.values():
        value.grad = None
    total, losses, _ = oracle.step_losses(
        model, toy.tokenizer, trainables, toy.items("train")[:num], hyper
    )
    total.backward()
    return [float(v.detach()) for v in losses.values()], {
        n: v.grad for n, v in trainables.items() if v.grad is not None
    }


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("share", [True, False], ids=["tree", "apart"])
@pytest.mark.parametrize(
    "attend",
    [attend_blocks, attend_plain, PackedAttention(KERNELS["sdpa"])],
    ids=["blocks", "plain", "packed"],
)
def test_losses_and_every_gradient(setup: Setup, attend: Attend, share: bool) -> None:
    model = make_model(setup, torch.float32, attend)
    losses, gradients = losses_and_gradients(model, make_batch(setup, 6, share, scoring=False))
    expected, expected_gradients = oracle_losses_and_gradients(setup, 6)
    assert losses == pytest.approx(expected, rel=LOSS_RTOL)
    assert set(gradients) == set(expected_gradients) == set(setup[3])
    for name, gradient in gradients.items():
        assert expected_gradients[name].abs().max() > 0, f"{name} is out of the test's sight"
        assert distance(gradient, expected_gradients[name]) < GRAD_RTOL, name


@pytest.mark.parametrize(
    "attend",
    [attend_blocks, attend_plain, PackedAttention(KERNELS["sdpa"])],
    ids=["blocks", "plain", "packed"],
)
def test_bf16_stays_near_fp32(setup: Setup, attend: Attend) -> None:
    model = make_model(setup, torch.bfloat16, attend)
    losses, gradients = losses_and_gradients(model, make_batch(setup, 6, True, scoring=False))
    expected, expected_gradients = oracle_losses_and_gradients(setup, 6)
    assert losses == pytest.approx(expected, rel=BF16_LOSS_RTOL)
    for name, gradient in gradients.items():
        assert distance(gradient, expected_gradients[name]) < (
            BF16_GATE2_RTOL if "gate2" in name else BF16_GRAD_RTOL
        ), name


@pytest.mark.parametrize("share", [True, False], ids=["branches", "full-sequences"])
def test_option_scores(setup: Setup, share: bool) -> None:
    toy, weights, hyper, trainables = setup
    batch = make_batch(setup, 6, share, scoring=True)
    with torch.no_grad():
        losses = make_model(setup, torch.float32, attend_blocks)(batch)
        expected = torch.tensor(
            [
                oracle.score_options(weights, toy.tokenizer, trainables, i, hyper)
                for i in toy.items("train")[:6]
            ]
        )
    scores = torch.zeros(30).index_add(0, batch.target_sequences, losses) / torch.bincount(
        batch.target_sequences
    )
    assert (scores.view(6, 5) - expected).abs().max() < SCORE_ATOL
    assert torch.equal(scores.view(6, 5).argmin(1), expected.argmin(1))


def test_at_zero_gates_the_prompts_are_invisible(setup: Setup) -> None:
    model = make_model(setup, torch.float32, attend_blocks)
    for name, parameter in model.named_parameters():
        if name.endswith("gate1"):
            parameter.data.zero_()
    batch = make_batch(setup, 2, True, scoring=False)
    before, gradients = losses_and_gradients(model, batch)
    assert (
        not gradients["adapter_query.weight"].any() and gradients["layers.2.attention.gate1"].any()
    )
    model.adapter_query.weight.data.add_(1.0)
    assert losses_and_gradients(model, batch)[0] == before


def test_initial_values(toy: ToyData) -> None:
    shape = MetaWeights(toy.llama / "tiny", toy.tokenizer.vocab_size()).config
    shapes = trainable_shapes(shape, 2, 10, 10)
    values = initial_trainables(shapes, bias=3.5, seed=0)
    assert {n: tuple(v.shape) for n, v in values.items()} == shapes
    assert list(shapes)[3:] == [f"layers.{i}.attention.gate{g}" for i in (1, 2) for g in (1, 2)]
    assert (
        not values["layers.1.attention.gate1"].any()
        and (values["layers.2.attention.gate2"] == -3.5).all()
    )
    assert (
        values["visual_proj.weight"].abs().max() <= 768**-0.5
        and 0.9 < values["temporal_emb.weight"].std() < 1.1
    )
    again, other = initial_trainables(shapes, 3.5, 0), initial_trainables(shapes, 3.5, 1)
    assert all(torch.equal(values[n], again[n]) for n in values) and not torch.equal(
        values["adapter_query.weight"], other["adapter_query.weight"]
    )


def test_two_shards_are_one_model(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("shards") / "two"
    oracle_files.write_tiny_meta(
        folder, toy.tokenizer.vocab_size(), dim=32, n_layers=3, n_heads=4, shards=2
    )
    one, two = (MetaWeights(f, toy.tokenizer.vocab_size()) for f in (toy.llama / "tiny", folder))
    assert len(list(folder.glob("*.pth"))) == 2
    _, expected = oracle_files.load_meta(toy.llama / "tiny")
    for name in expected:
        assert torch.equal(one.read(name), two.read(name)) and torch.equal(
            one.read(name).float(), expected[name]
        )
