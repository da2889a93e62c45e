"""The learning rate: warm-up, cosine decay, and the peak of a base rate."""

import pytest

from vico.train.optim import learning_rate, peak_learning_rate


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
