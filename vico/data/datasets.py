"""The datasets by name. A new one is a reader file and one line here."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vico.data.readers import intentqa, nextqa, star, tvqa
from vico.data.readers.rows import UNKNOWN
from vico.data.types import Question
from vico.errors import UserError


@dataclass(frozen=True)
class Dataset:
    file_of: Callable[[Path, str], Path]  # (folder, split): the annotations
    read: Callable[..., list[Question]]  # (folder, split), and `subtitles` where there is dialogue
    groups: (
        Mapping[str, str] | None
    )  # question type -> group an accuracy is reported for; None: each type is one
    mean_of: tuple[str, ...] = ()  # groups whose accuracies are also averaged
    has_dialogue: bool = (
        False  # has subtitles, and instructions that speak of "the dialogue, video and question"
    )


DATASETS = {
    "nextqa": Dataset(nextqa.file_of, nextqa.read, nextqa.GROUPS),
    "intentqa": Dataset(intentqa.file_of, intentqa.read, intentqa.GROUPS),
    "star": Dataset(star.file_of, star.read, star.GROUPS, mean_of=star.MEAN_OF),
    "tvqa": Dataset(tvqa.file_of, tvqa.read, None, has_dialogue=True),
}


def read_questions(
    dataset: str, folder: Path, split: str, subtitles: bool = False
) -> list[Question]:
    entry = DATASETS[dataset]
    if not entry.has_dialogue:
        if subtitles:
            raise UserError(f"--sub: {dataset} has no subtitles; leave --sub out")
        return entry.read(folder, split)
    return entry.read(folder, split, subtitles)


NOT_GROUPS = frozenset(
    ("split", "n", "n_total", "acc", "Mean", "all")
)  # what else stands where accuracies by group do


def accuracy_groups(dataset: str, types: Iterable[str]) -> dict[str, list[str]]:
    """Group -> those of `types` it sums up, in the order they are reported; each type is in exactly one group."""
    table = DATASETS[dataset].groups
    found: dict[str, list[str]] = {group: [] for group in table.values()} if table else {}
    for name in sorted(set(types)):
        group = (
            (f"'{name}'" if name in NOT_GROUPS else name)
            if table is None
            else table.get(name, UNKNOWN)
        )
        found.setdefault(group, []).append(name)
    return {group: names for group, names in found.items() if names}


def count_equal_options(questions: Iterable[Question]) -> int:
    """Questions that offer one text twice: real sets have a few, which cap the accuracy and deserve a note."""
    return sum(len(set(q.options)) < len(q.options) for q in questions)
