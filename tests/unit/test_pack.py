"""`vico data pack`: streamed to the disk, whole or not there, and HDF5 in NExT-QA's layout."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from support.errors import refusal
from support.feature_files import questions_about, save
from support.processes import ROOT, base_environment, run_command
from vico.data import pack as packing
from vico.data.features import Features
from vico.data.pack import pack
from vico.errors import DiskError

# Prints by how many bytes the peak of memory grows.
PEAK = """
import resource, sys
from pathlib import Path
from vico.data import pack
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
pack.RELEASE_BYTES = 1 << 23
pack.pack(Path(sys.argv[1]), Path(sys.argv[2]))
before = peak()
pack.pack(Path(sys.argv[3]), Path(sys.argv[4]))
print(peak() - before)
"""


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_types_and_ids_stay(tmp_path: Path, suffix: str) -> None:
    """The numbers bit for bit, each type at a multiple of its size, whatever the widths."""
    videos: dict[Any, Any] = {
        "a/v1.mp4": torch.randn(3, 5).half(),
        7: torch.randn(1, 5),
        "double": torch.randn(3, 5).double(),
        "\u732b \u00e9": torch.randn(7, 5).bfloat16(),
        "view": torch.randn(9, 10)[:, ::2],
    }
    source, target = save(tmp_path / "f.pth", videos), tmp_path / f"out{suffix}"
    assert pack(source, target) == 5
    packed = load_file(target) if suffix == ".safetensors" else torch.load(target)
    assert packed.keys() == {str(key) for key in videos}
    for key, frames in videos.items():
        assert packed[str(key)].dtype == frames.dtype and torch.equal(packed[str(key)], frames)
        assert packed[str(key)].data_ptr() % frames.dtype.itemsize == 0
    assert Features(target).check(questions_about(("v1", None), ("7", None))) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((source.name, target.name))


def test_memory_holds_a_part(tmp_path: Path) -> None:
    """A tenth of what is packed, where it was twice as much."""
    videos = {str(i): torch.zeros(340, 768) for i in range(120)}
    source, small = save(tmp_path / "f.pth", videos), save(tmp_path / "s.pth", {"v": videos["0"]})
    del videos
    paths = [small, tmp_path / "s.safetensors", source, tmp_path / "f.safetensors"]
    command = [sys.executable, "-c", PEAK, *map(str, paths)]
    run = run_command(command, ROOT, base_environment())
    assert int(run.stdouts[0].splitlines()[-1]) < 0.3 * source.stat().st_size, run.output


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_an_error_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    source = save(tmp_path / "f.pth", {"a": torch.ones(2, 4)})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "write_safetensors", full)
    with pytest.raises(DiskError, match="cannot be written \\(No space left on device: "):
        pack(source, tmp_path / f"out{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == ["f.pth"]


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    source, other = save(tmp_path / "f.pth", {"a": torch.ones(2, 4)}), tmp_path / "mine"
    other.write_text("mine")
    (tmp_path / f".out.safetensors.{os.getpid()}.vico-tmp").symlink_to(other)
    assert pack(source, tmp_path / "out.safetensors") == 1
    assert other.read_text() == "mine" and not (tmp_path / "out.safetensors").is_symlink()


# ---- [videos, frames, width] and ids
# -------------------------------------------------------------------------------------------


def rows_h5(path: Path, ids: Any, rows: np.ndarray, **options: Any) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["ids"] = ids
        file.create_dataset("feat", data=rows, **options)
    return path


IDS: dict[str, Any] = {
    "numbers": np.array([4010, 7]),
    "floats": np.array([4010.0, 7.0]),
    "bytes": np.array([b"4010", b"7"]),
    "texts": ["4010", "a/7.mp4"],
}


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"chunks": (1, 2, 5)}])
@pytest.mark.parametrize("kind", IDS)
def test_a_row_for_each_video(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    rows = np.random.default_rng(1).standard_normal((2, 3, 5)).astype("<f4")
    features = Features(rows_h5(tmp_path / "f.h5", IDS[kind], rows, **options))
    assert features.width == 5 and len(features) == 2
    assert features.check(questions_about(("4010", None), ("7", (1, 3)))) == 0
    for row, video in enumerate(("4010", "7")):
        assert torch.equal(features.frames(video), torch.from_numpy(rows[row]))
        features.verify(video)
    assert any("a video is a row of 'feat'" in note for note in features.notes)
    assert pack(tmp_path / "f.h5", tmp_path / "out.safetensors") == 2
    assert torch.equal(Features(tmp_path / "out.safetensors").frames("7"), features.frames("7"))


def test_rows_and_ids_that_do_not_fit(tmp_path: Path) -> None:
    rows = np.ones((2, 3, 5), "f4")
    message = refusal(Features, rows_h5(tmp_path / "a.h5", [1, 2, 3], rows))
    assert "'ids' holds 3 ids, and 'feat' 2 videos" in message
    assert "two entries are called '7'" in refusal(
        Features, rows_h5(tmp_path / "b.h5", [7, 7], rows)
    )
    assert "holds no video" in refusal(Features, rows_h5(tmp_path / "n.h5", [], rows[:0]))
    damaged = rows_h5(tmp_path / "c.h5", [b"\xff", b"a"], rows)
    assert "'ids' cannot be read" in refusal(Features, damaged)
    other = Features(rows_h5(tmp_path / "d.h5", [1, 2], np.ones((2, 3), "f4")))
    assert "ids are like 'feat'" in refusal(other.check, questions_about(("1", None)))
