"""Ends a run that fails at the same step again and again: a scheduler would start it for ever.

Beside the checkpoints lies how far the run had come when it was last begun, and how many starts in a row came no further.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from vico.errors import TrainingError, UserError
from vico.io.atomic import write_json
from vico.io.text import read_json_object
from vico.train.config import RunConfig

NAME = "attempts.json"
MAX_FAILURES = 3


def begin(output_dir: Path, config: RunConfig, step: int) -> None:
    """Count this start of a run that had come to `step`. Raises TrainingError instead of a fourth try."""
    path = output_dir / NAME
    settings = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode()).hexdigest()[
        :16
    ]
    before = _read(path)
    failures = 0
    if before.get("settings") == settings:  # other settings are a new try
        failures = 1 + (before.get("failures", 0) if before.get("step") == step else 0)
    if failures >= MAX_FAILURES:
        raise TrainingError(
            f"{output_dir}: step {step + 1} has failed {failures} times in a row, so this start would fail too; the output of those starts says "
            f"why; change the settings, or remove {path} to try as it is"
        )
    write_json(path, {"step": step, "failures": failures, "settings": settings})


def end(output_dir: Path) -> None:
    """The run has not failed."""
    with contextlib.suppress(OSError):  # a folder that has gone, or may not be written to any more
        (output_dir / NAME).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, NAME) if path.exists() else {}
    except UserError:
        return {}
