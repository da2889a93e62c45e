"""What holds for every reader, and the groups that accuracies are reported for."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.annotation_files import FILE_PROPERTY, csv_row, csv_text, put, star_item, tvqa_row
from support.errors import refusal
from vico.data.datasets import DATASETS, accuracy_groups, read_questions
from vico.errors import UserError

VAL_FILES = {"nextqa": "val.csv", "star": "STAR_val.json", "tvqa": "tvqa_val.jsonl"}


@pytest.mark.parametrize("dataset", VAL_FILES)
def test_missing_file(tmp_path: Path, dataset: str) -> None:
    """It is named, with what should be there."""
    message = refusal(read_questions, dataset, tmp_path, "val")
    assert message.startswith(f"{tmp_path / VAL_FILES[dataset]}: no such file; the ")


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "val.csv").mkdir()
    assert "cannot be read (Is a directory)" in refusal(read_questions, "nextqa", tmp_path, "val")


TEXT = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=12)


@FILE_PROPERTY
@given(texts=st.lists(st.lists(TEXT, min_size=5, max_size=5), min_size=1, max_size=4))
def test_option_texts_are_verbatim(tmp_path: Path, texts: list[list[str]]) -> None:
    numbered = list(enumerate(texts))
    csv_rows = [[*csv_row(qid=str(i))[:8], *options] for i, options in numbered]
    put(tmp_path / "val.csv", csv_text(csv_rows))
    assert [list(q.options) for q in read_questions("nextqa", tmp_path, "val")] == texts
    keys = ("a0", "a1", "a2", "a3", "a4")
    rows = [tvqa_row(qid=i, **dict(zip(keys, options, strict=True))) for i, options in numbered]
    put(tmp_path / "tvqa_val.jsonl", rows)
    assert [list(q.options) for q in read_questions("tvqa", tmp_path, "val")] == texts


JUNK = [b'"', b"NaN", b"\n", b"[[", b"null", b"1e999", b"\\ud800"]


@FILE_PROPERTY
@given(data=st.data())
@pytest.mark.parametrize("dataset", VAL_FILES)
def test_damage_is_a_user_error(tmp_path: Path, dataset: str, data: st.DataObject) -> None:
    """A damaged file is read, or ends in one printable line; never in another exception."""
    clean: dict[str, Any] = {
        "nextqa": csv_text([csv_row()]),
        "star": [star_item()],
        "tvqa": [tvqa_row()],
    }
    path = put(tmp_path / VAL_FILES[dataset], clean[dataset])
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    junk = data.draw(st.one_of(st.binary(max_size=6), st.sampled_from(JUNK)))
    num_lost = data.draw(st.integers(0, 9))
    path.write_bytes(whole[:start] + junk + whole[start + num_lost :])
    try:
        read_questions(dataset, tmp_path, "val")
    except UserError as problem:
        assert str(problem).isprintable()


def test_accuracy_groups() -> None:
    groups = accuracy_groups(DATASETS["nextqa"], ["DB", "TN", "CW", "CH", "DO", "??", "CW"])
    assert groups == {"C": ["CH", "CW"], "T": ["TN"], "D": ["DB", "DO"], "(unknown)": ["??"]}
    assert accuracy_groups(DATASETS["intentqa"], ["TN", "TP", "CH"]) == {
        "CH": ["CH"],
        "TP&TN": ["TN", "TP"],
    }
    shows = accuracy_groups(DATASETS["tvqa"], ["House M.D.", "Castle"])
    assert shows == {"Castle": ["Castle"], "House M.D.": ["House M.D."]}
    in_order = list(accuracy_groups(DATASETS["star"], ["Feasibility", "Interaction", "(unknown)"]))
    assert in_order == ["Interaction", "Feasibility", "(unknown)"]
    assert DATASETS["star"].mean_of == ("Interaction", "Sequence", "Prediction", "Feasibility")


@given(
    types=st.lists(st.sampled_from(["CW", "TP", "DB", "Sequence", "(unknown)", "C", ""])),
    dataset=st.sampled_from(sorted(DATASETS)),
)
def test_each_type_is_in_one_group(types: list[str], dataset: str) -> None:
    members: list[str] = []
    for names in accuracy_groups(DATASETS[dataset], types).values():
        members += names
    assert sorted(members) == sorted(set(types))
