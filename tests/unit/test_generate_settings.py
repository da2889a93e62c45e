"""The bounds of generation: settings, the window, batches, and what is no probability."""

import math
from collections import Counter
from dataclasses import fields, replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from support.errors import refusal
from support.generated_texts import text_prompts
from support.toy_dataset import ToyData
from vico.data.packing import Example, pack
from vico.data.tokenizer import Tokenizer
from vico.errors import TrainingError
from vico.generation import generate
from vico.generation.search import Hypothesis, TokenByToken
from vico.generation.settings import GenerationSettings
from vico.model.attention.cache import KeyValueCache
from vico.model.config import LlamaConfig
from vico.model.vico import ViCo

Settings = dict[str, Any]


def test_what_is_not_given() -> None:
    """The likeliest token, for up to 128."""
    assert GenerationSettings() == GenerationSettings(128, None, 1.0, 0, 1, 1.0, False, ())
    assert not GenerationSettings().has_stopped("any text")


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 1},
        {"temperature": 1e-3},
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "stop": ("x",)},
        {"num_beams": 2, "length_penalty": 10},
        {"num_beams": 2, "length_penalty": -10.0},
        {"num_beams": 2, "length_penalty": 0.0, "early_stopping": "never"},
        {"num_beams": 1, "stop": ("x", "y")},
    ],
    ids=str,
)
def test_settings_in_range(values: Settings) -> None:
    settings = GenerationSettings(**values)
    for name, value in values.items():
        assert getattr(settings, name) == value


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"temperature": -1.0}, "--temperature -1.0: must be above 0"),
        ({"temperature": math.inf}, "--temperature inf: must be above 0"),
        ({"temperature": math.nan}, "--temperature nan: must be above 0"),
        ({"temperature": 1.0, "top_p": 1.01}, "--top_p 1.01: must be above 0 and at most 1"),
        ({"top_p": 0.5}, "--top_p 0.5: chooses among drawn tokens"),
        ({"num_beams": 2, "length_penalty": 10.1}, "--length_penalty 10.1: must be from -10 to 10"),
        ({"num_beams": 2, "length_penalty": -10.1}, "--length_penalty -10.1: must be from -10"),
        ({"num_beams": 2, "temperature": 1.0}, "--num_beams 2: beams are the likeliest"),
        ({"num_beams": 2, "stop": ("x",)}, "num_beams 2: beams end with EOS only"),
        ({"early_stopping": "never"}, "--length_penalty and --early_stopping are for beams"),
        ({"length_penalty": 0.0}, "--length_penalty and --early_stopping are for beams"),
    ],
    ids=str,
)
def test_settings_just_out_of_range(values: Settings, expected: str) -> None:
    assert expected in refusal(GenerationSettings, **values)


def test_a_window_bounds_prompt_and_text() -> None:
    config = LlamaConfig(16, 1, 2, 40, 16, sliding_window=20)
    model = ViCo(config, 1, 2, 10, 1.0, torch.float32)
    prompts = text_prompts(40, [3, 12, 5])
    generate._require_room(model, prompts, GenerationSettings(max_new_tokens=8))
    message = refusal(generate._require_room, model, prompts, GenerationSettings(max_new_tokens=11))
    assert "--max_new_tokens 11: a prompt and its text may have 23 tokens, and" in message
    assert "this model sees 20; lower it by 3" in message
    generate._require_room(model, [], GenerationSettings(max_new_tokens=20))
    with pytest.raises(Exception, match="may have 21 tokens"):
        generate._require_room(model, [], GenerationSettings(max_new_tokens=21))


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        # 10 and 90 tokens, once for each beam: a batch ends with the prompt that fills 4,096.
        ({"max_new_tokens": 90}, [41, 41, 18]),
        ({"max_new_tokens": 1014}, [4] * 25),
        ({"max_new_tokens": 1013}, [5] * 20),
        ({"max_new_tokens": 90, "num_beams": 4}, [11] * 9 + [1]),
        ({"max_new_tokens": 5000}, [1] * 100),
    ],
    ids=str,
)
def test_batches(settings: Settings, sizes: list[int]) -> None:
    prompts = text_prompts(40, [10] * 100)
    batches = generate._divide(prompts, GenerationSettings(**settings))
    assert [len(batch) for batch in batches] == sizes
    assert list(chain.from_iterable(batches)) == list(range(100))
    assert generate._divide([], GenerationSettings()) == []


def test_what_a_draw_depends_on() -> None:
    """Another prompt draws otherwise, and so does the same about another video."""
    prompts = text_prompts(40, [5, 5, 6])
    keys = {prompt.key for prompt in prompts}
    keys.add(generate.Prompt(prompts[0].sequence, torch.ones(10, 768)).key)
    assert len(keys) == 4 and all(2**32 < key < 2**64 for key in keys)
    same = generate.Prompt(prompts[0].sequence, torch.zeros(10, 768), opening=(1,))
    assert same.key == prompts[0].key
    log_probabilities = torch.zeros(200, 50).log_softmax(dim=1)
    counts = []
    for seed in (0, 1):
        settings = GenerationSettings(temperature=1.0, seed=seed)
        search = TokenByToken([prompts[0].key] * 100 + list(range(100)), settings, -1, str)
        ids, parents = search.advance(log_probabilities)
        assert parents == list(range(200))
        counts.append(Counter(ids[:100]))
        assert len(set(ids[100:])) > 25
    assert len(counts[0]) == len(counts[1]) == 1 and counts[0] != counts[1]


def test_a_row_and_the_cache_are_on_one_device() -> None:
    """Which has no numbers here: a GPU would refuse a tensor of the host's."""
    meta = torch.device("meta")
    ids_B, positions_B = torch.zeros(2, 3, dtype=torch.int64, device=meta)
    rows = generate.next_rows(ids_B, positions_B, torch.zeros(0, 10, 768))
    tensors = {field.name: getattr(rows, field.name) for field in fields(rows)}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            assert value.device == (torch.device("cpu") if name == "wanted_rows_R" else meta), name
            assert value.dtype == torch.int64 or name == "features_VFC"
    assert (rows.num_real_tokens, len(rows.segments), rows.segments[2].stop) == (3, 3, 3)
    prompts = text_prompts(40, [3, 5])
    examples = [Example(prompt.sequence, i, 0) for i, prompt in enumerate(prompts)]
    stream = pack(examples, torch.stack([prompt.features_FC for prompt in prompts]))
    cache = KeyValueCache(2, replace(stream, token_ids_T=stream.token_ids_T.to(meta)))
    for layer in cache.layers:
        layer.fill(*torch.zeros(2, stream.num_rows, 2, 4, device=meta))
    positions_B = cache.grow()
    cache.select([1, 0, 0])
    for tensor in (cache.rows_BL, cache.lengths_B, cache.is_hidden_BL, cache.is_video_BL):
        assert tensor.device == meta
    assert cache.lengths_B.shape == (3,) and positions_B.shape == (2,) and len(cache.layers) == 2


def test_the_end_of_a_text(toy: ToyData) -> None:
    """EOS is no part of it, but of its tokens; without one it is cut, unless a stop ended it."""
    tokenizer = Tokenizer(toy.llama / "tokenizer.model")
    (prompt,) = text_prompts(tokenizer.vocab_size, [5])
    ids = tokenizer.encode("a man runs")

    def finished(tokens: list[int], *last: float, **values: Any) -> generate.Generated:
        hypothesis = Hypothesis(tokens, [*[-1.0] * (len(tokens) - len(last)), *last])
        return generate._finished(prompt, hypothesis, tokenizer, GenerationSettings(**values))

    ended = finished([*ids, tokenizer.eos])
    assert (ended.text, ended.is_cut, ended.token_ids) == (
        "a man runs",
        False,
        (*ids, tokenizer.eos),
    )
    assert ended.log_probabilities == (-1.0,) * (len(ids) + 1)
    assert (finished(ids).text, finished(ids).is_cut) == ("a man runs", True)
    assert not finished(ids, stop=("runs",)).is_cut and finished(ids, stop=("x",)).is_cut
    prompt = generate.Prompt(prompt.sequence, prompt.features_FC, tuple(ids))
    assert finished([*ids, tokenizer.eos]).text.count("a man runs") == 2
    for wrong in (math.nan, -math.inf):
        with pytest.raises(TrainingError, match="probabilities are not finite"):
            finished(ids, wrong)
