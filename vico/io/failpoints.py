"""Named points in the program at which the fault tests kill, delay or break a run.

VICO_FAILPOINT=POINT[@N][#RANK]=ACTION acts the N-th time (default 1) that rank RANK (default: any)
passes POINT. ACTION is `kill` (this process, like kill -9), `sleep SECONDS` or `raise NAME` (a
built-in exception). Without VICO_FAILPOINT nothing here does anything.
"""

import builtins
import os
import re
import signal
import sys
import time
from dataclasses import dataclass


@dataclass
class _Failpoint:
    point: str
    # Passes left until the action.
    remaining: int
    rank: str | None
    action: str
    argument: str


_failpoint: _Failpoint | None = None


def arm(text: str | None) -> None:
    """Set the failpoint from the text of VICO_FAILPOINT; None or empty disarms it."""
    global _failpoint
    _failpoint = None
    if text:
        match = re.fullmatch(r"([a-z_ :]+)(?:@(\d+))?(?:#(\d+))?=(kill|sleep|raise) ?(.*)", text)
        assert match is not None, f"VICO_FAILPOINT={text}"
        point, count, rank, action, argument = match.groups()
        _failpoint = _Failpoint(point, int(count or 1), rank, action, argument)


def reached(point: str) -> None:
    """Mark a point of the program: acts when the armed failpoint names it."""
    if _failpoint is None or _failpoint.point != point:
        return
    if _failpoint.rank not in (None, os.environ.get("RANK", "0")):
        return
    _failpoint.remaining -= 1
    if _failpoint.remaining == 0:
        _act(_failpoint)


def _act(failpoint: _Failpoint) -> None:
    # Not by vico.io.log: the tests wait for exactly this line, from any rank.
    print(f"vico: failpoint {failpoint.point}", file=sys.stderr, flush=True)
    if failpoint.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif failpoint.action == "sleep":
        time.sleep(float(failpoint.argument))
    else:
        raise getattr(builtins, failpoint.argument)(f"failpoint {failpoint.point}")


arm(os.environ.get("VICO_FAILPOINT"))
