"""The argument parser of every command, and converters of flag values."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vico.errors import UserError, nearest, show
from vico.train.settings import TYPE_NAMES, expand_home, parse_path


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError with one line, in argparse's own words."""

    @property
    def hint(self) -> str:
        return f"see {self.prog} --help"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.hint})")

    def refuse_unknown(self, unknown: Sequence[str]) -> NoReturn:
        """Raises UserError for the first unknown flag, or else for the first stray word."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for word in unknown:
            if word.startswith("-"):
                flag = word.split("=")[0]
                raise UserError(f"unknown flag {flag}{nearest(flag, known) or f'; {self.hint}'}")
        raise UserError(
            f"unexpected word {show(unknown[0])}: a value follows a --flag, "
            f"and switches take none; {self.hint}"
        )


class SettingsParser(OneLineParser):
    """A parser of run settings: its lines begin with the flag, and name the nearest known one."""

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Read all of `argv`. Raises UserError for an unknown flag, word or invalid value."""
        namespace, unknown = self.parse_known_args(list(argv))
        if unknown:
            self.refuse_unknown(unknown)
        return namespace

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
