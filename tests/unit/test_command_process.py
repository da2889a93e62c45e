"""What a command does around its work: who prints an error and who waits, limits, flag values."""

import argparse
import resource
import socket
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from support.errors import refusal
from vico.cli import ablate, main, with_world
from vico.cli.ablate import Condition
from vico.cli.ask import one_question
from vico.cli.parser import bounded_float, frame_rate, positive_float, positive_int
from vico.cli.with_world import (
    SECONDS_FOR_RANK_0,
    SECONDS_FOR_REPORT,
    report_error,
)
from vico.data.types import Question
from vico.errors import (
    CheckpointError,
    PeerLostError,
    StartFailedError,
    UnreachableError,
    UserError,
)

# Errors of several ranks

RANKS = {
    "rank 0": {"RANK": "0", "LOCAL_RANK": "0"},
    "its neighbour": {"RANK": "1", "LOCAL_RANK": "1"},
    "first of a host": {"RANK": "2", "LOCAL_RANK": "0"},
    "last": {"RANK": "3", "LOCAL_RANK": "1"},
}
SAID = "vico: error: bad\n"


class Reported:
    """What `report_error` has slept for and told the other ranks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.slept: list[float] = []
        self.announced: list[str] = []
        self.is_known = True  # rank 0 will print what is announced
        self._monkeypatch, self._capfd = monkeypatch, capfd
        monkeypatch.setattr(with_world.time, "sleep", self.slept.append)
        monkeypatch.setattr(with_world.signals, "restore_default_handlers", lambda: None)
        monkeypatch.setattr(with_world, "_announce", self._announce)

    def _announce(self, error: UserError) -> bool:
        self.announced.append(str(error))
        return self.is_known

    def by(self, rank: str, error: UserError, **options: bool) -> tuple[str, list[float], int]:
        """(what stands on stderr, the waits, the exit code)."""
        self.slept.clear()
        self.announced.clear()
        variables = {**RANKS[rank], "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
        variables |= {"MASTER_ADDR": "far", "MASTER_PORT": "29500"}
        for name, value in variables.items():
            self._monkeypatch.setenv(name, value)
        code = report_error(error, **{"debug": False, **options})
        return self._capfd.readouterr().err, [s for s in self.slept if s], code


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Reported:
    return Reported(monkeypatch, capfd)


def test_an_error_of_all_ranks_is_rank_0s(reported: Reported) -> None:
    """The others stay until it has printed: their launcher ends all when the first has ended."""
    error = CheckpointError("bad")
    error.of_all_ranks = True
    for announces in (False, True):
        assert reported.by("rank 0", error, announces=announces) == (SAID, [], 3)
        for rank in ("its neighbour", "first of a host", "last"):
            assert reported.by(rank, error, announces=announces) == ("", [SECONDS_FOR_RANK_0], 3)
    assert not reported.announced


def test_an_error_of_one_rank_is_said_once_per_host(reported: Reported) -> None:
    error = UserError("bad", [("a", "b")])
    for rank in ("rank 0", "first of a host"):
        assert reported.by(rank, error) == (f"{SAID}  a  b\n", [], 2)
    for rank in ("its neighbour", "last"):
        assert reported.by(rank, error) == ("", [SECONDS_FOR_RANK_0], 2)


def test_ranks_that_wait_at_the_rendezvous_are_told(reported: Reported) -> None:
    """Rank 0 prints it then; where it will not, the rank does so itself."""
    error = UserError("bad")
    assert reported.by("rank 0", error, announces=True) == (SAID, [], 2)
    assert reported.announced == ["bad"]
    assert reported.by("last", error, announces=True) == ("", [SECONDS_FOR_REPORT], 2)
    reported.is_known = False
    for rank in ("last", "first of a host"):
        assert reported.by(rank, error, announces=True) == (SAID, [SECONDS_FOR_REPORT], 2)
        assert reported.announced == ["bad"]
    for unreachable in (UnreachableError("bad"), PeerLostError("bad")):
        waits = [SECONDS_FOR_RANK_0]
        assert reported.by("last", unreachable, announces=True)[:2] == ("", waits)
        assert not reported.announced


def test_what_another_rank_has_announced(reported: Reported) -> None:
    """By rank 0, and by the first rank of each host but that of the failed rank."""
    far, here = (StartFailedError("bad", host, 3) for host in ("far", socket.gethostname()))
    assert reported.by("rank 0", far) == reported.by("rank 0", here) == (SAID, [], 3)
    assert reported.by("first of a host", far) == (SAID, [], 3)
    assert reported.by("first of a host", here) == ("", [SECONDS_FOR_REPORT], 3)
    for error in (far, here):
        assert reported.by("last", error) == ("", [SECONDS_FOR_REPORT], 3)


def test_debug_shows_where_an_error_was_raised(reported: Reported) -> None:
    said, _, code = reported.by("rank 0", UserError("bad"), debug=True)
    assert said.endswith(f"UserError: bad\n{SAID}") and code == 2
    assert (SECONDS_FOR_RANK_0, SECONDS_FOR_REPORT) == (10.0, 2.0)


# Limits of the process


@pytest.mark.parametrize(
    ("soft", "hard", "set_to"),
    [
        (1024, 4096, None),
        (256, 4096, 1024),
        (256, 512, 512),
        (512, 512, None),
        (128, 128, None),
        (100, 128, 128),
        (256, resource.RLIM_INFINITY, 1024),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
    ],
)
def test_open_files(
    soft: int, hard: int, set_to: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as a run of many ranks needs, where the limit can be raised to that."""
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(main.resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(main.resource, "setrlimit", lambda kind, both: limits.append(both))
    main.require_descriptors()
    assert limits == ([] if set_to is None else [(set_to, hard)])


def test_too_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.resource, "getrlimit", lambda kind: (127, 127))
    assert refusal(main.require_descriptors) == (
        "this process may open 127 files at a time, and needs 128 at least; start it with a higher "
        "limit (ulimit -n 1024)"
    )


# Values of flags


def refused(convert: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        convert(*arguments)
    return str(caught.value)


def test_bounds_of_numbers() -> None:
    """Both ends belong to them."""
    assert [bounded_float(text, 0, 2) for text in ("0", "2", "1e-9")] == [0.0, 2.0, 1e-9]
    for text in ("-0.1", "2.1", "nan", "inf"):
        assert refused(bounded_float, text, 0, 2) == f"{text} must be 0 to 2"
    assert refused(bounded_float, "1,5", 0) == "'1,5' is not a number"
    assert (bounded_float("1e15", 0), positive_float("0.001")) == (1e15, 0.001)
    assert refused(positive_float, "0.0009") == "0.0009 must be 0.001 to 1e+15"
    assert [positive_int(text) for text in ("1", "2.0", "1e9")] == [1, 2, 10**9]
    assert refused(positive_int, "0") == "0 must be 1 to 1e+09"
    assert refused(positive_int, "1.5") == "1.5 must be a whole number"
    assert [frame_rate(text) for text in ("0.001", "1000", "30/1001", "0.5")] == [
        Fraction(1, 1000),
        Fraction(1000),
        Fraction(30, 1001),
        Fraction(1, 2),
    ]
    for text in ("0.0009", "1000.1", "0", "-1"):
        assert refused(frame_rate, text) == f"{text} must be 1/1000 to 1000"
    for text in ("x", "1/0", "1:2"):
        assert refused(frame_rate, text) == f"'{text}' is no rate as 1, 0.5 or 30/1001"


def test_a_question_of_the_command_line() -> None:
    asked = one_question("why?", ("a", "b"), "v.mp4")
    assert (asked.video, asked.question, asked.options) == ("v.mp4", "why?", ("a", "b"))
    assert (asked.index, asked.qid, asked.answer, asked.place) == (0, "0", None, "the question")
    assert one_question("why?", (), "v").options == ()
    letters = tuple("abcdefghijklmnopqrstuvwxyz")
    assert one_question("why?", letters, "v").options == letters
    for options in (("a",), (*letters, "A")):
        assert refusal(one_question, "why?", options, "v") == (
            f"--options: {len(options)} options, not 2 to 26; put each into quotes"
        )
    assert refusal(one_question, "why?", ("a", "b", "b", "a"), "v") == (
        "--options: 'b' is there twice; each option needs a text of its own"
    )
    for question, options in ((" ", ("a", "b")), ("why?", ("a", ""))):
        message = refusal(one_question, question, options, "v")
        assert message.endswith("; write it as a text in quotes")


# vico ablate


def test_a_table_of_conditions() -> None:
    """Each beside the first, question by question; intervals of Wilson."""
    trained = Condition("trained", "trained", [True, True, True, False], 0.5)
    blind = Condition("blind", "x" * 40, [True, False, False, False], 1.5)
    run = Condition("run", "run\n", [True, True, True, True])
    plain = {"index": 0, "qid": "0", "video": "v", "type": "C", "question": "w", "answer": 0}
    questions = [Question(**plain, options=tuple("abcde"[:n])) for n in (2, 4, 4, 5)]
    result = ablate._result("val", questions, [trained, blind], [run])
    assert (result["split"], result["n"]) == ("val", 4)
    assert result["chance"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 4 + 1 / 5) / 4)
    assert list(result["runs"]) == ["run"]
    rows = {**result["conditions"], **result["runs"]}
    assert [row["acc"] for row in rows.values()] == [0.75, 0.25, 1.0]
    assert [row.get("loss") for row in rows.values()] == [0.5, 1.5, None]
    assert [row["difference"] for row in rows.values()] == [0.0, -0.5, 0.25]
    # Of the two that differ both are worse; of the one, it is better: 2 / 2**2 and 2 / 2**1.
    assert [row["p_value"] for row in rows.values()] == pytest.approx([1.0, 0.5, 1.0])
    lines = ablate._table(result, [trained, blind], [run]).splitlines()
    assert lines[0] == "val accuracy of 4 questions (chance: 30.00%):"
    assert lines[1].split() == ["accuracy", "95", "%", "difference", "p"]
    assert lines[2].split() == ["trained", "75.00%", "30.1%", "to", "95.4%"]
    assert lines[3].split() == ["x" * 31, "25.00%", "4.6%", "to", "69.9%", "-50.00%", "0.5"]
    assert lines[4].split()[:2] == ["run\\n", "100.00%"]
    assert lines[4].split()[-2:] == ["+25.00%", "1"]
    assert len({line.index("%") for line in lines[2:]}) == 1, "in columns"
