"""One optimizer step, from the micro-batches to the update."""

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from vico.data.batching import Step
from vico.distributed import signals
from vico.distributed.world import World
from vico.errors import TrainingError, UserError
from vico.io.failpoints import reached
from vico.model.batch import PackedBatch
from vico.train.engine import Engine

NOT_FINITE_REMEDY = (
    "try a lower --blr or --keep, or --precision bf16 or fp32; at step 1, look for NaN in the "
    "weights"
)
MAX_SHOWN_QUESTIONS = 4


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, summed over all ranks and micro-batches."""

    loss_sums: list[float]  # per task
    target_counts: list[int]  # per task
    grad_norm: float
    num_real_tokens: int
    stop_signal: int  # the stop signal that a rank received; 0: none

    def task_losses(self) -> list[float | None]:
        """The mean loss of each task; None for a task without targets."""
        return mean_losses(self.loss_sums, self.target_counts)


def mean_losses(sums: list[float], counts: list[int]) -> list[float | None]:
    return [s / n if n else None for s, n in zip(sums, counts, strict=True)]


def train_step(
    engine: Engine,
    step: Step,
    number: int,
    task_weights: tuple[float, ...],
    lr: float,
    world: World,
    error: UserError | None = None,
) -> StepReport:
    """Run step `number`: count the targets of all ranks, forward and backward, update.

    The loss is the weighted sum over tasks of the mean over the task's targets in the whole step
    (METHOD section 3). So each micro-batch adds its loss sums divided by the step's target counts.

    `error`: an earlier one of this rank, which is raised on all ranks. Raises TrainingError when a
    loss or gradient of any rank is not finite; the trainables are unchanged then.
    """
    world.set_phase(f"agreeing on step {number}")
    error = step.error or error
    forwards = step.micro_batches if step.dummy is None else (*step.micro_batches, step.dummy)
    flags = [not engine.can_capture(forwards), error is not None]
    numbers = torch.tensor([len(step.micro_batches), step.num_real_tokens, *flags])
    totals = world.gather(torch.cat([step.target_counts, numbers]))
    if totals[:, -1].any():
        with world.raise_together():
            if error is not None:
                raise error
    engine.allow_captures(not totals[:, -2].any())
    target_counts = totals[:, :-4].sum(dim=0)
    num_micro_batches = int(totals[:, -4].max())
    weights = torch.tensor(task_weights, dtype=torch.float64) / target_counts.clamp(min=1)
    weights = weights.to(world.device, torch.float32, non_blocking=True)
    engine.train(True)
    loss_sums = torch.zeros(len(target_counts), dtype=torch.float64, device=world.device)
    for i in range(num_micro_batches):
        # A rank with fewer micro-batches than others runs one without targets in their place.
        micro_batch = step.micro_batches[i] if i < len(step.micro_batches) else step.dummy
        assert micro_batch is not None
        world.set_phase(f"micro-batch {i + 1} of {num_micro_batches} of step {number}")
        micro_batch = micro_batch.to(world.device)
        losses = engine.forward(micro_batch)
        reached("step")
        sums = sums_by_task(losses, micro_batch, len(target_counts))
        loss_sums += sums.detach()
        engine.backward((sums.float() * weights).sum(), last=i + 1 == num_micro_batches)
    world.set_phase(f"updating in step {number}")
    grad_norm, updated = engine.step(lr)  # no update if a rank's loss or gradient is not finite
    stop = torch.tensor([signals.stop_requested()], dtype=torch.float64)
    sums_and_stop_RT = world.gather(torch.cat([loss_sums.cpu(), stop]))
    _require_finite(~sums_and_stop_RT.isfinite().all(dim=1), "loss", number, step, world)
    if not updated:
        _fail_on_gradient(engine, number, step, world)
    return StepReport(
        loss_sums=sums_and_stop_RT[:, :-1].sum(dim=0).tolist(),
        target_counts=target_counts.tolist(),
        grad_norm=grad_norm,
        num_real_tokens=int(totals[:, -3].sum()),
        stop_signal=int(sums_and_stop_RT[:, -1].max()),
    )


def _fail_on_gradient(engine: Engine, number: int, step: Step, world: World) -> NoReturn:
    """DeepSpeed skipped the update: name the rank, or report that only the sum is not finite."""
    bad_R = world.gather(torch.tensor(engine.had_bad_gradient()))
    _require_finite(bad_R, "gradient", number, step, world)
    raise TrainingError(
        f"step {number}: the sum of the ranks' gradients is not finite; "
        f"the update was not made; {NOT_FINITE_REMEDY}"
    )


def _require_finite(bad_R: Tensor, what: str, number: int, step: Step, world: World) -> None:
    """Raise TrainingError on all ranks when one of them is bad; it names its questions."""
    if not bad_R.any():
        return
    with world.raise_together():
        if bad_R[world.rank]:
            questions = ", ".join(step.names[:MAX_SHOWN_QUESTIONS])
            if len(step.names) > MAX_SHOWN_QUESTIONS:
                questions += f" and {len(step.names) - MAX_SHOWN_QUESTIONS} more"
            raise TrainingError(
                f"the {what} is not finite on rank {world.rank} in step {number} "
                f"(questions {questions}); the update was not made; {NOT_FINITE_REMEDY}"
            )


def sums_by_task(losses: Tensor, batch: PackedBatch, num_tasks: int) -> Tensor:
    """The sum of the losses of each task, float64 [num_tasks].

    Masked sums: adding by index has no fixed order on a GPU.
    """
    sums = []
    for task in range(num_tasks):
        own = torch.where(batch.target_tasks == task, losses, 0.0)
        sums.append(own.double().sum())
    return torch.stack(sums)
