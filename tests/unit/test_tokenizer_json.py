"""A tokenizer.json that another version of `tokenizers` saved again is the same tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import LlamaTokenizerFast

from support.backbones import make_llama_3_tokenizers
from support.toy_dataset import ToyData
from vico.checkpoint.fingerprint import DIGEST_LENGTH, of_tokenizer
from vico.data.tokenizer_json import digest, earlier_digest
from vico.io.digest import digest_json

Content = dict[str, Any]


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizers")
    make_llama_3_tokenizers(folder / "meta", folder / "hf")
    return (folder / "hf").read_text()


@pytest.fixture(scope="module")
def llama_2(toy: ToyData) -> str:
    """As transformers converted LLaMA-2's: with a Metaspace, and ids of single bytes."""
    model = LlamaTokenizerFast.from_pretrained(toy.llama).backend_tokenizer
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    return str(model.to_str())


def joined_merges(content: Content) -> None:
    """Before 0.20."""
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def as_in_0_13(content: Content) -> None:
    joined_merges(content)
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    del content["model"]["ignore_merges"]


def as_in_0_15(content: Content) -> None:
    as_in_0_13(content)
    content["pre_tokenizer"] |= {"prepend_scheme": "always", "str_rep": "▁"}


def without_defaults(content: Content) -> None:
    del content["decoder"]["use_regex"]
    content["model"] = {k: v for k, v in content["model"].items() if v is not None}
    content["added_tokens"].sort(key=lambda token: token["id"])


def check_the_same(text: str, reword: Callable[[Content], None]) -> None:
    """To tokenizers itself, and to the digest."""
    content = json.loads(text)
    reword(content)
    assert content != json.loads(text)
    again = tokenizers.Tokenizer.from_str(json.dumps(content)).to_str()
    assert again == tokenizers.Tokenizer.from_str(text).to_str(), "the test's own premise"
    assert digest(content) == digest(json.loads(text)) == digest(json.loads(again))


def test_words_of_other_versions(llama_2: str, llama_3: str) -> None:
    for text, reword in (
        (llama_3, joined_merges),
        (llama_3, without_defaults),
        (llama_2, joined_merges),
        (llama_2, as_in_0_13),
        (llama_2, as_in_0_15),
    ):
        check_the_same(text, reword)


def changed(text: str, place: str, key: str, value: Any) -> Content:
    content: Content = json.loads(text)
    content[place][key] = value
    return content


def test_another_function_is_another_digest(llama_2: str, llama_3: str) -> None:
    two, three = json.loads(llama_2), json.loads(llama_3)
    merges = three["model"]["merges"]
    vocab = three["model"]["vocab"]
    others = [
        two,
        three,
        changed(llama_3, "model", "ignore_merges", False),
        changed(llama_3, "model", "merges", [merges[1], merges[0], *merges[2:]]),
        changed(llama_3, "model", "vocab", vocab | {"a": vocab["b"], "b": vocab["a"]}),
        changed(llama_3, "model", "byte_fallback", True),
        changed(llama_3, "decoder", "use_regex", False),
        changed(llama_2, "pre_tokenizer", "prepend_scheme", "never"),
        changed(llama_2, "pre_tokenizer", "split", False),
        three | {"normalizer": {"type": "NFC"}},
        three | {"added_tokens": three["added_tokens"][:-1]},
    ]
    assert len({digest(content) for content in others}) == len(others)
    assert digest(three | {"truncation": None}) == digest(three)


def test_pieces_that_are_named_as_fields(llama_3: str) -> None:
    """A vocabulary may hold the pieces `merges` and `type`, and ids that compare as false."""
    content = json.loads(llama_3)
    content["model"]["vocab"] |= {"merges": 0, "type": 1}
    other = json.loads(json.dumps(content))
    other["model"]["vocab"]["merges"] = 1
    assert digest(content) != digest(other) and digest(content) != digest(json.loads(llama_3))


def test_checkpoints_with_the_earlier_digest_go_on(llama_3: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(llama_3)
    content = json.loads(llama_3)
    new, earlier = digest(content)[:DIGEST_LENGTH], earlier_digest(content)[:DIGEST_LENGTH]
    assert earlier != new
    small = {"model": {"merges": ["a b"], "vocab": {"a": 0}}}
    assert earlier_digest(small)[:DIGEST_LENGTH] == "d8a8ae0146003661", "as it was recorded"
    assert of_tokenizer(path, None) == of_tokenizer(path, new) == new
    assert of_tokenizer(path, earlier) == earlier
    assert of_tokenizer(path, "0" * DIGEST_LENGTH) == new


@pytest.mark.parametrize(
    ("part", "form"),
    [
        ({"type": "ByteLevel"}, {"type": "ByteLevel", "use_regex": True}),
        ({"type": "ByteLevel", "use_regex": False}, {"type": "ByteLevel"}),
        ({"type": "Metaspace", "str_rep": "_"}, {"prepend_scheme": "always", "split": True}),
        (
            {"type": "Metaspace", "add_prefix_space": False},
            {"prepend_scheme": "never", "split": True},
        ),
        (
            {"type": "Metaspace", "prepend_scheme": "first", "split": False},
            {"prepend_scheme": "first"},
        ),
        ({"merges": ["a b", ["c", "d e"]]}, {"merges": [["a", "b"], ["c", "d e"]]}),
        ({"merges": None, "add_prefix_space": True}, {"add_prefix_space": True}),
        ({"a": None, "b": False, "c": 0, "d": ""}, {"c": 0, "d": ""}),
        ({"a": [{"b": None}, False, [None]]}, {"a": [{}, False, [None]]}),
    ],
)
def test_what_is_digested(part: Content, form: Content) -> None:
    """In a checkpoint it stands for the tokenizer, so it must stay the same for ever."""
    if part.get("type") == "Metaspace":
        form = {"type": "Metaspace", **form}
    unused = {"post_processor": {"x": 1}, "truncation": {"x": 1}, "padding": {"x": 1}}
    assert digest({"part": part, **unused}) == digest_json({"part": form})
    nothing = dict.fromkeys(unused)
    assert earlier_digest({"part": part, **unused}) == digest_json({"part": part, **nothing})
