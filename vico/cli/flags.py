"""The flags of train, eval, check and quantize-eval: with a recipe they become a RunConfig."""

import argparse
import dataclasses
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vico.cli.parser import SettingsParser, path_argument
from vico.errors import UserError, show
from vico.io.text import read_text
from vico.train.config import RunConfig, value_type
from vico.train.settings import (
    TYPE_NAMES,
    expand_home,
    expand_variables,
    is_path_setting,
    settings_from,
    with_absolute_paths,
)

# Flags of the published code that no longer do anything, with the reason.
RETIRED = {
    "device": "the device is detected",
    "pin_mem": "batches are pinned when there is a GPU",
    "no_pin_mem": "batches are pinned when there is a GPU",
    "start_epoch": "the checkpoint holds the position",
    "world_size": "the launcher sets it",
    "dist_url": "the launcher sets it",
    "dist_on_itp": "the launcher sets it",
}
MAX_RECIPE_CHARACTERS = 1 << 15
RETIRED_SWITCHES = {"pin_mem", "no_pin_mem", "dist_on_itp"}
OFF_SWITCHES = {"no_shuffle": "--shuffle"}  # of the others: --no-NAME
UNSET = "none"  # a flag's value


@dataclass(frozen=True)
class CommandLine:
    """The settings given by recipe or flag, and notes for the user."""

    given: dict[str, Any]
    notes: tuple[str, ...]
    debug: bool

    def resolve(self, saved: Mapping[str, Any] | None = None) -> RunConfig:
        """The given settings over `saved` (a checkpoint's settings) over the defaults.

        Raises UserError for a value out of range.
        """
        return with_absolute_paths(RunConfig(**{**(saved or {}), **self.given}))


def parse(argv: Sequence[str], command: str, description: str) -> CommandLine:
    """Read flags and the recipe that they name.

    Raises UserError for an unknown flag or key, or a value of the wrong type.
    """
    typed = vars(make_parser(command, description).parse(argv))
    recipe = _read_recipe(typed["config"]) if "config" in typed else {}
    names = {field.name for field in dataclasses.fields(RunConfig)}
    given = {**recipe, **{name: value for name, value in typed.items() if name in names}}
    retired = [name for name in RETIRED if name in typed]
    notes = [f"--{name} does nothing now: {RETIRED[name]}" for name in retired]
    if given.get("lr") is not None and given.get("blr") is not None:
        # A sweep over --blr on a recipe with lr would repeat the same run.
        by = "" if "lr" in typed else " by the recipe"
        notes.append(f"--blr {given['blr']:g} is not used, since --lr {given['lr']:g} is given{by}")
    return CommandLine(given, tuple(notes), "debug" in typed)


def training_notes(config: RunConfig) -> list[str]:
    """About settings that do less than they seem to; none for a command that only evaluates."""
    notes: list[str] = []
    if config.only_evaluates:
        return notes
    if config.split != "val" and not config.init_eval:
        evaluation = f"evaluate that by `vico eval --split {config.split}`"
        notes.append(f"--split {config.split}: epochs are evaluated on val; {evaluation}")
    if config.warmup_epochs > config.epochs:
        share = config.epochs / config.warmup_epochs
        notes.append(
            f"--warmup_epochs {config.warmup_epochs:g} is above --epochs {config.epochs}: the "
            f"learning rate rises to {share:.1%} of its peak, and the run ends there"
        )
    return notes


def parse_with_checkpoint(argv: Sequence[str], command: str, description: str) -> CommandLine:
    """As `parse`, for a command that needs --resume."""
    line = parse(argv, command, description)
    if line.given.get("resume") is None:
        raise UserError(
            "--resume is missing: name the checkpoint folder, run folder or .pth file to evaluate"
        )
    return line


def make_parser(command: str, description: str) -> SettingsParser:
    """A parser of RunConfig's fields. A flag that is not given has no value, not the default."""
    parser = SettingsParser(
        prog=command,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
    )
    parser.add_argument(
        "--config",
        type=path_argument,
        metavar="RECIPE",
        help="YAML file of these settings; flags win over it",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _add_settings(parser)
    _add_retired(parser)
    return parser


def _add_settings(parser: SettingsParser) -> None:
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(RunConfig):
        title, text = field.metadata["group"], field.metadata["help"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind, choices = value_type(field.type)
        flag = f"--{field.name}"
        if kind is bool:
            groups[title].add_argument(flag, action="store_true", help=text)
            continue
        if field.default is not None:
            text = f"{text} (default: {field.default})"
        words = (*choices, UNSET) if choices and _can_be_unset(field) else choices
        metavar = f"{{{','.join(words)}}}" if words else kind.__name__.upper()
        groups[title].add_argument(flag, type=_converter(field), metavar=metavar, help=text)
    _add_off_switches(parser)


def off_switch(name: str) -> str:
    """The flag that switches off the switch `name`."""
    return OFF_SWITCHES.get(name, f"--no-{name}")


def _add_off_switches(parser: SettingsParser) -> None:
    group = parser.add_argument_group(
        "against a recipe or checkpoint",
        "These switch off what it has switched on. The word none unsets a number without a "
        "default, and --quantize.",
    )
    for field in dataclasses.fields(RunConfig):
        if field.type is bool:
            group.add_argument(off_switch(field.name), dest=field.name, action="store_false")


def _add_retired(parser: SettingsParser) -> None:
    group = parser.add_argument_group(
        "launcher and retired flags", "accepted so that published commands run unchanged"
    )
    group.add_argument("--local_rank", "--local-rank", type=int, help="passed by launchers")
    for name, why in RETIRED.items():
        text = f"does nothing now: {why}"
        if name in RETIRED_SWITCHES:
            group.add_argument(f"--{name}", action="store_true", help=text)
        else:
            group.add_argument(f"--{name}", metavar="VALUE", help=text)


def _can_be_unset(field: "dataclasses.Field[Any]") -> bool:
    """Whether the word none means no value. In a text or a path it may be a name."""
    kind, choices = value_type(field.type)
    is_name = kind is Path or (kind is str and not choices)
    return type(None) in typing.get_args(field.type) and not is_name


def _converter(field: "dataclasses.Field[Any]") -> Callable[[str], Any]:
    """argparse's converter of one flag value."""
    kind, choices = value_type(field.type)

    def convert(text: str) -> Any:
        if text == UNSET and _can_be_unset(field):
            return None
        if choices and text not in choices:
            allowed = ", ".join(map(repr, choices))
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {allowed})")
        if is_path_setting(field.name, text):
            return kind(path_argument(text))
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{show(text)} is not {TYPE_NAMES[kind]}") from None

    return convert


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


def _read_recipe(path: Path) -> dict[str, Any]:
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
    for key, value in recipe.items():
        try:
            if is_path_setting(key, value):
                recipe[key] = expand_home(expand_variables(value))
        except UserError as error:
            raise UserError(f"--config {path}: {key}: {error}") from None
    return settings_from(recipe, f"--config {path}")
