"""The features of each video on disk until all are there: a killed extraction starts from them.

F.pth.parts/settings.json   by which encoder and at which rate they were made
F.pth.parts/STAMP.npy       a video's features; STAMP changes when the video is replaced
"""

import io
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from vico.data.pack import KINDS, save_torch, write_safetensors
from vico.errors import DiskError, UserError, fail, show
from vico.io.atomic import make_folder, replacing, write_bytes, write_folder, write_json
from vico.io.output_dir import OutputDir
from vico.io.paths import entries, exists, open_to_read
from vico.io.text import read_json_object
from vico.video.listing import Video

SUFFIX, SETTINGS = ".parts", "settings.json"
# The system lets a process map 65,530 files. The parts of more videos are read into memory.
MAX_MAPPED = 60_000


class Parts:
    """Parts of the features at `output`, a file, or a folder with a file per video."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(output.name + SUFFIX)

    def begin(self, settings: Mapping[str, Any]) -> list[str]:
        """Become the only writer. For rank 0. Returns notes.

        Raises UserError if the parts that are there have other settings, or if there are none and
        `output` exists; InUseError, DiskError.
        """
        path = self.folder / SETTINGS
        if not exists(self.folder) and exists(self.output):
            fail(f"--output {self.output}: exists already; name another, or remove it")
        make_folder(self.folder)
        notes = OutputDir(self.folder).claim()
        if not exists(path):
            write_json(path, settings)
            return notes
        before = read_json_object(path, "the settings of the parts")
        for key in {**settings, **before}:
            if before.get(key) != settings.get(key):
                fail(
                    f"{self.folder}: its features have {key} {show(before.get(key))}, not "
                    f"{show(settings.get(key))}; remove that folder, or name another --output"
                )
        return notes

    def path(self, video: Video, is_damaged: bool = False) -> Path:
        """The features of what could be decoded of a damaged video are made anew each time."""
        return self.folder / f"{video.stamp}{'.damaged' if is_damaged else ''}.npy"

    def write(self, video: Video, features: Tensor, is_damaged: bool) -> None:
        """Atomic. Raises DiskError."""
        data = io.BytesIO()
        np.save(data, features.numpy())
        write_bytes(self.path(video, is_damaged), data.getvalue())

    def missing(self, videos: Iterable[Video]) -> list[Video]:
        return [video for video in videos if not exists(self.path(video))]

    def assemble(self, videos: Sequence[Video], damaged: Mapping[str, str]) -> None:
        """Write `output`. Raises DiskError; UserError for a part that cannot be read."""
        files = {video.id: self.path(video, video.id in damaged) for video in videos}
        if self.output.suffix in KINDS:
            mode = "c" if len(files) <= MAX_MAPPED else None
            features = {key: torch.from_numpy(_load(path, mode)) for key, path in files.items()}
            whole = self.folder / f"all{self.output.suffix}"  # a killed run leaves nothing beside
            with replacing(whole) as file:
                _write(features, self.output.suffix, file)
            try:
                whole.replace(self.output)
            except OSError as problem:
                reason = problem.strerror
                raise DiskError(f"{self.output}: cannot be written ({reason})") from None
            return

        def fill(folder: Path) -> None:
            for key, path in files.items():
                shutil.copyfile(path, folder / f"{key}.npy")

        write_folder(self.output, fill)

    def remove(self) -> None:
        """The settings last: parts without them would be anybody's. Raises DiskError."""
        settings = self.folder / SETTINGS
        try:
            for path in entries(self.folder):
                if path != settings:
                    path.unlink()
            settings.unlink()
            self.folder.rmdir()
        except OSError as problem:
            raise DiskError(f"{self.folder}: cannot be removed ({problem.strerror})") from None


def _write(features: Mapping[str, Tensor], suffix: str, file: IO[bytes]) -> None:
    """Raises OSError."""
    if suffix == ".safetensors":
        kinds = {key: (value.dtype, tuple(value.shape)) for key, value in features.items()}
        write_safetensors(kinds, lambda key: features[key], file)
    else:
        save_torch(features, file)


def _load(path: Path, mode: Any) -> Any:
    try:
        with open_to_read(path):
            return np.load(path, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError) as problem:
        reason = str(problem).partition("\n")[0]
        raise UserError(f"{path}: cannot be read ({reason}); remove it and start again") from None
