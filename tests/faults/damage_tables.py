"""Tables of questions as they should not be: functions that return a change of a fixture."""

import csv
import io
import json
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from faults.damage import Damage
from support.run_fixture import CAPTIONS, FEATURES, NEXTQA, VAL, RunFixture
from vico.cli.demo_dataset import CSV_COLUMNS

VALID_ROW = {"video": "100000", "question": "why", "answer": "0", "type": "CW"}
VALID_ROW |= {"frame_count": "9", "width": "4", "height": "3"}
VALID_ROW |= {"a0": "clap", "a1": "run", "a2": "sit", "a3": "jump", "a4": "bow"}


def rows(*changes: Mapping[str, str], name: str = VAL) -> Damage:
    """A CSV with a valid row for each of these changes."""

    def damage(fixture: RunFixture) -> None:
        out = io.StringIO()
        writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**VALID_ROW, "qid": str(i), **change} for i, change in enumerate(changes))
        (fixture.folder / name).write_text(out.getvalue(), encoding="utf-8")

    return damage


def star_item(**more: Any) -> dict[str, Any]:
    choices = [{"choice_id": i, "choice": c} for i, c in [(3, "d"), (1, "b"), (0, "a"), (2, "b")]]
    item = {"question_id": "Interaction_T1_13", "question": "Which?", "video_id": "100000"}
    times = {"start": 1.5, "end": 6.099999999999998}
    return {**item, **times, "answer": "b", "choices": choices, **more}


def tvqa_row(**more: Any) -> dict[str, Any]:
    options = {"a0": "clap", "a1": "None", "a2": "nan", "a3": "NA ", "a4": "007"}
    row = {"answer_idx": 1, "q": "Why?", "qid": 5, "vid_name": "100000", "show_name": "Castle"}
    return {**options, **row, "ts": "1.62-2.02", **more}


SRT = (
    "1\n00:00:01,000 --> 00:00:02,000\n(Ted:) into\n\n2\n00:00:02,000 --> 00:00:02,500\nthe clip\n"
)


def official_subtitles(video: str) -> str:
    """SRT as a line of the official file."""
    texts = [("(Ted:) into", 1.0, 2.0), ("the clip", 2.0, 2.5)]
    sub = [{"text": text, "start": start, "end": end} for text, start, end in texts]
    return json.dumps({"vid_name": video, "sub": sub}) + "\n"


def star(val: Any, dump: Callable[[Any], str] = json.dumps) -> Damage:
    """Adds a STAR data set; `val`, dumped, is its STAR_val.json."""
    train = [star_item(question_id="Sequence_1", video_id="000000")]
    return _add("star", {"STAR_train.json": json.dumps(train), "STAR_val.json": dump(val)})


def tvqa(*val: Mapping[str, Any] | str, subtitles: str | None = SRT) -> Damage:
    """Adds a TVQA data set; `val` are the rows of its tvqa_val.jsonl."""
    lines = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in val)
    files = {
        "tvqa_train.jsonl": json.dumps(tvqa_row(vid_name="000000")) + "\n",
        "tvqa_val.jsonl": lines,
    }
    if subtitles is not None:
        files |= {f"tvqa_subtitles/{video}.srt": subtitles for video in ("000000", "100000")}
    return _add("tvqa", files)


def _add(dataset: str, files: Mapping[str, str]) -> Damage:
    def damage(fixture: RunFixture) -> None:
        target = (fixture.folder / NEXTQA).parent / dataset
        for name, content in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(content, encoding="utf-8")
        for name in (FEATURES, CAPTIONS):
            shutil.copy(fixture.folder / name, target)

    return damage
