"""From a question or a caption to the tokens of a task, with the target span known by zero_init (METHOD section 2).

Spans come from sentencepiece's character offsets: a piece is a target when it ends behind the character at which the
target text begins. No token id is ever searched for, so an option may contain "Answer:".
"""

from dataclasses import replace

from vico.data.tokenizer import Tokenizer
from vico.data.types import VIDEO_SLOT, Question, TokenSequence
from vico.errors import UserError

QUESTION_TASKS = ("vqa", "vaq", "qav")
CAPTION_CONTEXT = 3  # caption tokens that are context, not targets
LETTER_SPREAD = 8  # "(A)" and "(E)" never differ by as many tokens: spares encoding every answer of a short question


def question_text(question: Question) -> str:
    text = question.question.capitalize().strip()
    return f"Question: {text if text.endswith('?') else text + '?'}\n"


def option_text(question: Question) -> str:
    return "Choices: \n" + "".join(
        f"{letter(i)} {option}\n" for i, option in enumerate(question.options)
    )


def letter(option: int) -> str:
    return f"({chr(ord('A') + option)})"


ANSWER_TEXT = "Answer: The answer is "


class Prompts:
    """Builds sequences for one tokenizer, number of video slots and pair of length limits.

    `dialogue` chooses TVQA's instructions, which read "based on the dialogue, ..." with or without subtitles.
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
        given = "dialogue, " if dialogue else ""
        lines = {
            "vqa": f"Instruction: Predict the answer based on the {given}video and question.\n",
            "cap": "Instruction: describe the what happens in the video.\n",  # the published wording
            "vaq": f"Instruction: Predict the question based on the {given}video and answer.\n",
        }
        self._heads = {
            task: [tokenizer.bos, *tokenizer.encode(line + "Video:")]
            for task, line in lines.items()
        }
        self._qav_line = (
            f"Instruction: Predict the video based on the {given}question and answer.\n"
        )

    def vqa(self, question: Question, answer: int) -> TokenSequence:
        """The pieces of the answer's letter and EOS are the targets; the blank before the letter is its first piece's."""
        prompt = question_text(question) + option_text(question) + ANSWER_TEXT
        return self._behind_video(
            "vqa", question.dialogue, prompt + letter(answer), len(prompt.rstrip())
        )

    def vaq(self, question: Question, answer: int) -> TokenSequence:
        """What follows "Question:", and EOS, are the targets."""
        head = option_text(question) + ANSWER_TEXT + letter(answer) + "\n"
        return self._behind_video(
            "vaq",
            question.dialogue,
            head + question_text(question).strip(),
            len(head) + len("Question:"),
        )

    def qav(self, question: Question, answer: int) -> TokenSequence:
        """The video slots are the targets; they stand at the end."""
        text = (
            question_text(question)
            + option_text(question)
            + ANSWER_TEXT
            + letter(answer)
            + "\nVideo:"
        )
        encode = self._tokenizer.encode
        if question.dialogue:
            head = encode(self._qav_line) + self._dialogue(question.dialogue) + encode(text)
        else:
            head = encode(self._qav_line + text)
        start = 1 + len(head)
        tokens = [self._tokenizer.bos, *head, *self._slots, self._tokenizer.eos]
        return TokenSequence("qav", tuple(tokens), range(start, start + len(self._slots)), start)

    def caption(self, text: str) -> TokenSequence:
        """Everything from the 4th caption token on is a target; a caption that is too long is cut, and loses its EOS."""
        whole = self._behind_video("cap", "", f"Description: {text}\n", len("Description:"))
        stop = min(whole.targets.stop, self._max_cap_len)
        first = min(
            whole.targets.start + CAPTION_CONTEXT, whole.targets.stop
        )  # a caption of two words has no target
        if first >= stop and stop < whole.targets.stop:
            raise UserError(
                f"--max_cap_len {self._max_cap_len}: leaves no caption token to learn; {first + 1} is the least"
            )
        return TokenSequence("cap", whole.tokens[:stop], range(first, stop), whole.video_start)

    def fit(self, question: Question, task: str) -> Question:
        """`question` with its dialogue, then its options, shortened until the task's sequence fits max_seq_len.

        The question itself and the answer are never cut: what does not fit even so is a UserError. The same text
        results whatever the answer, so that all options are scored after one prompt.
        """
        fitted, excess = question, self.length(question, task) - self._max_seq_len
        while excess > 0:
            if fitted.dialogue:
                fitted = replace(fitted, dialogue=_without_last_words(fitted.dialogue, excess))
            elif any(fitted.options):
                longest = max(fitted.options, key=len)
                place = fitted.options.index(longest)
                options = (
                    *fitted.options[:place],
                    _without_last_words(longest, 1),
                    *fitted.options[place + 1 :],
                )
                fitted = replace(fitted, options=options)
            else:
                raise UserError(
                    f"{question.place}: the question alone is {excess} tokens above --max_seq_len {self._max_seq_len}; raise it"
                )
            excess = self.length(fitted, task) - self._max_seq_len
        return fitted

    def length(self, question: Question, task: str) -> int:
        """Tokens of the longest of the question's sequences, over its possible answers; far below the limit, of the first."""
        length = len(self.question_sequence(task, question, 0).tokens)
        if length + LETTER_SPREAD <= self._max_seq_len:
            return length
        return max(
            len(self.question_sequence(task, question, a).tokens)
            for a in range(len(question.options))
        )

    def caption_length(self, text: str) -> int:
        """Tokens of a caption's sequence, before it is cut."""
        return len(
            self._behind_video("cap", "", f"Description: {text}\n", len("Description:")).tokens
        )

    def question_sequence(self, task: str, question: Question, answer: int) -> TokenSequence:
        build = {"vqa": self.vqa, "vaq": self.vaq, "qav": self.qav}[task]
        return build(question, answer)

    def _dialogue(self, text: str) -> list[int]:
        return self._tokenizer.encode(f"Dialogue: {text}\n") if text else []

    def _behind_video(
        self, task: str, dialogue: str, text: str, target_character: int
    ) -> TokenSequence:
        """BOS, instruction, slots, newline, dialogue, text, EOS; targets from the piece that ends behind `target_character`."""
        ids, ends = self._tokenizer.encode_with_ends(text)
        video_start = len(self._heads[task])
        head = [
            *self._heads[task],
            *self._slots,
            self._tokenizer.newline,
            *self._dialogue(dialogue),
        ]
        first = len(head) + sum(end <= target_character for end in ends)
        tokens = (*head, *ids, self._tokenizer.eos)
        return TokenSequence(task, tokens, range(first, len(tokens)), video_start)


def _without_last_words(text: str, num_words: int) -> str:
    """`text` less its last `num_words` words; a single long word loses its second half."""
    words = text.split(" ")
    if len(words) == 1:
        return text[: len(text) // 2]
    return " ".join(words[: max(1, len(words) - num_words)]) if num_words < len(words) else ""


def crop_candidates(caption: str) -> list[int]:
    """Where a training caption may start: 0 and, for every "." but the last two, two characters behind it."""
    dots = [i for i, character in enumerate(caption) if character == "."]
    return [0, *(i + 2 for i in dots[:-2])]
