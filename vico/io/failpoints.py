"""Named moments at which the self-test kills, delays or breaks a run. Without VICO_FAILPOINT nothing here does anything.

VICO_FAILPOINT=MOMENT[@N][#RANK]=ACTION: at the N-th passing (1) of the moment, on that rank (any), `kill` (this process, as
kill -9 does), `sleep SECONDS` or `raise NAME` (a built-in exception).
"""

import builtins
import os
import re
import signal
import sys
import time
from dataclasses import dataclass


@dataclass
class _Plan:
    moment: str
    left: int  # passings, until it is time
    rank: str | None
    action: str
    argument: str


_plan: _Plan | None = None


def arm(text: str | None) -> None:
    global _plan
    _plan = None
    if text:
        found = re.fullmatch(r"([a-z :]+)(?:@(\d+))?(?:#(\d+))?=(kill|sleep|raise) ?(.*)", text)
        assert found is not None, f"VICO_FAILPOINT={text}"
        moment, number, rank, action, argument = found.groups()
        _plan = _Plan(moment, int(number or 1), rank, action, argument)


def reached(moment: str) -> None:
    """The program says where it is."""
    if (
        _plan is not None
        and _plan.moment == moment
        and _plan.rank in (None, os.environ.get("RANK", "0"))
    ):
        _plan.left -= 1
        if _plan.left == 0:
            _act(_plan)


def _act(plan: _Plan) -> None:
    print(f"vico: failpoint {plan.moment}", file=sys.stderr, flush=True)
    if plan.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif plan.action == "sleep":
        time.sleep(float(plan.argument))
    else:
        raise getattr(builtins, plan.argument)(f"failpoint {plan.moment}")


arm(os.environ.get("VICO_FAILPOINT"))
