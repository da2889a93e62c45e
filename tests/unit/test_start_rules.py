"""The rules of a start: where a run ends, what it trains, and what is done in which order."""

import dataclasses
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from faults.emulated_ranks import ALONE, EmulatedWorld, Exchange
from support.errors import refusal
from support.toy_dataset import ToyData
from support.training_steps import config_of
from vico.checkpoint.format import Checkpoint, TrainState
from vico.checkpoint.write import RunIdentity, save_step
from vico.data.batching import TrainingSteps
from vico.data.text_windows import NO_TEXTS, Texts
from vico.distributed.world import World
from vico.errors import TrainingError, UserError
from vico.io import file_cache
from vico.io.atomic import write_json
from vico.io.file_cache import FileCache
from vico.io.output_dir import OutputDir
from vico.model.vico import initial_trainables
from vico.train import shared_digests, start
from vico.train.build import Inputs, read_inputs
from vico.train.config import RunConfig
from vico.train.engine import Engine
from vico.train.start import Run


def run_of(config: RunConfig, per_epoch: int = 10, split: str | None = "val", **state: Any) -> Run:
    """A run that has no engine; 64 questions a step."""
    steps = cast(TrainingSteps, SimpleNamespace(steps_per_epoch=per_epoch, questions_per_step=64))
    inputs = cast(Inputs, SimpleNamespace(texts=Texts((), 7, 9)))
    parts = (config, ALONE, OutputDir(Path("out")), inputs, cast(Engine, None), steps)
    return Run(*parts, TrainState(**state), RunIdentity("r", {}, {}), True, split)


@pytest.mark.parametrize(
    ("max_steps", "last", "limit"),
    [
        (None, 30, "--epochs"),
        (29, 29, "--max_steps"),
        (30, 30, "--epochs"),
        (31, 30, "--epochs"),
        (1, 1, "--max_steps"),
    ],
)
def test_the_last_step_and_the_flag_that_sets_it(
    max_steps: int | None, last: int, limit: str
) -> None:
    """Three epochs of ten steps, or fewer steps."""
    run = run_of(RunConfig(epochs=3, max_steps=max_steps))
    assert (run.last_step, run.limit) == (last, limit)


@pytest.mark.parametrize(
    ("step", "due", "is_complete"),
    [(29, False, False), (30, False, True), (30, True, False), (31, False, True)],
)
def test_a_complete_run(step: int, due: bool, is_complete: bool) -> None:
    """All its steps are done, and the last epoch is evaluated."""
    run = run_of(RunConfig(epochs=3), step=step, evaluation_due=due)
    assert run.is_complete == is_complete


def test_learning_rates_of_a_run() -> None:
    """--blr is per 256 questions of a step; the schedule is METHOD 3's, in epochs."""
    run = run_of(RunConfig(epochs=3, blr=0.4, min_lr=0.02, warmup_epochs=1))
    assert run.peak_lr == pytest.approx(0.1)
    assert [run.lr(step) for step in (0, 5, 10, 20, 30)] == pytest.approx(
        [0, 0.05, 0.1, 0.06, 0.02]
    )
    assert run_of(RunConfig(lr=0.3, blr=0.4)).peak_lr == 0.3


def test_texts_are_measured_with_evaluations() -> None:
    run = run_of(RunConfig())
    assert run.measured_texts is run.inputs.texts
    assert run_of(RunConfig(), split=None).measured_texts is NO_TEXTS
    assert [start._evaluated_split(s) for s in (("train",), ("train", "x"))] == [None, "x"]


def test_an_evaluation_has_one_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the evaluated split; its workers stay from one epoch to the next."""
    made: list[Any] = []
    monkeypatch.setattr(start, "chunk_loader", lambda *of, **more: made.append((of, more)) or made)
    run = run_of(RunConfig(), split="test")
    vars(run.inputs)["questions"] = {"train": ["t"], "test": ["e"]}
    assert run.evaluation_batches is run.evaluation_batches
    assert made == [((run.inputs, ["e"], run.config, ALONE), {"keep_workers": True})]


def test_a_note_of_another_schedule() -> None:
    """With the rates of the steps before and after: half a cosine over 4 epochs, or over 2."""
    run = run_of(RunConfig(epochs=4, lr=1.0, min_lr=0.0, warmup_epochs=0), step=20)
    assert start._notes_of_other_epochs(run, 2) == [
        "note: --epochs 2 -> 4: the learning-rate schedule spans all 4 epochs, so step 21 takes "
        "5.00e-01, where step 20 took 6.16e-03; that is not the run of 4 epochs from the start"
    ]
    assert [start._notes_of_other_epochs(run, before) for before in (4, None, "2")] == [[]] * 3
    begins = dataclasses.replace(run, state=TrainState(step=0))
    assert start._notes_of_other_epochs(begins, 2) == []


def test_which_videos_are_captioned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the evaluated split, if it is asked for and there is one."""
    monkeypatch.setattr(start, "CaptionedVideos", lambda *of: of)
    inputs = cast(Inputs, object())
    asked, silent = RunConfig(eval_captions=3, max_feats=6), RunConfig()
    both, alone = ("train", "test"), ("train",)
    made: Any = start._captioned_videos(asked, inputs, both)
    assert made == (inputs, "test", 3, 6)
    assert start._captioned_videos(silent, inputs, both) is None
    assert start._captioned_videos(asked, inputs, alone) is None


def test_the_flags_of_training_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting reaches the steps under its own name."""
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(start, "TrainingSteps", lambda *of, **named: made.append((of, named)))
    questions = {"train": ["t"], "val": ["v"]}
    inputs: Any = SimpleNamespace(questions=questions, datasets={"nextqa": 1}, texts=NO_TEXTS)
    world = EmulatedWorld(1, 3, torch.device("cpu"), None)
    flags: dict[str, Any] = dict(max_feats=6, batch_size=5, accum_iter=2, seed=11, max_tokens=77)
    config = RunConfig(**flags, vaq=True)
    start._training_steps(config, inputs, world)
    changes: dict[str, Any] = dict(no_shuffle=True, caption_crop="none", max_tokens=0)
    other = dataclasses.replace(config, **changes, keep=1, text=(Path("a.txt"),))
    start._training_steps(other, inputs, world)
    (of, named), (_, others) = made
    assert of == (["t"], {"nextqa": 1}, config.datasets)
    assert named == dict(
        num_slots=6,
        tasks=("vqa", "cap", "vaq"),
        micro_batch_size=5,
        accumulation=2,
        rank=1,
        world_size=3,
        seed=11,
        shuffle=True,
        crop=True,
        max_tokens=77,
        kept=None,
    )
    assert (others["shuffle"], others["crop"], others["max_tokens"]) == (False, False, None)
    assert others["kept"] is not None and others["tasks"][-1] == "keep"


# ---- a start, up to the engine -------------------------------------------------------------------


class Built:
    """In the engine's place: what it is built with and told."""

    def __init__(self, config: RunConfig, inputs: Inputs, values: dict[str, Tensor]) -> None:
        self.config, self.inputs, self.values = config, inputs, values
        self.moments: list[tuple[dict[str, Tensor], int]] = []

    def set_moments(self, moments: dict[str, Tensor], num_updates: int) -> None:
        self.moments.append((moments, num_updates))


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """No engine is built; the phases of the start, and an empty cache."""
    steps: list[str] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_cache, "SETTLED_SECONDS", -1.0)

    def build(config: RunConfig, inputs: Inputs, values: dict[str, Tensor], world: World) -> Built:
        steps.append("engine")
        return Built(config, inputs, values)

    monkeypatch.setattr(start, "build_engine", build)
    monkeypatch.setattr(start, "require_same_files", lambda *_: steps.append("files"))
    monkeypatch.setattr(start, "require_same_start", lambda *_: steps.append("start"))
    monkeypatch.setattr(start, "start_forkserver", lambda: steps.append("forkserver"))
    monkeypatch.setattr(start.reporters, "chosen", lambda names: steps.append(names))
    return steps


def test_a_new_run(toy: ToyData, tmp_path: Path, begun: list[str]) -> None:
    """Of the seed's weights; all inputs are compared before minutes of loading."""
    out = tmp_path / "out"
    flags = ["--output_dir", str(out), "--seed", "4", "--bias", "0.3", "--report_to", "none"]
    config = config_of(toy, *flags)
    run = start.start(config, ALONE)
    assert begun == ["files", "none", "start", "engine"]
    engine = cast(Any, run.engine)
    expected = initial_trainables(run.inputs.trainable_shapes, 0.3, 4)
    assert engine.values.keys() == expected.keys() and engine.moments == []
    assert all(torch.equal(value, expected[name]) for name, value in engine.values.items())
    assert run.from_scratch and run.evaluated_split == "val" and run.captioned_videos is None
    assert run.state == TrainState(0, 4, 0, None, [0.0] * 2, [0] * 2)
    assert run.identity.settings == config.to_json() and len(run.identity.id) == 12
    assert {"backbone", "data train questions", "data val features"} <= {*run.identity.fingerprints}
    assert {*run.inputs.questions} == {"train", "val"}
    begun.clear()
    workers = dataclasses.replace(config, num_workers=1, no_eval=True)
    run = start.start(workers, ALONE)
    assert begun == ["files", "forkserver", "none", "start", "engine"]
    assert run.evaluated_split is None and {*run.inputs.questions} == {"train"}


def test_only_features_are_watched_while_it_trains(
    toy: ToyData, tmp_path: Path, begun: list[str]
) -> None:
    """The rest has been read. Up to the engine all files are."""
    shutil.copytree(toy.folder / "data", tmp_path / "data")
    flags = ["--output_dir", str(tmp_path / "out"), "--data_path", str(tmp_path / "data")]
    run = start.start(config_of(toy, *flags), ALONE)
    table, features = (tmp_path / "data/nextqa" / n for n in ("train.csv", "clipvitl14.pth"))
    os.utime(table, (1, 1))
    run.inputs.files.check_unchanged()
    with features.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(TrainingError, match=r"clipvitl14.pth: .*changed"):
        run.inputs.files.check_unchanged()


def test_a_file_that_changes_while_weights_load(
    toy: ToyData, tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read twice: what was compared is not what is trained, so the start ends."""
    shutil.copytree(toy.folder / "data", tmp_path / "data")

    def build(*_: object) -> None:
        with (tmp_path / "data/nextqa/train.csv").open("a") as file:
            file.write("\n")

    monkeypatch.setattr(start, "build_engine", build)
    flags = ["--output_dir", str(tmp_path / "out"), "--data_path", str(tmp_path / "data")]
    with pytest.raises(TrainingError, match=r"train.csv: .*changed"):
        start.start(config_of(toy, *flags), ALONE)


def test_what_was_checked_is_remembered_if_the_start_ends_later(
    toy: ToyData, tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the next start does not scan the files again."""

    def fails(*_: object) -> dict[str, str]:
        raise UserError("fingerprints")

    monkeypatch.setattr(shared_digests, "of_run", fails)
    config = config_of(toy, "--output_dir", str(tmp_path / "out"))
    assert refusal(start.start, config, ALONE) == "fingerprints"
    assert len(FileCache()._entries) >= 4, "questions and features of two splits, captions"


def test_a_run_that_goes_on(
    toy: ToyData, tmp_path: Path, begun: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With the weights, the moments and the position of its checkpoint, and the notes on both."""
    out = tmp_path / "out"
    config = config_of(toy, "--output_dir", str(out), "--epochs", "1")
    first = start.start(config, ALONE)
    values = {name: torch.full_like(v, 0.5) for name, v in cast(Any, first.engine).values.items()}
    moments = {}
    for name, value in values.items():
        moments |= {f"{name}.{m}": value.clone() for m in ("exp_avg", "exp_avg_sq")}
    state = TrainState(5, 4, 7, None, [0.0] * 2, [0] * 2)
    output_dir = OutputDir(out)
    save_step(output_dir, values, moments, state, first.identity, None)
    facts = {"steps_per_epoch": 5, "run": first.identity.id}
    write_json(output_dir.args, config.to_json() | facts)
    capsys.readouterr()
    again = start.start(dataclasses.replace(config, epochs=2), ALONE)
    engine = cast(Any, again.engine)
    assert not again.from_scratch and again.state == state
    assert all((value == 0.5).all() for value in engine.values.values())
    ((loaded, num_updates),) = engine.moments
    assert num_updates == 7 and loaded.keys() == moments.keys()
    assert again.identity.id == first.identity.id
    printed = capsys.readouterr().out.splitlines()
    (note,) = [line for line in printed if "--epochs 1 -> 2" in line]
    assert note.startswith("note: --epochs 1 -> 2: the learning-rate schedule spans all 2 epochs")
    assert printed[:2] == ["train: 20 questions", "val: 10 questions"] and printed[-1] == note


# ---- an evaluation of a checkpoint ---------------------------------------------------------------


def test_a_checkpoint_is_compared_where_something_can_differ(
    toy: ToyData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it records, another host's files, or --verify; what cannot be compared is said."""
    taken: list[tuple[Any, ...]] = []
    fingerprints = {"backbone": "b", "tokenizer": "t"}

    def take(config: Any, inputs: Any, splits: Any, recorded: Any, world: Any) -> dict[str, str]:
        taken.append((splits, recorded))
        return fingerprints

    monkeypatch.setattr(start, "_fingerprints", take)
    config = config_of(toy)
    inputs = read_inputs(config, ("val",), ALONE)
    weights = initial_trainables(inputs.trainable_shapes, bias=0.5, seed=0)
    bare = Checkpoint(Path("x.pth"), weights)
    assert start.fit_and_compare(config, bare, inputs, ALONE).weights.keys() == weights.keys()
    assert taken == []
    verified = dataclasses.replace(config, verify=True)
    start.fit_and_compare(verified, bare, inputs, ALONE)
    recorded = dataclasses.replace(bare, fingerprints={"backbone": "b", "data val questions": "q"})
    capsys.readouterr()
    start.fit_and_compare(config, recorded, inputs, ALONE)
    assert taken == [(("val",), {}), (("val",), recorded.fingerprints)]
    assert capsys.readouterr().out == (
        "note: x.pth: an earlier version wrote it and did not record tokenizer: these are not "
        "compared\n"
    )
    other = dataclasses.replace(recorded, fingerprints={"backbone": "other"})
    assert "(backbone; table below)" in refusal(start.fit_and_compare, config, other, inputs, ALONE)


@dataclasses.dataclass
class Folder:
    """An output folder that counts how often it is claimed."""

    holds_run: bool
    claims: int = 0

    def has_run(self) -> bool:
        return self.holds_run

    def claim(self) -> list[str]:
        self.claims += 1
        return ["note: taken over"]


def test_a_folder_is_claimed_by_rank_0_where_it_holds_a_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is read from it; what is found is said."""
    folders: list[Any] = [Folder(True), Folder(True), Folder(False)]
    first = EmulatedWorld(0, 2, torch.device("cpu"), None, exchange=Exchange(2))
    worlds = [first, dataclasses.replace(first, rank=1)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start._claim, folders[:2], worlds))
    start._claim(folders[2], ALONE)
    assert [folder.claims for folder in folders] == [1, 0, 0]
    assert capsys.readouterr().out == "note: taken over\n"
