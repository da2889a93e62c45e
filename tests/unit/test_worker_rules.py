"""How data workers are set up and sent to, without starting one; and data sets that are written."""

import errno
import json
import os
import pickle
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.annotation_files import csv_row, csv_text, put
from support.errors import refusal
from support.letters import ask
from vico.data import convert, dataloader
from vico.data.batching import Step
from vico.data.datasets import Dataset, read_questions
from vico.data.evaluation_batches import Chunk
from vico.distributed import signals

# ---- the loader ---------------------------------------------------------------------------------


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many locks room was asked for; no server is started."""
    asked: list[int] = []
    monkeypatch.setattr(dataloader, "start_forkserver", lambda: asked.append(0))
    monkeypatch.setattr(dataloader, "_require_room_for_locks", asked.append)
    return asked


def loader(*given: Any) -> Any:
    dataset: Any = ["a", "b", "c"]
    return dataloader.loader(dataset, [2, 0], *given)


def test_a_rank_prepares_its_own_batches(locks: list[int]) -> None:
    """In the order of the items, one a time as they are; without any worker."""
    made = loader(0, False, True)
    assert list(made) == ["c", "a"] and locks == []
    assert (made.num_workers, made.prefetch_factor, made.persistent_workers) == (0, None, False)
    assert made.multiprocessing_context is None and made.batch_size is None
    assert not made.pin_memory and loader(0, True).pin_memory


@pytest.mark.parametrize(("num_workers", "num_locks"), [(1, 15), (2, 18)])
def test_workers_prepare_four_each(locks: list[int], num_workers: int, num_locks: int) -> None:
    """They stay for the next pass where that is asked for."""
    made = loader(num_workers, False)
    assert locks == [0, num_locks], "the server is started first"
    assert (made.num_workers, made.prefetch_factor, made.persistent_workers) == (
        num_workers,
        4,
        False,
    )
    assert loader(num_workers, False, True).persistent_workers
    assert made.worker_init_fn is dataloader._init_worker
    assert made.multiprocessing_context.Process is dataloader._Worker


@pytest.mark.parametrize("room", [4, 5])
def test_room_for_locks(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """All are made before the loader makes some of them."""
    made: list[object] = []

    def lock() -> object:
        if len(made) == room:
            raise OSError(errno.ENOSPC, "No space left on device")
        made.append(object())
        return made[-1]

    context = SimpleNamespace(Lock=lock)
    monkeypatch.setattr(dataloader.multiprocessing, "get_context", lambda kind: context)
    if room == 5:
        dataloader._require_room_for_locks(5)
        return
    with pytest.raises(OSError) as caught:
        dataloader._require_room_for_locks(5)
    problem = caught.value
    assert (problem.errno, problem.strerror, problem.filename) == (
        errno.ENOSPC,
        "No space left on device",
        "/dev/shm",
    )


# ---- the server ---------------------------------------------------------------------------------


def test_the_server_is_started_with_signals_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Again after the resource tracker, which unblocks two. Warnings of it are not shown."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    seen: list[Any] = []

    def look(unblock: bool) -> None:
        seen.append(set(signals.BLOCKED) <= signal.pthread_sigmask(signal.SIG_BLOCK, []))
        if unblock:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])

    monkeypatch.setattr(dataloader.resource_tracker, "ensure_running", lambda: look(True))
    monkeypatch.setattr(dataloader.forkserver, "ensure_running", lambda: look(False))
    monkeypatch.setattr(dataloader.multiprocessing, "set_forkserver_preload", seen.append)
    for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
        monkeypatch.setenv(name, "")
    ignored = "ignore:resource_tracker"
    for given, expected in (("", ignored), ("error", f"error,{ignored}")):
        monkeypatch.setenv("PYTHONWARNINGS", given)
        for _ in range(2):
            seen.clear()
            dataloader.start_forkserver()
            assert os.environ["PYTHONWARNINGS"] == expected, "once"
            assert seen == [dataloader.PRELOADED, True, True]
            assert os.environ["PYTHONSAFEPATH"] == "1"
            assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.parametrize(("num_bytes", "chosen"), [(75, []), (76, ["/tmp"])])
def test_where_sockets_lie(
    monkeypatch: pytest.MonkeyPatch, num_bytes: int, chosen: list[str]
) -> None:
    """A name has 107 bytes at most, of which 32 are multiprocessing's."""
    folders: list[Any] = []
    usual = "/" + "\u00e9" * 30 + "x" * (num_bytes - 61)
    monkeypatch.setattr(tempfile, "tempdir", usual)
    monkeypatch.setattr(dataloader.util, "get_temp_dir", lambda: folders.append(tempfile.tempdir))
    dataloader._choose_socket_folder()
    assert folders == chosen and tempfile.tempdir == usual


def test_a_lost_rank_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a worker that it was starting. Other errors are shown."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    sys.modules.pop("vico.data.forkserver_preload", None)
    from vico.data import forkserver_preload

    for problem in (EOFError(), pickle.UnpicklingError("half"), ConnectionResetError()):
        forkserver_preload._silence_lost_rank(type(problem), problem, None)
    assert capsys.readouterr().err == ""
    forkserver_preload._silence_lost_rank(ValueError, ValueError("a bug"), None)
    assert capsys.readouterr().err.strip() == "ValueError: a bug"
    assert sys.excepthook is forkserver_preload._silence_lost_rank


# ---- what is sent -------------------------------------------------------------------------------


def test_a_step_is_sent_as_one_tensor() -> None:
    """With what it holds, in memory of the receiver's own."""
    step = Step((), None, torch.tensor([3, 4]), 7, ("a/b",))
    for item in (step, Chunk((1, 2), None)):
        restore, (piece,) = dataloader._reduce_to_one_tensor(item)
        assert piece.dtype == torch.uint8 and piece.ndim == 1
        received = restore(piece)
        assert type(received) is type(item)
        if isinstance(received, Step):
            assert received.target_counts.tolist() == [3, 4] and received.names == ("a/b",)
            piece.zero_()
            assert received.target_counts.tolist() == [3, 4]


def test_a_worker_ends_with_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were killed, with 128 + 9; with 1 where it cannot send."""
    ended: list[Any] = []
    rank = SimpleNamespace(join=lambda: ended.append("joined"))
    monkeypatch.setattr(dataloader.multiprocessing, "parent_process", lambda: rank)
    monkeypatch.setattr(os, "_exit", ended.append)
    dataloader._end_with_rank()
    dataloader._exit_on_send_error(OSError(), None)
    assert ended == ["joined", 137, 1]


# ---- data sets that are written -----------------------------------------------------------------


def test_lines_of_the_general_schema() -> None:
    """What a question lacks is left out; letters stay as they are."""
    bare = replace(ask(0, "Warum \u00e9?"), type="(unknown)", answer=None)
    full = replace(ask(1, dialogue=" hi"), feature_rows=(3, 12), caption="a dog")
    first, second = convert._lines([bare, full], 3.0)
    assert first == (
        '{"id": "q0", "video": "v0", "question": "Warum \u00e9?", "options": ["x", "y"], '
        '"answer": null}\n'
    )
    assert json.loads(second) == {
        "id": "q1",
        "video": "v1",
        "question": "why",
        "options": ["x", "y"],
        "answer": 1,
        "type": "CW",
        "start": 1,
        "end": 3,
        "dialogue": " hi",
        "caption": "a dog",
    }
    silent = next(iter(convert._lines([replace(full, feature_rows=None, dialogue="")], 3.0)))
    assert json.loads(silent).keys() == json.loads(second).keys() - {"start", "end", "dialogue"}


def test_descriptions_of_data_sets() -> None:
    usual = Dataset(Path, list)
    lines = 'frames_per_second: 1.5\nanswer: "index"\ndialogue: false\n'
    assert convert._description(usual, 1.5) == lines
    grouped = replace(usual, groups={"b": "x", "a": "y", "c": "x"}, mean_of=("x", "y"))
    groups = 'groups: {"x": ["b", "c"], "y": ["a"]}\nmean_of: ["x", "y"]\n'
    assert convert._description(grouped, 1.5) == lines + groups


def test_where_a_data_set_is_written(tmp_path: Path) -> None:
    """Into a folder that need not be there, or is empty; over no file."""
    put(tmp_path / "nextqa" / "val.csv", csv_text([csv_row(), csv_row(qid="2")]))
    source = tmp_path / "nextqa"
    for target in (tmp_path / "new" / "below", tmp_path / "empty"):
        if target.name == "empty":
            target.mkdir()
        lines = convert.convert("nextqa", source, target, ["val"], False)
        assert lines == [f"{target / 'val.jsonl'}: 2 questions of nextqa, val"]
        assert len(read_questions(target.name, target, "val")) == 2
        said = refusal(convert.convert, "nextqa", source, target, ["val"], False)
        end = "already exists; name another --output, or remove it"
        assert said == f"{target / 'dataset.yaml'}: {end}"
        (target / "dataset.yaml").unlink()
        said = refusal(convert.convert, "nextqa", source, target, ["val"], False)
        assert said == f"{target / 'val.jsonl'}: {end}"


def test_a_question_that_the_schema_changes() -> None:
    """Its place and its data set are no part of it."""
    before = replace(ask(0), place="x.csv:2")
    convert._compare([before], [replace(before, place="", dataset="")], Path("val.jsonl"))
    for other in (replace(before, qid="7"), replace(before, feature_rows=(1, 2))):
        assert refusal(convert._compare, [before], [other], Path("val.jsonl")) == (
            "x.csv:2: the schema cannot hold this question (val.jsonl reads otherwise); a clip "
            "must begin and end with whole seconds of features"
        )
