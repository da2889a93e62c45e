"""The subtitles of TVQA's clips: a SubRip file for each, or the JSON lines of all.

Where both are there, the files are read: those are the published form.
"""

import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vico.data.readers import rows
from vico.data.readers.rows import Row, RowError
from vico.errors import fail, show
from vico.io.paths import exists, is_folder, read_bytes

FOLDER = "tvqa_subtitles"  # of VID_NAME.srt
JSON_LINES = "tvqa_preprocessed_subtitles.jsonl"
# At most nine digits each: int() refuses thousands, and no clip is that long.
_TIME = r"(\d{1,9}):(\d{1,9}):(\d{1,9})"
_TIME_STAMPS = re.compile(rf"\s*{_TIME}[,.:]?\d*\s*-->\s*{_TIME}(?!\d)", re.ASCII)
_LINE_END = re.compile("\r\n|\r|\n")


@dataclass(frozen=True, slots=True)
class Subtitle:
    """Start and end in whole seconds: as published, the time stamps lose their milliseconds."""

    start: int
    end: int
    text: str


@dataclass
class Clips:
    """The subtitles of the clips that questions ask about."""

    source: str  # what was read, in words
    by_video: dict[str, list[Subtitle]] = field(default_factory=dict)  # []: nobody speaks
    missing: dict[str, str] = field(default_factory=dict)  # video -> where it was looked for
    bad: dict[str, str] = field(default_factory=dict)  # video -> what is wrong with its subtitles
    num_not_utf8: int = 0  # files that were read as ISO-8859-1


def found_in(folder: Path) -> list[Path]:
    """The subtitles in the folder of the data set. The first is read."""
    files, json_lines = folder / FOLDER, folder / JSON_LINES
    return [*([files] if is_folder(files) else []), *([json_lines] if exists(json_lines) else [])]


def read(folder: Path, videos: Iterable[str]) -> Clips:
    """Raises UserError where there are no subtitles at all, and for bad JSON lines."""
    found = found_in(folder)
    if not found:
        fail(
            f"{folder / FOLDER}: no such folder, and no {JSON_LINES} beside it; "
            "fetch the subtitles, or run without --sub"
        )
    source: _Files | _JsonLines
    source = _Files(found[0]) if found[0].name == FOLDER else _JsonLines(found[0])
    clips = Clips(str(source.path))
    if len(found) > 1:
        clips.source += f", not of {JSON_LINES} beside it"
    for video in dict.fromkeys(videos):
        try:
            clips.by_video[video] = source.read(video)
        except KeyError as where:
            clips.missing[video] = str(where.args[0])
        except RowError as problem:
            clips.bad[video] = str(problem)
    clips.num_not_utf8 = source.num_not_utf8
    return clips


class _Files:
    """A folder of SubRip files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_not_utf8 = 0

    def read(self, video: str) -> list[Subtitle]:
        """Raises KeyError for a clip without a file, RowError for a file with a fault."""
        # Ids come from a file. They must not lead out of the folder.
        if any(part in video for part in ("/", "\\", "..", "\0")):
            raise RowError(f"vid_name {show(video)} is no file name")
        path = self.path / f"{video}.srt"
        if not exists(path) and exists(path.with_name(f"{video}.SRT")):
            path = path.with_name(f"{video}.SRT")
        try:
            data = read_bytes(path)
        except FileNotFoundError as problem:
            raise KeyError(f"{path} ({problem.strerror})") from None
        except (OSError, ValueError) as problem:
            raise RowError(f"{path} ({getattr(problem, 'strerror', None) or problem})") from None
        return parse_srt(self._decode(data, path), path)

    def _decode(self, data: bytes, path: Path) -> str:
        encoding = "utf-8-sig"
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding = "utf-16"
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as problem:
            if encoding == "utf-16":
                reason = f"begins as UTF-16 and is not ({problem.reason})"
                raise RowError(f"{path} ({reason})") from None
            text = data.removeprefix(codecs.BOM_UTF8).decode("iso-8859-1")
            self.num_not_utf8 += 1
        if "\0" in text:
            raise RowError(f"{path} (holds NUL: UTF-16 without its mark, UTF-32, or no text)")
        return text


class _JsonLines:
    """The official file of all clips: {"vid_name", "sub": [{"text", "start", "end"}]}."""

    num_not_utf8 = 0

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, tuple[str, Row]] = {}  # (place, row) by video
        bad = []
        records = rows.read_jsonl(path, "the JSON lines of TVQA's subtitles, one per clip")
        for place, row in records:
            try:
                video = rows.id_field(row, "vid_name")
            except RowError as problem:
                bad.append(f"{place}: {problem}")
                continue
            first_place, _ = self._rows.setdefault(video, (place, row))
            if first_place != place:
                bad.append(f"{place}: vid_name {show(video)} is already at {first_place}")
        rows.refuse(path, bad, len(records))

    def read(self, video: str) -> list[Subtitle]:
        """Raises KeyError for a clip without a line, RowError for a line with a fault."""
        if video not in self._rows:
            raise KeyError(f"{self.path} (has no line of {show(video)})")
        place, row = self._rows[video]
        try:
            return _subtitles_of(row)
        except RowError as problem:
            raise RowError(f"{place} ({problem})") from None


def _subtitles_of(row: Row) -> list[Subtitle]:
    """In whole seconds and with one line of text, as those of a SubRip file."""
    items = rows.field(row, "sub")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RowError(f"'sub' is {show(items)}, not a list of objects")
    subtitles = []
    for item in items:
        start, end = (int(rows.seconds_field(item, key)) for key in ("start", "end"))
        lines = _LINE_END.split(rows.text_field(item, "text"))
        text = " ".join(line.rstrip() for line in lines if line.strip())
        subtitles.append(Subtitle(start, end, text))
    return subtitles


def parse_srt(text: str, path: Path) -> list[Subtitle]:
    """A subtitle's text runs from its time stamps to the next number; empty lines are dropped.

    An empty file is that of a clip in which nobody speaks. Raises RowError.
    """
    spans: list[tuple[int, int]] = []
    texts: list[list[str]] = []
    for number, line in enumerate(_LINE_END.split(text), 1):
        if stamps := _TIME_STAMPS.match(line):
            h1, m1, s1, h2, m2, s2 = map(int, stamps.groups())
            if texts and texts[-1] and texts[-1][-1].strip().isdecimal():
                texts[-1].pop()  # the number of the subtitle that begins here
            spans.append((h1 * 3600 + m1 * 60 + s1, h2 * 3600 + m2 * 60 + s2))
            texts.append([])
        elif "-->" in line:
            raise RowError(f"{path}:{number} (time stamps {show(line)})")
        elif texts and line.strip():
            texts[-1].append(line.rstrip())
    if not spans and text.strip():
        raise RowError(f"{path} (holds no subtitle)")
    return [
        Subtitle(start, end, " ".join(lines))
        for (start, end), lines in zip(spans, texts, strict=True)
    ]
