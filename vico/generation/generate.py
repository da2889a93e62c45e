"""Generation: prompts in, texts out, on any number of ranks.

Prompts run once, as a packed stream; then every token costs one row, by the key/value cache of
model/attention/cache.py. All ranks run as many forwards, which ZeRO-3 needs: they begin a batch
together and go on until the last of them has ended its own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vico.data.packing import Example, pack
from vico.data.tokenizer import Tokenizer
from vico.data.types import TokenSequence
from vico.distributed.world import World
from vico.errors import TrainingError, UserError
from vico.generation.beam import BeamSearch
from vico.generation.search import Hypothesis, Search, TokenByToken
from vico.generation.settings import GenerationSettings
from vico.model.attention.cache import KeyValueCache
from vico.model.batch import PackedBatch, Segment
from vico.model.vico import ViCo

# A batch takes prompts until they and what may follow them are about as many tokens, whatever the
# number of ranks.
BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a text is generated after."""

    # Its one target stands in the place of the first new token (Prompts.caption_prompt).
    sequence: TokenSequence
    features_FC: Tensor  # fp32 [F, C], sampled; without effect where there are no video slots
    # The last tokens of `sequence` before its target, if they are the beginning of the text.
    opening: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.sequence.num_inputs

    @property
    def key(self) -> int:
        """A number that follows from the content: what is drawn for a prompt depends on it."""
        digest = hashlib.sha256(repr(self.sequence.tokens).encode())
        digest.update(self.features_FC.numpy().tobytes())
        return int.from_bytes(digest.digest()[:8], "big")


@dataclass(frozen=True, slots=True)
class Generated:
    """A text, without blanks at its ends; its new tokens, with EOS; and their log-probabilities.

    These are the model's own, whatever tokens were drawn from. The text begins with the prompt's
    `opening`.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    is_cut: bool  # it would have gone on after max_new_tokens, without EOS or a stop text


def generate(
    model: ViCo,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    settings: GenerationSettings,
    world: World,
) -> list[Generated]:
    """A text for each prompt. A collective: all ranks give the same prompts and get all texts.

    `model` may be under DeepSpeed (`Engine.module`). Raises UserError where a text may become too
    long for the model, TrainingError for probabilities that are not finite, and Stopped.
    """
    _require_room(model, prompts, settings)
    batches = _divide(prompts, settings)
    found: dict[int, Hypothesis] = {}
    for first in range(0, len(batches), world.size):
        world.raise_if_stopped("stopped in the generation of texts; start it again")
        world.set_phase(f"generation, batch {first + world.rank + 1} of {len(batches)}")
        own = batches[first : first + world.size][world.rank : world.rank + 1]
        places = own[0] if own else [0]  # a rank without a batch runs one for the others' sake
        batch = [prompts[place] for place in places]
        hypotheses = _run_batch(model, batch, tokenizer, settings, world)
        if own:
            found |= dict(zip(places, hypotheses, strict=True))
    for other in world.gather_objects(found):
        found |= other
    return [
        _finished(prompts[place], found[place], tokenizer, settings)
        for place in range(len(prompts))
    ]


def _require_room(model: ViCo, prompts: Sequence[Prompt], settings: GenerationSettings) -> None:
    window = model.config.sliding_window
    longest = max((prompt.num_tokens for prompt in prompts), default=0) + settings.max_new_tokens
    if window is not None and longest > window:
        raise UserError(
            f"--max_new_tokens {settings.max_new_tokens}: a prompt and its text may have {longest} "
            f"tokens, and this model sees {window}; lower it by {longest - window}"
        )


def _divide(prompts: Sequence[Prompt], settings: GenerationSettings) -> list[list[int]]:
    """Places of the prompts, cut at about BATCH_TOKENS; the same for any number of ranks."""
    batches: list[list[int]] = []
    size = BATCH_TOKENS
    for place, prompt in enumerate(prompts):
        if size >= BATCH_TOKENS:
            batches.append([])
            size = 0
        batches[-1].append(place)
        size += settings.num_beams * (prompt.num_tokens + settings.max_new_tokens)
    return batches


@torch.no_grad()
def _run_batch(
    model: ViCo,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    settings: GenerationSettings,
    world: World,
) -> list[Hypothesis]:
    """Goes on until all ranks have ended theirs; who has ended repeats a row of no importance."""
    examples = [Example(prompt.sequence, clip, 0) for clip, prompt in enumerate(prompts)]
    features_VFC = torch.stack([prompt.features_FC for prompt in prompts])
    stream = pack(examples, features_VFC).to(world.device)
    cache = KeyValueCache(model.config.n_layers, stream)
    eos = tokenizer.eos
    search: Search = BeamSearch(len(prompts), settings, eos)
    if settings.num_beams == 1:
        keys = [prompt.key for prompt in prompts]
        search = TokenByToken(keys, settings, eos, tokenizer.decode)
    logits_BW = model(stream, cache)[stream.token_rows_N]  # equal prompts share a row
    ids, parents = search.advance(logits_BW.log_softmax(dim=1))
    while world.max(len(ids)):
        cache.select(parents or [0])
        ids_B = torch.tensor(ids or [eos], device=world.device)
        logits_BW = model(next_rows(ids_B, cache.grow(), features_VFC[:0]), cache)
        if ids:
            ids, parents = search.advance(logits_BW.log_softmax(dim=1))
    return search.results()


def next_rows(ids_B: Tensor, positions_B: Tensor, no_features_VFC: Tensor) -> PackedBatch:
    """A row per sequence, whose earlier rows are in the cache."""
    device = ids_B.device
    none = torch.empty(0, dtype=torch.int64, device=device)
    return PackedBatch(
        token_ids_T=ids_B,
        positions_T=positions_B,
        slot_rows_S=none,
        slot_frames_S=none,
        features_VFC=no_features_VFC.to(device),
        segments=tuple(Segment(i, i + 1, None, False, True) for i in range(len(ids_B))),
        wanted_rows_R=torch.arange(len(ids_B)),
        token_rows_N=none,
        token_target_ids_N=none,
        frame_rows_M=none,
        frame_videos_M=none,
        frame_target_ids_M=none,
        target_tasks=none,
        target_sequences=none,
        num_real_tokens=len(ids_B),
    )


def _finished(
    prompt: Prompt, hypothesis: Hypothesis, tokenizer: Tokenizer, settings: GenerationSettings
) -> Generated:
    ids, log_probabilities = hypothesis.token_ids, hypothesis.log_probabilities
    if not torch.tensor(log_probabilities).isfinite().all():
        raise TrainingError(
            "the model's probabilities are not finite; try --precision bf16 or fp32, or another "
            "checkpoint"
        )
    has_ended = ids[-1] == tokenizer.eos
    text = tokenizer.decode([*prompt.opening, *(ids[:-1] if has_ended else ids)]).strip()
    is_cut = not has_ended and not settings.has_stopped(tokenizer.decode(ids))
    return Generated(text, tuple(ids), tuple(log_probabilities), is_cut)
