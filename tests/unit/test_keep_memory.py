"""The memory of --keep, on the meta device."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.measure.workload import SyntheticWorkload
from support.live_bytes import meta_model, peak_bytes
from support.planning import EVERY_CONFIG
from vico.data.packing import Example, pack
from vico.data.text_windows import text_sequence
from vico.model.config import KEPT_POSITIONS


@pytest.mark.parametrize(("name", "kernel"), [("7B", "varlen"), ("8B", "blockwise")])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_keeping_takes_little(name: str, kernel: Any, dtype: torch.dtype) -> None:
    """--keep: the frozen pass and the divergence add at most 15 % to a step of as many tokens."""
    config = EVERY_CONFIG[name]
    work = SyntheticWorkload(config.vocab_size, seed=0).training(1, 8)
    examples: list[Example] = []
    for task, sequences in enumerate((work.vqa, work.cap)):
        examples += [Example(tokens, clip, task) for clip, tokens in enumerate(sequences)]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (8, KEPT_POSITIONS), generator=generator).tolist()
    texts = [Example(text_sequence(tuple(tokens)), 0, 2) for tokens in ids]
    alone = pack(texts, work.features_VFC[:0])
    batch = pack([*examples, *texts], work.features_VFC, texts=alone)
    model = meta_model(config, kernel, dtype)
    without = peak_bytes(model, replace(batch, texts=None))
    with_texts = peak_bytes(model, batch)
    assert with_texts <= 1.15 * without
