"""What each service of curves is told of a run, and what reaches which of them."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support.errors import refusal
from vico.distributed import signals
from vico.errors import UserError
from vico.io.output_dir import OutputDir
from vico.train import reporters
from vico.train.heat_map import png
from vico.train.reporters import Reported, Reporters, TensorBoard, Trackio, WeightsAndBiases

ARGS = {"lr": None, "blr": 0.1, "text": ["a", "b"], "none": [], "vaq": True}
PICTURE = np.zeros((8, 16, 3), np.uint8)


def run_of(out: Path, run_id: str = "0123456789abcdef", step: int = 0) -> Reported:
    return Reported(OutputDir(out), ARGS, run_id, step)


class Service:
    """In the place of a package: what its `init` was given, and what its run was sent."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, logged_in: bool = True) -> None:
        self.started: dict[str, Any] = {}
        self.asked, self.num_finished = list[bool](), 0
        module: Any = ModuleType(name)
        module.init, module.Image, module.Settings = self.init, object, dict
        module.login = lambda prompt: self.asked.append(prompt) or logged_in
        monkeypatch.setitem(sys.modules, name, module)
        for variable in ("MODE", "PROJECT", "NAME", "DIR"):
            monkeypatch.delenv(f"{name.upper()}_{variable}", raising=False)

    def init(self, **settings: Any) -> Any:
        print("a page about a dashboard")
        self.started = settings
        return SimpleNamespace(finish=self.finish)

    def finish(self) -> None:
        print("more of it")
        self.num_finished += 1


def test_wandb_is_told_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its own variables; a run goes on under its id, on this disk where nobody is logged in."""
    service = Service("wandb", monkeypatch)
    out = tmp_path / "out"
    board = WeightsAndBiases(run_of(out))
    assert service.started == {
        "project": "vico",
        "name": "out-01234567",
        "id": "0123456789abcdef",
        "resume": "allow",
        "mode": None,
        "dir": str(out),
        "config": ARGS,
        "settings": {"silent": True, "console": "off", "init_timeout": 60.0},
    }
    assert service.asked == [False] and "nobody is logged in" not in capsys.readouterr().out
    board.close()
    assert service.num_finished == 1
    service = Service("wandb", monkeypatch, logged_in=False)
    WeightsAndBiases(run_of(out, run_id=""))
    assert (service.started["mode"], service.started["id"]) == ("offline", None)
    assert f"so curves stay in {out}/wandb; wandb sync sends them" in capsys.readouterr().out
    for variable in ("MODE", "PROJECT", "NAME", "DIR"):
        monkeypatch.setenv(f"WANDB_{variable}", variable.lower())
    service.asked.clear()
    WeightsAndBiases(run_of(out))
    assert service.asked == [], "a mode that is named needs no login"
    own = {name: service.started[name] for name in ("mode", "project", "name", "dir")}
    assert own == {name: name for name in own}


def test_trackio_is_told_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its page about a dashboard is not shown."""
    service = Service("trackio", monkeypatch)
    board = Trackio(run_of(tmp_path / "out"))
    assert service.started == {
        "project": "vico",
        "name": "out-01234567",
        "resume": "allow",
        "embed": False,
        "auto_log_gpu": False,
        "auto_log_cpu": False,
        "config": ARGS,
    }
    board.close()
    assert service.num_finished == 1 and capsys.readouterr().out == ""
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    Trackio(run_of(tmp_path))
    assert service.started["project"] == "mine"


@pytest.mark.parametrize(("step", "purged"), [(0, None), (1, 2), (7, 8)])
def test_tensorboard_forgets_what_is_repeated(
    step: int, purged: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps behind the checkpoint; a new run repeats none. Arguments are of the checkpoint."""
    opened: list[Any] = []
    texts: list[Any] = []
    file_writer = SimpleNamespace(add_summary=lambda *_: None)

    def writer(folder: str, purge_step: int | None) -> Any:
        opened.append((folder, purge_step))
        return SimpleNamespace(add_text=lambda *text: texts.append(text), file_writer=file_writer)

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", writer)
    TensorBoard(run_of(tmp_path, step=step))
    assert opened == [(str(tmp_path / "runs"), purged)]
    ((name, text, at),) = texts
    assert (name, at) == ("args", step) and '\n  "blr": 0.1,\n' in text


def test_hyperparameters_are_plain() -> None:
    shown = {name: reporters._as_hyperparameter(value) for name, value in ARGS.items()}
    assert shown == {"lr": "none", "blr": 0.1, "text": "a b", "none": "none", "vaq": True}


def test_a_link_in_the_place_of_the_curves(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path)
    message = refusal(TensorBoard, run_of(tmp_path))
    assert message.startswith(f"{tmp_path / 'runs'}: is a symbolic link, not a folder; remove it")


class Board:
    """A reporter that notes what it gets, or raises."""

    def __init__(self, forgets: bool, problem: BaseException | None = None) -> None:
        self.forgets, self.problem = forgets, problem
        self.seen: list[Any] = []

    def curves(self, values: dict[str, float], step: int) -> None:
        if self.problem is not None:
            raise self.problem
        self.seen.append(("curves", step))

    def picture(self, name: str, picture: Any, step: int) -> None:
        self.seen.append((name, step))

    def flush(self) -> None:
        self.seen.append("flush")

    def close(self) -> None:
        self.seen.append("close")


def opened(monkeypatch: pytest.MonkeyPatch, last_step: int, **boards: Board) -> Reporters:
    for name, board in boards.items():
        monkeypatch.setitem(reporters._OPEN, name, lambda run, board=board: board)
    return Reporters([*boards], run_of(Path("out")), last_step)


def test_what_is_repeated_goes_to_those_that_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default a step up to the last one logged; epochs say it themselves."""
    forgetful, keeper = Board(True), Board(False)
    every = opened(monkeypatch, 5, a=forgetful, b=keeper)
    for step in (4, 5, 6):
        every.curves({"x": 1.0}, step)
    every.curves({"x": 1.0}, 4, again=False)
    every.curves({"x": 1.0}, 7, again=True)
    every.picture("gates", PICTURE, 4, again=True)
    every.picture("gates", PICTURE, 8, again=False)
    every.flush()
    every.close()
    ends = ["flush", "close"]
    steps = [("curves", step) for step in (4, 5, 6, 4, 7)]
    assert forgetful.seen == [*steps, ("gates", 4), ("gates", 8), *ends]
    assert keeper.seen == [("curves", 6), ("curves", 4), ("gates", 8), *ends]
    first = Board(False)
    opened(monkeypatch, 0, c=first).curves({}, 1)
    assert first.seen == [("curves", 1)]
    assert opened(monkeypatch, 0)._last_step == Reporters([], run_of(Path("out")))._last_step


@pytest.mark.parametrize("problem", [UserError("bad"), signals.Stopped(15, "stopped")])
def test_errors_that_end_the_run(problem: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user must mend, and a stop, are no failure of a reporter."""
    every = opened(monkeypatch, 0, a=Board(True, problem))
    with pytest.raises(type(problem)):
        every.curves({}, 1)


def test_a_reporter_without_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kind of its error is said, once; the others go on."""
    other = Board(True)
    every = opened(monkeypatch, 0, a=Board(True, KeyError()), b=other)
    for step in (1, 2):
        every.curves({}, step)
    said = capsys.readouterr().err
    assert said == "vico: --report_to a: KeyError; the run goes on without it\n"
    assert other.seen == [("curves", 1), ("curves", 2)]


def test_which_reporters_forget() -> None:
    kinds = (TensorBoard, WeightsAndBiases, Trackio)
    assert [kind.forgets for kind in kinds] == [True, False, False]


def test_pictures_and_curves_of_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture with its size, as a PNG; arguments as hyperparameters beside the accuracy."""
    seen: list[Any] = []
    board = SimpleNamespace(
        add_text=lambda *_: None,
        add_scalar=lambda *values: seen.append(values),
        flush=lambda: seen.append("flush"),
        close=lambda: seen.append("close"),
        file_writer=SimpleNamespace(add_summary=lambda *values: seen.append(values)),
    )
    given: list[Any] = []
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda *_, **__: board)

    def hparams(*values: Any) -> str:
        given.append(values)
        return "abc"  # three summaries

    monkeypatch.setattr("torch.utils.tensorboard.summary.hparams", hparams)
    reporter = TensorBoard(run_of(tmp_path))
    values = {"lr": "none", "blr": 0.1, "text": "a b", "none": "none", "vaq": True}
    assert given == [(values, {"eval/acc": 0.0})] and seen == [("a",), ("b",), ("c",)]
    seen.clear()
    reporter.curves({"x": 0.5, "y": 2.0}, 3)
    reporter.picture("gates", PICTURE, 4)
    reporter.flush()
    reporter.close()
    first, second, (summary, step), *ends = seen
    assert (first, second, ends) == (("x", 0.5, 3), ("y", 2.0, 3), ["flush", "close"])
    (value,) = summary.value
    image = value.image
    assert (value.tag, step) == ("gates", 4)
    assert (image.height, image.width, image.colorspace) == (8, 16, 3)
    assert image.encoded_image_string == png(PICTURE)
