"""What a long task shows: a bar on a terminal, lines elsewhere; and when a line is due."""

import io
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from vico.io import streams
from vico.train.progress_bar import ProgressBar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stands still, but for what is passed."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def numbers(lines: list[str]) -> list[int]:
    """Of items in lines like "scan: file 3/40  note  7 s left"."""
    return [int(line.split("/")[0].rpartition(" ")[2]) for line in lines]


def test_a_line_now_and_then(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """After 1 and 10 items of this start, then every 20 seconds, with what is left."""
    with ProgressBar("scan", 100, "file", shown=True, done=30) as bar:
        assert capsys.readouterr().out == "scan: 70 file(s) to do\n"
        for _ in range(25):
            clock(1.0)
            bar.advance("ok")
        lines = capsys.readouterr().out.splitlines()
        assert numbers(lines) == [31, 40]
        assert lines == [
            "scan: file 31/100  ok  1 min 9 s left",
            "scan: file 40/100  ok  1 min 0 s left",
        ]
        clock(4.0)
        bar.advance()
        assert capsys.readouterr().out == ""
        clock(1.0)
        bar.advance("last")
    assert capsys.readouterr().out == "scan: file 57/100  last  48 s left\n", "30 s for 27 items"


def test_another_rank_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("scan", 2, "file", shown=False) as bar:
        bar.advance()
        bar.advance()
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It begins where the run goes on, and is gone at the end; no lines."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with ProgressBar("scan", 9, "file", shown=True, done=4) as bar:
        drawn: Any = bar._bar
        assert (drawn.n, drawn.total, drawn.desc, drawn.unit) == (4, 9, "scan", "file")
        assert not drawn.leave
        bar.advance("first")
        bar.advance("second")
        assert (drawn.n, drawn.postfix) == (6, "second")
    assert drawn.disable, "closed"
    assert "scan" in terminal.getvalue() and capsys.readouterr().out == ""


def test_lines_where_the_terminal_is_gone(
    clock: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with ProgressBar("scan", 30, "file", shown=True) as bar:
        bar.advance()
        drawn: Any = bar._bar
        monkeypatch.setattr(streams, "is_lost", lambda stream: stream is sys.stderr)
        clock(25.0)
        bar.advance("on")
        assert bar._bar is None and drawn.disable and drawn.n == 1
    assert capsys.readouterr().out == "scan: file 2/30  on  5 min 50 s left\n"


@pytest.mark.parametrize(("shown", "every"), [(False, None), (True, 2)])
def test_a_terminal_without_a_bar(
    shown: bool,
    every: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of another rank, and where lines are asked for."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with ProgressBar("scan", 3, "file", shown=shown, every=every) as bar:
        for _ in range(3):
            bar.advance()
    assert terminal.getvalue() == ""
    lines = capsys.readouterr().out.splitlines()
    assert numbers(lines[1:]) == ([2] if shown else [])
