"""How tokens are chosen, and how many."""

from dataclasses import dataclass
from typing import Literal

from vico.errors import UserError

MAX_LENGTH_PENALTY = 10  # of a text of 10,000 tokens it is 1e40


@dataclass(frozen=True)
class GenerationSettings:
    """Greedy by default. Raises UserError for a value out of range."""

    # Of an answer or caption, its EOS included; what is longer is cut, and `Generated` says so.
    max_new_tokens: int = 128
    # None: the likeliest token. Otherwise it is drawn from softmax(logits / temperature)...
    temperature: float | None = None
    # ...among the likeliest tokens that together have this probability.
    top_p: float = 1.0
    seed: int = 0
    # Above 1: beam search with as many beams. The best of them by the sum of its log-probabilities,
    # divided by length ** length_penalty, is the text.
    num_beams: int = 1
    length_penalty: float = 1.0
    # True: once as many texts have ended as there are beams. False: once no better one is likely.
    # "never": once no better one is possible.
    early_stopping: bool | Literal["never"] = False
    # A text ends with the token that completes one of these; it is part of the text.
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: must be at least 1")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise UserError(
                f"--temperature {self.temperature}: must be above 0; leave it out for the "
                "likeliest tokens"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: must be above 0 and at most 1")
        if self.temperature is None and self.top_p != 1:
            raise UserError(f"--top_p {self.top_p}: chooses among drawn tokens; add --temperature")
        self._check_beams()

    def has_stopped(self, text: str) -> bool:
        return any(stop in text for stop in self.stop)

    def _check_beams(self) -> None:
        if self.num_beams < 1:
            raise UserError(f"--num_beams {self.num_beams}: must be at least 1")
        if self.num_beams > 1 and self.temperature is not None:
            raise UserError(
                f"--num_beams {self.num_beams}: beams are the likeliest, and --temperature draws; "
                "leave one of them out"
            )
        if self.num_beams > 1 and self.stop:
            raise UserError(f"num_beams {self.num_beams}: beams end with EOS only, and not by stop")
        if not -MAX_LENGTH_PENALTY <= self.length_penalty <= MAX_LENGTH_PENALTY:
            raise UserError(
                f"--length_penalty {self.length_penalty}: must be from -{MAX_LENGTH_PENALTY} "
                f"to {MAX_LENGTH_PENALTY}"
            )
        if self.num_beams == 1 and (self.length_penalty != 1 or self.early_stopping):
            raise UserError("--length_penalty and --early_stopping are for beams; add --num_beams")
