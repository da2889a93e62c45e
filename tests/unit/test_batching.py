"""Training steps: the order of questions, and their division by ranks, batches and budgets."""

from itertools import chain

import pytest
import torch

from support.toy_dataset import ToyData
from support.training_steps import config_of, training_steps
from vico.data import evaluation_batches
from vico.data.evaluation_batches import EvaluationChunks
from vico.data.types import Question
from vico.distributed.world import World
from vico.errors import UserError
from vico.train.build import Inputs, read_inputs

NO_TASK = 2


@pytest.fixture
def inputs(toy: ToyData, alone: World) -> Inputs:
    return read_inputs(config_of(toy), ("train",), alone)


@pytest.mark.parametrize("max_tokens", [None, 700, 1500])
def test_no_micro_batch_exceeds_the_longest(inputs: Inputs, max_tokens: int | None) -> None:
    steps = training_steps(inputs, micro_batch_size=2, accumulation=4, max_tokens=max_tokens)
    lengths = []
    for epoch in range(4):
        for k in range(3):
            lengths += [batch.num_real_tokens for batch in steps[epoch, k].micro_batches]
    longest = steps.longest()[0].num_real_tokens
    assert longest <= (max_tokens or longest)
    assert max(lengths) <= (longest if max_tokens is None else longest + 0.01 * max_tokens)


def test_order_follows_from_seed_and_epoch(inputs: Inputs) -> None:
    steps = training_steps(inputs, micro_batch_size=8)
    first_epoch, second_epoch = list(steps.order(0)), list(steps.order(1))
    other_seed = list(training_steps(inputs, micro_batch_size=8, seed=1).order(1))
    assert sorted(first_epoch) == list(range(20))
    assert first_epoch == list(training_steps(inputs, micro_batch_size=8).order(0))
    assert first_epoch != second_epoch != other_seed
    assert steps.steps_per_epoch == 3


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_divide_a_step(inputs: Inputs, size: int) -> None:
    whole = training_steps(inputs, micro_batch_size=8)
    ranks = [
        training_steps(inputs, micro_batch_size=8 // size, rank=rank, world_size=size)
        for rank in range(size)
    ]
    for k in range(3):
        parts = [rank[0, k] for rank in ranks]
        for part in parts:
            assert part.dummy is not None and (part.dummy.target_tasks == NO_TASK).all()
        target_counts = torch.stack([part.target_counts for part in parts]).sum(0)
        assert target_counts.tolist() == whole[0, k].target_counts.tolist()
        assert sum(part.num_real_tokens for part in parts) == whole[0, k].num_real_tokens


def test_token_budget_cuts_a_step(inputs: Inputs) -> None:
    whole = training_steps(inputs, micro_batch_size=10)[0, 0]
    cut = training_steps(inputs, micro_batch_size=10, max_tokens=900)[0, 0]
    assert len(whole.micro_batches) == 1 < len(cut.micro_batches)
    assert all(batch.num_real_tokens <= 900 for batch in cut.micro_batches)
    assert torch.equal(whole.target_counts, cut.target_counts)
    assert whole.num_real_tokens == cut.num_real_tokens


def test_a_step_carries_the_error_of_its_data(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks agree on it first."""
    steps, problem = training_steps(inputs), UserError("v3 is damaged")

    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr(steps, "_step", fail)
    step = steps[0, 0]
    assert step.error is problem and step.micro_batches == () and step.num_real_tokens == 0
    assert step.target_counts.tolist() == [0, 0]


def test_features_that_are_not_finite_are_named(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that were changed after they had been checked."""
    features = inputs.datasets["nextqa"].features
    bad = torch.zeros(10, 768)
    bad[3, 4] = torch.nan
    monkeypatch.setattr(features, "sample", lambda video, rows, number: bad)
    error = training_steps(inputs)[0, 0].error
    assert error is not None and "hold NaN or infinite values; extract them" in str(error)
    assert str(error).startswith(f"{features.path}: the features of video 'v00")


@pytest.mark.parametrize("size", range(1, 6))
def test_ranks_run_as_many_chunks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """No more than they need; each question is in one of them."""
    monkeypatch.setattr(evaluation_batches, "EVALUATION_TOKENS", 1)  # a question each
    questions = [Question(i, str(i), "v", "", "q", ("a", "b"), 0) for i in range(7)]
    ranks = [
        EvaluationChunks(questions, {}, num_slots=1, rank=rank, world_size=size)
        for rank in range(size)
    ]
    assert [len(rank) for rank in ranks] == [-(-7 // size)] * size
    asked = chain.from_iterable(chain.from_iterable(rank._chunks) for rank in ranks)
    assert sorted(asked) == list(range(7))
