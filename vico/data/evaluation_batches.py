"""The micro-batches of an evaluation, for one rank: some questions with all their options each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch.utils.data import Dataset

from vico.data.micro_batches import (
    Clip,
    DatasetInputs,
    MicroBatchBuilder,
    TaskSequence,
    clip_of,
    question_characters,
)
from vico.data.types import Question
from vico.errors import UserError
from vico.model.batch import PackedBatch

T = TypeVar("T")

# One forward scores prompts of about this many tokens, whatever the flags and the number of ranks.
EVALUATION_TOKENS = 2048
# A guess at the tokens of a prompt: instruction, video slots and labels...
PROMPT_OVERHEAD_TOKENS = 32
# ...and the question's text.
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some questions of an evaluation with all their options, scored in one forward."""

    # Positions in the list of questions, one per group of sequences. Empty: a dummy.
    questions: tuple[int, ...]
    batch: PackedBatch | None
    error: UserError | None = None

    def pin_memory(self) -> "Chunk":
        return Chunk(self.questions, self.batch and self.batch.pin_memory(), self.error)


class EvaluationChunks(MicroBatchBuilder, Dataset[Chunk]):
    """Item i: the i-th chunk of this rank.

    The chunks are the same for any number of ranks, and so are the scores, bit for bit.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        datasets: Mapping[str, DatasetInputs],
        *,
        num_slots: int,
        rank: int,
        world_size: int,
        share: bool = True,
    ) -> None:
        super().__init__(questions, datasets, num_slots, share)
        self._chunks = share_of(divide(questions), rank, world_size)

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, item: int) -> Chunk:
        places = self._chunks[item]
        sequences: list[TaskSequence] = []
        try:
            for place in places or [0]:  # a dummy takes the first question
                sequences += self._options(self.questions[place])
            batch = self._pack(sequences)
        except UserError as error:  # a value, because the ranks must agree on it first
            return Chunk((), None, error)
        return Chunk(tuple(places), batch)

    def _options(self, question: Question) -> list[TaskSequence]:
        prompts = self._datasets[question.dataset].prompts
        fitted = prompts.fit(question, "vqa")
        sequences = []
        for answer in range(len(question.options)):
            sequence = prompts.vqa(fitted, answer)
            sequences.append(TaskSequence(question, sequence, task=0))
        return sequences


def share_of(chunks: Sequence[list[T]], rank: int, world_size: int) -> list[list[T]]:
    """The chunks of a rank, with empty ones at the end: dummies.

    Every rank runs as many forwards, because they are collective under ZeRO-3.
    """
    own_chunks = chunks[rank::world_size]
    num_dummies = -(-len(chunks) // world_size) - len(own_chunks)
    return [*own_chunks, *([] for _ in range(num_dummies))]


def divide(questions: Sequence[Question]) -> list[list[int]]:
    """Positions of the questions, those of a clip together, cut at about EVALUATION_TOKENS.

    Of the questions of some chunks alone, in this order, the same chunks result.
    """
    by_clip: dict[Clip, list[int]] = {}
    for place, question in enumerate(questions):
        by_clip.setdefault(clip_of(question), []).append(place)
    chunks: list[list[int]] = []
    size = EVALUATION_TOKENS
    for places in by_clip.values():
        for place in places:
            if size >= EVALUATION_TOKENS:
                chunks.append([])
                size = 0
            chunks[-1].append(place)
            size += guess_tokens(questions[place])
    return chunks


def guess_tokens(question: Question) -> int:
    """About how many tokens a question's prompt has, without encoding it."""
    return PROMPT_OVERHEAD_TOKENS + question_characters(question) // CHARACTERS_PER_TOKEN
