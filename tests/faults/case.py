"""A case of corrupted inputs: what is damaged, the command, and the refusal that must follow.

In commands and messages {fixture} is the folder of the fixture.
"""

from typing import NamedTuple

from faults.damage import Damage, put
from support.run_fixture import CHECKPOINT, PUBLISHED

RECIPE = "--config {fixture}/r.yaml"
DS = "--deepspeed {fixture}/ds.json"
EVAL = "eval --resume {fixture}/"


class Case(NamedTuple):
    damage: Damage | None
    line: str  # flags of train, or a command (RunFixture.command)
    code: int
    parts: tuple[str, ...]  # of the error message


def refused(damage: Damage | None, *parts: str, line: str = "", code: int = 2) -> Case:
    return Case(damage, line, code, parts)


def flags(line: str, *parts: str, code: int = 2) -> Case:
    return refused(None, *parts, line=line, code=code)


def recipe(content: str | bytes, *parts: str) -> Case:
    return refused(put("r.yaml", content), *parts, line=RECIPE)


def ds_config(damage: Damage | None, *parts: str) -> Case:
    return refused(damage, *parts, line=DS)


def own(damage: Damage | None, *parts: str) -> Case:
    """The run's checkpoint, to evaluate."""
    return refused(damage, *parts, line=EVAL + CHECKPOINT, code=3)


def published(damage: Damage | None, *parts: str) -> Case:
    """A checkpoint in the published format, to evaluate."""
    return refused(damage, *parts, line=EVAL + PUBLISHED, code=3)


def safetensors(content: str | bytes, *parts: str) -> Case:
    """Weights alone, to evaluate."""
    return refused(put("x.safetensors", content), *parts, line=f"{EVAL}x.safetensors", code=3)
