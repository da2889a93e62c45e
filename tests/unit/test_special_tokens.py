"""BOS, EOS and newline of a tokenizer.json: from the files beside it, else by known names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from support.backbones import NUM_PIECES, make_llama_3_tokenizers
from support.errors import refusal
from vico.data.prompts import Prompts
from vico.data.special_tokens import _numbered
from vico.data.tokenizer import Tokenizer, content_digests
from vico.data.types import VIDEO_SLOT, Question

START, END, TEXT = NUM_PIECES, NUM_PIECES + 1, NUM_PIECES + 2  # ids of the names below
SMOL = {START: "<|im_start|>", END: "<|im_end|>", TEXT: "<|endoftext|>"}
QUESTION = Question(0, "0", "v", "CW", "why does the dog run", ("a", "b", "c", "d", "e"), 2)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a byte-level tokenizer.json with the names of SMOL."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_llama_3_tokenizers(folder / "tiktoken", folder / "json")
    content: dict[str, Any] = json.loads((folder / "json").read_text())
    for token in content["added_tokens"]:
        token["content"] = SMOL.get(token["id"], token["content"])
    return content


def write(folder: Path, content: dict[str, Any], beside: dict[str, Any]) -> Path:
    """A tokenizer.json, and the JSON files beside it."""
    for name, value in beside.items():
        (folder / name).write_text(json.dumps(value))
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


TOKENIZER, MAP = "tokenizer_config.json", "special_tokens_map.json"
MODEL, GENERATION = "config.json", "generation_config.json"
TEXTS = {"bos_token": SMOL[START], "eos_token": SMOL[END]}
BESIDE: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "nothing": ({}, (TEXT, TEXT)),
    "texts": ({TOKENIZER: TEXTS}, (START, END)),
    "objects": (
        {TOKENIZER: {key: {"content": text, "lstrip": False} for key, text in TEXTS.items()}},
        (START, END),
    ),
    "Qwen": (
        {
            TOKENIZER: {"bos_token": None, "eos_token": SMOL[END]},
            MODEL: {"bos_token_id": TEXT, "eos_token_id": TEXT},
        },
        (TEXT, END),
    ),
    "empty texts": ({TOKENIZER: {"bos_token": "", "eos_token": {"content": ""}}}, (TEXT, TEXT)),
    "a map": ({TOKENIZER: {"model_max_length": 9}, MAP: TEXTS}, (START, END)),
    "ids": ({MODEL: {"bos_token_id": START, "eos_token_id": [END, TEXT]}}, (START, END)),
    "generation": (
        {MODEL: {"eos_token_id": []}, GENERATION: {"eos_token_id": [END]}},
        (TEXT, END),
    ),
    "the first file": (
        {TOKENIZER: TEXTS, MODEL: {"bos_token_id": 5, "eos_token_id": 10**9}},
        (START, END),
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_special_ids(name: str, content: dict[str, Any], tmp_path: Path) -> None:
    beside, expected = BESIDE[name]
    tokenizer = Tokenizer(write(tmp_path, content, beside))
    assert (tokenizer.bos, tokenizer.eos) == expected and tokenizer.has_bos
    assert tokenizer.name_of(tokenizer.eos) == SMOL[expected[1]]
    sequence = Prompts(tokenizer, 10, 512, 384, False).vqa(QUESTION, 2)
    assert (sequence.tokens[0], sequence.tokens[-1]) == expected
    targets = [sequence.tokens[t] for t in sequence.targets[:-1]]
    assert tokenizer.decode(targets) == " (C)"
    slots = [i for i, token in enumerate(sequence.tokens) if token == VIDEO_SLOT]
    assert sequence.tokens[slots[-1] + 1] == tokenizer.newline


def without(content: dict[str, Any], *ids: int) -> dict[str, Any]:
    kept = [token for token in content["added_tokens"] if token["id"] not in ids]
    return content | {"added_tokens": kept}


def test_without_bos_eos_begins_a_sequence(content: dict[str, Any], tmp_path: Path) -> None:
    beside = {TOKENIZER: {"bos_token": None, "eos_token": SMOL[END]}}
    tokenizer = Tokenizer(write(tmp_path, without(content, TEXT), beside))
    assert not tokenizer.has_bos and tokenizer.bos == tokenizer.eos == END


WRONG: dict[str, tuple[str, Any, str]] = {
    "no piece": (TOKENIZER, {"eos_token": "</s>"}, "'eos_token' is '</s>', which is no piece of"),
    "a list": (TOKENIZER, {"bos_token": ["<s>"]}, "'bos_token' is ['<s>'], which is no piece"),
    "another vocabulary": (
        MODEL,
        {"eos_token_id": 128001},
        f"'eos_token_id' is 128001 and must be an id of the tokenizer.json beside it, from 0 to "
        f"{NUM_PIECES + 255}",
    ),
    "true": (MODEL, {"bos_token_id": True}, "'bos_token_id' is True and must be an id"),
    "a text": (GENERATION, {"bos_token_id": "1"}, "'bos_token_id' is '1' and must be an id"),
    "no object": (TOKENIZER, [1], "tokenizer_config.json:1: column 1: a list where a JSON object"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(name: str, content: dict[str, Any], tmp_path: Path) -> None:
    file_name, value, part = WRONG[name]
    message = refusal(Tokenizer, write(tmp_path, content, {file_name: value}))
    assert part in message and file_name in message


def test_no_end_token(content: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, without(content, TEXT), {})
    assert "no EOS piece; a LLaMA tokenizer has one, or tokenizer_config" in refusal(
        Tokenizer, path
    )


def test_digest(content: dict[str, Any], tmp_path: Path) -> None:
    """Another BOS or EOS is another tokenizer; files that say what the names say are no change."""
    plain = content_digests(write(tmp_path, content, {}))
    same = {"bos_token": SMOL[TEXT], "eos_token": SMOL[TEXT]}
    assert content_digests(write(tmp_path, content, {TOKENIZER: same})) == plain
    other = content_digests(write(tmp_path, content, {TOKENIZER: TEXTS}))
    mixed = content_digests(
        write(tmp_path, content, {TOKENIZER: same | {"bos_token": SMOL[START]}})
    )
    assert not {*mixed} & {*plain, *other} and not {*other} & {*plain}


# Newlines


def pieces(*names: str, merges: tuple[tuple[str, str], ...] = ()) -> tokenizers.Tokenizer:
    """A vocabulary of `names` besides <s> and </s>."""
    vocabulary = {name: i for i, name in enumerate(("<unk>", "<s>", "</s>", *names))}
    model = models.BPE(vocabulary, list(merges), unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    return tokenizer


def sentencepiece_like() -> tokenizers.Tokenizer:
    tokenizer = pieces("\u2581", "<0x0A>")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = pieces("a", "\u010a", "\u010a\u010a", merges=(("\u010a", "\u010a"),))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def merged() -> tokenizers.Tokenizer:
    tokenizer = pieces("\u2581", "\n", "\u2581\n", merges=(("\u2581", "\n"),))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def normalised() -> tokenizers.Tokenizer:
    """Newlines of a text become blanks; the vocabulary holds one all the same."""
    tokenizer = sentencepiece_like()
    tokenizer.normalizer = normalizers.Replace("\n", " ")
    return tokenizer


NEWLINES: dict[str, tuple[Callable[[], tokenizers.Tokenizer], str]] = {
    "as text": (lambda: pieces("\n"), "\n"),
    "a byte": (sentencepiece_like, "<0x0A>"),
    "byte-level": (byte_level, "\u010a"),
    "merged": (merged, "\u2581\n"),
    "normalised": (normalised, "<0x0A>"),
}


@pytest.mark.parametrize("name", NEWLINES)
def test_newline(name: str, tmp_path: Path) -> None:
    make, expected = NEWLINES[name]
    make().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.name_of(tokenizer.newline) == expected


def test_no_newline(tmp_path: Path) -> None:
    pieces("a").save(str(tmp_path / "tokenizer.json"))
    assert "has no newline piece" in refusal(Tokenizer, tmp_path / "tokenizer.json")


def test_a_number_is_an_id_of_the_tokenizer() -> None:
    """Of a list the first counts; what is absent says nothing."""
    taken = {0: 0, 1: 1, 9: 9, None: None}
    assert {value: _numbered(value, "key", Path("c.json"), 10) for value in taken} == taken
    assert _numbered([0, 7], "key", Path("c.json"), 10) == 0
    assert _numbered([], "key", Path("c.json"), 10) is None
    for value in (-1, 10, True, 2.0, "2", [10]):
        message = refusal(_numbered, value, "key", Path("c.json"), 10)
        assert "must be an id of the tokenizer.json beside it, from 0 to 9" in message
