"""Legal twins: TVQA, STAR and captions in the other forms in which people hold them."""

import json
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from faults.damage import Damage, both, js, put
from faults.damage_tables import SRT, official_subtitles, star, tvqa
from support.run_fixture import CAPTIONS, NEXTQA, RunFixture

Item = dict[str, Any]


def star_formats(items: Sequence[Item]) -> dict[str, Damage]:
    by_id = {item["question_id"]: dict(item) for item in items}
    for item in by_id.values():
        del item["question_id"]
    texts = {item["question_id"]: _by_number(item) for item in items}
    return {
        "STAR, an object by id": star(by_id),
        "STAR, an object by id, which the questions have too": star(
            {item["question_id"]: item for item in items}
        ),
        "STAR, choices as texts": star(
            [{**item, "choices": list(texts[item["question_id"]].values())} for item in items]
        ),
        "STAR, choices as an object by number": star(
            [{**item, "choices": texts[item["question_id"]]} for item in items]
        ),
        "STAR, choices as an object by letter": star(
            [{**item, "choices": _by_letter(item)} for item in items]
        ),
        "STAR, answers with a full stop and in capitals": star(
            [{**item, "answer": f" {item['answer'].upper()}."} for item in items]
        ),
        "STAR, answers as numbers": star([{**item, "answer": _place(item)} for item in items]),
        "STAR, answers as letters": star(
            [{**item, "answer": "ABCD"[_place(item)]} for item in items]
        ),
    }


def tvqa_formats(items: Sequence[Item]) -> dict[str, Damage]:
    """Their clean twin has the SubRip files of VIDEOS."""
    lists = []
    for item in items:
        times = [None if time == "NaN" else float(time) for time in item["ts"].split("-")]
        lists.append({**item, "ts": times})
    return {
        "TVQA, times as lists": tvqa(*lists),
        "TVQA, times as lists of texts": tvqa(*({**i, "ts": i["ts"].split("-")} for i in items)),
        "TVQA, subtitles in UTF-16": _in_folder(SRT.encode("utf-16")),
        "TVQA, subtitles in UTF-16, the other order": _in_folder(
            ("\ufeff" + SRT).encode("utf-16-be")
        ),
        "TVQA, subtitles called .SRT": both(_no_subtitles, _in_folder(SRT.encode(), ".SRT")),
        "TVQA, the official subtitles": both(_no_subtitles, OFFICIAL),
        "TVQA, the official subtitles beside the files": put(
            LINES, official_subtitles("000000").replace("into", "out of")
        ),
    }


def _captions(name: str, change: Callable[[dict[str, str]], str]) -> Damage:
    """What `change` makes of the captions, in a file of this name instead of theirs."""

    def damage(fixture: RunFixture) -> None:
        texts = json.loads((fixture.folder / CAPTIONS).read_text(encoding="utf-8"))
        (fixture.folder / CAPTIONS).unlink()
        (fixture.folder / NEXTQA / name).write_text(change(texts), encoding="utf-8")

    return damage


def _records(texts: dict[str, str]) -> list[dict[str, str]]:
    return [{"video_id": video, "caption": text, "model": "x"} for video, text in texts.items()]


def _sentences(text: str) -> list[str]:
    return [f" {sentence}." for sentence in text.removesuffix(".").split(". ")]


CAPTION_FORMATS: dict[str, Damage] = {
    "captions.json, a list": _captions("captions.json", lambda t: json.dumps(_records(t))),
    "captions.json, lists of sentences": _captions(
        "captions.json", lambda t: json.dumps({v: _sentences(text) for v, text in t.items()})
    ),
    "captions.json, objects by id": _captions(
        "captions.json", lambda t: json.dumps({r["video_id"]: r for r in _records(t)})
    ),
    "captions.json, JSON lines": _captions(
        "captions.json", lambda t: "\n".join(map(json.dumps, _records(t)))
    ),
    "captions.jsonl": _captions(
        "captions.jsonl", lambda t: "\n\n".join(map(json.dumps, _records(t)))
    ),
    "captions.jsonl, one entry each": _captions(
        "captions.jsonl", lambda t: "\r\n".join(json.dumps({v: text}) for v, text in t.items())
    ),
    "captions, empty ones that training does not use": js(
        CAPTIONS, **{"a": "", "b": " \n", "c": None, "d": []}
    ),
}

VIDEOS = ("000000", "100000", "100001")
SUBTITLES, LINES = "toy/data/tvqa/tvqa_subtitles", "toy/data/tvqa/tvqa_preprocessed_subtitles.jsonl"
OFFICIAL = put(LINES, "".join(map(official_subtitles, ("unused", *VIDEOS))))


def _in_folder(content: bytes, suffix: str = ".srt") -> Damage:
    return both(*(put(f"{SUBTITLES}/{video}{suffix}", content) for video in VIDEOS))


def _no_subtitles(fixture: RunFixture) -> None:
    shutil.rmtree(fixture.folder / SUBTITLES)


def _by_number(item: Item) -> dict[str, str]:
    choices = sorted(item["choices"], key=lambda choice: choice["choice_id"])
    return {str(choice["choice_id"]): choice["choice"] for choice in choices}


def _by_letter(item: Item) -> dict[str, str]:
    return dict(zip("ABCD", _by_number(item).values(), strict=True))


def _place(item: Item) -> int:
    return list(_by_number(item).values()).index(item["answer"])
