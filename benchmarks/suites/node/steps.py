"""The `node` suite's samples: each rank's share of steps that any number of ranks can divide."""

import torch
from torch.utils.data import Dataset

from benchmarks.measure.workload import SyntheticWorkload, TrainingWork
from vico.data.batching import Step
from vico.data.bin_packing import greedy_balance
from vico.data.packing import Example, pack
from vico.model.batch import PackedBatch

TASK_WEIGHTS = (1.0, 0.5)  # of VQA and captions


class RankSteps(Dataset[Step]):
    """Item (epoch, index): this rank's share of a step."""

    def __init__(
        self,
        workload: SyntheticWorkload,
        questions_per_step: int,
        questions_per_micro_batch: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._workload = workload
        self._questions_per_step = questions_per_step
        self._questions_per_micro_batch = questions_per_micro_batch
        self._rank, self._world_size = rank, world_size

    def __getitem__(self, item: tuple[int, int]) -> Step:
        _, index = item
        work = self._workload.training(index, self._questions_per_step)
        batches = tuple(_pack(work, questions) for questions in self._micro_batches(work))
        dummy = None
        if self._world_size > 1:
            # Its only task is one more than the tasks that count, so that it adds nothing.
            example = Example(work.vqa[0], 0, len(TASK_WEIGHTS))
            dummy = pack([example], work.features_VFC[:1])
        counts = torch.zeros(len(TASK_WEIGHTS), dtype=torch.int64)
        for batch in batches:
            counts += torch.bincount(batch.target_tasks, minlength=len(TASK_WEIGHTS))
        return Step(batches, dummy, counts, sum(batch.num_real_tokens for batch in batches))

    def _micro_batches(self, work: TrainingWork) -> list[list[int]]:
        """This rank's questions by micro-batch, with about equal numbers of tokens."""
        lengths = []
        for vqa, caption in zip(work.vqa, work.cap, strict=True):
            lengths.append(len(vqa.tokens) + len(caption.tokens))
        mine = greedy_balance(lengths, self._world_size)[self._rank]
        if not mine:
            return []
        num_batches = -(-len(mine) // self._questions_per_micro_batch)
        batches = []
        for group in greedy_balance([lengths[i] for i in mine], num_batches):
            batches.append([mine[i] for i in group])
        return batches


def _pack(work: TrainingWork, questions: list[int]) -> PackedBatch:
    examples = []
    for task, sequences in enumerate((work.vqa, work.cap)):
        examples += [Example(sequences[i], clip, task) for clip, i in enumerate(questions)]
    return pack(examples, work.features_VFC[questions])
