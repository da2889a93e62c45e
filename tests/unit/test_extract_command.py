"""`vico extract` of one rank, in this process: what it writes, says, leaves out and takes up."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("transformers")

from faults.emulated_ranks import EmulatedWorld, Exchange
from support.encoders import make_clip
from support.errors import refusal
from support.videos import make_video
from vico.cli import extract
from vico.distributed.world import World
from vico.errors import UserError
from vico.video import provenance
from vico.video.encoder import load_encoder
from vico.video.listing import Video
from vico.video.parts import Parts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("encoder") / "clip")


def test_videos_good_and_bad(
    clip: Path, tmp_path: Path, alone: World, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that cannot be decoded is left out; mended, it alone is extracted."""
    videos, output = tmp_path / "videos", tmp_path / "new" / "f.pth"
    videos.mkdir()
    output.parent.mkdir()
    for name, num_frames in (("a", 50), ("b", 100)):
        make_video(videos / f"{name}.mp4", num_frames=num_frames)
    (videos / "c.mp4").write_bytes((videos / "a.mp4").read_bytes()[:200])
    words = [str(videos), "--encoder", str(clip), "--output", str(output), "--num_workers", "1"]
    flags = extract.parse(words)
    message = refusal(extract.run, flags, alone)
    assert message == (
        f"1 of 3 videos are left out: the other 2 are in {output}; mend them and start the same "
        f"command again, or remove {output}.parts"
    )
    said = capfd.readouterr().out.splitlines()
    assert said[0].startswith("6 frames of 3 videos in ")
    assert said[-1] == f"{output}: features of 2 of 3 videos; 1 left out"
    features = torch.load(output)
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "a": (2, 24),
        "b": (4, 24),
    }
    digest = load_encoder(clip, CPU).digest
    assert provenance.read(output) == provenance.Provenance("clip", digest, Fraction(1))
    (videos / "c.mp4").unlink()
    make_video(videos / "c.mp4", num_frames=25)
    extract.run(flags, alone)
    said = capfd.readouterr().out.splitlines()
    assert said[0] == f"{output}.parts: 2 of 3 videos are done already"
    assert said[1].startswith("1 frames of 1 videos in ")
    assert said[2:] == [f"{output}: features of 3 of 3 videos"]
    assert {name: len(value) for name, value in torch.load(output).items()} == dict(a=2, b=4, c=1)
    assert sorted(path.name for path in output.parent.iterdir()) == ["f.pth", "f.pth.encoder.json"]
    exists = f"--output {output}: exists already; name another, or remove it"
    assert refusal(extract.run, flags, alone) == exists
    compared = extract.parse([*words[:3], "--output", f"{output}.more.pth", "--compare", words[4]])
    extract.run(compared, alone)
    said = capfd.readouterr().out.splitlines()
    assert said[1] == "'a': cosine 1.000000, lowest 1.000000, 2 frames, there 2"
    assert len(said) == 6 and said[-1].endswith(".more.pth: features of 3 of 3 videos")


def test_damaged_videos_are_kept_if_asked(
    clip: Path, tmp_path: Path, alone: World, capfd: pytest.CaptureFixture[str]
) -> None:
    """What can be decoded of one; its end is said."""
    whole = make_video(tmp_path / "a.mkv", num_frames=200)
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) * 3 // 4])
    output = tmp_path / "f.safetensors"
    words = [str(whole), "--encoder", str(clip), "--output", str(output), "--num_workers", "1"]
    message = refusal(extract.run, extract.parse(words), alone)
    assert message.startswith(f"{whole}: ") and message.endswith("; nothing is written")
    assert list(tmp_path.iterdir()) == [whole]
    capfd.readouterr()
    extract.run(extract.parse([*words, "--keep_damaged"]), alone)
    said = capfd.readouterr()
    assert said.out.splitlines()[-1] == f"{output}: features of 1 of 1 videos"
    reason = message.removesuffix("; nothing is written")
    assert said.err == f"vico: {reason}; kept\n"


def test_what_is_done_first(
    tmp_path: Path, alone: World, capfd: pytest.CaptureFixture[str]
) -> None:
    """The largest; what has a part is not done again."""
    sizes = {"a": 5, "b": 9, "c": 7, "d": 9}
    videos = [Video(name, tmp_path / name, size, name * 4) for name, size in sizes.items()]
    parts = Parts(tmp_path / "f.pth")
    todo = extract._missing(videos, parts, {"fps": "1"}, alone)
    assert [video.id for video in todo] == ["b", "d", "c", "a"]
    assert capfd.readouterr().out == ""
    parts.write(videos[3], torch.zeros(1, 2), is_damaged=False)
    todo = extract._missing(videos, parts, {"fps": "1"}, alone)
    assert [video.id for video in todo] == ["b", "c", "a"]
    assert f"{parts.folder}: 1 of 4 videos are done already\n" in capfd.readouterr().out
    message = refusal(extract._missing, videos, parts, {"fps": "2"}, alone)
    assert "its features have fps '1', not '2'" in message


def test_ranks_must_see_the_same_videos(tmp_path: Path) -> None:
    first = EmulatedWorld(0, 2, CPU, None, exchange=Exchange(2))
    worlds = [first, dataclasses.replace(first, rank=1)]
    video = Video("a", tmp_path / "a", 1, "x")
    for other, are_same in (
        (dataclasses.replace(video, path=tmp_path / "elsewhere"), True),
        (dataclasses.replace(video, stamp="y"), False),
        (dataclasses.replace(video, id="b"), False),
    ):

        def of_rank(rank: int, other: Video = other) -> UserError:
            with pytest.raises(UserError) as caught:
                extract._require_same_videos([[video], [other]][rank], worlds[rank])
                raise UserError("the same")
            return caught.value

        with ThreadPoolExecutor(2) as ranks:
            errors = list(ranks.map(of_rank, range(2)))
        message = "the ranks see different videos; mount the same folder on every host"
        assert [str(error) for error in errors] == ["the same" if are_same else message] * 2
        assert [error.of_all_ranks for error in errors] == [not are_same] * 2


def test_the_device_of_an_encoder(alone: World) -> None:
    gpu: Any = dataclasses.replace(alone, device=torch.device("cuda:1"))
    assert extract._device("cpu", gpu) == "cpu"
    assert extract._device(None, gpu) == extract._device("cuda", gpu) == gpu.device
    if alone.device.type == "cpu":
        assert refusal(extract._device, "cuda", alone) == (
            "--device cuda: torch finds no GPU; leave the flag out"
        )
