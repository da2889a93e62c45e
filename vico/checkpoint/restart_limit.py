"""Stops a run that keeps failing at the same step: a scheduler would restart it forever.

attempts.json in the output_dir holds the step that the latest start began at, and how many starts
in a row failed there.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

from vico.errors import TrainingError, UserError
from vico.io.atomic import write_json
from vico.io.digest import digest_json
from vico.io.output_dir import OutputDir
from vico.io.text import read_json_object

MAX_FAILURES = 3
DIGEST_LENGTH = 16


def record_start(output_dir: OutputDir, settings: Mapping[str, Any], step: int) -> None:
    """Count a start of the run with `settings` at `step`, the number of steps done before.

    Other settings start a new count. Raises TrainingError after MAX_FAILURES failures.
    """
    path = output_dir.attempts
    digest = digest_json(settings, DIGEST_LENGTH)
    previous = _read(output_dir)
    failures = 0
    if previous.get("settings") == digest:
        is_same_step = previous.get("step") == step
        failures = 1 + (previous.get("failures", 0) if is_same_step else 0)
    if failures >= MAX_FAILURES:
        raise TrainingError(
            f"{output_dir}: step {step + 1} has failed {failures} times in a row, so this start "
            "would fail too; the output of those starts says why; change the settings, or remove "
            f"{path} to try again without a change"
        )
    write_json(path, {"step": step, "failures": failures, "settings": digest})


def clear(output_dir: OutputDir) -> None:
    """The run ended without a failure: forget the count."""
    # The folder may be gone, or no longer writable.
    with contextlib.suppress(OSError):
        output_dir.attempts.unlink(missing_ok=True)


def _read(output_dir: OutputDir) -> dict[str, Any]:
    path = output_dir.attempts
    try:
        return read_json_object(path, path.name) if path.exists() else {}
    except UserError:
        return {}
