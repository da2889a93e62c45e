"""Lengths of real NExT-QA sequences, as lengths.json keeps them.

`python -m benchmarks.measure.lengths --data_path FOLDER --tokenizer FILE` measures them in real
files and prints lengths.json.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.paths import LENGTHS
from vico.cli.parser import SettingsParser
from vico.data.datasets import read_questions
from vico.data.prompts import Prompts
from vico.data.tokenizer import Tokenizer
from vico.data.types import Question, TokenSequence
from vico.errors import UserError, one_line
from vico.io import log

NUM_OPTIONS = 5
NUM_SLOTS = 10  # video slots of the sequences whose lengths lengths.json has
ANSWER_TARGETS = 4  # "(", the letter, ")", EOS
# Tokens of a caption's text. No captions are published, so this is an assumption.
CAPTION_TOKENS = (80, 250)
# A second assumption: what is known of the published captions, before --max_cap_len cuts them.
LONG_CAPTION_TOKENS = (200, 358)
MAX_SEQ_LEN, MAX_CAP_LEN = 160, 384  # of a question and of a caption, as published


@dataclass(frozen=True)
class Lengths:
    """All lengths are in tokens."""

    source: str
    common_instruction: int  # what all tasks begin with: BOS, "Instruction:"
    vqa_instruction: int  # before the video, BOS included
    cap_instruction: int
    question_head: int  # "Question:"
    vqa_total: dict[int, int]  # number of VQA sequences by length, with 10 video slots
    questions_per_video: dict[int, int]  # number of videos by number of questions
    caption: tuple[int, int]  # shortest and longest caption text, uniform
    long_caption: tuple[int, int]  # a second set, longer

    @classmethod
    def load(cls, path: Path = LENGTHS) -> "Lengths":
        fields = json.loads(path.read_text(encoding="utf-8"))
        for name in ("vqa_total", "questions_per_video"):
            fields[name] = {int(length): count for length, count in fields[name].items()}
        for name in ("caption", "long_caption"):
            fields[name] = tuple(fields[name])
        return cls(**fields)

    def with_long_captions(self) -> "Lengths":
        return replace(self, caption=self.long_caption)


def measure_lengths(data_path: Path, tokenizer_path: Path, split: str) -> dict[str, Any]:
    """The content of lengths.json for a NExT-QA split."""
    tokenizer = Tokenizer(tokenizer_path)
    prompts = Prompts(tokenizer, NUM_SLOTS, 512, 384, dialogue=False)
    questions = read_questions("nextqa", data_path / "nextqa", split)
    vqa, caption = prompts.vqa(questions[0], 0), prompts.caption("A man.")
    lengths = Counter(len(prompts.vqa(question, 0).tokens) for question in questions)
    questions_of_video = Counter(question.video for question in questions)
    per_video = Counter(questions_of_video.values())
    assert all(_differ_in_letter_only(prompts, question) for question in questions[:100])
    return {
        "source": f"NExT-QA {split} ({len(questions)} questions, LLaMA tokenizer)",
        "common_instruction": _common_prefix(vqa.tokens, caption.tokens),
        "vqa_instruction": vqa.video_start,
        "cap_instruction": caption.video_start,
        "question_head": len(tokenizer.encode("Question:")),
        "vqa_total": dict(sorted(lengths.items())),
        "questions_per_video": dict(sorted(per_video.items())),
        "caption": list(CAPTION_TOKENS),
        "long_caption": list(LONG_CAPTION_TOKENS),
    }


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of equal tokens at the beginning."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))


def _differ_in_letter_only(prompts: Prompts, question: Question) -> bool:
    """Whether the options' answers are four tokens that differ in the letter alone."""
    options = [prompts.vqa(question, answer) for answer in range(NUM_OPTIONS)]
    first = _answer_tokens(options[0])
    for answer, option in enumerate(options):
        tokens = _answer_tokens(option)
        differing = [i for i in range(ANSWER_TARGETS) if tokens[i] != first[i]]
        if len(option.targets) != ANSWER_TARGETS or differing != ([1] if answer else []):
            return False
    return True


def _answer_tokens(sequence: TokenSequence) -> tuple[int, ...]:
    return sequence.tokens[-ANSWER_TARGETS:]


def main(argv: Sequence[str]) -> int:
    parser = SettingsParser(prog="benchmarks.measure.lengths", description=__doc__)
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--split", default="val")
    try:
        args = parser.parse(argv)
        print(json.dumps(measure_lengths(args.data_path, args.tokenizer, args.split)))
    except UserError as error:
        log.error(one_line(str(error)))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
