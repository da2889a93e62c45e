"""Half precision where it matters: on confident, trained models, whose logits are large.

Losses, option scores and gradients in bf16 and fp16 against fp32 of the same weights. On random
weights, whose logits are small, an error that grows with the logits is not seen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reference import oracle, oracle_files
from support.backbones import every_attention
from support.toy_dataset import ToyData
from vico.data.packing import Example, pack
from vico.data.prompts import Prompts
from vico.data.tokenizer import Tokenizer
from vico.data.types import Question
from vico.model import config
from vico.model.attention.masks import Attend
from vico.model.batch import PackedBatch
from vico.model.block_runners import choose_block_runners
from vico.model.config import LlamaConfig
from vico.model.ops import autograd
from vico.model.ops.autograd import linear_cross_entropy
from vico.model.ops.logits import Divergence, compare_predictions
from vico.model.vico import ViCo

HALF = (torch.bfloat16, torch.float16)
# About twice what was measured, in L2: the gradient of a divergence.
KEPT_GRAD_RTOL = {torch.bfloat16: 6e-3, torch.float16: 8e-4}
HEAD_GRAD_RTOL = {torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass(frozen=True)
class Bounds:
    """Of a trained model's root mean square distances to fp32; of gradients, relative, in L2."""

    confident_loss: float  # of targets whose loss is below 0.05
    score: float
    chosen_score: float  # of the options with the lowest scores
    training_loss: float
    gradient: float
    gate2_gradient: float


# About twice what was measured. With a target's logit rounded apart from the others, as it once
# was, bf16 had 0.020, 0.015, 0.0063, 0.018, 0.24 and 0.48.
BOUNDS = {
    torch.bfloat16: Bounds(0.0015, 0.03, 1e-4, 0.0012, 0.4, 0.7),
    torch.float16: Bounds(2.5e-4, 0.005, 1e-5, 2e-4, 0.08, 0.08),
}
every_half = pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
WIDTH, VOCABULARY, NUM_ROWS = 64, 3000, 120
# Of the output head alone, relative to a type's rounding of 1: 8 and 11 bits.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclass
class Head:
    """The output head's inputs, exact in half precision, and its losses and gradient in float64."""

    h_RD: Tensor
    weight_WD: Tensor
    rows_N: Tensor
    ids_N: Tensor
    upstream_N: Tensor

    @classmethod
    def draw(cls, dtype: torch.dtype, rows_N: Tensor) -> "Head":
        """The first half of the rows is confident: losses of 1e-9 to 0.5, logits of about 25."""
        generator = torch.Generator().manual_seed(0)
        weight_WD = torch.randn(VOCABULARY, WIDTH, generator=generator)
        ids_N = torch.randint(VOCABULARY, (len(rows_N),), generator=generator)
        h_RD = torch.randn(NUM_ROWS, WIDTH, generator=generator)
        num_confident = NUM_ROWS // 2
        own_RD = weight_WD[ids_N.new_zeros(NUM_ROWS).index_copy(0, rows_N, ids_N)]
        h_RD[:num_confident] = 0.2 * h_RD[:num_confident] + 0.35 * own_RD[:num_confident]
        upstream_N = torch.rand(len(rows_N), generator=generator)
        return cls(h_RD.to(dtype), weight_WD.to(dtype), rows_N, ids_N, upstream_N)

    @property
    def is_confident_N(self) -> Tensor:
        return self.rows_N < NUM_ROWS // 2

    def run(self) -> tuple[Tensor, Tensor]:
        """(losses [N], gradient [R, D])."""
        h_RD = self.h_RD.detach().requires_grad_()
        losses_N = linear_cross_entropy(h_RD, self.weight_WD, self.rows_N, self.ids_N)
        (gradient_RD,) = torch.autograd.grad(losses_N, h_RD, self.upstream_N)
        return losses_N.detach(), gradient_RD

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """(losses [N], gradient [R, D], largest logit of each target's row [N]), in float64."""
        h_RD = self.h_RD.double().requires_grad_()
        logits_NW = h_RD[self.rows_N] @ self.weight_WD.double().t()
        losses_N = F.cross_entropy(logits_NW, self.ids_N, reduction="none")
        (gradient_RD,) = torch.autograd.grad(losses_N, h_RD, self.upstream_N.double())
        return losses_N.detach(), gradient_RD, logits_NW.detach().abs().amax(dim=-1)


ONCE = torch.arange(NUM_ROWS)
SHARED = torch.arange(NUM_ROWS * 2) // 2


def check_losses(head: Head, losses_N: Tensor, dtype: torch.dtype) -> None:
    """Never below 0, and within the rounding of one logit, the target's being exact."""
    exact_N, _, largest_N = head.exact()
    assert losses_N.dtype == torch.float32
    assert (losses_N >= 0).all()
    # softplus'(x) <= 1, and for a confident token p, which is 1 - exp(-loss).
    slope_N = -torch.expm1(-exact_N)
    bound_N = ROUNDING[dtype] * largest_N * slope_N * 1.2 + 1e-6
    error_N = (losses_N - exact_N).abs()
    assert (error_N <= bound_N).all(), (error_N / bound_N).max()


@every_half
@pytest.mark.parametrize("rows_N", [ONCE, SHARED], ids=["once", "shared"])
def test_losses_of_the_head(dtype: torch.dtype, rows_N: Tensor) -> None:
    head = Head.draw(dtype, rows_N)
    check_losses(head, head.run()[0], dtype)
    with torch.no_grad():
        losses_N = linear_cross_entropy(head.h_RD, head.weight_WD, head.rows_N, head.ids_N)
    check_losses(head, losses_N, dtype)


@every_half
@pytest.mark.parametrize("rows_N", [ONCE, SHARED], ids=["once", "shared"])
def test_gradient_of_the_head(dtype: torch.dtype, rows_N: Tensor) -> None:
    """Row by row: the gradient of a confident token is small, and a sum would hide it."""
    head = Head.draw(dtype, rows_N)
    exact_N, exact_RD, _ = head.exact()
    _, gradient_RD = head.run()
    assert gradient_RD.dtype == dtype
    # Below, fp16 has no numbers; a run scales its losses up for that.
    is_seen_R = torch.zeros(NUM_ROWS, dtype=torch.bool).index_fill(0, rows_N[exact_N > 1e-3], True)
    assert is_seen_R[: NUM_ROWS // 2].sum() > 10
    error_R = (gradient_RD - exact_RD).norm(dim=1) / exact_RD.norm(dim=1)
    assert error_R[is_seen_R].max() < HEAD_GRAD_RTOL[dtype], error_R[is_seen_R].max()


@every_half
def test_chunks_of_logits_are_one_product(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 7 rows, the last one shorter; targets of one row on both sides of a boundary."""
    head = Head.draw(dtype, SHARED)
    whole = head.run()
    monkeypatch.setitem(config.HEAD_CHUNK_BYTES, "cpu", 7 * 4 * VOCABULARY)
    for actual, expected in zip(head.run(), whole, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-2, atol=1e-5)
    with torch.no_grad():
        losses_N = linear_cross_entropy(head.h_RD, head.weight_WD, head.rows_N, head.ids_N)
    assert torch.allclose(losses_N, whole[0], rtol=1e-2, atol=1e-5)


def two_models(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The (frozen, adapted) states [R, D], which differ as a trained adapter's do, and the head's
    weight: half of the rows confident.
    """
    head = Head.draw(dtype, ONCE)
    generator = torch.Generator().manual_seed(1)
    moved_RD = head.h_RD + 0.1 * torch.randn(NUM_ROWS, WIDTH, generator=generator)
    return head.h_RD, moved_RD.to(dtype), head.weight_WD


@pytest.mark.parametrize("num_rows", [7, NUM_ROWS])
@every_half
def test_a_divergence_and_its_gradient(
    dtype: torch.dtype, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By full logits and plain autograd in float64; also in chunks of rows."""
    num_bytes = config.DIVERGENCE_COPIES * num_rows * 4 * VOCABULARY
    monkeypatch.setitem(config.HEAD_CHUNK_BYTES, "cpu", num_bytes)
    p_RD, q_RD, weight_WD = two_models(dtype)
    upstream_N = torch.rand(NUM_ROWS, generator=torch.Generator().manual_seed(2))
    own_RD, exact_RD = q_RD.clone().requires_grad_(), q_RD.double().requires_grad_()
    found_N = Divergence.apply(own_RD, p_RD, weight_WD)
    (gradient_RD,) = torch.autograd.grad(found_N, own_RD, upstream_N)
    p_NW, q_NW = (
        (h_RD.double() @ weight_WD.double().t()).log_softmax(-1) for h_RD in (p_RD, exact_RD)
    )
    expected_N = (p_NW.exp() * (p_NW - q_NW)).sum(-1)
    (expected_RD,) = torch.autograd.grad(expected_N, exact_RD, upstream_N.double())
    assert (found_N.dtype, gradient_RD.dtype) == (torch.float32, dtype)
    # Products are in fp32, of inputs that are exact.
    assert torch.allclose(found_N.double(), expected_N.detach(), rtol=1e-4, atol=1e-5)
    error_R = (gradient_RD - expected_RD).norm(dim=1) / expected_RD.norm(dim=1)
    is_seen_R = expected_N > 1e-3
    assert is_seen_R.sum() > 50
    total = (gradient_RD - expected_RD).norm() / expected_RD.norm()
    assert total < KEPT_GRAD_RTOL[dtype], total
    assert error_R[is_seen_R].max() < HEAD_GRAD_RTOL[dtype], error_R[is_seen_R].max()


@pytest.mark.parametrize("num_bytes", [7 * 32 * VOCABULARY, 2**25])
@every_half
def test_predictions_are_compared_in_fp32(
    dtype: torch.dtype, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, divergences and hits, against full logits in float64; also in chunks of rows."""
    monkeypatch.setitem(config.HEAD_CHUNK_BYTES, "cpu", num_bytes)
    p_RD, q_RD, weight_WD = two_models(dtype)
    ids_N = Head.draw(dtype, ONCE).ids_N
    found_6N = compare_predictions(p_RD, q_RD, weight_WD, ONCE, ids_N)
    p_NW, q_NW = ((h_RD.double() @ weight_WD.double().t()).log_softmax(-1) for h_RD in (p_RD, q_RD))
    losses = [-log_NW.gather(1, ids_N[:, None])[:, 0] for log_NW in (p_NW, q_NW)]
    expected_3N = torch.stack([*losses, (p_NW.exp() * (p_NW - q_NW)).sum(-1)])
    assert torch.allclose(found_6N[:3], expected_3N, rtol=1e-4, atol=1e-5)
    p_N, q_N = p_NW.argmax(-1), q_NW.argmax(-1)
    hits_3N = torch.stack([p_N == q_N, p_N == ids_N, q_N == ids_N])
    assert torch.equal(found_6N[3:], hits_3N.double()) and 0 < hits_3N[0].sum() < NUM_ROWS


NUM_TRAINED, NUM_STEPS, LR = 4, 40, 1e-2
HYPER = oracle.Hyper(bias=0.0)


@dataclass(frozen=True)
class Trained:
    """A tiny LLaMA with its trainables, trained until it knows its questions and captions."""

    toy: ToyData
    weights: dict[str, Tensor]  # of both

    def model(self, dtype: torch.dtype, attend: Attend) -> ViCo:
        params = oracle_files.load_meta(self.toy.llama / "tiny")[0]
        sizes = {name: params[name] for name in ("dim", "n_layers", "n_heads", "multiple_of")}
        llama = LlamaConfig(**sizes, vocab_size=self.toy.tokenizer.vocab_size())
        model = ViCo(llama, 3, HYPER.adapter_len, HYPER.max_feats, HYPER.tau, dtype)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(self.weights[name])
        choose_block_runners(model, attend)
        return model

    def batch(self, scoring: bool) -> PackedBatch:
        prompts = Prompts(Tokenizer(self.toy.llama / "tokenizer.model"), 10, 512, 384, False)
        items = self.toy.items("train")[:NUM_TRAINED]
        examples = []
        for i, item in enumerate(items):
            question = Question(i, "0", "v", "CW", item.question, item.options, item.answer)
            answers = range(5) if scoring else (item.answer,)
            examples += [Example(prompts.vqa(question, answer), i, 0) for answer in answers]
            if not scoring:
                examples.append(Example(prompts.caption(item.caption or ""), i, 1))
        return pack(examples, torch.stack([oracle.frames(item.features, 10) for item in items]))

    def scores(self, dtype: torch.dtype, attend: Attend) -> tuple[Tensor, Tensor]:
        """(losses of all options' targets, scores [questions, 5])."""
        batch = self.batch(scoring=True)
        with torch.no_grad():
            losses_N = self.model(dtype, attend)(batch)
        sums = torch.zeros(NUM_TRAINED * 5).index_add(0, batch.target_sequences, losses_N)
        return losses_N, (sums / torch.bincount(batch.target_sequences)).view(-1, 5)

    def losses_and_gradients(
        self, dtype: torch.dtype, attend: Attend
    ) -> tuple[Tensor, dict[str, Tensor]]:
        model, batch = self.model(dtype, attend), self.batch(scoring=False)
        losses_N = model(batch)
        losses_N.mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return losses_N.detach(), gradients


@pytest.fixture(scope="module")
def trained(toy: ToyData) -> Trained:
    """By the oracle, which has gradients of the backbone too."""
    params, weights = oracle_files.load_meta(toy.llama / "tiny")
    trainables = oracle.init_trainables(params, HYPER, random_gates=True)
    parameters = {**{n: w.requires_grad_() for n, w in weights.items()}, **trainables}
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0)
    items = toy.items("train")[:NUM_TRAINED]
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["lr"] = LR * min(1, 2 - 2 * step / NUM_STEPS)
        optimizer.zero_grad()
        loss = oracle.step_losses((params, weights), toy.tokenizer, trainables, items, HYPER)[0]
        loss.backward()
        optimizer.step()
    return Trained(toy, {name: value.detach() for name, value in parameters.items()})


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@every_attention
@every_half
def test_scores_of_a_trained_model(trained: Trained, dtype: torch.dtype, attend: Attend) -> None:
    exact_N, exact_scores = trained.scores(torch.float32, attend)
    losses_N, scores = trained.scores(dtype, attend)
    is_confident_N = exact_N < 0.05
    assert 40 < is_confident_N.sum() < 70, "some targets are confident, others not"
    bounds = BOUNDS[dtype]
    assert losses_N.min() >= 0
    assert rms((losses_N - exact_N)[is_confident_N]) < bounds.confident_loss
    error = scores - exact_scores
    assert rms(error) < bounds.score
    assert rms(error.gather(1, exact_scores.argmin(1, keepdim=True))) < bounds.chosen_score
    assert torch.equal(scores.argmin(1), exact_scores.argmin(1))


@every_attention
@every_half
def test_gradients_of_a_trained_model(trained: Trained, dtype: torch.dtype, attend: Attend) -> None:
    exact_N, exact = trained.losses_and_gradients(torch.float32, attend)
    losses_N, gradients = trained.losses_and_gradients(dtype, attend)
    assert exact_N.mean() < 0.1
    bounds = BOUNDS[dtype]
    assert losses_N.min() >= 0
    assert rms(losses_N - exact_N) < bounds.training_loss
    assert set(gradients) == set(exact)
    for name, gradient in gradients.items():
        error = float((gradient - exact[name]).norm() / exact[name].norm())
        assert error < (bounds.gate2_gradient if "gate2" in name else bounds.gradient), (
            name,
            error,
        )


def test_an_error_of_two_percent_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the product's logits, or of those that are computed in fp32."""
    for name in ("linear", "_exact_logits"):
        right: Callable[[Tensor, Tensor], Tensor] = getattr(autograd, name)

        def wrong(
            x: Tensor, weight: Tensor, right: Callable[[Tensor, Tensor], Tensor] = right
        ) -> Tensor:
            return right(x, weight) * 1.02

        with monkeypatch.context() as patch:
            head = Head.draw(torch.bfloat16, ONCE)
            patch.setattr(autograd, name, wrong)
            with pytest.raises(AssertionError):
                check_losses(head, head.run()[0], torch.bfloat16)


def test_logits_are_held_for_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the bytes allow, and one at least; together they are all rows."""
    weight_WD = torch.zeros(5, 2)
    for num_bytes, size in ((4 * 5 * 3, 3), (4 * 5 * 4 - 1, 3), (7, 1), (10**6, 10)):
        monkeypatch.setitem(config.HEAD_CHUNK_BYTES, "cpu", num_bytes)
        chunks = [list(range(10))[rows] for rows in autograd.row_chunks(10, weight_WD)]
        assert list(chain.from_iterable(chunks)) == list(range(10)) and len(chunks[0]) == size
        assert all(rows.stop <= 10 for rows in autograd.row_chunks(10, weight_WD))
