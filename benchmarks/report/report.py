"""`bash benchmarks/run.sh report`: a Markdown report and its plots, from records alone.

It measures nothing and fills in nothing.
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from benchmarks.paths import RESULTS
from vico.errors import UserError
from vico.io import log
from vico.io.atomic import write_text
from vico.io.text import read_json_object

TITLES = {
    "cpu": "One thread of a CPU",
    "gpu": "One GPU",
    "node": "Several ranks",
    "one_of_eight": "One rank of several, alone",
}
FACTS = {"date", "command", "config", "git_commit", "versions", "hardware", "equal"}
INTRODUCTION = (
    "Made by `bash benchmarks/run.sh report` from the records named below; "
    "ratios are plain over fast, and beside them the fastest peer over fast."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "records",
        nargs="*",
        type=Path,
        help="JSON files of runs; default: the newest of each suite and machine in "
        "benchmarks/results/",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "report", help="folder of report.md and the plots"
    )


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "matplotlib is not installed; "
            "run 'bash launch/environment.sh --dev', or pip install -e '.[benchmarks]'"
        )
    # Imports matplotlib, which is optional.
    from benchmarks.report.sections import SECTIONS

    paths = args.records or newest(RESULTS)
    if not paths:
        raise UserError(f"{RESULTS}: holds no record; run a suite first, or name records")
    records = [read_record(path) for path in paths]
    args.out.mkdir(parents=True, exist_ok=True)
    lines = ["# Benchmarks", "", INTRODUCTION]
    plots: list[str] = []
    for number, (path, record) in enumerate(zip(paths, records, strict=True), start=1):
        folder = args.out / f"{number}-{record['suite']}"
        folder.mkdir(exist_ok=True)
        section = SECTIONS[record["suite"]](record, folder)
        title = f"{TITLES[record['suite']]}: {machine(record['hardware'])}"
        head = ["", f"## {title}", "", *header(path, record)]
        lines += [*head, *section.lines]
        plots += [str(plot) for plot in section.plots]
    report = args.out / "report.md"
    write_text(report, "\n".join(lines) + "\n")
    log.info(f"report: {report}, {len(plots)} plot(s)")
    summary = {"report": str(report), "plots": plots, "records": [str(path) for path in paths]}
    print(json.dumps(summary), flush=True)
    return 0


def newest(folder: Path) -> list[Path]:
    """The newest record of each suite and machine; file names have the date."""
    paths = []
    for suite in TITLES:
        by_machine = {}
        for path in sorted(folder.glob(f"{suite}-*.json")):
            by_machine[machine(read_record(path)["hardware"])] = path
        paths += sorted(by_machine.values(), reverse=True)
    return paths


def read_record(path: Path) -> dict[str, Any]:
    record = read_json_object(path, "a benchmark record")
    if record.get("suite") not in TITLES or FACTS - set(record):
        raise UserError(
            f"{path}: is no record of a suite ({', '.join(TITLES)}); "
            "name files of benchmarks/results/"
        )
    return record


def header(path: Path, record: dict[str, Any]) -> list[str]:
    """What ran, when and where; and whether its figures mean something."""
    facts = [
        f"`{record['command']}`",
        record["date"],
        f"commit {record['git_commit']}",
        machine(record["hardware"]),
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        f"`{path.name}`",
    ]
    lines = ["; ".join(facts) + ".", ""]
    if record["config"].get("tiny"):
        lines.append("**A toy model: this shows that the harness runs; its figures mean nothing.**")
        lines.append("")
    if not record["equal"]:
        lines += ["**The variants did not compute the same: there are no figures.**", ""]
    return lines


def machine(hardware: dict[str, Any]) -> str:
    if "gpu" in hardware:
        return f"{hardware['gpus']} x {hardware['gpu']}"
    return f"{hardware['cpu']}, {hardware['cores']} cores"
