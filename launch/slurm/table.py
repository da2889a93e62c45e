"""One training run per row of a table of flags, on a SLURM cluster or on this machine.

table.py start|run|end ROW TABLE FLAGS is for launch/slurm/array.sbatch. `start` checks the row and
prints its command, `run` becomes that command, `end` records its exit code (VICO_EXIT_CODE) and
writes OUTPUT_DIR/results.tsv, which is printed when all elements of the array have ended.

table.py all TABLE FLAGS is for launch/sweep.sh: the rows one after another. OUTPUT_DIR/results.tsv
is written after each and printed at the end.
"""

import contextlib
import csv
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# Before installed packages: these scripts run the checkout that they are part of.
sys.path.insert(0, str(ROOT))

from vico.cli import flags as command_line  # noqa: E402
from vico.distributed import signals  # noqa: E402
from vico.errors import INTERRUPTED, RESUMABLE, UserError, nearest, one_line, show  # noqa: E402
from vico.io import log, streams  # noqa: E402
from vico.io.atomic import make_folder, write_text  # noqa: E402
from vico.io.output_dir import OutputDir  # noqa: E402
from vico.io.paths import exists, open_to_write, read_bytes  # noqa: E402
from vico.train import config as configs  # noqa: E402

EXIT_CODE = "exit_code"  # a file beside a run's files: how its last start ended
RESULTS, LOCK = "results.tsv", ".results-lock"  # in the folder of all runs
SIGNALS = signals.blocked()  # passed on to a run
STOPS = set(SIGNALS) - {signal.SIGQUIT}  # that one asks for stacks
POLL_SECONDS = 0.2
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


def write_results(rows: list[Row], base: Path) -> tuple[int, list[str]]:
    """Write results.tsv; returns how many rows have ended, and the aligned lines."""
    results = [result(row, base / row.name) for row in rows]
    lines = [list(results[0]), *(list(values.values()) for values in results)]
    write_text(base / RESULTS, "".join("\t".join(line) + "\n" for line in lines))
    num_ended = sum(values["status"] != "not ended" for values in results)
    return num_ended, _align(lines)


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


class RowRun:
    """The run of row `number`, from 1 on, in the folder of its name."""

    def __init__(self, rows: list[Row], number: int, flags: list[str]) -> None:
        row = rows[number - 1]
        self.label = f"row {number} of {len(rows)}, {row.name}"
        self._rows, self._base = rows, _parse(flags).output_dir
        self.folder = self._base / row.name
        self._flags = [*flags, *row.flags, f"--output_dir={self.folder}"]

    @property
    def command(self) -> list[str]:
        return ["bash", str(ROOT / "launch" / "train.sh"), *self._flags]

    def start(self) -> None:
        """Check the row and print its command. Raises UserError."""
        (self.folder / EXIT_CODE).unlink(missing_ok=True)
        _parse(self._flags)
        log.info(f"{self.label}: vico train {' '.join(self._flags)}")

    def end(self, code: int) -> tuple[int, list[str]]:
        """Record the exit code; returns what `write_results` does."""
        make_folder(self.folder)
        with one_at_a_time(self._base):
            write_text(self.folder / EXIT_CODE, f"{code}\n")
            num_ended, lines = write_results(self._rows, self._base)
        log.info(f"{num_ended} of {len(self._rows)} rows have ended: {self._base / RESULTS}")
        return num_ended, lines

    def is_complete(self) -> bool:
        """Whether its last start ended well, with the settings of now."""
        if _status(self.folder / EXIT_CODE) != "done":
            return False
        try:
            settings, saved = _parse(self._flags).to_json(), OutputDir(self.folder).read_args()
        except UserError:  # the run itself says what is wrong
            return False
        return settings.items() <= saved.items()  # which has more, such as the world size


def run_all(table: Path, flags: list[str]) -> int:
    """Run the rows one after another, and print their results.

    Returns the exit code of the last row that failed, or of the one that a signal stopped.
    """
    # A blocked signal waits until it is passed on. A run starts with the same ones blocked, until
    # it can handle them.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    streams.guard()
    rows = read_table(table)
    base = OutputDir(_parse(flags).output_dir)
    runs = [RowRun(rows, number, flags) for number in range(1, len(rows) + 1)]
    for note in base.lock():
        log.info(note)
    streams.keep_lost_output(base.lost_output)
    for run in runs:
        make_folder(run.folder)
    code = _run_each(runs)
    with one_at_a_time(base.path):
        _, lines = write_results(rows, base.path)
    print("\n".join(lines), flush=True)
    return code


def _run_each(runs: list[RowRun]) -> int:
    failed, received = 0, set[int]()
    for run in runs:
        if run.is_complete():
            log.info(f"{run.label}: passed over, it is complete")
            continue
        if stops := STOPS & (received | signal.sigpending()):
            log.info(f"stopped before {run.label}; the same command goes on there")
            return INTERRUPTED if signal.SIGINT in stops else RESUMABLE
        try:
            run.start()
            code = _wait_for(run.command, received)
        except UserError as error:
            log.error(one_line(f"{run.label}: {error}"))
            code = error.exit_code
        if code and (STOPS & received or code in (RESUMABLE, INTERRUPTED)):
            log.info(f"{run.label}: stopped; the same command goes on there")
            return code
        run.end(code)
        failed = code or failed
    return failed


def _wait_for(command: list[str], received: set[int]) -> int:
    """Run a command and pass signals on to it, which are added to `received`.

    Returns its exit code, 128 + N where signal N ended it.
    """
    # Where this process is killed, the run ends too. It would train beside the next start.
    die_too = partial(signals.die_with_parent, os.getpid())
    process = subprocess.Popen(command, preexec_fn=die_too)
    while process.poll() is None:
        if signal_info := signal.sigtimedwait(SIGNALS, POLL_SECONDS):
            received.add(signal_info.si_signo)
            process.send_signal(signal_info.si_signo)
    code = process.returncode
    return code if code >= 0 else 128 - code


def run_row(action: str, number: str, table: str, flags: list[str]) -> None:
    """One step of an element of launch/slurm/array.sbatch."""
    rows = read_table(Path(table))
    if not (number.isdecimal() and 1 <= int(number) <= len(rows)):
        problem = f"has {len(rows)} rows and no row {number}"
        raise UserError(f"{table}: {problem}; start it with --array=1-{len(rows)}")
    run = RowRun(rows, int(number), flags)

    def end(code: int) -> None:
        num_ended, lines = run.end(code)
        num_started = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
        if num_ended >= min(num_started, len(rows)):
            print("\n".join(lines), flush=True)

    if action == "start":
        try:
            run.start()
        except UserError as error:
            end(error.exit_code)
            raise
    elif action == "run":
        os.execvp("bash", run.command)
    else:
        end(int(os.environ["VICO_EXIT_CODE"]))


def main(action: str, words: list[str]) -> int:
    if action != "all":
        run_row(action, words[0], words[1] if len(words) > 1 else "", words[2:])
        return 0
    if not words or words[0].startswith("-"):
        raise UserError("the table comes first: bash launch/sweep.sh TABLE FLAGS")
    return run_all(Path(words[0]), words[1:])


def _parse(flags: list[str]) -> configs.RunConfig:
    return command_line.parse(flags, "vico train", "").resolve()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
    except UserError as error:
        log.error(one_line(str(error)))
        sys.exit(error.exit_code)
