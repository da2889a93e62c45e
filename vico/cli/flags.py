"""The command line: flags and recipes become a RunConfig."""

import argparse
import dataclasses
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vico.errors import UserError, nearest, show
from vico.io.text import read_text
from vico.train.config import NAMES, RunConfig, _absolute, _value_type, path_of, settings_from

# Flags of the lineage that no longer do anything, with what does.
RETIRED = {
    "device": "the device is found",
    "pin_mem": "batches are pinned where a GPU is",
    "no_pin_mem": "batches are pinned where a GPU is",
    "start_epoch": "the checkpoint says where to go on",
    "world_size": "the launcher says it",
    "dist_url": "the launcher says it",
    "dist_on_itp": "the launcher says it",
}


_RETIRED_SWITCHES = {"pin_mem", "no_pin_mem", "dist_on_itp"}


class _Parser(argparse.ArgumentParser):
    """argparse that raises our one-line error, with the nearest known flag, instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace(
            "ignored explicit argument", "takes no value, but was given"
        )
        raise UserError(f"{message} (see --help)")

    def refuse_unknown(self, unknown: Sequence[str]) -> None:
        flags = [name for name in self._option_string_actions if name.startswith("--")]
        for word in unknown:
            if word.startswith("-"):
                name = word.split("=")[0]
                raise UserError(f"unknown flag {name}{nearest(name, flags) or '; see --help'}")
        raise UserError(
            f"unexpected word {show(unknown[0])}: a value follows a --flag, and switches take none; see --help"
        )


def _parser_of(kind: type) -> Callable[[str], Any]:
    """argparse's converter of one flag value."""

    def parse(text: str) -> Any:
        try:
            return path_of(text) if kind is Path else kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{show(text)} is not {NAMES[kind]}") from None

    return parse


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser of RunConfig's fields whose defaults are absent, so that given flags can be told from defaults."""
    parser = _Parser(
        prog=command,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
    )
    parser.add_argument(
        "--config",
        type=_parser_of(Path),
        metavar="RECIPE",
        help="YAML file of these settings; flags win over it",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    groups = {f.metadata["group"]: None for f in dataclasses.fields(RunConfig)}
    titled = {name: parser.add_argument_group(name) for name in groups}
    hints = typing.get_type_hints(RunConfig, include_extras=True)
    for f in dataclasses.fields(RunConfig):
        kind, choices = _value_type(hints[f.name])
        group, text = titled[f.metadata["group"]], f.metadata["help"]
        if kind is bool:
            group.add_argument(f"--{f.name}", action="store_true", help=text)
        else:
            shown = f"{text} (default: {f.default})" if f.default is not None else text
            group.add_argument(
                f"--{f.name}",
                type=_parser_of(kind),
                choices=choices,
                metavar=None if choices else kind.__name__.upper(),
                help=shown,
            )
    launcher = parser.add_argument_group(
        "launcher and retired flags", "accepted so that published commands run unchanged"
    )
    launcher.add_argument("--local_rank", "--local-rank", type=int, help="passed by launchers")
    for name, why in RETIRED.items():
        if name in _RETIRED_SWITCHES:
            launcher.add_argument(f"--{name}", action="store_true", help=f"does nothing now: {why}")
        else:
            launcher.add_argument(f"--{name}", metavar="VALUE", help=f"does nothing now: {why}")
    return parser


@dataclass(frozen=True)
class CommandLine:
    """What was typed: the settings that were given (by recipe or flag), and what the user should be told."""

    given: dict[str, Any]
    notes: tuple[str, ...]
    debug: bool

    def resolve(self, saved: dict[str, Any] | None = None) -> RunConfig:
        """Defaults, then `saved` (a checkpoint's settings), then what was given. Raises UserError for a value out of range."""
        return _absolute(RunConfig(**{**(saved or {}), **self.given}))


def parse(argv: Sequence[str], command: str, description: str) -> CommandLine:
    """Read flags and the recipe they name. Raises UserError for an unknown flag or key, or a value of the wrong type."""
    parser = make_parser(command, description)
    namespace, unknown = parser.parse_known_args(list(argv))
    if unknown:
        assert isinstance(parser, _Parser)
        parser.refuse_unknown(unknown)
    typed = vars(namespace)
    names = {f.name for f in dataclasses.fields(RunConfig)}
    recipe = _read_recipe(typed["config"]) if "config" in typed else {}
    notes = tuple(
        f"--{name} does nothing now: {why}" for name, why in RETIRED.items() if name in typed
    )
    given = {**recipe, **{k: v for k, v in typed.items() if k in names}}
    if (
        given.get("lr") is not None and given.get("blr") is not None
    ):  # a sweep over --blr on a recipe with lr would be one run
        notes += (
            f"--blr {given['blr']:g} is not used, since --lr {given['lr']:g} is given{' by the recipe' if 'lr' not in typed else ''}",
        )
    return CommandLine(given, notes, "debug" in typed)


def _read_recipe(path: Path) -> dict[str, Any]:
    import yaml

    text = read_text(path, "the recipe (--config)")
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        keys = [node.value for node, _ in tree.value] if isinstance(tree, yaml.MappingNode) else []
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"--config {path}: not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path}: must hold lines 'flag: value'")
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--config {path}: '{key}' stands there twice; keep one")
    return settings_from(recipe, f"--config {path}")
