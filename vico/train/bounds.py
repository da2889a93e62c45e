"""What values the settings of a run may have."""

import types
import typing
from pathlib import Path
from typing import Any, Literal

from vico.model.config import KEPT_WEIGHT

MAX_FLOAT = 3e38  # of fp32, the type of the tensors that settings are combined with
MAX_WEIGHT = 1e15  # so that its product with a loss, squared by the optimizer, stays in fp32
MAX_SEED = 2**63 - 1  # of torch's generator
MAX_COUNT = 10**9  # what follows from counts, such as epochs times steps, stays below 2**63
SMALLEST = 5e-324  # above 0

# (least, most, what is allowed) of numbers. A whole number that is not listed is a COUNT.
COUNT = (1, MAX_COUNT, "a whole number of at least 1, and at most a billion")
_NOT_NEGATIVE = (0, MAX_FLOAT, "0 or more, and finite")
_POSITIVE = (SMALLEST, MAX_FLOAT, "above 0, and finite")
_MINUTES = (SMALLEST, 1e6, "minutes above 0, at most a million")
_COUNT_OR_0 = (0, MAX_COUNT, "a whole number of at least 0, and at most a billion")
BOUNDS: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("cap", "blr", "min_lr", "weight_decay", "warmup_epochs"), _NOT_NEGATIVE),
    "keep": (0, MAX_WEIGHT, f"0 or more, and at most {MAX_WEIGHT:g}"),
    **dict.fromkeys(("lr", "tau"), _POSITIVE),
    **dict.fromkeys(("collective_timeout", "hang_timeout"), _MINUTES),
    **dict.fromkeys(("save_steps", "save_total_limit", "max_tokens"), _COUNT_OR_0),
    "bias": (-MAX_FLOAT, MAX_FLOAT, "finite"),
    "num_workers": (0, 1024, "a whole number from 0 to 1024"),
    "seed": (0, MAX_SEED, f"a whole number from 0 to {MAX_SEED}"),
}
# What a flag means without a value, and by `true`; `false` unsets it. The others need a value.
BARE: dict[str, float] = {"keep": KEPT_WEIGHT, "attention_shares": 64}


def value_type(annotation: Any) -> tuple[Any, tuple[str, ...] | None]:
    """(type of one value, allowed values or None) of a field's annotation."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation, *_ = (a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is Literal:
        return str, typing.get_args(annotation)
    return typing.get_origin(annotation) or annotation, None  # tuple: of paths


def unless_off(name: str, value: Any) -> Any:
    """None for the number 0 that switches off a flag of BARE: the run is one without the flag."""
    can_be_0 = name in BARE and BOUNDS.get(name, COUNT)[0] == 0
    return None if can_be_0 and value == 0 else value


def is_path(deepspeed: str) -> bool:
    """Whether --deepspeed names a user's file, not one of ds_configs/."""
    return "/" in deepspeed or deepspeed.endswith(".json")


def plain(value: Any) -> Any:
    """A setting's value as JSON has it."""
    if isinstance(value, tuple):
        return [str(path) for path in value]
    return str(value) if isinstance(value, Path) else value
