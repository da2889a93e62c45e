"""`vico extract`: damaged files, killed runs, several ranks, frames on disk, a comparison."""

import os
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("transformers")

from support.encoders import make_clip
from support.errors import refusal
from support.processes import start
from support.videos import make_sound, make_video, picture
from vico.cli import extract
from vico.data.features import Features
from vico.distributed.world import World
from vico.errors import UserError
from vico.io import failpoints
from vico.io.digest import digest_files
from vico.video import provenance
from vico.video.encoder import load_encoder
from vico.video.features import video_features
from vico.video.pictures import decode_pictures, pictures_in
from vico.video.provenance import Provenance

NUM_VIDEOS = 20
DAMAGED = {"v03.mp4": "no such file", "v07.mp4": "audio only", "v11.mp4": "cut off"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 videos, of one to three seconds."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(NUM_VIDEOS):
        make_video(folder / f"v{i:02}.mp4", "mpeg4", (48, 32), 5 + i % 3 * 5, rate=5)
    return folder


@pytest.fixture
def failpoint(monkeypatch: pytest.MonkeyPatch):
    yield failpoints.arm
    failpoints.arm(None)


def run(world: World, *words: object) -> None:
    extract.run(extract.parse([*map(str, words), "--num_workers", "2"]), world)


def test_damaged_among_others(
    videos: Path, clip: Path, tmp_path: Path, alone: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """3 of 20 are named and left out. Once they are mended, they alone are extracted."""
    folder, output = tmp_path / "videos", tmp_path / "f.pth"
    shutil.copytree(videos, folder)
    (folder / "v03.mp4").unlink()
    (folder / "v03.mp4").symlink_to(tmp_path / "none")
    make_sound(folder / "v07.mp4")
    (folder / "v11.mp4").write_bytes((folder / "v11.mp4").read_bytes()[:900])
    (folder / "notes.txt").touch()
    words = (folder, "--encoder", clip, "--output", output, "--fps", "3")
    with pytest.raises(UserError) as caught:
        run(alone, *words)
    assert caught.value.exit_code == 2 and "3 of 20 videos are left out" in str(caught.value)
    named = {Path(path).name: reason for path, reason in caught.value.table}
    assert named.keys() == DAMAGED.keys()
    assert all(reason in named[name] for name, reason in DAMAGED.items()), named
    printed = capsys.readouterr().out
    assert "1 other files, as notes.txt" in printed and "decoding alone takes" in printed
    assert printed.splitlines()[-1] == f"{output}: features of 17 of 20 videos; 3 left out"
    features, encoder = Features(output), load_encoder(clip)
    assert features.width == encoder.width
    content = torch.load(output)
    assert len(content) == 17
    for name in ("v00", "v01", "v02"):
        expected = video_features(folder / f"{name}.mp4", encoder, Fraction(3))
        assert torch.equal(content[name], expected)
    for name in DAMAGED:
        (folder / name).unlink()
        shutil.copy2(videos / name, folder / name)
    run(alone, *words)
    assert "17 of 20 videos are done already" in capsys.readouterr().out
    assert list(torch.load(output)) == [f"v{i:02}" for i in range(NUM_VIDEOS)]
    assert not (tmp_path / "f.pth.parts").exists()
    assert "exists already" in refusal(run, alone, *words)


@pytest.mark.parametrize("name", ["f.pth", "f.safetensors", "folder"])
def test_stopped_anywhere(
    name: str, videos: Path, clip: Path, tmp_path: Path, alone: World, failpoint
) -> None:
    """Stopped at each kind of moment and started again, the file is the same."""
    whole, output = tmp_path / "whole" / name, tmp_path / "stopped" / name
    for path in (whole, output):
        path.parent.mkdir()
    words = (videos, "--encoder", clip, "--output")
    run(alone, *words, whole)
    for point in ("extract:part@4", "extract:part@9", "extract:assemble", "extract:assembled"):
        failpoint(f"{point}=raise OSError")
        with pytest.raises(OSError, match="failpoint"):
            run(alone, *words, output)
        failpoint(None)
    run(alone, *words, output)
    assert digest(output) == digest(whole)
    assert sorted(os.listdir(output.parent)) == sorted([name, provenance.path_of(output).name])
    assert provenance.read(output) == Provenance(clip.name, load_encoder(clip).digest, Fraction(1))
    assert len(Features(output)) == NUM_VIDEOS
    if output.is_file():  # other features under this name
        output.write_bytes(output.read_bytes() + b" ")
        assert provenance.read(output) is None


def digest(path: Path) -> str:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return digest_files(files)


def test_killed_on_two_ranks(videos: Path, clip: Path, tmp_path: Path, alone: World) -> None:
    """kill -9 of both ranks; two ranks finish it. One rank writes the same file."""
    outputs = [tmp_path / "two.pth", tmp_path / "one.pth"]
    words = [str(videos), "--encoder", str(clip), "--output"]
    killed = {"VICO_FAILPOINT": "extract:part@4=kill"}
    first = start("extract", *words, str(outputs[0]), ranks=2, environment=killed)
    assert -9 in first.wait(), first.output
    assert not outputs[0].exists() and (tmp_path / "two.pth.parts").is_dir()
    second = start("extract", *words, str(outputs[0]), ranks=2)
    assert second.wait() == [0, 0], second.output
    assert "are done already" in second.stdouts[0]
    run(alone, *words, outputs[1])
    assert digest(outputs[0]) == digest(outputs[1])


def test_other_settings(videos: Path, clip: Path, tmp_path: Path, alone: World, failpoint) -> None:
    """Parts of another rate or encoder are not mixed in; a replaced video is made anew."""
    words = (videos, "--encoder", clip, "--output", tmp_path / "f.pth")
    failpoint("extract:assemble=raise OSError")
    with pytest.raises(OSError):
        run(alone, *words)
    failpoint(None)
    assert "have fps '1', not '2'" in refusal(run, alone, *words, "--fps", 2)
    other = make_clip(tmp_path / "other", width=8)
    named = refusal(run, alone, videos, "--encoder", other, "--output", tmp_path / "f.pth")
    assert "have encoder" in named


def test_frames_on_disk(clip: Path, tmp_path: Path, alone: World) -> None:
    """Pictures in natural order, at the stated rate, are the frames of the video."""
    import av

    folder = tmp_path / "frames" / "clip"
    folder.mkdir(parents=True)
    for t in range(12):
        frame = av.VideoFrame.from_ndarray(picture(48, 32, t), format="rgb24")
        frame.save(folder / f"{t}.png")
    make_video(tmp_path / "clip.mkv", "ffv1", (48, 32), 12, rate=4, pixels="bgr0")
    rest = ("--encoder", clip, "--fps", 2, "--output")
    run(alone, "--frames_dir", folder.parent, "--frames_fps", 4, *rest, tmp_path / "a.pth")
    run(alone, tmp_path / "clip.mkv", *rest, tmp_path / "b.pth")
    ours, expected = torch.load(tmp_path / "a.pth"), torch.load(tmp_path / "b.pth")
    assert ours["clip"].shape == (6, 24)
    assert torch.equal(ours["clip"], expected["clip"])
    whole = (folder / "5.png").read_bytes()
    (folder / "5.png").write_bytes(whole[: len(whole) // 2])
    words = ("--frames_dir", folder.parent, "--frames_fps", 4, *rest, tmp_path / "c.pth")
    assert "damaged: 5.png: cannot be decoded" in refusal(run, alone, *words)
    assert not (tmp_path / "c.pth.parts").exists()
    run(alone, *words, "--keep_damaged")
    assert torch.load(tmp_path / "c.pth")["clip"].shape == (6, 24)


def test_pictures(tmp_path: Path) -> None:
    """JPEG and PNG of several sizes; one that is cut off is named."""
    import av

    names = ("a2.JPG", "a10.png", "a1.jpeg")
    for t, name in enumerate(names):
        frame = av.VideoFrame.from_ndarray(picture(48 + 20 * t, 32, t), format="rgb24")
        frame.save(tmp_path / name.lower())
        (tmp_path / name.lower()).rename(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert [path.name for path in pictures_in(tmp_path)] == ["a1.jpeg", "a2.JPG", "a10.png"]
    one = Fraction(1)
    assert [len(block) for block in decode_pictures(tmp_path, one, one, 32)] == [3]
    whole = (tmp_path / "a2.JPG").read_bytes()
    (tmp_path / "a2.JPG").write_bytes(whole[: len(whole) // 2])
    assert "a2.JPG: cannot be decoded" in refusal(list, decode_pictures(tmp_path, one, one, 32))


def test_compare(
    videos: Path, clip: Path, tmp_path: Path, alone: World, capsys: pytest.CaptureFixture[str]
) -> None:
    run(alone, videos, "--encoder", clip, "--output", tmp_path / "a.pth")
    given = torch.load(tmp_path / "a.pth")
    given["v00.mp4"] = given.pop("v00") * 2
    given["v01"] = torch.cat([given["v01"], -given["v01"]])
    given["v02"] = -given["v02"]
    del given["v03"]
    given["v04"] = torch.ones(2, 5)
    torch.save(given, tmp_path / "given.pth")
    words = ("--encoder", clip, "--output", tmp_path / "b.pth", "--compare")
    run(alone, videos, *words, tmp_path / "given.pth")
    lines = capsys.readouterr().out.splitlines()
    assert "'v00': cosine 1.000000, lowest 1.000000, 1 frames, there 1" in lines
    assert any(line.startswith("'v01': cosine 1.0") and "there 4" in line for line in lines)
    assert any(line.startswith("'v02': cosine -1.0") for line in lines)
    assert "'v03': not in given.pth" in lines
    assert any("[2, 24] float16, there [2, 5] float32: other widths" in line for line in lines)
    assert any("18 videos compared" in line and "2 cannot be" in line for line in lines)


def test_lists(videos: Path, clip: Path, tmp_path: Path, alone: World) -> None:
    """A path per line, absolute or from the list's folder; a missing one is named."""
    shutil.copy2(videos / "v00.mp4", tmp_path / "near.mp4")
    listed = tmp_path / "list.txt"
    listed.write_text(f"# mine\n{videos / 'v01.mp4'}\n\nnear.mp4\nnone.mp4\n")
    words = (listed, "--encoder", clip, "--output", tmp_path / "f.safetensors")
    with pytest.raises(UserError) as caught:
        run(alone, *words)
    assert caught.value.table == ((str(tmp_path / "none.mp4"), "no such file"),)
    features = Features(tmp_path / "f.safetensors")
    assert len(features) == 2 and "near" in features and "v01.mp4" in features


def test_two_files_of_one_id(videos: Path, clip: Path, tmp_path: Path, alone: World) -> None:
    for name in ("a/x.mp4", "b/x.avi"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(videos / "v00.mp4", tmp_path / name)
    words = (tmp_path, "--encoder", clip, "--output", tmp_path / "f.pth")
    assert "are both of the video 'x'" in refusal(run, alone, *words)


def test_flags(videos: Path, tmp_path: Path) -> None:
    """Each refused in one line that names the flag."""

    def refused(*words: object) -> str:
        return refusal(extract.parse, [*map(str, words), "--encoder", "x"])

    assert "--fps" in refused(videos, "--fps", "0")
    assert "'1/0' is no rate" in refused(videos, "--fps", "1/0")
    assert "nan" in refused(videos, "--fps", "nan")
    assert "VIDEOS or --frames_dir" in refused()
    assert "go together" in refused("--frames_dir", videos)
    assert ".pth, .safetensors" in refused(videos, "--output", "x.h5")
    assert "the folder of --output" in refused(videos, "--output", f"{__file__}/x.pth")
    assert "--encoder" in refusal(extract.parse, [str(videos)])
