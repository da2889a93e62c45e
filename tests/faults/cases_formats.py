"""TVQA, STAR and captions in other forms than the published ones, and wrong."""

from faults.case import Case, refused
from faults.damage import Damage, both, gone, js, put
from faults.damage_tables import SRT, official_subtitles, star, star_item, tvqa, tvqa_row
from support.run_fixture import CAPTIONS, NEXTQA

STAR, SUB = "--dataset star", "--dataset tvqa --sub"
SRT_OF_VAL, JSON_LINES = (
    "toy/data/tvqa/tvqa_subtitles/100000.srt",
    "toy/data/tvqa/tvqa_preprocessed_subtitles.jsonl",
)

STAR_FORMS: dict[str, Case] = {
    "STAR, another id than the key": refused(
        star({"A_1": star_item()}),
        "STAR_val.json['A_1']: 'question_id' is 'Interaction_T1_13', unlike the key",
        line=STAR,
    ),
    "STAR, by id, a number": refused(
        star({"A_1": 3}),
        "STAR_val.json['A_1']: a number where an object is expected",
        line=STAR,
    ),
    "STAR, choices by name": refused(
        star([star_item(choices={"first": "b", "second": "c"})]),
        "STAR_val.json[0]: choice_id 'first' is no integer and no letter",
        line=STAR,
    ),
    "STAR, an answer that fits two choices": refused(
        star([star_item(answer="THE CAT", choices=["The cat.", "The cat", "A dog."])]),
        "STAR_val.json[0]: 'answer' is 'THE CAT', fits more than one of the choices",
        line=STAR,
    ),
    "STAR, answer 4 of 4": refused(
        star([star_item(answer=4)]),
        "STAR_val.json[0]: 'answer' is 4, not one of the choices",
        line=STAR,
    ),
}


def with_srt(content: str | bytes) -> Damage:
    """The subtitles of the one val question."""
    return both(tvqa(tvqa_row()), put(SRT_OF_VAL, content))


def with_lines(*lines: str) -> Damage:
    return both(tvqa(tvqa_row(), subtitles=None), put(JSON_LINES, "".join(lines)))


TRAIN_LINE, VAL_LINE = official_subtitles("000000"), official_subtitles("100000")
SUBTITLES: dict[str, Case] = {
    "TVQA, times as a list of one": refused(
        tvqa(tvqa_row(ts=[3])),
        "tvqa_val.jsonl:1: 'ts' is [3], not 'START-END' or [START, END] in seconds",
        line="--dataset tvqa",
    ),
    "TVQA, times as a list, backwards": refused(
        tvqa(tvqa_row(ts=[9, 3.5])),
        "tvqa_val.jsonl:1: 'ts' is [9, 3.5]: the clip ends before it starts",
        line="--dataset tvqa",
    ),
    "subtitles, UTF-16 without its mark": refused(
        with_srt(SRT.encode("utf-16-le")),
        "100000.srt (holds NUL: UTF-16 without its mark, UTF-32, or no text)",
        line=SUB,
    ),
    "subtitles, gzip": refused(
        with_srt(b"\x1f\x8b\x08\x00" + bytes(range(256))), "100000.srt (holds NUL: ", line=SUB
    ),
    "subtitles, bad and others missing": refused(
        both(tvqa(tvqa_row(), tvqa_row(qid=6, vid_name="100001")), put(SRT_OF_VAL, "hm")),
        "1 of 2 questions (1 videos) have no usable subtitle file, e.g. ",
        "100000.srt (holds no subtitle)",
        line=SUB + " --missing_subtitles empty",
    ),
    "subtitles, none of all, taken as empty": refused(
        tvqa(tvqa_row(vid_name="100001")),
        "1 of 1 questions (1 videos) have no usable subtitle file",
        line=SUB + " --missing_subtitles empty",
    ),
    "missing_subtitles of another kind": refused(
        None, "--missing_subtitles: invalid choice: 'drop'", line="--missing_subtitles drop"
    ),
    "official subtitles, a clip missing": refused(
        with_lines(TRAIN_LINE),
        "1 of 1 questions (1 videos) have no usable subtitle file",
        "tvqa_preprocessed_subtitles.jsonl (has no line of '100000')",
        line=SUB,
    ),
    "official subtitles, a clip twice": refused(
        with_lines(TRAIN_LINE, VAL_LINE, VAL_LINE),
        "tvqa_preprocessed_subtitles.jsonl:3: vid_name '100000' is already at ",
        line=SUB,
    ),
    "official subtitles, a time": refused(
        with_lines(TRAIN_LINE, VAL_LINE.replace("1.0", '"soon"', 1)),
        "tvqa_preprocessed_subtitles.jsonl:2 ('start' is 'soon', not a time in seconds)",
        line=SUB,
    ),
    "official subtitles, cut off": refused(
        with_lines(TRAIN_LINE, VAL_LINE[:-9]),
        "tvqa_preprocessed_subtitles.jsonl:2: column ",
        line=SUB,
    ),
}

CAPTION_FORMS: dict[str, Case] = {
    "captions, a number": refused(
        put(CAPTIONS, "7"),
        "llava_v15_13b_n6.json:1: column 1: a number where a JSON object or list of captions",
    ),
    "captions, a list without videos": refused(
        put(CAPTIONS, '[{"id": "000000", "caption": "A man."}]'),
        "llava_v15_13b_n6.json[0]: 'video' is missing (has: 'id', 'caption')",
    ),
    "captions, a list without captions": refused(
        put(CAPTIONS, '[{"video_id": "000000", "text": "A man."}]'),
        "llava_v15_13b_n6.json[0]: 'caption' is missing (has: 'video_id', 'text')",
    ),
    "captions, a video twice": refused(
        put(
            CAPTIONS, '[{"video": "000000", "caption": "A."}, {"video": "000000", "caption": "B."}]'
        ),
        "llava_v15_13b_n6.json[1]: video '000000' has two captions; keep one",
    ),
    "captions, a number among sentences": refused(
        js(CAPTIONS, **{"000001": ["A man.", 7]}), "caption of video '000001' is 7, not a text"
    ),
    "captions, JSON lines cut off": refused(
        both(gone(CAPTIONS), put(f"{NEXTQA}/captions.jsonl", '{"video": "000000", "capt')),
        "captions.jsonl:1: column ",
        "the text is cut off here",
    ),
    "captions, two objects in one line": refused(
        put(CAPTIONS, '{"000000": "A man."} {"000001": "B."}'),
        "llava_v15_13b_n6.json:1: column 22: Extra data",
    ),
    "captions, two files of known names": refused(
        put(f"{NEXTQA}/captions.jsonl", "{}"),
        "holds llava_v15_13b_n6.json and captions.jsonl; say which by --captions",
    ),
    "captions of no question, dropped": refused(
        put(CAPTIONS, '{"other": "A man."}'),
        "20 of 20 questions (4 videos) have no caption, e.g. '000000', ",
        line="--missing_captions drop",
    ),
}

FORMATS: dict[str, Case] = {**STAR_FORMS, **SUBTITLES, **CAPTION_FORMS}
