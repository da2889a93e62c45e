"""For `vico check`: whether the targets of answers are their letters."""

from collections.abc import Sequence
from dataclasses import replace

from vico.checkpoint import fingerprint
from vico.data.prompts import Prompts, letter
from vico.data.types import Question
from vico.errors import fail, show
from vico.io.file_cache import FileCache, cache_key, file_stamp
from vico.train.config import RunConfig
from vico.train.preflight import BackboneFiles


def check_answers(
    config: RunConfig,
    dataset: str,
    questions: Sequence[Question],
    backbone: BackboneFiles,
    prompts: Prompts,
    cache: FileCache,
) -> None:
    """Raise UserError unless the targets, decoded, are the answer's letter: no tokenizer lost it.

    `questions`: of `dataset`. The dialogue is encoded apart from them.
    """
    tokenizer = backbone.tokenizer
    key = cache_key(
        "answers",
        dataset,
        fingerprint.of_questions(questions),
        file_stamp(backbone.tokenizer_path),
        config.max_feats,
        config.max_seq_len,
    )
    if cache.get(key):
        return
    num_faults = 0
    first: tuple[str, str, str] | None = None
    for q in questions:
        expected = letter(q.answer or 0)
        sequence = prompts.vqa(replace(q, dialogue=""), q.answer or 0)
        text = tokenizer.decode([sequence.tokens[t] for t in sequence.targets[:-1]])
        if text.strip() != expected or sequence.tokens[-1] != tokenizer.eos:
            num_faults += 1
            first = first or (q.place, text, expected)
    if first is not None:
        place, text, expected = first
        fail(
            f"{place}: of {num_faults} of {len(questions)} questions the targets are not the "
            f"answer's letter, here {show(text)} for {expected}; {backbone.tokenizer_path} is "
            "no LLaMA tokenizer: use the one that came with the weights"
        )
    cache.put(key, True)
