"""From a question or a caption to the tokens and targets of a task (METHOD section 2).

The tokenizer gives the character before which each piece ends. A piece is a target when it ends
after the character at which the target text begins. No token id is ever searched for, so an option
may contain "Answer:".
"""

import copy
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from vico.data.shortening import MAX_JOINED_TOKENS, shorten
from vico.data.tokenizer import Tokenizer
from vico.data.types import VIDEO_SLOT, Question, TokenSequence
from vico.errors import UserError

CAPTION_CONTEXT = 3  # caption tokens that are context, not targets
# "(A)" and "(E)" differ by fewer tokens. Spares encoding every answer of a short question.
LETTER_SPREAD = 8
# Encoded texts that are remembered: those of a question with all its answers.
MAX_REMEMBERED = 16
# A text of more characters per token of the limit is measured by its beginning first.
MAX_CHARACTERS_PER_TOKEN = 16
CAPTION_INSTRUCTION = "Instruction: describe the what happens in the video.\n"  # as published
ANSWER_TEXT = "Answer: The answer is "
# Of a question without options. After ANSWER_TEXT a trained model has only learned letters.
FREE_ANSWER_TEXT = "Answer:"


def question_text(question: Question) -> str:
    text = question.question.capitalize().strip()
    mark = "" if text.endswith("?") else "?"
    return f"Question: {text}{mark}\n"


def option_text(question: Question) -> str:
    lines = [f"{letter(i)} {option}\n" for i, option in enumerate(question.options)]
    return "Choices: \n" + "".join(lines)


def letter(option: int) -> str:
    return f"({chr(ord('A') + option)})"


class Prompts:
    """Builds sequences for one tokenizer, number of video slots and pair of length limits.

    `dialogue` chooses TVQA's instructions: "based on the dialogue, ...", with or without subtitles.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_slots: int,
        max_seq_len: int,
        max_cap_len: int,
        dialogue: bool,
    ) -> None:
        self._tokenizer, self._slots = tokenizer, [VIDEO_SLOT] * num_slots
        self._max_seq_len, self._max_cap_len = max_seq_len, max_cap_len
        self._given = "dialogue, " if dialogue else ""
        self._vqa_instruction = (
            f"Instruction: Predict the answer based on the {self._given}video and question.\n"
        )
        self._heads: dict[str, list[int]] = {}
        self._dialogues: dict[str, list[int]] = {}
        self._texts: dict[str, tuple[list[int], list[int]]] = {}
        self._have_equal_letters: dict[tuple[str, int], bool] = {}

    def without_video(self) -> "Prompts":
        """The same prompts with no video slot: what a question's text alone tells."""
        prompts = copy.copy(self)
        prompts._slots = []
        return prompts

    # The tasks of a question. Each method is a task: `question_sequence` lists them by name.

    def vqa(self, question: Question, answer: int) -> TokenSequence:
        """Targets: the pieces of the answer's letter and EOS.

        The blank before the letter belongs to the letter's first piece.
        """
        prompt = question_text(question) + option_text(question) + ANSWER_TEXT
        return self._after_video(
            "vqa",
            self._vqa_instruction,
            prompt + letter(answer),
            target_start=len(prompt.rstrip()),
            dialogue=question.dialogue,
        )

    def vaq(self, question: Question, answer: int) -> TokenSequence:
        """Targets: what follows "Question:", and EOS."""
        instruction = (
            f"Instruction: Predict the question based on the {self._given}video and answer.\n"
        )
        prompt = option_text(question) + ANSWER_TEXT + letter(answer) + "\n"
        return self._after_video(
            "vaq",
            instruction,
            prompt + question_text(question).strip(),
            target_start=len(prompt) + len("Question:"),
            dialogue=question.dialogue,
        )

    def qav(self, question: Question, answer: int) -> TokenSequence:
        """Targets: the video slots, which come last."""
        instruction = (
            f"Instruction: Predict the video based on the {self._given}question and answer.\n"
        )
        prompt = question_text(question) + option_text(question) + ANSWER_TEXT + letter(answer)
        text = prompt + "\nVideo:"
        encode = self._tokenizer.encode
        if question.dialogue:
            head = encode(instruction) + self._dialogue(question.dialogue) + encode(text)
        else:
            head = encode(instruction + text)
        start = 1 + len(head)
        tokens = [self._tokenizer.bos, *head, *self._slots, self._tokenizer.eos]
        return TokenSequence("qav", tuple(tokens), range(start, start + len(self._slots)), start)

    def question_sequence(self, task: str, question: Question, answer: int) -> TokenSequence:
        """The sequence of a task with this answer, of any length (see `fit`)."""
        tasks = {"vqa": self.vqa, "vaq": self.vaq, "qav": self.qav}
        return tasks[task](question, answer)

    def caption(self, text: str) -> TokenSequence:
        """Targets: everything from the 4th caption token on.

        A caption that is too long is cut and loses its EOS.
        """
        whole = self._whole_caption(text)
        stop = min(whole.targets.stop, self._max_cap_len)
        # A caption of two words has no target.
        first = min(whole.targets.start + CAPTION_CONTEXT, whole.targets.stop)
        if first >= stop and stop < whole.targets.stop:
            raise UserError(
                f"--max_cap_len {self._max_cap_len}: leaves no caption token to learn; "
                f"{first + 1} is the least"
            )
        return TokenSequence("cap", whole.tokens[:stop], range(first, stop), whole.video_start)

    # Prompts of generation: their one target, EOS, stands in the place of the first new token.

    def caption_prompt(self, opening: Sequence[int] = ()) -> TokenSequence:
        """A caption's sequence up to "Description:", then the tokens `opening`."""
        label = "Description:"
        prompt = self._after_video("cap", CAPTION_INSTRUCTION, label, target_start=len(label))
        *context, stand_in = prompt.tokens
        tokens = (*context, *opening, stand_in)
        return replace(prompt, tokens=tokens, targets=range(len(tokens) - 1, len(tokens)))

    def caption_opening(self, text: str) -> tuple[int, ...]:
        """The tokens with which a caption begins, and which training gives it as context.

        Empty if they are the whole caption.
        """
        whole = self._whole_caption(text)
        first, stop = whole.targets.start, whole.targets.start + CAPTION_CONTEXT
        # Behind them a newline and EOS always follow.
        return whole.tokens[first:stop] if stop + 2 < whole.targets.stop else ()

    def free_question(self, question: Question) -> TokenSequence:
        """A question's sequence without options, up to "Answer:". Not a task of the method.

        Raises UserError if it is longer than max_seq_len.
        """
        text = question_text(question) + FREE_ANSWER_TEXT
        sequence = self._after_video(
            "vqa",
            self._vqa_instruction,
            text,
            target_start=len(text),
            dialogue=question.dialogue,
        )
        excess = sequence.num_inputs - self._max_seq_len
        if excess > 0:
            raise UserError(
                f"{question.place}: the question is {excess} tokens above "
                f"--max_seq_len {self._max_seq_len}; shorten it, or raise the limit"
            )
        return sequence

    def caption_length(self, text: str) -> int:
        """Tokens of a caption's sequence before it is cut."""
        return len(self._whole_caption(text).tokens)

    def fit(self, question: Question, task: str) -> Question:
        """`question` shortened (dialogue, then options) until the task's sequence fits max_seq_len.

        Keeps the most whole words that fit. The same text results for every answer, so that all
        options are scored after one prompt. The question itself and the answer are never cut:
        UserError if the sequence does not fit without dialogue and options.
        """
        limit, clipped = self._max_seq_len, self._clipped(question)
        if clipped is not question and self.length(clipped, task) <= limit + MAX_JOINED_TOKENS:
            clipped = question
        excess = self.length(clipped, task) - limit
        if excess <= 0:
            return question
        if question.dialogue:
            budget = len(self._dialogue(clipped.dialogue)) - excess
            fitted = replace(question, dialogue=self._shorten_dialogue(question.dialogue, budget))
            if fitted.dialogue and self.length(fitted, task) <= limit:
                return fitted
            question = replace(question, dialogue="")
            is_short = self._clipped(question) is question
            if is_short and self.length(question, task) <= limit:
                return question
        return self._fit_options(question, task)

    def _clipped(self, question: Question) -> Question:
        """`question`, or the beginnings of its dialogue and options where these are far too long.

        Measuring a question then takes no longer for a longer text.
        """
        most = self._max_seq_len * MAX_CHARACTERS_PER_TOKEN
        if len(question.dialogue) <= most and max(map(len, question.options)) <= most:
            return question
        options = tuple(option[:most] for option in question.options)
        return replace(question, dialogue=question.dialogue[:most], options=options)

    def _shorten_dialogue(self, dialogue: str, budget: int) -> str:
        """As much of `dialogue` as makes at most `budget` tokens."""

        def count(texts: tuple[str, ...]) -> int:
            return len(self._dialogue(texts[0]))

        if budget <= 0:
            return ""
        encode = self._tokenizer.encode_with_ends
        labels = ["Dialogue: "]
        texts = shorten((dialogue,), labels, budget, encode, count, cut_first_word=False)
        assert texts is not None, "an empty dialogue has no tokens"
        return texts[0]

    def _fit_options(self, question: Question, task: str) -> Question:
        """`question`, which has no dialogue, with as much of its options as fits."""

        def count(options: tuple[str, ...]) -> int:
            return self.length(replace(question, options=options), task)

        limit, encode = self._max_seq_len, self._tokenizer.encode_with_ends
        labels = [f"\n{letter(i)} " for i in range(len(question.options))]
        options = shorten(question.options, labels, limit, encode, count, cut_first_word=True)
        if options is None:
            excess = count(("",) * len(question.options)) - limit
            raise UserError(
                f"{question.place}: the question alone is {excess} tokens above "
                f"--max_seq_len {limit}; raise it"
            )
        return replace(question, options=options)

    def length(self, question: Question, task: str) -> int:
        """Tokens of the question's longest sequence over its possible answers.

        Of its right answer alone where that is the same, or where all are far below the limit and
        only the comparison with it matters.
        """
        answer = question.answer or 0
        one_length = len(self.question_sequence(task, question, answer).tokens)
        num_options = len(question.options)
        if one_length + LETTER_SPREAD <= self._max_seq_len or self._equal_letters(
            task, num_options
        ):
            return one_length
        return max(self._lengths(task, question))

    def _equal_letters(self, task: str, num_options: int) -> bool:
        """Whether every answer's letter has as many tokens as the others.

        They stand between the same texts in every question, whose pieces do not cross a newline.
        """
        key = (task, num_options)
        if key not in self._have_equal_letters:
            empty = Question(0, "", "", "", "?", ("",) * num_options, 0)
            self._have_equal_letters[key] = len(set(self._lengths(task, empty))) == 1
        return self._have_equal_letters[key]

    def _lengths(self, task: str, question: Question) -> list[int]:
        """Tokens of the sequence with each answer."""
        answers = range(len(question.options))
        return [len(self.question_sequence(task, question, a).tokens) for a in answers]

    def _whole_caption(self, text: str) -> TokenSequence:
        label = "Description:"
        return self._after_video(
            "cap", CAPTION_INSTRUCTION, f"{label} {text}\n", target_start=len(label)
        )

    def _after_video(
        self, task: str, instruction: str, text: str, target_start: int, dialogue: str = ""
    ) -> TokenSequence:
        """BOS, instruction, slots, newline, dialogue, text, EOS.

        The targets begin with the first piece of `text` that ends after character `target_start`.
        """
        head = self._head(instruction)
        before = [*head, *self._slots, self._tokenizer.newline, *self._dialogue(dialogue)]
        if text not in self._texts:
            _make_room(self._texts)
            self._texts[text] = self._tokenizer.encode_with_ends(text)
        ids, ends = self._texts[text]
        num_context = bisect_right(ends, target_start)
        tokens = (*before, *ids, self._tokenizer.eos)
        targets = range(len(before) + num_context, len(tokens))
        return TokenSequence(task, tokens, targets, video_start=len(head))

    def _head(self, instruction: str) -> list[int]:
        """The tokens before the slots, encoded once per instruction."""
        if instruction not in self._heads:
            ids = self._tokenizer.encode(instruction + "Video:")
            self._heads[instruction] = [self._tokenizer.bos, *ids]
        return self._heads[instruction]

    def _dialogue(self, text: str) -> list[int]:
        if not text:
            return []
        if text not in self._dialogues:
            _make_room(self._dialogues)
            self._dialogues[text] = self._tokenizer.encode(f"Dialogue: {text}\n")
        return self._dialogues[text]


def _make_room(remembered: dict[str, Any]) -> None:
    if len(remembered) >= MAX_REMEMBERED:
        remembered.clear()


def crop_candidates(caption: str) -> list[int]:
    """Where a training caption may start: at 0, and two characters after every "." but the last
    two.
    """
    periods = [i for i, character in enumerate(caption) if character == "."]
    return [0, *(i + 2 for i in periods[:-2])]


def usual_opening(openings: Iterable[tuple[int, ...]]) -> tuple[tuple[int, ...], int]:
    """(the most frequent first token, then the one that mostly follows it, ...; how often it is).

    Of captions' openings, without empty ones; ((), 0) where there are no others. Where hardly two
    openings are equal, this is still a usual beginning.
    """
    opening: tuple[int, ...] = ()
    same = [other for other in openings if other]
    for place in range(len(same[0]) if same else 0):
        ((token, _),) = Counter(other[place] for other in same).most_common(1)
        same = [other for other in same if other[place] == token]
        opening += (token,)
    return opening, len(same)
