"""What a run shows and keeps: progress on the terminal, steps.jsonl and log.txt, TensorBoard curves, memory."""

import contextlib
import json
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vico.errors import DiskError, UserError
from vico.io.atomic import REMEDY, write_lines


class RunLog:
    """steps.jsonl, log.txt and TensorBoard of one output_dir, written by the main rank.

    A run that resumes at `step` drops what was logged after it: those steps are done again. A step that could not be
    logged leaves its `error`, for only the main rank meets it, and the ranks must end together.
    """

    def __init__(
        self, output_dir: Path, found: "Logs", step: int, evaluation_due: bool = False
    ) -> None:
        self._steps, self._epochs = output_dir / "steps.jsonl", output_dir / "log.txt"
        self.error: UserError | None = None
        from torch.utils.tensorboard import SummaryWriter

        with _writing(output_dir):
            self.num_dropped = max(0, found.last_step - step)  # steps that are done again
            for path, records, last in (
                (self._steps, found.steps, step),
                (self._epochs, found.epochs, step - evaluation_due),
            ):
                write_lines(path, [record for record in records if record["step"] <= last])
            self._board = SummaryWriter(
                str(output_dir / "runs"), purge_step=step + 1 if step else None
            )

    def step(self, record: dict[str, Any], curves: dict[str, float]) -> None:
        try:
            with _writing(self._steps.parent):
                _append(self._steps, record)
                self._curves(curves, record["step"])
        except UserError as error:
            self.error = error

    def epoch(self, record: dict[str, Any], curves: dict[str, float]) -> None:
        if self.error is not None:
            raise self.error
        with _writing(self._epochs.parent):
            _append(self._epochs, record)
            self._curves(curves, record["step"])
            self._board.flush()

    def saved(self, step: int, seconds: float) -> None:
        """For so long the ranks did nothing but save."""
        with _writing(self._steps.parent):
            self._curves({"perf/save_seconds": seconds}, step)

    def close(self) -> None:
        with _writing(self._steps.parent):
            self._board.close()

    def _curves(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise DiskError(
            f"{problem.filename or folder}: cannot be written ({problem.strerror}); {REMEDY}"
        ) from None


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines log; the last one may have been cut off by a kill."""
    if not path.exists():
        return []
    records = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as problem:
        raise UserError(
            f"{path}: cannot be read ({problem.strerror}); move it away, or choose another --output_dir"
        ) from None
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


@dataclass(frozen=True)
class Logs:
    """What the run there has logged."""

    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]

    @property
    def last_step(self) -> int:
        """0: none."""
        return max((record["step"] for record in self.steps), default=0)


def read_logs(output_dir: Path) -> Logs:
    return Logs(read_records(output_dir / "steps.jsonl"), read_records(output_dir / "log.txt"))


def gaps(
    output_dir: Path,
    found: Logs,
    step: int,
    evaluation_due: bool,
    steps_per_epoch: int,
    from_start: bool,
) -> list[str]:
    """A line for each log that lacks what the run has done up to `step`. `from_start`: it began at step 1, and not at another run's."""
    logged = [{record["step"] for record in records} for records in (found.steps, found.epochs)]
    first = 1 if from_start else min(logged[0], default=step + 1)
    done = range(first, step + 1)
    epochs = [end for end in done if end % steps_per_epoch == 0 and end <= step - evaluation_due]
    lines = []
    for name, has, should, unit in zip(
        ("steps.jsonl", "log.txt"), logged, (done, epochs), ("step", "epoch"), strict=True
    ):
        if lost := sum(number not in has for number in should):
            lines.append(
                f"{output_dir / name}: lacks {lost} of {len(should)} {unit}(s) up to step {step}, which are not done again for it"
            )
    return lines


def memory_curves(device: torch.device) -> dict[str, float]:
    """Peak memory of this process in GiB: of the host, and of the GPU where there is one."""
    peaks = {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.type == "cuda":
        peaks["memory/device_peak_allocated_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        peaks["memory/device_peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return peaks
