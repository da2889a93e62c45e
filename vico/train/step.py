"""One optimizer step, from the micro-batches to the update."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vico.data.batching import Step
from vico.distributed import signals
from vico.distributed.world import World
from vico.errors import TrainingError, UserError
from vico.io.failpoints import reached
from vico.model.batch import PackedBatch
from vico.train.engine import Engine


@dataclass(frozen=True)
class StepReport:
    """Of one optimizer step, over all ranks and micro-batches."""

    loss_sums: list[float]  # per task
    target_counts: list[int]  # per task
    grad_norm: float
    num_real_tokens: int
    stop_signal: int  # the number of the signal by which a rank was asked to stop; 0: none

    def task_losses(self) -> list[float | None]:
        return [
            s / n if n else None for s, n in zip(self.loss_sums, self.target_counts, strict=True)
        ]


def train_step(
    engine: Engine,
    step: Step,
    number: int,
    task_weights: tuple[float, ...],
    lr: float,
    world: World,
    error: UserError | None = None,
) -> StepReport:
    """One optimizer step: agree on the targets of all ranks, then forward and backward each micro-batch, then update.

    The loss is the weighted sum over tasks of the mean over the task's targets in the whole step (METHOD section 3), so
    each micro-batch adds its sum of losses divided by the step's count. `number` is the step's, for messages.
    """
    world.set_phase(f"agreeing on step {number}")
    error = step.error or error
    numbers = torch.tensor([len(step.micro_batches), step.num_real_tokens, error is not None])
    totals = world.gather(torch.cat([step.target_counts, numbers]))
    if totals[:, -1].any():
        with world.raise_together():
            if error is not None:
                raise error
    counts, num_micro_batches = totals[:, :-3].sum(dim=0), int(totals[:, -3].max())
    weights = torch.tensor(task_weights, dtype=torch.float64) / counts.clamp(min=1)
    weights = weights.to(world.device, torch.float32, non_blocking=True)
    engine.train(True)
    loss_sums = torch.zeros(len(counts), dtype=torch.float64, device=world.device)
    for i in range(num_micro_batches):
        micro_batch = step.micro_batches[i] if i < len(step.micro_batches) else step.dummy
        assert micro_batch is not None
        world.set_phase(f"micro-batch {i + 1} of {num_micro_batches} of step {number}")
        micro_batch = micro_batch.to(world.device)
        losses = engine.forward(micro_batch)
        reached("step")
        sums = sums_by_task(losses, micro_batch, len(counts))
        loss_sums += sums.detach()
        engine.backward((sums.float() * weights).sum(), last=i + 1 == num_micro_batches)
    world.set_phase(f"updating in step {number}")
    grad_norm, updated = engine.step(
        lr
    )  # not made where a loss or a gradient of any rank is not finite
    found_RT = world.gather(
        torch.cat([loss_sums.cpu(), torch.tensor([signals.stop_requested()], dtype=torch.float64)])
    )
    _require_finite(~found_RT.isfinite().all(dim=1), "loss", number, step, world)
    if not updated:
        _require_finite(
            world.gather(torch.tensor(engine.had_bad_gradient())), "gradient", number, step, world
        )
        raise TrainingError(
            f"step {number}: the sum of the ranks' gradients is not finite; the update was not made; {NOT_FINITE_REMEDY}"
        )
    loss_sums_T = found_RT[:, :-1].sum(dim=0)
    return StepReport(
        loss_sums_T.tolist(),
        counts.tolist(),
        grad_norm,
        int(totals[:, -2].sum()),
        int(found_RT[:, -1].max()),
    )


NOT_FINITE_REMEDY = (
    "try a lower --blr, or --precision bf16 or fp32; at step 1, look for NaN in the weights"
)


def _require_finite(bad_R: Tensor, what: str, number: int, step: Step, world: World) -> None:
    """All ranks stop here together when one of them has met what is not finite; that rank names its questions."""
    if not bad_R.any():
        return
    with world.raise_together():
        if bad_R[world.rank]:
            shown = ", ".join(step.names[:4]) + (
                f" and {len(step.names) - 4} more" if len(step.names) > 4 else ""
            )
            raise TrainingError(
                f"the {what} is not finite on rank {world.rank} in step {number} (questions {shown}); the update was not made; {NOT_FINITE_REMEDY}"
            )


def sums_by_task(losses: Tensor, batch: PackedBatch, num_tasks: int) -> Tensor:
    """Sum of the losses of each task, float64 [tasks]; masked sums, because adding by index has no fixed order on a GPU."""
    return torch.stack(
        [
            torch.where(batch.target_tasks == task, losses, 0.0).double().sum()
            for task in range(num_tasks)
        ]
    )
