"""Feature files at their limits: how much is held in memory, what is odd in them, what is kept."""

import fcntl
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from support.errors import refusal
from support.feature_files import questions_about, save
from vico.data import feature_files, features, hdf5_features
from vico.data import pack as packing
from vico.data.feature_files import joined_frames
from vico.data.features import Features, FeaturesInMemory, sample_frames
from vico.data.mapped_numbers import map_npy, mapped_numbers, require_whole
from vico.io.paths import MAX_BYTES

MIB = 1 << 20
FRAMES = torch.ones(2, 4)


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_bytes", "is_refused"), [(256 * MIB, False), (256 * MIB + 1, True)])
def test_arrays_of_256_mib_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int, is_refused: bool
) -> None:
    """Into memory; more have to be packed."""
    path = save(tmp_path / "f.pth", {"v": np.ones((2, 4))})
    monkeypatch.setattr(feature_files, "_pickled_bytes", lambda _: num_bytes)
    if not is_refused:
        assert len(Features(path)) == 1
        return
    assert refusal(Features, path) == (
        f"{path}: the video feature file holds 268,435,457 bytes of numpy arrays or lists, which "
        "cannot be memory-mapped: each process would hold them; "
        f"run: vico data pack {path} {tmp_path / 'f_packed.safetensors'}"
    )


def test_bytes_of_numbers_that_are_no_tensors(tmp_path: Path) -> None:
    """Of a torch file: its pickle. Another file is judged by who loads it."""
    small = feature_files._pickled_bytes(save(tmp_path / "t.pth", {"v": torch.ones(900, 4)}))
    large = feature_files._pickled_bytes(save(tmp_path / "a.pth", {"v": np.ones((900, 4))}))
    assert small < 1000 < 900 * 4 * 8 <= large
    (tmp_path / "x.pth").write_bytes(b"no zip file")
    assert feature_files._pickled_bytes(tmp_path / "x.pth") == 0
    assert feature_files._pickled_bytes(tmp_path / "none.pth") == 0


def test_the_old_format_is_only_packed(tmp_path: Path) -> None:
    path = save(tmp_path / "f.pth", {"v": FRAMES}, _use_new_zipfile_serialization=False)
    assert "old format" in refusal(Features, path)
    assert list(feature_files.open_container(path, [path], MAX_BYTES).keys()) == ["v"]
    assert "old format" in refusal(feature_files.open_container, path, [path], 256 * MIB)


def test_pages_are_released_after_256_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each 256 MiB anew. The videos repeat one number, which takes no memory."""
    half = torch.zeros(1).expand(1 << 15, 1 << 10)
    memory = FeaturesInMemory({"half": half, "small": torch.ones(1, 1 << 10)}, "these")
    assert half.nbytes == 128 * MIB
    releases: list[Path] = []
    monkeypatch.setattr(features, "release_pages", releases.append)
    numbers = []
    for video in ("half", "half", "small", "half", "half", "small", "small"):
        memory.frames(video)
        numbers.append(len(releases))
    assert numbers == [0, 0, 1, 1, 1, 2, 2] and releases == [Path("these")] * 2


def test_packing_releases_pages_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After more than 256 MiB, of which each video here is a third."""
    assert packing.RELEASE_BYTES == 256 * MIB
    path = save(tmp_path / "f.pth", {f"v{i}": FRAMES for i in range(7)})
    releases: list[Path] = []
    monkeypatch.setattr(packing, "release_pages", releases.append)
    monkeypatch.setattr(packing, "RELEASE_BYTES", 3 * FRAMES.nbytes)
    reader, numbers = packing._Reader(path), []
    for video in reader.kinds:
        reader.read(video)
        numbers.append(len(releases))
    assert numbers == [0, 0, 0, 1, 1, 1, 1] and releases == [path]


@pytest.mark.parametrize(
    ("stored", "most"),
    [(0, 64 * MIB), (4 * MIB, 64 * MIB), (4 * MIB + 1, 64 * MIB + 16), (9 * MIB, 144 * MIB)],
)
def test_hdf5_claims_no_more_than_16_times_its_bytes(stored: int, most: int) -> None:
    """64 MiB in any case."""
    dataset = SimpleNamespace(id=SimpleNamespace(get_storage_size=lambda: stored))
    hdf5_features._refuse_claims(dataset, most, "f.h5: 'v'")
    said = refusal(hdf5_features._refuse_claims, dataset, most + 1, "f.h5: 'v'")
    assert said == f"f.h5: 'v' claims {most + 1:,} bytes and holds {stored:,}; save it again"


# ---- numbers in a file --------------------------------------------------------------------------


def test_mapped_numbers_are_a_view_and_private(tmp_path: Path) -> None:
    """Who writes to them, against the rule, does not write to the file."""
    path = tmp_path / "a"
    path.write_bytes(bytes(4) + np.arange(6, dtype="<f4").tobytes())
    found = mapped_numbers(path, 4, (2, 3), np.dtype("<f4"))
    assert found.untyped_storage().nbytes() == 4 + 24, "the file, and no copy"
    before = path.read_bytes()
    found.zero_()
    assert path.read_bytes() == before
    moved = mapped_numbers(path, 1, (2,), np.dtype("<f4"))
    assert moved.untyped_storage().nbytes() == 8, "a copy, at a place where no number may begin"


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0)])
def test_arrays_without_frames(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """They are read; who wants features says what is wrong."""
    np.save(tmp_path / "a.npy", np.zeros(shape, np.float32))
    assert tuple(map_npy(tmp_path / "a.npy").shape) == shape


def test_a_file_of_16_bytes_may_be_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 16)
    require_whole(tmp_path / "a", "numpy")
    (tmp_path / "a").write_bytes(b"x" * 15)
    end = "the video feature file is cut off (15 bytes), no numpy file; copy it again"
    assert refusal(require_whole, tmp_path / "a", "numpy") == f"{tmp_path / 'a'}: {end}"
    said = refusal(require_whole, tmp_path / "b", "numpy")
    assert said == f"{tmp_path / 'b'}: no such file; the video feature file should be there"
    said = refusal(require_whole, tmp_path, "numpy")
    assert said.startswith(f"{tmp_path}: the video feature file cannot be opened (")


def test_no_frame_of_a_clip() -> None:
    assert sample_frames(torch.ones(3, 4), 0).shape == (0, 4)
    assert sample_frames(torch.ones(0, 4), 2).tolist() == [[0.0] * 4] * 2


# ---- odd contents -------------------------------------------------------------------------------


ODD: dict[str, Any] = {
    "list of length 1": [[1.0, 2]],
    "list of length 2": [[], []],
    "list of length 3": [FRAMES[0], np.ones(4), FRAMES[1]],
    "dict of length 1": {"a": 1},
    "int": 7,
    "float": 0.5,
    "text": "text",
}


@pytest.mark.parametrize("words", ODD)
def test_what_is_no_list_of_frames(tmp_path: Path, words: str) -> None:
    """Floats alone are one; the other videos of the file can be used."""
    videos = {"v": ODD[words], "good": [[1.0] * 4, [2.0] * 4]}
    found = Features(save(tmp_path / "f.pth", videos))
    assert found.check(questions_about(("good", None))) == 0 and found.width == 4
    assert found.sample("good", None, 2)[:, 3].tolist() == [1.0, 2.0]
    assert found.header("v").fault == words


def test_frames_that_hold_no_numbers() -> None:
    """Sparse ones, and those of "meta", which are shapes alone."""
    for odd in (torch.ones(4).to_sparse(), torch.ones(4, device="meta")):
        value = [torch.ones(4), odd]
        assert joined_frames(value) is value
    value = ["v", torch.ones(4)]
    assert joined_frames(value) is value
    pair = joined_frames((torch.ones(4, requires_grad=True), torch.zeros(4)))
    assert pair.tolist() == [[1.0] * 4, [0.0] * 4] and not pair.requires_grad


def test_a_file_of_a_folder_holds_one_video(tmp_path: Path) -> None:
    """Itself, or the one value of a dict."""
    folder = tmp_path / "f"
    folder.mkdir()
    save(folder / "bare.pt", FRAMES)
    save(folder / "one.PTH", {"x": FRAMES})
    save(folder / "two.pt", {"x": FRAMES, "y": FRAMES})
    save_file({"x": FRAMES}, folder / "single.safetensors")
    save_file({"x": FRAMES, "y": FRAMES + 1}, folder / "pair.safetensors")
    found = Features(folder)
    for video in ("bare", "one", "single"):
        assert torch.equal(found.frames(video), FRAMES)
        found.verify(video)
    assert found.header("two").fault == "dict of length 2"
    assert found.header("pair").fault == "2 tensors"
    assert found.scan().malformed == ("pair", "two")


def test_a_scan_compares_checksums(tmp_path: Path) -> None:
    path = save(tmp_path / "f.pth", {"v": torch.arange(40.0)[None] + 1})
    data = path.read_bytes()
    place = data.index(torch.arange(40.0).add(1).numpy().tobytes())
    path.write_bytes(data[: place + 9] + b"\x01" + data[place + 10 :])
    assert "(wrong checksum of the features of video 'v')" in refusal(Features(path).scan)


def test_no_question_is_no_fault(tmp_path: Path) -> None:
    found = Features(save(tmp_path / "f.pth", {"v": FRAMES}))
    assert found.check([]) == 0
    found.check_finite([], 3)


def test_the_usual_file_comes_first(tmp_path: Path) -> None:
    """Then a file whose name begins with features and ends as one, in letters of any case."""
    for name in ("features.txt", "my_features.pth", "features_a.H5"):
        (tmp_path / name).write_bytes(b"")
    assert feature_files.find(tmp_path, None) == tmp_path / "features_a.H5"
    (tmp_path / "features_b.pt").write_bytes(b"")
    said = refusal(feature_files.find, tmp_path, None)
    end = "holds features_a.H5 and features_b.pt; say which by --features PATH"
    assert said == f"{tmp_path}: {end}"
    (tmp_path / "clipvitl14.pth").write_bytes(b"")
    assert feature_files.find(tmp_path, None) == tmp_path / "clipvitl14.pth"


def test_what_hides_a_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its videos would be missing without a word."""

    def deny(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", deny)
    monkeypatch.setattr(feature_files, "is_folder", lambda _: True)
    said = refusal(feature_files.files_of, tmp_path)
    assert said == f"{tmp_path}: cannot be read (Permission denied); correct its permissions"


# ---- HDF5 ---------------------------------------------------------------------------------------


def h5(path: Path, fill: Callable[[Any], None]) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        fill(file)
    return path


def test_an_hdf5_file_that_another_program_locks(tmp_path: Path) -> None:
    path = h5(tmp_path / "f.h5", lambda file: file.create_dataset("v", data=FRAMES.numpy()))
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert torch.equal(Features(path).frames("v"), FRAMES)


def test_hdf5_numbers_of_another_byte_order(tmp_path: Path) -> None:
    """Mapped or compressed, they become the machine's."""
    numbers = np.arange(1, 9, dtype=">f4").reshape(2, 4)

    def fill(file: Any) -> None:
        file.create_dataset("plain", data=numbers)
        file.create_dataset("packed", data=numbers, compression="gzip")

    found = Features(h5(tmp_path / "f.h5", fill))
    for video in ("plain", "packed"):
        assert found.frames(video).tolist() == numbers.tolist()


def test_hdf5_datasets_that_are_no_features(tmp_path: Path) -> None:
    """Each is said by its shape and type."""
    h5py = pytest.importorskip("h5py")

    def fill(file: Any) -> None:
        file.create_dataset("v", data=FRAMES.numpy())
        file.create_dataset("empty", data=h5py.Empty("f4"))
        file.create_dataset("whole", data=np.ones((2, 4), np.int64))

    found = Features(h5(tmp_path / "f.h5", fill))
    assert found.header("empty").fault == "[] float32"
    assert found.header("whole").fault == "[2, 4] int64"
    assert found.header("v").fault is None


def put(**datasets: Any) -> Callable[[Any], None]:
    def fill(file: Any) -> None:
        for name, data in datasets.items():
            file.create_dataset(name, data=data)

    return fill


def test_which_hdf5_files_hold_a_row_per_video(tmp_path: Path) -> None:
    """One dataset of three dimensions beside one of ids; otherwise each is a video."""
    h5py = pytest.importorskip("h5py")
    rows = np.ones((2, 3, 4), np.float32)
    joint = hdf5_features.Hdf5(h5(tmp_path / "a.h5", put(ids=[7, 8], feat=rows)))
    assert list(joint.keys()) == [7, 8]
    assert joint.notes == [
        f"{tmp_path / 'a.h5'}: a video is a row of 'feat', at the place of its id in 'ids'"
    ]
    others: dict[str, dict[str, Any]] = {
        "no ids": {"feat": rows},
        "two": {"feat": rows, "ids": [7, 8], "other": rows},
        "flat": {"feat": rows[0], "ids": [7, 8, 9]},
        "table of ids": {"feat": rows, "ids": [[7, 8]]},
        "no number of ids": {"feat": rows, "ids": h5py.Empty("i8")},
        "no numbers": {"feat": h5py.Empty("f4"), "ids": [7, 8]},
    }
    for name, datasets in others.items():
        plain = hdf5_features.Hdf5(h5(tmp_path / f"{name}.h5", put(**datasets)))
        assert list(plain.keys()) == sorted(datasets) and plain.notes == []


def test_hdf5_datasets_in_other_files(tmp_path: Path) -> None:
    """They are refused, whichever way HDF5 has to name another file."""
    h5py = pytest.importorskip("h5py")
    h5(tmp_path / "other.h5", put(v=FRAMES.numpy()))
    layout = h5py.VirtualLayout((2, 4), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "v", (2, 4))

    def fill(file: Any) -> None:
        file.create_dataset("v", data=FRAMES.numpy())
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("outside", (2, 4), "f4", external=str(tmp_path / "numbers"))

    path = h5(tmp_path / "f.h5", fill)
    container = hdf5_features.Hdf5(path)
    for name in ("virtual", "outside"):
        end = "lies in another file, which is not read; copy it into this one"
        assert refusal(container.value, name) == f"{path}: '{name}' {end}"
    assert torch.equal(container.value("v"), FRAMES)


# ---- packing ------------------------------------------------------------------------------------


def test_where_packing_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the target, in hidden files: the disk of the target has the room, or is asked."""
    source, names = save(tmp_path / "f.pth", {"v": FRAMES}), list[str]()
    written = packing.save_torch

    def save_and_look(videos: Any, file: Any) -> None:
        names.extend(path.name for path in tmp_path.iterdir() if path != source)
        written(videos, file)

    monkeypatch.setattr(packing, "save_torch", save_and_look)
    assert packing.pack(source, tmp_path / "out.pth") == 1
    assert len(names) == 2
    assert all(n.startswith(".out.pth.") and n.endswith(".vico-tmp") for n in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.pth", "out.pth"]


def test_a_full_disk_is_an_os_error() -> None:
    class Full:
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            pass

    file: Any = Full()
    with pytest.raises(OSError) as caught:
        packing.save_torch({"v": torch.ones(300, 400)}, file)
    assert "\n" not in str(caught.value)


def test_packing_asks_for_a_folder_first(tmp_path: Path) -> None:
    """Before it looks at the source, which may take minutes."""
    (tmp_path / "file").write_bytes(b"")
    said = refusal(packing.pack, tmp_path / "none.pth", tmp_path / "file" / "out.pth")
    assert said.startswith(f"the target's folder {tmp_path / 'file'}: ")


def test_the_header_of_packed_features_is_padded(tmp_path: Path) -> None:
    """With blanks, to a multiple of 8 bytes; then the numbers, the widest types first."""
    for length in range(1, 10):
        videos = {"v" * length: torch.ones(3, 5).half(), "w": torch.full((1, 5), 2.0).double()}
        target = tmp_path / f"{length}.safetensors"
        packing.pack(save(tmp_path / f"{length}.pth", videos), target)
        data = target.read_bytes()
        stop = 8 + int.from_bytes(data[:8], "little")
        assert stop % 8 == 0 and len(data) == stop + 5 * 8 + 15 * 2
        assert data[stop - 8 : stop].strip().endswith(b"}")
        assert np.frombuffer(data[stop : stop + 40], "<f8").tolist() == [2.0] * 5


def test_sources_that_change_while_they_are_packed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.mkdir()
    np.save(path / "v.npy", np.ones((2, 4), np.float32))
    np.save(path / "w.npy", np.ones((2, 4), np.float32))
    reader = packing._Reader(path)
    np.save(path / "v.npy", np.ones((3, 4), np.float32))
    np.save(path / "w.npy", np.ones((2, 4), np.float64))
    for video in ("v", "w"):
        said = refusal(reader.read, video)
        assert said == f"{path}: '{video}' changed while it was read; start again"
