"""Reading checkpoints: our folders, a single .safetensors file, or a published .pth file.

Nothing in a file is executed.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from vico.checkpoint import published
from vico.checkpoint.format import (
    CONFIG,
    FORMAT,
    OPTIMIZER,
    REMEDY,
    STATE,
    WEIGHTS,
    Checkpoint,
    TrainState,
    with_checksum,
)
from vico.checkpoint.state_dict import adapter_tensors
from vico.errors import CheckpointError, show
from vico.io.digest import digest_bytes, digest_json
from vico.io.output_dir import OutputDir, step_of
from vico.io.paths import MAX_BYTES, entries, exists, is_folder, read_bytes
from vico.io.text import as_object, parse_json, read_text


def read(path: Path, run: str = "") -> Checkpoint:
    """The checkpoint at `path`. Raises CheckpointError when it cannot be used.

    `run`: the id of the run that must have written it, unless it records none. `settings` of the
    result are plain values, unchecked.
    """
    if not exists(path, CheckpointError):
        raise CheckpointError(
            f"{path}: no such checkpoint; --resume takes a checkpoint folder or a .pth file"
        )
    if is_folder(path, CheckpointError):
        return _read_folder(path, run)
    if path.suffix == ".safetensors":
        tensors, digest = _read_safetensors(path)
        weights, notes = adapter_tensors(tensors, path)
        return Checkpoint(path, weights, digest=digest, notes=notes)
    return published.read(path)


def _read_folder(path: Path, run: str) -> Checkpoint:
    if exists(path / CONFIG, CheckpointError) and not exists(path / STATE, CheckpointError):
        return _read_export(path)
    record = _read_state(path / STATE)
    state = TrainState(**record["progress"])
    if step_of(path) not in (None, state.step):
        raise CheckpointError(
            f"{path}: holds the checkpoint of step {state.step}, so it was renamed or copied over; "
            f"{REMEDY}"
        )
    if run and record.get("run", run) != run:
        raise CheckpointError(
            f"{path}: is of another run ({show(record['run'])} and not {run}), so it was copied "
            "here; move it away"
        )
    names = {entry.name for entry in entries(path, error=CheckpointError)}
    # Hidden files come and go: a desktop's .DS_Store, the .nfs* file of one that is still open.
    extra = {name for name in names if not name.startswith(".")} - {WEIGHTS, OPTIMIZER, STATE}
    if extra:
        raise CheckpointError(
            f"{path}: holds '{min(extra)}', which is no part of a checkpoint; move it away"
        )
    weights, _ = _read_safetensors(path / WEIGHTS, record["files"][WEIGHTS])
    moments, _ = _read_safetensors(path / OPTIMIZER, record["files"][OPTIMIZER])
    fingerprints = dict(record.get("fingerprints", {}))
    # The record holds the digests of the two files, which have just been compared.
    digest = digest_json(record)
    return Checkpoint(path, weights, moments, state, record["settings"], fingerprints, digest)


def _read_state(path: Path) -> dict[str, Any]:
    """The content of a state.json. Raises CheckpointError for a wrong checksum or entry."""
    if not exists(path, CheckpointError):
        is_run = OutputDir(path.parent).has_run()
        hint = (
            "this run has saved no checkpoint"
            if is_run
            else "a checkpoint is a folder with state.json"
        )
        raise CheckpointError(f"{path}: no such file; {hint}")
    text = read_text(path, "the state of the checkpoint", CheckpointError)
    record = as_object(parse_json(text, path, 1, CheckpointError), path, CheckpointError)
    record.pop("sha256", None)
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: 'format' is {show(record.get('format'))} and not {FORMAT}, "
            f"so another version wrote it; {REMEDY}"
        )
    if text != with_checksum(record):
        raise CheckpointError(f"{path}: damaged (its sha256 is not the recorded one); {REMEDY}")
    _check_entries(record, path)
    return record


def _read_export(path: Path) -> Checkpoint:
    """A folder of `vico export`: weights alone, with the settings and fingerprints of their run."""
    config = path / CONFIG
    text = read_text(config, "the export's record", CheckpointError)
    content = as_object(parse_json(text, config, 1, CheckpointError), config, CheckpointError)
    mapping = content.get("auto_mapping")
    record = mapping.get("vico") if isinstance(mapping, dict) else None
    if not isinstance(record, dict):
        raise CheckpointError(
            f"{config}: is of another kind of adapter ('peft_type' is "
            f"{show(content.get('peft_type'))}): it has no 'vico' in 'auto_mapping'; "
            "name a folder of `vico export`"
        )
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"{config}: 'format' is {show(record.get('format'))} and not {FORMAT}, so another "
            "version wrote it; export again with this one"
        )
    files = _section(record, "files", config)
    recorded = _section(files, WEIGHTS, config)
    settings = _section(record, "settings", config)
    fingerprints = _section(record, "fingerprints", config)
    if wrong := [name for name, value in fingerprints.items() if not isinstance(value, str)]:
        raise CheckpointError(f"{config}: {show(wrong[0])} is no text; fetch or export it again")
    weights, _ = _read_safetensors(path / WEIGHTS, recorded)
    digest = digest_json(record)
    return Checkpoint(path, weights, settings=settings, fingerprints=fingerprints, digest=digest)


def _section(record: Mapping[str, Any], name: str, config: Path) -> dict[str, Any]:
    section = record.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(
            f"{config}: '{name}' is {show(section)} and must be an object; fetch or export it again"
        )
    return section


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


STATE_RULES = {
    "step": _is_count,
    "questions_per_step": _is_count,
    "num_updates": _is_count,
    "best_accuracy": lambda value: value is None or _is_number(value),
    "epoch_loss_sums": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "epoch_target_counts": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    "evaluation_due": lambda value: isinstance(value, bool),
}


def _check_entries(record: Mapping[str, Any], path: Path) -> None:
    """A right checksum shows that the file is unchanged, not that its entries are valid."""
    sections = {
        "progress": record.get("progress"),
        "settings": record.get("settings"),
        "files": record.get("files"),
        "fingerprints": record.get("fingerprints", {}),
    }
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise CheckpointError(
                f"{path}: '{name}' is {show(section)} and must be an object; {REMEDY}"
            )
    wrong = _wrong_entries(sections)
    if wrong:
        raise CheckpointError(
            f"{path}: the entry {show(wrong[0])} is missing, unknown or of another kind; {REMEDY}"
        )


def _wrong_entries(sections: Mapping[str, Any]) -> list[str]:
    progress, files = sections["progress"], sections["files"]
    wrong = []
    for name in {**STATE_RULES, **progress}:
        rule = STATE_RULES.get(name)
        if rule is None or name not in progress or not rule(progress[name]):
            wrong.append(name)
    wrong += [name for name in (WEIGHTS, OPTIMIZER) if not isinstance(files.get(name), dict)]
    fingerprints = sections["fingerprints"]
    return wrong + [name for name, value in fingerprints.items() if not isinstance(value, str)]


def _read_safetensors(
    path: Path, recorded: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and the sha256 of its bytes.

    `recorded`: its size and sha256. They are checked on the same bytes that are then parsed.
    """
    size = None if recorded is None else recorded.get("bytes")
    try:
        data = read_bytes(path, min(size, MAX_BYTES) if _is_count(size) else MAX_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: damaged ({error.strerror}); {REMEDY}") from None
    digest = digest_bytes(data)
    fault = "" if recorded is None else _difference(len(data), digest, recorded)
    if not fault:
        try:
            return safetensors.torch.load(data), digest
        except SafetensorError as error:
            fault = str(error)
    raise CheckpointError(f"{path}: damaged ({fault}); {REMEDY}")


def _difference(num_bytes: int, digest: str, recorded: Mapping[str, Any]) -> str:
    if num_bytes != recorded.get("bytes"):
        return f"{num_bytes} of {show(recorded.get('bytes'))} bytes"
    if digest != recorded.get("sha256"):
        return "its sha256 is not the recorded one"
    return ""
