"""Generation by METHOD.md sections 1 and 2, as plainly as possible: every token runs all again.

Like tests/reference/oracle.py, this shares no code with vico/.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sentencepiece import SentencePieceProcessor as Tokenizer
from torch import Tensor

from reference.oracle import Hyper, Model, Trainables, frames, trunk
from reference.oracle_sequences import VIDEO_SLOT, OracleSequence, encode_pieces, instruction_text


@dataclass
class OracleText:
    """The generated tokens, EOS included, and the log-probability of each."""

    ids: list[int]
    log_probabilities: list[float]


def caption_start(tokenizer: Tokenizer, n_feats: int) -> OracleSequence:
    """The caption row up to "Description:"."""
    instruction = instruction_text("caption", "nextqa") + "\nVideo:"
    head = [tokenizer.bos_id(), *encode_pieces(tokenizer, instruction)]
    newline = encode_pieces(tokenizer, "\n")[-1]
    text = encode_pieces(tokenizer, "Description:")
    return OracleSequence(
        "caption", [*head, *[VIDEO_SLOT] * n_feats, newline, *text], [], len(head)
    )


@torch.no_grad()
def greedy(
    model: Model,
    trainables: Trainables,
    start: OracleSequence,
    features: Tensor,
    hyper: Hyper,
    eos: int,
    max_new_tokens: int,
) -> OracleText:
    """The likeliest token after all before it, until EOS."""
    weights = model[1]
    video = frames(features.to(weights["norm.weight"].dtype), hyper.max_feats)
    out = OracleText([], [])
    while len(out.ids) < max_new_tokens and eos not in out.ids:
        ids = [*start.ids, *out.ids]
        sequence = OracleSequence(start.task, ids, [], start.video_start)
        hidden = trunk(model, trainables, sequence, video, hyper)
        log_probabilities = (hidden[-1] @ weights["output.weight"].T).log_softmax(-1)
        best = int(log_probabilities.argmax())
        out.ids.append(best)
        out.log_probabilities.append(float(log_probabilities[best]))
    return out
