"""Which key of a feature file is meant by the video id of a question. One rule:

1. the same text, but for blanks around it (integers count as their digits);
2. else the same text without leading folders, without the extension of a video or feature file,
   and without `.0` behind digits, on both sides;
3. else, where several keys all end in one name (`v1/features`, `v2/features`), their folders as in
   step 2.

Two keys that become the same text are an error for who asks for it.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from vico.errors import fail, show

VIDEO_EXTENSIONS = (
    *"mp4 mkv webm avi mov flv wmv m4v mpg mpeg".split(),
    *"3gp 3g2 ogv ts mts m2ts vob gif asf mxf".split(),
)
_FEATURE_EXTENSIONS = ("npy", "npz", "pt", "pth", "safetensors", "h5")
_EXTENSION = re.compile(rf"\.({'|'.join((*VIDEO_EXTENSIONS, *_FEATURE_EXTENSIONS))})$", re.I)


def reduced(name: str) -> str:
    """Step 2 of the rule."""
    last = re.split(r"[/\\]", name.strip())[-1]
    without = _EXTENSION.sub("", last)
    return re.sub(r"^(\d+)\.0$", r"\1", without)


def _without_common_name(keys: Iterable[str]) -> list[str]:
    """The folders of keys that all end in one name; [] where they do not."""
    parts = [re.split(r"[/\\]", key) for key in keys]
    names = {part[-1] for part in parts}
    is_common = len(parts) > 1 and len(names) == 1 and all(len(part) > 1 for part in parts)
    return ["/".join(part[:-1]) for part in parts] if is_common else []


def _by_reduced(names: Iterable[str], keys: Iterable[str]) -> dict[str, list[str]]:
    """Step 2 of `names`: the keys that they are names of."""
    found: dict[str, list[str]] = {}
    for name, key in zip(names, keys, strict=False):
        found.setdefault(reduced(name), []).append(key)
    return found


class VideoIds:
    """The keys of a feature file. Raises UserError for keys that are no ids, and for doubles."""

    def __init__(self, keys: Iterable[object], path: Path) -> None:
        self._path = path
        self.keys: dict[str, object] = {}  # by their texts: as the file has them
        self._reduced: list[dict[str, list[str]]] = []  # of steps 2 and 3
        found = list(keys)
        bad = [key for key in found if type(key) not in (str, int, float)]
        if bad:
            fail(
                f"{path}: {len(bad)} of {len(found)} keys are no text, e.g. {show(bad[0])}; "
                "save it with str(video id) as keys"
            )
        for key in found:
            text = str(key).strip()
            if text in self.keys:
                fail(f"{path}: two entries are called {show(text)} but for blanks; keep one")
            self.keys[text] = key

    def find(self, video: str) -> str | None:
        """The text of the key that is meant; None: there is none."""
        if video in self.keys:
            return video
        if not self._reduced:
            folders = _without_common_name(self.keys)
            self._reduced = [_by_reduced(names, self.keys) for names in (self.keys, folders)]
        asked = reduced(video)
        by_name, by_folder = self._reduced
        meant = by_name.get(asked) or by_folder.get(asked, [])
        if len(meant) > 1:
            fail(
                f"{self._path}: {show(meant[0])} and {show(meant[1])} may both be video "
                f"{show(video)}; keep one, or name it in full in the questions"
            )
        return meant[0] if meant else None
