"""What stdout and stderr do not take ends no process, and goes to a file of the run's folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import base_environment, run_command
from vico.io import streams

PROGRAM = """
import os, sys
from pathlib import Path
from vico.io import streams
streams.guard()
streams.MAX_WAIT_SECONDS = 0.2
print("early")
print("early error", file=sys.stderr)
os.write(os.open("file", os.O_WRONLY | os.O_CREAT), b"untouched")
streams.keep_lost_output(Path("output.txt"))
print("x" * int(sys.argv[1]))
print("late")
"""
BROKEN_PIPE = 'exec 3> >(true); sleep 0.1; "$@" >&3 2>&3'
FULL = "could be written (No space left on device)\n"
UNREAD_PIPE = 'exec 3> >(sleep 3); "$@" >&3 2>&3'


@pytest.mark.parametrize(
    ("how", "size", "reason"),
    [
        ('"$@" >&- 2>&-', 9, "Broken pipe"),
        ('"$@" <&- >&- 2>&-', 9, "Broken pipe"),
        (BROKEN_PIPE, 9, "Broken pipe"),
        ('"$@" >/dev/full 2>/dev/full', 9, "No space left on device"),
        (UNREAD_PIPE, 100_000, "nobody reads it"),
    ],
)
def test_no_write_fails(tmp_path: Path, how: str, size: int, reason: str) -> None:
    python = [sys.executable, "-c", PROGRAM, str(size)]
    bash = ["bash", "-c", how, "bash", *python]
    subprocess.run(bash, cwd=tmp_path, env=base_environment(), check=True, timeout=60)
    assert (tmp_path / "file").read_text() == "untouched"  # not what was printed
    lost = (tmp_path / "output.txt").read_text()
    assert f"stdout takes no output ({reason}); it follows here\n" in lost
    assert lost.endswith("xx\nlate\n")
    if size == 9:
        assert "\nearly\n" in lost and "\nearly error\n" in lost
        assert f"stderr takes no output ({reason})" in lost


def test_only_regular_files_receive_it(tmp_path: Path) -> None:
    """A link or a FIFO in the run's folder gets nothing, and hangs nothing."""
    for make in (lambda path: path.symlink_to("target"), os.mkfifo):
        (tmp_path / "output.txt").unlink(missing_ok=True)
        make(tmp_path / "output.txt")
        bash = ["bash", "-c", '"$@" >&-', "bash", sys.executable, "-c", PROGRAM, "9"]
        subprocess.run(bash, cwd=tmp_path, env=base_environment(), check=True, timeout=60)
        assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("command", "how", "code", "says"),
    [
        ("plan --table", '"$@" | head -1; exit ${PIPESTATUS[0]}', 0, ""),
        ("plan --table", '"$@" >&-', 0, ""),
        ("plan --table", '"$@" >/dev/full', 6, FULL),
        ("train --help", '"$@" >/dev/full', 6, FULL),
    ],
)
def test_a_command_whose_output_is_its_result(command: str, how: str, code: int, says: str) -> None:
    """A reader that leaves wanted no more; a full disk is an error. Neither is a traceback."""
    vico = [sys.executable, "-m", "vico", *command.split()]
    run = run_command(["bash", "-c", how, "bash", *vico], seconds=60)
    assert run.codes == [code] and run.stderrs[0].endswith(says), run.output
    assert run.stderrs[0].count("\n") == bool(says)


def test_what_was_lost_before_there_was_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written as soon as there is one, once."""
    monkeypatch.setattr(streams, "_lost", streams._LostOutput())
    streams._lost.add(b"early\n")
    streams.keep_lost_output(tmp_path / "output.txt")
    assert (tmp_path / "output.txt").read_text() == "early\n"
    streams._lost.add(b"late\n")
    assert (tmp_path / "output.txt").read_text() == "early\nlate\n"
