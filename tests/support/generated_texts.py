"""Prompts of the toy data set, gates that matter, and what the oracle generates."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from reference import oracle, oracle_generation
from reference.oracle_generation import OracleText
from reference.oracle_sequences import OracleSequence
from support.toy_dataset import ToyData
from vico.data.features import sample_frames
from vico.data.packing import Example, pack
from vico.data.prompts import Prompts
from vico.data.tokenizer import Tokenizer
from vico.data.types import Question, TokenSequence
from vico.generation.generate import Generated, Prompt
from vico.generation.settings import GenerationSettings
from vico.model.vico import ViCo

if TYPE_CHECKING:  # slow to import, and a rank of the tests needs it not
    from transformers import PreTrainedModel

# fp32 through three layers in another order of sums. Measured: 3e-6.
LOG_PROBABILITY_ATOL = 1e-5
HYPER = oracle.Hyper(bias=0.7)
SETTINGS = GenerationSettings(max_new_tokens=12)
# Of a random LLaMA hardly any text ends. This token is in some of them.
EOS = 14


def tokenizer_of(toy: ToyData) -> Tokenizer:
    """The toy tokenizer, with EOS in the place of its own."""
    tokenizer = Tokenizer(toy.llama / "tokenizer.model")
    tokenizer.eos = EOS
    return tokenizer


def random_gates(trainables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with gates that are not zero."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(value.shape, generator=generator) if "gate" in name else value
        for name, value in trainables.items()
    }


def prompts_of(toy: ToyData, num: int) -> list[Prompt]:
    """Captions and free questions, each about a video of its own."""
    texts = Prompts(tokenizer_of(toy), 10, 512, 384, False)
    prompts = []
    for i, item in enumerate(toy.items("train")[:num]):
        question = Question(i, "0", "v", "CW", item.question, (), None)
        sequence = texts.caption_prompt() if i % 2 else texts.free_question(question)
        prompts.append(Prompt(sequence, sample_frames(item.features, 10)))
    return prompts


def text_prompts(vocab_size: int, lengths: list[int]) -> list[Prompt]:
    """Random texts without a video."""
    generator = torch.Generator().manual_seed(8)
    prompts = []
    for length in lengths:
        ids = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        sequence = TokenSequence("cap", (*ids, 0), range(length, length + 1), length + 1)
        prompts.append(Prompt(sequence, torch.zeros(10, 768)))
    return prompts


def scored(model: ViCo, prompt: Prompt, text: Generated) -> list[float]:
    """The log-probability of each token of a text, by one forward of prompt and text."""
    start = prompt.sequence.num_inputs
    tokens = (*prompt.sequence.tokens[:start], *text.token_ids)
    targets = range(start, len(tokens))
    sequence = TokenSequence("cap", tokens, targets, prompt.sequence.video_start)
    with torch.no_grad():
        losses: Tensor = model(pack([Example(sequence, 0, 0)], prompt.features_FC[None]))
    return (-losses).tolist()


def oracle_texts(
    model: oracle.Model, trainables: dict[str, Tensor], prompts: list[Prompt]
) -> list[OracleText]:
    texts = []
    for prompt in prompts:
        sequence = prompt.sequence
        ids = list(sequence.tokens[: sequence.num_inputs])
        start = OracleSequence("caption", ids, [], sequence.video_start)
        num = SETTINGS.max_new_tokens
        inputs = (start, prompt.features_FC, HYPER, EOS, num)
        texts.append(oracle_generation.greedy(model, trainables, *inputs))
    return texts


def by_transformers(
    reference: "PreTrainedModel", prompt: Prompt, max_new_tokens: int, eos: int, **options: Any
) -> tuple[list[int], Any]:
    """(the new tokens, all that `generate` of transformers returns) after a prompt's text."""
    ids = torch.tensor([prompt.sequence.tokens[:-1]])
    out = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=eos,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences[0, ids.shape[1] :].tolist(), out


def assert_equal(generated: list[Generated], expected: list[OracleText]) -> None:
    assert [list(text.token_ids) for text in generated] == [text.ids for text in expected]
    for text, other in zip(generated, expected, strict=True):
        assert text.log_probabilities == pytest.approx(
            other.log_probabilities, abs=LOG_PROBABILITY_ATOL
        )
