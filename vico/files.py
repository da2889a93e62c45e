"""Writing files that are whole or not there: a temporary name beside the target, flushed to the disk, then renamed."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vico.errors import UserError


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    _flush_folder(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """`fill` writes files into a new folder, which then takes the place of `target` (an older one is removed after)."""
    temporary, old = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _flush_folder(temporary)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); free space or mend the permissions, then start again") from None
    _flush_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def mend_folders(parent: Path) -> None:
    """Undo what a run that was killed inside `write_folder` left: half-written folders go, a replaced one comes back."""
    for old in parent.glob(".*.old"):
        target = parent / old.name[1 : -len(".old")]
        if not target.exists():
            old.rename(target)
        else:
            shutil.rmtree(old, ignore_errors=True)
    for temporary in parent.glob(".*.tmp"):
        shutil.rmtree(temporary, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
