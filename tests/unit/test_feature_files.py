"""Features in every container, of any width: the same tensors; and files that are refused."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from support.errors import refusal
from support.feature_files import questions_about, save
from vico.data import feature_files
from vico.data.features import Features
from vico.data.pack import pack

Videos = dict[str, Tensor]


def h5(videos: Videos, path: Path, **options: Any) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, frames in videos.items():
            file.create_dataset(f"x/{name}.mp4", data=frames.numpy(), **options)


def each(write: Callable[[Tensor, Path], None], suffix: str) -> Callable[[Videos, Path], None]:
    def write_all(videos: Videos, path: Path) -> None:
        path.mkdir()
        for name, frames in videos.items():
            write(frames, path / f"{name}{suffix}")

    return write_all


KINDS: dict[str, Callable[[Videos, Path], Any]] = {
    "tensors.pth": torch.save,
    "arrays.pth": lambda v, path: save(path, {k: t.numpy() for k, t in v.items()}),
    "big_endian.pth": lambda v, path: save(
        path, {k: t.numpy().astype(">f4") for k, t in v.items()}
    ),
    "frames.pt": lambda v, path: save(path, {k: list(t) for k, t in v.items()}),
    "array_frames.pt": lambda v, path: save(path, {k: list(t.numpy()) for k, t in v.items()}),
    "numbers.pt": lambda v, path: save(path, {k: t.tolist() for k, t in v.items()}),
    "float64.pth": lambda v, path: save(path, {k: t.double() for k, t in v.items()}),
    "f.safetensors": save_file,
    "f.h5": h5,
    "packed.h5": lambda v, path: h5(v, path, compression="gzip"),
    "npy": each(lambda t, path: np.save(path, t.numpy()), ".npy"),
    "fortran": each(lambda t, path: np.save(path, np.asfortranarray(t.numpy())), ".mp4.npy"),
    "big_endian": each(lambda t, path: np.save(path, t.numpy().astype(">f4")), ".npy"),
    "pt": each(torch.save, ".pt"),
    "one_key": each(lambda t, path: save_file({"features": t}, path), ".safetensors"),
}


@pytest.mark.parametrize("width", [1, 512, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_tensors(tmp_path: Path, kind: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    videos = {f"v{n}": torch.randn(n, width, generator=generator) for n in (1, 3, 8)}
    plain = Features(save(tmp_path / "plain.pth", videos))
    KINDS[kind](videos, tmp_path / kind)
    features: Features = pickle.loads(pickle.dumps(Features(tmp_path / kind)))
    assert features.width == width and len(features) == 3
    clips = [("v1", None), ("v3", (1, 3)), ("v8", (0, 7)), ("v8", (9, 10))]
    assert features.check(questions_about(*clips)) == 1
    for video, rows in clips:
        assert torch.equal(features.sample(video, rows, 4), plain.sample(video, rows, 4))
        features.verify(video)
    assert not features.scan().malformed
    assert any("float64" in note for note in features.notes) == (kind == "float64.pth")
    target = tmp_path / "out.safetensors"
    assert pack(tmp_path / kind, target) == 3
    packed = Features(target)
    assert torch.equal(packed.frames("v8").float(), videos["v8"])


@pytest.mark.parametrize(
    "key, video",
    [
        ("0101/7.mp4", "7"),
        (4010, "4010"),
        ("4010.0", "4010"),
        (4010.0, "4010"),
        ("a", "x/a.webm"),
        ("a.b", "a.b"),
        (" a ", "a"),
    ],
)
def test_ids_are_found(tmp_path: Path, key: Any, video: str) -> None:
    features = Features(
        save(tmp_path / "f.pth", {key: torch.ones(2, 4), "other": torch.ones(1, 4)})
    )
    assert features.check(questions_about((video, None))) == 0
    assert features.sample(video, None, 2).sum() == 8


def test_a_name_that_all_keys_end_in(tmp_path: Path) -> None:
    """As in HDF5 files with a group per video, and folders with one."""
    content = {f"x/{i}.mp4/features": torch.full((2, 4), float(i)) for i in range(3)}
    features = Features(save(tmp_path / "f.pth", content))
    assert features.check(questions_about(("2", None), ("y/0", None))) == 0
    assert features.sample("2", None, 1).sum() == 8
    more = content | {"x/1.mp4/fps": torch.ones(1, 4)}
    assert Features(save(tmp_path / "g.pth", more)).key("2") is None


def test_ids_that_are_not_found(tmp_path: Path) -> None:
    """An ambiguous one names both keys; the exact text comes first."""
    content = {"a/1.mp4": torch.ones(2, 4), "b/1.mp4": torch.ones(2, 4), "1.5": torch.ones(2, 4)}
    features = Features(save(tmp_path / "f.pth", content))
    assert "'a/1.mp4' and 'b/1.mp4' may both be video '1'" in refusal(features.key, "1")
    assert features.key("b/1.mp4") == "b/1.mp4"
    message = refusal(features.check, questions_about(("x", None)))
    assert "e.g. 'x' (the file's ids are like 'a/1.mp4')" in message


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


ZEROS = np.zeros((3, 4), np.float32)
BAD_NPY = {
    "an array of Python objects, refused": npy(np.array([{}, 1], object), allow_pickle=True),
    "claims 48 bytes of numbers and holds 40": npy(ZEROS)[:-8],
    "is no whole .npy file": npy(ZEROS)[:40],
    "is an HTML page": b"<html>" + b" " * 20,
    "is cut off (0 bytes)": b"",
    "is cut off (15 bytes)": b"\x80" * 15,
    "not of floating-point numbers": npy(np.array(["abc"])),
    "'v' ([3, 4] int8)": npy(ZEROS.astype(np.int8)),
    "'v' ([4] float32)": npy(ZEROS[0]),
    "'v' ([1, 3, 4] float32)": npy(ZEROS[None]),
    "'v' ([0, 4] float32)": npy(ZEROS[:0]),
}


@pytest.mark.parametrize("part", BAD_NPY)
def test_bad_npy(tmp_path: Path, part: str) -> None:
    """A video that no question is about does not matter."""
    folder = tmp_path / "f"
    folder.mkdir()
    np.save(folder / "a.npy", ZEROS)
    np.save(folder / "b.npy", ZEROS)
    (folder / "v.npy").write_bytes(BAD_NPY[part])

    def check(video: str) -> None:
        Features(folder).check(questions_about((video, None)))

    assert part in refusal(check, "v")


def test_numpy_objects_in_a_torch_file(tmp_path: Path) -> None:
    """They stay what the file says of them; no pickle inside them is run."""
    content = {"a": np.zeros((2, 4)), "v": np.array([{}, None], object)}
    features = Features(save(tmp_path / "f.pth", content))
    message = refusal(features.check, questions_about(("v", None)))
    assert "'v' (a numpy array of type 'O8')" in message


def test_what_cannot_be_mapped_is_refused_above_a_size(tmp_path: Path) -> None:
    path = save(tmp_path / "f.pth", {"a": np.zeros((2, 400))})
    assert f"run: vico data pack {path} {tmp_path}/f_packed.safetensors" in refusal(
        feature_files.open_container, path, [path], in_memory=100
    )


def test_clips_that_all_begin_past_the_end(tmp_path: Path) -> None:
    features = Features(save(tmp_path / "f.pth", {"v": torch.ones(5, 4)}))
    message = refusal(features.check, questions_about(("v", (5, 9)), ("v", (70, 80))))
    assert "the clips of all 2 questions begin past the end" in message
    assert "'v': at frame 5 of 5; extract them at the frame rate" in message


def test_which_features_are_taken(tmp_path: Path) -> None:
    """--features, clipvitl14.pth, or the only ones that are there."""
    folder = tmp_path / "set"
    folder.mkdir()
    assert feature_files.find(folder, None) == folder / "clipvitl14.pth"
    save(folder / "features_b16.pt", {})
    assert feature_files.find(folder, None) == folder / "features_b16.pt"
    (folder / "features").mkdir()
    message = refusal(feature_files.find, folder, None)
    assert "holds features_b16.pt and features; say which by --features PATH" in message
    assert feature_files.find(folder, Path("features")) == folder / "features"
    assert "no such file or folder" in refusal(feature_files.find, folder, Path("nowhere"))


def test_a_damaged_type_in_hdf5(tmp_path: Path) -> None:
    """The library raises a RuntimeError when it is asked for the type."""
    path = tmp_path / "f.h5"
    h5({"v": torch.ones(3, 4)}, path)
    float32 = bytes((0x17, 8, 0, 0x17))  # where its exponent and mantissa are; the bias follows
    whole = path.read_bytes()
    assert whole.count(float32 + bytes((0x7F, 0, 0, 0))) == 1
    path.write_bytes(whole.replace(float32 + bytes((0x7F,)), float32 + bytes((0,))))
    assert "f.h5: 'x/v.mp4' cannot be read (Unspecified error" in refusal(Features, path)


def test_pack_writes_nothing_that_is_not_whole(tmp_path: Path) -> None:
    source = save(tmp_path / "f.pth", {"a": torch.ones(2, 4), "b": torch.ones(4)})
    assert "'b' is [4] float32" in refusal(pack, source, tmp_path / "out.pth")
    assert "must end in .safetensors or .pth" in refusal(pack, source, tmp_path / "out.bin")
    assert "already exists" in refusal(pack, source, source)
    assert [path.name for path in tmp_path.iterdir()] == ["f.pth"]


def test_reading_many_files_is_shown(tmp_path: Path) -> None:
    """Each video that is opened, each clip that is compared, and each of the whole file."""
    each(lambda t, path: np.save(path, t.numpy()), ".npy")(
        {f"v{i}": torch.ones(2, 4) for i in range(3)}, tmp_path / "npy"
    )
    features, shown = Features(tmp_path / "npy"), list[str]()
    questions = questions_about(("v0", None), ("v2", None), ("v2", (0, 1)))
    features.check(questions, shown.append)
    features.check_finite(questions, 2, shown.append)
    features.scan(shown.append)
    looked, read, scanned = shown[:2], shown[2:5], shown[5:]
    assert looked[-1] == f"{tmp_path}/npy: looked at 2 of 2 videos"
    assert read[-1] == f"{tmp_path}/npy: read 3 of 3 clips"
    assert scanned[-1] == f"{tmp_path}/npy: read 3 of 3 videos" and len(scanned) == 3
