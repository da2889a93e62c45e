"""Accuracies, differences and confusions of a set of questions."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from vico.report.questions import Item, QuestionSet
from vico.report.statistics import Paired, Share, confusion, pair, share

ALL = "all questions"


@dataclass(frozen=True)
class Row:
    """Accuracy on a group of types, or on one type of it, by run; None: no question of it."""

    name: str
    is_part: bool  # a type of the group above it
    shares: list[Share | None]


@dataclass(frozen=True)
class Difference:
    """Two runs, by number, on the questions of a group that both have answered."""

    first: int
    second: int
    group: str
    paired: Paired


def accuracies(questions: QuestionSet, num_runs: int) -> list[Row]:
    """All questions, then each group, then its types where it has several."""
    answered = questions.with_answer
    if not answered:
        return []
    rows = [_row(ALL, False, answered, num_runs)]
    for group, types in questions.groups.items():
        members = _of_types(answered, types)
        is_all = len(members) == len(answered) and len(types) == 1
        if not members or is_all:
            continue
        rows.append(_row(group, False, members, num_runs))
        if len(types) > 1:
            for name in types:
                rows.append(_row(name, True, _of_types(members, [name]), num_runs))
    return [row for row in rows if any(row.shares)]


def _of_types(items: Sequence[Item], types: Sequence[str]) -> list[Item]:
    return [item for item in items if item.type in types]


def _row(name: str, is_part: bool, items: Sequence[Item], num_runs: int) -> Row:
    shares: list[Share | None] = []
    for run in range(num_runs):
        known = [right for item in items if (right := item.is_right(run)) is not None]
        shares.append(share(known) if known else None)
    return Row(name, is_part, shares)


def differences(questions: QuestionSet, num_runs: int) -> list[Difference]:
    """Of each two runs: over all questions, then by group."""
    answered = questions.with_answer
    groups = {ALL: answered}
    for name, types in questions.groups.items():
        if len(questions.groups) > 1:
            groups[name] = _of_types(answered, types)
    found = []
    for first, second in itertools.combinations(range(num_runs), 2):
        for group, items in groups.items():
            rights = [(item.is_right(first), item.is_right(second)) for item in items]
            both = [(a, b) for a, b in rights if a is not None and b is not None]
            if both:
                paired = pair([a for a, _ in both], [b for _, b in both])
                found.append(Difference(first, second, group, paired))
    return found


def confusions(questions: QuestionSet, num_runs: int) -> list[list[list[int]]]:
    """Per run [right answer][given answer] -> number of questions; empty: it answered none."""
    tables = []
    for run in range(num_runs):
        pairs = []
        for item in questions.with_answer:
            answer = item.answers[run]
            if answer is not None and item.right_answer is not None:
                pairs.append((item.right_answer, answer.prediction))
        tables.append(confusion(pairs))
    return tables
