"""Stops a run that keeps failing at the same step: a scheduler would restart it forever.

attempts.json in the output_dir holds the step that the latest start began at, and how many starts
in a row reported a failure there. A start that was killed from outside (a spot machine, a user)
reports nothing and is not counted: the next one saves sooner, so that such a run gets on too.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

from vico.checkpoint.format import TrainState
from vico.errors import TrainingError, UserError
from vico.io.atomic import write_json
from vico.io.digest import digest_json
from vico.io.output_dir import OutputDir
from vico.io.text import read_json_object

MAX_FAILURES = 3
DIGEST_LENGTH = 16
_entered: list[tuple[OutputDir, TrainState]] = []  # the run whose steps this process does


def record_start(
    output_dir: OutputDir, settings: Mapping[str, Any], last_step: int, from_step: int
) -> int | None:
    """Note a start of the run with `settings` from the checkpoint of `from_step`.

    `last_step`: the last step that earlier starts have done. Returns the step to save at, where an
    earlier start from this checkpoint was killed before its first save: after half of the steps
    that it did. Other settings start a new count. Raises TrainingError after MAX_FAILURES failures.
    """
    path = output_dir.attempts
    digest = digest_json(settings, DIGEST_LENGTH)
    previous = _read(output_dir)
    failures = 0
    if previous.get("settings") == digest and previous.get("step") == last_step:
        failures = previous.get("failures", 0)
    if failures >= MAX_FAILURES:
        raise TrainingError(
            f"{output_dir}: step {last_step + 1} has failed {failures} times in a row, so this "
            "start would fail too; the output of those starts says why; change the settings, or "
            f"remove {path} to try again without a change"
        )
    # A failure that a start reports is counted at the last step that it has done then.
    start = {"step": last_step, "failures": failures, "settings": digest, "from_step": from_step}
    write_json(path, start)
    was_killed = previous.get("from_step") == from_step and not previous.get("reported")
    return from_step + max(1, (last_step - from_step) // 2) if was_killed else None


def enter_steps(output_dir: OutputDir, state: TrainState) -> None:
    """From now on, until `leave_steps`, a failure of this process counts. On every rank.

    `state` is the run's own: its `step` counts on.
    """
    _entered[:] = [(output_dir, state)]


def leave_steps() -> None:
    _entered.clear()


def record_failure() -> None:
    """Count a failure that this process reports, if it has entered the steps of a run.

    On the rank that reports it: rank 0 may be ended by its launcher before it can.
    """
    for output_dir, state in _entered:
        record = _read(output_dir)
        if "settings" not in record or record.get("reported"):
            continue  # the folder of another host, or another rank has counted this failure
        failures = 1 + (record.get("failures", 0) if record.get("step") == state.step else 0)
        record |= {"step": state.step, "failures": failures, "reported": True}
        with contextlib.suppress(OSError, UserError):  # the error itself matters more
            write_json(output_dir.attempts, record)


def clear(output_dir: OutputDir) -> None:
    """The run ended without a failure: forget the count."""
    # There may be no count, or no folder, or it is no longer writable.
    with contextlib.suppress(OSError):
        output_dir.attempts.unlink()


def _read(output_dir: OutputDir) -> dict[str, Any]:
    path = output_dir.attempts
    try:
        return read_json_object(path, path.name)
    except UserError:  # also where there is none
        return {}
