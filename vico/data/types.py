"""What the readers and prompts pass on: a question of an annotation file, and the tokens of a task."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """One multiple-choice question as its annotation file states it; texts are verbatim."""

    index: int  # place among the questions of its file, 0-based
    qid: str
    video: str
    type: str  # what accuracies are grouped by: "CW", "Interaction", a show's name; "(unknown)" when the file says nothing
    question: str
    options: tuple[str, ...]
    answer: int | None  # 0-based; None in a split that is published without answers
    feature_rows: tuple[int, int] | None = (
        None  # [first, last) row of the clip in the video's features; None: all of them
    )
    dialogue: str = (
        ""  # subtitles inside the clip (TVQA with --sub), each line preceded by one blank
    )
    place: str = ""  # "val.csv:17", for messages


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One task's tokens. Position t is a target when t is in `targets`; the row before it (t - 1) predicts it."""

    task: str  # "vqa", "cap", "vaq" or "qav"
    tokens: tuple[int, ...]  # piece ids; VIDEO_SLOT in the video slots
    targets: range
    video_start: int  # position of the first slot

    @property
    def num_inputs(self) -> int:
        """Positions that the model must run: what follows the row of the last target predicts nothing."""
        return self.targets.stop - 1


VIDEO_SLOT = -1
