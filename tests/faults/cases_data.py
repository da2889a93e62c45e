"""Tables, features, captions and subtitles that cannot be used, with what the line must say."""

import json

import torch

from faults.damage import (
    HTML,
    LFS,
    Case,
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
    rows,
    star,
    star_item,
    text,
    tvqa,
    tvqa_row,
)
from support.run_fixture import CAPTIONS, CHECKPOINT, FEATURES, NEXTQA, VAL

STAR, TVQA, SUB = "--dataset star", "--dataset tvqa", "--dataset tvqa --sub"
ANSWERS = ("", "1.0", "5", "-1", "B", "True", "nan", "+1", "01", "\u00b9")
TIMES = ("", "5", "9-3", "a-b", "1-inf", "-5-9")

DATA: dict[str, Case] = {
    # data
    "no data": (
        None,
        "--data_path {fixture}/nowhere",
        2,
        ["{fixture}/nowhere/nextqa/train.csv: no such file; the CSV of the train questions"],
    ),
    "no val.csv": (
        gone(VAL),
        "",
        2,
        ["val.csv: no such file; the CSV of the val questions should be there"],
    ),
    "no test.csv": (
        gone(f"{NEXTQA}/test.csv"),
        "eval --split test --resume {fixture}/" + CHECKPOINT,
        2,
        ["test.csv: no such file; the CSV of the test questions"],
    ),
    "column missing": (
        text(VAL, ",a3,", ",b3,"),
        "",
        2,
        ["val.csv:1: column 'a3' missing (has: 'video', ", "add what is missing to"],
    ),
    "answer 7": (
        rows({}, {}, {}, {"answer": "7"}),
        "",
        2,
        ["val.csv:5: 'answer' is '7', not one of 0, 1, 2, 3, 4; correct"],
    ),
    "text that forges lines": (
        rows({"answer": "7\nvico: done\x1b[2J"}),
        "",
        2,
        ["'7\\nvico: done\\x1b[2J', not one of"],
    ),
    "no features": (
        gone(FEATURES),
        "",
        2,
        ["clipvitl14.pth: no such file; the video feature file should be there"],
    ),
    "features cut off": (
        cut(FEATURES, 5000),
        "",
        2,
        ["clipvitl14.pth: the video feature file is cut off or damaged; fetch or copy it again"],
    ),
    "features as HTML": (
        put(FEATURES, HTML),
        "",
        2,
        ["clipvitl14.pth: the video feature file is an HTML page (42 bytes)", "fetch it again"],
    ),
    "features that run code": (
        pth(FEATURES, lambda videos: videos.update({"000000": Payload()})),
        "",
        2,
        ["holds the Python object posix.mkdir, refused because loading it can run"],
    ),
    "feature missing": (
        pth(FEATURES, lambda videos: [videos.pop("000003")] and videos),
        "",
        2,
        [
            "clipvitl14.pth: 5 of 20 questions (1 videos) have no features, e.g. '000003'; extract them"
        ],
    ),
    "feature width": (
        pth(FEATURES, lambda videos: {k: v[:, :512].clone() for k, v in videos.items()}),
        "",
        2,
        [
            "clipvitl14.pth: 20 of 20 questions (4 videos) have features that are no floating-point tensor [frames >= 1, 768], e.g. '000000' (["
        ],
    ),
    "feature without numbers": (
        pth(FEATURES, lambda videos: videos.update({"000003": torch.zeros(3, 768, device="meta")})),
        "",
        2,
        ["'000003' ([3, 768] float32); extract them"],
    ),
    "feature NaN": (
        pth(FEATURES, lambda videos: videos.update({"100001": torch.full((3, 768), torch.nan)})),
        "",
        2,
        [
            "clipvitl14.pth: 5 of 10 questions (1 videos) have features with NaN or infinite values, e.g. '100001'"
        ],
    ),
    "no captions": (
        gone(CAPTIONS),
        "",
        2,
        [
            "nextqa: holds no caption file (llava_v15",
            "name one by --captions PATH, or train with --cap 0",
        ],
    ),
    "two caption files": (
        copy(CAPTIONS, f"{NEXTQA}/blip2_n6.json"),
        "",
        2,
        ["holds llava_v15_13b_n6.json and blip2_n6.json; say which by --captions"],
    ),
    "caption missing": (
        js(CAPTIONS, **{"000003": ...}),
        "",
        2,
        [
            "llava_v15_13b_n6.json: 5 of 20 questions (1 videos) have no caption, e.g. '000003'; name the file"
        ],
    ),
    "captions cut off": (
        cut(CAPTIONS, 900),
        "",
        2,
        ["llava_v15_13b_n6.json:1: column ", "the text is cut off here; correct"],
    ),
    **{
        f"answer {value!r}": (
            rows({}, {"answer": value}),
            "",
            2,
            [f"val.csv:3: 'answer' is {value!r}, not one of 0, 1, 2, 3, 4"],
        )
        for value in ANSWERS
    },
    "answer of thousands": (
        rows({"answer": "7" * 5000}),
        "",
        2,
        ["val.csv:2: 'answer' is '777", "not one of 0, 1, 2, 3, 4"],
    ),
    "val without answers": (
        text(VAL, ",answer,", ",reply,"),
        "",
        2,
        ["val.csv:1: column 'answer' missing (has: 'video', "],
    ),
    "test half answered": (
        rows({}, {"answer": ""}, name=f"{NEXTQA}/test.csv"),
        "check",
        2,
        ["test.csv:3: 1 of 2 questions have no answer and the others have one"],
    ),
    "a column twice": (
        text(VAL, "a4", "a4,a0"),
        "",
        2,
        ["val.csv:1: column 'a0' appears twice"],
    ),
    "a field too many": (
        put(
            VAL,
            "video,question,answer,qid,a0,a1,a2,a3,a4\n1,w,0,1,a,b,c,d,e,f\n1,w,0,2,a,b,c,d,e\n",
        ),
        "",
        2,
        ["val.csv:2: 10 fields, header has 9"],
    ),
    "a field too few": (
        put(VAL, "video,question,answer,qid,a0,a1,a2,a3,a4\n1,w,0\n1,w,0,2,a,b,c,d,e\n"),
        "",
        2,
        ["val.csv:2: 3 fields, header has 9"],
    ),
    "behind newlines in quotes": (
        rows({"question": "a\nb\n\nc"}, {"answer": "B"}),
        "",
        2,
        ["val.csv:6: 'answer' is 'B', not one of"],
    ),
    "last line cut off": (
        lambda fixture: cut(VAL, (fixture.folder / VAL).stat().st_size - 9)(fixture),
        "",
        2,
        ["the last line is cut off ("],
    ),
    "a question twice": (
        rows({"qid": "3"}, {"qid": " 3"}),
        "",
        2,
        ["val.csv:3: video '100000' qid '3' is already at val.csv:2 and would count twice"],
    ),
    "no video": (rows({"video": " "}), "", 2, ["val.csv:2: 'video' is empty"]),
    "no question text": (rows({"question": "\t"}), "", 2, ["val.csv:2: 'question' is empty"]),
    "NUL": (rows({"question": "w\0y"}), "", 2, ["val.csv:2: a NUL byte at offset "]),
    "UTF-16": (
        text(VAL, "video", "video", "utf-16"),
        "",
        2,
        ["is UTF-16 (byte offset 0 holds its mark), not UTF-8; save it as UTF-8"],
    ),
    "UTF-16 without its mark": (
        text(VAL, "video", "video", "utf-16-le"),
        "",
        2,
        ["val.csv:1: a NUL byte at offset 1, so this is UTF-16"],
    ),
    "latin-1": (
        text(VAL, "angry", "caf\u00e9", "latin-1"),
        "",
        2,
        ["val.csv:2: not UTF-8 (byte 0xe9 at offset "],
    ),
    "a quote without end": (text(VAL, "angry", '"angry'), "", 2, ["val.csv:2: ", "quote"]),
    "an empty file": (
        put(VAL, ""),
        "",
        2,
        ["val.csv: is empty; the CSV of the val questions should be there"],
    ),
    "a header alone": (rows(), "", 2, ["val.csv: holds a header and no rows; fetch it again"]),
    "a table as HTML": (
        put(VAL, HTML),
        "",
        2,
        ["val.csv: the CSV of the val questions is an HTML page (42 bytes)"],
    ),
    "a table as git-lfs pointer": (
        put(VAL, LFS),
        "",
        2,
        ["val.csv: the CSV of the val questions is a git-lfs pointer"],
    ),
    "a table is a pipe": (
        pipe(VAL),
        "",
        2,
        ["val.csv: the CSV of the val questions cannot be read (a device or a pipe, not a file)"],
    ),
    "a table is a device": (
        link(VAL, "/dev/zero"),
        "",
        2,
        ["val.csv: the CSV of the val questions cannot be read (a device or a pipe"],
    ),
    "a table without columns": (
        put(VAL, "\n".join(["x"] * 3)),
        "",
        2,
        ["val.csv:1: columns 'video', 'question', 'qid', 'a0', "],
    ),
    "a table of semicolons": (
        text(VAL, "video,frame_count,width", "video;frame_count;width"),
        "",
        2,
        ["val.csv:1: column 'video' missing (has: 'video;frame"],
    ),
    # STAR and TVQA
    "STAR, answer": (
        star([star_item(answer="B")]),
        STAR,
        2,
        ["STAR_val.json[0]: 'answer' is 'B', not one of the choices ['a', 'b', 'b', 'd']"],
    ),
    "STAR, choices": (
        star([star_item(choices="ab")]),
        STAR,
        2,
        ["STAR_val.json[0]: 'choices' is 'ab', not a list"],
    ),
    "STAR, choice twice": (
        star([star_item(choices=[{"choice_id": 1, "choice": "b"}] * 2)]),
        STAR,
        2,
        ["choice_id 1 is no integer or appears twice"],
    ),
    "STAR, time": (
        star([star_item(start="soon")]),
        STAR,
        2,
        ["STAR_val.json[0]: 'start' is 'soon', not a time in seconds"],
    ),
    "STAR, backwards": (
        star([star_item(start=20)]),
        STAR,
        2,
        ["the clip ends at 6.099999999999998 s, before it starts at 20.0 s"],
    ),
    "STAR, half a character": (
        star([star_item(question="\ud800?")]),
        STAR,
        2,
        ["'question' holds a NUL or half a character"],
    ),
    "STAR, an object": (
        star({}),
        STAR,
        2,
        ["STAR_val.json:1: column 1: an object where a JSON list of questions is expected"],
    ),
    "STAR, no object": (
        star([star_item(), 3]),
        STAR,
        2,
        ["STAR_val.json[1]: a number where an object is expected"],
    ),
    "STAR, cut off": (
        star([star_item()], lambda val: json.dumps(val)[:-9]),
        STAR,
        2,
        ["STAR_val.json:1: column ", "the text is cut off here"],
    ),
    "STAR, key twice": (
        star([star_item()], lambda val: json.dumps(val).replace('"end"', '"start"')),
        STAR,
        2,
        ["key 'start' appears twice in one object"],
    ),
    **{
        f"TVQA, times {ts!r}": (
            tvqa(tvqa_row(ts=ts)),
            TVQA,
            2,
            [f"tvqa_val.jsonl:1: 'ts' is {ts!r}"],
        )
        for ts in TIMES
    },
    "TVQA, option": (
        tvqa(tvqa_row(), tvqa_row(qid=6, a3=7)),
        TVQA,
        2,
        ["tvqa_val.jsonl:2: 'a3' is 7, not a text"],
    ),
    "TVQA, answer": (
        tvqa(tvqa_row(answer_idx=True)),
        TVQA,
        2,
        ["'answer_idx' is True, not one of 0, 1, 2, 3, 4"],
    ),
    "TVQA, a list": (
        tvqa("[1]\n"),
        TVQA,
        2,
        ["tvqa_val.jsonl:1: column 1: a list where one JSON object per line is expected"],
    ),
    "TVQA, NaN": (
        tvqa(tvqa_row(), '{"q": NaN}\n'),
        TVQA,
        2,
        ["tvqa_val.jsonl:2: column 7: NaN is not JSON"],
    ),
    "TVQA, deep": (tvqa("[" * 100_000), TVQA, 2, ["tvqa_val.jsonl:1: column 1: "]),
    "TVQA, a number of thousands": (tvqa("9" * 10_000), TVQA, 2, ["tvqa_val.jsonl:1: column 1: "]),
    "subtitles, no folder": (
        tvqa(tvqa_row(), subtitles=None),
        SUB,
        2,
        ["tvqa_subtitles: no such folder", "or run without --sub"],
    ),
    "subtitles, none": (
        tvqa(tvqa_row(vid_name="100001")),
        SUB,
        2,
        ["1 of 1 questions (1 videos) have no usable subtitle file", "100001.srt (No such file"],
    ),
    "subtitles, empty": (tvqa(tvqa_row(), subtitles=" "), SUB, 2, [".srt (holds no subtitle)"]),
    "subtitles, times": (
        tvqa(tvqa_row(), subtitles="1\n00:00:0x --> 00:00:02\nhm\n"),
        SUB,
        2,
        [".srt:2 (time stamps '00:00:0x --> 00:00:02')"],
    ),
    "subtitles that lead away": (
        tvqa(tvqa_row(vid_name="../../../../etc/passwd")),
        SUB,
        2,
        ["vid_name '../../../../etc/passwd' is no file name"],
    ),
    "subtitles, a name too long": (
        tvqa(tvqa_row(vid_name="x" * 300)),
        SUB,
        2,
        ["File name too long"],
    ),
    # features and captions
    "features, an id that forges lines": (
        rows({"video": "x\nvico: done\x1b[2J"}),
        "",
        2,
        [
            "1 of 1 questions (1 videos) have no features, e.g. 'x\\nvico: done\\x1b[2J'; extract them"
        ],
    ),
    "features, an id that leads away": (
        rows({"video": "../../etc/passwd"}),
        "",
        2,
        ["have no features, e.g. '../../etc/passwd'"],
    ),
    "features, all dropped": (
        rows({"video": "a"}, {"video": "b"}),
        "--missing_features drop",
        2,
        ["holds features of no video of the 2 val questions"],
    ),
    "features, one dimension": (
        pth(FEATURES, lambda videos: videos.update({"000001": torch.zeros(768)})),
        "",
        2,
        ["e.g. '000001' ([768] float32)"],
    ),
    "features, no frame": (
        pth(FEATURES, lambda videos: videos.update({"000001": torch.zeros(0, 768)})),
        "",
        2,
        ["'000001' ([0, 768] float32)"],
    ),
    "features, integers": (
        pth(FEATURES, lambda videos: videos.update({"000001": torch.zeros(3, 768).int()})),
        "",
        2,
        ["([3, 768] int32)"],
    ),
    "features, a list": (
        pth(FEATURES, lambda videos: videos.update({"000001": [[0.0]]})),
        "",
        2,
        ["'000001' (list of length 1)"],
    ),
    "features, infinite": (
        pth(FEATURES, lambda videos: videos["000001"].fill_(torch.inf) is None or videos),
        "",
        2,
        ["have features with NaN or infinite values, e.g. '000001'"],
    ),
    "features, numbers as keys": (
        pth(FEATURES, lambda videos: {int(k): v for k, v in videos.items()}),
        "",
        2,
        ["7 of 7 keys are no text, e.g. 0; save it"],
    ),
    "features, no dict": (
        pth(FEATURES, lambda videos: list(videos.values())),
        "",
        2,
        ["clipvitl14.pth: holds list of length "],
    ),
    "features, a name twice but for blanks": (
        pth(FEATURES, lambda videos: videos.update({"000001 ": videos["000001"]})),
        "",
        2,
        ["two entries are called '000001'"],
    ),
    "features, empty": (
        put(FEATURES, ""),
        "",
        2,
        ["clipvitl14.pth: the video feature file is cut off or damaged"],
    ),
    "features as git-lfs pointer": (
        put(FEATURES, LFS),
        "",
        2,
        ["clipvitl14.pth: the video feature file is a git-lfs pointer"],
    ),
    "features in the old format": (
        old_format(FEATURES),
        "",
        2,
        ["in torch's old format, which cannot be memory-mapped; convert it: python -c"],
    ),
    "features, larger than their file": (
        claims(FEATURES, 2**40),
        "",
        2,
        ["clipvitl14.pth: the video feature file "],
    ),
    "features, a neighbour's bytes": (
        claims(FEATURES, 30_000),
        "",
        2,
        ["clipvitl14.pth: the video feature file claims tensors of other sizes than it holds"],
    ),
    "features are a pipe": (
        pipe(FEATURES),
        "",
        2,
        ["clipvitl14.pth: the video feature file cannot be opened (a device or a pipe"],
    ),
    "features are a folder": (
        both(gone(FEATURES), lambda fixture: (fixture.folder / FEATURES).mkdir()),
        "",
        2,
        ["cannot be opened (Is a directory)"],
    ),
    "caption, blank": (
        js(CAPTIONS, **{"000001": " \n"}),
        "",
        2,
        ["caption of video '000001' is empty"],
    ),
    "caption, a number": (
        js(CAPTIONS, **{"000001": 7}),
        "",
        2,
        ["caption of video '000001' is 7, not a text"],
    ),
    "captions, a list": (
        put(CAPTIONS, "[]"),
        "",
        2,
        ["llava_v15_13b_n6.json:1: column 1: a list where a JSON object is expected"],
    ),
    "captions, key twice": (
        put(CAPTIONS, '{"a": "x",\n "a": "y"}'),
        "",
        2,
        ["llava_v15_13b_n6.json:2: column 2: key 'a' appears twice"],
    ),
    "captions as a pickle": (
        put(CAPTIONS, b"\x80\x04\x95\x00"),
        "",
        2,
        ["llava_v15_13b_n6.json:1: a NUL byte at offset 3"],
    ),
    "captions are a device": (
        both(gone(CAPTIONS), link("d", "/dev/zero")),
        "--captions {fixture}/d",
        2,
        ["{fixture}/d: the JSON object of captions by video id cannot be read"],
    ),
    "captions of elsewhere": (
        None,
        "--captions {fixture}/nowhere.json",
        2,
        ["{fixture}/nowhere.json: no such file; the JSON object of captions"],
    ),
}
