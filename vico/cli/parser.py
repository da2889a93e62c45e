"""The argument parser of every command, and converters of flag values."""

import argparse
import re
from collections.abc import Container, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from vico.errors import UserError, nearest, show
from vico.train.settings import TYPE_NAMES, expand_home, parse_path

MIN_FPS, MAX_FPS = Fraction(1, 1000), Fraction(1000)
OVERRIDE = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)  # KEY=VALUE
RETIRED_HELP = "does nothing now"  # how the help of a retired flag begins


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError with one line, in argparse's own words."""

    @property
    def hint(self) -> str:
        return f"see {self.prog} --help"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.hint})")

    def refuse_unknown(self, unknown: Sequence[str]) -> NoReturn:
        """Raises UserError for the first unknown flag, or else for the first stray word."""
        for word in unknown:
            if word.startswith("-"):
                flag = word.split("=")[0]
                hint = nearest(flag, self._worth_naming()) or f"; {self.hint}"
                raise UserError(f"unknown flag {flag}{hint}")
        raise UserError(
            f"unexpected word {show(unknown[0])}: a value follows a --flag, "
            f"and switches take none; {self.hint}"
        )

    def _worth_naming(self) -> list[str]:
        """The long flags that a hint may name: those of the help that do something."""
        names = []
        for action in self._actions:
            does_something = not (action.help or "").startswith(RETIRED_HELP)
            if action.help != argparse.SUPPRESS and does_something:
                names += [name for name in action.option_strings if name.startswith("--")]
        return names


class GroupHelp(argparse.Action):
    """--help or --help all: the whole help. --help GROUP: one group, by a word of its title."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs="?", **options)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, SettingsParser)
        print(parser.help_of(values), end="")
        parser.exit()


class Store(argparse.Action):
    """The value of a flag; the last one, or all of a flag that takes several, wherever they are."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.nargs == "+":
            values = [*getattr(namespace, self.dest, ()), *values]
        setattr(namespace, self.dest, values)


class SettingsParser(OneLineParser):
    """A parser of run settings: its lines begin with the flag, and name the nearest known one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("action", None, Store)  # of each flag that names no action

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Read all of `argv`. Raises UserError for an unknown flag, word or invalid value."""
        namespace, unknown = self.parse_known_args(list(argv))
        if unknown:
            self.refuse_unknown(unknown)
        return namespace

    def bare_values(self) -> dict[str, Any]:
        """{flag: what it means without a value}, of the flags whose value may be left out."""
        values: dict[str, Any] = {}
        for action in self._actions:
            if action.nargs == "?" and action.const is not None:
                values |= dict.fromkeys(action.option_strings, action.const)
        return values

    def without_overrides(
        self, argv: Sequence[str], names: Container[str]
    ) -> tuple[list[str], list[str]]:
        """(the words without the overrides that a flag would take for its values, these overrides).

        Such are those behind a flag that takes several files or names; a file that is named like
        an override of `names` can be written ./lr=1. A bare --bf16 or --keep gets its value.
        """
        values, several = self.bare_values(), self._several()
        words: list[str] = []
        overrides: list[str] = []
        takes_more = False
        for word, following in pairwise([*argv, ""]):
            if word.startswith("-"):
                takes_more = word in several
            if takes_more and OVERRIDE.fullmatch(word) and word.partition("=")[0] in names:
                overrides.append(word)
            elif word in values and OVERRIDE.fullmatch(following):
                words.append(f"{word}={values[word]}")
            else:
                words.append(word)
        return words, overrides

    def _several(self) -> set[str]:
        """The flags that take several values. A TEXT, as of `vico ask --options`, may be any."""
        several: set[str] = set()
        for action in self._actions:
            if action.nargs == "+" and action.metavar != "TEXT":
                several.update(action.option_strings)
        return several

    def help_of(self, word: str | None) -> str:
        """The help of the group with `word` in its title. Raises UserError where there is none."""
        if word in (None, "all"):
            return self.format_help()
        groups = {group.title: group for group in self._action_groups if group._group_actions}
        for title, group in groups.items():
            if str(word).lower() in str(title).lower().split():
                formatter = self._get_formatter()
                formatter.start_section(title)
                formatter.add_text(group.description)
                formatter.add_arguments(group._group_actions)
                formatter.end_section()
                return formatter.format_help()
        titles = ", ".join(str(title).split()[0] for title in groups)
        raise UserError(f"--help {word}: no such group of flags; there are all, {titles}")

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        super().error(message.replace("ignored explicit argument", "takes no value, but was given"))


def path_argument(text: str) -> Path:
    """A path; a ~ at its beginning is the home folder."""
    try:
        return parse_path(expand_home(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except ValueError:
        what = f"{show(text)} is not {TYPE_NAMES[Path]}"
        raise argparse.ArgumentTypeError(what) from None


def bounded_float(text: str, minimum: float, maximum: float = 1e15) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{show(text)} is not a number") from None
    if not minimum <= value <= maximum:
        raise argparse.ArgumentTypeError(f"{text} must be {minimum:g} to {maximum:g}")
    return value


def positive_float(text: str) -> float:
    return bounded_float(text, 1e-3)


def positive_int(text: str) -> int:
    value = bounded_float(text, 1, 1e9)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text} must be a whole number")
    return int(value)


def frame_rate(text: str) -> Fraction:
    """Frames per second."""
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{show(text)} is no rate as 1, 0.5 or 30/1001") from None
    if not MIN_FPS <= rate <= MAX_FPS:
        raise argparse.ArgumentTypeError(f"{text} must be {MIN_FPS} to {MAX_FPS}")
    return rate
