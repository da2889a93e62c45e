"""What a run logs: steps.jsonl, log.txt, and curves for the reporters."""

import contextlib
import json
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vico.errors import DiskError, UserError
from vico.io.atomic import REMEDY, write_lines
from vico.io.output_dir import OutputDir
from vico.io.paths import append_text, exists, read_bytes
from vico.train.heat_map import Picture
from vico.train.reporters import Reporters

Record = dict[str, Any]


@dataclass(frozen=True)
class Logs:
    """The records that an output_dir holds of its run."""

    steps: list[Record]
    epochs: list[Record]

    @property
    def last_step(self) -> int:
        """The last step logged; 0: none."""
        return max((record["step"] for record in self.steps), default=0)


class RunLog:
    """The logs of one output_dir, written by rank 0.

    A run that resumes at `step` drops the records of later steps, which it repeats. When a step
    cannot be logged, `error` keeps the reason. Only rank 0 knows it, and the ranks must end
    together, so train_step raises it on all.
    """

    def __init__(
        self,
        output_dir: OutputDir,
        logs: Logs,
        step: int,
        evaluation_due: bool = False,
        open_reporters: Callable[[int], Reporters] | None = None,
    ) -> None:
        """`open_reporters`: is given the last step that was logged; None: there are no curves."""
        self._dir = output_dir
        self.error: UserError | None = None
        self.args_due: Record | None = None  # args.json of a resumed run, written at its first save
        self.num_dropped = max(0, logs.last_step - step)  # steps to repeat
        self._logged_epochs = {record["step"] for record in logs.epochs}
        with _disk_errors(output_dir.path):
            write_lines(output_dir.steps, [r for r in logs.steps if r["step"] <= step])
            last = step - evaluation_due
            write_lines(output_dir.epochs, [r for r in logs.epochs if r["step"] <= last])
        self._reporters = open_reporters(logs.last_step) if open_reporters else None

    def step(self, record: Record, curves: dict[str, float]) -> None:
        try:
            with _disk_errors(self._dir.path):
                _append(self._dir.steps, record)
        except UserError as error:
            self.error = error
        if self._reporters is not None and curves:
            self._reporters.curves(curves, record["step"])

    def epoch(self, record: Record, curves: dict[str, float], gates: Picture | None = None) -> None:
        """Log an epoch. Raises DiskError, also that of an earlier step."""
        if self.error is not None:
            raise self.error
        step = record["step"]
        with _disk_errors(self._dir.path):
            _append(self._dir.epochs, record)
        if self._reporters is not None:
            again = step in self._logged_epochs
            self._reporters.curves(curves, step, again)
            if gates is not None:
                self._reporters.picture("gates", gates, step, again)
            self._reporters.flush()

    def saved(self, step: int, seconds: float) -> None:
        """Log how long a save kept the ranks from training."""
        if self._reporters is not None:
            self._reporters.curves({"perf/save_seconds": seconds}, step)

    def close(self) -> None:
        if self._reporters is not None:
            self._reporters.close()


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        path = problem.filename or folder
        raise DiskError(f"{path}: cannot be written ({problem.strerror}); {REMEDY}") from None


def _append(path: Path, record: Record) -> None:
    append_text(path, json.dumps(record) + "\n")


def read_logs(output_dir: OutputDir) -> Logs:
    return Logs(read_records(output_dir.steps), read_records(output_dir.epochs))


def read_records(path: Path) -> list[Record]:
    """The complete lines of a JSON-lines log. A kill may have cut off the last one."""
    return read_records_and_damage(path)[0]


def read_records_and_damage(path: Path) -> tuple[list[Record], int]:
    """The complete lines of a JSON-lines log, and how many others there are."""
    if not exists(path):
        return [], 0
    try:
        text = read_bytes(path).decode(errors="replace")
    except OSError as problem:
        raise UserError(
            f"{path}: cannot be read ({problem.strerror}); "
            "move it away, or choose another --output_dir"
        ) from None
    records = []
    lines = text.splitlines()
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records, len(lines) - len(records)


def gaps(
    output_dir: OutputDir,
    logs: Logs,
    step: int,
    evaluation_due: bool,
    steps_per_epoch: int,
    from_start: bool,
) -> list[str]:
    """A line for each log that lacks records up to `step`.

    `from_start`: the run began at step 1, not at a checkpoint of another run.
    """
    logged_steps = {record["step"] for record in logs.steps}
    logged_epochs = {record["step"] for record in logs.epochs}
    first = 1 if from_start else min(logged_steps, default=step + 1)
    steps = range(first, step + 1)
    last_epoch_end = step - evaluation_due
    first_epoch_end = -(-first // steps_per_epoch) * steps_per_epoch
    epoch_ends = range(first_epoch_end, last_epoch_end + 1, steps_per_epoch)
    lines = []
    for path, logged, expected, unit in (
        (output_dir.steps, logged_steps, steps, "step"),
        (output_dir.epochs, logged_epochs, epoch_ends, "epoch"),
    ):
        if lost := len(expected) - sum(number in expected for number in logged):
            lines.append(
                f"{path}: lacks {lost} of {len(expected)} {unit}(s) up to step {step}; "
                "they are not repeated"
            )
    return lines


def memory_curves(device: torch.device) -> dict[str, float]:
    """Peak memory of this process in GiB: of the host, and of the GPU where there is one."""
    peaks = {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.type == "cuda":
        peaks["memory/device_peak_allocated_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        peaks["memory/device_peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return peaks
