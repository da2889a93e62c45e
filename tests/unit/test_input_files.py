"""Whether the files of a run are still those that it opened."""

import os
from pathlib import Path

import pytest
import torch

from support.errors import refusal
from support.feature_files import numbered, save
from vico.data.features import Features
from vico.io.input_files import InputFiles


def change_entry(path: Path) -> None:
    path.chmod(0o444)
    os.link(path, path.with_suffix(".link"))


def test_a_changed_entry_is_no_change_of_content(tmp_path: Path) -> None:
    """A chmod or a hard link: the content is compared, once, as far as it is known."""
    paths = [tmp_path / f"{i}.pth" for i in range(3)]
    for path in paths:
        save(path, {"v": numbered(3, torch.float16)})
    features, files, compared = Features(paths[0]), InputFiles(paths), list[Path]()

    def is_same(path: Path) -> bool:
        compared.append(path)
        return True

    for path in paths[1:]:
        change_entry(path)
    assert "its entry was changed, at the same size" in refusal(files.check_unchanged)
    files.compare_by(paths, is_same)
    files.check_unchanged()
    files.check_unchanged()
    assert compared == paths[1:2], "once for all that belong together"
    change_entry(paths[0])
    features.check_unchanged()


@pytest.mark.parametrize("has_new_time", [True, False])
def test_written_files_are_refused(tmp_path: Path, has_new_time: bool) -> None:
    """With a new time the content may have been another meanwhile, so it is not compared."""
    path = save(tmp_path / "f.pth", {"v": numbered(3, torch.float16)})
    files, times = InputFiles([path]), path.stat()
    files.compare_by([path], lambda _: has_new_time)
    with path.open("r+b") as file:
        file.write(b"P")
    if not has_new_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "changed during the run: it was written" in refusal(files.check_unchanged)
