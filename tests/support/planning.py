"""Requests to the planner at the published lengths."""

from dataclasses import replace
from typing import Any

from vico.model.config import LLAMA_CONFIGS, ViCoConfig
from vico.planner.gpu_specs import Hardware
from vico.planner.request import PlanRequest, TokenLengths

LENGTHS = TokenLengths(96, 194, 544, 34132)
VICO_CONFIGS = {name: ViCoConfig.from_llama(config) for name, config in LLAMA_CONFIGS.items()}
# 7B with heads whose widths together are not the model's.
WIDE_HEADS = {
    "twice as wide": replace(VICO_CONFIGS["7B"], own_head_dim=256),
    "half as wide": replace(VICO_CONFIGS["7B"], own_head_dim=64),
}
EVERY_CONFIG = VICO_CONFIGS | WIDE_HEADS


def plan_request(model: str, hardware: Hardware, **given: Any) -> PlanRequest:
    return PlanRequest(model, VICO_CONFIGS[model], hardware, LENGTHS, **given)
