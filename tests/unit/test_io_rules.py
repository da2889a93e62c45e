"""Bounds and defaults of what reads and writes files, each at its last byte."""

import errno
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.payloads import as_old
from support.checkpoints import same
from support.errors import refusal
from vico import data
from vico.checkpoint import read
from vico.checkpoint.export import export
from vico.checkpoint.format import Checkpoint, TrainState
from vico.checkpoint.write import RunIdentity, check_written, save, save_step
from vico.io import (
    atomic,
    file_cache,
    log,
    old_torch_format,
    paths,
    pickle_sizes,
    safe_load,
    streams,
)
from vico.io.digest import digest_files
from vico.io.output_dir import OutputDir

# ---- torch files


def test_how_much_of_a_download_is_looked_at(tmp_path: Path) -> None:
    """512 bytes, as they are read from the file, too."""
    path = tmp_path / "a.pth"
    for blanks, is_page in ((507, True), (508, False)):
        data = b" " * blanks + b"<html"
        assert (safe_load.failed_download(data, 9) is not None) == is_page
        path.write_bytes(data)
        message = refusal(safe_load.load_tensors, path, "it")
        assert ("is an HTML page" in message) == is_page


def test_the_shortest_file_that_is_whole(tmp_path: Path) -> None:
    """One as long as the number at the start of torch's old format is no longer cut off."""
    path = tmp_path / "a.pth"
    begins = rf"is no torch file (it begins with {bytes(8)!r}); fetch the right one"
    damaged = "is cut off or damaged; fetch or copy it again and compare the sizes"
    for size, said in ((14, f"{damaged} (14 bytes)"), (15, begins)):
        path.write_bytes(bytes(size))
        assert refusal(safe_load.load_tensors, path, "it") == f"{path}: it {said}"


def part(name: str, size: int, **attributes: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.file_size = size
    for key, value in attributes.items():
        setattr(entry, key, value)
    return entry


def test_parts_of_an_archive() -> None:
    """They may be as large as the file, but not larger."""
    parts = [part("a/data.pkl", 10), part("a/data/0", 1990)]
    assert safe_load._parts_fault(parts, 2000) is None
    said = "claims parts of 2,000 bytes and has 1,999; fetch or copy it again"
    assert safe_load._parts_fault(parts, 1999) == said
    other = "is a zip archive, but not one of tensors written by torch.save; fetch the right one"
    assert safe_load._parts_fault(parts[1:], 2000) == other
    assert safe_load._parts_fault([*parts, part("a/constants.pkl", 1)], 9999) == other
    packed = [*parts, part("a/x", 1, compress_type=zipfile.ZIP_DEFLATED)]
    said = "was packed again by another program and cannot be memory-mapped; fetch the original"
    assert safe_load._parts_fault(packed, 9999) == said
    assert safe_load._is_storage(parts[1]) and not safe_load._is_storage(parts[0])


def test_a_long_reason_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the first 160 letters of its first line."""
    path = tmp_path / "a.pth"
    torch.save({}, path)

    def fail(*_: object) -> None:
        raise RuntimeError("x" * 160 + "y\nmore")

    monkeypatch.setattr(safe_load, "_load_zip", fail)
    damaged = "is cut off or damaged; fetch or copy it again and compare the sizes"
    message = refusal(safe_load.load_tensors, path, "it")
    assert message == f"{path}: it {damaged} (RuntimeError: {'x' * 160})"


def test_everything_in_containers_is_visited_once() -> None:
    loop: list[Any] = [1, (2, {3}), {"a": frozenset([4])}]
    loop.append(loop)
    found = [value for value in safe_load._walk(loop) if isinstance(value, int)]
    assert sorted(found) == [1, 2, 3, 4]


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\n"


def claim(key: bytes, size: bytes, end: bytes = b"Nt") -> bytes:
    """A content with the name of a storage in it."""
    return b"\x80\x02" + STORAGE + key + b"X\x03\0\0\0cpu" + size + end + b"Q."


def test_storages_of_the_old_format() -> None:
    """Each is in the list of keys and has a size, also 0; what is named otherwise is refused."""
    key = b"X\x01\0\0\0k"
    for number in (0, 3):
        said = f"claims {number} numbers that are not all among its 0 bytes of them; "
        named = claim(key, b"K" + bytes([number]))
        assert old_torch_format.find_fault(as_old(named)) == said + "fetch or copy it again"
    remembered = b"\x80\x02" + key + b"q\x010" + claim(b"h\x01", b"K\x03")[2:]
    said = "claims 3 numbers that are not all among its 0 bytes of them; fetch or copy it again"
    assert old_torch_format.find_fault(as_old(remembered)) == said
    bad = [(b"K\x01", b"K\x01", b"Nt"), (key, b"J\xff\xff\xff\xff", b"Nt"), (key, key, b"Nt")]
    bad += [(key, b"K\x01", b"K\x01t"), (key, b"K\x01", b"Nl")]
    said = "was not written by torch.save as it is; save it again where you trust it"
    for parts in bad:
        assert old_torch_format.find_fault(as_old(claim(*parts))) == said


def test_empty_tensors_of_the_old_format(tmp_path: Path) -> None:
    saved = {"a": torch.zeros(0), "b": torch.ones(3)}
    path = tmp_path / "a.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    assert same(safe_load.load_tensors(path, "it", allow_old_format=True), saved)


def test_classes_that_are_named_and_not_called() -> None:
    """A storage, where its key, device and size follow; anything less is a call."""
    name = b"ctorch.storage\nUntypedStorage\n"
    key, device, size = b"X\x01\0\0\0k", b"X\x03\0\0\0cpu", b"K\x03"
    for number in (size, b"M\x03\0", b"J\x03\0\0\0", b"\x8a\x01\x03"):
        whole = b"\x80\x02(" + name + key + device + number + b"tQ."
        assert pickle_sizes.sized_class(whole) is None
    for rest in (key + device + size + b"t", key + device + b"NtQ", device + size + b"tQ", b"0"):
        found = pickle_sizes.sized_class(b"\x80\x02(" + name + rest + b".")
        assert found == "torch.storage.UntypedStorage"
    assert pickle_sizes.sized_class(b"\x80\x02X\x06\0\0\0Tensor.") is None
    assert pickle_sizes.sized_class(b"\x80\x02cmy\nByteTensor\n.") == "my.ByteTensor"
    assert pickle_sizes.sized_class(b"\x80\x02cmy\nTensors\n.") is None


TENSOR = b"ctorch\nTensor\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
TYPED = b"ctorch._tensor\n_rebuild_from_type_v2\n"


@pytest.mark.parametrize(
    ("content", "is_named"),
    [
        (TYPED + b"(" + REBUILD + TENSOR + b"}tR.", True),
        (TYPED + b"(" + REBUILD + TENSOR + b"(K\x01t}tR.", True),
        (TYPED + b"(" + REBUILD + TENSOR + b"K\x01K\x02\x86}tR.", True),
        (REBUILD + b"q\x01" + TYPED + b"(h\x01" + TENSOR + b"}tR.", True),  # from the memo
        (TYPED + b"(cmy\nfunction\n" + TENSOR + b"}tR.", False),
        (TYPED + b"q\x01(" + REBUILD + b"h\x01" + TENSOR + b"}tR.", False),  # the third argument
        (TYPED + b"(" + TENSOR + b"}tR.", False),
        (b"(" + REBUILD + TENSOR + b"}tR.", False),
        (TYPED + REBUILD + TENSOR + b"\x87R.", False),  # no mark
        (TYPED + b"(" + REBUILD + TENSOR + b"K\x01\x85R}tR.", False),  # it is called
        (TYPED + b"(" + REBUILD + TENSOR + b"}lR.", False),  # no tuple of arguments
        (TYPED + b"(" + REBUILD + TENSOR + b"}.", False),
    ],
)
def test_the_type_of_a_tensor_with_attributes(content: bytes, is_named: bool) -> None:
    """Named as the second argument of the function that makes such tensors, and not called."""
    found = pickle_sizes.sized_class(b"\x80\x02" + content)
    assert found == (None if is_named else "torch.Tensor")


# ---- folders of a run


def test_a_folder_that_is_not_what_was_written(tmp_path: Path) -> None:
    save(tmp_path / "c", {"w": torch.ones(1)}, {}, TrainState(), RunIdentity("", {}, {}))
    check_written(tmp_path / "c")
    (tmp_path / "c" / "optimizer.safetensors").unlink()
    message = refusal(check_written, tmp_path / "c")
    assert message.endswith("written a moment ago, so the disk does not store data correctly")


def test_the_latest_checkpoints_are_kept(tmp_path: Path) -> None:
    """And the last step is noted; without a number all of them stay."""
    out, run = OutputDir(tmp_path), RunIdentity("", {}, {})
    tensors = {"w": torch.ones(1)}
    for step, keep, kept in ((9, None, [9]), (10, None, [10, 9]), (11, 2, [11, 10]), (12, 1, [12])):
        save_step(out, tensors, {}, TrainState(step=step), run, keep)
        assert out.step_checkpoints() == [out.checkpoint(number) for number in kept]
        assert out.latest_step() == step
        assert read.read(out.checkpoint(step)).state.step == step
    assert out.latest.read_text() == '{\n "step": 12\n}\n'


def test_the_record_of_an_export(tmp_path: Path) -> None:
    """Fingerprints by name; nothing is lost on the way back."""
    weights = {"w": torch.ones(2, 3)}
    checkpoint = Checkpoint(
        tmp_path, weights, state=TrainState(step=5), fingerprints={"b": "2", "a": "1"}
    )
    target = tmp_path / "new" / "adapter"
    export(checkpoint, target, "LLaMA", {"lr": 1}, "# card\n")
    config = json.loads((target / "adapter_config.json").read_text())
    own = config["auto_mapping"]["vico"]
    assert list(own["fingerprints"].items()) == [("a", "1"), ("b", "2")]
    assert (own["format"], own["step"], own["shapes"]) == (1, 5, {"w": [2, 3]})
    text = (target / "adapter_config.json").read_text()
    assert text.startswith('{\n  "base_model_name_or_path": "LLaMA",\n') and text.endswith("}\n")
    assert config["inference_mode"] is True and (target / "README.md").read_text() == "# card\n"
    found = read.read(target)
    assert same(found.weights, weights) and found.fingerprints == checkpoint.fingerprints
    assert found.settings == {"lr": 1}


def test_a_folder_that_could_not_be_put_aside(tmp_path: Path) -> None:
    """What lies aside of an earlier run is not put over the one that has the name."""
    for name in ("c", ".c.vico-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name.strip(".")).write_text("1")

    def fail(_: Path) -> None:
        raise OSError(errno.EIO, "reason")

    remedy = "free space or fix the permissions, then start again"
    message = refusal(atomic.write_folder, tmp_path / "c", fail)
    assert message == f"{tmp_path / 'c'}: cannot be written (reason); {remedy}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.vico-old", "c"]
    assert (tmp_path / "c" / "c").exists()


def test_the_cache_makes_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a" / "b"))
    for value in (1, 2):  # the folder is there at the second time
        file_cache.FileCache().save("k", value)
        assert file_cache.FileCache().get("k") == value


def test_the_cache_in_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which results are the latest is a part of the file, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "vico" / "checked.json"
    for name in "ba":
        file_cache.FileCache().save(name, 1)
    content = json.loads(path.read_text("utf-8"))
    assert list(content["entries"]) == ["b", "a"]
    path.write_text(json.dumps({**content, "entries": {"a": 1, "b": 1}}), "utf-8")
    assert file_cache.FileCache().get("a") is None


def test_the_code_that_reads_data_is_a_part_of_keys() -> None:
    files = sorted(Path(data.__path__[0]).rglob("*.py"))
    assert len(files) > 20 and file_cache._code_digest() == digest_files(files)


def test_files_that_are_made(tmp_path: Path) -> None:
    """As the user's mask allows; errors of the system pass."""
    before = os.umask(0)
    try:
        os.close(paths.open_to_write(tmp_path / "a", os.O_WRONLY))
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666
    with pytest.raises(FileNotFoundError):
        paths.open_to_write(tmp_path / "none" / "a", os.O_WRONLY)
    os.mkfifo(tmp_path / "pipe")
    for path, flags in ((tmp_path / "pipe", os.O_RDWR), (Path("/dev/null"), os.O_WRONLY)):
        with pytest.raises(OSError, match="a device or a pipe, not a file"):
            paths.open_to_write(path, flags)


def test_what_no_folder_can_be_is_empty(tmp_path: Path) -> None:
    """A link to itself, a name that is too long, a file, and nothing."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for name in ("loop", "x" * 300, "file", "none"):
        assert paths.entries(tmp_path / name) == []
        assert not paths.is_folder(tmp_path / name)
    assert paths.entries(tmp_path, "[f]*") == [tmp_path / "file"]
    assert not paths.exists(tmp_path / "loop") and paths.exists(tmp_path / "file")


# ---- what is printed


def test_lines_are_printed_once() -> None:
    """Also where a library gives the root logger a handler."""
    own = [handler for handler in log.LOGGER.handlers if isinstance(handler, log._LineHandler)]
    assert not log.LOGGER.propagate and len(own) == 1


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> streams._LostOutput:
    fresh = streams._LostOutput()
    monkeypatch.setattr(streams, "_lost", fresh)
    return fresh


def test_a_stream_says_what_is_missing(
    lost: streams._LostOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is read again. What it did not take lies in the file, behind why."""
    reader, writer = os.pipe()
    monkeypatch.setitem(streams.NAMES, writer, "stdout")
    monkeypatch.setattr(streams, "MAX_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("RANK", "3")
    out = streams._Output(writer, "wb", closefd=False)
    streams.keep_lost_output(tmp_path / "output.txt")
    assert out.write(b"hello") == 5 and os.read(reader, 99) == b"hello" and not out.is_lost
    size = 70_000  # of a pipe's 65,536 bytes
    assert out.write(b"x" * size) == size and out.is_lost
    (first, _, rest) = (tmp_path / "output.txt").read_bytes().partition(b"\n")
    assert f": rank 3, process {os.getpid()}: stdout takes no output".encode() in first
    assert first.endswith(b"(nobody reads it); it follows here")
    taken = os.read(reader, size)
    assert len(taken) + len(rest) == size and {*taken} == {*rest} == {ord("x")}
    assert out.write(b"end\n") == 4 and not out.is_lost
    note = f"end\nvico: lines are missing here; see {tmp_path / 'output.txt'}\n"
    assert os.read(reader, size) == note.encode()
    assert lost.reason is not None and lost.reason.errno == errno.EAGAIN
    os.close(reader)
    os.close(writer)
