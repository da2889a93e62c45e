"""The model against the oracle: losses, option scores and the gradient of every trainable."""

import pytest
import torch
from torch import Tensor

from reference import oracle, oracle_files
from support.backbones import distance, every_attention
from support.toy_dataset import ToyData
from vico.data.packing import Example, pack
from vico.data.prompts import Prompts
from vico.data.tokenizer import Tokenizer
from vico.data.types import Question
from vico.model.attention.blockwise import attend_blocks
from vico.model.attention.masks import Attend
from vico.model.batch import PackedBatch
from vico.model.block_runners import choose_block_runners
from vico.model.config import trainable_shapes
from vico.model.vico import ViCo, initial_trainables
from vico.model.weights.meta import MetaWeights

TASKS = ("vqa", "cap", "vaq", "qav")
# Rounding of fp32 through three layers. Measured: losses 2e-7, gradients 6e-6 of the largest,
# scores 2e-6.
LOSS_RTOL, GRAD_RTOL, SCORE_ATOL = 1e-6, 1e-5, 1e-5
# bf16 keeps 8 bits (4e-3) and a random tiny model does not average. Measured: losses 1.3e-3,
# gradients 6e-2 and, for gate2, 0.25.
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
    num_adapted = hyper.adapter_layer or 3
    sizes = (num_adapted, hyper.adapter_len, hyper.max_feats, hyper.tau)
    model = ViCo(weights.config, *sizes, dtype)
    for name, parameter in model.named_parameters():
        value = trainables[name].detach() if name in trainables else weights.read(name)
        parameter.data.copy_(value)
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
            examples += [Example(prompts.vqa(question, option), i, 0) for option in range(5)]
            continue
        for task_index, task in enumerate(TASKS):
            if task == "cap":
                sequence = prompts.caption(item.caption or "")
            else:
                sequence = prompts.question_sequence(task, question, item.answer)
            examples.append(Example(sequence, i, task_index))
    frames = torch.stack([oracle.frames(item.features, 10) for item in items])
    return pack(examples, frames, share)


Result = tuple[list[float], dict[str, Tensor]]  # losses by task, and gradients by trainable


def losses_and_gradients(model: ViCo, batch: PackedBatch) -> Result:
    losses = model(batch)
    means = [losses[batch.target_tasks == task].mean() for task in range(len(TASKS))]
    (means[0] + 0.5 * means[1] + means[2] + means[3]).backward()
    return [mean.item() for mean in means], gradients_of(dict(model.named_parameters()))


def oracle_losses_and_gradients(setup: Setup, num: int) -> Result:
    toy, model, hyper, trainables = setup
    for value in trainables.values():
        value.grad = None
    items = toy.items("train")[:num]
    total, losses, _ = oracle.step_losses(model, toy.tokenizer, trainables, items, hyper)
    total.backward()
    return [float(loss.detach()) for loss in losses.values()], gradients_of(trainables)


def gradients_of(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("share", [True, False], ids=["tree", "apart"])
@every_attention
def test_losses_and_every_gradient(setup: Setup, attend: Attend, share: bool) -> None:
    model = make_model(setup, torch.float32, attend)
    losses, gradients = losses_and_gradients(model, make_batch(setup, 6, share, scoring=False))
    expected, expected_gradients = oracle_losses_and_gradients(setup, 6)
    assert losses == pytest.approx(expected, rel=LOSS_RTOL)
    assert set(gradients) == set(expected_gradients) == set(setup[3])
    for name, gradient in gradients.items():
        assert expected_gradients[name].abs().max() > 0, f"{name} is not tested"
        assert distance(gradient, expected_gradients[name]) < GRAD_RTOL, name


@every_attention
def test_bf16_stays_near_fp32(setup: Setup, attend: Attend) -> None:
    model = make_model(setup, torch.bfloat16, attend)
    losses, gradients = losses_and_gradients(model, make_batch(setup, 6, True, scoring=False))
    expected, expected_gradients = oracle_losses_and_gradients(setup, 6)
    assert losses == pytest.approx(expected, rel=BF16_LOSS_RTOL)
    for name, gradient in gradients.items():
        bound = BF16_GATE2_RTOL if "gate2" in name else BF16_GRAD_RTOL
        assert distance(gradient, expected_gradients[name]) < bound, name


@pytest.mark.parametrize("share", [True, False], ids=["branches", "full-sequences"])
def test_option_scores(setup: Setup, share: bool) -> None:
    toy, weights, hyper, trainables = setup
    batch = make_batch(setup, 6, share, scoring=True)
    items = toy.items("train")[:6]
    with torch.no_grad():
        losses = make_model(setup, torch.float32, attend_blocks)(batch)
        expected = [
            oracle.score_options(weights, toy.tokenizer, trainables, item, hyper) for item in items
        ]
    sums = torch.zeros(30).index_add(0, batch.target_sequences, losses)
    scores = (sums / torch.bincount(batch.target_sequences)).view(6, 5)
    expected_scores = torch.tensor(expected)
    assert (scores - expected_scores).abs().max() < SCORE_ATOL
    assert torch.equal(scores.argmin(1), expected_scores.argmin(1))


def test_zero_gates_hide_the_prompts(setup: Setup) -> None:
    model = make_model(setup, torch.float32, attend_blocks)
    for name, parameter in model.named_parameters():
        if name.endswith("gate1"):
            parameter.data.zero_()
    batch = make_batch(setup, 2, True, scoring=False)
    before, gradients = losses_and_gradients(model, batch)
    assert not gradients["adapter_query.weight"].any()
    assert gradients["layers.2.attention.gate1"].any()
    model.adapter_query.weight.data.add_(1.0)
    assert losses_and_gradients(model, batch)[0] == before


def test_initial_values(toy: ToyData) -> None:
    config = MetaWeights(toy.llama / "tiny", toy.tokenizer.vocab_size()).config
    shapes = trainable_shapes(config, 2, 10, 10)
    values = initial_trainables(shapes, bias=3.5, seed=0)
    assert {name: tuple(value.shape) for name, value in values.items()} == shapes
    assert list(shapes)[3:] == [f"layers.{i}.attention.gate{g}" for i in (1, 2) for g in (1, 2)]
    assert not values["layers.1.attention.gate1"].any()
    assert (values["layers.2.attention.gate2"] == -3.5).all()
    assert values["visual_proj.weight"].abs().max() <= 768**-0.5
    assert 0.9 < values["temporal_emb.weight"].std() < 1.1
    again, other = initial_trainables(shapes, 3.5, 0), initial_trainables(shapes, 3.5, 1)
    assert all(torch.equal(value, again[name]) for name, value in values.items())
    assert not torch.equal(values["adapter_query.weight"], other["adapter_query.weight"])


def test_two_shards_are_one_model(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("shards") / "two"
    vocab_size = toy.tokenizer.vocab_size()
    sizes = {"dim": 32, "n_layers": 3, "n_heads": 4}
    oracle_files.write_tiny_meta(folder, vocab_size, shards=2, **sizes)
    one, two = MetaWeights(toy.llama / "tiny", vocab_size), MetaWeights(folder, vocab_size)
    assert len(list(folder.glob("*.pth"))) == 2
    _, expected = oracle_files.load_meta(toy.llama / "tiny")
    for name in expected:
        assert torch.equal(one.read(name), two.read(name))
        assert torch.equal(one.read(name).float(), expected[name])
