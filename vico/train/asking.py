"""Questions to a checkpoint that no split of its run need hold (`vico ask`, `vico.api`).

They are scored by the functions of `vico eval`. The last bits of a score depend on what else is in
its forward, so a question that the evaluation of config.split asks too (the same text, options and
frames) is scored in the chunk of that evaluation: its scores are those of `vico eval`, bit for bit.
The others are scored as `vico eval` scores a split that holds them and no more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from vico.checkpoint.format import Checkpoint
from vico.data.datasets import find_dataset
from vico.data.evaluation_batches import divide
from vico.data.features import Features
from vico.data.micro_batches import DatasetInputs
from vico.data.prompts import Prompts, letter
from vico.data.tokenizer import Tokenizer
from vico.data.types import Question
from vico.distributed.world import World
from vico.errors import UserError
from vico.generation.generate import Generated, Prompt, generate
from vico.generation.settings import GenerationSettings
from vico.model.config import FEATURE_WIDTH
from vico.train import preflight
from vico.train.build import build_engine, read_backbone
from vico.train.config import RunConfig
from vico.train.engine import Engine
from vico.train.evaluate import choose, score
from vico.train.start import fit_and_compare

# What the features and prompts of asked questions are called: no data set has such a name.
PLAIN, WITH_DIALOGUE = "", " with dialogue"


@dataclass(frozen=True)
class Answer:
    """The scores of a question's options, and what follows from them."""

    question: Question  # as it was asked; its options may have been shortened for the prompt
    scores: tuple[float, ...]  # per option: the mean cross-entropy of its target tokens
    losses: tuple[float, ...]  # per option: their sum, -log P(the tokens after the prompt)
    in_evaluation: bool  # scored in a chunk of the evaluation of the run's split

    @property
    def index(self) -> int:
        """The option with the lowest score, as `vico eval` chooses; of equal ones the first."""
        return choose([self.scores])[0]

    @property
    def answer(self) -> str:
        return self.question.options[self.index]

    @property
    def probabilities(self) -> list[float]:
        """The softmax over the options of -losses: what each one's tokens weigh among them all.

        Where all options have as many target tokens, the answer's is the largest.
        """
        weights = np.exp(min(self.losses) - np.array(self.losses))
        probabilities: list[float] = (weights / weights.sum()).tolist()
        return probabilities

    def record(self) -> dict[str, Any]:
        """One JSON object."""
        question = self.question
        record: dict[str, Any] = {"video": question.video, "question": question.question}
        record |= {
            "options": list(question.options),
            "answer": self.answer,
            "prediction": self.index,
            "probabilities": self.probabilities,
            "scores": list(self.scores),
        }
        return record

    def lines(self) -> list[str]:
        """A line for each option; the answer's begins with a sign."""
        rows = []
        options, probabilities = self.question.options, self.probabilities
        for i, (option, probability) in enumerate(zip(options, probabilities, strict=True)):
            mark = ">" if i == self.index else " "
            rows.append(f"{mark} {letter(i)} {probability:7.2%}  {self.scores[i]:.4f}  {option}")
        return rows


class AskedModel:
    """A checkpoint's model. Making one reads headers; the weights are loaded at the first use.

    Making it, `engine` and `ask` are collectives. `config`: by cli/evaluate.py, `settings_of`.
    """

    def __init__(self, config: RunConfig, checkpoint: Checkpoint, world: World) -> None:
        """Raises UserError, on all ranks, for bad input."""
        # No worker processes: they would map the features again.
        self.config, self.world = replace(config, num_workers=0), world
        with world.raise_together():
            projection = checkpoint.weights.get("visual_proj.weight")
            width = FEATURE_WIDTH if projection is None else projection.shape[-1]
            self.inputs, self._backbone = read_backbone(self.config, width, world)
        self.checkpoint = fit_and_compare(self.config, checkpoint, self.inputs, world)
        self.feature_width = width

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.checkpoint.notes, *self.inputs.notes)

    @cached_property
    def engine(self) -> Engine:
        return build_engine(self.config, self.inputs, self.checkpoint.weights, self.world)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._backbone.tokenizer

    def prompts(self, dialogue: bool = False) -> Prompts:
        """`dialogue`: whether the instructions mention one."""
        config = self.config
        limits = (config.max_feats, config.max_seq_len, config.max_cap_len)
        return Prompts(self.tokenizer, *limits, dialogue=dialogue)

    def require_width(self, features: Features) -> None:
        """Raise UserError if the model reads features of another width."""
        if features.width != self.feature_width:
            raise UserError(
                f"{features.path}: the features are {features.width} wide, and "
                f"{self.checkpoint.path} was trained on features {self.feature_width} wide; use "
                "those of the same encoder"
            )

    def ask(self, questions: Sequence[Question], features: Features) -> list[Answer]:
        """Score the options of each question. A collective: every rank gets the answers.

        Raises UserError, on all ranks, for questions whose video `features` lacks or that do not
        fit --max_seq_len; TrainingError for scores that are not finite.
        """
        with self.world.raise_together():
            self._check(questions, features)
            asked = [self._prepared(question) for question in questions]
            datasets = {}
            for name in (PLAIN, WITH_DIALOGUE):
                prompts = self.prompts(dialogue=name == WITH_DIALOGUE)
                datasets[name] = DatasetInputs(features, prompts, {})
            lengths = self._num_targets(asked, datasets)
            own = self._of_evaluation(asked, features)
        agreed = [other[0] for other in self.world.gather_objects(own[:1])]
        twins, companions = own if agreed.count(own[0]) == len(agreed) else ({}, own[1])
        found: dict[int, list[float]] = {}  # by the place in `asked`
        if twins:
            label = self.config.split
            scores = self._score(companions.questions, companions.datasets, label)
            found |= {place: scores[twin] for place, twin in twins.items()}
        rest = [place for place in range(len(asked)) if place not in twins]
        if rest:
            scores = self._score([asked[place] for place in rest], datasets, "asked")
            found |= zip(rest, scores, strict=True)
        answers = []
        for place, question in enumerate(questions):
            pairs = zip(found[place], lengths[place], strict=True)
            losses = tuple(mean * count for mean, count in pairs)
            answers.append(Answer(question, tuple(found[place]), losses, place in twins))
        return answers

    def answer_freely(
        self, questions: Sequence[Question], features: Features, settings: GenerationSettings
    ) -> list[Generated]:
        """A generated text per question, whose options it ignores. No part of the method.

        A collective: every rank gets the texts. Raises UserError as `ask` does.
        """
        with self.world.raise_together():
            self._check(questions, features)
            prompts = []
            for question in map(self._prepared, questions):
                of_kind = self.prompts(dialogue=question.dataset == WITH_DIALOGUE)
                frames_FC = features.finite_sample(
                    question.video, question.feature_rows, self.config.max_feats
                )
                prompts.append(Prompt(of_kind.free_question(question), frames_FC))
        return self._generate(prompts, settings)

    def caption(
        self,
        videos: Sequence[tuple[Features, str]],
        settings: GenerationSettings,
        opening: Sequence[int],
    ) -> list[Generated]:
        """A generated caption per video, whole, named by its features and its id there.

        `opening`: the tokens that it begins with (train/captioning.py). A collective: every rank
        gets the captions. Raises UserError for a video without features.
        """
        with self.world.raise_together():
            sequence = self.prompts().caption_prompt(opening)
            prompts = []
            for features, video in videos:
                self.require_width(features)
                features.check([_about(video)])
                frames_FC = features.finite_sample(video, None, self.config.max_feats)
                prompts.append(Prompt(sequence, frames_FC, tuple(opening)))
        return self._generate(prompts, settings)

    def _generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Generated]:
        self.engine.train(False)
        model: Any = self.engine.module
        return generate(model, prompts, self.tokenizer, settings, self.world)

    def _score(
        self, questions: Sequence[Question], datasets: Mapping[str, DatasetInputs], label: str
    ) -> list[list[float]]:
        inputs = replace(self.inputs, datasets=dict(datasets))
        return score(self.engine, inputs, questions, label, self.config, self.world)

    def _check(self, questions: Sequence[Question], features: Features) -> None:
        self.require_width(features)
        num_past_end = features.check(questions)
        features.check_finite(questions, self.config.max_feats)
        if num_past_end:
            self.world.print_rank0(
                f"note: {num_past_end} of {len(questions)} questions are about a clip past the end "
                "of its video, and get zero features"
            )

    def _num_targets(
        self, questions: Sequence[Question], datasets: Mapping[str, DatasetInputs]
    ) -> list[list[int]]:
        """Per question, the target tokens of each option. Raises UserError if one does not fit."""
        counts, num_shortened = [], 0
        for question in questions:
            prompts = datasets[question.dataset].prompts
            fitted = prompts.fit(question, "vqa")
            num_shortened += fitted != question
            options = range(len(question.options))
            counts.append([len(prompts.vqa(fitted, option).targets) for option in options])
        if num_shortened:
            self.world.print_rank0(
                f"note: {num_shortened} of {len(questions)} questions are shortened to "
                f"--max_seq_len {self.config.max_seq_len} (dialogue first, then options)"
            )
        return counts

    @cached_property
    def _dialogue(self) -> set[bool]:
        """Whether the prompts of the run's data sets mention a dialogue."""
        config = self.config
        names = config.dataset_names
        return {find_dataset(name, config.folder_of(name)).has_dialogue for name in names}

    def _prepared(self, question: Question) -> Question:
        """`question` with the prompts that it gets. Raises UserError for a dialogue without."""
        if question.dialogue and True not in self._dialogue:
            raise UserError(
                f"{question.place}: has a dialogue, which no prompt of this checkpoint's training "
                f"mentions (--dataset {self.config.dataset}); leave it out"
            )
        speaks = bool(question.dialogue) or False not in self._dialogue
        return replace(question, dataset=WITH_DIALOGUE if speaks else PLAIN)

    def _of_evaluation(
        self, asked: Sequence[Question], features: Features
    ) -> tuple[dict[int, int], "_Evaluation"]:
        """({place of an asked question: its place among these}, the questions of their chunks).

        Empty where the evaluation cannot be made.
        """
        num_frames = self.config.max_feats
        try:
            evaluation = self._evaluation
            twins = {}
            for i, question in enumerate(asked):
                twin = evaluation.find(question, features, num_frames)
                if twin is not None:
                    twins[i] = twin
            twins, companions = evaluation.chunks_of(twins)
            companions.check(num_frames)
        except UserError:
            return {}, _Evaluation([], {})
        return twins, companions

    @cached_property
    def _evaluation(self) -> "_Evaluation":
        """What `vico eval` asks. Raises UserError where its files are not at hand."""
        config = self.config
        questions: list[Question] = []
        datasets: dict[str, DatasetInputs] = {}
        for name in config.dataset_names:
            used, _, features = preflight.read_used(config, name, config.split)
            datasets[name] = DatasetInputs(features, self._backbone.prompts(config, name), {})
            questions += used
        return _Evaluation(questions, datasets)


@dataclass(frozen=True)
class _Evaluation:
    """The questions of a split, in the order of its evaluation, and what they are asked with."""

    questions: list[Question]
    datasets: dict[str, DatasetInputs]

    @cached_property
    def _places(self) -> dict[Any, list[int]]:
        places: dict[Any, list[int]] = {}
        for place, question in enumerate(self.questions):
            places.setdefault(_texts(question), []).append(place)
        return places

    def find(self, asked: Question, features: Features, num_frames: int) -> int | None:
        """The place of the question with the texts and frames of `asked`; of several, its id's."""

        def has_another_id(place: int) -> bool:
            return self.questions[place].qid != asked.qid

        for place in sorted(self._places.get(_texts(asked), ()), key=has_another_id):
            own = self.questions[place]
            own_features = self.datasets[own.dataset].features
            own_FC = own_features.sample(own.video, own.feature_rows, num_frames)
            asked_FC = features.sample(asked.video, asked.feature_rows, num_frames)
            if torch.equal(own_FC, asked_FC):
                return place
        return None

    def check(self, num_frames: int) -> None:
        """Raise UserError unless all its questions can be asked."""
        for name, inputs in self.datasets.items():
            questions = [q for q in self.questions if q.dataset == name]
            inputs.features.check(questions)
            inputs.features.check_finite(questions, num_frames)
            for question in questions:
                inputs.prompts.fit(question, "vqa")

    def chunks_of(self, twins: Mapping[int, int]) -> tuple[dict[int, int], "_Evaluation"]:
        """The chunks with the questions at `twins`' places: (their new places, the questions)."""
        wanted = set(twins.values())
        kept: list[int] = []
        for chunk in divide(self.questions) if wanted else ():
            if not wanted.isdisjoint(chunk):
                kept += chunk
        new_places = {old: new for new, old in enumerate(kept)}
        questions = [self.questions[place] for place in kept]
        return {i: new_places[old] for i, old in twins.items()}, replace(self, questions=questions)


def _about(video: str) -> Question:
    """A question of which only the video matters."""
    return Question(0, "", video, "", "", (), None)


def _texts(question: Question) -> tuple[str, tuple[str, ...], str]:
    """What the prompts of a question are made of."""
    return question.question, question.options, question.dialogue
