"""Which data sets --dataset names, and what an epoch holds of each."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.command_line import error_of, parse_line
from support.errors import refusal
from support.mixed_datasets import NUM_TRAIN, NUM_VAL, mixed
from support.toy_dataset import ToyData
from support.training_steps import config_of, training_steps
from vico.checkpoint.format import Checkpoint
from vico.data.datasets import DATASETS
from vico.data.epoch_order import EpochOrder
from vico.data.mixture import DatasetChoice, parse_datasets, paths_by_dataset
from vico.data.types import Question
from vico.distributed.world import World
from vico.errors import UserError
from vico.train.build import Inputs, read_inputs
from vico.train.config import RunConfig
from vico.train.evaluate import summarize
from vico.train.rank_consistency import _input_files
from vico.train.resume import _changed_files, refuse_other_function
from vico.train.shared_digests import of_run


def test_names_and_weights() -> None:
    assert parse_datasets("nextqa") == (DatasetChoice("nextqa"),)
    expected = (DatasetChoice("nextqa"), DatasetChoice("star", 0.5), DatasetChoice("my set.2", 2.0))
    assert parse_datasets(" nextqa, star : 0.5,my set.2:2e0") == expected
    assert ",".join(map(str, expected)) == "nextqa,star:0.5,my set.2:2"
    assert parse_line("--dataset nextqa:1.0").resolve().dataset == "nextqa"


BAD = {
    "": "holds an empty name",
    "nextqa,,star": "holds an empty name",
    ":2": "holds an empty name",
    "nextqa,star,nextqa:2": "names 'nextqa' twice",
    "../nextqa": "'../nextqa' is no plain name of a folder",
    "a/b": "'a/b' is no plain name",
    ".": "'.' is no plain name",
    "..": "'..' is no plain name",
    "a\\b": "is no plain name",
    "a\nb": "is no plain name",
    "star:": "the weight of 'star' is ''; it must be a number above 0",
    "star:0": "the weight of 'star' is '0'",
    "star:-1": "the weight of 'star' is '-1'",
    "star:nan": "the weight of 'star' is 'nan'",
    "star:inf": "the weight of 'star' is 'inf'",
    "star:half": "the weight of 'star' is 'half'",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_dataset(text: str) -> None:
    with pytest.raises(UserError, match=r"^--dataset ") as refusal:
        parse_datasets(text)
    assert BAD[text] in str(refusal.value) and str(refusal.value).isprintable()


def test_an_unknown_name_shows_the_nearest() -> None:
    message = error_of("--dataset nextQA")
    assert message.startswith("--dataset 'nextQA': there is no such data set; it can be nextqa, ")
    assert message.endswith("; did you mean 'nextqa'?")


def test_paths_by_dataset() -> None:
    """A path may hold any character, also those that part the names."""

    def paths(text: str, *names: str) -> dict[str, Path]:
        return paths_by_dataset("captions", Path(text), names)

    assert paths_by_dataset("captions", None, ["a"]) == {}
    assert paths("/x/b=1,c.json", "a") == {"a": Path("/x/b=1,c.json")}
    assert paths("a=/x,y", "a") == {"a": Path("/x,y")}
    assert paths("b=/x,y,a=z=1", "a", "b") == {"b": Path("/x,y"), "a": Path("z=1")}
    assert paths("b=/x", "a", "b") == {"b": Path("/x")}
    bad = {
        "/x": "must be NAME=PATH[,NAME=PATH], since there are several data sets; NAME can be a, b",
        "c=/x": "must be NAME=PATH",
        "a=": "names a without a path",
        "a=x,a=y": "names a twice",
    }
    for text, problem in bad.items():
        with pytest.raises(UserError) as refusal:
            paths(text, "a", "b")
        assert str(refusal.value).startswith(f"--captions {text}: {problem}")


# ---- the order of an epoch


def order_of(sizes: dict[str, int], text: str, seed: int = 0, shuffle: bool = True) -> EpochOrder:
    names = [name for name, size in sizes.items() for _ in range(size)]
    return EpochOrder(names, parse_datasets(text), seed, shuffle)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.1, 0.3, 0.5, 0.9, 1, 1.5, 2, 3.7]), min_size=4, max_size=4),
    seed=st.integers(0, 2**63 - 1),
    shuffle=st.booleans(),
)
def test_an_epoch_holds_what_the_weights_say(
    sizes: list[int], weights: list[float], seed: int, shuffle: bool
) -> None:
    """Exactly, in every epoch; and ceil(n / part) epochs hold every question of a data set."""
    counts = {f"s{i}": round(w * n) for i, (w, n) in enumerate(zip(weights, sizes, strict=False))}
    of_name = {f"s{i}": n for i, n in enumerate(sizes)}
    text = ",".join(f"{name}:{weights[i]}" for i, name in enumerate(of_name))
    if 0 in counts.values():
        with pytest.raises(UserError, match="an epoch would hold none of its"):
            order_of(of_name, text, seed, shuffle)
        return
    order, first = order_of(of_name, text, seed, shuffle), 0
    epochs = [order.places(epoch) for epoch in range(12)]
    assert all(len(places) == len(order) == sum(counts.values()) for places in epochs)
    for name, size in of_name.items():
        times = [
            Counter(places[(places >= first) & (places < first + size)].tolist())
            for places in epochs
        ]
        whole, rest = divmod(counts[name], size)
        for of_epoch in times:
            assert of_epoch.total() == counts[name]
            assert all(of_epoch[first + i] in (whole, whole + 1) for i in range(size))
        if rest:
            cycle = times[: -(-size // rest)]
            taken = {place for of_epoch in cycle for place, n in of_epoch.items() if n > whole}
            assert len(cycle) > 12 - 1 or len(taken) == size
        first += size


@pytest.mark.parametrize("shuffle", [True, False])
def test_one_data_set_keeps_its_order(shuffle: bool) -> None:
    """As it was before there were mixtures, bit for bit; and in halves, each question once."""
    whole, halves = (
        order_of({"a": 9}, "a", 5, shuffle),
        order_of({"a": 5, "b": 4}, "a,b", 5, shuffle),
    )
    for epoch in range(3):
        expected = np.random.default_rng([5, epoch]).permutation(9) if shuffle else np.arange(9)
        assert whole.places(epoch).tolist() == halves.places(epoch).tolist() == expected.tolist()


def test_the_order_follows_from_seed_and_epoch() -> None:
    sizes, text = {"a": 30, "b": 20}, "a:0.5,b:1.5"
    order, again = order_of(sizes, text), order_of(sizes, text)
    epochs = [order.places(epoch).tolist() for epoch in range(4)]
    assert epochs == [again.places(epoch).tolist() for epoch in range(4)]
    assert len({tuple(sorted(places)) for places in epochs}) == 4, "another part each epoch"
    assert order_of(sizes, text, seed=1).places(0).tolist() != epochs[0]


# ---- several data sets in one stream


@pytest.fixture(scope="module")
def mixed_toy(tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    return mixed(tmp_path_factory.mktemp("mixed"))


def read(toy: ToyData, alone: World, *flags: str) -> tuple[RunConfig, Inputs]:
    config = config_of(toy, *flags)
    return config, read_inputs(config, ("train", "val"), alone)


def test_each_question_has_its_own_set(mixed_toy: ToyData, alone: World) -> None:
    """Features, captions, instructions and subtitles; videos of equal ids are not merged."""
    names = ("nextqa", "star", "tvqa")
    config, inputs = read(mixed_toy, alone, "--dataset", "nextqa,star,tvqa", "--sub")
    assert Counter(q.dataset for q in inputs.questions["train"]) == NUM_TRAIN
    assert Counter(q.dataset for q in inputs.questions["val"]) == NUM_VAL
    assert "tvqa train: 6 questions" in inputs.notes
    counts = "20 of 20 nextqa, 9 of 9 star, 6 of 6 tvqa questions"
    assert f"train: an epoch holds {counts}" in inputs.notes
    by_name = {q.dataset: q for q in reversed(inputs.questions["train"])}
    chosen = [by_name[name] for name in names]
    assert [q.video for q in chosen] == ["v0000"] * 3
    assert chosen[1].place == "star/STAR_train.json[0]"
    assert chosen[2].dialogue and not chosen[0].dialogue
    steps = training_steps(
        inputs,
        micro_batch_size=3,
        in_file_order=True,
        dataset=config.dataset,
        questions=chosen,
    )
    step = steps[0, 0]
    assert step.names == ("nextqa/v0000/0", "star/v0000/Interaction_T1_0", "tvqa/v0000/0")
    (batch,) = step.micro_batches
    for name, question, clip_FC in zip(names, chosen, batch.features_VFC, strict=True):
        _, alone_inputs = read(mixed_toy, alone, "--dataset", name)
        source = alone_inputs.datasets[name]
        expected_FC = source.features.sample("v0000", question.feature_rows, 10)
        assert torch.equal(clip_FC, expected_FC), name
        own = inputs.datasets[name]
        assert own.captions == source.captions
        assert own.prompts.vqa(question, 0) == source.prompts.vqa(question, 0)
    decode, said = inputs.datasets["tvqa"].prompts._tokenizer.decode, []
    for question in chosen:
        tokens = inputs.datasets[question.dataset].prompts.vqa(question, 0).tokens
        said.append("dialogue, video" in decode([token for token in tokens if token >= 0]))
    assert said == [False, False, True]


def test_a_question_twice_in_a_step_counts_twice(mixed_toy: ToyData, alone: World) -> None:
    counts = {}
    for weight in (1, 2):
        config, inputs = read(mixed_toy, alone, "--dataset", f"star:{weight}")
        steps = training_steps(inputs, micro_batch_size=18, dataset=config.dataset, crop=False)
        counts[weight] = steps[0, 0].target_counts
    assert torch.equal(counts[2], 2 * counts[1])


# ---- what the rest of a run knows of them


def test_all_files_are_compared_and_watched(
    mixed_toy: ToyData, alone: World, tmp_path: Path
) -> None:
    """Over the ranks, before they are opened, and as long as the run goes on."""
    shutil.copytree(mixed_toy.folder / "data", tmp_path / "data")
    flags = ["--data_path", str(tmp_path / "data"), "--dataset", "nextqa,star"]
    flags += ["--captions", f"star={tmp_path}/data/tvqa/blip2_n6.json"]
    config, inputs = read(mixed_toy, alone, *flags)
    read_by_both = {"nextqa/train.csv", "nextqa/clipvitl14.pth", "nextqa/llava_v15_13b_n6.json"}
    read_by_both |= {"star/STAR_val.json", "star/clipvitl14.pth", "tvqa/blip2_n6.json"}
    compared = {f"{path.parent.name}/{path.name}" for path in _input_files(config)}
    watched = {name for name in read_by_both if inputs.files.stamp(tmp_path / "data" / name)}
    assert read_by_both <= compared and watched == read_by_both
    assert inputs.datasets["star"].captions == mixed_captions(mixed_toy, "tvqa")
    sources = inputs.sources(("train", "val"))
    fingerprints = of_run(sources, {}, inputs.files, inputs.cache, alone, verify=False)
    whats = ["train questions", "val questions", "captions", "features"]
    assert {f"data {name}: {what}" for name in ("nextqa", "star") for what in whats} <= set(
        fingerprints
    )
    for name in ("nextqa", "star"):
        (tmp_path / "data" / name / "clipvitl14.pth").chmod(0o600)
    inputs.files.check_unchanged()
    with (tmp_path / "data" / "nextqa" / "clipvitl14.pth").open("ab") as file:
        file.write(b"0")
    assert "nextqa/clipvitl14.pth: changed during the run" in refusal(inputs.files.check_unchanged)


def mixed_captions(toy: ToyData, name: str) -> Any:
    return json.loads((toy.folder / "data" / name / "blip2_n6.json").read_text())


def test_one_of_its_data_sets_is_compared_with_the_run() -> None:
    """An evaluation names fingerprints otherwise than a run over several data sets."""
    recorded = {"data star: val questions": "q", "data star: val features": "f"}
    settings = {"dataset": "nextqa,star:0.5"}
    start = Checkpoint(Path("c"), {}, settings=settings, fingerprints=recorded)
    star, other = RunConfig(dataset="star"), RunConfig(dataset="tvqa")
    same = {"data val questions": "q", "data val features": "f"}
    assert refuse_other_function(start, star, same) == []
    message = refusal(refuse_other_function, start, star, same | {"data val features": "g"})
    assert message.startswith("c: was trained with other files (data; table below)")
    (note,) = refuse_other_function(start, star, same | {"data val questions": "r"})
    assert note.startswith("note: the val questions are not those of the run that wrote c")
    assert refuse_other_function(start, other, {name: "x" for name in same}) == []


def test_an_added_data_set_is_another_run() -> None:
    """--allow_change dataset alone does not allow its files."""
    start = Checkpoint(
        Path("c"), {}, settings=RunConfig().to_json(), fingerprints={"backbone": "b"}
    )
    config = RunConfig(dataset="nextqa,star", allow_change="dataset")
    changes = _changed_files(start, config, {"backbone": "b", "data star: val features": "f"})
    assert changes == [("data star: val features", "none", "f")]


def test_keys_of_accuracies_are_unique() -> None:
    """Whatever data sets and types are called."""
    questions = []
    for dataset, kind in (("a", "b_c"), ("a_b", "c"), ("n", "total")):
        questions.append(Question(0, "0", "v", kind, "q", ("x", "y"), 0, dataset=dataset))
    known = dict.fromkeys(("a", "a_b", "n"), DATASETS["tvqa"])
    results = summarize(questions, [[0.0, 1.0]] * 3, known).results()
    assert results["n"] == 3 and results["acc"] == results["a_b_c"] == results["'a_b_c'"] == 1
    assert results["n_total"] == 3 and results["'n_total'"] == 1


def test_a_split_that_some_answer() -> None:
    """Accuracies of those; none over all."""
    questions = [
        Question(0, "0", "v", "t", "q", ("x", "y"), a, dataset=d)
        for a, d in ((0, "a"), (None, "b"))
    ]
    known = dict.fromkeys(("a", "b"), DATASETS["tvqa"])
    evaluation = summarize(questions, [[0.0, 1.0]] * 2, known)
    assert evaluation.accuracies == {"a_acc": 1.0, "a_t": 1.0}
    assert "b: 1 questions\n1 questions without answers: predictions only" in evaluation.table()
