"""What lies in a folder is not trusted: pipes, links, and folders that may not be read."""

import ast
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import SHAPES, random_state
from support.errors import refusal
from support.plain_user import as_plain_user, folder_of_anyone
from support.processes import ROOT, Processes, start_command
from vico.checkpoint.format import WEIGHTS, TrainState
from vico.checkpoint.read import read
from vico.checkpoint.write import RunIdentity, save
from vico.cli.check_report import shared_dataset_warnings
from vico.data.datasets import read_questions
from vico.data.features import Features
from vico.data.readers import captions, tvqa
from vico.data.tokenizer import find_tokenizer
from vico.errors import CheckpointError, UserError
from vico.io import file_cache
from vico.io.atomic import write_text
from vico.io.output_dir import LOCK, OutputDir
from vico.io.paths import MAX_BYTES, append_text, entries, exists, is_folder, read_bytes
from vico.io.text import read_text
from vico.model.weights.load import open_weights, read_llama_config
from vico.train.config import RunConfig
from vico.train.preflight import open_backbone
from vico.train.rank_consistency import _input_files
from vico.train.reporters import Reported, TensorBoard
from vico.train.resume import find_start
from vico.train.run_log import RunLog, read_logs
from vico.train.saved_run import newest_usable

RUN = RunIdentity("", {}, {})


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """To open a pipe can take for ever."""
    signal.alarm(60)
    yield
    signal.alarm(0)


# Pipes, devices and links


def test_pipes_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output_dir = OutputDir(tmp_path)
    for path in (output_dir.steps, output_dir.epochs, output_dir.args, tmp_path / "a.pth"):
        os.mkfifo(path)
    assert "steps.jsonl: cannot be read (a device or a pipe" in refusal(read_logs, output_dir)
    assert "args.json cannot be read (a device or a pipe" in refusal(output_dir.read_args)
    assert "cannot be opened (a device or a pipe" in refusal(Features, tmp_path / "a.pth")
    with pytest.raises(OSError, match="a device or a pipe"):
        append_text(output_dir.steps, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "vico").mkdir()
    os.mkfifo(tmp_path / "vico" / "checked.json")
    cache = file_cache.FileCache()
    cache.put("a", 1)
    cache.flush()  # which replaces the pipe
    assert file_cache.FileCache().get("a") == 1


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_lock_that_is_no_file(tmp_path: Path, kind: str) -> None:
    lock, victim = tmp_path / "out" / LOCK, tmp_path / "victim"
    lock.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(victim)
    if kind == "link":
        victim.write_text("precious")
    message = refusal(OutputDir(lock.parent).claim)
    assert f"{lock}: is " in message and "; remove it, or choose another --output_dir" in message
    assert victim.exists() == (kind == "link")
    assert kind != "link" or victim.read_text() == "precious"


def test_a_lock_of_two_names_is_not_written(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).hardlink_to(victim)
    OutputDir(tmp_path / "out").claim()
    assert victim.read_text() == "precious"


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim, out = tmp_path / "victim", OutputDir(tmp_path / "out")
    victim.write_text("precious")
    out.path.mkdir()
    temporary = f".args.json.{os.getpid()}.vico-tmp"
    for name in ("steps.jsonl", "log.txt", "args.json", temporary):
        (out.path / name).symlink_to(victim)
    with pytest.raises(OSError, match="a symbolic link, not a file"):
        append_text(out.steps, "x")
    write_text(out.args, "x")
    log = RunLog(out, read_logs(out), 0)
    log.step({"step": 1}, {})
    log.close()
    assert log.error is None and victim.read_text() == "precious"
    assert not out.args.is_symlink() and not out.steps.is_symlink()


def test_curves_are_not_written_through_a_link(tmp_path: Path) -> None:
    out = OutputDir(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    out.path.mkdir()
    out.tensorboard.symlink_to(tmp_path / "elsewhere")
    message = refusal(TensorBoard, Reported(out, {}, "", 0))
    assert f"{out.tensorboard}: is a symbolic link" in message
    assert entries(tmp_path / "elsewhere") == []


# Files that are too large


def test_a_checkpoint_of_60_gb_is_passed_over(tmp_path: Path) -> None:
    """Sparse files: they take no room on the disk, and would take it all in memory."""
    output_dir = OutputDir(tmp_path)
    for step in (1, 2, 3):
        state = TrainState(step)
        save(output_dir.checkpoint(step), *random_state(SHAPES, step), state, RUN)
    os.truncate(output_dir.checkpoint(3) / WEIGHTS, 60 << 30)
    os.truncate(output_dir.checkpoint(2) / "state.json", 60 << 30)
    start = newest_usable(output_dir.step_checkpoints(), output_dir)
    assert start.checkpoint is not None and start.checkpoint.state.step == 1
    assert "64,424,509,440 bytes, where at most" in start.notes[0] + start.notes[1]


LEASE = """
import fcntl, os, signal, sys, time

def release(*_):
    time.sleep(0.3)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)

descriptor = os.open(sys.argv[1], os.O_RDWR)
signal.signal(signal.SIGIO, release)
fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("ready", flush=True)
time.sleep(100)
"""


def test_a_lease_is_waited_for(tmp_path: Path) -> None:
    """A file server takes one while a client has the file open; it gives it back when asked."""
    path = tmp_path / "log.txt"
    for use in (lambda: append_text(path, "line\n"), lambda: read_bytes(path)):
        path.write_text("")
        holder = start_command([sys.executable, "-c", LEASE, str(path)])
        try:
            if not holder.wait_until(functools.partial(_says_ready, holder), 30):
                pytest.skip(f"this file system has no leases: {holder.output[-200:]}")
            use()
        finally:
            holder.kill()


def _says_ready(run: Processes) -> bool:
    return "ready" in run.output


def test_a_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, MAX_BYTES + 1)
    assert "2,147,483,649 bytes, where at most 2,147,483,648" in refusal(read_text, path, "it")


# Names that a desktop or a network file system leaves behind


def test_hidden_files_in_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    save(folder, *random_state(SHAPES, 1), TrainState(1), RUN)
    for name in (".DS_Store", ".nfs0000000001", "._state.json"):
        (folder / name).write_text("x")
    assert read(folder).state.step == 1
    save(folder, *random_state(SHAPES, 2), TrainState(1), RUN)


def test_numbers_that_are_no_step(tmp_path: Path) -> None:
    for name in ("9" * 20, "9" * 200, "\u0663", "1", "10"):
        (tmp_path / f"checkpoint-{name}").mkdir()
    names = [folder.name for folder in OutputDir(tmp_path).step_checkpoints()]
    assert names == ["checkpoint-10", "checkpoint-1"]


def test_deep_brackets_in_a_log(tmp_path: Path) -> None:
    output_dir = OutputDir(tmp_path)
    output_dir.steps.write_text('{"step": 1}\n' + "[" * 100_000 + '\n{"step": 2}\n')
    assert [record["step"] for record in read_logs(output_dir).steps] == [1, 2]


# Folders that may not be read


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that its user may not enter, in one that is open."""
    with folder_of_anyone() as folder:
        closed = folder / "closed"
        (closed / "in").mkdir(parents=True)
        (closed / "in" / "a").touch()
        closed.chmod(0)
        yield closed


def config_in(folder: Path) -> RunConfig:
    return RunConfig(llama_model_path=folder, data_path=folder, output_dir=folder, resume=folder)


Call = Callable[[Path], Any]
CALLS: dict[str, Call] = {
    "exists": lambda folder: exists(folder / "in"),
    "is_folder": lambda folder: is_folder(folder / "in"),
    "entries": entries,
    "a file": lambda folder: read_text(folder / "in" / "a", "it"),
    "features": lambda folder: Features(folder / "a.pth"),
    "a table": lambda folder: read_questions("nextqa", folder, "val"),
    "star": lambda folder: read_questions("star", folder, "val"),
    "tvqa": lambda folder: tvqa.annotation_file(folder, "test"),
    "captions": lambda folder: captions.find(folder, None),
    "tokenizer": lambda folder: find_tokenizer(folder, folder / "in"),
    "weights": lambda folder: open_weights(folder, None),
    "config": read_llama_config,
    "a model": lambda folder: open_backbone(config_in(folder)),
    "a checkpoint": lambda folder: read(folder / "in"),
    "a run": lambda folder: OutputDir(folder).has_run(),
    "checkpoints": lambda folder: OutputDir(folder).step_checkpoints(),
    "a lock": lambda folder: OutputDir(folder).claim(),
    "logs": lambda folder: read_logs(OutputDir(folder)),
    "a start": lambda folder: find_start(config_in(folder)),
    "inputs": lambda folder: _input_files(config_in(folder)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_closed_folder_is_one_line(closed: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        as_plain_user(lambda: CALLS[name](closed))
    message = str(caught.value)
    assert str(closed) in message and "Permission denied" in message and message.isprintable()


def test_a_closed_folder_beside_a_mistyped_model(closed: Path) -> None:
    """The error is of the model that was asked for."""
    (closed.parent / "7B").mkdir()
    (closed.parent / "7B" / "params.json").touch()
    config = replace(config_in(closed.parent), model="7b")
    with pytest.raises(UserError) as caught:
        as_plain_user(lambda: open_backbone(config))
    assert "7b: no such folder of weights; --model can be 7B" in str(caught.value)


def test_a_closed_dataset_beside_the_own(closed: Path) -> None:
    closed.rename(closed.parent / "star")
    config = replace(config_in(closed.parent), dataset="nextqa")
    warnings = as_plain_user(lambda: list(shared_dataset_warnings(config, {})))
    assert warnings and all("star, " in line and "Permission denied" in line for line in warnings)


def test_a_closed_checkpoint_is_passed_over() -> None:
    with folder_of_anyone() as folder:
        output_dir = OutputDir(folder)
        for step in (1, 2):
            save(output_dir.checkpoint(step), *random_state(SHAPES, step), TrainState(step), RUN)
        for path in entries(output_dir.checkpoint(1)):
            path.chmod(0o644)
        output_dir.checkpoint(1).chmod(0o755)
        output_dir.checkpoint(2).chmod(0)
        start = as_plain_user(lambda: newest_usable(output_dir.step_checkpoints(), output_dir))
    assert start.checkpoint is not None and start.checkpoint.state.step == 1
    assert "checkpoint-2" in start.notes[0] and "Permission denied" in start.notes[0]


def test_a_closed_checkpoint_is_a_checkpoint_error(closed: Path) -> None:
    with pytest.raises(CheckpointError):
        as_plain_user(lambda: read(closed / "in"))


def test_as_plain_user_is_bound_by_permissions(closed: Path) -> None:
    """The tests above are worth something: the call cannot read, whoever runs the suite."""
    with pytest.raises(PermissionError):
        as_plain_user(lambda: os.listdir(closed))
    assert as_plain_user(lambda: torch.zeros(1).item()) == 0.0
    assert read_bytes(Path(__file__))


# The mechanism

LOOKS = {"exists", "is_dir", "is_file", "iterdir", "glob", "rglob", "isdir", "isfile", "open"}
READS = {"read_text", "read_bytes", "write_text", "write_bytes", "safe_open"}
# What ViCo has just written, its own code, a file of the kernel, a call inside a `try`, and one
# that must not raise.
OWN = {
    "cli/evaluate.py",
    "cli/demo_dataset.py",
    "cli/demo_llama.py",
    "cli/selftest.py",
    "distributed/topology.py",
    "model/weights/convert.py",
    "planner/estimate.py",
    "train/ds_config.py",
    "train/rank_consistency.py",
}


def test_an_error_names_its_path_and_leaves_nothing_open(tmp_path: Path) -> None:
    """It named the number of a descriptor, which stayed open."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(IsADirectoryError) as caught:
        read_bytes(tmp_path)
    assert (caught.value.filename, caught.value.strerror) == (str(tmp_path), "Is a directory")
    assert os.listdir("/proc/self/fd") == before


def test_paths_are_looked_at_and_opened_in_one_place() -> None:
    """Outside of vico/io, no method of Path and no os.path: they raise or hide PermissionError."""
    for path in sorted((ROOT / "vico").rglob("*.py")):
        name = str(path.relative_to(ROOT / "vico"))
        if name.startswith("io/") or name in OWN:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if ast.unparse(node.func) == "av.open":
                    continue  # FFmpeg opens its own; paths are looked at before
                place = f"{name}:{node.lineno}: use vico/io/paths.py"
                assert node.func.attr not in LOOKS | READS, place
