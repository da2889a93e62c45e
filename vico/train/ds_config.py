"""The DeepSpeed config of a run: read, checked, and every "auto" resolved."""

import json
from pathlib import Path
from typing import Any, NoReturn

from vico.errors import UserError, nearest, show
from vico.io.text import read_json_object
from vico.planner.estimate import FROZEN_SHARDS, IN_NODES, OVER_ALL, SHIPPED_CONFIGS
from vico.train.bounds import is_path

# Set by the run. They may be absent, "auto", or the number that follows from the flags.
RUN_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
# Keys that would change the method or have no effect here, with what to use instead.
REFUSED = {
    "optimizer": "the optimizer is AdamW as the method sets it; use --lr, --blr and --weight_decay",
    "scheduler": "the schedule is the method's; use --lr, --min_lr, --warmup_epochs and --epochs",
    "gradient_clipping": "the method does not clip gradients",
    "amp": "use --precision",
    "data_types": "gradients are accumulated in fp32",
    "gradient_predivide_factor": "gradients are summed exactly",
    "prescale_gradients": "gradients are summed exactly",
    "gradient_allreduce_op": "gradients are summed exactly",
    "communication_data_type": "gradients are summed in fp32",
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
# What ZeRO may be told: tests/distributed/test_zero_options.py saves and resumes under each.
# Another option may place gradients or weights where a save does not look (round_robin_gradients
# did), so it must have DeepSpeed's default value.
TESTED_OPTIONS = frozenset(
    {
        "stage",
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "ignore_unused_parameters",
        "leaf_module",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "reduce_bucket_size",
        "reduce_scatter",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
        "use_multi_rank_bucket_allreduce",
    }
)
OFFLOADS = ("offload_optimizer", "offload_param")
# The last four are left over where a config for NVMe was changed to another device.
TESTED_OFFLOAD_OPTIONS = frozenset(
    {"device", "pin_memory", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu"}
)
# DeepSpeed checks the content of these.
SECTIONS = ("zero_optimization", "bf16", "fp16", "aio", "flops_profiler", "comms_logger")
SWITCHES = (
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
KNOWN = frozenset({*RUN_KEYS, *REFUSED, *SECTIONS, *SWITCHES, FROZEN_SHARDS, "steps_per_print"})
MAX_SHOWN, MAX_REASON = 60, 300  # characters


def read_config(
    name: str, precision: str, micro_batch_size: int, accumulation: int, world_size: int
) -> dict[str, Any]:
    """The ds_config of this name (in ds_configs/) or path, with every "auto" resolved.

    Raises UserError for one that does not fit the run.
    """
    path = Path(name)
    if not is_path(name):
        path = SHIPPED_CONFIGS / f"{name}.json"
        shipped = sorted(p.stem for p in SHIPPED_CONFIGS.glob("*.json"))
        if name not in shipped:
            names = ["auto", *shipped]
            raise UserError(
                f"--deepspeed {name}: must be {', '.join(names)} or the path of a JSON file"
                f"{nearest(name, names)}"
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
    """`config` with every "auto" resolved. Raises UserError, naming `path`."""
    _check_keys(config, path)
    batch_size = micro_batch_size * accumulation * world_size
    numbers = dict(zip(RUN_KEYS, (micro_batch_size, accumulation, batch_size), strict=True))
    for key, value in numbers.items():
        given = config.get(key, "auto")
        if given != "auto" and (given != value or isinstance(given, bool)):
            flags = f"--batch_size {micro_batch_size} --accum_iter {accumulation}"
            _fail(
                path,
                f"{key} {_brief(given)} does not fit {flags} on {world_size} rank(s), "
                f'which make {value}; write "auto"',
            )
    for kind in ("bf16", "fp16"):
        enabled = config.get(kind, {}).get("enabled", "auto")
        if enabled not in ("auto", precision == kind):
            against = f'{_brief(enabled)} against --precision {precision}; write "auto"'
            _fail(path, f"{kind}.enabled {against}")
    config = {key: value for key, value in config.items() if value != "auto" and key not in REFUSED}
    zero = config["zero_optimization"]
    config["zero_optimization"] = {key: value for key, value in zero.items() if value != "auto"}
    # DeepSpeed clips gradients at 1.0 by default, and the method does not clip. Its own lines about
    # steps are printed only on request.
    config = {"gradient_clipping": 0.0, "steps_per_print": 10**9, **config, **numbers}
    # The optimizer is torch's AdamW, also where its state is offloaded.
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    _let_deepspeed_check(config, path)
    return {key: value for key, value in config.items() if key not in ("bf16", "fp16")}


def _fail(path: Path, message: str) -> NoReturn:
    raise UserError(f"--deepspeed {path}: {message}")


def _check_keys(config: dict[str, Any], path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for key, value in config.items():
        if key not in KNOWN:
            _fail(path, f"unknown key {show(key)}{nearest(key, KNOWN)}")
        _refuse(key, value, path)
        if key in SECTIONS and not isinstance(value, dict):
            _fail(path, f"'{key}' must be a section of its own")
        if key in SWITCHES and not (value == "auto" or isinstance(value, bool)):
            _fail(path, f"{key} is {_brief(value)} and must be true or false")
    fields = DeepSpeedZeroConfig.model_fields
    known_of_zero = {*fields, *(field.alias for field in fields.values() if field.alias)}
    zero = config.get("zero_optimization", {})
    for key, value in zero.items():
        name = f"zero_optimization.{key}"
        if key not in known_of_zero:
            _fail(path, f"unknown key {show(name)}{nearest(key, known_of_zero)}")
        _refuse(name, value, path)
        if key in OFFLOADS and isinstance(value, dict):
            _check_offload(name, value, path)
    _refuse_untested(zero, "zero_optimization", TESTED_OPTIONS, DeepSpeedZeroConfig, path)
    stage = zero.get("stage")
    if stage not in (1, 2, 3) or not isinstance(stage, int) or isinstance(stage, bool):
        _fail(path, f"zero_optimization.stage is {_brief(stage)}; use 1, 2 or 3")
    shards = config.get(FROZEN_SHARDS, "auto")
    if shards not in ("auto", IN_NODES, OVER_ALL):
        known = f'"{IN_NODES}", "{OVER_ALL}" or "auto"'
        _fail(path, f"{FROZEN_SHARDS} is {_brief(shards)}; use {known}")
    if shards == IN_NODES and stage != 3:
        _fail(path, f'{FROZEN_SHARDS} "{IN_NODES}" is for stage 3, and the stage is {stage}')
    steps = config.get("steps_per_print", "auto")
    if steps != "auto" and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        must = "must be a whole number of at least 1"
        _fail(path, f"steps_per_print is {_brief(steps)} and {must}")


def _check_offload(name: str, section: dict[str, Any], path: Path) -> None:
    """Only to the host's memory: what lies on NVMe is not where a save and a resume look for it."""
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    if section.get("device") not in (None, "auto", "none", "cpu"):
        _fail(path, f'{name}.device is {_brief(section["device"])}; use "cpu" or leave it out')
    model = DeepSpeedZeroOffloadParamConfig
    if name.endswith("optimizer"):
        model = DeepSpeedZeroOffloadOptimizerConfig
    _refuse_untested(section, name, TESTED_OFFLOAD_OPTIONS, model, path)


def _refuse_untested(
    section: dict[str, Any], name: str, tested: frozenset[str], model: Any, path: Path
) -> None:
    """Raise UserError for an option that is not `tested` and has another value than by default.

    `model`: DeepSpeed's class of the section. Keys that it does not know are left to DeepSpeed.
    """
    defaults = {field.alias or key: field.default for key, field in model.model_fields.items()}
    for key, value in section.items():
        is_off = value in ("auto", defaults.get(key)) or (not value and defaults.get(key) is None)
        if key in defaults and key not in tested and not is_off:
            _fail(
                path,
                f"'{name}.{key}' must go: checkpoints are not tested with it, and it may change "
                "what a save finds",
            )


def _brief(value: Any) -> str:
    """A value as JSON writes it, short enough for a message."""
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _refuse(key: str, value: Any, path: Path) -> None:
    is_off = value in ("auto", None, 0, False)
    is_off = is_off or (isinstance(value, dict) and value.get("enabled") is False)
    is_off = is_off or (key == "communication_data_type" and value == "fp32")
    if key in REFUSED and not is_off:
        _fail(path, f"'{key}' must go: {REFUSED[key]}")


def _let_deepspeed_check(config: dict[str, Any], path: Path) -> None:
    import pydantic
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        # train_batch_size follows from the ranks, which DeepSpeed does not know yet.
        DeepSpeedConfig({k: v for k, v in config.items() if k != "train_batch_size"})
    except pydantic.ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = first["msg"][:MAX_REASON]
        _fail(path, f"DeepSpeed refuses {where} {show(first['input'])}: {reason}")
    except Exception as problem:  # the keys are known, so one of the user's values caused it
        reason = " ".join(str(problem).split())[:MAX_REASON]
        _fail(path, f"DeepSpeed refuses a value: {reason}")
