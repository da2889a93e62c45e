"""`bash benchmarks/run.sh SUITE [flags]`: one suite, one record."""

import argparse
import sys

SUITES = {
    "cpu": "plain against packed on this machine's CPU, fp32, one thread: speed, peak memory, equality (minutes)",
}


def main(argv: list[str] | None = None) -> int:
    from benchmarks import cpu

    parser = argparse.ArgumentParser(prog="benchmarks/run.sh", description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True)
    cpu.add_flags(suites.add_parser("cpu", help=SUITES["cpu"]))
    args = parser.parse_args(argv)
    return {"cpu": cpu.run}[args.suite](args)


if __name__ == "__main__":
    sys.exit(main())
