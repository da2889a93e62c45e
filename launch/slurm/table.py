"""table.py start|run|end ROW TABLE FLAGS: a row of a table of flags as a run of its own, and the table of what came of all rows.

For launch/slurm/array.sbatch. `start` checks the row and says what it runs, `run` becomes that run, `end` notes how it
ended (VICO_EXIT_CODE), writes OUTPUT_DIR/results.tsv and prints it when every element of the array has ended.
"""

import csv
import json
import os
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(
    0, str(ROOT)
)  # before anything that is installed: these scripts run the checkout they lie in

from vico.cli import flags as command_line  # noqa: E402
from vico.errors import UserError, nearest, one_line, show  # noqa: E402
from vico.io.atomic import make_folder, write_text  # noqa: E402
from vico.train import config as configs  # noqa: E402

ENDED = "exit_code"  # beside a run's files: how its last start ended
YES, NO = ("true", "yes", "1"), ("false", "no", "0")


@dataclass(frozen=True)
class Row:
    name: str
    cells: dict[str, str]  # by column, without 'name'
    flags: list[str]


def read_table(path: Path) -> list[Row]:
    """Raises UserError naming line and column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [
                line
                for line in csv.reader(
                    file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True
                )
                if any(line)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise UserError(
            f"{path}: the table of flags cannot be read ({getattr(problem, 'strerror', None) or problem})"
        ) from None
    if len(lines) < 2:
        raise UserError(f"{path}: must hold a line of flag names and a line of values for each run")
    columns = [cell.strip().removeprefix("--") for cell in lines[0]]
    kinds = typing.get_type_hints(configs.RunConfig)
    for column in columns:
        if columns.count(column) > 1:
            raise UserError(f"{path}: column {show(column)} stands there twice; keep one")
        if column == "output_dir" or (column != "name" and column not in kinds):
            why = (
                "is made from the row's name"
                if column == "output_dir"
                else f"is no flag{nearest(column, kinds)}"
            )
            raise UserError(
                f"{path}: column {show(column)} {why}; a .tsv file has tabs between columns, others commas"
            )
    rows = [
        _row(number, columns, line, kinds, path) for number, line in enumerate(lines[1:], start=1)
    ]
    names = [row.name for row in rows]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"{path}: two rows are named {show(twice[0])}; each needs a folder of its own"
        )
    return rows


def _row(
    number: int, columns: list[str], line: list[str], kinds: dict[str, Any], path: Path
) -> Row:
    if len(line) != len(columns):
        raise UserError(
            f"{path}: row {number} has {len(line)} fields and the first line {len(columns)}"
        )
    cells = dict(zip(columns, (cell.strip() for cell in line), strict=True))
    name = cells.pop("name", f"row-{number}")
    if not name or name.startswith(".") or "/" in name:
        raise UserError(f"{path}: row {number}: {show(name)} cannot be the name of a folder")
    flags: list[str] = []
    for column, value in cells.items():
        if kinds[column] is bool:
            if value.lower() not in (*YES, *NO, ""):
                raise UserError(
                    f"{path}: row {number}: {column} is {show(value)}; a switch is yes or no"
                )
            flags += [f"--{column}"] if value.lower() in YES else []
        elif value:
            flags.append(f"--{column}={value}")
    return Row(name, cells, flags)


def result(row: Row, folder: Path) -> dict[str, str]:
    """The row with what its run has come to."""
    epochs = _records(folder / "log.txt")
    scored = [e for e in epochs if e.get("val_acc") is not None]
    best = max(scored, key=lambda e: e["val_acc"], default={})
    last = epochs[-1] if epochs else {}
    code = (folder / ENDED).read_text().strip() if (folder / ENDED).exists() else ""
    status = {"": "not ended", "0": "done"}.get(code, f"failed ({code})")
    found = {
        "best_val_acc": best.get("val_acc"),
        "best_epoch": best.get("epoch"),
        "val_acc": last.get("val_acc"),
    }
    found |= {"train_loss": last.get("train_loss"), "step": last.get("step")}
    return {
        "name": row.name,
        **row.cells,
        "status": status,
        **{k: _shown(v) for k, v in found.items()},
    }


def _records(path: Path) -> list[dict[str, Any]]:
    """A line that is being written is not there yet."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def write_results(rows: list[Row], base: Path) -> None:
    results = [result(row, base / row.name) for row in rows]
    lines = [list(results[0]), *(list(r.values()) for r in results)]
    path = base / "results.tsv"
    write_text(path, "".join("\t".join(line) + "\n" for line in lines))
    num_ended, num_started = (
        sum(r["status"] != "not ended" for r in results),
        int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")),
    )
    print(f"{num_ended} of {len(rows)} rows have ended: {path}", flush=True)
    if num_ended >= min(num_started, len(rows)):
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print(
            "\n".join(
                "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
                for line in lines
            ),
            flush=True,
        )


def main(verb: str, number: str, table: str, flags: list[str]) -> None:
    rows = read_table(Path(table))
    if not (number.isdecimal() and 1 <= int(number) <= len(rows)):
        raise UserError(
            f"{table}: has {len(rows)} rows and no row {number}; start it by --array=1-{len(rows)}"
        )
    row = rows[int(number) - 1]
    base = command_line.parse(flags, "vico train", "").resolve().output_dir
    command = [*flags, *row.flags, f"--output_dir={base / row.name}"]
    ended = base / row.name / ENDED

    def end(code: str) -> None:
        make_folder(ended.parent)
        write_text(ended, code + "\n")
        write_results(rows, base)

    if verb == "start":
        ended.unlink(missing_ok=True)
        try:
            command_line.parse(command, "vico train", "").resolve()
        except UserError as error:
            end(str(error.exit_code))
            raise
        print(
            f"row {number} of {len(rows)}, {row.name}: vico train {' '.join(command)}", flush=True
        )
    elif verb == "run":
        os.execvp("bash", ["bash", str(ROOT / "launch" / "train.sh"), *command])
    else:
        end(os.environ["VICO_EXIT_CODE"])


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "", sys.argv[4:])
    except UserError as error:
        print(f"vico: error: {one_line(str(error))}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
