"""table.py start|run|end ROW TABLE FLAGS: one training run per row of a table of flags.

For launch/slurm/array.sbatch. `start` checks the row and prints its command, `run` becomes that
command, `end` records its exit code (VICO_EXIT_CODE) and writes OUTPUT_DIR/results.tsv, which is
printed when all elements of the array have ended.
"""

import contextlib
import csv
import fcntl
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# Before installed packages: these scripts run the checkout that they are part of.
sys.path.insert(0, str(ROOT))

from vico.cli import flags as command_line  # noqa: E402
from vico.errors import UserError, nearest, one_line, show  # noqa: E402
from vico.io import log  # noqa: E402
from vico.io.atomic import make_folder, write_text  # noqa: E402
from vico.io.paths import exists, open_to_write, read_bytes  # noqa: E402
from vico.train import config as configs  # noqa: E402

EXIT_CODE = "exit_code"  # a file beside a run's files: how its last start ended
RESULTS, LOCK = "results.tsv", ".results-lock"  # in the folder of all runs
SEPARATOR_HINT = "a .tsv file has tabs between columns, others commas"


@dataclass(frozen=True)
class Row:
    name: str
    cells: dict[str, str]  # by column, without "name"
    flags: list[str]


def read_table(path: Path) -> list[Row]:
    """Raises UserError naming the row or column."""
    header, *lines = _read_lines(path)
    columns = [cell.strip().removeprefix("--") for cell in header]
    _check_columns(path, columns)
    rows = [_read_row(path, number, columns, line) for number, line in enumerate(lines, start=1)]
    names = [row.name for row in rows]
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{path}: two rows are named {show(name)}; each needs its own folder")
    return rows


def _read_lines(path: Path) -> list[list[str]]:
    """The lines of cells that are not empty, at least two."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    try:
        text = io.StringIO(read_bytes(path).decode("utf-8-sig"), newline="")
        lines = [line for line in csv.reader(text, delimiter=delimiter, strict=True) if any(line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: the table of flags cannot be read ({why})") from None
    if len(lines) < 2:
        raise UserError(f"{path}: must hold a line of flag names and a line of values for each run")
    return lines


def _check_columns(path: Path, columns: list[str]) -> None:
    for column, count in Counter(columns).items():
        if count > 1:
            raise UserError(f"{path}: column {show(column)} appears twice; keep one")
        problem = None
        if column == "output_dir":
            problem = "is made from the row's name"
        elif column != "name" and column not in command_line.SETTINGS:
            problem = f"is no flag{nearest(column, command_line.SETTINGS)}"
        if problem:
            raise UserError(f"{path}: column {show(column)} {problem}; {SEPARATOR_HINT}")


def _read_row(path: Path, number: int, columns: list[str], line: list[str]) -> Row:
    if len(line) != len(columns):
        counts = f"{len(line)} fields and the first line {len(columns)}"
        raise UserError(f"{path}: row {number} has {counts}")
    cells = dict(zip(columns, (cell.strip() for cell in line), strict=True))
    name = cells.pop("name", f"row-{number}")
    if not name or name.startswith(".") or "/" in name:
        raise UserError(f"{path}: row {number}: {show(name)} cannot be the name of a folder")
    flags: list[str] = []
    for column, value in cells.items():
        try:
            flags += [command_line.as_flag(column, value)] if value else []
        except UserError as error:
            raise UserError(f"{path}: row {number}: {error}") from None
    return Row(name, cells, flags)


def result(row: Row, folder: Path) -> dict[str, str]:
    """The row with the status and the scores of its run."""
    epochs = _read_records(folder / "log.txt")
    scored = [epoch for epoch in epochs if epoch.get("val_acc") is not None]
    best = max(scored, key=lambda epoch: epoch["val_acc"], default={})
    last = epochs[-1] if epochs else {}
    values = {
        "best_val_acc": best.get("val_acc"),
        "best_epoch": best.get("epoch"),
        "val_acc": last.get("val_acc"),
        "train_loss": last.get("train_loss"),
        "step": last.get("step"),
    }
    texts = {name: _format(value) for name, value in values.items()}
    return {"name": row.name, **row.cells, "status": _status(folder / EXIT_CODE), **texts}


def _status(path: Path) -> str:
    code = read_bytes(path).decode(errors="replace").strip() if exists(path) else ""
    return {"": "not ended", "0": "done"}.get(code, f"failed ({code})")


def _read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a log, up to one that is being written."""
    records: list[dict[str, Any]] = []
    if not exists(path):
        return records
    for line in read_bytes(path).decode(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if isinstance(record, dict):
            records.append(record)
    return records


def _format(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_results(rows: list[Row], base: Path) -> None:
    """Write results.tsv; print it when all rows, or all elements of the array, have ended."""
    results = [result(row, base / row.name) for row in rows]
    lines = [list(results[0]), *(list(values.values()) for values in results)]
    path = base / RESULTS
    write_text(path, "".join("\t".join(line) + "\n" for line in lines))
    num_ended = sum(values["status"] != "not ended" for values in results)
    num_started = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    log.info(f"{num_ended} of {len(rows)} rows have ended: {path}")
    if num_ended >= min(num_started, len(rows)):
        print("\n".join(_align(lines)), flush=True)


@contextlib.contextmanager
def one_at_a_time(base: Path) -> Iterator[None]:
    """Wait until no other run records its end.

    Two runs that end in one moment would both be the last, or write results.tsv without the other.
    A POSIX lock: network file systems pass it on to other nodes.
    """
    try:
        descriptor = open_to_write(base / LOCK, os.O_RDWR)
    except OSError as error:
        raise UserError(f"{base / LOCK}: is {error.strerror}; remove it") from None
    with open(descriptor, "wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            log.info(f"{base}: cannot be locked ({error.strerror}); {RESULTS} may miss a run")
        yield


def _align(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        aligned.append("  ".join(cells).rstrip())
    return aligned


def main(action: str, number: str, table: str, flags: list[str]) -> None:
    rows = read_table(Path(table))
    if not (number.isdecimal() and 1 <= int(number) <= len(rows)):
        problem = f"has {len(rows)} rows and no row {number}"
        raise UserError(f"{table}: {problem}; start it with --array=1-{len(rows)}")
    row = rows[int(number) - 1]
    base = _parse(flags).output_dir
    command = [*flags, *row.flags, f"--output_dir={base / row.name}"]
    exit_code = base / row.name / EXIT_CODE

    def end(code: str) -> None:
        make_folder(exit_code.parent)
        with one_at_a_time(base):
            write_text(exit_code, code + "\n")
            write_results(rows, base)

    if action == "start":
        exit_code.unlink(missing_ok=True)
        try:
            _parse(command)
        except UserError as error:
            end(str(error.exit_code))
            raise
        log.info(f"row {number} of {len(rows)}, {row.name}: vico train {' '.join(command)}")
    elif action == "run":
        os.execvp("bash", ["bash", str(ROOT / "launch" / "train.sh"), *command])
    else:
        end(os.environ["VICO_EXIT_CODE"])


def _parse(flags: list[str]) -> configs.RunConfig:
    return command_line.parse(flags, "vico train", "").resolve()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "", sys.argv[4:])
    except UserError as error:
        log.error(one_line(str(error)))
        sys.exit(error.exit_code)
