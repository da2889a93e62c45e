"""What the scripts of launch/examples share: their help, and the commands beside them."""

import signal
import subprocess
from pathlib import Path

import pytest

from support.processes import ROOT, base_environment

EXAMPLES = sorted(
    path for path in (ROOT / "launch" / "examples").glob("*.sh") if path.name != "example.sh"
)
SCRIPTS = [*EXAMPLES, ROOT / "launch" / "quickstart.sh", ROOT / "launch" / "sweep.sh"]
SHARED = f"source '{ROOT}/launch/common.sh'; source '{ROOT}/launch/examples/example.sh'"
# A command beside a script, which starts another one; neither ends by itself. Both hold stdout.
BESIDE = """
set -euo pipefail
SHARED
work() { sleep 60 & echo started; wait; }
beside work
sleep 0.5
""".replace("SHARED", SHARED)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_the_comment_at_the_head(script: Path, flag: str, tmp_path: Path) -> None:
    """It needs no Python, and does nothing."""
    environment = base_environment(PYTHON="/nowhere/python")
    command = ["bash", str(script), flag]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    _, *lines = script.read_text(encoding="utf-8").splitlines()
    printed = done.stdout.splitlines()
    assert len(printed) >= 3
    assert [f"# {line}" for line in printed] == lines[: len(printed)]
    assert not lines[len(printed)].startswith("#"), "the whole comment"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("end", ["false", "fail no", "kill $BASHPID; wait", "kill -INT $BASHPID"])
def test_what_runs_beside_a_script_ends_with_it(end: str) -> None:
    """Were one left, it would hold stdout for a minute."""
    done = subprocess.run(
        ["bash", "-c", BESIDE + end],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
        preexec_fn=_with_sigint,
    )
    assert done.returncode != 0 and done.stdout == "started\n"


def _with_sigint() -> None:
    """Tests that run in the background inherit that it is ignored, which bash cannot undo."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_script_waits_for_what_runs_beside_it() -> None:
    script = f"{SHARED}\nset -e; beside echo done; wait $!; beside false; wait $!; echo never"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "done\n")


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_nothing_else_is_put_beside(script: Path) -> None:
    lines = script.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.endswith(" &")] == []
