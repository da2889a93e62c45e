"""Recipes: YAML files of settings, read and written."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vico.cli import aliases
from vico.cli.aliases import RENAMED, Spelled
from vico.errors import UserError, show
from vico.io.text import read_text, yaml_text
from vico.train.config import RunConfig
from vico.train.settings import expand_home, expand_variables, is_path_setting, settings_from

MAX_RECIPE_CHARACTERS = MAX_LINE = 1 << 15


def _refuse_merges(tree: Any, path: Path) -> None:
    """Raise UserError for a merge key: merges of merges multiply, and no flag has a mapping.

    `tree`: of yaml.compose. Each node is visited once, however many aliases it has.
    """
    pending, visited = [tree], set[int]()
    while pending:
        node = pending.pop()
        if id(node) in visited or not isinstance(getattr(node, "value", None), list):
            continue
        visited.add(id(node))
        for item in node.value:
            pair = item if isinstance(item, tuple) else (item,)
            if len(pair) == 2 and pair[0].tag == "tag:yaml.org,2002:merge":
                raise UserError(f"--config {path}: holds a merge ('<<'); write its flags out")
            pending += pair


def read(path: Path) -> dict[str, Any]:
    """The settings of a recipe by our own names. Raises UserError that names the file and key."""
    import yaml  # only recipes need it

    text = read_text(path, "the recipe (--config)")
    if len(text) > MAX_RECIPE_CHARACTERS:  # YAML is read at some 50,000 characters a second
        raise UserError(
            f"--config {path}: {len(text):,} characters, where at most {MAX_RECIPE_CHARACTERS:,} "
            "are expected; keep the lines 'flag: value' alone"
        )
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_merges(tree, path)
        keys = [node.value for node, _ in tree.value] if isinstance(tree, yaml.MappingNode) else []
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path}: not valid YAML: {reason}") from None
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path}: must hold lines 'flag: value'")
    for key, count in Counter(keys).items():
        if count > 1:
            raise UserError(f"--config {path}: '{key}' appears twice; keep one")
    source = f"--config {path}: "
    for key, value in recipe.items():
        try:
            if is_path_setting(RENAMED.get(key, key), value):
                recipe[key] = expand_home(expand_variables(value))
        except UserError as error:
            raise UserError(f"{source}{key}: {error}") from None
        recipe[key] = aliases.as_setting(key, recipe[key])
    typed = settings_from(recipe, f"--config {path}", aliases.TYPES)
    given = [Spelled(key, typed[key], f"{key}: {show(value)}") for key, value in recipe.items()]
    return aliases.own_settings(given, source)


def as_text(config: RunConfig, notes: Sequence[str]) -> str:
    """All settings as a recipe, which `read` reads back; the notes as comments."""
    lines = [f"# note: {note}\n" for note in notes]
    groups: dict[str, dict[str, Any]] = {}
    for field in dataclasses.fields(config):
        if field.name == "blr" and config.lr is not None and config.blr == field.default:
            continue  # reading it would note that it is not used
        value = getattr(config, field.name)
        value = str(value) if isinstance(value, Path) else value
        if is_path_setting(field.name, value):
            value = value.replace("$", "$$")
        groups.setdefault(field.metadata["group"], {})[field.name] = value
    for title, values in groups.items():
        lines.append(f"# {title}\n{yaml_text(values, MAX_LINE)}")
    return "".join(lines)
