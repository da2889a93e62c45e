"""`vico selftest`: breaks runs, files and disks on purpose, and counts how often what must happen did happen.

Each scenario is a module `figure_NAME` here. It leaves a JSON file in --out, and the results of all parts that were run on
the same code are printed together.
"""

import argparse
import hashlib
import importlib
import json
import platform
import shutil
import subprocess
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn, Protocol

from faults.result import Result, Scale
from vico.errors import DONE, INTERNAL_ERROR, UserError, nearest
from vico.io.atomic import make_folder, write_json
from vico.io.text import read_json_object

SCENARIOS: tuple[str, ...] = (
    "kill",
    "store",
    "damage",
    "signals",
    "disk_full",
    "hangs",
    "writers",
    "nan",
    "mutations",
    "save_cost",
    "inputs",
    "legal",
    "evaluation",
    "fuzz",
    "pickles",
)
ROOT = Path(__file__).resolve().parents[2]


class Scenario(Protocol):
    """What a module `figure_NAME` holds."""

    NAME: str
    TITLE: str  # one line
    MINUTES: tuple[float, float]  # on two cores: quick, full

    def run(self, scale: Scale) -> Result: ...


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see vico selftest --help)")


def main(argv: list[str]) -> int:
    scenarios = [_scenario(name) for name in SCENARIOS]
    flags = _parse(argv, scenarios)
    if unknown := [name for name in flags.only or () if name not in SCENARIOS]:
        raise UserError(
            f"--only {unknown[0]}: no such scenario{nearest(unknown[0], SCENARIOS)}; there are {', '.join(SCENARIOS)}"
        )
    if flags.table:
        print(table(flags.out, scenarios))
        return DONE
    chosen = [scenario for scenario in scenarios if not flags.only or scenario.NAME in flags.only]
    make_folder(flags.out)
    minutes = sum(scenario.MINUTES[not flags.quick] for scenario in chosen)
    print(
        f"vico selftest: {len(chosen)} scenario(s), about {minutes:.0f} minutes on two cores; results go to {flags.out}",
        flush=True,
    )
    passed = [_run(scenario, flags) for scenario in chosen]
    print(json.dumps(results(flags.out)), flush=True)
    return DONE if all(passed) else INTERNAL_ERROR


def _parse(argv: list[str], scenarios: list[Scenario]) -> argparse.Namespace:
    lines = [
        f"  {f.NAME:<12}{f.TITLE} ({f.MINUTES[0]:g} / {f.MINUTES[1]:g} min)" for f in scenarios
    ]
    parser = _Parser(
        prog="vico selftest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["scenarios (minutes with --quick / --full):", *lines]),
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="few cases of each scenario: ten minutes in all"
    )
    size.add_argument(
        "--full",
        action="store_true",
        help="all cases (the default); hours in all, so take it in parts by --only",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="SCENARIO",
        help="these scenarios alone; their results are put to those in --out",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("selftest"),
        help="folder of the results (default: selftest)",
    )
    parser.add_argument(
        "--table",
        action="store_true",
        help="run nothing: print the results in --out as the table of the README",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of everything that is random: where a kill hits, which bit flips",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def _scenario(name: str) -> Any:
    return importlib.import_module(f"faults.scenario_{name}")


def _run(scenario: Scenario, flags: argparse.Namespace) -> bool:
    """Run it in a folder of its own, write its JSON, say how it went."""
    print(
        f"== {scenario.NAME}: {scenario.TITLE} (about {scenario.MINUTES[not flags.quick]:g} min)",
        flush=True,
    )
    folder = Path(tempfile.mkdtemp(prefix=f"vico-selftest-{scenario.NAME}-"))
    began = time.monotonic()
    try:
        result = scenario.run(Scale(flags.quick, flags.seed, folder))
    except Exception as problem:  # a fault of the scenario is one that is counted, and must not cost the other scenarios
        traceback.print_exc()
        result = Result(0, 1, {"failures": [f"the scenario itself failed: {problem!r}"]})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    good = result.passed == result.of > 0
    record: dict[str, Any] = {
        "passed": result.passed,
        "of": result.of,
        "seconds": round(time.monotonic() - began, 1),
    }
    record |= {"date": time.strftime("%Y-%m-%d"), "scale": "quick" if flags.quick else "full"}
    write_json(
        flags.out / f"{scenario.NAME}.json",
        {**record, "seed": flags.seed, **version(), "facts": result.facts},
    )
    for failure in list(result.facts.get("failures", []))[:5]:
        print(f"   failed: {failure}", flush=True)
    print(
        f"   {result.passed} of {result.of} in {record['seconds']:.0f} s{'' if good else ': FAILED'}",
        flush=True,
    )
    return good


def results(out: Path) -> dict[str, Any]:
    """The results in `out` that belong to the code as it is now, by scenario."""
    found = {}
    code = version()["code"]
    for name in SCENARIOS:
        path = out / f"{name}.json"
        record = read_json_object(path, "a result of the self-test") if path.exists() else {}
        if record.get("code") == code:
            found[name] = {key: record[key] for key in ("passed", "of", "seconds", "date", "scale")}
    return found


def table(out: Path, scenarios: list[Scenario]) -> str:
    """All results in `out`, of whatever code."""
    rows = ["| scenario | held | scale | time | date, machine |", "| --- | --- | --- | --- | --- |"]
    for scenario in scenarios:
        path = out / f"{scenario.NAME}.json"
        if path.exists():
            r = read_json_object(path, "a result of the self-test")
            held, when = f"{r['passed']} of {r['of']}", f"{r['date']}, {r['machine']}"
            rows.append(
                f"| `{scenario.NAME}`: {scenario.TITLE} | {held} | {r['scale']} | {r['seconds'] / 60:.1f} min | {when} |"
            )
    return "\n".join(rows)


def version() -> dict[str, str]:
    """Which code ran where. `code` is a digest of the program itself: results of another program are not put together with these."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "vico").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "code": digest.hexdigest()[:16],
        "commit": commit.stdout.strip() or "unknown",
        "machine": f"{platform.machine()}, {_processor()}",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
