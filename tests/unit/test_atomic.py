"""Files and folders are whole or absent: what is left behind, and what is said."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.errors import refusal
from vico.errors import DiskError, UserError
from vico.io import atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_json_and_lines(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "a.json", {"a": [1, 2]})
    atomic.write_lines(tmp_path / "b.jsonl", [{"a": 1}, {"b": 2}])
    assert (tmp_path / "a.json").read_text() == '{\n "a": [\n  1,\n  2\n ]\n}\n'
    assert (tmp_path / "b.jsonl").read_text() == '{"a": 1}\n{"b": 2}\n'


def test_an_error_while_writing_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="stop"), atomic.replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        raise ValueError("stop")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_the_free_space(tmp_path: Path, number: int) -> None:
    words = rf"{os.strerror(number)}: [\d,]+ bytes free\)"
    with pytest.raises(DiskError, match=words), atomic.replacing(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


def test_another_fault_says_no_space(tmp_path: Path) -> None:
    words = r"cannot be written \(Input/output error\)"
    with pytest.raises(DiskError, match=words), atomic.replacing(tmp_path / "a"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    """A planted temporary name is replaced, whatever it points to."""
    other = tmp_path / "other"
    other.write_bytes(b"kept")
    (tmp_path / f".a.{os.getpid()}{atomic.TEMPORARY_SUFFIX}").symlink_to(other)
    atomic.write_bytes(tmp_path / "a", b"new")
    assert other.read_bytes() == b"kept"
    assert names(tmp_path) == ["a", "other"]
    assert not (tmp_path / "a").is_symlink()


def fill(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "file").write_text(content)

    return write


def test_a_folder_takes_the_place_of_an_older(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "a"
    seen = []

    def check(folder: Path) -> None:
        seen.append((folder / "file").read_text())

    for content in ("one", "two"):
        atomic.write_folder(target, fill(content), check)
        assert (target / "file").read_text() == content
    assert seen == ["one", "two"]
    assert names(target.parent) == ["a"]


def test_a_folder_that_is_rejected_gives_way_to_the_older(tmp_path: Path) -> None:
    target = tmp_path / "a"
    atomic.write_folder(target, fill("old"))

    def reject(folder: Path) -> None:
        raise UserError((folder / "file").read_text())

    with pytest.raises(UserError, match="new"):
        atomic.write_folder(target, fill("new"), reject)
    assert (target / "file").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_folder_that_is_not_filled_leaves_the_older(tmp_path: Path) -> None:
    target = tmp_path / "a"
    atomic.write_folder(target, fill("old"))

    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(DiskError, match=r"Input/output error"):
        atomic.write_folder(target, fail)
    assert (target / "file").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_an_older_folder_that_was_set_aside_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    atomic.write_folder(target, fill("old"))

    def lose_the_new(point: str) -> None:
        if point == "save:aside":
            shutil.rmtree(tmp_path / ".a.vico-tmp")

    monkeypatch.setattr(atomic, "reached", lose_the_new)
    with pytest.raises(DiskError, match="No such file"):
        atomic.write_folder(target, fill("new"))
    assert (target / "file").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_repairs_are_told(tmp_path: Path) -> None:
    for name in (".a.vico-old", "b", ".b.vico-old", ".c.vico-tmp", ".user", "d.vico-tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".d.vico-tmp").symlink_to(tmp_path / "b")
    assert atomic.repair_folder(tmp_path) == [
        "a put back",
        ".b.vico-old removed",
        ".c.vico-tmp removed",
        ".d.vico-tmp removed",
    ]
    assert names(tmp_path) == [".user", "a", "b", "d.vico-tmp"]


def test_a_removed_folder_is_gone_at_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    (tmp_path / ".a.vico-tmp").mkdir()  # of a killed run
    (tmp_path / ".a.vico-tmp" / "file").touch()
    atomic.remove_folder(tmp_path / "a")
    assert names(tmp_path) == []
    with pytest.raises(DiskError, match=r"cannot be removed \(No such file"):
        atomic.remove_folder(tmp_path / "a")


def test_where_files_may_be_written(tmp_path: Path) -> None:
    atomic.require_writable(tmp_path / "a" / "b" / "c")
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        path = tmp_path / name
        said = refusal(atomic.require_writable, path, "--to")
        assert said == f"--to {path}: '{path}' is not a folder; choose another"


def test_folders_are_made_with_their_parents(tmp_path: Path) -> None:
    for _ in range(2):
        atomic.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
