"""DeepSpeed, and nothing else: the config it gets, the model it partitions, one backward, one step, full state in and out.

The frozen backbone keeps its own type and the trainables are fp32, so DeepSpeed's bf16 and fp16 sections stay off; a
fixed factor keeps small fp16 gradients from vanishing (`GRADIENT_SCALE`).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vico.errors import UserError
from vico.model.batch import PackedBatch
from vico.train.optim import MOMENTS

GRADIENT_SCALE = {torch.float16: 2.0**10, torch.bfloat16: 1.0, torch.float32: 1.0}


@contextmanager
def zero_init(config: Mapping[str, Any], device: torch.device) -> Iterator[None]:
    """Modules made inside lie on `device`; under stage 3 each rank keeps its part of each parameter only."""
    if config["zero_optimization"]["stage"] < 3:
        with device:
            yield
    else:
        import deepspeed
        from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride

        class Init(deepspeed.zero.Init):  # type: ignore[misc]
            def _zero_init_param(self, parameter: nn.Parameter) -> None:
                """DeepSpeed's (0.19.8) without its broadcast: what it would send is the nothing that `fill` replaces."""
                self._convert_to_deepspeed_param(parameter)
                parameter.partition()  # type: ignore[attr-defined]

        # Types stay as they are: by default every new tensor would take the one type of the ds_config.
        with Init(
            config_dict_or_path=dict(config), tensor_overrides=[DeepSpeedTensorOverride.device]
        ):
            yield


def load_parameter(parameter: nn.Parameter, read: Callable[[int, int], Tensor]) -> None:
    """Give a parameter its value, converted to its type; `read(start, stop)` gives elements of the flattened tensor.

    Under stage 3 each rank asks for its own part only, so that a rank's memory never holds more than its share and a tensor.
    """
    with torch.no_grad():
        if not hasattr(parameter, "ds_id"):
            parameter.copy_(read(0, parameter.numel()).view(parameter.shape))
            return
        # DeepSpeed has no call that sets a slice of a frozen parameter: each rank holds ds_tensor, the equal parts of the
        # flattened tensor in the order of ranks, the last one padded.
        partitioned: Any = parameter
        mine, size = partitioned.ds_tensor, partitioned.ds_numel
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            raise UserError(
                "--deepspeed: zero_hpz_partition_size must go: a second copy of each part is not kept right"
            )
        start = min(mine.ds_numel * torch.distributed.get_rank(), size)
        stop = min(start + mine.ds_numel, size)
        mine.zero_()
        mine[: stop - start].copy_(read(start, stop))


class Engine:
    """A model under DeepSpeed: forward, backward of micro-batches, step, and the trainables' full state."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        dtype: torch.dtype,
        attention: str = "",
    ) -> None:
        import deepspeed

        self.attention = attention  # what it is and why, for the log

        self.module, self._scale = model, GRADIENT_SCALE[dtype]
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(config)
        )
        self._world_size: int = self._engine.world_size
        self.stage: int = config["zero_optimization"]["stage"]
        self.trainables = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._largest_gradient = torch.zeros(
            (), device=self._engine.device
        )  # NaN, once there, stays the largest
        self._is_dry_run = False
        for parameter in self.trainables.values():
            parameter.register_hook(self._pass_gradient)

    def _pass_gradient(self, gradient: Tensor) -> Tensor:
        """Notes, without a sync, whether this rank's own share is finite: behind the sum over ranks nobody could tell whose it was."""
        if self._is_dry_run:
            return torch.zeros_like(gradient)
        gradient = gradient / self._scale if self._scale != 1.0 else gradient
        largest = torch.linalg.vector_norm(gradient, math.inf, dtype=torch.float32)
        torch.maximum(
            self._largest_gradient, largest, out=self._largest_gradient
        )  # two kernels; isfinite, all, not, or: seven
        return gradient

    def had_bad_gradient(self) -> bool:
        """Whether a gradient of this rank was not finite since the last call. A device sync."""
        found = bool(self._largest_gradient.isfinite())
        self._largest_gradient.zero_()
        return not found

    def train(self, mode: bool) -> None:
        if (
            self.module.training != mode
        ):  # a walk through all modules, 2 ms of a slow host's time while a GPU waits
            self._engine.train(mode)

    def forward(self, batch: PackedBatch) -> Tensor:
        losses: Tensor = self._engine(batch)
        return losses

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`; `last`: of the step's last micro-batch, the one that `step` follows.

        Gradients add up over micro-batches and ranks: DeepSpeed's mean over the ranks is undone here, its division by
        the number of micro-batches is off. The gradients of a loss that is not finite are not either, so that `step` refuses
        it without a wait for the device before the update.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        nothing = loss.detach() - loss.detach()  # or NaN
        self._engine.backward(
            loss * (nothing + self._world_size * self._scale), scale_wrt_gas=False
        )
        if not last:
            self._engine.step()  # counts the micro-batch, updates nothing

    def dry_run(self, batch: PackedBatch) -> None:
        """Forward and backward of a micro-batch as those of a step, with gradients of zero: the next step is what it would have been."""
        self._is_dry_run = True
        self.backward(self.forward(batch).sum(), last=False)
        self._is_dry_run = False

    def step(self, lr: float) -> tuple[float, bool]:
        """Update the trainables. Returns (gradient norm over all of them, whether the update was applied).

        DeepSpeed skips the update on every rank when any rank's gradient is not finite, for which it waits for the device.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm()), bool(self._engine.was_step_applied())

    @torch.no_grad()
    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(weights by name, Adam's moments by "name.moment"), whole, in fp32, on the host. A collective of all ranks.

        One exchange: DeepSpeed's own getters (0.19.8, utils/tensor_fragment.py) make one per tensor, which is most of a save's time.
        """
        whole = iter(self._gathered_state() if self.stage == 3 else self._summed_state())
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, parameter in self.trainables.items():
            shape = _shape(parameter)
            weights[name] = next(whole)[: shape.numel()].view(shape).clone()
            moments |= {
                f"{name}.{moment}": next(whole)[: shape.numel()].view(shape).clone()
                for moment in MOMENTS
            }
        return weights, moments

    def _summed_state(self) -> list[Tensor]:
        """Of each trainable its weights and moments, flat: each rank holds a range of them, whose place it knows, and zeros else."""
        parameters: list[Any] = list(self.trainables.values())
        shares = []
        for parameter in parameters:
            for moment in (None, *MOMENTS):
                share = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
                if (held := parameter._hp_mapping) is not None:
                    place = held.lp_fragment_address
                    share[place.start : place.start + place.numel].copy_(
                        held.get_hp_fragment(moment)
                    )
                shares.append(share)
        whole = torch.cat(shares)
        torch.distributed.all_reduce(whole, group=parameters[0]._dp_group)
        return list(whole.cpu().split([share.numel() for share in shares]))

    def _gathered_state(self) -> list[Tensor]:
        """The same under stage 3, each padded at its end: the ranks hold equal parts, in their order."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        parts = []
        for parameter in self.trainables.values():
            parts += [
                safe_get_local_fp32_param(parameter),
                *(safe_get_local_optimizer_state(parameter, moment) for moment in MOMENTS),
            ]
        mine = torch.cat(parts)
        whole = mine.new_empty(self._world_size * mine.numel())
        torch.distributed.all_gather_into_tensor(whole, mine)
        of_ranks = (
            whole.cpu().view(self._world_size, -1).split([part.numel() for part in parts], dim=1)
        )
        return [of_rank.flatten() for of_rank in of_ranks]

    def set_moments(self, moments: Mapping[str, Tensor], num_updates: int) -> None:
        """Put Adam back to where it stood after `num_updates` updates."""
        zero = self._engine.optimizer
        # DeepSpeed has no call for an optimizer that has not stepped yet: its flat master tensors get their state here.
        for flat in (
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else zero.single_partition_of_fp32_groups
        ):
            empty = {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.tensor(float(num_updates)), **empty}
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()  # links parameters to their slices of the state
        for name, parameter in self.trainables.items():
            for moment in MOMENTS:
                _set_moment(parameter, moments[f"{name}.{moment}"], moment)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _set_moment(parameter: nn.Parameter, value: Tensor, moment: str) -> None:
    from deepspeed.utils import (
        safe_get_local_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    if not hasattr(parameter, "ds_id"):
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)
        return
    # Stage 3 by slices: DeepSpeed's setter for whole values fails where the ranks do not divide them evenly.
    local = safe_get_local_optimizer_state(parameter, moment)
    padded = torch.zeros(local.numel() * torch.distributed.get_world_size())
    padded[: value.numel()] = value.flatten()
    mine = padded[local.numel() * torch.distributed.get_rank() :][: local.numel()]
    safe_set_local_optimizer_state(parameter, mine.to(local.device), moment)
