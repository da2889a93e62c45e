"""`bash benchmarks/run.sh SUITE [flags]`: one suite, one record, the last line of stdout. Times below: two CPU cores, or one H100 (estimated)."""

import argparse
import sys
from pathlib import Path

if (
    __name__ == "__main__" and not __package__
):  # a launcher starts this file itself: its folder must not shadow modules, the checkout must be found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.record import RESULTS

SUITES = {
    "cpu": "plain against packed on this machine's CPU, fp32, one thread: speed, peak memory, equality; about 5 minutes",
    "gpu": "one GPU: attention backends, plain against packed, memory, time split; never timed, about 15 minutes estimated; --tiny: 20 s",
    "node": "1 to 8 ranks per node and more: ZeRO-2 and 3, weak and strong scaling, communication; some minutes per size, stage and number "
    "of ranks estimated; --tiny --ranks 1,2: about 2 minutes on CPU cores",
    "report": "Markdown and plots from records; seconds",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/run.sh", description=__doc__)
    parser.add_argument("--local_rank", "--local-rank", help="passed by launchers")
    suites = parser.add_subparsers(dest="suite", required=True)
    chosen = next((word for word in (sys.argv[1:] if argv is None else argv) if word in SUITES), None)
    # Only the chosen suite is imported: torch and DeepSpeed take seconds, and --help needs neither.
    from importlib import import_module

    for name, text in SUITES.items():
        suite = suites.add_parser(name, help=text, description=text)
        if name == chosen:
            module = import_module(f"benchmarks.{name}")
            module.add_flags(suite)
            if name != "report":
                suite.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
            suite.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    args.__dict__.pop("local_rank")
    run = args.__dict__.pop("run")
    from vico.errors import UserError, one_line

    try:
        return int(run(args))
    except UserError as problem:
        print(f"vico: error: {one_line(str(problem))}", file=sys.stderr, flush=True)
        return problem.exit_code


if __name__ == "__main__":
    sys.exit(main())
