"""The memory of --keep and of comparing predictions, on the meta device, at the size of a GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.measure.workload import SyntheticWorkload
from support.live_bytes import LiveBytes, meta_model, peak_bytes
from support.planning import EVERY_CONFIG
from vico.data.packing import Example, pack
from vico.data.text_windows import text_sequence
from vico.model.batch import PackedBatch
from vico.model.config import HEAD_CHUNK_BYTES, KEPT_POSITIONS, LlamaConfig
from vico.model.ops.logits import Divergence, compare_predictions

every_type = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def chunks_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEAD_CHUNK_BYTES, "cpu", HEAD_CHUNK_BYTES["cuda"])  # of meta tensors too


def batch_with_texts(config: LlamaConfig, num_questions: int) -> PackedBatch:
    """Questions and captions of the real datasets' lengths, each with a text."""
    work = SyntheticWorkload(config.vocab_size, seed=0).training(1, num_questions)
    examples: list[Example] = []
    for task, sequences in enumerate((work.vqa, work.cap)):
        examples += [Example(tokens, clip, task) for clip, tokens in enumerate(sequences)]
    generator = torch.Generator().manual_seed(0)
    shape = (num_questions, KEPT_POSITIONS)
    ids = torch.randint(3, config.vocab_size, shape, generator=generator).tolist()
    texts = [Example(text_sequence(tuple(tokens)), 0, 2) for tokens in ids]
    alone = pack(texts, work.features_VFC[:0])
    return pack([*examples, *texts], work.features_VFC, texts=alone)


@pytest.mark.parametrize("num_questions", [1, 2, 8])
@pytest.mark.parametrize(
    ("name", "kernel", "dtype"),
    [
        ("7B", "varlen", torch.bfloat16),
        ("8B", "varlen", torch.bfloat16),
        ("8B", "blockwise", torch.bfloat16),
        pytest.param("7B", "blockwise", torch.float32, marks=pytest.mark.slow),
        pytest.param("8B", "blockwise", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_keeping_takes_little(
    name: str, kernel: Any, dtype: torch.dtype, num_questions: int
) -> None:
    """--keep: the frozen pass and the divergence add at most 15 % to a step of as many tokens."""
    batch = batch_with_texts(EVERY_CONFIG[name], num_questions)
    model = meta_model(EVERY_CONFIG[name], kernel, dtype)
    without = peak_bytes(model, replace(batch, texts=None))
    with_texts = peak_bytes(model, batch)
    assert with_texts <= 1.15 * without, with_texts / without


@every_type
@pytest.mark.parametrize("name", ["7B", "8B"])
@pytest.mark.parametrize("num_targets", [1, 504, 2048])
def test_logits_take_no_more_than_a_chunk(name: str, num_targets: int, dtype: torch.dtype) -> None:
    """All that is made of them, together; besides, numbers of a token and states of its width."""
    config = EVERY_CONFIG[name]
    shape = (num_targets, config.dim)
    weight_WD = torch.empty(config.vocab_size, config.dim, dtype=dtype, device="meta")
    frozen_ND, adapted_ND = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))
    rows_N, ids_N = (torch.zeros(num_targets, dtype=torch.int64, device="meta") for _ in range(2))
    known = (weight_WD, frozen_ND, adapted_ND, rows_N, ids_N)
    numbers = num_targets * 64
    for keep, states in ((True, frozen_ND.nbytes), (False, 0)):
        live = LiveBytes({tensor.untyped_storage()._cdata for tensor in known})
        with live, torch.no_grad():
            if keep:
                Divergence.apply(adapted_ND, frozen_ND, weight_WD)
            else:
                compare_predictions(frozen_ND, adapted_ND, weight_WD, rows_N, ids_N)
        assert live.peak <= HEAD_CHUNK_BYTES["cuda"] + states + numbers, (keep, live.peak / 2**20)
