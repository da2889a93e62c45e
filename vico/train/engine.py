"""DeepSpeed: partitioning the model, backward, the optimizer step, and the full training state.

No other file calls its engine; ds_config.py reads its settings, and
distributed/world.py connects its groups. The frozen backbone keeps its own type
and the trainables are fp32, so DeepSpeed's bf16 and fp16 sections stay off. A fixed factor keeps
small fp16 gradients from vanishing (`GRADIENT_SCALE`).
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vico.checkpoint.format import MOMENTS
from vico.errors import TrainingError
from vico.model.batch import PackedBatch
from vico.model.interfaces import LowerLayers

# How users configure torch's allocator: of torch 2.13, and by the older name.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
GRADIENT_SCALE = {torch.float16: 2.0**10, torch.bfloat16: 1.0, torch.float32: 1.0}


def let_segments_expand(environment: Mapping[str, str] = os.environ) -> None:
    """Have torch's allocator grow its segments of GPU memory, unless the user has configured it.

    ZeRO-3 allocates gathered blocks of gigabytes between activations whose size changes with each
    micro-batch; segments of fixed sizes would leave holes that nothing fits. No launcher can set
    the variable: the stage is chosen after the ranks have met, and torch has read it by then.
    """
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if configure is not None and not any(environment.get(name) for name in ALLOCATOR_VARIABLES):
        configure("expandable_segments:True")


@contextmanager
def zero_init(
    config: Mapping[str, Any], device: torch.device, node_group: Any = None
) -> Iterator[None]:
    """Create modules on `device`. Under stage 3 each rank keeps only its partition of them.

    With a `node_group` each node has all frozen weights, partitioned over its ranks: gathers stay
    within the node. The trainables, whose gradients all ranks sum, are partitioned over all ranks.
    """
    if config["zero_optimization"]["stage"] < 3:
        with device:
            yield
        return

    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride

    if device.type == "cuda":
        let_segments_expand()

    class Init(deepspeed.zero.Init):  # type: ignore[misc]
        def _zero_init_param(self, parameter: nn.Parameter) -> None:
            """As DeepSpeed's (0.19.8), but no broadcast: `load_parameter` sets the values."""
            if node_group is not None and not parameter.requires_grad:
                parameter.ds_zero_partition_process_group = node_group  # type: ignore[attr-defined]
            self._convert_to_deepspeed_param(parameter)
            parameter.partition()  # type: ignore[attr-defined]

    # Keep the types: by default every new tensor gets the one type of the ds_config.
    overrides = [DeepSpeedTensorOverride.device]
    with Init(config_dict_or_path=dict(config), tensor_overrides=overrides):
        yield


def load_parameter(parameter: nn.Parameter, read: Callable[[int, int], Tensor]) -> None:
    """Give a parameter its value, converted to its type.

    `read(start, stop)` returns elements of the flattened tensor. Under stage 3 each rank reads only
    its own part, so it never holds more than its share and one tensor. The type is converted where
    the parameter is: `copy_` alone converts on the host, at a thousandth of a GPU's speed.
    """
    with torch.no_grad():
        if not is_partitioned(parameter):
            value = read(0, parameter.numel()).view(parameter.shape)
            parameter.copy_(value.to(parameter.device))
            return
        # DeepSpeed has no call that sets a slice of a frozen parameter. Each rank holds ds_tensor:
        # equal parts of the flattened tensor in the order of ranks, the last one padded.
        partitioned: Any = parameter
        part, size = partitioned.ds_tensor, partitioned.ds_numel
        start = min(part.ds_numel * partitioned.ds_zero_partition_rank, size)
        stop = min(start + part.ds_numel, size)
        part.zero_()
        part[: stop - start].copy_(read(start, stop).to(part.device))


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether each rank holds a part of it alone: under stage 3."""
    return hasattr(parameter, "ds_id")


class Engine:
    """A model under DeepSpeed."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        dtype: torch.dtype,
        attention: str = "",
    ) -> None:
        """`config`: a resolved ds_config. `attention`: its implementation and why, for the log."""
        import deepspeed

        _import_muon()
        self.attention = attention
        self.module, self._scale = model, GRADIENT_SCALE[dtype]
        self._graphed: LowerLayers | None = getattr(model, "graphed", None)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=dict(config)
        )
        self._world_size: int = self._engine.world_size
        self.stage: int = config["zero_optimization"]["stage"]
        self.trainables = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # A NaN stays the maximum.
        self._max_gradient = torch.zeros((), device=self._engine.device)
        self._is_dry_run = False
        for parameter in self.trainables.values():
            parameter.register_hook(self._pass_gradient)

    def _pass_gradient(self, gradient: Tensor) -> Tensor:
        """Record, without a sync, whether this rank's own gradient is finite.

        After the sum over ranks, the rank could no longer be named.
        """
        if self._is_dry_run:
            return torch.zeros_like(gradient)
        gradient = gradient / self._scale if self._scale != 1.0 else gradient
        # Two kernels; isfinite, all, not and or would be seven.
        largest = torch.linalg.vector_norm(gradient, math.inf, dtype=torch.float32)
        torch.maximum(self._max_gradient, largest, out=self._max_gradient)
        return gradient

    def had_bad_gradient(self) -> bool:
        """Whether a gradient of this rank was not finite since the last call. Syncs the device."""
        is_finite = bool(self._max_gradient.isfinite())
        self._max_gradient.zero_()
        return not is_finite

    def train(self, mode: bool) -> None:
        # Setting the mode of all modules takes 2 ms on a slow host, and the GPU would wait.
        if self.module.training != mode:
            self._engine.train(mode)

    def can_capture(self, micro_batches: Iterable[PackedBatch]) -> bool:
        """Whether this rank has memory for the CUDA graphs that are new in a step."""
        graphed = self._graphed
        return graphed is None or graphed.can_capture(batch.segments for batch in micro_batches)

    def allow_captures(self, allowed: bool) -> None:
        """Whether all ranks have it: they decide as one."""
        if self._graphed is not None:
            self._graphed.allow_captures(allowed)

    def forward(self, batch: PackedBatch) -> Tensor:
        """fp32 losses of the batch's targets (see ViCo.forward)."""
        losses: Tensor = self._engine(batch)
        return losses

    def compare(self, batch: PackedBatch) -> Tensor:
        """How the frozen and the adapted model predict the batch's targets (see ViCo.forward)."""
        measures: Tensor = self._engine(batch, compare=True)
        return measures

    @torch.no_grad()
    def gates(self) -> dict[str, Tensor]:
        """The adapter gates by name, whole, on the host. A collective."""
        import deepspeed

        gates = {n: p for n, p in self.trainables.items() if n.endswith("gate1")}
        with deepspeed.zero.GatheredParameters(list(gates.values())):
            return {name: gate.detach().cpu().clone() for name, gate in gates.items()}

    @contextmanager
    def closed_gates(self) -> Iterator[None]:
        """Every adapter gate is 0, for forwards: the prompts change nothing. A collective.

        They open again at the end, unless by an error, after which ranks may not meet any more.
        Under stage 3 a gathered copy may still be alive, which DeepSpeed's context accounts for.
        """
        import deepspeed

        gates = [p for name, p in self.trainables.items() if name.endswith("gate1")]
        with torch.no_grad(), deepspeed.zero.GatheredParameters(gates, modifier_rank=0):
            values = [gate.clone() for gate in gates]
            for gate in gates:
                gate.zero_()
        yield
        with torch.no_grad(), deepspeed.zero.GatheredParameters(gates, modifier_rank=0):
            for gate, value in zip(gates, values, strict=True):
                gate.copy_(value)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`. `last`: it is the step's last micro-batch.

        Gradients add up over micro-batches and ranks: DeepSpeed's mean over the ranks is undone
        here, and its division by the number of micro-batches is off. A loss that is not finite
        makes its gradients NaN, so that `step` refuses the update without an earlier sync.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        zero_or_nan = loss.detach() - loss.detach()
        factor = zero_or_nan + self._world_size * self._scale
        self._engine.backward(loss * factor, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # counts the micro-batch, updates nothing

    def dry_run(self, batch: PackedBatch) -> None:
        """Forward and backward of a micro-batch with zero gradients: no state changes."""
        self._is_dry_run = True
        self.backward(self.forward(batch).sum(), last=False)
        self._is_dry_run = False

    def step(self, lr: float) -> tuple[float, bool]:
        """Update the trainables. Returns (norm of all gradients, whether the update was made).

        DeepSpeed skips the update on every rank when any rank's gradient is not finite. It syncs
        the device for that.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm()), bool(self._engine.was_step_applied())

    @torch.no_grad()
    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(weights by name, Adam's moments by "NAME.moment"), whole, fp32, on the host.

        One collective for all tensors. DeepSpeed's own getters (0.19.8, utils/tensor_fragment.py)
        need one per tensor, which takes most of a save's time.
        """
        flat = iter(self._gathered_state() if self.stage == 3 else self._summed_state())
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, parameter in self.trainables.items():
            shape = _shape(parameter)
            for moment in (None, *MOMENTS):
                value = next(flat)[: shape.numel()].view(shape).clone()
                if moment is None:
                    weights[name] = value
                else:
                    moments[f"{name}.{moment}"] = value
        return weights, moments

    @torch.no_grad()
    def require_live(self, weights: Mapping[str, Tensor]) -> None:
        """Raise TrainingError if `weights`, which `state` returned, are not those of the model.

        DeepSpeed updates copies of the trainables, and `state` reads those. Where an option or
        another version of DeepSpeed orders them differently, a save would hold values of other
        tensors. Costs milliseconds; no collective.
        """
        for name, parameter in self.trainables.items():
            saved, live = weights[name], parameter.detach()
            if is_partitioned(parameter):
                partitioned: Any = parameter
                size = partitioned.ds_tensor.ds_numel
                saved = saved.flatten()[size * torch.distributed.get_rank() :][:size]
                live = partitioned.ds_tensor.flatten()[: saved.numel()]
            if not torch.equal(live.cpu(), saved):
                raise TrainingError(
                    f"a save would hold other values of {name} than the model has; nothing is "
                    "saved: use a ds_config of ds_configs/ and the pinned version of DeepSpeed"
                )

    def _summed_state(self) -> list[Tensor]:
        """Weights and moments of each trainable, flattened, below stage 3.

        Each rank holds a range of each tensor. It adds zeros elsewhere, and the ranks are summed.
        """
        parameters: list[Any] = list(self.trainables.values())
        shares = []
        for parameter in parameters:
            for moment in (None, *MOMENTS):
                share = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
                if (mapping := parameter._hp_mapping) is not None:
                    address = mapping.lp_fragment_address
                    own = share[address.start : address.start + address.numel]
                    own.copy_(mapping.get_hp_fragment(moment))
                shares.append(share)
        whole = torch.cat(shares)
        torch.distributed.all_reduce(whole, group=parameters[0]._dp_group)
        return list(whole.cpu().split([share.numel() for share in shares]))

    def _gathered_state(self) -> list[Tensor]:
        """The same under stage 3, each tensor padded at its end.

        The ranks hold equal parts of each, in the order of ranks.
        """
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        parts = []
        for parameter in self.trainables.values():
            parts.append(safe_get_local_fp32_param(parameter))
            for moment in MOMENTS:
                parts.append(safe_get_local_optimizer_state(parameter, moment))
        own = torch.cat(parts)
        whole = own.new_empty(self._world_size * own.numel())
        torch.distributed.all_gather_into_tensor(whole, own)
        by_rank = whole.cpu().view(self._world_size, -1)
        tensors = by_rank.split([part.numel() for part in parts], dim=1)
        return [tensor.flatten() for tensor in tensors]

    def set_moments(self, moments: Mapping[str, Tensor], num_updates: int) -> None:
        """Set Adam's state as it was after `num_updates` updates."""
        zero = self._engine.optimizer
        # DeepSpeed has no call for an optimizer that has not stepped yet.
        stage_3 = self.stage == 3
        groups = (
            zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
        )
        for flat in groups:
            empty = {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.tensor(float(num_updates)), **empty}
        if self.stage < 3:
            # Links parameters to their slices of the state.
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.trainables.items():
            for moment in MOMENTS:
                _set_moment(parameter, moments[f"{name}.{moment}"], moment)


def _import_muon() -> None:
    """Import DeepSpeed's Muon (0.19.8), which it does itself to know the class of an optimizer.

    Its functions are handed to torch's compiler as it is imported, and to load that takes a second
    of each rank's start. ViCo runs none of them, so they stay as they are.
    """
    from deepspeed.runtime import compiler

    compile_function = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_function


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _set_moment(parameter: nn.Parameter, value: Tensor, moment: str) -> None:
    from deepspeed.utils import (
        safe_get_local_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    if not is_partitioned(parameter):
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)
        return
    # Stage 3, by slices: DeepSpeed's setter for whole values fails for sizes that are no multiple
    # of the number of ranks.
    local = safe_get_local_optimizer_state(parameter, moment)
    padded = torch.zeros(local.numel() * torch.distributed.get_world_size())
    padded[: value.numel()] = value.flatten()
    own = padded[local.numel() * torch.distributed.get_rank() :][: local.numel()]
    safe_set_local_optimizer_state(parameter, own.to(local.device), moment)
