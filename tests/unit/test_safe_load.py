"""Torch files are read as data: nothing in them is executed, and damage is recognised."""

import argparse
import os
import pickle
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from support.errors import refusal
from support.feature_files import numbered, save
from vico.data.features import Features
from vico.errors import CheckpointError
from vico.io import safe_load
from vico.io.safe_load import StoredChecksums, load_tensors
from vico.model.config import FEATURE_WIDTH


class Payload:
    """Pickled, this is a call of os.mkdir with the canary's path."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.canary),)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    save(tmp_path / "zip.pth", {"v": Payload(canary)})
    save(tmp_path / "old.pth", {"v": Payload(canary)}, _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"v": Payload(canary)}))
    for name in ("zip.pth", "old.pth"):
        path = tmp_path / name
        message = refusal(load_tensors, path, "the checkpoint", allow_old_format=True)
        assert f"{path}: the checkpoint holds the Python object posix.mkdir, refused" in message
        assert "tensors" in message
    message = refusal(load_tensors, tmp_path / "plain.pth", "the checkpoint", allow_old_format=True)
    assert "is no torch file" in message
    assert not canary.exists()


def test_allowed_classes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", {"args": argparse.Namespace(bias=3)})
    assert load_tensors(path, "the checkpoint", [argparse.Namespace])["args"].bias == 3
    assert "argparse.Namespace" in refusal(load_tensors, path, "the checkpoint")
    with pytest.raises(CheckpointError):
        load_tensors(path, "the checkpoint", error=CheckpointError)


def test_old_format(tmp_path: Path) -> None:
    path = save(tmp_path / "old.pth", {"v": numbered(4)}, _use_new_zipfile_serialization=False)
    message = refusal(Features, path)
    assert "old format, which cannot be memory-mapped; convert it: python -c" in message
    assert torch.equal(load_tensors(path, "the shard", allow_old_format=True)["v"], numbered(4))
    path.write_bytes(path.read_bytes()[:5000])
    message = refusal(load_tensors, path, "the shard", allow_old_format=True)
    assert "the shard is cut off or damaged" in message


NOT_TORCH_FILES = [
    (
        b"\n<!doctype HTML><title>Quota exceeded</title>",
        "is an HTML page (45 bytes), most likely a failed download; fetch it again",
    ),
    (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "is a git-lfs pointer (56 bytes), not the file itself; run 'git lfs pull'",
    ),
    (
        b'{"error": "not found"}',
        "is no torch file (it begins with b'{\"error\"'); fetch the right one",
    ),
    (b"", "is cut off or damaged; fetch or copy it again and compare the sizes (0 bytes)"),
]


@pytest.mark.parametrize("content, part", NOT_TORCH_FILES)
def test_failed_downloads(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "f.pth").write_bytes(content)
    message = refusal(Features, tmp_path / "f.pth")
    assert f"{tmp_path}/f.pth: the video feature file {part}" in message


def test_other_zips(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("a/readme.txt", "x")
    assert "is a zip archive, but not one of tensors" in refusal(Features, tmp_path / "other.pth")
    plain = zipfile.ZipFile(save(tmp_path / "f.pth", {"v": numbered(3)}))
    with zipfile.ZipFile(tmp_path / "deflated.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in plain.infolist():
            archive.writestr(entry.filename, plain.read(entry))
    assert "was packed again" in refusal(Features, tmp_path / "deflated.pth")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    message = refusal(Features, tmp_path / "none.pth")
    assert "no such file; the video feature file should be there" in message
    assert "the folder holds no .npy" in refusal(Features, tmp_path)
    folder = refusal(load_tensors, tmp_path, "the file")
    assert "cannot be opened (Is a directory)" in folder


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "f.pth", {"v": numbered(4), "w": numbered(2)}).read_bytes()
    path = tmp_path / "cut.pth"
    everywhere = range(0, len(whole), len(whole) // 40)
    at_the_ends = (0, 1, 3, 4, 10, len(whole) - 22, len(whole) - 1)
    for size in {*everywhere, *at_the_ends}:
        path.write_bytes(whole[:size])
        message = refusal(Features, path)
        problem = "the video feature file is cut off or damaged; fetch or copy it again"
        assert f"{path}: {problem}" in message, size


def test_a_damaged_name_in_a_header(tmp_path: Path) -> None:
    """zipfile decodes the names of parts when it reads them, which is first done for checksums."""
    path = save(tmp_path / "a.pth", {"v": torch.ones(2, FEATURE_WIDTH)})
    data = path.read_bytes()
    place = data.index(b"version")  # in the header of that part; the directory is at the end
    path.write_bytes(data[:place] + b"\xb7" + data[place + 1 :])
    message = refusal(StoredChecksums(path, "the file").verify, "v", torch.ones(2, FEATURE_WIDTH))
    assert message.startswith(f"{path}: the file is cut off or damaged; fetch or copy it again")


def test_threads_keep_what_each_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of allowed classes is the process's: the end of one load may not end another's."""
    path, allowed = tmp_path / "a.pth", [argparse.Namespace]
    save(path, {"args": argparse.Namespace(lr=1.0)})
    before, load = set(torch.serialization.get_safe_globals()), safe_load._load_zip

    def load_slowly(path: Path) -> tuple[Any, str | None]:
        time.sleep(0.05)
        return load(path)

    def load_later(delay: float) -> float:
        time.sleep(delay)
        return float(load_tensors(path, "the file", allowed)["args"].lr)

    monkeypatch.setattr(safe_load, "_load_zip", load_slowly)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(load_later, (0.0, 0.02))) == [1.0, 1.0]
    assert set(torch.serialization.get_safe_globals()) == before, "nothing stays allowed"
