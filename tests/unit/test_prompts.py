"""Token ids and target spans, against the oracle and by property."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import oracle
from support.toy_dataset import ToyData
from vico.data.prompts import Prompts, crop_candidates
from vico.data.tokenizer import Tokenizer
from vico.data.types import VIDEO_SLOT, Question, TokenSequence
from vico.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
TRICKY = [
    *("Answer: The answer is (C)", "Question: why", "Video:", "Description: x", "(B)"),
    *("None", "nan", "007", " two  blanks ", "😀 日本"),
]


@pytest.fixture(scope="module")
def tokenizer(toy: ToyData) -> Tokenizer:
    return Tokenizer(toy.llama / "tokenizer.model")


def question_of(item: oracle.Question) -> Question:
    question = make_question(item.question, item.options, item.answer)
    return replace(question, dialogue=item.dialogue, place="train.csv:2")


def make_question(text: str, options: Sequence[str], answer: int) -> Question:
    return Question(0, "0", "v", "CW", text, tuple(options), answer)


def assert_same(sequence: TokenSequence, expected: oracle.OracleSequence) -> None:
    assert list(sequence.tokens) == expected.ids
    assert list(sequence.targets) == expected.targets
    assert sequence.video_start == expected.video_start


def prompts(
    tokenizer: Tokenizer, dialogue: bool = False, seq: int = 4096, cap: int = 4096
) -> Prompts:
    return Prompts(tokenizer, 10, seq, cap, dialogue)


@pytest.mark.parametrize("dataset", ["nextqa", "tvqa"])
@pytest.mark.parametrize("dialogue", ["", " hello there. how are you"])
def test_tokens_are_the_oracles(
    toy: ToyData, tokenizer: Tokenizer, dataset: str, dialogue: str
) -> None:
    built = prompts(tokenizer, dataset == "tvqa")
    rng = random.Random(0)
    for item in toy.items("train"):
        options = (*item.options[:4], rng.choice(TRICKY))
        item = replace(item, dataset=dataset, dialogue=dialogue, options=options)
        question = question_of(item)
        for answer in range(5):
            expected = oracle.vqa_sequence(toy.tokenizer, item, 10, answer)
            assert_same(built.vqa(question, answer), expected)
        assert_same(built.vaq(question, item.answer), oracle.vaq_sequence(toy.tokenizer, item, 10))
        assert_same(built.qav(question, item.answer), oracle.qav_sequence(toy.tokenizer, item, 10))
        for limit in (60, 90, 4096):
            cut = prompts(tokenizer, dataset == "tvqa", cap=limit)
            expected = oracle.caption_sequence(toy.tokenizer, item, 10, limit)
            assert_same(cut.caption(item.caption), expected)


@given(
    question=TEXT,
    options=st.lists(TEXT | st.sampled_from(TRICKY), min_size=2, max_size=6),
    data=st.data(),
)
def test_any_text_keeps_its_answer(
    toy: ToyData, tokenizer: Tokenizer, question: str, options: list[str], data: st.DataObject
) -> None:
    """Whatever a question contains, its targets decode to the letter; options share the prompt."""
    answer = data.draw(st.integers(0, len(options) - 1))
    made = make_question(question, options, answer)
    built, other = (prompts(tokenizer).vqa(made, a) for a in (answer, 0))
    targets = [built.tokens[t] for t in built.targets]
    assert tokenizer.decode(targets[:-1]).strip() == f"({'ABCDEF'[answer]})"
    assert targets[-1] == tokenizer.eos == built.tokens[-1]
    assert built.tokens.count(VIDEO_SLOT) == 10
    assert set(built.tokens[built.video_start :][:10]) == {VIDEO_SLOT}
    assert other.tokens[: other.targets.start] == built.tokens[: built.targets.start]


@pytest.mark.parametrize("limit", [100, 115, 130, 170])
def test_fit(toy: ToyData, tokenizer: Tokenizer, limit: int) -> None:
    """The dialogue is shortened, then the options; never the answer."""
    item = replace(toy.items("train")[0], dataset="tvqa", dialogue=" word" * 60)
    question, built = question_of(item), prompts(tokenizer, True, seq=limit)
    try:
        fitted = built.fit(question, "vqa")
    except UserError as error:
        assert str(error).startswith("train.csv:2: the question alone is") and limit == 100
        return
    assert fitted.question == question.question and len(fitted.options) == 5
    assert fitted.dialogue == "" or fitted.options == question.options, (
        "options are touched only when no dialogue is left"
    )
    lengths = {len(built.vqa(fitted, a).tokens) for a in range(5)}
    assert max(lengths) <= limit
    assert question.dialogue.startswith(fitted.dialogue)
    for whole, shortened in zip(question.options, fitted.options, strict=True):
        assert whole.startswith(shortened)


def test_what_fits_is_left_alone(toy: ToyData, tokenizer: Tokenizer) -> None:
    question = question_of(toy.items("train")[0])
    exact = len(prompts(tokenizer).vqa(question, 0).tokens)
    assert prompts(tokenizer, seq=exact).fit(question, "vqa") is question
    assert prompts(tokenizer, seq=exact - 1).fit(question, "vqa") is not question


def test_caption_limit_without_targets(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="--max_cap_len 20: leaves no caption token"):
        prompts(tokenizer, cap=20).caption("A man runs. He jumps.")


def test_crop_starts_at_sentences() -> None:
    caption = "One. Two. Three. Four."
    crops = [caption[start:] for start in crop_candidates(caption)]
    assert crops == [caption, "Two. Three. Four.", "Three. Four."]
    assert crop_candidates("no dots") == [0] and crop_candidates("One. Two.") == [0]


def test_free_questions_up_to_the_limit(tokenizer: Tokenizer) -> None:
    question = make_question("why", ("a", "b"), 0)
    length = prompts(tokenizer).free_question(question).num_inputs
    assert prompts(tokenizer, seq=length).free_question(question).num_inputs == length
    with pytest.raises(UserError, match=f"is 2 tokens above --max_seq_len {length - 2};"):
        prompts(tokenizer, seq=length - 2).free_question(question)
