"""Data sets, weights and tokens by name: tables of what is published, and of what may be asked."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from support.backbones import NUM_PIECES, make_llama_3_tokenizers
from support.errors import refusal
from support.letters import ask
from support.toy_dataset import ToyData
from vico.data import datasets, special_tokens, tokenizer
from vico.data.datasets import Dataset, accuracy_groups, count_equal_options, find_dataset
from vico.data.mixture import (
    DatasetChoice,
    dataset_names,
    epoch_count,
    join_paths,
    parse_datasets,
    paths_by_dataset,
)
from vico.data.special_tokens import SpecialIds
from vico.data.tokenizer import Tokenizer, find_tokenizer
from vico.data.types import TokenSequence

# ---- data sets ----------------------------------------------------------------------------------


def test_what_is_known_of_published_data_sets() -> None:
    """Questions for training, as published, and tokens of one, as measured."""
    known = {
        "nextqa": (34132, 96, 1.0),
        "star": (45731, 98, 1.0),
        "tvqa": (122039, 121, 3.0),
        "intentqa": (12119, 98, 1.0),
    }
    found = {
        name: (d.num_train_questions, d.mean_question_tokens, d.frames_per_second)
        for name, d in datasets.DATASETS.items()
    }
    assert found == known
    assert [name for name, d in datasets.DATASETS.items() if d.has_dialogue] == ["tvqa"]
    assert not any(d.is_general for d in datasets.DATASETS.values())
    usual = Dataset(Path, list)
    assert (usual.groups, usual.mean_of, usual.has_dialogue, usual.is_general) == (
        None,
        (),
        False,
        False,
    )
    assert (usual.num_train_questions, usual.mean_question_tokens) == (34132, 96)


def write_set(folder: Path, name: str) -> Path:
    row = {"video": "v", "question": "why", "options": ["a", "b"], "answer": 0}
    (folder / name).mkdir()
    (folder / name / "val.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return folder / name


def test_names_of_data_sets(tmp_path: Path) -> None:
    """The published ones, then folders with a table, by name; one of a published name is no other.

    A folder that cannot be listed holds none.
    """
    published = ["nextqa", "star", "tvqa", "intentqa"]
    for name in ("zoo", "star", "abc"):
        write_set(tmp_path, name)
    (tmp_path / "empty").mkdir()
    assert datasets.names_in(tmp_path) == [*published, "abc", "zoo"]
    assert datasets.names_in(tmp_path / "none") == published
    assert find_dataset("zoo", tmp_path / "zoo").is_general
    assert not find_dataset("star", tmp_path / "star").is_general
    (tmp_path / "empty" / "notes.txt").touch()
    start = "--dataset {}: there is no such data set; it can be nextqa, star, tvqa, intentqa"
    expected = "or a folder with train, val or test.jsonl (or .csv) in --data_path"
    said = refusal(find_dataset, "empty", tmp_path / "empty")
    holds = f"; {tmp_path / 'empty'} holds notes.txt: none is such a table"
    assert said.replace("'", "") == f"{start.format('empty')}, abc, zoo, {expected}{holds}"
    said = refusal(find_dataset, "x/zoo", tmp_path / "zoo")
    assert said == f"{start.format(repr('x/zoo'))}, {expected}"
    assert "; did you mean 'zoo'?" in refusal(find_dataset, "ZOOO", tmp_path / "ZOOO")


def test_what_a_folder_says_of_itself(tmp_path: Path) -> None:
    """In dataset.yaml, of a data set in the general schema."""
    folder = write_set(tmp_path, "zoo")
    plain = find_dataset("zoo", folder)
    assert (plain.groups, plain.mean_of, plain.has_dialogue) == (None, (), False)
    assert (plain.frames_per_second, plain.is_general) == (1.0, True)
    lines = ["frames_per_second: 2.5", "dialogue: true", "mean_of: [x, y]"]
    lines.append("groups: {x: [b, c], y: [a]}")
    (folder / "dataset.yaml").write_text("\n".join(lines), encoding="utf-8")
    found = find_dataset("zoo", folder)
    assert found.groups == {"b": "x", "c": "x", "a": "y"} and found.mean_of == ("x", "y")
    assert (found.frames_per_second, found.has_dialogue, found.is_general) == (2.5, True, True)


def test_groups_of_types() -> None:
    """In the table's order, without those that are empty; an unknown type comes last."""
    table = {"c": "second", "a": "first", "b": "first"}
    grouped = Dataset(Path, list, table)
    assert list(accuracy_groups(grouped, ["b", "c", "a", "b"]).items()) == [
        ("second", ["c"]),
        ("first", ["a", "b"]),
    ]
    assert accuracy_groups(grouped, ["a", "x", "w"]) == {"first": ["a"], "(unknown)": ["w", "x"]}
    plain = Dataset(Path, list)
    assert accuracy_groups(plain, ["z", "acc", "a"]) == {"a": ["a"], "'acc'": ["acc"], "z": ["z"]}
    for name in "split n n_total n_without_subtitles acc Mean all cognition".split():
        assert accuracy_groups(plain, [name]) == {f"'{name}'": [name]}


def test_equal_options() -> None:
    options = (("a", "b"), ("a", "a"), ("a", "b", "a"), ("a",), ())
    assert count_equal_options([ask(0, options=texts) for texts in options]) == 2


# ---- weights and paths --------------------------------------------------------------------------


def test_weights_up_to_1000() -> None:
    assert parse_datasets("a:1000") == (DatasetChoice("a", 1000.0),)
    for number in ("1000.5", "1019", "1e4", "0", "-0.0"):
        said = refusal(parse_datasets, f"a:{number}")
        allowed = "it must be a number above 0, and at most 1000"
        assert said == f"--dataset 'a:{number}': the weight of 'a' is '{number}'; {allowed}"
    assert parse_datasets("a:0.001")[0].weight == 0.001
    assert dataset_names("b:2, a") == ("b", "a") and DatasetChoice("a").weight == 1
    assert [epoch_count(DatasetChoice("a", w), 10) for w in (0.06, 0.1, 1, 2.5)] == [1, 1, 10, 25]
    said = refusal(epoch_count, DatasetChoice("a", 0.04), 10)
    end = "an epoch would hold none of its 10 training questions; raise the weight"
    assert said == f"--dataset a:0.04: {end}"


NAMES = ("a", "b.c", "d")
PATHS = st.dictionaries(
    st.sampled_from(NAMES), st.sampled_from([Path("/x/y.z"), Path("x=y"), Path("x,y"), Path("é x")])
)


@settings(max_examples=30, deadline=None)
@given(PATHS, st.sampled_from([1, 3]))
def test_paths_are_joined_and_parted(paths: dict[str, Path], num_datasets: int) -> None:
    names = NAMES[:num_datasets]
    paths = {name: path for name, path in paths.items() if name in names}
    joined = join_paths(paths, num_datasets)
    assert (joined is None) == (not paths)
    assert paths_by_dataset("features", joined, names) == paths
    if num_datasets == 1 and paths:
        assert joined == paths["a"]


# ---- tokens -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a LLaMA-3 tokenizer in Meta's file and in Hugging Face's."""
    made = tmp_path_factory.mktemp("tokenizers")
    make_llama_3_tokenizers(made / "meta", made / "hf")
    return made


@pytest.mark.parametrize("kind", ["meta", "hf"])
def test_names_of_tokens(folder: Path, kind: str) -> None:
    """BOS and EOS by LLaMA-3's names; other pieces by themselves; none for a text of several."""
    found = Tokenizer(folder / kind)
    assert found.name_of(NUM_PIECES) == "<|begin_of_text|>"
    assert found.name_of(NUM_PIECES + 1) == "<|end_of_text|>"
    (letter,) = found.encode("z")
    assert found.name_of(letter) == "z" and found._backend.find_id("z") == letter
    assert found._backend.find_id("z\n~") is None
    assert (found.has_bos, found.adds_bos) == (True, True)
    if kind == "hf":
        assert found.name_of(10**6) == ""


def test_names_of_sentencepiece(toy: ToyData) -> None:
    found = Tokenizer(toy.llama / "tokenizer.model")
    assert (found.name_of(found.bos), found.name_of(found.eos)) == ("<s>", "</s>")
    assert found._backend.find_id("</s>") == found.eos
    assert found._backend.find_id("no such piece") is None
    assert found.adds_bos and found.vocab_size == len(
        {found.name_of(i) for i in range(found.vocab_size)}
    )


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    end = "--llama_model_path must name the folder that holds tokenizer.model"
    assert refusal(Tokenizer, path) == f"{path}: No such file or directory; {end}"
    for content in (b"", b"odd"):
        path.write_bytes(content)
        end = "not a sentencepiece model; copy tokenizer.model of the LLaMA weights again"
        assert refusal(Tokenizer, path) == f"{path}: {end}"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert refusal(Tokenizer, path).startswith(f"{path}: the tokenizer is a git-lfs pointer (43")
    path.write_bytes(b" {")
    assert refusal(Tokenizer, path).startswith("tokenizer.model:1: column 3: ")


def save_pieces(folder: Path, vocabulary: dict[str, int]) -> Path:
    """A tokenizer.json of these pieces."""
    model = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    model.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_id_0_may_be_special(tmp_path: Path) -> None:
    """As in SmolLM's."""
    found = Tokenizer(save_pieces(tmp_path, {"<|endoftext|>": 0, "\n": 1}))
    assert (found.bos, found.eos, found.has_bos, found.newline) == (0, 0, True, 1)
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}', encoding="utf-8")
    said = refusal(Tokenizer, save_pieces(tmp_path, {}))
    assert "'eos_token_id' is 0 and must be an id of the tokenizer.json beside it" in said


def test_a_tokenizer_without_bos_adds_none(folder: Path, tmp_path: Path) -> None:
    """Whatever its post-processor puts first: nobody knows its id."""
    content = json.loads((folder / "hf").read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["content"] = token["content"].replace("<|begin_of_text|>", "<|begin|>")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    names = '{"eos_token": "<|end_of_text|>"}'
    (tmp_path / "tokenizer_config.json").write_text(names, encoding="utf-8")
    found = Tokenizer(path)
    assert not found.has_bos and not found.adds_bos and found.bos == found.eos


def test_where_a_tokenizer_is_found(folder: Path, tmp_path: Path) -> None:
    """A model in Hugging Face's layout without its own takes the one of all models."""
    own = tmp_path / "8B"
    own.mkdir()
    (own / "config.json").write_text("{}", encoding="utf-8")
    shared = tmp_path / "tokenizer.model"
    shared.write_bytes((folder / "meta").read_bytes())
    assert find_tokenizer(tmp_path, own) == shared
    (own / "config.json").unlink()
    (own / "tokenizer.model").mkdir()
    end = "Is a directory; the tokenizer must be a readable file"
    assert refusal(find_tokenizer, tmp_path, own) == f"{own / 'tokenizer.model'}: {end}"


def test_numbers_of_seven_bits() -> None:
    """A byte below 128 is the last one."""
    varint = tokenizer._varint
    assert varint(b"\x7f\x01", 0) == (127, 1) and varint(b"\x80\x01\x01", 0) == (128, 2)


def test_digests_of_tokenizers(folder: Path, tmp_path: Path) -> None:
    """Ends of lines are no part of Meta's file; a tokenizer.json has one of its own words, too."""
    meta = (folder / "meta").read_bytes()
    (tmp_path / "a").write_bytes(meta.replace(b"\n", b"\r\n"))
    (digest,) = tokenizer.content_digests(folder / "meta")
    assert tokenizer.content_digests(tmp_path / "a") == [digest]
    first, second = tokenizer.content_digests(folder / "hf")
    assert len({digest, first, second}) == 3
    (tmp_path / "b").write_bytes(b"\n " + (folder / "hf").read_bytes())
    assert tokenizer.content_digests(tmp_path / "b") == [first, second]
    (tmp_path / "b").write_bytes(b"{")
    assert refusal(tokenizer.content_digests, tmp_path / "b").startswith("b:1: column 2: ")


def test_known_names_come_in_pairs() -> None:
    """LLaMA's before others'; half a pair is none."""

    def ids(*names: str) -> SpecialIds:
        return special_tokens.by_known_names({n: i for i, n in enumerate(names)}.get)

    assert ids("<s>", "</s>", "<|endoftext|>") == SpecialIds(0, 1)
    assert ids("<s>", "<|endoftext|>") == SpecialIds(1, 1)
    assert ids("</s>", "<|end_of_text|>", "<|begin_of_text|>") == SpecialIds(2, 1)
    assert ids("<s>", "<|begin_of_text|>") == ids() == SpecialIds(-1, -1)


def test_numbers_of_a_sequence() -> None:
    """The last target is no input; a task of frames has its targets in the slots."""
    tokens = (1, 5, -1, -1, 2)
    frames = TokenSequence("qav", tokens, range(2, 4), video_start=2)
    text = TokenSequence("vqa", tokens, range(4, 5), video_start=2)
    assert (frames.num_inputs, text.num_inputs) == (3, 4)
    assert frames.predicts_frames and not text.predicts_frames
    assert (frames.task, np.array(text.tokens).min()) == ("qav", -1)
