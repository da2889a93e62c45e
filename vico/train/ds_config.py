"""The DeepSpeed config of a run: read, checked, and every "auto" resolved."""

import json
from pathlib import Path
from typing import Any

from vico.errors import UserError, nearest, show
from vico.io.text import read_json_object
from vico.train.config import is_path

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


SECTIONS = (
    "zero_optimization",
    "bf16",
    "fp16",
    "aio",
    "flops_profiler",
    "comms_logger",
)  # DeepSpeed checks what they hold


SWITCHES = (
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)


KNOWN = frozenset(
    {*RUN_KEYS, *REFUSED, *SECTIONS, *SWITCHES, "steps_per_print", "communication_data_type"}
)


def read_config(
    name: str, precision: str, micro_batch_size: int, accumulation: int, world_size: int
) -> dict[str, Any]:
    """The ds_config of this name (of ds_configs/) or path, as `resolve_auto` makes it. Raises UserError for what does not fit."""
    path = Path(name)
    if not is_path(name):
        path = SHIPPED_CONFIGS / f"{name}.json"
        shipped = sorted(p.stem for p in SHIPPED_CONFIGS.glob("*.json"))
        if name not in shipped:
            names = ["auto", *shipped]
            raise UserError(
                f"--deepspeed {name}: must be {', '.join(names)} or the path of a JSON file{nearest(name, names)}"
            )
    config = read_json_object(path, "the DeepSpeed config (--deepspeed)")
    return resolve_auto(config, path, precision, micro_batch_size, accumulation, world_size)


def resolve_auto(
    config: dict[str, Any],
    path: Path,
    precision: str,
    micro_batch_size: int,
    accumulation: int,
    world_size: int,
) -> dict[str, Any]:
    """The ds_config of a run with every "auto" resolved. Raises UserError, naming `path`, for what does not fit."""
    _check_keys(config, path)
    numbers = dict(
        zip(
            RUN_KEYS,
            (micro_batch_size, accumulation, micro_batch_size * accumulation * world_size),
            strict=True,
        )
    )
    for key, value in numbers.items():
        given = config.get(key, "auto")
        if given != "auto" and (given != value or isinstance(given, bool)):
            flags = f"--batch_size {micro_batch_size} --accum_iter {accumulation} on {world_size} rank(s)"
            raise UserError(
                f'--deepspeed {path}: {key} {_brief(given)} does not fit {flags}, which make {value}; write "auto"'
            )
    for kind in ("bf16", "fp16"):
        enabled = config.get(kind, {}).get("enabled", "auto")
        if enabled not in ("auto", precision == kind):
            raise UserError(
                f'--deepspeed {path}: {kind}.enabled {_brief(enabled)} against --precision {precision}; write "auto"'
            )
    config = {key: value for key, value in config.items() if value != "auto" and key not in REFUSED}
    config["zero_optimization"] = {
        key: value for key, value in config["zero_optimization"].items() if value != "auto"
    }
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
            raise UserError(
                f"--deepspeed {path}: {key} is {_brief(value)} and must be true or false"
            )
    for key, value in config.get("zero_optimization", {}).items():
        if key not in known_of_zero:
            raise UserError(
                f"--deepspeed {path}: unknown key {show(f'zero_optimization.{key}')}{nearest(key, known_of_zero)}"
            )
        _refuse(f"zero_optimization.{key}", value, path)
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3) or not isinstance(stage, int) or isinstance(stage, bool):
        raise UserError(
            f"--deepspeed {path}: zero_optimization.stage is {_brief(stage)}; use 1, 2 or 3"
        )
    every = config.get("steps_per_print", "auto")
    if every != "auto" and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
        raise UserError(
            f"--deepspeed {path}: steps_per_print is {_brief(every)} and must be a whole number of at least 1"
        )


def _brief(value: Any) -> str:
    """A value as JSON writes it, short enough for a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(key: str, value: Any, path: Path) -> None:
    off = value in ("auto", None, 0, False) or (
        isinstance(value, dict) and value.get("enabled") is False
    )
    if key in REFUSED and not off:
        raise UserError(f"--deepspeed {path}: '{key}' must go: {REFUSED[key]}")


def _let_deepspeed_check(config: dict[str, Any], path: Path) -> None:
    import pydantic
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(
            {key: value for key, value in config.items() if key != "train_batch_size"}
        )  # which follows from the ranks
    except pydantic.ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"--deepspeed {path}: DeepSpeed refuses {where} {show(first['input'])}: {first['msg'][:300]}"
        ) from None
    except Exception as problem:  # whatever a wrong value runs into: the keys are known, the values alone are the user's
        raise UserError(
            f"--deepspeed {path}: DeepSpeed refuses a value: {' '.join(str(problem).split())[:300]}"
        ) from None
