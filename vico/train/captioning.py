"""The videos of a split and their captions, and the words with which a caption begins.

The first three tokens of a caption are context in training (METHOD section 2): no one learns to
write them. After "Description:" alone a trained model may write what it has learned to write after
other prompts, such as "(A)". So a generated caption begins with three usual first tokens of the
training captions, where these are at hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vico.data.features import Features
from vico.data.prompts import usual_opening
from vico.data.readers import captions as caption_files
from vico.data.types import Question
from vico.errors import UserError, show
from vico.generation.caption_metrics import caption_record
from vico.generation.generate import Generated
from vico.io.paths import exists
from vico.train import preflight
from vico.train.asking import AskedModel
from vico.train.config import RunConfig


@dataclass(frozen=True)
class SplitVideo:
    """A video of a split, and what its data set says of it."""

    dataset: str
    video: str
    features: Features
    references: tuple[str, ...]

    def record(self, generated: Generated) -> dict[str, Any]:
        """One JSON object."""
        return caption_record(self.dataset, self.video, generated, self.references)


def videos_of_split(model: AskedModel) -> list[SplitVideo]:
    """Each video of config.split once, in the order of its questions. Raises UserError."""
    config, videos = model.config, []
    for name in config.dataset_names:
        used, dropped, features = preflight.read_used(config, name, config.split)
        if dropped:
            label, total = config.label(name, config.split), len(used) + len(dropped)
            model.world.print_rank0(
                f"note: {label}: the videos of {len(dropped)} of {total} questions have "
                "no features and get no caption (--missing_features drop)"
            )
        references = references_of(model, name, used)
        for video in dict.fromkeys(question.video for question in used):
            own = (references[video],) if video in references else ()
            videos.append(SplitVideo(name, video, features, own))
    return videos


def references_of(
    model: AskedModel, dataset: str, questions: Sequence[Question]
) -> Mapping[str, str]:
    """The caption of each video, as training takes it; empty where there are none.

    Of --captions, else of the rows, else of the --captions of the checkpoint's run, else of the
    data set's folder. Raises UserError for a file with a fault.
    """
    config = model.config
    folder, named = config.folder_of(dataset), config.captions_of(dataset)
    own = {q.video: q.caption for q in questions if q.caption.strip()}
    if named is None and own:
        return own
    named = named or _captions_of_run(model, dataset)
    if named is None and not any(exists(folder / name) for name in caption_files.FILE_NAMES):
        return {}
    return caption_files.read(folder, named)


def _captions_of_run(model: AskedModel, dataset: str) -> Path | None:
    """What --captions named for this data set in training, if it is still there."""
    saved = model.checkpoint.settings
    run = RunConfig(**{k: saved[k] for k in ("dataset", "captions") if k in saved})
    if dataset not in run.dataset_names:
        return None
    path = run.captions_of(dataset)
    return path if path is not None and exists(path) else None


def opening_of(model: AskedModel, text: str | None) -> tuple[tuple[int, ...], str]:
    """(the tokens with which captions begin, a note on them). A collective.

    `text`: the words, "" for none; None: those of most training captions.
    """
    own: tuple[tuple[int, ...], str]
    with model.world.raise_together():
        own = _opening_of_text(model, text) if text is not None else _usual_opening(model)
    return model.world.gather_objects(own)[0]


def _opening_of_text(model: AskedModel, text: str) -> tuple[tuple[int, ...], str]:
    if not text.strip():
        return (), "note: captions begin behind 'Description:', which training does not teach"
    label, words = "Description:", " ".join(text.split())
    ids, ends = model.tokenizer.encode_with_ends(f"{label} {words}")
    opening = [token for token, end in zip(ids, ends, strict=True) if end > len(label)]
    return tuple(opening), f"captions begin with {show(words)} (--opening)"


def _usual_opening(model: AskedModel) -> tuple[tuple[int, ...], str]:
    prompts, config = model.prompts(), model.config
    openings: list[tuple[int, ...]] = []
    try:
        for name in config.dataset_names:
            questions = preflight.read_split(config, name, "train")
            captions = references_of(model, name, questions)
            videos = dict.fromkeys(question.video for question in questions)
            openings += [prompts.caption_opening(captions[v]) for v in videos if v in captions]
    except UserError:  # the training's files need not be at hand
        openings = []
    openings = [opening for opening in openings if opening]
    if not openings:
        return (), (
            "note: the training captions are not at hand, and captions begin behind "
            "'Description:', which training does not teach; name their first words by --opening"
        )
    opening, same = usual_opening(openings)
    words = show(model.tokenizer.decode(list(opening)).strip())
    share = f"{same} of {len(openings)} training captions begin"
    return opening, f"captions begin with {words}, as {share} (--opening)"
