"""What a command of several ranks does around its work: connect, run, report, leave together."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from vico.cli.flags import CommandLine
from vico.distributed import launcher_env, signals
from vico.distributed.cores import host_cores
from vico.errors import PeerLostError, StartFailedError, UnreachableError, UserError, one_line
from vico.io import log
from vico.io.host_memory import limit_kept_products
from vico.train.config import RunConfig

if TYPE_CHECKING:  # they import torch, which is slow; a mistyped flag is reported before
    from vico.distributed.world import World

# Launchers kill all ranks as soon as one has ended, so the others wait for rank 0's message.
SECONDS_FOR_RANK_0 = 10.0
SECONDS_FOR_REPORT = 2.0  # the same where rank 0 is known to print at this moment
WORLD_FLAGS = ("collective_timeout", "hang_timeout", "expect_world_size")


def with_world(line: CommandLine, work: Callable[["World"], None]) -> int:
    """Connect the ranks, call `work(world)`, leave together; returns the exit code.

    torch is imported here and not above, so that a mistyped flag is reported at once.
    """
    config = RunConfig(**{name: line.given[name] for name in WORLD_FLAGS if name in line.given})
    _prepare_process(config, line.debug)
    from vico.checkpoint import restart_limit
    from vico.cli import exit_cause
    from vico.distributed.world import connect, disconnect
    from vico.train.rank_consistency import require_same_code

    timeout = timedelta(minutes=config.collective_timeout)
    hang_seconds = 60 * config.hang_timeout
    world = connect(timeout, config.expect_world_size, hang_seconds, exit_cause.on_peer_exit)
    if world.watchdog is not None:
        world.watchdog.on_hang = restart_limit.record_failure
    code, together = 0, True
    try:
        try:
            for note in line.notes:
                world.print_rank0(f"note: {note}")
            require_same_code(world, line.given)
            work(world)
        finally:
            if world.watchdog is not None:
                world.watchdog.ignore_exits()
    except signals.Stopped as stop:
        # The state is saved. Launchers send another signal as soon as the first rank has ended.
        signals.ignore_all()
        world.print_rank0(f"vico: {stop.line}")
        code = stop.exit_code
    except Exception as problem:
        if isinstance(problem, UserError) and (problem.of_all_ranks or world.size == 1):
            if world.is_main:
                restart_limit.record_failure()
            code, together = report_error(problem, line.debug), False
        else:  # of this rank alone
            signals.restore_default_handlers()
            code, together = exit_cause.report(world, problem, line.debug), False
    except BaseException:  # Ctrl-C in a notebook, whose program the watchdog would end later
        disconnect(world, together=False)
        raise
    disconnect(world, together)  # outside `except`: the error no longer holds tensors or groups
    return code


def _prepare_process(config: RunConfig, debug: bool) -> None:
    """Set what must be set before torch is imported. Raises UserError for a wrong world size."""
    if "LOCAL_RANK" in os.environ:
        # Otherwise the ranks of a killed launcher train on, and a second start writes beside them.
        signals.die_with_parent(os.getppid())
    launcher_env.check_world_size(config.expect_world_size)
    num_ranks = launcher_env.local_world_size() or 1
    # Some launchers do not set it.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, host_cores() // num_ranks)))
    limit_kept_products()
    if not debug:
        # Below that level, a lost rank prints pages of C++ frames.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def report_error(error: UserError, debug: bool, announces: bool = False) -> int:
    """Print the error where it is this rank's turn; returns the exit code.

    Rank 0 prints an error that all ranks have. The first rank of each host prints any other, and
    with `announces` the ranks that wait at the rendezvous are told.
    """
    signals.restore_default_handlers()
    is_rank_0 = launcher_env.is_rank_0()
    is_first = is_rank_0 or os.environ.get("LOCAL_RANK", "0") == "0"
    if isinstance(error, StartFailedError):  # the host of the failed rank knows it
        speaks = is_rank_0 or (is_first and error.host != socket.gethostname())
    else:
        speaks = is_rank_0 if error.of_all_ranks else is_first
    if speaks:
        _print(error, debug)
    has_no_way = error.of_all_ranks or isinstance(error, UnreachableError | PeerLostError)
    if announces and not has_no_way and launcher_env.has_peers():
        is_known = _announce(error)
        if not is_known and not speaks:
            _print(error, debug)
        if not is_rank_0:
            time.sleep(SECONDS_FOR_REPORT)
    elif isinstance(error, StartFailedError):
        time.sleep(0 if speaks else SECONDS_FOR_REPORT)
    elif not speaks:
        time.sleep(SECONDS_FOR_RANK_0)
    return error.exit_code


def _announce(error: UserError) -> bool:
    """Tell the ranks that wait at the rendezvous; returns whether rank 0 will print it."""
    try:
        from vico.distributed.rendezvous import announce_failure  # late: it imports torch
    except ImportError:  # this Python has no torch; the error is said already
        return False
    return announce_failure(one_line(str(error)), error.exit_code)


def _print(error: UserError, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    log.error(error.details)
    sys.stderr.flush()
