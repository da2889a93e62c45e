"""Settings from plain values and texts: typed, with the user's paths expanded and absolute."""

import contextlib
import dataclasses
import os
import string
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vico.data.datasets import find_dataset
from vico.data.mixture import join_paths, parse_datasets
from vico.data.readers import captions
from vico.errors import UserError, nearest, show
from vico.io.paths import exists
from vico.train.bounds import BARE, is_path, unless_off, value_type
from vico.train.config import RunConfig

TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text (quote it)",
    Path: "a path in UTF-8",
    tuple: "a path in UTF-8, or a list of them",
}


def parse_path(text: str) -> Path:
    """The path. Raises ValueError for an empty text, for NUL and for what is not UTF-8.

    An empty text (of an unset variable) would mean the current folder. A name in another encoding
    could be opened, but not written to a log.
    """
    if not text.strip() or "\0" in text:
        raise ValueError
    text.encode()
    return Path(text)


def settings_from(
    values: Mapping[str, Any], source: str, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Typed settings from the plain values of a recipe, an args.json or a checkpoint.

    `more`: annotations of names that are known besides those of settings. Raises UserError naming
    the key and its type.
    """
    hints = {**typing.get_type_hints(RunConfig, include_extras=True), **(more or {})}
    settings = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{source}: unknown key {show(key)}{nearest(str(key)[:60], hints)}")
        settings[key] = _typed(key, value, hints[key], source)
        if key == "dataset":
            _check_datasets(settings[key], source)
    return settings


def _check_datasets(text: str, source: str) -> None:
    try:
        parse_datasets(text)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _typed(key: str, value: Any, annotation: Any, source: str) -> Any:
    kind, choices = value_type(annotation)
    if value is None and type(None) in typing.get_args(annotation):
        return None
    if isinstance(value, bool) and key in BARE:
        return BARE[key] if value else None
    if choices:
        if value in choices:
            return value
        raise UserError(f"{source}: {key}: {show(value)} is not one of {', '.join(choices)}")
    # YAML 1.1 reads 3e-4 as text.
    accepted = {float: (int, float, str), Path: (str,), tuple: (str, list)}.get(kind, (kind,))
    if isinstance(value, accepted) and isinstance(value, bool) == (kind is bool):
        with contextlib.suppress(ValueError, OverflowError):
            if kind is tuple:
                return _parse_paths(value)
            return parse_path(value) if kind is Path else unless_off(key, kind(value))
    raise UserError(f"{source}: {key}: {show(value)} is not {TYPE_NAMES[kind]}")


def _parse_paths(value: str | list[Any]) -> tuple[Path, ...]:
    """Of a text or a list of texts. Raises ValueError."""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError
    return tuple(map(parse_path, texts))


def expand_home(text: str) -> str:
    """`text` with the home folder for a ~ at its beginning. Raises UserError for an unknown one.

    The shell does this for `--flag ~/x`, but not for `--flag=~/x`.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(f"{show(text)}: no such home folder; write ./~ for a name that begins so")
    return expanded


def expand_variables(text: str) -> str:
    """`text` with the values of $NAME and ${NAME}; $$ is a dollar sign. Raises UserError.

    A variable that is unset or empty would lead to another folder, so it is refused.
    """
    known = {name: value for name, value in os.environ.items() if value}
    try:
        return string.Template(text).substitute(known)
    except KeyError as missing:
        raise UserError(f"{show(text)}: the variable {missing.args[0]} is not set") from None
    except ValueError:
        raise UserError(f"{show(text)}: no name follows a $; write $$ for a dollar sign") from None


def is_path_setting(name: str, value: object) -> bool:
    """Whether this value of a setting, as the user wrote it, is a path."""
    if name == "deepspeed":
        return isinstance(value, str) and is_path(value)
    hint = typing.get_type_hints(RunConfig).get(name)
    return hint is not None and value_type(hint)[0] in (Path, tuple) and isinstance(value, str)


def has_dialogue(config: RunConfig) -> bool:
    """Whether one of the data sets has subtitles. Raises UserError for one that there is not."""
    datasets = [find_dataset(name, config.folder_of(name)) for name in config.dataset_names]
    return any(dataset.has_dialogue for dataset in datasets)


def evaluated_split(config: RunConfig) -> str | None:
    """The split that training evaluates its epochs on: val, or --split test where there is no val.

    None: --no_eval. Raises UserError for a data set that there is not.
    """
    if config.no_eval:
        return None

    def have(split: str) -> bool:
        return all(has_split(config, name, split) for name in config.dataset_names)

    return "test" if config.split == "test" and not have("val") and have("test") else "val"


def training_splits(config: RunConfig) -> tuple[str, ...]:
    """Those whose questions are part of what a training run is."""
    evaluated = evaluated_split(config)
    return ("train",) if evaluated is None else ("train", evaluated)


def has_split(config: RunConfig, name: str, split: str) -> bool:
    """Whether a data set has the table of a split. Raises UserError."""
    folder = config.folder_of(name)
    return exists(find_dataset(name, folder).annotation_file(folder, split))


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same settings with absolute paths, so that they mean the same from any directory.

    Raises UserError for a data set that there is not, and for --sub where none has subtitles.
    """
    if not has_dialogue(config) and config.sub:
        raise UserError(
            f"--sub: only TVQA has subtitles, and --dataset is {config.dataset}; drop --sub"
        )
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    paths: dict[str, Any] = {k: v.absolute() for k, v in values.items() if isinstance(v, Path)}
    paths["text"] = tuple(path.absolute() for path in config.text)
    paths["dataset"] = ",".join(map(str, config.datasets))  # one spelling: "nextqa:1" is "nextqa"
    paths["captions"] = _located(config, paths["data_path"], config.captions, config.captions_of)
    paths["features"] = _located(config, paths["data_path"], config.features, config.features_of)
    if is_path(config.deepspeed):
        paths["deepspeed"] = str(Path(config.deepspeed).absolute())
    return dataclasses.replace(config, **paths)


def _located(
    config: RunConfig, data_path: Path, value: Path | None, path_of: Callable[[str], Path | None]
) -> Path | None:
    """`value` of --captions or --features with absolute paths.

    As PATH for one data set and NAME=PATH for several.
    """
    located = {}
    for name in config.dataset_names:
        path = path_of(name)
        if path is not None:
            if path != value:  # no shell or parser has expanded what follows NAME=
                path = Path(expand_home(str(path)))
            located[name] = captions.locate(data_path / name, path)
    return join_paths(located, len(config.datasets))
