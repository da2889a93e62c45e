"""What a command of several ranks does around its work: connect, run, report, leave together."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from vico.cli.flags import CommandLine
from vico.distributed import launcher_env, signals
from vico.errors import UnreachableError, UserError, one_line
from vico.io import log
from vico.train.config import RunConfig

if TYPE_CHECKING:  # they import torch, which is slow; a mistyped flag is reported before
    from vico.distributed.world import World

# Launchers kill all ranks as soon as one has ended, so the others wait for rank 0's message.
SECONDS_FOR_RANK_0 = 10.0
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # of torchrun, of DeepSpeed's launcher
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
    world = connect(timeout, config.expect_world_size, 60 * config.hang_timeout)
    code, together = 0, True
    try:
        for note in line.notes:
            world.print_rank0(f"note: {note}")
        require_same_code(world, line.given)
        work(world)
    except signals.Stopped as stop:
        # The state is saved. Launchers send another signal as soon as the first rank has ended.
        signals.ignore_all()
        world.print_rank0(f"vico: {stop.line}")
        code = stop.exit_code
    except UserError as error:  # of all ranks
        if world.is_main:
            restart_limit.record_failure()
        code, together = report_error(error, line.debug), False
    except Exception as problem:  # of this rank alone
        signals.restore_default_handlers()
        code, together = exit_cause.report(world, problem, line.debug), False
    disconnect(world, together)  # outside `except`: the error no longer holds tensors or groups
    return code


def _prepare_process(config: RunConfig, debug: bool) -> None:
    """Set what must be set before torch is imported. Raises UserError for a wrong world size."""
    if "LOCAL_RANK" in os.environ:
        # Otherwise the ranks of a killed launcher train on, and a second start writes beside them.
        signals.die_with_parent(os.getppid())
    launcher_env.check_world_size(config.expect_world_size)
    num_cores = len(os.sched_getaffinity(0))
    local_sizes = [launcher_env.int_variable(os.environ, n) for n in LOCAL_SIZES]
    num_ranks = next((size for size in local_sizes if size), 1)
    # Some launchers do not set it.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_ranks)))
    if not debug:
        # Below that level, a lost rank prints pages of C++ frames.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def report_error(error: UserError, debug: bool) -> int:
    """Print the error on rank 0, or on each host's first rank when rank 0 cannot know it.

    Returns the exit code. The other ranks wait a moment first.
    """
    signals.restore_default_handlers()
    is_first_of_host = os.environ.get("LOCAL_RANK", "0") == "0"
    if launcher_env.is_rank_0() or (isinstance(error, UnreachableError) and is_first_of_host):
        if debug:
            traceback.print_exception(error)
        lines = [str(error), *error.rows]
        log.error("\n  ".join(one_line(line) for line in lines))
        sys.stderr.flush()
    else:
        time.sleep(SECONDS_FOR_RANK_0)
    return error.exit_code
