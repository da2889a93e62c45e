"""How tokens are chosen, and how many."""

from dataclasses import dataclass

from vico.errors import UserError


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
