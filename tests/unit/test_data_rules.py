"""Small rules of data, as tables: where it is cut, what it is called, and what is said of it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from support.errors import refusal
from support.feature_files import questions_about, save
from vico.data import evaluation_batches, feature_files, length_stats, text_windows, tokenizer
from vico.data.features import Features, FeaturesInMemory, Scan, common_width
from vico.data.length_stats import Cuts, Lengths, QuestionLengths
from vico.data.mapped_numbers import map_npy, mapped_numbers
from vico.data.micro_batches import num_tokens, question_characters
from vico.data.text_windows import KEPT_TOKENS, KeptTexts, Text, Texts, Window
from vico.data.types import Question
from vico.data.video_ids import VideoIds, reduced
from vico.model.config import DEFAULT_WINDOW

# ---- where an evaluation is cut -----------------------------------------------------------------


def question(video: str, characters: int = 6) -> Question:
    """With as many characters as are counted."""
    return Question(0, "q", video, "CW", "why", ("a", "b" * (characters - 5)), 0, dialogue="d")


def test_questions_of_a_clip_are_scored_together() -> None:
    """A forward takes no more once it has 2,048 tokens, by a guess of four characters each."""
    full = 4 * (2048 - 32)
    assert question_characters(question("v", full)) == full
    assert evaluation_batches.guess_tokens(question("v", full)) == 2048
    assert evaluation_batches.guess_tokens(question("v", full - 1)) == 2047
    order = [question("a", full), question("b"), question("a"), question("c", full)]
    assert evaluation_batches.divide(order) == [[0], [2, 1, 3]]
    almost = [question("a", full - 1), question("b"), question("a"), question("c")]
    assert evaluation_batches.divide(almost) == [[0, 2], [1, 3]]
    assert evaluation_batches.divide([]) == []
    other = [question("a"), replace(question("a"), feature_rows=(0, 1)), question("a")]
    assert evaluation_batches.divide(other) == [[0, 2, 1]]


@pytest.mark.parametrize(
    ("world_size", "shares"),
    [
        (1, [["a", "b", "c", "d", "e"]]),
        (2, [["a", "c", "e"], ["b", "d", ""]]),
        (3, [["a", "d"], ["b", "e"], ["c", ""]]),
        (7, [["a"], ["b"], ["c"], ["d"], ["e"], [""], [""]]),
    ],
)
def test_ranks_share_the_forwards(world_size: int, shares: list[list[str]]) -> None:
    """In turns; one that has fewer runs a dummy."""
    chunks = [[letter] for letter in "abcde"]
    for rank, expected in enumerate(shares):
        own = evaluation_batches.share_of(chunks, rank, world_size)
        assert ["".join(chunk) for chunk in own] == expected


# ---- plain text ---------------------------------------------------------------------------------


def text_of(first: int, length: int) -> Text:
    return Text(Path("t"), list(range(first, first + length)), length)


def test_each_token_of_a_text_is_a_target_once() -> None:
    """A window begins with BOS and holds one text; targets are counted through."""
    made = Texts((text_of(10, 5), text_of(20, 2)), bos=1, window=3).windows()
    tokens = [(1, 10, 11), (1, 12, 13), (1, 14), (1, 20, 21)]
    assert [window.sequence.tokens for window in made] == tokens
    assert [(window.start, window.stop) for window in made] == [(0, 2), (2, 4), (4, 5), (5, 7)]
    assert [window.sequence.targets for window in made][2:] == [range(1, 2), range(1, 3)]
    assert [window.sequence.video_start for window in made] == [3, 3, 2, 3]
    of_windows = [SimpleNamespace(sequence=window.sequence) for window in made]
    assert num_tokens(of_windows) == 11  # type: ignore[arg-type]


def test_windows_are_cut_at_2048_tokens() -> None:
    def window(length: int) -> Window:
        return Window(0, length - 1, text_windows.text_sequence((1,) * length))

    for lengths, parts in (
        ([1024, 1024, 1], [[1024, 1024], [1]]),
        ([1024, 1025], [[1024], [1025]]),
        ([3000, 1], [[3000], [1]]),
        ([], []),
    ):
        chunks = text_windows._divide([window(length) for length in lengths])
        found = []
        for chunk in chunks:
            found.append([len(window.sequence.tokens) for window in chunk])
        assert found == parts


def test_every_place_of_a_text_can_be_drawn() -> None:
    """Of all texts, each place with enough tokens behind it once; a short text as a whole."""
    texts = (text_of(1000, KEPT_TOKENS + 2), text_of(5000, 5), text_of(6000, KEPT_TOKENS))
    kept, stops = KeptTexts(Texts(texts, bos=1, window=9)), []

    class Next:
        def integers(self, stop: int) -> int:
            stops.append(stop)
            return len(stops) - 1

    rng: Any = Next()
    drawn = [kept.draw(rng) for _ in range(5)]
    firsts = [(1000, KEPT_TOKENS), (1001, KEPT_TOKENS), (1002, KEPT_TOKENS), (5000, 5)]
    firsts.append((6000, KEPT_TOKENS))
    assert [(s.tokens[1], len(s.tokens) - 1) for s in drawn] == firsts and set(stops) == {5}
    assert {s.tokens[0] for s in drawn} == {1}
    assert drawn[3].tokens == (1, *range(5000, 5005)) and drawn[3].targets == range(1, 6)


def test_the_usual_window() -> None:
    usual = text_windows.usual_window
    assert [usual(None), usual(100), usual(10**6)] == [DEFAULT_WINDOW, 100, DEFAULT_WINDOW]
    assert [usual(None, 7), usual(5, 7)] == [7, 5]


# ---- lengths and cuts ---------------------------------------------------------------------------


def test_cuts_count_the_worst_task() -> None:
    """A question with nothing to lose loses nothing."""
    cuts = Cuts()
    whole = replace(question("v"), dialogue="12345678", options=("abc", "de"))
    cuts.add(whole, [whole, replace(whole, dialogue="12")])
    cuts.add(whole, [replace(whole, dialogue="", options=("a", "")), whole])
    mute = replace(whole, dialogue="")
    cuts.add(mute, [mute, replace(mute, options=("abc", ""))])
    assert cuts == Cuts(16, 14, 1, 15, 6, 2)
    assert cuts.describe() == (
        "87.5 % (14 of 16 characters) of their dialogue (all of it in 1) and "
        "40.0 % (6 of 15 characters) of their options (in 2)"
    )
    assert Cuts().describe() == "" and Cuts(9, 0, 0, 9, 0, 0).describe() == ""


def test_lengths_over_tasks() -> None:
    """The longest task counts, without captions; what just fits is not cut."""
    lengths = {"vqa": 1, "vaq": 3, "cap": 99}
    prompts: Any = SimpleNamespace(
        length=lambda q, task: lengths[task] + len(q.options[1]),
        fit=lambda q, task: replace(q, options=("a", "b" * (9 - lengths[task]))),
    )
    questions = [question("v", 5 + n) for n in (6, 7, 8)]
    measured = length_stats.of_questions(questions, prompts, ["vqa", "cap", "vaq"], 10)
    assert measured.lengths == Lengths({9: 1, 10: 1, 11: 1})
    assert measured.cuts == Cuts(1, 0, 0, 9, 2, 1)
    saved = measured.to_json()
    assert saved["lengths"] == [[9, 1], [10, 1], [11, 1]] and saved["num_measured"] == 3
    assert QuestionLengths.from_json(saved) == measured


def test_lengths_of_captions() -> None:
    """Each thousand is reported."""
    prompts: Any = SimpleNamespace(caption_length=len)
    captions, said = ["a" * (i % 3) for i in range(2500)], list[str]()
    found = length_stats.of_captions(captions, prompts, said.append)
    assert found.counts == {0: 834, 1: 833, 2: 833} and list(found.counts) == [0, 1, 2]
    assert said == [f"measured {n} of 2500 captions" for n in (1000, 2000)]


# ---- features -----------------------------------------------------------------------------------


def test_the_usual_width_of_features(tmp_path: Path) -> None:
    """That of most of the first nine videos; of CLIP where none has any."""
    widths = [8] * 4 + [4] * 5 + [8] * 9
    videos = {f"v{i}": torch.ones(2, width) for i, width in enumerate(widths)}
    features = Features(save(tmp_path / "f.pth", videos))
    assert (features.width, len(features), features.num_bytes) == (
        4,
        18,
        (tmp_path / "f.pth").stat().st_size,
    )
    assert "v3" in features and "v99" not in features
    assert (features.header("v4").length, features.header("v4").num_bytes) == (2, 32)
    assert features.header("v3").fault == "[2, 8] float32"
    assert Features(save(tmp_path / "g.pth", {"v": torch.ones(4)})).width == 768
    memory = FeaturesInMemory({"v": torch.ones(2, 6)}, "these")
    assert (memory.width, memory.paths, memory.num_bytes) == (6, [], 0)
    assert common_width({}) == 0 and common_width({"a": memory, "b": memory}) == 6
    said = refusal(common_width, {"a": features, "b": memory})
    assert said == (
        f"the data sets' features differ: a: {features.path}, 4 wide and b: these, 6 wide; one "
        "model reads features of one width: use those of one extractor for all "
        "(--features NAME=PATH,NAME=PATH)"
    )


def test_notes_on_features(tmp_path: Path) -> None:
    """Of another file than the usual one, of float64, and of what is read into memory."""
    usual = Features(save(tmp_path / "clipvitl14.pth", {"v": torch.ones(2, 4)}))
    assert usual.check(questions_about(("v", None))) == 0 and usual.notes == []
    path = save(tmp_path / "f.pth", {"v": torch.ones(2, 4).double(), "w": np.ones((2, 4))})
    features = Features(path)
    features.check(questions_about(("v", None)))
    first, arrays, last = features.notes
    assert first == f"features: {path}, 4 wide"
    assert arrays.startswith(f"{path}: 1 videos are numpy arrays or lists, which every process")
    assert last == f"{path}: holds float64, which is cast to float32 as it is read"


def test_some_features_are_missing(tmp_path: Path) -> None:
    """The ids of the file are shown where none is found. Another name for a video is found."""
    path = save(tmp_path / "f.pth", {"v.mp4": torch.full((2, 4), torch.nan)})
    features = Features(path)
    end = "; extract them, or fetch the feature file that belongs to these questions"
    some = "1 of 2 questions (1 videos) have no features, e.g. 'x'"
    said = refusal(features.check, questions_about(("v", None), ("x", None)))
    assert said == f"{path}: {some}{end}"
    hint = " (the file's ids are like 'v.mp4')"
    said = refusal(features.check, questions_about(("x", None)))
    assert said == f"{path}: {some.replace('of 2', 'of 1')}{hint}{end}"
    not_finite = "1 of 1 questions (1 videos) have features with NaN or infinite values, e.g. 'v'"
    for bad in ({"v"}, {"v.mp4"}):
        said = refusal(features.refuse_not_finite, questions_about(("v", None)), bad)
        assert said == f"{path}: {not_finite}{end}"
    features.refuse_not_finite(questions_about(("v", None)), {"w"})
    said = refusal(features.finite_sample, "v", None, 2)
    assert (
        said == f"{path}: the features of video 'v' hold NaN or infinite values; extract them again"
    )


def test_a_scan_goes_past_damaged_files(tmp_path: Path) -> None:
    """Those of a folder and below it, in one order; other files are the user's."""
    folder = tmp_path / "f"
    (folder / "below").mkdir(parents=True)
    names = [f"a{i}.npy" for i in range(9)] + ["below/B.NPY"]
    for name in names:
        with (folder / name).open("wb") as file:
            np.save(file, np.ones((2, 4), np.float32))
    (folder / "c.npy").write_bytes(b"x" * 99)
    (folder / "notes.txt").write_text("mine")
    found = [str(path.relative_to(folder)) for path in feature_files.files_of(folder)]
    assert found == [*names, "c.npy"]
    assert Features(folder).scan() == Scan(("c",), (), ())
    assert feature_files.files_of(tmp_path / "none") == [tmp_path / "none"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), "[2, 3] int64"),
        ([1, 2], "list of length 2"),
        ({"a": 1}, "dict of length 1"),
        ("2 tensors", "2 tensors"),
        (7, "int"),
        (None, "NoneType"),
    ],
)
def test_what_lies_there_instead(value: object, words: str) -> None:
    assert feature_files.describe(value) == words


def test_frames_in_a_list_are_joined() -> None:
    """Of one width, each [width] or [1, width]; anything else stays what it is."""
    joined = feature_files.joined_frames([torch.ones(3), torch.zeros(1, 3)])
    assert joined.tolist() == [[1.0] * 3, [0.0] * 3]
    for odd in (torch.zeros(4), torch.zeros(2, 3), torch.zeros(1, 1, 3), None, torch.zeros(())):
        value = [torch.ones(3), odd]
        assert feature_files.joined_frames(value) is value
    assert feature_files.joined_frames([]) == []


def test_containers_that_are_refused(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        return refusal(feature_files.open_container, path, feature_files.files_of(path))

    (tmp_path / "f").mkdir()
    kinds = ".npy, .pth, .pt, .safetensors"
    path = tmp_path / "f"
    assert said(path) == f"{path}: the folder holds no {kinds}; name another"
    for name in ("v.npy", "v.pt"):
        (path / name).write_bytes(b"")
    assert said(path) == f"{path}: v.npy and v.pt are both of one video; keep one"
    assert said(path / "v.npy").endswith("which video is which; name the folder of .npy files")
    save_file({}, tmp_path / "f.safetensors")
    assert said(tmp_path / "f.safetensors").endswith("holds no tensor; fetch the right file")


def test_changed_frames_are_seen(tmp_path: Path) -> None:
    """In a list of one file, and in a file of a folder."""
    frames = [torch.arange(40.0) + 7, torch.arange(40.0)]
    (tmp_path / "f").mkdir()
    paths = [save(tmp_path / "f.pth", {"v": frames}), save(tmp_path / "f" / "v.pt", frames)]
    for path, opened in ((paths[0], paths[0]), (paths[1], tmp_path / "f")):
        Features(opened).verify("v")
        data = path.read_bytes()
        place = data.index(frames[1].numpy().tobytes())
        path.write_bytes(data[: place + 9] + b"\x01" + data[place + 10 :])
        said = refusal(Features(opened).verify, "v")
        assert said.endswith("(wrong checksum of the features of video 'v')")


# ---- numbers in a file --------------------------------------------------------------------------


def test_numbers_at_any_place(tmp_path: Path) -> None:
    """Also between two multiples of their size, up to the last byte of the file."""
    path, numbers = tmp_path / "a", np.arange(6, dtype="<f4")
    for offset in (0, 3, 4):
        for dtype in ("<f4", ">f4"):
            path.write_bytes(b"x" * offset + numbers.astype(dtype).tobytes())
            found = mapped_numbers(path, offset, (2, 3), np.dtype(dtype))
            assert found.tolist() == [[0, 1, 2], [3, 4, 5]] and found.dtype == torch.float32
    said = "the video feature file claims 28 bytes of numbers and holds 24; fetch or copy it again"
    assert refusal(mapped_numbers, path, 4, (7,), np.dtype("<f4")) == f"{path}: {said}"
    assert "and holds 0" in refusal(mapped_numbers, path, 99, (1,), np.dtype("<f4"))
    assert "claims -8 bytes" in refusal(mapped_numbers, path, 4, (-2,), np.dtype("<f4"))


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("order", "CF")
def test_arrays_of_numpy(tmp_path: Path, version: tuple[int, int], order: Any) -> None:
    array = np.asarray(np.arange(6.0).reshape(2, 3), order=order)
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version)
    assert map_npy(tmp_path / "a.npy").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_hdf5_claims_no_more_than_64_mib(tmp_path: Path) -> None:
    """Of what it does not hold: compressed zeros take no room in the file."""
    h5py = pytest.importorskip("h5py")
    rows = 1 << 22
    with h5py.File(tmp_path / "f.h5", "w") as file:
        for name, length in (("a", 1 << 16), ("most", rows), ("more", rows + 1)):
            file.create_dataset(name, (length, 4), "f4", chunks=(1 << 16, 4), compression="gzip")
    container = feature_files.open_container(tmp_path / "f.h5", [tmp_path / "f.h5"])
    assert len(container.value("most")) == rows
    said = refusal(container.value, "more")
    assert said == f"{tmp_path / 'f.h5'}: 'more' claims 67,108,880 bytes and holds 0; save it again"


# ---- names of videos ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (" v1 ", "v1"),
        ("a/b\\v1.MP4", "v1"),
        ("v1.npy", "v1"),
        ("v1.mp4.npy", "v1.mp4"),
        ("12.0", "12"),
        ("1.5", "1.5"),
        ("v1.0", "v1.0"),
        ("v1.txt", "v1.txt"),
        ("mp4", "mp4"),
    ],
)
def test_reduced_names(name: str, short: str) -> None:
    assert reduced(name) == short


def test_which_key_is_meant() -> None:
    ids = VideoIds(["a/v1/features", "b/v2/features", "c/v3/features"], Path("f"))
    assert ids.find("v2") == "b/v2/features" and ids.find("a/v1/features") == "a/v1/features"
    assert ids.find("v4") is None
    assert VideoIds(["a/features"], Path("f")).find("a") is None, "one key has no common name"
    assert VideoIds(["a/x", "x"], Path("f")).find("a") is None
    doubles = VideoIds(["1/a/x", "2/a/x"], Path("f"))
    said = "f: '1/a/x' and '2/a/x' may both be video 'a'"
    assert refusal(doubles.find, "a").startswith(said)
    assert VideoIds([7, 8.0, " x "], Path("f")).keys == {"7": 7, "8.0": 8.0, "x": " x "}


# ---- tokenizers ---------------------------------------------------------------------------------


def test_fields_of_a_sentencepiece_model() -> None:
    """Numbers, texts and messages of protobuf; a file that is cut off ends."""
    number, eight, field, four = b"\x08\xac\x02", b"\x11" + bytes(8), b"\x1a\x03abc", b"\x25wxyz"
    assert list(tokenizer._protobuf_fields(number + eight + field + four)) == [
        (1, number, b"\xac\x02"),
        (2, eight, bytes(8)),
        (3, field, b"abc"),
        (4, four, b"wxyz"),
    ]
    assert tokenizer._varint(b"\x00\xff\xff\x03", 1) == (0xFFFF, 4)
    assert tokenizer._varint(b"\x80", 0) == (0, 2)
    assert len(list(tokenizer._protobuf_fields(number[:2]))) == 1
    files = b"\x0a\x01a\x12\x01b"  # what it was trained from, and its own name
    trained = b"\x12" + bytes([len(files) + 3]) + files + b"\x18\x01\x20"[:3]
    kept = b"".join(tokenizer._without_training_files(field + trained))
    assert kept == field + b"\x18\x01\x20"


def test_characters_that_begin_in_a_piece() -> None:
    pieces = ["\u00e9".encode(), b"\xc3", b"\xa9", b"ab", "\U0001f415".encode(), b""]
    assert [tokenizer._num_characters(piece) for piece in pieces] == [1, 1, 0, 2, 1, 0]
