"""The data sets by name: the published ones, and folders of tables in the general schema."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vico.data.readers import intentqa, nextqa, schema, spec, star, tvqa
from vico.data.readers.rows import UNKNOWN, shown
from vico.data.types import Question
from vico.errors import UserError, nearest, show
from vico.io.paths import entries


@dataclass(frozen=True)
class Dataset:
    """What the program knows about a dataset. The folder is DATA_PATH/NAME."""

    # (folder, split) -> path of the annotations
    annotation_file: Callable[[Path, str], Path]
    # (folder, split) -> questions; with dialogue, of (folder, split, subtitles, missing_subtitles)
    read: Callable[..., list[Question]]
    # Question type -> group that an accuracy is reported for. None: each type is a group.
    groups: Mapping[str, str] | None = None
    # Groups whose accuracies are also averaged.
    mean_of: tuple[str, ...] = ()
    # Has subtitles (--sub), and instructions that mention "the dialogue, video and question".
    has_dialogue: bool = False
    # What `vico plan` assumes: mean tokens of a question's sequence (LLaMA tokenizer, 10 video
    # slots), and questions of the training split. The defaults are NExT-QA's.
    mean_question_tokens: int = 96
    num_train_questions: int = 34132
    frames_per_second: float = 1.0  # of the features that clips are counted in
    is_general: bool = False  # a folder of tables in the general schema


# Those with a format of their own. `find_dataset` is the way to ask for one.
DATASETS = {
    "nextqa": Dataset(nextqa.annotation_file, nextqa.read, nextqa.GROUPS),
    "star": Dataset(
        star.annotation_file,
        star.read,
        star.GROUPS,
        mean_of=star.MEAN_OF,
        mean_question_tokens=98,
        num_train_questions=45731,
    ),
    "tvqa": Dataset(
        tvqa.annotation_file,
        tvqa.read,
        has_dialogue=True,
        frames_per_second=tvqa.FEATURES_PER_SECOND,
        mean_question_tokens=121,
        num_train_questions=122039,
    ),
    "intentqa": Dataset(
        intentqa.annotation_file,
        intentqa.read,
        intentqa.GROUPS,
        mean_question_tokens=98,
        num_train_questions=12119,
    ),
}

# Keys that a record of accuracies holds besides its groups.
RESERVED_KEYS = frozenset("split n n_total n_without_subtitles acc Mean all cognition".split())


def find_dataset(name: str, folder: Path) -> Dataset:
    """The dataset of this name, whose files lie in `folder` (DATA_PATH/NAME).

    Raises UserError if there is none.
    """
    if name in DATASETS:
        return DATASETS[name]
    is_name = name == folder.name  # no path, which would be another folder of files
    if is_name and schema.is_dataset(folder):
        return _general(folder)
    known = names_in(folder.parent) if is_name else list(DATASETS)
    expected = "a folder with train, val or test.jsonl (or .csv)"
    files = [path.name for path in entries(folder)] if is_name else []
    holds = f"; {folder} holds {shown(files)}: none is such a table" if files else ""
    raise UserError(
        f"--dataset {show(name)}: there is no such data set; it can be {', '.join(known)}, or "
        f"{expected} in --data_path{nearest(name.lower(), known)}{holds}"
    )


def _general(folder: Path) -> Dataset:
    described = spec.read(folder)
    return Dataset(
        schema.annotation_file,
        schema.read,
        described.groups,
        mean_of=described.mean_of,
        has_dialogue=schema.has_dialogue(folder),
        frames_per_second=described.frames_per_second,
        is_general=True,
    )


def names_in(data_path: Path) -> list[str]:
    """The published data sets, then those that are folders there, as far as they can be seen."""
    folders: list[str] = []
    with contextlib.suppress(UserError):
        folders += sorted(path.name for path in entries(data_path) if schema.is_dataset(path))
    return [*DATASETS, *(name for name in folders if name not in DATASETS)]


def read_questions(
    dataset: str,
    folder: Path,
    split: str,
    subtitles: bool = False,
    missing_subtitles: str = "error",
) -> list[Question]:
    """The questions of a split, in file order. Raises UserError for a file with a fault."""
    entry = find_dataset(dataset, folder)
    if entry.has_dialogue and not entry.is_general:
        questions = entry.read(folder, split, subtitles, missing_subtitles)
    elif subtitles and not entry.has_dialogue:
        raise UserError(f"--sub: {dataset} has no subtitles; leave --sub out")
    else:
        questions = entry.read(folder, split)
    questions[:] = [replace(question, dataset=dataset) for question in questions]
    return questions


def accuracy_groups(dataset: Dataset, types: Iterable[str]) -> dict[str, list[str]]:
    """Group -> those of `types` that it sums up, in the order of the report.

    Each type is in exactly one group. Groups without a type are left out.
    """
    table = dataset.groups
    groups: dict[str, list[str]] = {group: [] for group in table.values()} if table else {}
    for name in sorted(set(types)):
        groups.setdefault(_group_of(name, table), []).append(name)
    return {group: names for group, names in groups.items() if names}


def _group_of(type_name: str, table: Mapping[str, str] | None) -> str:
    if table is not None:
        return table.get(type_name, UNKNOWN)
    return f"'{type_name}'" if type_name in RESERVED_KEYS else type_name


def count_equal_options(questions: Iterable[Question]) -> int:
    """Questions that offer one text twice. Real sets have a few, which cap the accuracy."""
    return sum(len(set(q.options)) < len(q.options) for q in questions)
