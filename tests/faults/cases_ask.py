"""Questions and captions that cannot be had: one line that says which, and what to do."""

import json
from typing import Any

import torch

from faults.case import Case, refused
from faults.damage import both, gone, pth, put
from support.run_fixture import FEATURES, NEXTQA

ASK = "ask --resume {fixture}/run "
CLIPS = f"--features {{fixture}}/{FEATURES} "
ONE = f"{ASK}{CLIPS}--video_id 100000 "
ROW: dict[str, Any] = {"video": "100000", "question": "why", "options": ["a", "b"]}


def asked(line: str, *parts: str, code: int = 2) -> Case:
    return refused(None, *parts, line=line, code=code)


def file(content: str, *parts: str) -> Case:
    """A file of questions."""
    return refused(
        put("q.jsonl", content), *parts, line=f"{ASK}{CLIPS}--questions {{fixture}}/q.jsonl"
    )


def row(*parts: str, **changes: Any) -> Case:
    """A file whose second row has these changes."""
    return file(json.dumps(ROW) + "\n" + json.dumps({**ROW, "id": "1", **changes}), *parts)


def recorded(content: str, *parts: str) -> Case:
    """What made the features, as a file beside them says."""
    return refused(
        both(put("x.mp4", "hm"), put(f"{FEATURES}.encoder.json", content)),
        *parts,
        line=f"{ASK}--video {{fixture}}/x.mp4 --encoder {{fixture}}/toy why --options a b",
    )


ASKED: dict[str, Case] = {
    "ask, no checkpoint": asked(
        f"ask --resume {{fixture}}/away {CLIPS}--video_id 100000 why --options a b",
        "{fixture}/away: ",
        code=3,
    ),
    "ask, nothing to resume": asked("!ask why --video_id 1 --options a b", "--resume is missing"),
    "ask, no question": asked(f"{ONE}--options a b", "the question is missing"),
    "ask, a question without quotes": asked(f"{ONE}what is it --options a b", "unexpected word"),
    "ask, one option": asked(f"{ONE}why --options a", "--options: 1 options, not 2 to 26"),
    "ask, 27 options": asked(f"{ONE}why --options {' '.join(map(str, range(27)))}", "27 options"),
    "ask, equal options": asked(f"{ONE}why --options yes no yes", "'yes' is there twice"),
    "ask, no video": asked(f"{ASK}{CLIPS}why --options a b", "--video_id is missing"),
    "ask, an unknown video": asked(
        f"{ASK}{CLIPS}--video_id 7 why --options a b", "clipvitl14.pth", "'7'", "are like '0000"
    ),
    "ask, no features": asked(
        f"{ASK}--features {{fixture}}/x.pth --video_id 7 why --options a b", "{fixture}/x.pth: "
    ),
    "ask, features of another width": refused(
        pth(FEATURES, lambda c: {name: torch.ones(3, 512) for name in c}),
        "are 512 wide, and ",
        "was trained on features 768 wide",
        line=f"{ONE}why --options a b",
    ),
    "ask, no frames": refused(
        pth(FEATURES, lambda c: {**c, "100000": torch.ones(0, 768)}),
        "'100000' (",
        line=f"{ONE}why --options a b",
    ),
    "ask, features of NaN": refused(
        pth(FEATURES, lambda c: {**c, "100000": torch.full((3, 768), torch.nan)}),
        "NaN or infinite",
        line=f"{ONE}why --options a b",
    ),
    "ask, a question that does not fit": asked(
        f"{ONE}--max_seq_len 40 why --options a b", "the question: ", "above --max_seq_len 40"
    ),
    "ask, no file of questions": asked(
        f"{ASK}{CLIPS}--questions {{fixture}}/q.jsonl", "q.jsonl: no such file"
    ),
    "ask, a file and a question": asked(
        f"{ASK}{CLIPS}--questions {{fixture}}/q.jsonl why", "'why': a question beside --questions"
    ),
    "ask, a file and options": asked(
        f"{ASK}{CLIPS}--questions {{fixture}}/q.jsonl --options a b", "--options: is said by each"
    ),
    "ask, a file without questions": file("\n\n", "q.jsonl: is empty; the table of the questions"),
    "ask, a row with one option": row("q.jsonl:2: 1 options, not 2 to 26", options=["a"]),
    "ask, a row without a question": row("q.jsonl:2: 'question' is empty", question=" "),
    "ask, a row of an unknown video": row("'7'", "1 of 2 questions", video="7"),
    "ask, a row twice": file(
        json.dumps({**ROW, "id": "1"}) + "\n" + json.dumps({**ROW, "id": "1"}),
        "q.jsonl:2: video '100000' qid '1' is already at q.jsonl:1",
    ),
    "ask, one row with an answer": row("1 of 2 questions have no answer", answer=0),
    "ask, a row with a dialogue": row("q.jsonl:2: has a dialogue", dialogue="hi"),
    "ask, a video that is not there": asked(
        f"{ASK}--video {{fixture}}/x.mp4 --encoder {{fixture}} why --options a b",
        "--video {fixture}/x.mp4: no such file",
    ),
    "ask, a video and features": refused(
        put("x.mp4", "hm"),
        "--features and --video: ",
        line=f"{ASK}{CLIPS}--video {{fixture}}/x.mp4 --encoder {{fixture}} why --options a b",
    ),
    "ask, a video without an encoder": refused(
        put("x.mp4", "hm"),
        "--encoder is missing",
        line=f"{ASK}--video {{fixture}}/x.mp4 why --options a b",
    ),
    "ask, an encoder that is none": refused(
        put("x.mp4", "hm"),
        "--encoder {fixture}/toy: holds no weights",
        line=f"{ASK}--video {{fixture}}/x.mp4 --encoder {{fixture}}/toy why --options a b",
    ),
    "ask, a record of the encoder that is no JSON": recorded(
        "{", f"{FEATURES}.encoder.json or fetch it again"
    ),
    "ask, a record of the encoder without a rate": recorded(
        '{"encoder": "a", "encoder_sha256": "0"}', f"{FEATURES}.encoder.json: \"'fps'\": encoder, "
    ),
    "ask, a temperature for options": asked(
        f"{ONE}why --options a b --temperature 1", "--temperature: is for a generated answer"
    ),
    "caption, an unknown video": asked(
        f"caption --resume {{fixture}}/run {CLIPS}--video_id 7", "clipvitl14.pth", "'7'"
    ),
    "caption, a video and a split": asked(
        f"caption --resume {{fixture}}/run {CLIPS}--video_id 7 --split val", "--split: is for"
    ),
    "caption, metrics of one video": asked(
        f"caption --resume {{fixture}}/run {CLIPS}--video_id 7 --metrics", "--metrics: is for"
    ),
    "caption, no captions to compare with": asked(
        "caption --resume {fixture}/run --captions {fixture}/x.json",
        "--captions {fixture}/x.json: no such file",
    ),
    "caption, a split that is not there": refused(
        gone(f"{NEXTQA}/test.csv"), "test.csv", line="caption --resume {fixture}/run --split test"
    ),
    "caption, too few beams": asked(
        "caption --resume {fixture}/run --num_beams 0", "--num_beams 0"
    ),
    "caption, beams and a temperature": asked(
        "caption --resume {fixture}/run --num_beams 2 --temperature 1", "leave one of them out"
    ),
    "ask, a file that is no table": refused(
        put("q.txt", "why"), "q.txt: must end", line=f"{ASK}{CLIPS}--questions {{fixture}}/q.txt"
    ),
}
