"""What comes with each video: features (mapped, checked before training, sampled as published, never executed), captions."""

import argparse
import mmap
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.errors import refusal
from vico.data.features import WIDTH, Features
from vico.data.readers import captions
from vico.data.types import Question
from vico.errors import CheckpointError
from vico.io.safe_load import load_tensors


def numbered(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Row r holds r + 1, so that a zero row is padding."""
    return torch.arange(1, length + 1, dtype=dtype)[:, None].expand(length, WIDTH).contiguous()


def save(path: Path, videos: Any, **how: Any) -> Path:
    torch.save(videos, path, **how)
    return path


def ask(*clips: tuple[str, tuple[int, int] | None]) -> list[Question]:
    return [
        Question(i, str(i), video, "CW", "why", ("a", "b"), 0, rows)
        for i, (video, rows) in enumerate(clips)
    ]


@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(1, 40),
    num_frames=st.integers(1, 12),
    first=st.integers(0, 50),
    size=st.integers(1, 50),
    whole=st.booleans(),
)
@example(length=11, num_frames=10, first=0, size=1, whole=True)
def test_sample_takes_the_published_rows(
    tmp_path_factory: pytest.TempPathFactory,
    length: int,
    num_frames: int,
    first: int,
    size: int,
    whole: bool,
) -> None:
    features = Features(
        save(tmp_path_factory.mktemp("f") / "f.pth", {"v": numbered(length, torch.float16)})
    )
    rows = None if whole else (first, first + size)
    taken = features.sample("v", rows, num_frames)
    clip = list(range(1, length + 1))[slice(*rows) if rows else slice(None)]
    expected = (
        [clip[j * len(clip) // num_frames] for j in range(num_frames)]
        if len(clip) > num_frames
        else clip
    )
    assert taken.dtype == torch.float32 and taken.shape == (num_frames, WIDTH)
    assert (
        taken.amin(1).tolist()
        == taken.amax(1).tolist()
        == expected + [0] * (num_frames - len(expected))
    )
    assert features.check(ask(("v", rows))) == (not clip)


def test_samples_are_copies_and_all_float_types_are_taken(tmp_path: Path) -> None:
    kinds = {
        str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    }
    features = Features(
        save(tmp_path / "f.pth", {name: numbered(3, dtype) for name, dtype in kinds.items()})
    )
    assert features.check(ask(*((name, None) for name in kinds))) == 0
    for name in kinds:
        features.sample(name, None, 3).zero_()
        assert features.sample(name, None, 3)[:, 0].tolist() == [1, 2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_the_file_is_mapped_and_pickling_reopens_it(tmp_path: Path) -> None:
    path = save(tmp_path / "f.pth", {"v": numbered(2000)})
    features = Features(path)
    sent = pickle.dumps(features)
    assert len(sent) < 1000 < mmap.PAGESIZE
    received = pickle.loads(sent)
    assert torch.equal(received.sample("v", None, 10), features.sample("v", None, 10))
    assert Path("/proc/self/maps").read_text().count(str(path)) >= 2
    os.utime(path, ns=(1, 1))
    assert "changed during the run" in refusal(pickle.loads(sent).frames, "v")
    assert "changed during the run" in refusal(features.check_unchanged)
    path.unlink()
    assert "cannot be opened (No such file" in refusal(features.check_unchanged)


def test_missing_videos_are_counted(tmp_path: Path) -> None:
    features = Features(save(tmp_path / "f.pth", {"v0": numbered(3)}))
    message = refusal(features.check, ask(*((f"v{i // 2}", None) for i in range(12))))
    assert message.startswith(
        f"{tmp_path}/f.pth: 10 of 12 questions (5 videos) have no features, e.g. 'v1', 'v2', 'v3'; "
    )


BAD_VALUES = {
    "[5, 512] float32": torch.zeros(5, 512),
    "[768] float32": torch.zeros(WIDTH),
    "[1, 4, 768] float32": torch.zeros(1, 4, WIDTH),
    "[0, 768] float32": torch.zeros(0, WIDTH),
    "[4, 768] int64": torch.zeros(4, WIDTH, dtype=torch.int64),
    "[4, 768] complex64": torch.zeros(4, WIDTH, dtype=torch.complex64),
    "list of length 2": [[0.0], [0.0]],
    "NoneType": None,
}


@pytest.mark.parametrize("described", BAD_VALUES)
def test_one_bad_video_among_many_is_named_with_its_shape(tmp_path: Path, described: str) -> None:
    videos = {f"v{i}": numbered(2) for i in range(50)} | {"odd": BAD_VALUES[described]}
    features = Features(save(tmp_path / "f.pth", videos))
    assert features.check(ask(("v1", None))) == 0  # what no question uses harms nobody
    message = refusal(features.check, ask(("v1", None), ("odd", None), ("odd", (0, 1))))
    assert (
        f"2 of 3 questions (1 videos) have features that are no floating-point tensor [frames >= 1, 768], e.g. 'odd' ({described})"
        in message
    )


def test_clips_past_the_end_are_counted_and_zero(tmp_path: Path) -> None:
    features = Features(save(tmp_path / "f.pth", {"v": numbered(5)}))
    assert features.check(ask(("v", (4, 9)), ("v", (5, 9)), ("v", (70, 80)), ("v", None))) == 2
    assert features.sample("v", (5, 9), 4).count_nonzero() == 0
    assert features.sample("v", (4, 9), 4)[:, 0].tolist() == [5, 0, 0, 0]


def test_values_that_are_not_finite_are_found_where_they_would_be_used(tmp_path: Path) -> None:
    nan, inf, huge = numbered(20), numbered(20, torch.float16), numbered(20, torch.float64)
    nan[3, 5], inf[19, 0], huge[0, 0] = torch.nan, torch.inf, 1e300
    features = Features(save(tmp_path / "f.pth", {"nan": nan, "inf": inf, "huge": huge}))
    features.check_finite(
        ask(("nan", None), ("nan", (4, 20)), ("inf", None), ("inf", (0, 19)), ("huge", (1, 9))),
        num_frames=10,
    )
    message = refusal(
        features.check_finite,
        ask(("nan", (0, 6)), ("inf", (15, 25)), ("huge", None), ("nan", (4, 9))),
        num_frames=10,
    )
    assert (
        "4 of 4 questions (3 videos) have features with NaN or infinite values, e.g. 'nan', 'inf', 'huge'"
        in message
    )


@pytest.mark.parametrize(
    "content, part",
    [
        ({}, "holds dict of length 0, not a dict from video id"),
        ([numbered(1)], "holds list of length 1"),
        (numbered(1), "[1, 768]"),
        ({7: numbered(1), "8": numbered(1)}, "1 of 2 keys are no text, e.g. 7"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, content: Any, part: str) -> None:
    assert part in refusal(Features, save(tmp_path / "f.pth", content))


# ---- captions --------------------------------------------------------------------------------------------------------


def test_the_folders_one_caption_file_is_read(tmp_path: Path) -> None:
    assert "no caption file (llava_v15_13b_n6.json, " in refusal(captions.read, tmp_path, None)
    (tmp_path / "blip2_n6.json").write_text('{"007": " A man. ", "8": "x"}')
    assert captions.read(tmp_path, None) == {"007": " A man. ", "8": "x"}
    mine = tmp_path / "mine.json"
    mine.write_text('\ufeff{"007": "mine"}', encoding="utf-8")
    (tmp_path / "llava_v15_13b_n6.json").write_text("{}")
    message = refusal(captions.read, tmp_path, None)
    assert "holds llava_v15_13b_n6.json and blip2_n6.json; say which by --captions PATH" in message
    assert (
        captions.read(tmp_path, mine)
        == captions.read(tmp_path, Path("mine.json"))
        == {"007": "mine"}
    )
    assert "nowhere.json: no such file" in refusal(captions.read, tmp_path, Path("nowhere.json"))


@pytest.mark.parametrize(
    "content, part",
    [
        ('{"a": " ", "b": "x"}', "caption of video 'a' is empty"),
        (
            '{"a": null, "b": 7}',
            "2 of 2 rows are bad: mine.json: caption of video 'a' is None, not a text",
        ),
        ('{"a": "x",\n "a": "y"}', "mine.json:2: column 2: key 'a' stands twice"),
        ('["a"]', "a list where a JSON object is expected"),
        ('{"a": "x"', "the text is cut off here"),
    ],
)
def test_bad_caption_files(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "mine.json").write_text(content)
    assert part in refusal(captions.read, tmp_path, tmp_path / "mine.json")


def test_questions_without_caption_are_counted() -> None:
    questions = ask(*((f"v{i // 2}", None) for i in range(12)))
    captions.check({f"v{i}": "x" for i in range(6)}, questions, Path("c.json"))
    message = refusal(captions.check, {"v0": "x"}, questions, Path("c.json"))
    assert (
        message.startswith(
            "c.json: 10 of 12 questions (5 videos) have no caption, e.g. 'v1', 'v2', 'v3'; "
        )
        and "--cap 0" in message
    )


# ---- safeload --------------------------------------------------------------------------------------------------------


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
        message = refusal(load_tensors, tmp_path / name, "the checkpoint", allow_old_format=True)
        assert (
            f"{tmp_path / name}: the checkpoint holds the Python object posix.mkdir, refused"
            in message
            and "tensors" in message
        )
    assert "is no torch file" in refusal(
        load_tensors, tmp_path / "plain.pth", "the checkpoint", allow_old_format=True
    )
    assert "numpy" in refusal(Features, save(tmp_path / "np.pth", {"v": np.zeros((2, WIDTH))}))
    assert not canary.exists()


def test_classes_are_allowed_by_name_and_only_for_the_call(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pth", {"args": argparse.Namespace(bias=3)})
    assert load_tensors(path, "the checkpoint", [argparse.Namespace])["args"].bias == 3
    assert "argparse.Namespace" in refusal(load_tensors, path, "the checkpoint")
    with pytest.raises(CheckpointError):
        load_tensors(path, "the checkpoint", error=CheckpointError)


def test_the_old_format_is_read_only_where_asked(tmp_path: Path) -> None:
    path = save(tmp_path / "old.pth", {"v": numbered(4)}, _use_new_zipfile_serialization=False)
    message = refusal(Features, path)
    assert "old format, which cannot be memory-mapped; convert it: python -c" in message
    assert torch.equal(load_tensors(path, "the shard", allow_old_format=True)["v"], numbered(4))
    path.write_bytes(path.read_bytes()[:5000])
    assert "the shard is cut off or damaged" in refusal(
        load_tensors, path, "the shard", allow_old_format=True
    )


@pytest.mark.parametrize(
    "content, part",
    [
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
    ],
)
def test_disguises(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "f.pth").write_bytes(content)
    assert f"{tmp_path}/f.pth: the video feature file {part}" in refusal(
        Features, tmp_path / "f.pth"
    )


def test_other_zips_missing_files_and_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("a/readme.txt", "x")
    assert "is a zip archive, but not one of tensors" in refusal(Features, tmp_path / "other.pth")
    with zipfile.ZipFile(tmp_path / "deflated.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in zipfile.ZipFile(save(tmp_path / "f.pth", {"v": numbered(3)})).infolist():
            archive.writestr(entry.filename, zipfile.ZipFile(tmp_path / "f.pth").read(entry))
    assert "was packed again" in refusal(Features, tmp_path / "deflated.pth")
    assert "no such file; the video feature file should be there" in refusal(
        Features, tmp_path / "none.pth"
    )
    assert "cannot be opened (Is a directory)" in refusal(Features, tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "f.pth", {"v": numbered(4), "w": numbered(2)}).read_bytes()
    path = tmp_path / "cut.pth"
    for size in {
        0,
        1,
        3,
        4,
        10,
        *range(0, len(whole), len(whole) // 40),
        len(whole) - 22,
        len(whole) - 1,
    }:
        path.write_bytes(whole[:size])
        assert (
            f"{path}: the video feature file is cut off or damaged; fetch or copy it again"
            in refusal(Features, path)
        ), size
