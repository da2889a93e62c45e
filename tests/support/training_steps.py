"""Short ways to a config and to training steps of the toy dataset."""

from collections.abc import Sequence

from support.toy_dataset import ToyData
from vico.cli.flags import parse
from vico.data.batching import TrainingSteps
from vico.data.mixture import parse_datasets
from vico.data.types import Question
from vico.train.build import Inputs
from vico.train.config import RunConfig


def config_of(toy: ToyData, *flags: str) -> RunConfig:
    """The config of a run on the toy dataset: 4 questions a micro-batch, and these flags."""
    return parse([*toy.flags, "--batch_size", "4", *flags], "vico train", "").resolve()


def training_steps(
    inputs: Inputs,
    *,
    micro_batch_size: int = 4,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    in_file_order: bool = False,
    crop: bool | None = None,
    dataset: str = "nextqa",
    questions: Sequence[Question] | None = None,
    tasks: tuple[str, ...] = ("vqa", "cap"),
    max_tokens: int | None = None,
) -> TrainingSteps:
    """The steps over the training questions, by default of two tasks and on one rank.

    `in_file_order`: questions are not shuffled. `crop`: captions are cropped at random; by default
    where questions are shuffled.
    `questions`: other ones than all for training.
    """
    return TrainingSteps(
        inputs.questions["train"] if questions is None else questions,
        inputs.datasets,
        parse_datasets(dataset),
        num_slots=10,
        tasks=tasks,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        seed=seed,
        shuffle=not in_file_order,
        crop=not in_file_order if crop is None else crop,
        max_tokens=max_tokens,
    )
