"""`bash benchmarks/run.sh SUITE [flags]` runs one suite and prints its record as the last line.

benchmarks/README.md explains the suites.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # A launcher starts this file by its path. Modules are then found from the checkout, not from
    # this folder, which would shadow others.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.paths import RESULTS
from vico.cli.parser import OneLineParser
from vico.distributed import launcher_env
from vico.errors import UserError, one_line
from vico.io import log

SECONDS_FOR_RANK_0 = 5.0


@dataclass(frozen=True)
class Suite:
    """A module with `add_flags(parser)` and `run(args)`, which returns the exit code."""

    module: str
    help: str


SUITES = {
    "cpu": Suite(
        "benchmarks.suites.cpu",
        "plain against packed on this machine's CPU, fp32, one thread: speed, peak memory, "
        "equality; transformers with PEFT; about 10 minutes",
    ),
    "gpu": Suite(
        "benchmarks.suites.gpu",
        "one GPU: attention backends, plain against packed, memory, smaller cards, time split; "
        "4 minutes for a 7B on an H100; --tiny --device cpu: 15 seconds",
    ),
    "node": Suite(
        "benchmarks.suites.node.suite",
        "any number of ranks: ZeRO-2 and 3, weak and strong scaling, communication; not yet timed "
        "on several GPUs, an estimated 5 minutes per size and number of ranks; "
        "--tiny --ranks 1,2 on a CPU: 1 minute",
    ),
    "one_of_eight": Suite(
        "benchmarks.suites.node.one_of",
        "one rank of eight, alone on one GPU: memory, hooks and products of 33B and 65B under "
        "ZeRO-3, without communication; never run on a GPU; --tiny on a CPU: 20 seconds",
    ),
    "report": Suite("benchmarks.report.report", "Markdown and plots from records; seconds"),
    "compare": Suite(
        "benchmarks.report.compare",
        "OLD NEW: the figures of two records that got better or worse; exit code 1 if one is worse "
        "by more than the threshold",
    ),
}
# These read records and make none.
READERS = ("report", "compare")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one suite; returns the exit code."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if launcher_env.is_rank_0():
            log.error(one_line(str(error)))
        else:
            # Launchers end all ranks as soon as one has ended; rank 0 must print its line first.
            time.sleep(SECONDS_FOR_RANK_0)
        return error.exit_code


def _run(argv: Sequence[str]) -> int:
    parser = OneLineParser(prog="benchmarks/run.sh", description=__doc__)
    parser.add_argument("--local_rank", "--local-rank", help="passed by launchers")
    commands = parser.add_subparsers(dest="suite", required=True)
    chosen = next((word for word in argv if word in SUITES), None)
    for name, suite in SUITES.items():
        command = commands.add_parser(name, help=suite.help, description=suite.help)
        if name != chosen:
            continue
        # Only the chosen suite is imported: torch and DeepSpeed take seconds.
        module = import_module(suite.module)
        module.add_flags(command)
        if name not in READERS:
            command.add_argument(
                "--results", type=Path, default=RESULTS, help="folder of the record"
            )
        command.set_defaults(run=module.run, command=command)
    args, unknown = parser.parse_known_args(argv)
    values = vars(args)
    if unknown:
        values.get("command", parser).refuse_unknown(unknown)
    run = values.pop("run")
    # The rest goes into the record.
    for name in ("command", "local_rank"):
        values.pop(name)
    return int(run(args))


if __name__ == "__main__":
    sys.exit(main())
