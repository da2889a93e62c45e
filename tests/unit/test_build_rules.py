"""What a run reads, counted and handed on; and how the model's parameters get their values."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from faults.emulated_ranks import ALONE, EmulatedWorld
from support.feature_files import questions_about
from support.toy_dataset import ToyData
from support.training_steps import config_of
from vico.data.micro_batches import DatasetInputs
from vico.data.readers.captions import Captions
from vico.data.text_windows import NO_TEXTS
from vico.distributed.topology import Member
from vico.model.ops.fp8 import quantize_weight
from vico.model.quantized_linear import Fp8Linear
from vico.train import build, preflight, zero_stage
from vico.train.build import Inputs, read_backbone, read_inputs


@pytest.fixture
def inputs(toy: ToyData) -> Inputs:
    """Two data sets: a has captions of two videos, b of one; b's question is about a's video."""
    read = read_inputs(config_of(toy), ("val",), ALONE)
    captions = {"a": Captions({"u": "x", "v": "y"}), "b": Captions({"w": "z"})}
    datasets = {}
    for name, of_set in captions.items():
        datasets[name] = replace(read.datasets["nextqa"], captions=of_set)
    of_a = [replace(q, dataset="a") for q in questions_about(("u", None), ("t", None))]
    of_b = [replace(q, dataset="b") for q in questions_about(("w", None), ("u", None))]
    questions = {"train": [*of_a, *of_b], "val": of_a[:1], "test": of_b}
    return replace(read, datasets=datasets, questions=questions)


def test_what_ranks_compare_of_their_questions(inputs: Inputs) -> None:
    assert inputs.counts == {
        "train questions": 4,
        "val questions": 1,
        "test questions": 2,
        "captions": 3,
    }


def test_questions_without_caption_are_counted(inputs: Inputs) -> None:
    """By the captions of their own data set; none where the run reads no captions."""
    assert inputs.num_without_caption == 2
    silent = {n: replace(d, captions=Captions()) for n, d in inputs.datasets.items()}
    assert replace(inputs, datasets=silent).num_without_caption == 0
    one = {**silent, "a": inputs.datasets["a"]}
    assert replace(inputs, datasets=one).num_without_caption == 3


def test_fingerprints_are_taken_of_the_splits_of_a_run(inputs: Inputs) -> None:
    sources = inputs.sources(("val", "train"))
    assert list(sources.questions) == ["val", "train"]
    assert sources.questions["train"] == inputs.questions["train"]
    assert sources.datasets is inputs.datasets and sources.weights is inputs.weights
    assert (sources.tokenizer_path, sources.texts) == (inputs.tokenizer_path, ())


# ---- reading -------------------------------------------------------------------------------------


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """With what the ZeRO stage is chosen, each time."""
    seen: list[dict[str, Any]] = []
    choose = zero_stage.choose

    def noted(*arguments: Any, **named: Any) -> Any:
        seen.append({**named, "ranks": arguments[2], "hardware": arguments[3]})
        return replace(choose(*arguments, **named), notes=("of the stage",), max_tokens=9)

    monkeypatch.setattr(zero_stage, "choose", noted)
    return seen


def test_the_stage_is_chosen_for_what_the_run_does(
    toy: ToyData, chosen: list[dict[str, Any]]
) -> None:
    """Whether it trains, its ranks, and whether there are several nodes of several ranks."""
    members = tuple(Member(i, f"n{i // 2}", "cpu", None, 0, True, 2) for i in range(4))
    cluster = EmulatedWorld(0, 4, torch.device("cpu"), None, members=members)
    config = config_of(toy)
    read = read_inputs(config, ("train", "val"), cluster)
    read_inputs(config, ("val",), ALONE)
    assert chosen == [
        {"training": True, "large_nodes": True, "ranks": 4, "hardware": None},
        {"training": False, "large_nodes": False, "ranks": 1, "hardware": None},
    ]
    assert read.max_tokens == 9 and read.notes[0] == "of the stage"


def test_the_order_of_notes(
    toy: ToyData, chosen: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage's, the backbone's, then those on the data: as the files are read."""
    monkeypatch.setattr(preflight.backbone, "notes", lambda *_: ["of the backbone"])
    read = read_inputs(config_of(toy), ("train", "val"), ALONE)
    assert read.notes[:2] == ("of the stage", "of the backbone")
    assert read.notes[2:] == (
        "train: 20 questions",
        "val: 10 questions",
        "warning: val: 1 of 10 questions with two equal options",
    )
    prompts = read.datasets["nextqa"].prompts
    lengths = [prompts.length(question, "vqa") for question in read.questions["train"]]
    limit = max(lengths) - 1
    videos = {row["video"] for row in toy.rows["train"]}
    captions = [prompts.caption_length(toy.captions[video]) for video in videos]
    most = max(captions) - 1
    shortened = replace(config_of(toy), max_seq_len=limit, max_cap_len=most)
    first, second, last = read_inputs(shortened, ("train",), ALONE).notes[2:]
    assert first == "train: 20 questions"
    says = f"train: {lengths.count(limit + 1)} of 20 questions shortened to fit --max_seq_len "
    assert second.startswith(f"{says}{limit} (dialogue first")
    says = f"train: {captions.count(most + 1)} of 7 captions are longer than --max_cap_len {most}"
    assert last.startswith(f"{says} when whole")


def test_captions_are_read_for_training_alone(toy: ToyData) -> None:
    """And only where their loss counts."""
    config = config_of(toy)
    assert len(read_inputs(config, ("train",), ALONE).datasets["nextqa"].captions) > 0
    for other, splits in ((config, ("val",)), (replace(config, cap=0), ("train",))):
        assert len(read_inputs(other, splits, ALONE).datasets["nextqa"].captions) == 0


def test_a_backbone_without_data(toy: ToyData) -> None:
    """For questions of no split: the trainables are those of the checkpoint's feature width."""
    config = replace(config_of(toy), adapter_layer=2, adapter_len=7, max_feats=6)
    inputs, backbone = read_backbone(config, 512, ALONE)
    assert (inputs.datasets, inputs.questions, inputs.dropped) == ({}, {}, {})
    assert inputs.texts is NO_TEXTS and inputs.num_adapted == backbone.num_adapted == 2
    shapes = inputs.trainable_shapes
    assert shapes["visual_proj.weight"] == (32, 512) and shapes["temporal_emb.weight"] == (6, 32)
    assert shapes["adapter_query.weight"] == (2 * 7, 32)
    assert inputs.tokenizer_path == toy.llama / "tokenizer.model"


# ---- the model's values --------------------------------------------------------------------------


def test_why_blocks_are_not_captured() -> None:
    """The first of three reasons."""
    stage = {"zero_optimization": {"stage": 2}}
    profiled = {**stage, "flops_profiler": {"enabled": True}}
    said = [
        build.why_no_graphs(stage, None),
        build.why_no_graphs(stage, "fp8"),
        build.why_no_graphs(profiled, "nf4"),
        build.why_no_graphs({**stage, "flops_profiler": {}}, "8bit"),
        build.why_no_graphs({**stage, "flops_profiler": {"enabled": False}}),
        build.why_no_graphs({**profiled, "zero_optimization": {"stage": 3}}),
        build.why_no_graphs({"zero_optimization": {"stage": 3}}, "fp8"),
    ]
    assert said == [
        None,
        None,
        "--quantize makes weights at every use",
        "--quantize makes weights at every use",
        None,
        "DeepSpeed's flops_profiler waits behind every module",
        "ZeRO-3 gathers weights at every use",
    ]


def test_frozen_weights_are_divided_in_nodes_on_request() -> None:
    world: Any = SimpleNamespace(node_group=lambda: "of the node")
    assert build.frozen_group({"frozen_shards": "node"}, world) == "of the node"
    assert build.frozen_group({"frozen_shards": "all"}, world) is None
    assert build.frozen_group({}, world) is None


def test_slices_are_of_the_flattened_tensor() -> None:
    value = torch.arange(12).view(3, 4)
    assert build._slice(value, 5, 9).tolist() == [5, 6, 7, 8]
    assert build._slice(value, 0, 12).tolist() == [*range(12)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 24])
def test_each_rank_quantizes_the_rows_of_its_part(
    num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together they have the codes and scales of the whole weight, of 6 rows of 4 numbers.

    Parts of equal length may begin inside a row: its rank reads the whole of it, and no other.
    """
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    whole = quantize_weight(weight)
    linear = Fp8Linear(4, 6, torch.float32)
    asked: list[tuple[int, int]] = []
    parts: dict[str, list[Tensor]] = {"codes": [], "scale": []}

    def read(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return weight.flatten()[start:stop]

    def load(rank: int) -> Callable[[nn.Parameter, Callable[[int, int], Tensor]], None]:
        def noted(parameter: nn.Parameter, part: Callable[[int, int], Tensor]) -> None:
            name = "codes" if parameter is linear.codes else "scale"
            size = parameter.numel()
            length = -(-size // num_ranks)
            start = min(length * rank, size)
            parts[name].append(part(start, min(start + length, size)))

        return noted

    for rank in range(num_ranks):
        asked.clear()
        monkeypatch.setattr(build, "load_parameter", load(rank))
        build._load_partition(linear, read, torch.device("cpu"))
        assert all(start % 4 == 0 and stop % 4 == 0 for start, stop in asked)
        length = -(-24 // num_ranks)
        first, last = length * rank // 4, -(-min(length * (rank + 1), 24) // 4)
        assert asked[0] == (4 * first, 4 * last)
    codes = torch.cat(parts["codes"]).view(6, 4)
    assert torch.equal(codes, whole.codes_NK.view(torch.uint8))
    assert torch.equal(torch.cat(parts["scale"]).view(6, 1), whole.scale_N1)


def test_rows_are_read_once_where_ranks_divide_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and scales of the same rows: one look at the file."""
    linear, asked = Fp8Linear(4, 6, torch.float32), []

    def read(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return torch.ones(stop - start)

    def load(parameter: nn.Parameter, part: Callable[[int, int], Tensor]) -> None:
        part(0, parameter.numel() // 2)

    monkeypatch.setattr(build, "load_parameter", load)
    build._load_partition(linear, read, torch.device("cpu"))
    assert asked == [(0, 12)]


def test_a_reader_keeps_what_was_dropped(toy: ToyData, tmp_path: Path) -> None:
    """Questions of a video without features, by split, and the note that counts them."""
    features = {video: value for video, value in toy.features.items() if video != "w0001"}
    torch.save(features, tmp_path / "some.pth")
    flags = ["--features", str(tmp_path / "some.pth"), "--missing_features", "drop"]
    read = read_inputs(config_of(toy, *flags), ("train", "val"), ALONE)
    dropped = [row for row in toy.rows["val"] if row["video"] == "w0001"]
    assert [q.qid for q in read.dropped["val"]] == [row["qid"] for row in dropped]
    assert read.dropped["train"] == []
    assert len(read.questions["val"]) == 10 - len(dropped)
    assert all(q.video != "w0001" for q in read.questions["val"])
    says = f"val: {10 - len(dropped)} used / 10 total questions: {len(dropped)} dropped, whose 1 "
    assert any(note.startswith(says) for note in read.notes)
    assert cast(DatasetInputs, read.datasets["nextqa"]).features.path == tmp_path / "some.pth"
