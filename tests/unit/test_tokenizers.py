"""LLaMA-3's tokenizer in Meta's file and in Hugging Face's: ids, spans, and damaged files."""

import base64
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaTokenizerFast

from support.backbones import NUM_PIECES, make_llama_3_tokenizers
from support.errors import refusal
from support.toy_dataset import ToyData
from vico.data.prompts import ANSWER_TEXT, Prompts, option_text, question_text
from vico.data.tokenizer import LLAMA_3_WORDS, Tokenizer, find_tokenizer
from vico.data.types import VIDEO_SLOT, Question, TokenSequence

OPTIONS = ("a red ball", "<|end_of_text|>", "Question: é 犬?", " ", "(E)")
QUESTION = Question(0, "0", "v", "CW", "why does Answer: (A) the dog  ", OPTIONS, 2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tokenizer in both files. Their names do not tell the kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    make_llama_3_tokenizers(folder / "meta", folder / "hf")
    return {name: folder / name for name in ("meta", "hf")}


@pytest.fixture(scope="module", params=["meta", "hf"])
def tokenizer(request: pytest.FixtureRequest, files: dict[str, Path]) -> Tokenizer:
    return Tokenizer(files[request.param])


def pieces(tokenizer: Tokenizer, ids: Any) -> list[str]:
    return [tokenizer.decode([i]) for i in ids]


def target_text(tokenizer: Tokenizer, sequence: TokenSequence) -> str:
    """The targets without EOS."""
    return "".join(pieces(tokenizer, (sequence.tokens[t] for t in sequence.targets[:-1])))


def test_special_ids_lie_behind_the_pieces(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == NUM_PIECES + 256
    assert (tokenizer.bos, tokenizer.eos) == (NUM_PIECES, NUM_PIECES + 1)
    assert tokenizer.decode([tokenizer.newline]) == "\n"


def test_ids_are_those_of_tiktoken(tokenizer: Tokenizer, files: dict[str, Path]) -> None:
    content = (line.split() for line in files["meta"].read_bytes().splitlines())
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in content}
    own = tiktoken.Encoding("x", pat_str=LLAMA_3_WORDS, mergeable_ranks=ranks, special_tokens={})
    prompt = (option_text(QUESTION), question_text(QUESTION), ANSWER_TEXT)
    for text in (*prompt, "\n\n a  b\n", "12345 it's", "é犬🐕", ""):
        assert tokenizer.encode(text) == own.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_ends_are_where_pieces_end(files: dict[str, Path], text: str) -> None:
    for path in files.values():
        model = Tokenizer(path)
        ids, ends = model.encode_with_ends(text)
        assert ids == model.encode(text) and ends == sorted(ends) and len(ends) == len(ids)
        assert (ends[-1:] or [0]) == [len(text)]
        for i, end in enumerate(ends):
            if i + 1 == len(ends) or ends[i + 1] != end:  # not inside a character's bytes
                assert model.decode(ids[: i + 1]).rstrip("\ufffd") in (text[:end], text[: end - 1])


def test_targets(tokenizer: Tokenizer) -> None:
    """Those of the method, found by text."""
    prompts = Prompts(tokenizer, 10, 512, 384, False)
    vqa, vaq = prompts.vqa(QUESTION, 2), prompts.vaq(QUESTION, 2)
    cap = prompts.caption("the dog: a red ball.")
    for sequence in (vqa, vaq, cap):
        assert sequence.tokens[0] == tokenizer.bos and sequence.tokens[-1] == tokenizer.eos
        slots = range(sequence.video_start, sequence.video_start + 10)
        assert {sequence.tokens[t] for t in slots} == {VIDEO_SLOT}
        assert sequence.tokens[slots.stop] == tokenizer.newline
    assert target_text(tokenizer, vqa) == " (C)"
    assert target_text(tokenizer, vaq) == " Why does answer: (a) the dog?"
    context = pieces(tokenizer, cap.tokens[cap.video_start + 11 : cap.targets.start])
    assert "".join(context).startswith("Description:")
    assert len(context) == 3 + len(tokenizer.encode("Description:"))
    assert vqa.targets.stop == len(vqa.tokens)
    assert QUESTION.options[1] in tokenizer.decode(list(vqa.tokens[vqa.video_start + 10 :]))


def test_workers_get_the_same(tokenizer: Tokenizer) -> None:
    received = pickle.loads(pickle.dumps(tokenizer))
    assert received.encode("a red ball") == tokenizer.encode("a red ball")


def test_sentencepiece_in_json(toy: ToyData, tmp_path: Path) -> None:
    """It makes the same sequences."""
    converted = LlamaTokenizerFast.from_pretrained(toy.llama).backend_tokenizer
    converted.save(str(tmp_path / "tokenizer.json"))
    own = Prompts(Tokenizer(toy.llama / "tokenizer.model"), 10, 512, 384, False)
    other = Prompts(Tokenizer(tmp_path / "tokenizer.json"), 10, 512, 384, False)
    for task in ("vqa", "vaq", "qav"):
        expected = own.question_sequence(task, QUESTION, 2)
        assert other.question_sequence(task, QUESTION, 2) == expected
    assert own.caption("the dog: a red ball. é") == other.caption("the dog: a red ball. é")


def test_bos_is_added_where_its_makers_do(files: dict[str, Path], tmp_path: Path) -> None:
    """Every LLaMA's do. A tokenizer.json says it, in one processor or in a list of them."""
    assert all(Tokenizer(path).adds_bos for path in files.values())
    content = json.loads(files["hf"].read_text())
    template = content["post_processor"]["processors"][1]
    path = tmp_path / "tokenizer.json"
    bare = {**template, "single": template["single"][1:]}
    for processor, adds in ((template, True), (bare, False), (None, False)):
        path.write_text(json.dumps(content | {"post_processor": processor}))
        assert Tokenizer(path).adds_bos == adds


def test_special_tokens_are_no_text(files: dict[str, Path]) -> None:
    for path in files.values():
        tokenizer = Tokenizer(path)
        ids = [tokenizer.bos, *tokenizer.encode("a red ball"), tokenizer.eos]
        assert tokenizer.decode(ids).strip() == "a red ball"


def test_find_tokenizer(files: dict[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "8B"
    own.mkdir()
    # There is none: the path that the error will name.
    assert find_tokenizer(tmp_path, own) == tmp_path / "tokenizer.model"
    (own / "tokenizer.json").write_bytes(files["hf"].read_bytes())
    assert find_tokenizer(tmp_path, own) == own / "tokenizer.json"
    (own / "tokenizer.model").write_bytes(files["meta"].read_bytes())
    assert find_tokenizer(tmp_path, own) == own / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(files["meta"].read_bytes())
    assert find_tokenizer(tmp_path, own) == tmp_path / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(files["meta"].read_bytes()[:-1])
    # In Hugging Face's layout a model has its own.
    (own / "config.json").write_text("{}")
    assert find_tokenizer(tmp_path, own) == own / "tokenizer.model"
    (own / "config.json").unlink()
    assert "8B/tokenizer.model: is another tokenizer than" in refusal(find_tokenizer, tmp_path, own)


Damage = Callable[[dict[str, Path]], bytes]  # from the files to the bytes of a damaged one


def lines(change: Callable[[list[bytes]], None]) -> Damage:
    """Meta's file after `change` of its lines."""

    def damaged(files: dict[str, Path]) -> bytes:
        content = files["meta"].read_bytes().splitlines()
        change(content)
        return b"\n".join(content) + b"\n"

    return damaged


def json_with(**changes: Any) -> Damage:
    """Hugging Face's file with other values."""
    return lambda files: json.dumps(json.loads(files["hf"].read_text()) | changes).encode()


def repeat_line(content: list[bytes]) -> None:
    content.insert(9, content[8])


def lose_line(content: list[bytes]) -> None:
    content.pop(9)


def cut_last_line(content: list[bytes]) -> None:
    content[-1] = b"YWJ"


def put_another_word(content: list[bytes]) -> None:
    content[20] = b"!! 20"


def lose_bytes(content: list[bytes]) -> None:
    del content[200:]


NOT_BASE64 = "not a piece in base64 and its rank; copy "
DAMAGED: dict[str, tuple[Damage, str]] = {
    "a line twice": (lines(repeat_line), "it:10: ranks must count from 0, each piece once"),
    "a line lost": (lines(lose_line), "it:10: ranks must count from 0"),
    "half a line": (lines(cut_last_line), f"it:{NUM_PIECES}: {NOT_BASE64}"),
    "another word": (lines(put_another_word), "it:21: not a piece in base64"),
    "bytes lost": (lines(lose_bytes), "lacks 56 of the 256 single bytes"),
    "JSON cut off": (lambda files: files["hf"].read_bytes()[:500], "Expecting value; correct "),
    "no model": (
        json_with(model={}),
        "not a tokenizer.json that the package tokenizers reads (",
    ),
    "no EOS": (json_with(added_tokens=[]), "the tokenizer has no EOS piece"),
    "Latin": (lambda files: b'{"\xe9": 1}', "not UTF-8 (byte offset 2)"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    damage, part = DAMAGED[name]
    (tmp_path / "it").write_bytes(damage(files))
    assert part in refusal(Tokenizer, tmp_path / "it")


@pytest.mark.parametrize("name, package", [("meta", "tiktoken"), ("hf", "tokenizers")])
def test_a_missing_package_is_named(
    name: str, package: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install '.[llama3]'" in refusal(Tokenizer, files[name])
