"""What readers and prompts pass on: a question of an annotation file, and the tokens of a task."""

from dataclasses import dataclass

VIDEO_SLOT = -1  # stands in TokenSequence.tokens where a frame feature replaces the token

FeatureRows = tuple[int, int]  # [first, last) row of a clip in its video's features


@dataclass(frozen=True, slots=True)
class Question:
    """One multiple-choice question as its annotation file states it; texts are verbatim."""

    # Position among the questions of its file, 0-based.
    index: int
    qid: str
    video: str
    # What accuracies are grouped by: "CW", "Interaction", a show's name; "(unknown)" without one.
    type: str
    question: str
    options: tuple[str, ...]
    # 0-based; None in a split that is published without answers.
    answer: int | None
    # None: the whole video.
    feature_rows: FeatureRows | None = None
    # Subtitles inside the clip (TVQA with --sub); each line follows one blank.
    dialogue: str = ""
    # Of the video, where the row of the question holds it.
    caption: str = ""
    lacks_subtitles: bool = False  # asked for and not there: it may have had a dialogue
    # "val.csv:17", for messages.
    place: str = ""
    # The name of its data set, where features and captions are looked up; readers leave it out.
    dataset: str = ""


class Questions(list[Question]):
    """The questions of a file, in its order."""

    num_blank_rows = 0  # of the file: they hold nothing but blanks, and were passed over
    # What was read otherwise than it is written, or not at all: "3 of 9 answers are letters".
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """The tokens of one task. For t in `targets`, the row of position t - 1 predicts token t."""

    task: str  # "vqa", "cap", "vaq", "qav" or "text"
    tokens: tuple[int, ...]  # token ids, VIDEO_SLOT in the video slots
    targets: range
    video_start: int  # position of the first slot

    @property
    def num_inputs(self) -> int:
        """Positions that the model must run. Rows after that of the last target predict nothing."""
        return self.targets.stop - 1

    @property
    def predicts_frames(self) -> bool:
        """Whether the targets are the video slots (which frame is it?) instead of tokens."""
        return self.targets.start == self.video_start
