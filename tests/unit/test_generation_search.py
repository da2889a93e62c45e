"""Beam search against transformers', and what is drawn: how often, and whatever runs beside it."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import TopPLogitsWarper

from support.backbones import KINDS, make_hugging_face, make_model
from support.generated_texts import (
    by_transformers,
    prompts_of,
    scored,
    text_prompts,
    tokenizer_of,
)
from support.toy_dataset import ToyData
from vico.data.tokenizer import Tokenizer
from vico.distributed.world import World
from vico.generation.generate import Prompt, generate
from vico.generation.search import TokenByToken
from vico.generation.settings import GenerationSettings
from vico.model.vico import ViCo
from vico.model.weights.load import open_weights

# Of a score, relative: fp32 sums in transformers, double precision here.
SCORE_RTOL = 1e-5
LENGTH_PENALTIES = (1.0, 0.0, 2.0, -0.5)
NUM_NEW = 12
Models = tuple[PreTrainedModel, ViCo, Tokenizer]


@pytest.fixture(scope="module")
def models(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A LLaMA with grouped heads, by transformers and by ViCo; an EOS that many texts come to."""
    tokenizer, folder = tokenizer_of(toy), tmp_path_factory.mktemp("llama")
    sizes = KINDS["LLaMA-2-70B"] | {"vocab_size": tokenizer.vocab_size}
    reference = make_hugging_face(folder, sizes)
    with torch.no_grad():
        reference.lm_head.weight[tokenizer.eos] *= 2.5
    reference.save_pretrained(folder)
    return reference, make_model(open_weights(folder, None)), tokenizer


def transformers_beams(
    reference: PreTrainedModel, prompt: Prompt, settings: GenerationSettings, eos: int
) -> tuple[list[int], float]:
    """(new tokens, score) of the best beam."""
    ids, out = by_transformers(
        reference,
        prompt,
        settings.max_new_tokens,
        eos,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        early_stopping=settings.early_stopping,
        output_scores=True,
    )
    return ids, float(out.sequences_scores[0])


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_beams_are_those_of_transformers(
    models: Models, alone: World, num_beams: int, early_stopping: bool
) -> None:
    """Several prompts in one batch, each of which ends when it would end alone."""
    reference, model, tokenizer = models
    prompts = text_prompts(tokenizer.vocab_size, [3, 17, 9])
    num_ended = 0
    for length_penalty in LENGTH_PENALTIES:
        settings = GenerationSettings(
            max_new_tokens=NUM_NEW,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        texts = generate(model, prompts, tokenizer, settings, alone)
        for prompt, text in zip(prompts, texts, strict=True):
            ids, score = transformers_beams(reference, prompt, settings, tokenizer.eos)
            assert list(text.token_ids) == ids
            own_score = sum(text.log_probabilities) / len(ids) ** length_penalty
            assert own_score == pytest.approx(score, rel=SCORE_RTOL)
            num_ended += not text.is_cut
    assert 0 < num_ended < len(prompts) * len(LENGTH_PENALTIES)


def test_beams_of_videos_packed_and_alone(toy: ToyData, models: Models, alone: World) -> None:
    """The cache follows the beams: log-probabilities are those of the tokens run at once."""
    _, model, tokenizer = models
    prompts, settings = prompts_of(toy, 4), GenerationSettings(max_new_tokens=NUM_NEW, num_beams=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.add_(0.5)
    texts = generate(model, prompts, tokenizer, settings, alone)
    for prompt, text in zip(prompts, texts, strict=True):
        (single,) = generate(model, [prompt], tokenizer, settings, alone)
        assert text.token_ids == single.token_ids
        assert text.log_probabilities == pytest.approx(scored(model, prompt, text), abs=1e-5)


def test_a_text_ends_with_a_stop() -> None:
    """With the token that completes it; the others go on, to EOS or the most tokens."""

    def decode(ids: list[int]) -> str:
        return "".join("abcd"[i] for i in ids)

    settings = GenerationSettings(max_new_tokens=4, stop=("ca", "dd"))
    search = TokenByToken([0, 1, 2], settings, 3, decode)
    tokens = torch.tensor([[2, 0, 1], [0, 3, 2], [0, 0, 1], [0, 0, 2]])
    for step, running in enumerate(([0, 1, 2], [0, 1, 2], [2], [2])):
        ids, parents = search.advance(torch.eye(4)[tokens[step, running]].log_softmax(dim=1))
    assert ids == parents == []
    assert [decode(h.token_ids) for h in search.results()] == ["ca", "ad", "bcbc"]


def draws(settings: GenerationSettings, log_probabilities_W: Tensor, num: int) -> Tensor:
    """[W]: how often each token is drawn first, for `num` sequences."""
    search = TokenByToken(list(range(num)), settings, -1, decode=str)
    search.advance(log_probabilities_W.expand(num, -1))
    ids = [hypothesis.token_ids[0] for hypothesis in search.results()]
    return torch.bincount(torch.tensor(ids), minlength=len(log_probabilities_W))


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 1e-9)]
)
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature: float, top_p: float) -> None:
    """Within four standard deviations; top-p keeps the tokens that transformers keeps."""
    num = 5000
    logits_W = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    settings = GenerationSettings(temperature=temperature, top_p=top_p)
    kept_1W = TopPLogitsWarper(top_p)(torch.tensor([[0]]), logits_W[None] / temperature)
    expected_W = kept_1W.softmax(dim=1)[0]
    counts_W = draws(settings, logits_W.log_softmax(dim=0), num)
    deviation_W = (num * expected_W * (1 - expected_W)).sqrt()
    assert ((counts_W - num * expected_W).abs() <= 4 * deviation_W + 1e-3 * expected_W.gt(0)).all()


def test_what_is_drawn_follows_from_seed_and_prompt(
    toy: ToyData, models: Models, alone: World
) -> None:
    """Not from the prompts beside it, nor their order; another seed draws other texts."""
    _, model, tokenizer = models
    prompts = prompts_of(toy, 5)
    settings = GenerationSettings(max_new_tokens=NUM_NEW, temperature=1.0, top_p=0.95, seed=3)
    texts = generate(model, prompts, tokenizer, settings, alone)
    turned = generate(model, prompts[::-1], tokenizer, settings, alone)[::-1]
    single = [generate(model, [prompt], tokenizer, settings, alone)[0] for prompt in prompts]
    ids = [text.token_ids for text in texts]
    assert ids == [text.token_ids for text in turned] == [text.token_ids for text in single]
    other = GenerationSettings(max_new_tokens=NUM_NEW, temperature=1.0, top_p=0.95, seed=4)
    assert ids != [text.token_ids for text in generate(model, prompts, tokenizer, other, alone)]
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.log_probabilities == pytest.approx(scored(model, prompt, text), abs=1e-5)
