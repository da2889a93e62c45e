"""What is kept of a question that is too long: the most that fits, found by trying everything."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.backbones import make_llama_3_tokenizers
from support.letters import Letters
from support.toy_dataset import WORDS, ToyData
from vico.data import length_stats
from vico.data.length_stats import Cuts, Lengths, QuestionLengths
from vico.data.prompts import Prompts
from vico.data.shortening import _cut, shorten
from vico.data.tokenizer import Tokenizer
from vico.data.types import Question
from vico.errors import UserError
from vico.train.config import RunConfig
from vico.train.input_notes import problem_notes

LIMIT = 120
# Runs of blanks are one piece or several, "😀" is four pieces, "犬." joins with a newline.
WORD = st.sampled_from([*WORDS[:12], "", "", "a", "Mr.", "house!?", "😀", "犬.", "don't", "x" * 20])
TEXT = st.lists(WORD, min_size=1, max_size=12).map(" ".join)
EXAMPLES = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def tokenizers(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    make_llama_3_tokenizers(folder / "meta", folder / "hf")
    files = (toy.llama / "tokenizer.model", folder / "meta", folder / "hf")
    return [Tokenizer(path) for path in files]


@pytest.fixture(scope="module")
def sentencepiece(tokenizers: list[Tokenizer]) -> Tokenizer:
    return tokenizers[0]


PLACE = "train.jsonl:1"


def make(options: tuple[str, ...], dialogue: str = "", answer: int | None = 0) -> Question:
    return Question(0, "0", "v", "X", "Why?", options, answer, None, dialogue, place=PLACE)


def prompts(tokenizer: Tokenizer, limit: int = 10**6) -> Prompts:
    return Prompts(tokenizer, 10, limit, 400, dialogue=True)


def count(tokenizer: Tokenizer, question: Question, task: str = "vqa") -> int:
    """Tokens of the longest sequence over the answers."""
    answers = range(len(question.options))
    built = prompts(tokenizer)
    return max(len(built.question_sequence(task, question, a).tokens) for a in answers)


def beginnings(text: str) -> list[str]:
    """All that a dialogue can become, longest first."""
    ends = [i for i in range(len(text), -1, -1) if i == len(text) or text[i] == " "]
    return [text[:end] for end in ends if end == len(text) or text[:end].strip()] + [""]


def without_last_word(text: str) -> str:
    """An option with a word less; the last word that is left loses one character."""
    shorter = [text[:end] for end in range(len(text)) if text[end] == " " and text[:end].strip()]
    return shorter[-1] if shorter else text[:-1]


@EXAMPLES
@given(dialogue=TEXT, kept=st.floats(0, 1.2), task=st.sampled_from(["vqa", "vaq", "qav"]))
def test_the_longest_dialogue_that_fits_is_kept(
    tokenizers: list[Tokenizer], dialogue: str, kept: float, task: str
) -> None:
    for tokenizer in tokenizers:
        question = make(("yes", "no", "a dog"), dialogue)
        without = count(tokenizer, replace(question, dialogue=""), task)
        limit = without + round(kept * (count(tokenizer, question, task) - without))
        for text in beginnings(dialogue):
            expected = replace(question, dialogue=text)
            if text == "" or count(tokenizer, expected, task) <= limit:
                break
        assert prompts(tokenizer, limit).fit(question, task) == expected


@EXAMPLES
@given(options=st.lists(TEXT, min_size=2, max_size=5).map(tuple), kept=st.floats(0, 1))
def test_the_longest_options_that_fit_are_kept(
    tokenizers: list[Tokenizer], options: tuple[str, ...], kept: float
) -> None:
    """All of the dialogue goes first; then the longest option loses a word, again and again."""
    for tokenizer in tokenizers:
        question = make(options)
        empty = count(tokenizer, make(("",) * len(options)))
        limit = empty + int(kept * (count(tokenizer, question) - empty))
        expected = list(options)
        while count(tokenizer, make(tuple(expected))) > limit and any(expected):
            place = expected.index(max(expected, key=len))
            expected[place] = without_last_word(expected[place])
        with_dialogue = replace(question, dialogue=" some words")
        assert prompts(tokenizer, limit).fit(with_dialogue, "vqa") == make(tuple(expected))


def test_words_end_at_blanks() -> None:
    """A first word is kept whole, or begun where that is allowed."""
    text = "one two  three"
    kept = {0: "", 2: "", 3: "one", 6: "one", 7: "one two", 8: "one two ", 13: "one two ", 14: text}
    for most, expected in kept.items():
        assert _cut(text, most, cut_first_word=False) == expected, most
        begun = text[:most] if most < 3 else expected
        assert _cut(text, most, cut_first_word=True) == begun, most
    long = "a " + "x" * 1000
    assert _cut(long, 900, cut_first_word=False) == long[:900], "no word that anyone wrote"


def test_much_is_kept(sentencepiece: Tokenizer) -> None:
    """Of long texts, so much that one word more does not fit: in each option, and never nothing."""
    words = " ".join(WORDS * 20)
    spoken = make(("yes", "no"), f" {words}")
    fitted = prompts(sentencepiece, LIMIT).fit(spoken, "vqa")
    num_kept = len(fitted.dialogue.split())
    assert num_kept > 10 and fitted.options == spoken.options
    assert fitted.dialogue == " " + " ".join((WORDS * 20)[:num_kept])
    more = replace(spoken, dialogue=" " + " ".join((WORDS * 20)[: num_kept + 1]))
    assert count(sentencepiece, fitted) <= LIMIT < count(sentencepiece, more)

    written = make((words, words[5:], "no"))
    fitted = prompts(sentencepiece, LIMIT).fit(written, "vqa")
    assert [len(option.split()) > 5 for option in fitted.options] == [True, True, False]
    assert fitted.options[2] == "no" and LIMIT - 8 < count(sentencepiece, fitted) <= LIMIT

    no_blanks = make(("x" * 5000, "no"), "y" * 5000)
    fitted = prompts(sentencepiece, LIMIT).fit(no_blanks, "vqa")
    assert fitted.dialogue == "" and set(fitted.options[0]) == {"x"}
    assert LIMIT - 2 < count(sentencepiece, fitted) <= LIMIT
    fitted = prompts(sentencepiece, LIMIT).fit(make(("yes", "no"), "y" * 5000), "vqa")
    assert LIMIT - 2 < count(sentencepiece, fitted) <= LIMIT and fitted.dialogue


def test_the_time_does_not_grow_with_the_text(
    toy: ToyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts a thousand times as long cost as many encodings, of as many characters."""
    tokenizer = Tokenizer(toy.llama / "tokenizer.model")
    encoded: list[int] = []
    encode, encode_with_ends = tokenizer.encode, tokenizer.encode_with_ends

    def counted_encode(text: str) -> list[int]:
        encoded.append(len(text))
        return encode(text)

    def counted_encode_with_ends(text: str) -> tuple[list[int], list[int]]:
        encoded.append(len(text))
        return encode_with_ends(text)

    monkeypatch.setattr(tokenizer, "encode", counted_encode)
    monkeypatch.setattr(tokenizer, "encode_with_ends", counted_encode_with_ends)

    def cost(times: int) -> tuple[int, int]:
        words = " ".join(WORDS * 4 * times)
        built = prompts(tokenizer, 512)
        encoded.clear()
        built.fit(make((words,) * 5, f" {words}"), "vqa")
        built.fit(make((words, "no")), "vqa")
        built.fit(make(("yes", "no"), f" {words}"), "vqa")
        return len(encoded), sum(encoded)

    num_encodings, num_characters = cost(1000)
    assert num_encodings <= 60 and num_characters <= 500_000
    assert num_characters <= 2 * cost(50)[1]


def test_what_is_cut_is_counted(sentencepiece: Tokenizer) -> None:
    word = "dog " * 200
    spoken, written, short = make(("a", "b"), word), make((word, "b"), "cat"), make(("a", "b"))
    built = prompts(sentencepiece, LIMIT)
    measured = length_stats.of_questions([spoken, written, short], built, ["vqa", "cap"], LIMIT)
    kept_dialogue = len(built.fit(spoken, "vqa").dialogue)
    kept_options = len(built.fit(written, "vqa").options[0])
    assert 50 < kept_dialogue < 800 and 50 < kept_options < 800
    assert measured.cuts == Cuts(803, 803 - kept_dialogue, 1, 803, 800 - kept_options, 1)
    assert measured.lengths.above(LIMIT) == 2 and measured.num_measured == 3
    text = measured.cuts.describe()
    dialogue, options = text.split(" and ")
    cut = 803 - kept_dialogue
    share = f"{100 * cut / 803:.1f} % ({cut} of 803 characters) of their dialogue"
    assert dialogue == f"{share} (all of it in 1)"
    cut = 800 - kept_options
    share = f"{100 * cut / 803:.1f} % ({cut} of 803 characters) of their options"
    assert options == f"{share} (in 1)"


def test_lengths_are_described() -> None:
    lengths = Lengths({33: 1, 64: 2, 65: 1, 200: 1})
    expected = "85 tokens on average, 200 at most (33-64: 3, 65-96: 1, 193-224: 1)"
    assert lengths.describe() == expected
    assert (lengths.above(64), lengths.tokens_above(64)) == (2, 1 + 136)
    assert (lengths.num_sequences, lengths.num_tokens) == (5, 426)


def test_measuring_goes_on_where_it_was_ended(sentencepiece: Tokenizer) -> None:
    """Each thousand questions is reported, as JSON can hold it, and need not be measured again."""
    built = prompts(sentencepiece, LIMIT)
    questions = [make((f"{i}", "b"), " dog cat" * (i % 50)) for i in range(2500)]
    parts: list[dict[str, object]] = []
    whole = length_stats.of_questions(
        questions, built, ["vqa"], LIMIT, progress=lambda part: parts.append(part.to_json())
    )
    assert [part["num_measured"] for part in parts] == [1000, 2000, 2500]
    assert whole.cuts.cut_dialogue > 0 and parts[-1] == whole.to_json()
    rest: list[int] = []
    known = QuestionLengths.from_json(parts[1])
    resumed = length_stats.of_questions(
        questions, built, ["vqa"], LIMIT, known, lambda part: rest.append(part.num_measured)
    )
    assert resumed.to_json() == whole.to_json() and rest == [2500]


def test_a_question_that_cannot_fit(sentencepiece: Tokenizer) -> None:
    question = make(("yes", "no"), " dog" * 9)
    empty = count(sentencepiece, make(("", "")))
    fitted = prompts(sentencepiece, empty).fit(question, "vqa")
    assert fitted == make(("", ""))
    with pytest.raises(UserError, match=rf"^{PLACE}: the question alone is 3 tokens above"):
        prompts(sentencepiece, empty - 3).fit(question, "vqa")


def test_notes_count_questions() -> None:
    """Of each kind that there is."""
    config = RunConfig(max_seq_len=200)
    options = (("a", " "), ("", " "), ("a", "b"), ("b", "b"))
    questions = [make(texts) for texts in options]
    measured = QuestionLengths(4, Lengths({100: 3, 200: 1}), Cuts())
    assert problem_notes(config, "val", questions[2:3], 0, measured) == []
    measured = QuestionLengths(4, Lengths({100: 2, 201: 1, 300: 1}), Cuts(10, 5, 1))
    assert problem_notes(config, "val", questions, 3, measured) == [
        "val: 2 of 4 questions shortened to fit --max_seq_len 200 (dialogue first, then options; "
        "answers never): they lose 50.0 % (5 of 10 characters) of their dialogue (all of it in 1)",
        "val: 3 of 4 questions about a clip that lies past the end of its video's features: "
        "zeros in its slots",
        "warning: val: 1 of 4 questions with two equal options",
        "warning: val: 2 of 4 questions with an empty option",
    ]


# ---- what it costs, where a letter is a token


def shortened(
    texts: tuple[str, ...], budget: int, others: int = 0, blank: int = 1
) -> tuple[tuple[str, ...] | None, list[int], list[int]]:
    """(what is kept, lengths of the texts that are encoded, and what is counted)."""
    tokenizer, counted = Letters({" ": blank}), list[int]()

    def count(parts: tuple[str, ...]) -> int:
        joined = "".join(parts)
        counted.append(others + len(joined) + (blank - 1) * joined.count(" "))
        return counted[-1]

    labels = ["L: "] * len(texts)
    kept = shorten(texts, labels, budget, tokenizer.encode_with_ends, count, cut_first_word=False)
    return kept, [len(text) for text in tokenizer.encoded], counted


def test_a_text_is_encoded_once_and_counted_near_its_end() -> None:
    """8 letters for a token are looked at; counted from 4 above the budget, and 1 for each text."""
    text = "a " * 1000
    assert shortened((text,), 50) == ((text[:49],), [3 + 399], [399, 55, 53, 51, 49])
    kept, encoded, counted = shortened((text, text), 50)
    assert kept == (text[:25], text[:25]) and encoded == [2 * (3 + 399)]
    assert counted == [2 * 399, 56, 54, 52, 50]
    assert shortened((text,), 0)[:2] == (("",), [3 + 7]), "as for a budget of 1"


def test_more_is_looked_at_where_tokens_are_few() -> None:
    """Twice as much, until it is enough: blanks here are no tokens."""
    text = ("a" + " " * 9) * 400
    kept, encoded, counted = shortened((text,), 50, blank=0)
    assert kept == (text[:499],) and encoded == [3 + 399, 3 + 799] and counted[:2] == [40, 80]


def test_what_needs_no_cut_is_whole() -> None:
    """An empty text has nothing to lose; at last all are empty."""
    assert shortened(("a b c", ""), 5)[0] == ("a b c", "")
    assert shortened(("", "a b c"), 4)[0] == ("", "a b")
    assert shortened(("a b", "c"), 1, others=1)[0] == ("", "")
    assert shortened(("a b", "c"), 0, others=1)[0] is None
