"""Hugging Face's names of settings: each alias sets what the flag of our own name sets.

Flags, recipes and overrides take them. Where one setting is given by two names, both must say the
same.
"""

import typing
from collections.abc import Iterable
from typing import Any, NamedTuple

from vico.errors import UserError
from vico.train.config import RunConfig

# Alias: the setting that it is another name of.
RENAMED = {
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accum_iter",
    "num_train_epochs": "epochs",
    "learning_rate": "lr",
    "dataloader_num_workers": "num_workers",
    "resume_from_checkpoint": "resume",
}
WARMUP_RATIO = "warmup_ratio"
# Alias: (the type of its value, what it does).
COMPUTED: dict[str, tuple[type, str]] = {
    "bf16": (bool, "--precision bf16; false, without --fp16: fp32"),
    "fp16": (bool, "--precision fp16; false, without --bf16: fp32"),
    WARMUP_RATIO: (float, "--warmup_epochs of FLOAT * epochs"),
    "lr_scheduler_type": (str, "cosine, the one schedule that there is"),
}
ALIASES = (*RENAMED, *COMPUTED)
_OWN = typing.get_type_hints(RunConfig, include_extras=True)
TYPES = {name: _OWN[own] for name, own in RENAMED.items()}  # annotations of the aliases
TYPES |= {name: kind for name, (kind, _) in COMPUTED.items()}
# Names of Hugging Face that are also ours: with dashes as well.
SHARED = (
    *("weight_decay", "max_steps", "save_steps", "save_total_limit"),
    *("logging_steps", "report_to"),
)
NO_MAX_STEPS = -1  # Hugging Face's word for "all"
MAX_RATIO_DIGITS = 12  # 0.1 * 3 epochs are 0.3 epochs


class Spelled(NamedTuple):
    """One setting as the user gave it: `spelled` is for messages, such as "--lr 0.1"."""

    name: str
    value: Any
    spelled: str


def own_settings(given: Iterable[Spelled], source: str = "") -> dict[str, Any]:
    """The values by our own names; warmup_ratio stays, until the epochs are known.

    Raises UserError for two names that say different things about one setting.
    """
    given = list(given)
    values = {item.name: item.value for item in given}
    settings: dict[str, Any] = {}
    first: dict[str, str] = {}
    for item in given:
        for name, value in _meaning(item, values, source).items():
            if name in settings and settings[name] != value:
                raise UserError(
                    f"{source}{first[name]} and {item.spelled} say different things; keep one"
                )
            settings[name] = value
            first.setdefault(name, item.spelled)
    return settings


def _meaning(item: Spelled, values: dict[str, Any], source: str) -> dict[str, Any]:
    name, value = item.name, item.value
    if name in ("bf16", "fp16"):
        if value:
            return {"precision": name}
        return {} if values.get("bf16") or values.get("fp16") else {"precision": "fp32"}
    if name == "lr_scheduler_type":
        if value != "cosine":
            raise UserError(
                f"{source}{item.spelled}: the learning rate rises linearly (--warmup_epochs), then "
                "falls by a half cosine to --min_lr; say cosine, or leave it out"
            )
        return {}
    if name == "resume_from_checkpoint" and str(value).lower() == "true":
        return {}  # the run in OUTPUT_DIR is resumed in any case
    if name == "max_steps" and value == NO_MAX_STEPS:
        return {name: None}
    return {RENAMED.get(name, name): value}


def with_warmup_epochs(recipe: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Flags over recipe, with warmup_epochs in the place of a warmup_ratio.

    Raises UserError for a ratio that is none, and where the same source says both, differently.
    """
    merged = {**recipe, **flags}
    ratio = merged.pop(WARMUP_RATIO, None)
    if ratio is None:
        return merged
    if not 0 <= ratio <= 1:
        raise UserError(f"--{WARMUP_RATIO} {ratio}: must be from 0 to 1, a share of --epochs")
    source = flags if WARMUP_RATIO in flags else recipe
    if source is recipe and "warmup_epochs" in flags:
        return merged
    num_epochs = merged.get("epochs", RunConfig.epochs)
    meant = float(f"{ratio * num_epochs:.{MAX_RATIO_DIGITS}g}")
    said = source.get("warmup_epochs", meant)
    if said != meant:
        raise UserError(
            f"--{WARMUP_RATIO} {ratio:g} of {num_epochs} epochs and --warmup_epochs {said:g} say "
            "different things; keep one"
        )
    return {**merged, "warmup_epochs": meant}


def as_setting(name: str, value: Any) -> Any:
    """A recipe's value in the form that a flag has: Hugging Face's configs have other kinds."""
    if name == "resume_from_checkpoint" and value is True:
        return "true"
    if name == "report_to" and isinstance(value, list):
        return ",".join(map(str, value[:10]))
    if name == "num_train_epochs" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value
