"""`bash benchmarks/run.sh SUITE [flags]`: one suite, one record, the last line of stdout. How to run what: benchmarks/README.md."""

import argparse
import os
import sys
import time
from pathlib import Path

if (
    __name__ == "__main__" and not __package__
):  # a launcher starts this file itself: its folder must not shadow modules, the checkout must be found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.report.record import RESULTS

SECONDS_FOR_RANK_0 = 5.0
MODULES = {
    "cpu": "suites.cpu",
    "gpu": "suites.gpu",
    "node": "suites.node",
    "report": "report.report",
}
SUITES = {
    "cpu": "plain against packed on this machine's CPU, fp32, one thread: speed, peak memory, equality; about 5 minutes",
    "gpu": "one GPU: attention backends, plain against packed, memory, smaller cards, time split; 4 minutes for a 7B on an H100; "
    "--tiny --device cpu: 15 seconds",
    "node": "any number of ranks: ZeRO-2 and 3, weak and strong scaling, communication; not yet timed on GPUs, 5 minutes reckoned per size "
    "and number of ranks; --tiny --ranks 1,2 on a CPU: 1 minute",
    "report": "Markdown and plots from records; seconds",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/run.sh", description=__doc__)
    parser.add_argument("--local_rank", "--local-rank", help="passed by launchers")
    suites = parser.add_subparsers(dest="suite", required=True)
    chosen = next(
        (word for word in (sys.argv[1:] if argv is None else argv) if word in SUITES), None
    )
    # Only the chosen suite is imported: torch and DeepSpeed take seconds, and --help needs neither.
    from importlib import import_module

    for name, text in SUITES.items():
        suite = suites.add_parser(name, help=text, description=text)
        if name == chosen:
            module = import_module(f"benchmarks.{MODULES[name]}")
            module.add_flags(suite)
            if name != "report":
                suite.add_argument(
                    "--results", type=Path, default=RESULTS, help="folder of the record"
                )
            suite.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    args.__dict__.pop("local_rank")
    run = args.__dict__.pop("run")
    from vico.errors import UserError, one_line

    try:
        return int(run(args))
    except UserError as problem:
        if os.environ.get("RANK", "0") == "0":
            print(f"vico: error: {one_line(str(problem))}", file=sys.stderr, flush=True)
        else:
            time.sleep(
                SECONDS_FOR_RANK_0
            )  # launchers end every rank as soon as one has ended, also the one that speaks
        return problem.exit_code


if __name__ == "__main__":
    sys.exit(main())
