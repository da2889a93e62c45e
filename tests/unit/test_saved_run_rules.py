"""The settings of a checkpoint as they are read again, and how many questions an epoch holds."""

from pathlib import Path
from typing import Any

import pytest

from support.errors import refusal
from vico.checkpoint.format import REMEDY, TrainState
from vico.checkpoint.write import RunIdentity, save
from vico.data.length_stats import Cuts, Lengths, QuestionLengths
from vico.data.types import Question, Questions
from vico.errors import CheckpointError
from vico.train import input_notes
from vico.train.config import RunConfig
from vico.train.saved_run import Start, newest_of, read_checkpoint


def saved(path: Path, **settings: Any) -> Path:
    """A checkpoint of a run with these settings."""
    identity = RunIdentity("r", {**RunConfig().to_json(), **settings}, {})
    save(path, {}, {}, TrainState(step=3), identity)
    return path


def test_settings_are_typed_again(tmp_path: Path) -> None:
    """Paths are paths, as in the run that wrote them."""
    settings = read_checkpoint(saved(tmp_path / "c", text=["/a.txt"])).settings
    assert settings["output_dir"] == RunConfig().output_dir
    assert settings["text"] == (Path("/a.txt"),) and settings["epochs"] == RunConfig().epochs


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    """The file that holds them is named, and what to do."""
    path = saved(tmp_path / "c", epochs="many")
    with pytest.raises(CheckpointError) as refused:
        read_checkpoint(path)
    message = str(refused.value)
    assert message.startswith(f"{path}/state.json") and "epochs" in message
    assert message.endswith(f"; {REMEDY}")


def test_ids_of_new_runs() -> None:
    ids = {Start().run_id for _ in range(5)}
    assert len(ids) == 5 and all(len(run_id) == 12 for run_id in ids)


def test_a_run_without_a_usable_checkpoint(tmp_path: Path) -> None:
    """Of a folder that is named by --resume another is to be named; its best is looked at too."""
    saved(tmp_path / "checkpoint-3", epochs="many")
    (tmp_path / "checkpoint_best").mkdir()
    message = refusal(newest_of, tmp_path)
    assert message.startswith(f"{tmp_path}: none of its 1 checkpoints can be used (")
    assert message.endswith("); name another by --resume") and REMEDY not in message


# ---- notes ---------------------------------------------------------------------------------------


def questions(number: int) -> list[Question]:
    return [Question(i, str(i), "v", "", "why", ("a", "b"), 0) for i in range(number)]


@pytest.mark.parametrize(
    ("dataset", "notes"),
    [
        ("nextqa", []),
        ("nextqa:0.5", ["train: an epoch holds 10 of 20 nextqa questions"]),
        ("nextqa,star", ["train: an epoch holds 20 of 20 nextqa, 6 of 6 star questions"]),
        ("star:1.5", ["train: an epoch holds 9 of 6 star questions"]),
    ],
)
def test_how_many_questions_an_epoch_holds(dataset: str, notes: list[str]) -> None:
    """Where they are not just all of the only data set; those of val do not count."""
    used = {("nextqa", "train"): questions(20), ("star", "train"): questions(6)}
    used["nextqa", "val"] = questions(3)
    assert input_notes.mixture_notes(RunConfig(dataset=dataset), used) == notes


def test_notes_of_one_split() -> None:
    """First how many are used, then what is special about them."""
    measured = QuestionLengths(2, Lengths.of([3, 4]), Cuts())
    notes = input_notes.split_notes(RunConfig(), "val", questions(2), questions(1), 1, measured)
    past = "about a clip that lies past the end of its video's features: zeros in its slots"
    assert notes == [
        "val: 2 used / 3 total questions: 1 dropped, whose 1 videos have no features "
        "(--missing_features drop)",
        f"val: 1 of 2 questions {past}",
    ]


def test_notes_of_annotation_files() -> None:
    """Blank rows, and what their reader says; of splits in their order."""
    blank, silent = Questions(questions(1)), Questions(questions(1))
    blank.num_blank_rows, blank.notes = 2, ("said by its reader",)
    splits = {"train": blank, "val": silent, "test": questions(1)}
    assert input_notes.annotation_notes(RunConfig(), "nextqa", splits) == [
        "warning: train: 2 rows of blanks are passed over",
        "train: said by its reader",
    ]
