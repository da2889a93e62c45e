"""LLaMA-3's tokenizer, in Meta's file and in Hugging Face's: ids of the libraries' own, spans by text, and files that are not one."""

import base64
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaTokenizerFast

from support.backbones import NUM_RANKS, make_llama_3_tokenizers
from support.errors import refusal
from support.toy_dataset import ToyData
from vico.data.prompts import ANSWER_TEXT, Prompts, option_text, question_text
from vico.data.tokenizer import LLAMA_3_WORDS, Tokenizer, find_tokenizer
from vico.data.types import VIDEO_SLOT, Question

QUESTION = Question(
    0,
    "0",
    "v",
    "CW",
    "why does Answer: (A) the dog  ",
    ("a red ball", "<|end_of_text|>", "Question: é 犬?", " ", "(E)"),
    2,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tokenizer in both files, whose names say nothing."""
    home = tmp_path_factory.mktemp("tokenizers")
    make_llama_3_tokenizers(home / "meta", home / "hf")
    return {name: home / name for name in ("meta", "hf")}


@pytest.fixture(scope="module", params=["meta", "hf"])
def tokenizer(request: pytest.FixtureRequest, files: dict[str, Path]) -> Tokenizer:
    return Tokenizer(files[request.param])


def pieces(tokenizer: Tokenizer, ids: Any) -> list[str]:
    return [tokenizer.decode([i]) for i in ids]


def test_special_ids_lie_behind_the_pieces(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (
        NUM_RANKS + 256,
        NUM_RANKS,
        NUM_RANKS + 1,
    )
    assert tokenizer.decode([tokenizer.newline]) == "\n"


def test_ids_are_those_of_tiktoken(tokenizer: Tokenizer, files: dict[str, Path]) -> None:
    content = (line.split() for line in files["meta"].read_bytes().splitlines())
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in content}
    own = tiktoken.Encoding("x", pat_str=LLAMA_3_WORDS, mergeable_ranks=ranks, special_tokens={})
    for text in (
        option_text(QUESTION),
        question_text(QUESTION),
        ANSWER_TEXT,
        "\n\n a  b\n",
        "12345 it's",
        "é犬🐕",
        "",
    ):
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


def test_targets_are_the_method_s(tokenizer: Tokenizer) -> None:
    prompts = Prompts(tokenizer, 10, 512, 384, False)
    vqa, vaq, cap = (
        prompts.vqa(QUESTION, 2),
        prompts.vaq(QUESTION, 2),
        prompts.caption("the dog: a red ball."),
    )
    for sequence in (vqa, vaq, cap):
        assert sequence.tokens[0] == tokenizer.bos and sequence.tokens[-1] == tokenizer.eos
        slots = range(sequence.video_start, sequence.video_start + 10)
        assert {sequence.tokens[t] for t in slots} == {VIDEO_SLOT} and sequence.tokens[
            slots.stop
        ] == tokenizer.newline
    assert "".join(pieces(tokenizer, (vqa.tokens[t] for t in vqa.targets[:-1]))) == " (C)"
    assert (
        "".join(pieces(tokenizer, (vaq.tokens[t] for t in vaq.targets[:-1])))
        == " Why does answer: (a) the dog?"
    )
    context = pieces(tokenizer, cap.tokens[cap.video_start + 11 : cap.targets.start])
    assert "".join(context).startswith("Description:") and len(context) == 3 + len(
        tokenizer.encode("Description:")
    )
    assert vqa.targets.stop == len(vqa.tokens) and QUESTION.options[1] in tokenizer.decode(
        list(vqa.tokens[vqa.video_start + 10 :])
    )


def test_workers_get_the_same(tokenizer: Tokenizer) -> None:
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a red ball") == tokenizer.encode(
        "a red ball"
    )


def test_a_sentencepiece_in_json_makes_the_same_sequences(toy: ToyData, tmp_path: Path) -> None:
    LlamaTokenizerFast.from_pretrained(toy.llama).backend_tokenizer.save(
        str(tmp_path / "tokenizer.json")
    )
    own, other = (
        Prompts(Tokenizer(p), 10, 512, 384, False)
        for p in (toy.llama / "tokenizer.model", tmp_path / "tokenizer.json")
    )
    for task in ("vqa", "vaq", "qav"):
        assert own.question_sequence(task, QUESTION, 2) == other.question_sequence(
            task, QUESTION, 2
        )
    assert own.caption("the dog: a red ball. é") == other.caption("the dog: a red ball. é")


def test_where_a_tokenizer_may_lie(files: dict[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "8B"
    own.mkdir()
    assert (
        find_tokenizer(tmp_path, own) == tmp_path / "tokenizer.model"
    )  # there is none: the one that will be missed
    (own / "tokenizer.json").write_bytes(files["hf"].read_bytes())
    assert find_tokenizer(tmp_path, own) == own / "tokenizer.json"
    (own / "tokenizer.model").write_bytes(files["meta"].read_bytes())
    assert find_tokenizer(tmp_path, own) == own / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(files["meta"].read_bytes())
    assert find_tokenizer(tmp_path, own) == tmp_path / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(files["meta"].read_bytes()[:-1])
    assert "8B/tokenizer.model: is another tokenizer than" in refusal(find_tokenizer, tmp_path, own)


def lines(change: Any) -> Any:
    def damaged(files: dict[str, Path]) -> bytes:
        content = files["meta"].read_bytes().splitlines()
        change(content)
        return b"\n".join(content) + b"\n"

    return damaged


def js(**changes: Any) -> Any:
    return lambda files: json.dumps(json.loads(files["hf"].read_text()) | changes).encode()


HOSTILE: dict[str, tuple[Any, str]] = {
    "a line twice": (
        lines(lambda c: c.insert(9, c[8])),
        "it:10: ranks must count from 0, each piece once",
    ),
    "a line lost": (lines(lambda c: c.pop(9)), "it:10: ranks must count from 0"),
    "half a line": (
        lines(lambda c: c.__setitem__(-1, b"YWJ")),
        f"it:{NUM_RANKS}: not a piece in base64 and its rank; copy ",
    ),
    "another word": (lines(lambda c: c.__setitem__(20, b"!! 20")), "it:21: not a piece in base64"),
    "bytes lost": (
        lines(lambda c: c.__delitem__(slice(200, None))),
        "lacks 56 of the 256 single bytes",
    ),
    "JSON cut off": (lambda files: files["hf"].read_bytes()[:500], "Expecting value; correct "),
    "no model": (js(model={}), "not a tokenizer.json that the package tokenizers reads ("),
    "no BOS": (js(added_tokens=[]), "the tokenizer has no BOS or no EOS piece"),
    "Latin": (lambda files: b'{"\xe9": 1}', "not UTF-8 (byte offset 2)"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_line(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    content, part = HOSTILE[name]
    (tmp_path / "it").write_bytes(content(files))
    assert part in refusal(Tokenizer, tmp_path / "it")


@pytest.mark.parametrize("name, package", [("meta", "tiktoken"), ("hf", "tokenizers")])
def test_a_missing_package_is_named(
    name: str, package: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install '.[llama3]'" in refusal(Tokenizer, files[name])
