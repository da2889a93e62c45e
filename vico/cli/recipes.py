"""Recipes: YAML files of settings, read and written."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vico.cli import aliases
from vico.cli.aliases import RENAMED, Spelled
from vico.errors import UserError, show
from vico.io.text import read_yaml_object, yaml_text
from vico.train.bounds import plain
from vico.train.config import RunConfig
from vico.train.settings import expand_home, expand_variables, is_path_setting, settings_from

MAX_LINE = 1 << 15  # no line of `as_text` is broken


def read(path: Path) -> dict[str, Any]:
    """The settings of a recipe by our own names. Raises UserError that names the file and key."""
    recipe = read_yaml_object(path, "the recipe (--config)", f"--config {path}", "flag")
    source = f"--config {path}: "
    for key, value in recipe.items():
        try:
            recipe[key] = _expanded(RENAMED.get(key, key), value)
        except UserError as error:
            raise UserError(f"{source}{key}: {error}") from None
        recipe[key] = aliases.as_setting(key, recipe[key])
    typed = settings_from(recipe, f"--config {path}", aliases.TYPES)
    given = [Spelled(key, typed[key], f"{key}: {show(value)}") for key, value in recipe.items()]
    return aliases.own_settings(given, source)


def _expanded(name: str, value: Any) -> Any:
    """The value of a setting; a path, also in a list of them, with variables and ~ expanded.

    No list inside a list is visited: by aliases it may be without end.
    """

    def expanded(item: Any) -> Any:
        return expand_home(expand_variables(item)) if is_path_setting(name, item) else item

    return [expanded(item) for item in value] if isinstance(value, list) else expanded(value)


def as_text(config: RunConfig, notes: Sequence[str]) -> str:
    """All settings as a recipe, which `read` reads back; the notes as comments."""
    lines = [f"# note: {note}\n" for note in notes]
    groups: dict[str, dict[str, Any]] = {}
    for field in dataclasses.fields(config):
        if field.name == "blr" and config.lr is not None and config.blr == field.default:
            continue  # reading it would note that it is not used
        value = _escaped(field.name, plain(getattr(config, field.name)))
        groups.setdefault(field.metadata["group"], {})[field.name] = value
    for title, values in groups.items():
        lines.append(f"# {title}\n{yaml_text(values, MAX_LINE)}")
    return "".join(lines)


def _escaped(name: str, value: Any) -> Any:
    """A value that `_expanded` gives back as it is."""
    if isinstance(value, list):
        return [_escaped(name, item) for item in value]
    return value.replace("$", "$$") if is_path_setting(name, value) else value
