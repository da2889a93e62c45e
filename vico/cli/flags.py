"""The flags of train, eval, check and quantize-eval: with a recipe they become a RunConfig."""

import argparse
import dataclasses
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vico.cli import aliases, recipes
from vico.cli.aliases import ALIASES, COMPUTED, RENAMED, Spelled
from vico.cli.parser import OVERRIDE, RETIRED_HELP, GroupHelp, SettingsParser, path_argument
from vico.distributed import launcher_env
from vico.errors import DONE, UserError, nearest, show
from vico.train.bounds import BARE, unless_off, value_type
from vico.train.config import RunConfig
from vico.train.settings import (
    TYPE_NAMES,
    evaluated_split,
    is_path_setting,
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
RETIRED_SWITCHES = {"pin_mem", "no_pin_mem", "dist_on_itp"}
OFF_SWITCHES = {"no_shuffle": "--shuffle", "no_eval": "--eval"}  # of the others: --no-NAME
UNSET = "none"  # a flag's value
YES, NO = ("true", "yes", "1"), ("false", "no", "0")
TYPES = {field.name: value_type(field.type)[0] for field in dataclasses.fields(RunConfig)}
SETTINGS = (*TYPES, *ALIASES)  # the names of settings


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


def parse(
    argv: Sequence[str], command: str, description: str, with_checkpoint: bool = False
) -> CommandLine:
    """Read flags, overrides (lr=1e-3) and the recipe that the flags name.

    `with_checkpoint`: for a command whose settings are a checkpoint's, under those given here.
    Raises UserError for an unknown flag or key, or a value of the wrong type; SystemExit after
    --print_config.
    """
    parser = make_parser(command, description, prints=not with_checkpoint)
    line, typed = read_flags(parser, argv)
    if "print_config" in typed:
        _print_config(line)
    return line


def read_flags(parser: SettingsParser, argv: Sequence[str]) -> tuple[CommandLine, dict[str, Any]]:
    """(the settings, the value of every flag and override by name). Raises as `parse` does."""
    line, typed, others = read_words(parser, argv)
    if others:
        parser.refuse_unknown(others)
    return line, typed


def read_words(
    parser: SettingsParser, argv: Sequence[str]
) -> tuple[CommandLine, dict[str, Any], list[str]]:
    """(the settings, the value of every flag and override by name, words that belong to none).

    Raises UserError as `parse` does.
    """
    words, overrides = parser.without_overrides(argv, SETTINGS)
    namespace, unknown = parser.parse_known_args(words)
    typed = vars(namespace)
    overrides += [word for word in unknown if OVERRIDE.fullmatch(word)]
    others = [word for word in unknown if word not in overrides]
    more = vars(parser.parse([as_flag(*_split(word)) for word in overrides]))
    retired = [name for name in RETIRED if name in {**typed, **more}]
    notes = [f"--{name} {RETIRED_HELP}: {RETIRED[name]}" for name in retired]
    flags = aliases.own_settings([*_given(typed, "--{} {}"), *_given(more, "{}={}")])
    recipe = recipes.read(typed["config"]) if "config" in typed else {}
    given = aliases.with_warmup_epochs(recipe, flags)
    if given.get("lr") is not None and given.get("blr") is not None:
        # A sweep over --blr on a recipe with lr would repeat the same run.
        by = "" if "lr" in flags else " by the recipe"
        notes.append(f"--blr {given['blr']:g} is not used, since --lr {given['lr']:g} is given{by}")
    return CommandLine(given, tuple(notes), "debug" in typed), {**more, **typed}, others


def _split(override: str) -> tuple[str, str]:
    name, _, value = override.partition("=")
    if name not in (*SETTINGS, *RETIRED):
        raise UserError(f"{show(override)[1:-1]}: unknown key '{name}'{nearest(name, SETTINGS)}")
    return name, value


def _given(typed: Mapping[str, Any], spelling: str) -> list[Spelled]:
    """The settings among the parsed flags. `spelling`: as the user wrote them, for messages."""
    settings = {name: value for name, value in typed.items() if name in SETTINGS}
    settings |= {n: tuple(paths) for n, paths in settings.items() if TYPES.get(n) is tuple}
    return [Spelled(n, v, spelling.format(n, _text(v))) for n, v in settings.items()]


def _text(value: Any) -> str:
    """A parsed value as the user may have written it."""
    if value is None:
        return UNSET
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else show(str(value))[1:-1]


def _print_config(line: CommandLine) -> NoReturn:
    """Print the resolved settings as a recipe, on rank 0, and end. Raises UserError."""
    text = recipes.as_text(line.resolve(), line.notes)
    if launcher_env.is_rank_0():
        print(text, end="")
    raise SystemExit(DONE)


def training_notes(config: RunConfig) -> list[str]:
    """About settings that do less than they seem to; none for a command that only evaluates."""
    notes: list[str] = []
    if config.only_evaluates:
        return notes
    evaluated = evaluated_split(config)
    if evaluated is None:
        nothing = ", and --save_legacy writes nothing" if config.save_legacy else ""
        notes.append(
            f"--no_eval: no epoch is evaluated, so no checkpoint_best is kept{nothing}; every "
            "checkpoint-STEP is"
        )
    elif evaluated != "val":
        notes.append(
            f"--split {evaluated}: there is no val, so epochs are evaluated on {evaluated}, which "
            "also chooses checkpoint_best: its accuracy there is no longer that of unseen questions"
        )
    elif config.split != "val" and not config.init_eval:
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
    line = parse(argv, command, description, with_checkpoint=True)
    require_resume(line, "to evaluate")
    return line


def require_resume(line: CommandLine, purpose: str) -> None:
    """Raise UserError where no checkpoint is named."""
    if line.given.get("resume") is None:
        raise UserError(
            f"--resume is missing: name the checkpoint folder, run folder or .pth file {purpose}"
        )


def make_parser(
    command: str,
    description: str,
    prints: bool = True,
    usage: str = "[--config RECIPE] [FLAGS] [KEY=VALUE ...]",
    add_own: Callable[[SettingsParser], None] | None = None,
) -> SettingsParser:
    """A parser of RunConfig's fields. A flag that is not given has no value, not the default.

    `prints`: whether it has --print_config. `usage`: behind the command's name. `add_own`: adds the
    command's own flags, which the help shows first.
    """
    parser = SettingsParser(
        prog=command,
        usage=f"{command} {usage}",
        description=description,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
    )
    add = parser.add_argument
    add("-h", "--help", action=GroupHelp, metavar="GROUP", help="show this, or one GROUP of it")
    add(
        "--config",
        type=path_argument,
        metavar="RECIPE",
        help="YAML file of these settings; flags and KEY=VALUE win over it",
    )
    if prints:
        text = "print all settings as a recipe, and stop"
        add("--print_config", action="store_true", help=text)
    add("--debug", action="store_true", help="show the traceback of an error")
    if add_own is not None:
        add_own(parser)
    _add_settings(parser)
    _add_aliases(parser)
    _add_off_switches(parser)
    _add_retired(parser)
    return parser


def _add_settings(parser: SettingsParser) -> None:
    groups: dict[str, Any] = {}
    options: dict[str, Any]
    for field in dataclasses.fields(RunConfig):
        title, text = field.metadata["group"], field.metadata["help"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind, choices = value_type(field.type)
        flag = f"--{field.name}"
        if kind is bool:
            groups[title].add_argument(flag, action="store_true", help=text)
            continue
        if kind is tuple:
            options = {"nargs": "+", "metavar": "FILE"}
            groups[title].add_argument(flag, type=path_argument, help=text, **options)
            continue
        if field.default is not None:
            text = f"{text} (default: {field.default})"
        words = (*choices, UNSET) if choices and _can_be_unset(field) else choices
        metavar = f"{{{','.join(words)}}}" if words else kind.__name__.upper()
        options = {"type": _converter(field), "metavar": metavar}
        if field.name in BARE:
            bare = BARE[field.name]
            text = f"{text}; without a number: {bare:g}"
            options |= {"nargs": "?", "const": bare}
        groups[title].add_argument(flag, help=text, **options)


def _add_aliases(parser: SettingsParser) -> None:
    """Hugging Face's names, and their spellings with dashes, which the help leaves out."""
    group = parser.add_argument_group(
        "Hugging Face's names", "The same settings by other names; with dashes, too."
    )
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}

    def add(name: str, shown: bool, **options: Any) -> None:
        text = options.pop("help", None)
        if shown:
            group.add_argument(f"--{name}", help=text, **options)
        if "_" in name:
            dashed = f"--{name.replace('_', '-')}"
            group.add_argument(dashed, dest=name, help=argparse.SUPPRESS, **options)

    for name, own in RENAMED.items():
        kind, _ = value_type(fields[own].type)
        convert = _whole_number if name == "num_train_epochs" else _converter(fields[own])
        add(name, True, type=convert, metavar=kind.__name__.upper(), help=f"--{own}")
    for name, (kind, text) in COMPUTED.items():
        if kind is bool:
            options = {"nargs": "?", "const": True, "type": _switch, "metavar": "true|false"}
            add(name, True, **options, help=text)
        else:
            add(name, True, type=_plain(kind), metavar=kind.__name__.upper(), help=text)
    for name in aliases.SHARED:
        kind, _ = value_type(fields[name].type)
        add(name, False, type=_converter(fields[name]), metavar=kind.__name__.upper())


def as_flag(name: str, text: str) -> str:
    """The word of a command line that gives the setting `name` this value.

    Raises UserError for a switch that is neither on nor off.
    """
    if name in BARE and text.lower() == "true":
        return f"--{name}"
    if TYPES.get(name) is not bool or name in ALIASES:
        return f"--{name}={text}"
    if text.lower() not in (*YES, *NO):
        raise UserError(f"{name} is {show(text)}; a switch is yes or no")
    return f"--{name}" if text.lower() in YES else off_switch(name)


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
        text = f"{RETIRED_HELP}: {why}"
        if name in RETIRED_SWITCHES:
            group.add_argument(f"--{name}", action="store_true", help=text)
        else:
            group.add_argument(f"--{name}", metavar="VALUE", help=text)


def _can_be_unset(field: "dataclasses.Field[Any]") -> bool:
    """Whether the word none means no value. In a text or a path it may be a name."""
    kind, choices = value_type(field.type)
    is_name = kind is Path or (kind is str and not choices)
    return type(None) in typing.get_args(field.type) and not is_name


def _switch(text: str) -> bool:
    if text.lower() not in (*YES, *NO):
        raise argparse.ArgumentTypeError(f"{show(text)} is not {TYPE_NAMES[bool]}")
    return text.lower() in YES


def _whole_number(text: str) -> int:
    """Also 3.0, as Hugging Face's commands have it."""
    return int(_plain(int)(re.sub(r"\.0*$", "", text)))


def _plain(kind: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{show(text)} is not {TYPE_NAMES[kind]}") from None

    return convert


def _converter(field: "dataclasses.Field[Any]") -> Callable[[str], Any]:
    """argparse's converter of one flag value."""
    kind, choices = value_type(field.type)

    def convert(text: str) -> Any:
        if text == UNSET and _can_be_unset(field):
            return None
        if field.name in BARE and text.lower() in ("true", "false"):
            return BARE[field.name] if text.lower() == "true" else None
        if choices and text not in choices:
            allowed = ", ".join(map(repr, choices))
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {allowed})")
        if is_path_setting(field.name, text):
            return kind(path_argument(text))
        return unless_off(field.name, _plain(kind)(text))

    return convert
