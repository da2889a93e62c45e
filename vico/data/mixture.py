"""Several data sets in one run: which, and how much of each."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NoReturn

from vico.errors import UserError, show

MAX_WEIGHT = 1000.0


@dataclass(frozen=True)
class DatasetChoice:
    """A data set of --dataset. Its weight times its questions is what an epoch holds of it."""

    name: str
    weight: float = 1.0

    def __str__(self) -> str:
        weight = repr(self.weight).removesuffix(".0")
        return self.name if weight == "1" else f"{self.name}:{weight}"


def parse_datasets(text: str) -> tuple[DatasetChoice, ...]:
    """The data sets of `NAME[:WEIGHT][,NAME[:WEIGHT]]`. Raises UserError; no file is looked at."""
    choices: dict[str, DatasetChoice] = {}
    for part in text.split(","):
        choice = _parse_choice(part.strip(), text)
        if choice.name in choices:
            _refuse(text, f"names {show(choice.name)} twice; give it a weight instead (NAME:2)")
        choices[choice.name] = choice
    return tuple(choices.values())


def dataset_names(text: str) -> tuple[str, ...]:
    """The names alone."""
    return tuple(choice.name for choice in parse_datasets(text))


def _parse_choice(part: str, text: str) -> DatasetChoice:
    name, colon, number = (piece.strip() for piece in part.partition(":"))
    if not name:
        _refuse(text, "holds an empty name; write NAME or NAME:WEIGHT, with commas between")
    # The name becomes a folder of --data_path, and must not lead out of it.
    is_folder_name = PurePath(name).name == name and ".." not in name and "\\" not in name
    if not is_folder_name or name.startswith(".") or not name.isprintable():
        _refuse(text, f"{show(name)} is no plain name of a folder; name one inside --data_path")
    if not colon:
        return DatasetChoice(name)
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight <= MAX_WEIGHT:
        allowed = f"a number above 0, and at most {MAX_WEIGHT:g}"
        _refuse(text, f"the weight of {show(name)} is {show(number)}; it must be {allowed}")
    return DatasetChoice(name, weight)


def epoch_count(choice: DatasetChoice, num_questions: int) -> int:
    """How many questions of a data set of `num_questions` an epoch holds. Raises UserError."""
    count = round(choice.weight * num_questions)
    if not count:
        raise UserError(
            f"--dataset {choice}: an epoch would hold none of its {num_questions} training "
            "questions; raise the weight"
        )
    return count


def paths_by_dataset(flag: str, value: Path | None, names: Sequence[str]) -> dict[str, Path]:
    """The paths of --captions or --features by data set, of those that have one.

    `value`: PATH for the one data set of a run, or NAME=PATH[,NAME=PATH]. `names`: of the run's
    data sets. Raises UserError.
    """
    if value is None:
        return {}
    any_name = "|".join(map(re.escape, names))
    paths: dict[str, Path] = {}
    for part in re.split(f",(?=(?:{any_name})=)", str(value)):
        name, equals, path = part.partition("=")
        if not equals or name not in names:
            if len(names) == 1:
                return {names[0]: value}
            raise UserError(
                f"--{flag} {value}: must be NAME=PATH[,NAME=PATH], since there are several data "
                f"sets; NAME can be {', '.join(names)}"
            )
        if not path or name in paths:
            problem = "twice" if path else "without a path"
            raise UserError(f"--{flag} {value}: names {name} {problem}; write NAME=PATH once each")
        paths[name] = Path(path)
    return paths


def join_paths(paths: Mapping[str, Path], num_datasets: int) -> Path | None:
    """What `paths_by_dataset` reads as `paths`, in a run over so many data sets."""
    if not paths:
        return None
    if num_datasets == 1:
        return next(iter(paths.values()))
    return Path(",".join(f"{name}={path}" for name, path in paths.items()))


def _refuse(text: str, problem: str) -> NoReturn:
    raise UserError(f"--dataset {show(text)}: {problem}")
