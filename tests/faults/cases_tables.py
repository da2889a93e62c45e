"""Question tables and subtitles that are refused, with what the error must say."""

import json

from faults.case import Case, flags, refused
from faults.damage import HTML, LFS, cut, gone, link, pipe, put, text
from faults.damage_tables import rows, star, star_item, tvqa, tvqa_row
from support.run_fixture import CHECKPOINT, NEXTQA, VAL

STAR, TVQA, SUB = "--dataset star", "--dataset tvqa", "--dataset tvqa --sub"

ANSWERS: dict[str, Case] = {}
for _text in ("", "1.0", "5", "-1", "B", "True", "nan", "+1", "01", "\u00b9"):
    _message = f"val.csv:3: 'answer' is {_text!r}, not one of 0, 1, 2, 3, 4"
    ANSWERS[f"answer {_text!r}"] = refused(rows({}, {"answer": _text}), _message)

TIMES: dict[str, Case] = {}
for _text in ("", "5", "9-3", "a-b", "1-inf", "-5-9"):
    _message = f"tvqa_val.jsonl:1: 'ts' is {_text!r}"
    TIMES[f"TVQA, times {_text!r}"] = refused(tvqa(tvqa_row(ts=_text)), _message, line=TVQA)

TABLES: dict[str, Case] = {
    "no data": flags(
        "--data_path {fixture}/nowhere",
        "{fixture}/nowhere/nextqa/train.csv: no such file; the CSV of the train questions",
    ),
    "no val.csv": refused(
        gone(VAL), "val.csv: no such file, and each epoch is evaluated on val; put it there, or"
    ),
    "no test.csv": refused(
        gone(f"{NEXTQA}/test.csv"),
        "test.csv: no such file; put it there, or evaluate on val (--split val)",
        line="eval --split test --resume {fixture}/" + CHECKPOINT,
    ),
    "column missing": refused(
        text(VAL, ",a3,", ",b3,"),
        "val.csv:1: column 'a3' missing (has: 'video', ",
        "add what is missing to",
    ),
    "answer 7": refused(
        rows({}, {}, {}, {"answer": "7"}),
        "val.csv:5: 'answer' is '7', not one of 0, 1, 2, 3, 4; correct",
    ),
    "text that forges lines": refused(
        rows({"answer": "7\nvico: done\x1b[2J"}), "'7\\nvico: done\\x1b[2J', not one of"
    ),
    **ANSWERS,
    "answer of thousands": refused(
        rows({"answer": "7" * 5000}), "val.csv:2: 'answer' is '777", "not one of 0, 1, 2, 3, 4"
    ),
    "val without answers": refused(
        text(VAL, ",answer,", ",reply,"), "val.csv:1: column 'answer' missing (has: 'video', "
    ),
    "test half answered": refused(
        rows({}, {"answer": ""}, name=f"{NEXTQA}/test.csv"),
        "test.csv:3: 1 of 2 questions have no answer and the others have one",
        line="check",
    ),
    "60,000 columns": refused(
        put(VAL, "x," + ",".join(f"c{i}" for i in range(60_000)) + "\n"),
        "val.csv:1: columns 'video', 'question', 'qid', ",
    ),
    "a column twice": refused(text(VAL, "a4", "a4,a0"), "val.csv:1: column 'a0' appears twice"),
    "a field too many": refused(
        put(
            VAL,
            "video,question,answer,qid,a0,a1,a2,a3,a4\n1,w,0,1,a,b,c,d,e,f\n1,w,0,2,a,b,c,d,e\n",
        ),
        "val.csv:2: 10 fields, header has 9",
    ),
    "a field too few": refused(
        put(VAL, "video,question,answer,qid,a0,a1,a2,a3,a4\n1,w,0\n1,w,0,2,a,b,c,d,e\n"),
        "val.csv:2: 3 fields, header has 9",
    ),
    "behind newlines in quotes": refused(
        rows({"question": "a\nb\n\nc"}, {"answer": "B"}), "val.csv:6: 'answer' is 'B', not one of"
    ),
    "last line cut off": refused(
        lambda fixture: cut(VAL, (fixture.folder / VAL).stat().st_size - 9)(fixture),
        "the last line is cut off (",
    ),
    "a question twice": refused(
        rows({"qid": "3"}, {"qid": " 3"}),
        "val.csv:3: video '100000' qid '3' is already at val.csv:2 and would count twice",
    ),
    "no video": refused(rows({"video": " "}), "val.csv:2: 'video' is empty"),
    "no question text": refused(rows({"question": "\t"}), "val.csv:2: 'question' is empty"),
    "NUL": refused(rows({"question": "w\0y"}), "val.csv:2: a NUL byte at offset "),
    "UTF-16": refused(
        text(VAL, "video", "video", "utf-16"),
        "is UTF-16 (byte offset 0 holds its mark), not UTF-8; save it as UTF-8",
    ),
    "UTF-16 without its mark": refused(
        text(VAL, "video", "video", "utf-16-le"),
        "val.csv:1: a NUL byte at offset 1, so this is UTF-16",
    ),
    "latin-1": refused(
        text(VAL, "angry", "caf\u00e9", "latin-1"), "val.csv:2: not UTF-8 (byte 0xe9 at offset "
    ),
    "a quote without end": refused(text(VAL, "angry", '"angry'), "val.csv:2: ", "quote"),
    "an empty file": refused(
        put(VAL, ""), "val.csv: is empty; the CSV of the val questions should be there"
    ),
    "a header alone": refused(rows(), "val.csv: holds a header and no rows; fetch it again"),
    "a table as HTML": refused(
        put(VAL, HTML), "val.csv: the CSV of the val questions is an HTML page (42 bytes)"
    ),
    "a table as gzip": refused(
        put(VAL, b"\x1f\x8b\x08\x00" + bytes(99)), "val.csv: ", "is gzip-compressed"
    ),
    "a table as a workbook": refused(
        put(VAL, b"PK\x03\x04 xl/worksheets" + bytes(99)), "val.csv: ", "is an Excel workbook"
    ),
    "a table as git-lfs pointer": refused(
        put(VAL, LFS), "val.csv: the CSV of the val questions is a git-lfs pointer"
    ),
    "a table is a pipe": refused(
        pipe(VAL),
        "val.csv: the CSV of the val questions cannot be read (a device or a pipe, not a file)",
    ),
    "a table is a device": refused(
        link(VAL, "/dev/zero"),
        "val.csv: the CSV of the val questions cannot be read (a device or a pipe",
    ),
    "a table without columns": refused(
        put(VAL, "\n".join(["x"] * 3)), "val.csv:1: columns 'video', 'question', 'qid', 'a0', "
    ),
    "a table of semicolons": refused(
        text(VAL, "video,frame_count,width", "video;frame_count;width"),
        "val.csv:1: column 'video' missing (has: 'video;frame",
    ),
    "STAR, answer": refused(
        star([star_item(answer="E")]),
        "STAR_val.json[0]: 'answer' is 'E', not one of the choices ['a', 'b', 'b', 'd']",
        line=STAR,
    ),
    "STAR, choices": refused(
        star([star_item(choices="ab")]),
        "STAR_val.json[0]: 'choices' is 'ab', not a list",
        line=STAR,
    ),
    "STAR, choice twice": refused(
        star([star_item(choices=[{"choice_id": 1, "choice": "b"}] * 2)]),
        "choice_id 1 appears twice",
        line=STAR,
    ),
    "STAR, time": refused(
        star([star_item(start="soon")]),
        "STAR_val.json[0]: 'start' is 'soon', not a time in seconds",
        line=STAR,
    ),
    "STAR, backwards": refused(
        star([star_item(start=20)]),
        "the clip ends at 6.099999999999998 s, before it starts at 20.0 s",
        line=STAR,
    ),
    "STAR, half a character": refused(
        star([star_item(question="\ud800?")]),
        "'question' holds a NUL or half a character",
        line=STAR,
    ),
    "STAR, an empty object": refused(
        star({}),
        "STAR_val.json: is an object without entries",
        line=STAR,
    ),
    "STAR, no object": refused(
        star([star_item(), 3]), "STAR_val.json[1]: a number where an object is expected", line=STAR
    ),
    "STAR, cut off": refused(
        star([star_item()], lambda val: json.dumps(val)[:-9]),
        "STAR_val.json:1: column ",
        "the text is cut off here",
        line=STAR,
    ),
    "STAR, key twice": refused(
        star([star_item()], lambda val: json.dumps(val).replace('"end"', '"start"')),
        "key 'start' appears twice in one object",
        line=STAR,
    ),
    **TIMES,
    "TVQA, option": refused(
        tvqa(tvqa_row(), tvqa_row(qid=6, a3=7)),
        "tvqa_val.jsonl:2: 'a3' is 7, not a text",
        line=TVQA,
    ),
    "TVQA, answer": refused(
        tvqa(tvqa_row(answer_idx=True)), "'answer_idx' is True, not one of 0, 1, 2, 3, 4", line=TVQA
    ),
    "TVQA, a list": refused(
        tvqa("[1]\n"),
        "tvqa_val.jsonl:1: column 1: a list where one JSON object per line is expected",
        line=TVQA,
    ),
    "TVQA, NaN": refused(
        tvqa(tvqa_row(), '{"q": NaN}\n'), "tvqa_val.jsonl:2: column 7: NaN is not JSON", line=TVQA
    ),
    "TVQA, deep": refused(tvqa("[" * 100_000), "tvqa_val.jsonl:1: column 1: ", line=TVQA),
    "TVQA, a number of thousands": refused(
        tvqa("9" * 10_000), "tvqa_val.jsonl:1: column 1: ", line=TVQA
    ),
    "subtitles, no folder": refused(
        tvqa(tvqa_row(), subtitles=None),
        "tvqa_subtitles: no such folder",
        "or run without --sub",
        line=SUB,
    ),
    "subtitles, none": refused(
        tvqa(tvqa_row(vid_name="100001")),
        "1 of 1 questions (1 videos) have no usable subtitle file",
        "100001.srt (No such file",
        line=SUB,
    ),
    "subtitles, a web page": refused(
        tvqa(tvqa_row(), subtitles=HTML), ".srt (holds no subtitle)", line=SUB
    ),
    "subtitles, times": refused(
        tvqa(tvqa_row(), subtitles="1\n00:00:0x --> 00:00:02\nhm\n"),
        ".srt:2 (time stamps '00:00:0x --> 00:00:02')",
        line=SUB,
    ),
    "subtitles that lead away": refused(
        tvqa(tvqa_row(vid_name="../../../../etc/passwd")),
        "vid_name '../../../../etc/passwd' is no file name",
        line=SUB,
    ),
    "subtitles, a name too long": refused(
        tvqa(tvqa_row(vid_name="x" * 300)), "File name too long", line=SUB
    ),
}
