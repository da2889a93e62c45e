"""The video features: mapped, checked before training, sampled as published."""

import mmap
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.errors import refusal
from support.feature_files import WIDTH, numbered, questions_about, save
from vico.data.features import Features, Scan
from vico.io.safe_load import release_pages


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
    path = tmp_path_factory.mktemp("f") / "f.pth"
    features = Features(save(path, {"v": numbered(length, torch.float16)}))
    rows = None if whole else (first, first + size)
    sampled = features.sample("v", rows, num_frames)
    clip = list(range(1, length + 1))
    if rows is not None:
        clip = clip[rows[0] : rows[1]]
    expected = clip
    if len(clip) > num_frames:
        expected = [clip[j * len(clip) // num_frames] for j in range(num_frames)]
    padding = [0] * (num_frames - len(expected))
    assert sampled.dtype == torch.float32 and sampled.shape == (num_frames, WIDTH)
    assert sampled.amin(1).tolist() == sampled.amax(1).tolist() == expected + padding
    questions = questions_about(("v", rows), ("v", None))
    assert features.check(questions) == (not clip)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_samples_are_copies(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of every floating-point type."""
    features = Features(save(tmp_path / "f.pth", {"v": numbered(3, dtype)}))
    assert features.check(questions_about(("v", None))) == 0
    features.sample("v", None, 3).zero_()
    assert features.sample("v", None, 3)[:, 0].tolist() == [1, 2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_pickling_maps_the_file_again(tmp_path: Path) -> None:
    path = save(tmp_path / "f.pth", {"v": numbered(2000)})
    features = Features(path)
    sent = pickle.dumps(features)
    assert len(sent) < 1000 < mmap.PAGESIZE
    received = pickle.loads(sent)
    assert torch.equal(received.sample("v", None, 10), features.sample("v", None, 10))
    assert Path("/proc/self/maps").read_text(encoding="utf-8").count(str(path)) >= 2
    os.utime(path, ns=(1, 1))
    assert "changed during the run" in refusal(pickle.loads(sent).frames, "v")
    assert "changed during the run" in refusal(features.check_unchanged)
    path.unlink()
    assert "cannot be opened (No such file" in refusal(features.check_unchanged)


def test_missing_videos_are_counted(tmp_path: Path) -> None:
    features = Features(save(tmp_path / "f.pth", {"v0": numbered(3)}))
    questions = questions_about(*((f"v{i // 2}", None) for i in range(12)))
    message = refusal(features.check, questions)
    assert message.startswith(
        f"{tmp_path}/f.pth: 10 of 12 questions (5 videos) have no features, e.g. 'v1', 'v2', 'v3'; "
    )


MALFORMED = {
    "[5, 512] float32": torch.zeros(5, 512),
    "[768] float32": torch.zeros(WIDTH),
    "[1, 4, 768] float32": torch.zeros(1, 4, WIDTH),
    "[0, 768] float32": torch.zeros(0, WIDTH),
    "[4, 768] int64": torch.zeros(4, WIDTH, dtype=torch.int64),
    "[4, 768] complex64": torch.zeros(4, WIDTH, dtype=torch.complex64),
    "[4, 768] float8_e4m3fn": torch.zeros(4, WIDTH).to(torch.float8_e4m3fn),
    "[2, 1] float32": [[0.0], [0.0]],
    "list of length 2": [[0.0], [0.0, 1.0]],
    "NoneType": None,
}


@pytest.mark.parametrize("description", MALFORMED)
def test_malformed_video(tmp_path: Path, description: str) -> None:
    """One among many is named with its shape. A video that no question uses does not matter."""
    videos = {f"v{i}": numbered(2) for i in range(50)} | {"odd": MALFORMED[description]}
    features = Features(save(tmp_path / "f.pth", videos))
    assert features.check(questions_about(("v1", None))) == 0
    questions = questions_about(("v1", None), ("odd", None), ("odd", (0, 1)))
    assert (
        "2 of 3 questions (1 videos) have features that are no floating-point tensor "
        f"[frames >= 1, 768], e.g. 'odd' ({description})"
    ) in refusal(features.check, questions)


def test_a_damaged_file_matters_where_it_is_used(tmp_path: Path) -> None:
    """Also if it is the first of a folder, whose first files say how wide features are."""
    for number in range(2):
        np.save(tmp_path / f"v{number}.npy", numbered(3).numpy()[:, :5])
    (tmp_path / "a.npy").write_bytes(b"no array")
    features = Features(tmp_path)
    assert features.width == 5 and features.check(questions_about(("v1", None))) == 0
    assert str(tmp_path / "a.npy") in refusal(features.check, questions_about(("a", None)))


def test_clips_past_the_end(tmp_path: Path) -> None:
    """They are counted, and are zeros."""
    features = Features(save(tmp_path / "f.pth", {"v": numbered(5)}))
    questions = questions_about(("v", (4, 9)), ("v", (5, 9)), ("v", (70, 80)), ("v", None))
    assert features.check(questions) == 2
    assert features.sample("v", (5, 9), 4).count_nonzero() == 0
    assert features.sample("v", (4, 9), 4)[:, 0].tolist() == [5, 0, 0, 0]


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    """They matter in the rows that are used."""
    nan, inf, huge = numbered(20), numbered(20, torch.float16), numbered(20, torch.float64)
    nan[3, 5], inf[19, 0], huge[0, 0] = torch.nan, torch.inf, 1e300
    features = Features(save(tmp_path / "f.pth", {"nan": nan, "inf": inf, "huge": huge}))
    spared = [("nan", None), ("nan", (4, 20)), ("inf", None), ("inf", (0, 19)), ("huge", (1, 9))]
    features.check_finite(questions_about(*spared), num_frames=10)
    used = questions_about(("nan", (0, 6)), ("inf", (15, 25)), ("huge", None), ("nan", (4, 9)))
    assert (
        "4 of 4 questions (3 videos) have features with NaN or infinite values, "
        "e.g. 'nan', 'inf', 'huge'"
    ) in refusal(features.check_finite, used, num_frames=10)


@pytest.mark.parametrize(
    "content, part",
    [
        ({}, "holds dict of length 0, not a dict from video id"),
        ([numbered(1)], "holds list of length 1"),
        (numbered(1), "[1, 768]"),
        ({(7,): numbered(1), "8": numbered(1)}, "1 of 2 keys are no text, e.g. (7,)"),
        ({7: numbered(1), "7": numbered(1)}, "two entries are called '7'"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, content: Any, part: str) -> None:
    assert part in refusal(Features, save(tmp_path / "f.pth", content))


def test_a_scan_names_what_is_odd(tmp_path: Path) -> None:
    """A value in one row is enough; half of a row of zeros is none."""
    videos = {name: numbered(4) for name in ("good", "nan", "inf", "-inf", "zeros", "half zeros")}
    videos["nan"][0, 5], videos["inf"][3, 0], videos["-inf"][2, 7] = (
        torch.nan,
        torch.inf,
        -torch.inf,
    )
    videos["zeros"][1], videos["half zeros"][1, 9:] = 0, 0
    videos["half zeros"][2] *= -1
    videos["half zeros"][2, 9:] = 0
    odd = {**videos, "integers": torch.ones(4, WIDTH, dtype=torch.int64)}
    features = Features(save(tmp_path / "f.pth", odd))
    assert features.scan() == Scan(("integers",), ("nan", "inf", "-inf"), ("zeros",))


def mapped_kilobytes(path: Path) -> int:
    """Memory of this process that holds pages of the file."""
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            counted = line.endswith(str(path))
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def test_reading_all_holds_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages of a file of 18 MB are given back on the way, and their values stay."""
    videos = {f"v{i}": torch.full((300, WIDTH), float(i + 1)) for i in range(20)}
    features = Features(save(tmp_path / "clips.pth", videos))
    monkeypatch.setattr("vico.data.features.RELEASE_BYTES", 1 << 20)
    assert features.scan() == Scan((), (), ())
    assert mapped_kilobytes(features.path) < 3000
    assert all(torch.equal(features.frames(video), videos[video]) for video in videos)
    assert mapped_kilobytes(features.path) < 3000
    # Torch swaps bytes in place when it loads a file of another byte order.
    features.frames("v0")[0, 0] = 7.0
    release_pages(features.path)
    assert features.frames("v0")[0, 0] == 7.0 and mapped_kilobytes(features.path) > 0
