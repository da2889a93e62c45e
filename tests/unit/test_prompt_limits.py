"""Prompts letter by letter: what is remembered, measured, cut, and where a target begins."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.errors import refusal
from support.letters import BEGIN, END, Letters, ask, prompts_of, read
from vico.data import length_stats, shortening
from vico.data.length_stats import Cuts, Lengths, QuestionLengths
from vico.data.prompts import letter, option_text, question_text
from vico.data.types import TokenSequence

HEAD = f"{BEGIN}Instruction: describe the what happens in the video.\nVideo:##\nDescription:"


def split(sequence: TokenSequence) -> tuple[str, str]:
    """What the model is given, and what it learns."""
    assert sequence.targets.stop == len(sequence.tokens)
    first = sequence.targets.start
    return read(sequence.tokens[:first]), read(sequence.tokens[first:])


# ---- sequences ----------------------------------------------------------------------------------


def test_the_tasks_of_a_question_letter_by_letter() -> None:
    question = ask(0, "who runs ", ("a man", "a dog"), dialogue=" hi")
    prompts = prompts_of(Letters(), dialogue=True)
    based = "on the dialogue, video and question.\nVideo:##\nDialogue:  hi\n"
    choices = "Choices: \n(A) a man\n(B) a dog\n"
    assert split(prompts.vqa(question, 1)) == (
        f"{BEGIN}Instruction: Predict the answer based {based}Question: Who runs?\n{choices}"
        "Answer: The answer is",
        f" (B){END}",
    )
    assert split(prompts.vaq(question, 0)) == (
        f"{BEGIN}Instruction: Predict the question based on the dialogue, video and answer.\n"
        f"Video:##\nDialogue:  hi\n{choices}Answer: The answer is (A)\nQuestion:",
        f" Who runs?{END}",
    )
    qav = prompts.qav(question, 1)
    assert read(qav.tokens) == (
        f"{BEGIN}Instruction: Predict the video based on the dialogue, question and answer.\n"
        f"Dialogue:  hi\nQuestion: Who runs?\n{choices}Answer: The answer is (B)\nVideo:##{END}"
    )
    start = qav.video_start
    assert read(qav.tokens[start : start + 2]) == "##" and qav.targets == range(start, start + 2)
    assert qav.predicts_frames and not prompts.vqa(question, 1).predicts_frames
    bare = replace(question, dialogue="")
    assert read(prompts.qav(bare, 1).tokens) == read(qav.tokens).replace("Dialogue:  hi\n", "")


def test_texts_of_a_question() -> None:
    """Its first letter large, the others small; one question mark."""
    assert question_text(ask(0, " is IT?  ")) == "Question: is it?\n"
    assert question_text(ask(0, "Why NOT")) == "Question: Why not?\n"
    assert option_text(ask(0, options=())) == "Choices: \n"
    assert (letter(0), letter(25)) == ("(A)", "(Z)")


def test_without_a_video() -> None:
    """The same prompts, which still have their slots."""
    prompts = prompts_of(Letters())
    bare = prompts.without_video().vqa(ask(0), 1)
    assert read(bare.tokens) == read(prompts.vqa(ask(0), 1).tokens).replace("##", "")


def test_free_questions() -> None:
    given, learned = split(prompts_of(Letters()).free_question(ask(0, "why")))
    assert given.endswith("Video:##\nQuestion: Why?\nAnswer:") and learned == END
    question = replace(ask(0, "why"), place="x.csv:2")
    prompts = prompts_of(Letters(), seq=len(given) - 3)
    assert refusal(prompts.free_question, question) == (
        f"x.csv:2: the question is 3 tokens above --max_seq_len {len(given) - 3}; shorten it, or "
        "raise the limit"
    )


# ---- captions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "context", "learned"),
    [("", " \n" + END, ""), ("a", " a\n", END), ("ab", " ab", "\n" + END), ("abc", " ab", "c\n$")],
)
def test_three_tokens_of_a_caption_are_context(caption: str, context: str, learned: str) -> None:
    assert split(prompts_of(Letters()).caption(caption)) == (HEAD + context, learned)
    assert prompts_of(Letters()).caption_length(caption) == len(HEAD + context + learned)


def test_a_caption_is_cut_at_its_limit() -> None:
    """One target is left at the least, if it is not whole."""
    size = len(HEAD)
    for limit, learned in ((4, "c"), (5, "cd"), (6, "cd\n"), (7, f"cd\n{END}"), (8, f"cd\n{END}")):
        sequence = prompts_of(Letters(), cap=size + limit).caption("abcd")
        assert split(sequence) == (f"{HEAD} ab", learned)
    for limit in (3, 2):
        said = refusal(prompts_of(Letters(), cap=size + limit).caption, "abcd")
        assert said == (
            f"--max_cap_len {size + limit}: leaves no caption token to learn; {size + 4} is the "
            "least"
        )
    # A whole caption without targets needs no more.
    assert split(prompts_of(Letters(), cap=size + 3).caption("")) == (f"{HEAD} \n{END}", "")


@pytest.mark.parametrize(
    ("caption", "opening"), [("", ""), ("a", ""), ("ab", ""), ("abc", " ab"), ("abcd", " ab")]
)
def test_the_opening_of_a_caption(caption: str, opening: str) -> None:
    """What training gives as context, if a caption goes on behind it."""
    prompts = prompts_of(Letters())
    found = prompts.caption_opening(caption)
    assert read(found) == opening
    start = prompts.caption_prompt(found)
    assert split(start) == (HEAD + opening, END)
    assert start.num_inputs == len(HEAD + opening) and start.video_start == HEAD.index("#")


# ---- what is remembered -------------------------------------------------------------------------


def num_encoded(tokenizer: Letters, call: Any, *arguments: Any) -> int:
    """How many texts `call` encodes."""
    tokenizer.encoded.clear()
    call(*arguments)
    return len(tokenizer.encoded)


def test_16_texts_are_remembered() -> None:
    """And as many dialogues; then all are forgotten, so that memory stays small."""
    tokenizer = Letters()
    prompts = prompts_of(tokenizer)
    captions = [f"c{i}" for i in range(17)]
    numbers = [num_encoded(tokenizer, prompts.caption, text) for text in captions[:16]]
    assert numbers == [2, *[1] * 15], "the instruction is encoded once"
    assert {num_encoded(tokenizer, prompts.caption, text) for text in captions[:16]} == {0}
    again = [num_encoded(tokenizer, prompts.caption, captions[i]) for i in (16, 16, 0, 16)]
    assert again == [1, 0, 1, 0]

    dialogues = [ask(0, dialogue=f" d{i}") for i in range(17)]
    numbers = [num_encoded(tokenizer, prompts.vqa, q, 1) for q in dialogues[:16]]
    assert numbers == [3, *[1] * 15]
    again = [num_encoded(tokenizer, prompts.vqa, dialogues[i], 1) for i in (0, 15, 16, 0, 16)]
    assert again == [0, 0, 1, 1, 0]


# ---- lengths ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "expected"), [(8, 0), (7, 8), (0, 8)])
def test_all_answers_are_measured_near_the_limit(room: int, expected: int) -> None:
    """Far below it the right answer alone: its letter has up to 8 tokens less than another."""
    question = ask(0, options=("x", "y"))
    tokenizer = Letters({"A": 9})  # in "(A)" of the choices, and of the answer
    right = len(prompts_of(tokenizer).vqa(question, 1).tokens)
    prompts = prompts_of(tokenizer, seq=right + room)
    assert prompts.length(question, "vqa") == right + expected
    assert prompts_of(tokenizer, seq=right).length(replace(question, answer=0), "vqa") == right + 8
    unknown = replace(question, answer=None)
    assert prompts_of(tokenizer).length(unknown, "vqa") == right + 8, "of the first"


def test_equal_letters_are_measured_once() -> None:
    """For each task and number of options."""
    tokenizer, questions = Letters(), [ask(0, options=("x",) * n) for n in (2, 3, 3)]
    prompts = prompts_of(tokenizer, seq=1)
    numbers = [num_encoded(tokenizer, prompts.length, q, "vqa") for q in questions]
    # The instruction; the question; one without words and each of its answers.
    assert numbers == [1 + 1 + 2, 1 + 3, 0]


def test_texts_of_16_letters_a_token_are_clipped() -> None:
    """Before they are measured; no others."""
    prompts = prompts_of(Letters(), seq=5)
    whole = ask(0, options=("o" * 80, ""), dialogue="d" * 80)
    assert prompts._clipped(whole) is whole
    for longer in (replace(whole, dialogue="d" * 81), replace(whole, options=("", "o" * 81))):
        clipped = prompts._clipped(longer)
        assert clipped is not longer and len(clipped.dialogue) == 80
        assert max(map(len, clipped.options)) == 80


def beginnings(text: str) -> list[str]:
    """Of whole words, the longest first; at last nothing."""
    ends = [i for i in range(len(text), 0, -1) if i == len(text) or text[i] == " "]
    return [text[:end] for end in ends if text[:end].strip()] + [""]


WORDS = st.lists(st.sampled_from(["a", "be", "see", "word", "sentence"]), min_size=1, max_size=8)


@settings(max_examples=40)
@given(words=WORDS, cut=st.integers(0, 60))
def test_the_most_that_fits_is_kept(words: list[str], cut: int) -> None:
    """Of a dialogue, where each letter is a token; then all of it goes."""
    question = ask(0, options=("x", "y"), dialogue=" " + " ".join(words))
    whole = len(prompts_of(Letters()).vqa(question, 1).tokens)
    without = len(prompts_of(Letters()).vqa(replace(question, dialogue=""), 1).tokens)
    limit = max(whole - cut, without)
    kept = next(
        text
        for text in beginnings(question.dialogue)
        if text == "" or whole - len(question.dialogue) + len(text) <= limit
    )
    fitted = prompts_of(Letters(), seq=limit).fit(question, "vqa")
    assert fitted == replace(question, dialogue=kept)
    assert (fitted is question) == (limit >= whole)


@pytest.mark.parametrize("word", ["w" * 40, "w" * 41])
def test_words_of_more_than_40_letters_are_divided(word: str) -> None:
    """No person wrote them."""
    is_whole = len(word) == 40
    for text in (f"a {word}", f"a {word} b"):
        assert shortening._cut(text, 10, False) == ("a" if is_whole else text[:10])
    assert shortening._cut(word, 10, False) == ("" if is_whole else word[:10])
    assert shortening._cut(word, 10, True) == word[:10]


# ---- lengths of a split -------------------------------------------------------------------------


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.integers(1, 300))
def test_lengths_are_counted(lengths: list[int], limit: int) -> None:
    """In buckets of 32 tokens: 1 to 32, 33 to 64, ..."""
    counted = Lengths.of(lengths)
    assert list(counted.counts) == sorted(set(lengths))
    assert (counted.num_sequences, counted.num_tokens) == (len(lengths), sum(lengths))
    assert counted.above(limit) == sum(n > limit for n in lengths)
    assert counted.tokens_above(limit) == sum(max(0, n - limit) for n in lengths)
    assert Lengths.from_json(counted.to_json()) == counted
    parts = []
    for first in range(1, 301, 32):
        inside = sum(first <= n < first + 32 for n in lengths)
        parts += [f"{first}-{first + 31}: {inside}"] if inside else []
    mean = f"{sum(lengths) / len(lengths):.0f} tokens on average, {max(lengths)} at most"
    assert counted.describe() == f"{mean} ({', '.join(parts)})"


def test_a_dialogue_that_is_lost_is_counted_once() -> None:
    """Only if there was one."""
    cuts, mute = Cuts(), ask(0, options=("abc", "d"))
    spoken = replace(mute, dialogue=" hi")
    cuts.add(mute, [mute])
    assert cuts == Cuts(options=4)
    cuts.add(spoken, [spoken, replace(spoken, dialogue="")])
    cuts.add(spoken, [replace(spoken, dialogue=" h"), spoken])
    assert cuts == Cuts(6, 4, 1, 12, 0, 0)
    assert cuts.describe() == "66.7 % (4 of 6 characters) of their dialogue (all of it in 1)"


def test_measuring_begins_behind_what_is_known() -> None:
    """Without captions, whose length says nothing of a question; no report is needed."""
    questions = [ask(i, question="w" * i) for i in range(1, 5)]
    prompts = prompts_of(Letters())
    sizes = [len(prompts.vqa(q, 1).tokens) for q in questions]
    known = QuestionLengths(3, Lengths({5: 3}), Cuts(dialogue=9))
    measured = length_stats.of_questions(questions, prompts, ("vqa", "cap"), 10**6, known)
    assert measured == QuestionLengths(4, Lengths({5: 3, sizes[3]: 1}), Cuts(dialogue=9))
    whole = length_stats.of_questions(questions, prompts, ("vqa",), sizes[3])
    assert whole == QuestionLengths(4, Lengths(dict.fromkeys(sizes, 1)), Cuts())
    assert length_stats.of_questions([], prompts, ("vqa",), 9) == QuestionLengths(
        0, Lengths({}), Cuts()
    )
    assert length_stats.of_captions(["a", "bc"], prompts).counts == {
        len(HEAD) + 4: 1,
        len(HEAD) + 5: 1,
    }
