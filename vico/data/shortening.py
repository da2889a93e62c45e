"""The longest beginnings of some texts whose tokens fit a budget.

A text ends where a word ends. The longest text is always the one that loses its next word. One
encoding with the character at which each piece ends says about where the result lies; around it,
texts are counted until one fits. The time depends on the budget, not on how long the texts are.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence

# Texts can have this many tokens less than pieces within longer ones, and one more for each text,
# because pieces may join across an end.
MAX_JOINED_TOKENS = 4
# Of a longer word, such as a text that is written without blanks, the beginning is kept.
MAX_WORD_CHARACTERS = 40
CHARACTERS_PER_TOKEN = 8  # of the first guess at how much of the texts is needed

Texts = tuple[str, ...]


def shorten(
    texts: Texts,
    labels: Sequence[str],
    budget: int,
    encode_with_ends: Callable[[str], tuple[Sequence[int], Sequence[int]]],
    count: Callable[[Texts], int],
    cut_first_word: bool,
) -> Texts | None:
    """The longest `texts` of which `count` is at most `budget`; None if not even empty ones fit.

    Their pieces are estimated from one encoding of each label followed by its text.
    `cut_first_word`: a text loses its first word character by character, not at once.
    """
    most = max(budget, 1) * CHARACTERS_PER_TOKEN
    most_estimated = budget + MAX_JOINED_TOKENS + len(texts)
    while True:
        known = _cut_all(texts, most, cut_first_word)
        estimate = _Estimate(known, labels, encode_with_ends, count(known), cut_first_word)
        # Doubled only for texts of few tokens, such as blanks.
        if known == texts or estimate.tokens(most) > most_estimated:
            break
        most *= 2
    # The least length of the longest text with which they cannot fit.
    lengths = range(max(map(len, known)) + 1)
    stop = bisect_right(lengths, most_estimated, key=estimate.tokens)
    shortened = _cut_all(known, stop, cut_first_word)
    while any(shortened):
        if estimate.of(shortened) <= most_estimated and count(shortened) <= budget:
            return shortened
        shortened = _without_last_word(shortened, known, cut_first_word)
    return shortened if count(shortened) <= budget else None


class _Estimate:
    """About how many tokens beginnings of the texts have."""

    def __init__(
        self,
        texts: Texts,
        labels: Sequence[str],
        encode_with_ends: Callable[[str], tuple[Sequence[int], Sequence[int]]],
        num_tokens: int,
        cut_first_word: bool,
    ) -> None:
        self._texts, self._cut_first_word = texts, cut_first_word
        # Where each label begins and ends. Its pieces are counted with those of its text, because
        # they may join, and a character's bytes are pieces that end before it.
        self._labels = []
        joined = ""
        for label, text in zip(labels, texts, strict=True):
            self._labels.append((len(joined), len(joined) + len(label)))
            joined += label + text
        _, self._ends = encode_with_ends(joined)
        self._others = num_tokens - self._pieces(texts)

    def tokens(self, most: int) -> int:
        """Of texts cut to `most` characters each."""
        return self.of(_cut_all(self._texts, most, self._cut_first_word))

    def of(self, texts: Texts) -> int:
        return self._others + self._pieces(texts)

    def _pieces(self, texts: Texts) -> int:
        num_pieces = 0
        for (start, stop), text in zip(self._labels, texts, strict=True):
            num_pieces += bisect_right(self._ends, stop + len(text))
            num_pieces -= bisect_right(self._ends, start)
        return num_pieces


def _cut_all(texts: Texts, most: int, cut_first_word: bool) -> Texts:
    return tuple(_cut(text, most, cut_first_word) for text in texts)


def _without_last_word(shortened: Texts, whole: Texts, cut_first_word: bool) -> Texts:
    """The beginnings of `whole` with one word less in the longest, which is the first of several.

    Cut from the whole text, because a long word that is cut already may look like a short one.
    """
    longest = max(shortened, key=len)
    place = shortened.index(longest)
    shorter = _cut(whole[place], len(longest) - 1, cut_first_word)
    return (*shortened[:place], shorter, *shortened[place + 1 :])


def _cut(text: str, most: int, cut_first_word: bool) -> str:
    """The longest beginning of whole words with at most `most` characters."""
    if len(text) <= most:
        return text
    blank = text.rfind(" ", 0, most + 1)  # words end at blanks; -1: within the first word
    next_blank = text.find(" ", most, most + MAX_WORD_CHARACTERS + 1)
    word_stop = most + MAX_WORD_CHARACTERS + 1 if next_blank < 0 else next_blank
    word_stop = min(word_stop, len(text))
    in_first_word = not text[: max(blank, 0)].strip()
    if word_stop - blank - 1 > MAX_WORD_CHARACTERS or (in_first_word and cut_first_word):
        return text[:most]
    return "" if in_first_word else text[:blank]
