"""The request to `vico plan`: a model, its data, the machine, and the user's choices."""

import math
from dataclasses import dataclass
from typing import Literal

from vico.model.config import ViCoConfig
from vico.planner.gpu_specs import Hardware

Stage = Literal["zero2", "zero3", "zero3_offload"]
STAGES: tuple[Stage, ...] = ("zero2", "zero3", "zero3_offload")  # the simplest first

# Share of the datasheet's rate that matrix products reach: the goal for one H100, not measured.
EFFICIENCY = 0.5
TOKEN_STEP = 64  # budgets are multiples of this
MAX_TOKENS = 8192  # per micro-batch; larger ones are not faster

CAPTION_TOKENS = 194  # captions of 80 to 250 tokens, the instruction and the slots
CAPTION_PROMPT_TOKENS = 31  # of these: the instruction, the slots and the first words
ANSWER_TOKENS = 4
PUBLISHED_SEQ_LEN, PUBLISHED_CAP_LEN = 160, 384  # --max_seq_len, --max_cap_len


@dataclass(frozen=True)
class TokenLengths:
    """Tokens of a question's sequences, and how many training questions there are."""

    question: float  # mean
    caption: float  # mean; 0: no captions
    longest: int  # question and caption together: --max_seq_len + --max_cap_len
    questions: int
    text: int = 0  # of plain text that a question brings with --keep

    @property
    def both(self) -> float:
        return self.question + self.caption + self.text

    @property
    def target_share(self) -> float:
        """Targets per token: an answer, a caption without its prompt, a text without BOS."""
        of_captions = max(0.0, self.caption - CAPTION_PROMPT_TOKENS)
        return (ANSWER_TOKENS + of_captions) / self.both + self.kept_share

    @property
    def kept_share(self) -> float:
        """Of the texts alone."""
        return max(0, self.text - 1) / self.both


@dataclass(frozen=True)
class PlanRequest:
    """What to train on which machine. None: the planner decides."""

    model: str  # its name, for messages
    config: ViCoConfig
    hardware: Hardware
    lengths: TokenLengths
    precision: str = "bf16"
    batch_size: int = 8
    accum_iter: int = 2
    efficiency: float = EFFICIENCY
    stage: Stage | None = None
    num_checkpointed: int | None = None  # layers that backward recomputes
    max_tokens: int | None = None
    quantize: str | None = None  # --quantize; None: off
    # Under ZeRO-3 each node has all frozen weights, divided among its GPUs.
    node_shards: bool | None = None

    @property
    def batch_tokens(self) -> int:
        """Mean tokens of a micro-batch of `batch_size` questions, rounded up to a budget."""
        return min(MAX_TOKENS, _round_up(self.batch_size * self.lengths.both))

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest question with its caption, rounded up to a budget."""
        return _round_up(self.lengths.longest)

    @property
    def num_shards(self) -> int:
        """Among how many GPUs ZeRO-3 divides a frozen weight."""
        return self.hardware.gpus if self.node_shards else self.hardware.ranks

    @property
    def step_tokens(self) -> float:
        """Mean tokens of one GPU's share of an optimizer step."""
        return self.batch_size * self.accum_iter * self.lengths.both


def _round_up(tokens: float) -> int:
    return math.ceil(tokens / TOKEN_STEP) * TOKEN_STEP
