"""Feature and caption files that are refused, with what the error must say."""

import torch

from faults.case import Case, flags, refused
from faults.damage import (
    HTML,
    LFS,
    Payload,
    both,
    claims,
    copy,
    cut,
    gone,
    js,
    link,
    old_format,
    pipe,
    pth,
    put,
)
from faults.damage_tables import rows
from faults.payloads import as_zip, of_size
from support.run_fixture import CAPTIONS, FEATURES, NEXTQA

STRIDE_0 = torch.ones(1, 768).expand(2_000_000, 768)

FEATURE_FILES: dict[str, Case] = {
    "no features": refused(
        gone(FEATURES), "clipvitl14.pth: no such file; the video feature file should be there"
    ),
    "features cut off": refused(
        cut(FEATURES, 5000),
        "clipvitl14.pth: the video feature file is cut off or damaged; fetch or copy it again",
    ),
    "features as HTML": refused(
        put(FEATURES, HTML),
        "clipvitl14.pth: the video feature file is an HTML page (42 bytes)",
        "fetch it again",
    ),
    "features that run code": refused(
        pth(FEATURES, lambda videos: videos.update({"000000": Payload()})),
        "holds the Python object posix.mkdir, refused because loading it can run",
    ),
    "feature missing": refused(
        pth(FEATURES, lambda videos: [videos.pop("000003")] and videos),
        "clipvitl14.pth: 5 of 20 questions (1 videos) have no features, e.g. '000003'; "
        "extract them",
    ),
    "feature width": refused(
        pth(FEATURES, lambda videos: videos.update({"000000": videos["000000"][:, :512].clone()})),
        "clipvitl14.pth: 5 of 20 questions (1 videos) have features that are no "
        "floating-point tensor [frames >= 1, 768], e.g. '000000' ([",
    ),
    "feature without numbers": refused(
        pth(FEATURES, lambda videos: videos.update({"000003": torch.zeros(3, 768, device="meta")})),
        "'000003' ([3, 768] float32); extract them",
    ),
    "feature NaN": refused(
        pth(FEATURES, lambda videos: videos.update({"100001": torch.full((3, 768), torch.nan)})),
        "clipvitl14.pth: 5 of 10 questions (1 videos) have features with NaN or infinite "
        "values, e.g. '100001'",
    ),
    "no captions": refused(
        gone(CAPTIONS),
        "nextqa: holds no caption file (llava_v15",
        "name one by --captions PATH, or train with --cap 0",
    ),
    "two caption files": refused(
        copy(CAPTIONS, f"{NEXTQA}/blip2_n6.json"),
        "holds llava_v15_13b_n6.json and blip2_n6.json; say which by --captions",
    ),
    "caption missing": refused(
        js(CAPTIONS, **{"000003": ...}),
        "llava_v15_13b_n6.json: 5 of 20 questions (1 videos) have no caption, e.g. "
        "'000003'; name the file",
    ),
    "captions cut off": refused(
        cut(CAPTIONS, 900), "llava_v15_13b_n6.json:1: column ", "the text is cut off here; correct"
    ),
    "features, an id that forges lines": refused(
        rows({"video": "x\nvico: done\x1b[2J"}),
        "1 of 1 questions (1 videos) have no features, e.g. 'x\\nvico: done\\x1b[2J' (the file's "
        "ids are like '000000'); extract them",
    ),
    "features, an id that leads away": refused(
        rows({"video": "../../etc/passwd"}), "have no features, e.g. '../../etc/passwd'"
    ),
    "features, all dropped": refused(
        rows({"video": "a"}, {"video": "b"}),
        "holds features of no video of the 2 val questions",
        line="--missing_features drop",
    ),
    "features, one dimension": refused(
        pth(FEATURES, lambda videos: videos.update({"000001": torch.zeros(768)})),
        "e.g. '000001' ([768] float32)",
    ),
    "features, no frame": refused(
        pth(FEATURES, lambda videos: videos.update({"000001": torch.zeros(0, 768)})),
        "'000001' ([0, 768] float32)",
    ),
    "features, integers": refused(
        pth(FEATURES, lambda videos: videos.update({"000001": torch.zeros(3, 768).int()})),
        "([3, 768] int32)",
    ),
    "features, a list": refused(
        pth(FEATURES, lambda videos: videos.update({"000001": [[0.0]]})),
        "'000001' ([1, 1] float32)",
    ),
    "features, infinite": refused(
        pth(FEATURES, lambda videos: videos["000001"].fill_(torch.inf) is None or videos),
        "have features with NaN or infinite values, e.g. '000001'",
    ),
    "features, tuples as keys": refused(
        pth(FEATURES, lambda videos: {(k,): v for k, v in videos.items()}),
        "7 of 7 keys are no text, e.g. ('000000',); save it",
    ),
    "features, no dict": refused(
        pth(FEATURES, lambda videos: list(videos.values())), "clipvitl14.pth: holds list of length "
    ),
    "features, a name twice but for blanks": refused(
        pth(FEATURES, lambda videos: videos.update({"000001 ": videos["000001"]})),
        "two entries are called '000001'",
    ),
    "features, empty": refused(
        put(FEATURES, ""), "clipvitl14.pth: the video feature file is cut off or damaged"
    ),
    "features as git-lfs pointer": refused(
        put(FEATURES, LFS), "clipvitl14.pth: the video feature file is a git-lfs pointer"
    ),
    "features in the old format": refused(
        old_format(FEATURES),
        "in torch's old format, which cannot be memory-mapped; convert it: python -c",
    ),
    "features, larger than their file": refused(
        claims(FEATURES, 2**40), "clipvitl14.pth: the video feature file "
    ),
    "features, a neighbour's bytes": refused(
        claims(FEATURES, 30_000),
        "clipvitl14.pth: the video feature file claims tensors of other sizes than it holds",
    ),
    "features of stride 0": refused(
        pth(FEATURES, lambda videos: videos.update({"000001": STRIDE_0})),
        "clipvitl14.pth: the video feature file holds a tensor [2000000, 768] that repeats fewer",
    ),
    "features that ask for memory": refused(
        put(FEATURES, as_zip(of_size("builtins.bytearray", 6_000_000_000))),
        "clipvitl14.pth: the video feature file builds builtins.bytearray of any size; save it",
    ),
    "features, 60 GB of nothing": refused(
        cut(FEATURES, 60 << 30), "clipvitl14.pth: the video feature file is cut off or damaged"
    ),
    "features are a pipe": refused(
        pipe(FEATURES),
        "clipvitl14.pth: the video feature file cannot be opened (a device or a pipe",
    ),
    "features are a folder": refused(
        both(gone(FEATURES), lambda fixture: (fixture.folder / FEATURES).mkdir()),
        "the folder holds no .npy, .pth, .pt, .safetensors; name another",
    ),
    "caption, blank": refused(
        js(CAPTIONS, **{"000001": " \n"}),
        "5 of 20 questions (1 videos) have no caption, e.g. '000001' (it is empty); ",
    ),
    "caption, a number": refused(
        js(CAPTIONS, **{"000001": 7}), "caption of video '000001' is 7, not a text"
    ),
    "captions, a list": refused(
        put(CAPTIONS, '["a man"]'),
        "llava_v15_13b_n6.json[0]: a text where an object is expected",
    ),
    "captions, key twice": refused(
        put(CAPTIONS, '{"a": "x",\n "a": "y"}'),
        "llava_v15_13b_n6.json:2: column 2: key 'a' appears twice",
    ),
    "captions as a pickle": refused(
        put(CAPTIONS, b"\x80\x04\x95\x00"), "llava_v15_13b_n6.json:1: a NUL byte at offset 3"
    ),
    "captions are a device": refused(
        both(gone(CAPTIONS), link("d", "/dev/zero")),
        "{fixture}/d: the JSON object of captions by video id cannot be read",
        line="--captions {fixture}/d",
    ),
    "captions of elsewhere": flags(
        "--captions {fixture}/nowhere.json",
        "--captions {fixture}/nowhere.json: no such file, and ",
    ),
}
