"""The oracle's token sequences: METHOD.md, section 2, without code of the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sentencepiece import SentencePieceProcessor as Tokenizer
from torch import Tensor

# Stands in a sequence for a frame of the video.
VIDEO_SLOT = -1
LETTERS = "ABCDEFGHIJ"


@dataclass
class Question:
    """A multiple-choice question with its video's features [T, 768].

    `caption` is the text to train on, already cropped.
    """

    question: str
    options: list[str]
    answer: int
    features: Tensor = field(repr=False)
    caption: str | None = None
    dialogue: str = ""
    dataset: str = "nextqa"


@dataclass
class OracleSequence:
    """The tokens of one sequence.

    `targets` are the positions t whose token (QAV: frame) the hidden state at t-1 predicts.
    """

    task: str
    ids: list[int]
    targets: list[int]
    video_start: int


def encode_pieces(tokenizer: Tokenizer, text: str) -> list[int]:
    """`enc`: sentencepiece encode without BOS/EOS."""
    return list(tokenizer.encode(text, add_bos=False, add_eos=False))


def split_pieces(tokenizer: Tokenizer, head: str, rest: str) -> tuple[list[int], int]:
    """enc(head + " " + rest), and how many of its pieces belong to head.

    The two are encoded apart; where that gives other pieces, their offsets decide.
    """
    text = f"{head} {rest}"
    pieces, head_ids = encode_pieces(tokenizer, text), encode_pieces(tokenizer, head)
    if head_ids + encode_pieces(tokenizer, rest) == pieces:
        return pieces, len(head_ids)
    offsets = tokenizer.encode(text, return_type="offset_mapping")["offsets"]
    return pieces, sum(end <= len(head) for _, end in offsets)


def question_text(question: str) -> str:
    """q = "Question: {question}\\n"."""
    text = question.capitalize().strip()
    return f"Question: {text if text.endswith('?') else text + '?'}\n"


def letter(index: int) -> str:
    """(A) for 0, (B) for 1, ..."""
    return f"({LETTERS[index]})"


def choices_text(options: Sequence[str]) -> str:
    """o + a without its trailing blank. Options are taken verbatim, blanks included."""
    lines = [f"{letter(i)} {option}\n" for i, option in enumerate(options)]
    return "Choices: \n" + "".join(lines) + "Answer: The answer is"


def instruction_text(task: str, dataset: str) -> str:
    """The instruction line without its newline. TVQA's names the dialogue, except for captions."""
    if task == "caption":
        return "Instruction: describe the what happens in the video."
    dialogue = "dialogue, " if dataset == "tvqa" else ""
    predicted, given = {
        "vqa": ("answer", "video and question"),
        "vaq": ("question", "video and answer"),
        "qav": ("video", "question and answer"),
    }[task]
    return f"Instruction: Predict the {predicted} based on the {dialogue}{given}."


def text_sequence(
    tokenizer: Tokenizer,
    task: str,
    item: Question,
    n_feats: int,
    head: str,
    rest: str,
    skip: int = 0,
    cut: int | None = None,
) -> OracleSequence:
    """BOS, enc(instruction), slots, nl, dialogue (not in captions), enc(head + " " + rest), EOS.

    Cut to `cut` tokens. The targets are the pieces of rest but the first `skip`, and EOS.
    """
    nl = encode_pieces(tokenizer, "\n")[-1]
    assert tokenizer.decode([nl]) == "\n", "this tokenizer has no newline token"
    instruction = instruction_text(task, item.dataset) + "\nVideo:"
    start = [tokenizer.bos_id(), *encode_pieces(tokenizer, instruction)]
    dialogue: list[int] = []
    if item.dialogue and task != "caption":
        dialogue = encode_pieces(tokenizer, f"Dialogue: {item.dialogue}\n")
    pieces, context = split_pieces(tokenizer, head, rest)
    before = start + [VIDEO_SLOT] * n_feats + [nl] + dialogue
    ids = (before + pieces + [tokenizer.eos_id()])[:cut]
    targets = list(range(len(before) + context + skip, len(ids)))
    return OracleSequence(task, ids, targets, len(start))


def vqa_sequence(
    tokenizer: Tokenizer, item: Question, n_feats: int, answer: int | None = None
) -> OracleSequence:
    """VQA row, with the right answer or option `answer`. The targets are "(X)" and EOS."""
    prompt = question_text(item.question) + choices_text(item.options)
    answer_text = letter(item.answer if answer is None else answer)
    return text_sequence(tokenizer, "vqa", item, n_feats, prompt, answer_text)


def caption_sequence(
    tokenizer: Tokenizer, item: Question, n_feats: int, max_cap_len: int = 384
) -> OracleSequence:
    """Caption row. "Description", ":" and 3 caption tokens are context; the rest is cut to fit."""
    assert item.caption is not None
    head, rest = "Description:", f"{item.caption}\n"
    return text_sequence(tokenizer, "caption", item, n_feats, head, rest, skip=3, cut=max_cap_len)


def vaq_sequence(tokenizer: Tokenizer, item: Question, n_feats: int) -> OracleSequence:
    """VAQ row. The targets are everything after "Question:", EOS included."""
    head = f"{choices_text(item.options)} {letter(item.answer)}\nQuestion:"
    rest = question_text(item.question).strip().removeprefix("Question: ")
    return text_sequence(tokenizer, "vaq", item, n_feats, head, rest)


def qav_sequence(tokenizer: Tokenizer, item: Question, n_feats: int) -> OracleSequence:
    """QAV row. The targets are the slots. A dialogue, encoded apart, follows the instruction."""
    line = instruction_text("qav", item.dataset) + "\n"
    answer = f"{choices_text(item.options)} {letter(item.answer)}"
    text = f"{question_text(item.question)}{answer}\nVideo:"
    parts = [line, f"Dialogue: {item.dialogue}\n", text] if item.dialogue else [line + text]
    head = [tokenizer.bos_id()]
    for part in parts:
        head += encode_pieces(tokenizer, part)
    slots = list(range(len(head), len(head) + n_feats))
    ids = head + [VIDEO_SLOT] * n_feats + [tokenizer.eos_id()]
    return OracleSequence("qav", ids, slots, len(head))
