"""Generation on two ranks, under ZeRO-2 and ZeRO-3: the texts of one rank."""

from pathlib import Path

import torch

from reference import oracle_files
from support.backbones import make_model
from support.generated_texts import assert_equal, oracle_texts, prompts_of, random_gates
from support.processes import ROOT, start
from support.toy_dataset import ToyData
from vico.model.weights.load import open_weights


def test_two_ranks(toy: ToyData, tmp_path: Path) -> None:
    """Three batches, so one rank runs one of no importance; some texts end before others."""
    weights = open_weights(toy.llama / "tiny", toy.tokenizer.vocab_size())
    model = make_model(weights)
    initial = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    trainables, prompts = random_gates(initial), prompts_of(toy, 5)
    torch.save((prompts, trainables), tmp_path / "inputs")
    program = (str(ROOT / "tests" / "support" / "generating_ranks.py"),)
    run = start(str(tmp_path / "inputs"), *toy.flags, ranks=2, program=program)
    assert run.wait() == [0, 0], run.output
    reference = oracle_files.load_meta(toy.llama / "tiny")
    expected = oracle_texts(reference, trainables, prompts)
    texts = torch.load(tmp_path / "inputs.texts", weights_only=False)
    for stage in (2, 3):
        assert_equal(texts[stage], expected)
