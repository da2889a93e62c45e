"""What lies under a name at every moment of a write, and what a failed or killed one leaves."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support.errors import refusal
from support.plain_user import as_plain_user, folder_of_anyone
from vico.errors import DiskError, UserError
from vico.io import atomic

REMEDY = "free space or fix the permissions, then start again"


def content(folder: Path) -> dict[str, str | None]:
    """Each path below `folder`, with its text; None: a folder or a link to one."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in paths
    }


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Each flush and each named moment, with what then lies in tmp_path."""
    seen = list[tuple[str, list[str]]]()

    def flush(descriptor: int) -> None:
        seen.append((f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}", names()))

    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(atomic, "reached", lambda point: seen.append((point, names())))
    return seen


# ---- files --------------------------------------------------------------------------------------


def test_a_file_is_flushed_before_it_has_its_name(
    tmp_path: Path, events: list[tuple[str, list[str]]]
) -> None:
    """And the folder, which holds the name, after."""
    temporary = f".a.json.{os.getpid()}.vico-tmp"
    atomic.write_json(tmp_path / "a.json", {"b": [1, "\u00e9"], "a": None})
    assert events == [
        (f"flush {temporary}", [temporary]),
        (f"flush {tmp_path.name}", ["a.json"]),
    ]
    text = '{\n "b": [\n  1,\n  "\\u00e9"\n ],\n "a": null\n}\n'
    assert content(tmp_path) == {"a.json": text}


def test_texts_and_lines(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "a", "caf\u00e9\r\n")
    assert (tmp_path / "a").read_bytes() == b"caf\xc3\xa9\r\n"
    atomic.write_lines(tmp_path / "a", [{"b": 1}, {"a": [2.5]}])
    assert (tmp_path / "a").read_bytes() == b'{"b": 1}\n{"a": [2.5]}\n'
    atomic.write_lines(tmp_path / "a", [])
    assert (tmp_path / "a").read_bytes() == b""


def test_what_is_written_can_be_read_back(tmp_path: Path) -> None:
    """A format's library goes back in the file. A killed run's temporary file is no obstacle."""
    (tmp_path / f".a.{os.getpid()}.vico-tmp").write_text("much longer than the new content")
    with atomic.replacing(tmp_path / "a") as file:
        file.write(b"12345")
        file.seek(1)
        assert file.read(2) == b"23"
    assert content(tmp_path) == {"a": "12345"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails(tmp_path: Path, number: int) -> None:
    """The file of before stays; of a full disk or quota the free space is said."""
    (tmp_path / "a").write_text("before")
    with pytest.raises(DiskError) as caught, atomic.replacing(tmp_path / "a") as file:
        file.write(b"half")
        raise OSError(number, "reason")
    reason, free = str(caught.value).removeprefix(f"{tmp_path / 'a'}: ").split(" (reason")
    assert reason == "cannot be written" and free.endswith(f"); {REMEDY}")
    assert (" bytes free" in free) == (number != errno.EIO)
    assert content(tmp_path) == {"a": "before"}


def test_any_error_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic.replacing(tmp_path / "a"):
        1 / 0  # noqa: B018
    assert content(tmp_path) == {}


# ---- folders ------------------------------------------------------------------------------------


def fill(folder: Path) -> None:
    (folder / "new").write_text("2")
    (folder / "below").mkdir()


def test_a_folder_is_replaced_in_steps(tmp_path: Path, events: list[tuple[str, list[str]]]) -> None:
    """At each moment a whole folder has the name, or lies beside it for the next start.

    What killed runs have left is not mixed into it.
    """
    for name in ("c", ".c.vico-tmp", ".c.vico-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("1")
    seen = list[object]()

    def check(folder: Path) -> None:
        seen.append((content(folder), content(tmp_path / ".c.vico-old")))

    atomic.write_folder(tmp_path / "c", fill, check)
    before, aside = [".c.vico-old", ".c.vico-tmp", "c"], [".c.vico-old", ".c.vico-tmp"]
    after = [".c.vico-old", "c"]
    assert events == [
        ("save:begun", before),
        ("save:written", before),
        ("flush new", before),
        ("flush .c.vico-tmp", before),
        ("save:flushed", before),
        ("save:aside", aside),
        (f"flush {tmp_path.name}", after),
        ("save:renamed", after),
    ]
    assert seen == [({"new": "2", "below": None}, {"old": "1"})]
    assert content(tmp_path) == {"c": None, "c/new": "2", "c/below": None}


def test_a_first_folder_has_new_parents(tmp_path: Path) -> None:
    atomic.write_folder(tmp_path / "a" / "b" / "c", fill)
    names = ["a", "a/b", "a/b/c", "a/b/c/below", "a/b/c/new"]
    assert sorted(content(tmp_path)) == names


def refuse(_: Path) -> None:
    raise UserError("it is wrong")


def test_a_folder_that_its_check_refuses(tmp_path: Path) -> None:
    """The one of before is put back; where there was none, it stays for who looks into it."""
    assert refusal(atomic.write_folder, tmp_path / "c", fill, refuse) == "it is wrong"
    assert content(tmp_path) == {"c": None, "c/new": "2", "c/below": None}
    (tmp_path / "c" / "new").write_text("1")
    (tmp_path / "c" / "below").rmdir()
    assert refusal(atomic.write_folder, tmp_path / "c", fill, refuse) == "it is wrong"
    assert content(tmp_path) == {"c": None, "c/new": "1"}


@pytest.mark.parametrize("point", ["fill", "save:written", "save:flushed", "save:aside"])
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Whenever the disk fails: the one of before has its name again, and nothing else is left."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "old").write_text("1")

    def fail_at(reached: str) -> None:
        if reached == point:
            raise OSError(errno.EIO, "reason")

    monkeypatch.setattr(atomic, "reached", fail_at)
    message = refusal(
        atomic.write_folder, tmp_path / "c", lambda folder: (fill(folder), fail_at("fill"))
    )
    assert message == f"{tmp_path / 'c'}: cannot be written (reason); {REMEDY}"
    assert content(tmp_path) == {"c": None, "c/old": "1"}


def test_a_folder_is_removed(tmp_path: Path, events: list[tuple[str, list[str]]]) -> None:
    """First from its name, so that a kill leaves no part under it."""
    for name in ("c", ".c.vico-tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("1")
    atomic.remove_folder(tmp_path / "c")
    assert events == [("save:doomed", [".c.vico-tmp"])]
    assert content(tmp_path) == {}
    message = refusal(atomic.remove_folder, tmp_path / "c")
    reason = "cannot be removed (No such file or directory)"
    assert message == f"{tmp_path / 'c'}: {reason}; {REMEDY}"


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("1")
    (tmp_path / ".c.vico-tmp").symlink_to(tmp_path / "precious")
    atomic.write_folder(tmp_path / "c", fill)
    (tmp_path / ".d.vico-tmp").symlink_to(tmp_path / "precious")
    assert atomic.repair_folder(tmp_path) == [".d.vico-tmp removed"]
    assert content(tmp_path / "precious") == {"a": "1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "precious"]


# ---- repairs and checks -------------------------------------------------------------------------


def test_what_a_killed_run_left_is_repaired(tmp_path: Path) -> None:
    """Other hidden files are the user's."""
    for name in (".a.vico-old", ".b.vico-old", "b", ".b.vico-tmp", ".mine", "x.vico-tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".a.vico-old" / "old").write_text("1")
    (tmp_path / ".f.7.vico-tmp").write_text("half")
    assert atomic.repair_folder(tmp_path) == [
        "a put back",
        ".b.vico-old removed",
        ".b.vico-tmp removed",
        ".f.7.vico-tmp removed",
    ]
    names = {".mine": None, "a": None, "a/old": "1", "b": None, "x.vico-tmp": None}
    assert content(tmp_path) == names
    assert atomic.repair_folder(tmp_path) == []


def refused_to_plain_user(call: Callable[[Path], object]) -> str:
    """With what a folder that may only be read refuses the call."""
    with folder_of_anyone() as folder:
        (folder / ".a.vico-old").mkdir()
        folder.chmod(0o555)
        with pytest.raises(UserError) as caught:
            as_plain_user(lambda: call(folder))
        return str(caught.value).replace(str(folder), "F")


def test_folders_that_may_not_be_written() -> None:
    denied = "cannot be moved or removed (Permission denied)"
    assert refused_to_plain_user(atomic.repair_folder) == f"F/.a.vico-old: {denied}; {REMEDY}"
    may_not = "'F' may not be written to; choose another"
    said = refused_to_plain_user(lambda folder: atomic.require_writable(folder / "b" / "c"))
    assert said == f"--output_dir F/b/c: {may_not}"
    said = refused_to_plain_user(lambda folder: atomic.make_folder(folder / "b"))
    assert said == "F/b: cannot be made (Permission denied); choose another --output_dir"


def test_where_files_can_be_created(tmp_path: Path) -> None:
    """A file or a link that leads nowhere is in the way. Nothing is created to find out."""
    atomic.require_writable(tmp_path)
    atomic.require_writable(tmp_path / "a" / "b" / "c")
    assert content(tmp_path) == {}
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        said = f"--out {tmp_path / name / 'a'}: '{tmp_path / name}' is not a folder; choose another"
        if name == "file":  # asking for what lies below it is refused by the system
            said = f"--out {tmp_path / name / 'a'}: Not a directory; choose another"
        assert refusal(atomic.require_writable, tmp_path / name / "a", "--out") == said
    for path in (tmp_path / "file", tmp_path / "link"):
        said = f"--out {path}: '{path}' is not a folder; choose another"
        assert refusal(atomic.require_writable, path, "--out") == said
    atomic.make_folder(tmp_path / "a" / "b")
    atomic.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
