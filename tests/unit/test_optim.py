"""The optimizer, and the learning rate: warm-up, cosine decay, the peak of a base rate."""

import pytest
import torch

from vico.train.optim import learning_rate, make_optimizer, peak_learning_rate


def test_warm_up_and_decay() -> None:
    schedule = {"steps_per_epoch": 10, "peak": 1.0, "minimum": 0.1}
    rates = [
        learning_rate(step, **schedule, warmup_epochs=2, epochs=10) for step in (0, 5, 20, 60, 100)
    ]
    assert rates == pytest.approx([0.0, 0.25, 1.0, 0.55, 0.1])


def test_warm_up_that_never_ends() -> None:
    rate = learning_rate(7, 10, 1.0, 0.0, warmup_epochs=40, epochs=5)
    assert rate == pytest.approx(0.7 / 40)


def test_peak_of_a_base_rate() -> None:
    assert peak_learning_rate(None, 9e-2, 128) == pytest.approx(0.045)
    assert peak_learning_rate(0.3, 9e-2, 128) == 0.3


def test_two_updates_are_adamw_s() -> None:
    """With the published betas (METHOD 3), and decay on every trainable."""
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = make_optimizer([weight], weight_decay=0.1)
    expected, first, second = 2.0, 0.0, 0.0
    for number, gradient in enumerate((0.5, -3.0), start=1):
        optimizer.param_groups[0]["lr"] = 0.01
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        scale = (second / (1 - 0.95**number)) ** 0.5 + 1e-8
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * first / (1 - 0.9**number) / scale
        assert float(weight.detach()) == pytest.approx(expected, rel=1e-12)
