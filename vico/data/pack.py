"""Features of any kind, written once as a file that can be memory-mapped."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vico.data.feature_files import describe, files_of, open_container
from vico.data.video_ids import VideoIds
from vico.errors import DiskError, UserError, fail, show
from vico.io import log
from vico.io.atomic import require_writable
from vico.io.paths import MAX_BYTES
from vico.io.safe_load import is_float_tensor

KINDS = (".safetensors", ".pth")


def pack(source: Path, target: Path) -> int:
    """Write the features at `source` to `target`, which must not exist.

    Returns the number of videos. Raises UserError or DiskError.
    """
    if target.suffix not in KINDS:
        raise UserError(f"{target}: the target's name must end in {' or '.join(KINDS)}")
    if os.path.lexists(target):
        raise UserError(f"{target}: already exists; name another target, or remove it")
    require_writable(target.parent, "the target's folder")
    container = open_container(source, files_of(source), MAX_BYTES)
    progress = log.ProgressLog(lambda _: None, is_main=True)
    videos: dict[str, Tensor] = {}
    keys = VideoIds(container.keys(), source).keys
    for text, key in keys.items():
        value = container.value(key)
        if not is_float_tensor(value) or value.ndim != 2 or not value.numel():
            fail(
                f"{source}: {show(text)} is {describe(value)}, no floating-point tensor "
                "[frames >= 1, width]; correct it, or leave it out"
            )
        container.verify(key)
        # A copy of its own: neither format may hold views of shared memory.
        videos[text] = value.clone(memory_format=torch.contiguous_format)
        progress(f"{source}: {len(videos)} of {len(keys)} videos")
    _write(videos, target)
    return len(videos)


def _write(videos: dict[str, Tensor], target: Path) -> None:
    """Under another name first: `target` is whole, or not there. Raises DiskError."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.suffix == ".pth":
            torch.save(videos, temporary)
        else:
            save_file(videos, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except Exception as problem:  # both libraries report a full disk as errors of their own
        reason = str(problem).partition("\n")[0]
        raise DiskError(f"{target}: cannot be written ({reason}); free some space") from None
    finally:
        temporary.unlink(missing_ok=True)
