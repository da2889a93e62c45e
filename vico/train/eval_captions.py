"""--eval_captions: captions of some videos with each evaluation in training, and their metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vico.data.prompts import usual_opening
from vico.data.tokenizer import Tokenizer
from vico.data.types import Question
from vico.distributed.world import World
from vico.errors import UserError, show
from vico.generation.caption_metrics import caption_record, metrics_of, require_package
from vico.generation.generate import Prompt, generate
from vico.generation.settings import GenerationSettings
from vico.io import log
from vico.model.vico import ViCo
from vico.train.build import Inputs
from vico.train.engine import Engine


@dataclass(frozen=True)
class WrittenCaptions:
    """One JSON object per video, and the metrics that there are: cider, bleu_1 and others."""

    records: list[dict[str, Any]]
    metrics: dict[str, float]


# The captions of each data set, by video.
CaptionsOfAll = Mapping[str, Mapping[str, str]]


def reference(question: Question, captions: CaptionsOfAll) -> str:
    """The caption of a question's video, or an empty text."""
    return question.caption.strip() or captions[question.dataset].get(question.video, "").strip()


def captioned(
    questions: Sequence[Question], captions: CaptionsOfAll, split: str, num: int
) -> list[Question]:
    """A question about each of the first `num` videos that have a caption.

    Raises UserError where no video has one, or pycocoevalcap is not installed.
    """
    require_package()
    first: dict[tuple[str, str], Question] = {}
    for question in questions:
        if reference(question, captions):
            first.setdefault((question.dataset, question.video), question)
    if not first:
        raise UserError(
            f"--eval_captions {num}: no video of {split} has a caption to compare with; add them "
            "to the caption file, or leave the flag out"
        )
    return list(first.values())[:num]


class CaptionedVideos:
    """The first videos of a split that have a caption, which is what theirs is compared with."""

    def __init__(self, inputs: Inputs, split: str, num: int, num_slots: int) -> None:
        """Raises UserError where no video has a caption, or pycocoevalcap is not installed."""
        self._inputs, self._num_slots = inputs, num_slots
        self._tokenizer = Tokenizer(inputs.tokenizer_path)
        self._captions = {name: dataset.captions for name, dataset in inputs.datasets.items()}
        self._questions = captioned(inputs.questions[split], self._captions, split, num)
        self._opening = self._usual_opening()
        words = show(self._tokenizer.decode(list(self._opening)).strip())
        asked = "" if len(self._questions) == num else f" (--eval_captions {num}: no more have one)"
        self.note = (
            f"captions of {len(self._questions)} {split} videos with each evaluation{asked}; they "
            f"begin with {words}, as most of training's do"
        )

    def _usual_opening(self) -> tuple[int, ...]:
        """The tokens with which most training captions begin: training has them as context only."""
        openings = []
        videos = {(q.dataset, q.video) for q in self._inputs.questions["train"]}
        for dataset, video in sorted(videos):
            inputs = self._inputs.datasets[dataset]
            if video in inputs.captions:
                openings.append(inputs.prompts.caption_opening(inputs.captions[video]))
        return usual_opening(openings)[0]

    def write(self, engine: Engine, world: World) -> WrittenCaptions:
        """By the model as it is. A collective; the metrics are those of rank 0, others get none.

        Raises UserError for features that are not finite, and what `generate` raises.
        """
        model = engine.module
        assert isinstance(model, ViCo)
        with world.raise_together():
            prompts = [self._prompt(question) for question in self._questions]
        texts = generate(model, prompts, self._tokenizer, GenerationSettings(), world)
        records = []
        for question, text in zip(self._questions, texts, strict=True):
            references = [reference(question, self._captions)]
            records.append(caption_record(question.dataset, question.video, text, references))
        world.set_phase("measuring captions")
        return WrittenCaptions(records, _metrics(records) if world.is_main else {})

    def _prompt(self, question: Question) -> Prompt:
        """Of the whole video, as `vico caption` has it."""
        dataset = self._inputs.datasets[question.dataset]
        frames_FC = dataset.features.finite_sample(question.video, None, self._num_slots)
        sequence = dataset.prompts.caption_prompt(self._opening)
        return Prompt(sequence, frames_FC, self._opening)


def _metrics(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Without METEOR, which takes seconds. What cannot be measured does not end the run."""
    try:
        metrics = metrics_of(records, meteor=False)
    except UserError as problem:
        log.info(f"note: --eval_captions: {problem}; captions are written without metrics")
        return {}
    return {name: value for name, value in metrics.items() if isinstance(value, float)}
