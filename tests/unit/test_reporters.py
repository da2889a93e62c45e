"""Where curves go: real files of each reporter, resumed runs, and reporters that fail."""

import io
import json
import math
import sqlite3
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.errors import refusal
from vico.io.output_dir import OutputDir
from vico.train import reporters
from vico.train.config import REPORTERS, RunConfig
from vico.train.evaluate import Evaluation
from vico.train.heat_map import CELL, gate_curves, gate_record, gates_picture, png
from vico.train.log_records import EpochResult, epoch_curves, log_step
from vico.train.reporters import Reported, Reporters, chosen
from vico.train.run_log import RunLog, read_logs
from vico.train.step import StepReport

ARGS = {"lr": None, "blr": 0.1, "dataset": "nextqa", "vaq": True}
RUN_ID = "0123456789abcdef"


def weights(num_layers: int = 3, num_heads: int = 4) -> dict[str, torch.Tensor]:
    gates: dict[str, torch.Tensor] = {}
    for layer in range(num_layers):
        for kind in ("gate1", "gate2"):
            value = torch.full((1, num_heads, 1, 1), float(layer))
            gates[f"layers.{layer}.attention.{kind}"] = value
    return gates


def a_step(loss: float) -> StepReport:
    """The report of a step of one target, of which only losses and counts are read here."""
    report: Any = SimpleNamespace(
        task_losses=lambda: [loss], target_counts=[1], grad_norm=0.5, num_real_tokens=10
    )
    return report


def log_run(out: OutputDir, names: list[str], start: int, stop: int, logging_steps: int = 1) -> int:
    """A start from the checkpoint of `start`, four steps an epoch, that is killed after `stop`.

    Returns the number of reporters that are still open.
    """
    config = RunConfig(cap=0, logging_steps=logging_steps)
    opened: list[Reporters] = []

    def open_reporters(last_step: int) -> Reporters:
        opened.append(Reporters(names, Reported(out, ARGS, RUN_ID, start), last_step))
        return opened[-1]

    log = RunLog(out, read_logs(out), start, open_reporters=open_reporters)
    for step in range(start + 1, stop + 1):
        log_step(log, config, step, 4, a_step(float(step)), lr=0.1, seconds=1.0)
        if step % 4 == 0:
            log.epoch({"step": step}, {"eval/loss": float(step)}, gates_picture(weights()))
            log.saved(step, 0.1)
    log.close()
    assert log.error is None
    return len(opened[0]._open)


def board_of(out: OutputDir) -> EventAccumulator:
    board = EventAccumulator(str(out.tensorboard))
    board.Reload()
    return board


def test_tensorboard(tmp_path: Path) -> None:
    """Curves with Hugging Face's names, arguments as text and hyperparameters, gates as images."""
    out = OutputDir(tmp_path)
    assert log_run(out, ["tensorboard"], 0, 8) == 1
    board = board_of(out)
    values = [(event.step, event.value) for event in board.Scalars("train/epoch")]
    assert values == [(step, step / 4) for step in range(1, 9)]
    assert {"train/loss", "train/learning_rate", "train/grad_norm"} <= set(board.Tags()["scalars"])
    assert [event.value for event in board.Scalars("eval/loss")] == [4.0, 8.0]
    (text,) = board.Tensors("args/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert json.loads(shown.removeprefix("```json").removesuffix("```")) == ARGS
    plugin = board.summary_metadata["_hparams_/session_start_info"].plugin_data
    assert plugin.plugin_name == "hparams" and b"nextqa" in plugin.content
    assert [image.step for image in board.Images("gates")] == [4, 8]
    assert not any(tag.startswith("gates/") for tag in board.Tags()["scalars"])


def test_gates_picture() -> None:
    """A row per layer, two panels of heads, and a PNG that others read."""
    picture = gates_picture(weights())
    assert picture is not None and picture.shape == (3 * CELL, (4 + 1 + 4) * CELL, 3)
    assert (picture[0, 0] == 255).all(), "0 is white"
    assert picture[-1, 0, 0] > picture[-1, 0, 2], "positive is red"
    assert (picture[CELL, 0] != picture[-1, 0]).any() and (
        picture[CELL, 0] == picture[CELL, 9]
    ).all()
    negative = {name: -gate for name, gate in weights().items()}
    blue = gates_picture(negative)
    assert blue is not None and blue[-1, 0, 2] > blue[-1, 0, 0]
    read = np.asarray(Image.open(io.BytesIO(png(picture))))
    assert (read == picture).all()
    assert gates_picture({"visual_proj.weight": torch.zeros(2, 2)}) is None


def test_gates_as_numbers() -> None:
    """By the layer's own number where only some are adapted; a curve is the mean over heads."""
    gates = {}
    for layer in (2, 10):
        gates[f"layers.{layer}.attention.gate1"] = torch.tensor([0.5, -0.5]).view(1, 2, 1, 1)
        gates[f"layers.{layer}.attention.gate2"] = torch.tensor([-3.0, 1.0]).view(1, 2, 1, 1)
    heads = {"gate1": [0.4621, -0.4621], "gate2": [-3.0, 1.0]}
    assert gate_record(gates) == {k: {"2": v, "10": v} for k, v in heads.items()}
    assert list(gate_record(gates)["gate1"]) == ["2", "10"]
    curves = {"gates/gate1/layer_02": math.tanh(0.5), "gates/gate2/layer_10": -1.0}
    assert gate_curves(gates) == pytest.approx(
        curves | {"gates/gate1/layer_10": math.tanh(0.5), "gates/gate2/layer_02": -1.0}
    )


def test_colours_of_gates() -> None:
    """White at 0, half way at a half, red or blue at the end of the scale and beyond."""
    shares = {-9.0: 1.0, -6.0: 1.0, -3.0: 0.5, 0.0: 0.0, 1.5: 0.25, 6.0: 1.0, 12.0: 1.0}
    gate2 = torch.tensor(list(shares)).view(1, -1, 1, 1)
    gates = {"layers.0.attention.gate1": torch.zeros(1, len(shares), 1, 1)}
    picture = gates_picture(gates | {"layers.0.attention.gate2": gate2})
    assert picture is not None
    cells = picture[0, ::CELL][len(shares) + 1 :].tolist()
    ends = {True: (178, 24, 43), False: (33, 102, 172)}  # red, blue
    for cell, (value, share) in zip(cells, shares.items(), strict=True):
        assert cell == [round(255 + share * (end - 255)) for end in ends[value > 0]], value
    tenth = {name: torch.full_like(gate, 0.1) for name, gate in gates.items()}
    shown = gates_picture(tenth | {"layers.0.attention.gate2": gate2})
    assert shown is not None and shown[0, 0].tolist() == [247, 232, 234], "tanh of gate1"


@pytest.mark.parametrize("reporter", [reporters.WeightsAndBiases, reporters.Trackio])
def test_curves_and_pictures_are_sent(reporter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb wants Pillow for pictures, and does not bring it."""
    sent: list[tuple[int, Any]] = []
    board = reporter.__new__(reporter)
    board._image = lambda picture: picture.shape
    board._run = SimpleNamespace(log=lambda values, step: sent.append((step, values)))
    board.curves({"train/loss": 0.5}, 2)
    board.picture("gates", np.zeros((8, 16, 3), np.uint8), 3)
    assert sent == [(2, {"train/loss": 0.5}), (3, {"gates": (8, 16, 3)})]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    board.picture("gates", np.zeros((8, 16, 3), np.uint8), 4)
    assert len(sent) == (2 if reporter is reporters.WeightsAndBiases else 3)


def test_logging_steps(tmp_path: Path) -> None:
    """A point every N steps; every step in steps.jsonl."""
    out = OutputDir(tmp_path)
    log_run(out, ["tensorboard"], 0, 7, logging_steps=3)
    assert [event.step for event in board_of(out).Scalars("train/loss")] == [3, 6]
    assert len(read_logs(out).steps) == 7


def test_no_step_twice_in_tensorboard(tmp_path: Path) -> None:
    out = OutputDir(tmp_path)
    log_run(out, ["tensorboard"], 0, 6)
    time.sleep(1.1)  # files are read in the order of their names, which hold the second
    log_run(out, ["tensorboard"], 4, 8)
    board = board_of(out)
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in board.Scalars("eval/loss")] == [4, 8]


@pytest.mark.slow
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data base holds the curves of a run and of its resumption, no step twice."""
    import trackio
    from trackio import sqlite_storage, utils

    for module in (trackio, sqlite_storage, utils):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    out = OutputDir(tmp_path / "out")
    out.path.mkdir()
    assert log_run(out, ["trackio"], 0, 6) == 1
    assert log_run(out, ["trackio"], 4, 8) == 1
    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {"out-01234567"}
    steps = [step for _, step, metrics in rows if "train/loss" in json.loads(metrics)]
    assert steps == list(range(1, 9))
    assert sum("eval/loss" in json.loads(metrics) for _, _, metrics in rows) == 2
    assert sum("trackio.image" in str(metrics) for _, _, metrics in rows) == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", None])
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None) -> None:
    """Offline, by WANDB_MODE or because nobody is logged in; a resumed run has the same id."""
    import wandb

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    out = OutputDir(tmp_path / "out")
    out.path.mkdir()
    assert log_run(out, ["wandb"], 0, 6) == 1
    assert log_run(out, ["wandb"], 4, 8) == 1
    wandb.teardown()  # as at the end of a process: its files are whole
    steps = []
    for path in sorted(out.path.glob(f"wandb/offline-run-*/run-{RUN_ID}.wandb")):
        steps += wandb_steps(path)
    assert steps == list(range(1, 9))


def wandb_steps(path: Path) -> list[int]:
    """The steps of a run file that have a training loss."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps = []
    for data in wandb_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        if "train/loss" in items:
            steps.append(int(items["_step"]))
    return steps


def wandb_records(content: bytes) -> list[bytes]:
    """LevelDB's log format: blocks of 32 KiB with pieces of records, and 7 bytes at the start."""
    place, records, pieces = 7, [], b""
    while place + 7 <= len(content):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)
        pieces += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the whole record, or its last piece
            records.append(pieces)
            pieces = b""
    return records


class Broken:
    """A reporter that fails at its second step."""

    forgets = True

    def __init__(self, run: Reported) -> None:
        self.num_steps = 0

    def curves(self, values: dict[str, float], step: int) -> None:
        self.num_steps += 1
        if self.num_steps == 2:
            raise ConnectionError("no route to host\nretry")


def test_failing_reporter_is_said_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(reporters._OPEN, "wandb", Broken)
    assert log_run(OutputDir(tmp_path), ["wandb", "tensorboard"], 0, 5) == 1
    assert capsys.readouterr().err == (
        "vico: --report_to wandb: no route to host\\nretry; the run goes on without it\n"
    )
    assert len(board_of(OutputDir(tmp_path)).Scalars("train/loss")) == 5


def test_tensorboard_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = OutputDir(tmp_path)
    out.tensorboard.write_text("a file")
    assert log_run(out, ["tensorboard"], 0, 5) == 0
    assert "vico: --report_to tensorboard: " in capsys.readouterr().err
    assert len(read_logs(out).steps) == 5


def test_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("none") == [] and chosen("tensorboard, tensorboard") == ["tensorboard"]
    assert chosen("all") == list(REPORTERS), "all of the extra 'dev'"
    absent = {"wandb"}

    def find_spec(name: str) -> object:
        return None if name in absent else object()

    monkeypatch.setattr(reporters.importlib.util, "find_spec", find_spec)
    assert chosen("all") == ["tensorboard", "trackio"]
    message = refusal(chosen, "trackio,wandb")
    assert message.startswith("--report_to wandb: the package is not installed; run pip install")
    assert ".[wandb]" in message
    for bad in ("", "mlflow", "none,wandb", "all,wandb", "wandb;trackio"):
        assert refusal(RunConfig, report_to=bad) == (
            f"--report_to {bad}: must be none, all, or some of tensorboard, wandb, trackio"
        )


def test_evaluation_loss() -> None:
    """The mean score of the right options, of the questions that have an answer."""
    questions: Any = [SimpleNamespace(answer=1), SimpleNamespace(answer=None)]
    evaluation = Evaluation(questions, [[9.0, 0.75], [5.0, 5.0]], {"acc": 0.5}, {})
    assert Evaluation(questions[1:], [[5.0, 5.0]], {}, {}).loss is None
    result = EpochResult(0, 4, 0.1, [1.0], 0, "val", evaluation, 2.0, False)
    curves = epoch_curves(result, torch.device("cpu"))
    assert curves["eval/loss"] == 0.75 and curves["eval/acc"] == 0.5
    assert curves["perf/eval_questions_per_second"] == 1.0
