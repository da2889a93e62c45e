"""`vico selftest`: breaks runs, files and disks on purpose, and counts the cases that end well.

Each scenario is a module scenario_NAME of this folder. It leaves NAME.json in --out. The last line
of the output is one JSON object: the results of all scenarios that were run on this very code.
"""

import argparse
import importlib
import json
import platform
import shutil
import subprocess
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Protocol

from faults.result import Result, Scale, SkippedError
from support.processes import forked_ranks
from vico.cli.parser import OneLineParser
from vico.errors import DONE, INTERNAL_ERROR, UserError, nearest
from vico.io.atomic import make_folder, write_json
from vico.io.digest import digest_chunks
from vico.io.text import read_json_object

SCENARIOS = (
    "kill store damage signals disk_full hangs writers nan mutations save_cost "
    "inputs legal evaluation fuzz pickles"
).split()
ROOT = Path(__file__).resolve().parents[2]
SUMMARY_KEYS = ("passed", "of", "skipped", "seconds", "date", "scale")
MAX_FAILURES_SHOWN = 5
CODE_DIGITS = 16
DESCRIPTION = """\
Break runs, files and disks on purpose, and count the cases that end well. Each scenario leaves
NAME.json in --out; the last line is one JSON object with all results of this very code."""


class Scenario(Protocol):
    """What a module scenario_NAME holds."""

    NAME: str
    TITLE: str  # one line
    MINUTES: tuple[float, float]  # on two cores: quick, full

    def run(self, scale: Scale) -> Result: ...


def main(argv: list[str]) -> int:
    scenarios = [_load_scenario(name) for name in SCENARIOS]
    flags = _make_parser(scenarios).parse_args(argv)
    for name in flags.only or ():
        if name not in SCENARIOS:
            known = f"{nearest(name, SCENARIOS)}; there are {', '.join(SCENARIOS)}"
            raise UserError(f"--only {name}: no such scenario{known}")
    if flags.table:
        print(table(flags.out, scenarios))
        return DONE
    chosen = [scenario for scenario in scenarios if not flags.only or scenario.NAME in flags.only]
    make_folder(flags.out)
    minutes = sum(scenario.MINUTES[not flags.quick] for scenario in chosen)
    print(
        f"vico selftest: {len(chosen)} scenario(s), about {minutes:.0f} minutes on two cores; "
        f"results go to {flags.out}",
        flush=True,
    )
    with forked_ranks():
        good = [_run(scenario, flags) for scenario in chosen]
    print(json.dumps(results(flags.out)), flush=True)
    return DONE if all(good) else INTERNAL_ERROR


def _make_parser(scenarios: list[Scenario]) -> OneLineParser:
    lines = ["scenarios (minutes with --quick / --full):"]
    for scenario in scenarios:
        quick, full = scenario.MINUTES
        lines.append(f"  {scenario.NAME:<12}{scenario.TITLE} ({quick:g} / {full:g})")
    parser = OneLineParser(
        prog="vico selftest",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(lines),
    )
    size = parser.add_mutually_exclusive_group()
    quick_help = "few cases of each scenario: 7 minutes in all"
    size.add_argument("--quick", action="store_true", help=quick_help)
    full_help = "all cases (the default); hours in all, so take it in parts by --only"
    size.add_argument("--full", action="store_true", help=full_help)
    only_help = "only these scenarios; their results are added to those in --out"
    parser.add_argument("--only", nargs="+", metavar="SCENARIO", help=only_help)
    out_help = "folder of the results (default: selftest)"
    parser.add_argument("--out", type=Path, default=Path("selftest"), help=out_help)
    table_help = "run nothing: print the results in --out as a Markdown table"
    parser.add_argument("--table", action="store_true", help=table_help)
    seed_help = "seed of everything random: where a kill hits, which bit flips"
    parser.add_argument("--seed", type=int, default=0, help=seed_help)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _load_scenario(name: str) -> Any:
    return importlib.import_module(f"faults.scenario_{name}")


def _run(scenario: Scenario, flags: argparse.Namespace) -> bool:
    """Run it in a folder of its own, write its JSON, print the result. False: a case failed."""
    minutes = scenario.MINUTES[not flags.quick]
    print(f"== {scenario.NAME}: {scenario.TITLE} (about {minutes:g} min)", flush=True)
    folder = Path(tempfile.mkdtemp(prefix=f"vico-selftest-{scenario.NAME}-"))
    began = time.monotonic()
    skipped = ""
    try:
        result = scenario.run(Scale(flags.quick, flags.seed, folder))
    except SkippedError as reason:
        skipped, result = str(reason), Result(0, 0)
    except Exception as problem:  # counts as a failure, and must not stop the other scenarios
        traceback.print_exc()
        result = Result(0, 1, {"failures": [f"the scenario itself failed: {problem!r}"]})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - began
    good = bool(skipped) or result.passed == result.of > 0
    _write_record(scenario.NAME, flags, result, skipped, seconds)
    for failure in list(result.facts.get("failures", []))[:MAX_FAILURES_SHOWN]:
        print(f"   failed: {failure}", flush=True)
    if skipped:
        print(f"   skipped: {skipped}", flush=True)
    else:
        verdict = "" if good else ": FAILED"
        print(f"   {result.passed} of {result.of} in {seconds:.0f} s{verdict}", flush=True)
    return good


def _write_record(
    name: str, flags: argparse.Namespace, result: Result, skipped: str, seconds: float
) -> None:
    record: dict[str, Any] = {"passed": result.passed, "of": result.of}
    if skipped:
        record["skipped"] = skipped
    record |= {
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%d"),
        "scale": "quick" if flags.quick else "full",
        "seed": flags.seed,
        **version(),
        "facts": result.facts,
    }
    write_json(flags.out / f"{name}.json", record)


def results(out: Path) -> dict[str, Any]:
    """By scenario: the results in `out` of the code as it is now."""
    summaries = {}
    code = version()["code"]
    for name in SCENARIOS:
        record = _read_record(out, name)
        if record.get("code") == code:
            summaries[name] = {key: record[key] for key in SUMMARY_KEYS if key in record}
    return summaries


def _read_record(out: Path, name: str) -> dict[str, Any]:
    path = out / f"{name}.json"
    return read_json_object(path, "a result of the self-test") if path.exists() else {}


def table(out: Path, scenarios: list[Scenario]) -> str:
    """All results in `out`, also those of older code."""
    rows = [
        "| scenario | passed | cases | time | date, machine |",
        "| --- | --- | --- | --- | --- |",
    ]
    for scenario in scenarios:
        if record := _read_record(out, scenario.NAME):
            columns = (
                f"`{scenario.NAME}`: {scenario.TITLE}",
                "skipped" if "skipped" in record else f"{record['passed']} of {record['of']}",
                record["scale"],
                f"{record['seconds'] / 60:.1f} min",
                f"{record['date']}, {record['machine']}",
            )
            rows.append(f"| {' | '.join(columns)} |")
    return "\n".join(rows)


def version() -> dict[str, str]:
    """Which code ran where. `code` is a digest of the package: `results` joins only equal ones."""
    contents = []
    for path in sorted((ROOT / "vico").rglob("*.py")):
        contents.append(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    return {
        "code": digest_chunks(contents, CODE_DIGITS),
        "commit": commit.stdout.strip() or "unknown",
        "machine": f"{platform.machine()}, {_processor()}",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
