"""Videos, lists, encoders and flags of `vico extract` that are refused."""

import json
import os
import threading
from typing import Any

from faults.case import Case, refused
from faults.damage import HTML, Damage, both, cut, folder, pipe, put
from support.run_fixture import FEATURES, RunFixture

EXTRACT = "!extract {fixture}/videos --output {fixture}/f.pth --encoder {fixture}/clip "
VIDEO, CLIP_CONFIG, CLIP_WEIGHTS = "videos/a.mp4", "clip/config.json", "clip/model.safetensors"


IMPORTING = threading.Lock()  # transformers, which cannot be imported by two threads at a time


def clip(fixture: RunFixture) -> None:
    from support.encoders import make_clip  # late: transformers is a slow import

    with IMPORTING:
        make_clip(fixture.folder / "clip")


def video(name: str = VIDEO) -> Damage:
    def make(fixture: RunFixture) -> None:
        from support.videos import make_video

        path = fixture.folder / name
        path.parent.mkdir(exist_ok=True)
        make_video(path, "mpeg4", num_frames=30)

    return make


def sound(fixture: RunFixture) -> None:
    from support.videos import make_sound

    (fixture.folder / "videos").mkdir()
    make_sound(fixture.folder / VIDEO)


def json_file(name: str, **changes: Any) -> Damage:
    def change(fixture: RunFixture) -> None:
        path = fixture.folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def renamed(name: str, new: str) -> Damage:
    return lambda fixture: os.rename(fixture.folder / name, fixture.folder / new)


def extract(damage: Damage | None, *parts: str, line: str = EXTRACT) -> Case:
    return refused(damage, *parts, line=line)


def encoder(damage: Damage, *parts: str) -> Case:
    return extract(both(video(), clip, damage), *parts)


def content(data: str | bytes, *parts: str) -> Case:
    """One video with this content."""
    return extract(both(clip, put(VIDEO, data)), "videos/a.mp4: ", *parts)


def given(line: str, *parts: str) -> Case:
    """These flags more, for a video that is there."""
    return extract(video(), *parts, line=EXTRACT + line)


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://localhost:9/a.ts\n"
ELSEWHERE = "!extract {fixture}/%s --output {fixture}/f.pth --encoder {fixture}/clip"
VIDEOS: dict[str, Case] = {
    "video is text": content("hello\n" * 99, "no video that FFmpeg can read"),
    "video is HTML": content(HTML, "no video that FFmpeg can read"),
    "video is empty": content(b"", "an empty file"),
    "video is a playlist": content(PLAYLIST, "a playlist, which names other files"),
    "video is a concat list": content("ffconcat version 1.0\nfile '/etc/passwd'\n", "a playlist"),
    "video without pictures": extract(both(clip, sound), "holds audio only"),
    "video cut off": extract(both(clip, video(), cut(VIDEO, 2000)), "videos/a.mp4: "),
    "video is a pipe": extract(both(clip, folder("videos"), pipe(VIDEO)), "a device or a pipe"),
    "no videos": extract(None, "videos: no such file or folder"),
    "no video in the folder": extract(put("videos/a.txt", "x"), "videos: holds no video"),
    "empty list of videos": extract(
        put("list.txt", "# none\n"), "list.txt: lists no video", line=ELSEWHERE % "list.txt"
    ),
    "list of a missing video": extract(
        both(clip, put("list.txt", "away.mp4\n")), "away.mp4: no such", line=ELSEWHERE % "list.txt"
    ),
    "list is no text": extract(put("list.txt", b"\xff\xfe\x00"), line=ELSEWHERE % "list.txt"),
    "two videos of one id": extract(
        both(video("videos/a.mp4"), video("videos/a.avi")), "are both of the video 'a'"
    ),
    "no encoder": given("", "clip: no such folder"),
    "encoder is OpenAI's file": extract(
        both(video(), put("ViT-L-14.pt", "PK")),
        "TorchScript",
        line="!extract {fixture}/videos --encoder {fixture}/ViT-L-14.pt --output {fixture}/f.pth",
    ),
    "encoder as a pickle": encoder(
        renamed(CLIP_WEIGHTS, "clip/pytorch_model.bin"), "pytorch_model.bin, whose pickle"
    ),
    "encoder cut off": encoder(cut(CLIP_WEIGHTS, 9999), "no whole safetensors file"),
    "encoder is a language model": encoder(
        json_file(CLIP_CONFIG, model_type="llama"), "model_type is 'llama'"
    ),
    "encoder of no sizes": encoder(
        json_file(CLIP_CONFIG, vision_config={"hidden_size": -1}), "hidden_size is -1"
    ),
    "encoder of other sizes": encoder(
        json_file(CLIP_CONFIG, vision_config={"hidden_size": 64}), "config.json"
    ),
    "encoder's config is no JSON": encoder(put(CLIP_CONFIG, "{"), "config.json"),
    "encoder's mean is text": encoder(
        json_file("clip/preprocessor_config.json", image_mean="x"), "image_mean is 'x'"
    ),
    "extract, no rate": given("--fps 0", "--fps"),
    "extract, rate is text": given("--fps fast", "'fast' is no rate"),
    "extract, unknown flag": given("--fsp 3", "--fsp"),
    "extract, another kind of file": given("--output x.h5", ".pth, .safetensors"),
    "extract, output is there": extract(
        both(video(), clip, put("f.pth", "mine")), "f.pth: exists already"
    ),
    "extract, rate of frames missing": extract(
        None, "go together", line="!extract --frames_dir {fixture} --encoder {fixture}/clip"
    ),
    "extract, no frames": extract(
        put("videos/a/x.txt", "x"),
        "no folder in it holds pictures",
        line="!extract --frames_dir {fixture}/videos --frames_fps 3 --encoder {fixture}/clip",
    ),
    "extract, nothing to compare with": given("--compare {fixture}/away.pth", "away.pth: "),
    "extract, compared with a video": extract(
        both(video(), cut(FEATURES, 5000)),
        "cut off or damaged",
        line=f"{EXTRACT} --compare {{fixture}}/{FEATURES}",
    ),
}
