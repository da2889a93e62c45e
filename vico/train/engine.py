"""DeepSpeed, and nothing else: the config it gets, the model it partitions, one backward, one step, full state in and out.

The frozen backbone keeps its own type and the trainables are fp32, so DeepSpeed's bf16 and fp16 sections stay off; a
fixed factor keeps small fp16 gradients from vanishing (`GRADIENT_SCALE`).
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vico.errors import UserError, nearest, show
from vico.io.text import read_json_object
from vico.model.batch import PackedBatch
from vico.train.config import is_path
from vico.train.optim import MOMENTS

SHIPPED_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
# What the run decides. "auto" or absent is right; a number must be the one that the flags give.
RUN_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
# Settings of DeepSpeed that would compute something else than the method, or nothing here, with what to use instead.
REFUSED = {
    "optimizer": "the optimizer is AdamW as the method sets it; use --lr, --blr and --weight_decay",
    "scheduler": "the schedule is the method's; use --lr, --min_lr, --warmup_epochs and --epochs",
    "gradient_clipping": "the method does not clip gradients",
    "amp": "use --precision",
    "data_types": "gradients are accumulated in fp32",
    "gradient_predivide_factor": "gradients are summed exactly",
    "prescale_gradients": "gradients are summed exactly",
    "gradient_allreduce_op": "gradients are summed exactly",
    "compression_training": "the backbone is frozen",
    "activation_checkpointing": "DeepSpeed does not recompute this model's activations",
    "tensorboard": "curves are written to OUTPUT_DIR/runs",
    "wandb": "curves are written to OUTPUT_DIR/runs",
    "csv_monitor": "curves are written to OUTPUT_DIR/runs",
    "zero_optimization.zero_quantized_weights": "weights are exchanged exactly",
    "zero_optimization.zero_quantized_nontrainable_weights": "weights are exchanged exactly",
    "zero_optimization.zero_quantized_gradients": "gradients are summed exactly",
    "zero_optimization.zenflow": "gradients are summed exactly",
}
SECTIONS = ("zero_optimization", "bf16", "fp16", "aio", "flops_profiler", "comms_logger")  # DeepSpeed checks what they hold
SWITCHES = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
KNOWN = frozenset({*RUN_KEYS, *REFUSED, *SECTIONS, *SWITCHES, "steps_per_print", "communication_data_type"})
GRADIENT_SCALE = {torch.float16: 2.0**10, torch.bfloat16: 1.0, torch.float32: 1.0}


def read_config(name: str, precision: str, micro_batch_size: int, accumulation: int, world_size: int) -> dict[str, Any]:
    """The ds_config of this name (of ds_configs/) or path, as `resolve_auto` makes it. Raises UserError for what does not fit."""
    path = Path(name)
    if not is_path(name):
        path = SHIPPED_CONFIGS / f"{name}.json"
        shipped = sorted(p.stem for p in SHIPPED_CONFIGS.glob("*.json"))
        if name not in shipped:
            names = ["auto", *shipped]
            raise UserError(f"--deepspeed {name}: must be {', '.join(names)} or the path of a JSON file{nearest(name, names)}")
    config = read_json_object(path, "the DeepSpeed config (--deepspeed)")
    return resolve_auto(config, path, precision, micro_batch_size, accumulation, world_size)


def resolve_auto(
    config: dict[str, Any], path: Path, precision: str, micro_batch_size: int, accumulation: int, world_size: int
) -> dict[str, Any]:  # fmt: skip
    """The ds_config of a run with every "auto" resolve_auto. Raises UserError, naming `path`, for what does not fit."""
    _check_keys(config, path)
    numbers = dict(zip(RUN_KEYS, (micro_batch_size, accumulation, micro_batch_size * accumulation * world_size), strict=True))
    for key, value in numbers.items():
        given = config.get(key, "auto")
        if given != "auto" and (given != value or isinstance(given, bool)):
            flags = f"--batch_size {micro_batch_size} --accum_iter {accumulation} on {world_size} rank(s)"
            raise UserError(f'--deepspeed {path}: {key} {_brief(given)} does not fit {flags}, which make {value}; write "auto"')
    for kind in ("bf16", "fp16"):
        enabled = config.get(kind, {}).get("enabled", "auto")
        if enabled not in ("auto", precision == kind):
            raise UserError(f'--deepspeed {path}: {kind}.enabled {_brief(enabled)} against --precision {precision}; write "auto"')
    config = {key: value for key, value in config.items() if value != "auto" and key not in REFUSED}
    config["zero_optimization"] = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
    # The method does not clip, and DeepSpeed does, at 1.0, unless told otherwise; its own step lines come only when asked for.
    # Our AdamW is torch's, also where its state is offloaded.
    config = {"gradient_clipping": 0.0, "steps_per_print": 10**9, **config, **numbers}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    _let_deepspeed_check(config, path)
    return {key: value for key, value in config.items() if key not in ("bf16", "fp16")}


def _check_keys(config: dict[str, Any], path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known_of_zero = {*fields, *(field.alias for field in fields.values() if field.alias)}
    for key, value in config.items():
        if key not in KNOWN:
            raise UserError(f"--deepspeed {path}: unknown key {show(key)}{nearest(key, KNOWN)}")
        _refuse(key, value, path)
        if key in SECTIONS and not isinstance(value, dict):
            raise UserError(f"--deepspeed {path}: '{key}' must be a section of its own")
        if key in SWITCHES and not (value == "auto" or isinstance(value, bool)):
            raise UserError(f"--deepspeed {path}: {key} is {_brief(value)} and must be true or false")
    for key, value in config.get("zero_optimization", {}).items():
        if key not in known_of_zero:
            raise UserError(f"--deepspeed {path}: unknown key {show(f'zero_optimization.{key}')}{nearest(key, known_of_zero)}")
        _refuse(f"zero_optimization.{key}", value, path)
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3) or not isinstance(stage, int) or isinstance(stage, bool):
        raise UserError(f"--deepspeed {path}: zero_optimization.stage is {_brief(stage)}; use 1, 2 or 3")
    every = config.get("steps_per_print", "auto")
    if every != "auto" and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise UserError(f"--deepspeed {path}: steps_per_print is {_brief(every)} and must be a whole number of at least 1")


def _brief(value: Any) -> str:
    """A value as JSON writes it, short enough for a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(key: str, value: Any, path: Path) -> None:
    off = value in ("auto", None, 0, False) or (isinstance(value, dict) and value.get("enabled") is False)
    if key in REFUSED and not off:
        raise UserError(f"--deepspeed {path}: '{key}' must go: {REFUSED[key]}")


def _let_deepspeed_check(config: dict[str, Any], path: Path) -> None:
    import pydantic
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig({key: value for key, value in config.items() if key != "train_batch_size"})  # which follows from the ranks
    except pydantic.ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"--deepspeed {path}: DeepSpeed refuses {where} {show(first['input'])}: {first['msg'][:300]}") from None
    except Exception as problem:  # whatever a wrong value runs into: the keys are known, the values alone are the user's
        raise UserError(f"--deepspeed {path}: DeepSpeed refuses a value: {' '.join(str(problem).split())[:300]}") from None


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
        with Init(config_dict_or_path=dict(config), tensor_overrides=[DeepSpeedTensorOverride.device]):
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
            raise UserError("--deepspeed: zero_hpz_partition_size must go: a second copy of each part is not kept right")
        start = min(mine.ds_numel * torch.distributed.get_rank(), size)
        stop = min(start + mine.ds_numel, size)
        mine.zero_()
        mine[: stop - start].copy_(read(start, stop))


class Engine:
    """A model under DeepSpeed: forward, backward of micro-batches, step, and the trainables' full state."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any], dtype: torch.dtype, attention: str = ""
    ) -> None:
        import deepspeed

        self.attention = attention  # what it is and why, for the log

        self.module, self._scale = model, GRADIENT_SCALE[dtype]
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))
        self._world_size: int = self._engine.world_size
        self.stage: int = config["zero_optimization"]["stage"]
        self.trainables = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._largest_gradient = torch.zeros((), device=self._engine.device)  # NaN, once there, stays the largest
        self._is_dry_run = False
        for parameter in self.trainables.values():
            parameter.register_hook(self._pass_gradient)

    def _pass_gradient(self, gradient: Tensor) -> Tensor:
        """Notes, without a sync, whether this rank's own share is finite: behind the sum over ranks nobody could tell whose it was."""
        if self._is_dry_run:
            return torch.zeros_like(gradient)
        gradient = gradient / self._scale if self._scale != 1.0 else gradient
        largest = torch.linalg.vector_norm(gradient, math.inf, dtype=torch.float32)
        torch.maximum(self._largest_gradient, largest, out=self._largest_gradient)  # two kernels; isfinite, all, not, or: seven
        return gradient

    def had_bad_gradient(self) -> bool:
        """Whether a gradient of this rank was not finite since the last call. A device sync."""
        found = bool(self._largest_gradient.isfinite())
        self._largest_gradient.zero_()
        return not found

    def train(self, mode: bool) -> None:
        if self.module.training != mode:  # a walk through all modules, 2 ms of a slow host's time while a GPU waits
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
        self._engine.backward(loss * (nothing + self._world_size * self._scale), scale_wrt_gas=False)
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
            moments |= {f"{name}.{moment}": next(whole)[: shape.numel()].view(shape).clone() for moment in MOMENTS}
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
                    share[place.start : place.start + place.numel].copy_(held.get_hp_fragment(moment))
                shares.append(share)
        whole = torch.cat(shares)
        torch.distributed.all_reduce(whole, group=parameters[0]._dp_group)
        return list(whole.cpu().split([share.numel() for share in shares]))

    def _gathered_state(self) -> list[Tensor]:
        """The same under stage 3, each padded at its end: the ranks hold equal parts, in their order."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        parts = []
        for parameter in self.trainables.values():
            parts += [safe_get_local_fp32_param(parameter), *(safe_get_local_optimizer_state(parameter, moment) for moment in MOMENTS)]
        mine = torch.cat(parts)
        whole = mine.new_empty(self._world_size * mine.numel())
        torch.distributed.all_gather_into_tensor(whole, mine)
        of_ranks = whole.cpu().view(self._world_size, -1).split([part.numel() for part in parts], dim=1)
        return [of_rank.flatten() for of_rank in of_ranks]

    def set_moments(self, moments: Mapping[str, Tensor], num_updates: int) -> None:
        """Put Adam back to where it stood after `num_updates` updates."""
        zero = self._engine.optimizer
        # DeepSpeed has no call for an optimizer that has not stepped yet: its flat master tensors get their state here.
        for flat in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
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
    from deepspeed.utils import safe_get_local_optimizer_state, safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not hasattr(parameter, "ds_id"):
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)
        return
    # Stage 3 by slices: DeepSpeed's setter for whole values fails where the ranks do not divide them evenly.
    local = safe_get_local_optimizer_state(parameter, moment)
    padded = torch.zeros(local.numel() * torch.distributed.get_world_size())
    padded[: value.numel()] = value.flatten()
    mine = padded[local.numel() * torch.distributed.get_rank() :][: local.numel()]
    safe_set_local_optimizer_state(parameter, mine.to(local.device), moment)
