"""Fingerprints that ranks take together: whole, shared out, kept when cut, compared over hosts."""

import dataclasses
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from faults.emulated_ranks import EmulatedWorld, Exchange
from support.errors import refusal
from support.feature_files import questions_about
from support.toy_dataset import ToyData, make_tokenizer
from vico.checkpoint.fingerprint import TensorSet, of_questions
from vico.checkpoint.format import Checkpoint
from vico.data.features import Features
from vico.data.tokenizer import content_digests
from vico.distributed import topology
from vico.distributed.launcher_env import host_name
from vico.distributed.topology import Member
from vico.errors import UserError
from vico.io import file_cache
from vico.model.vico import initial_trainables
from vico.train import shared_digests, start
from vico.train.build import read_inputs
from vico.train.config import RunConfig

SPLITS = ("train", "val")


def config_of(folder: Path, out: Path, **more: Any) -> RunConfig:
    paths = {"llama_model_path": folder / "llama", "data_path": folder / "data", "output_dir": out}
    return RunConfig(model="tiny", precision="fp32", max_seq_len=256, **paths, **more)


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, which takes results of files that are just written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_cache, "SETTLED_SECONDS", -1)


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks meet after every tensor."""
    monkeypatch.setattr(shared_digests, "ROUND_SECONDS", -1)
    monkeypatch.setattr(shared_digests, "BATCH_BYTES", 0)


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that were read, in the order in which that ended."""
    names: list[str] = []
    digest = TensorSet.digest

    def noted(tensors: TensorSet, name: str) -> str:
        result = digest(tensors, name)
        names.append(name)
        return result

    monkeypatch.setattr(TensorSet, "digest", noted)
    return names


def take(*configs: RunConfig) -> list[dict[str, str] | str]:
    """Of each emulated rank: its fingerprints, or the message that it ends with."""
    exchange, size = Exchange(len(configs)), len(configs)
    alone = EmulatedWorld(0, 1, torch.device("cpu"), None)
    inputs = [read_inputs(config, SPLITS, alone) for config in configs]

    def work(rank: int) -> dict[str, str] | str:
        world = EmulatedWorld(rank, size, torch.device("cpu"), None, exchange=exchange)
        one, verify = inputs[rank], configs[rank].verify
        try:
            sources = one.sources(SPLITS)
            return shared_digests.of_run(sources, {}, one.files, one.cache, world, verify)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(work, range(size)))
    inputs[0].cache.flush()
    return results


def parts_digest(parts: list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    """As checkpoints have recorded it from the first on."""
    parts = []
    for name in sorted(tensors):
        value = tensors[name]
        data = name.encode() + str(value.dtype).encode() + value.numpy().tobytes()
        parts.append(hashlib.sha256(data).digest())
    return parts_digest(parts)


def test_ranks_share_the_work(
    toy: ToyData, tmp_path: Path, settled: None, one_by_one: None, digested: list[str]
) -> None:
    """The result is that of one rank, each tensor is read once, and never again until --verify."""
    config = config_of(toy.folder, tmp_path / "out")
    results = take(config, config, config)
    first = results[0]
    assert isinstance(first, dict) and results == [first] * 3
    weights = torch.load(toy.llama / "tiny" / "consolidated.00.pth", weights_only=True)
    weights = {name: value for name, value in weights.items() if "rope.freqs" not in name}
    assert first["backbone"] == tensors_digest(weights)
    assert first["data features"] == tensors_digest(toy.features)
    assert sorted(digested) == sorted([*weights, *toy.features])
    digested.clear()
    assert take(config) == [first] and digested == []
    again = dataclasses.replace(config, verify=True)
    assert take(again) == [first] and len(digested) == len(weights) + len(toy.features)


def test_what_was_done_before_a_cut_is_kept(
    toy: ToyData,
    tmp_path: Path,
    settled: None,
    one_by_one: None,
    digested: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(toy.folder, tmp_path / "out")
    digest = TensorSet.digest

    def cut(tensors: TensorSet, name: str) -> str:
        if len(digested) == 5:
            raise UserError("cut")
        return digest(tensors, name)

    monkeypatch.setattr(TensorSet, "digest", cut)
    assert take(config) == ["cut"]
    before = list(digested)
    monkeypatch.setattr(TensorSet, "digest", digest)
    (result,) = take(config)
    assert isinstance(result, dict) and len(before) == 5
    assert not set(before) & set(digested[5:])


def flip(path: Path, of: bytes) -> None:
    """One bit in the middle of a file, of a number of the tensor with these bytes."""
    data = bytearray(path.read_bytes())
    data[data.index(of) + len(of) // 2] ^= 1
    path.write_bytes(data)


def test_damage_is_found_by_the_checksums(toy: ToyData, tmp_path: Path) -> None:
    """At the first start: there is no digest to compare with. Small parts count as well."""
    shutil.copytree(toy.folder, tmp_path / "toy")
    config = config_of(tmp_path / "toy", tmp_path / "out")
    clips, video = config.folder_of("nextqa") / "clipvitl14.pth", "w0001"
    whole = clips.read_bytes()
    flip(clips, toy.features[video].numpy().tobytes())
    (message,) = take(config)
    says = f"{clips}: the video feature file is cut off or damaged; fetch or copy it again"
    assert str(message).startswith(says) and f"features of video '{video}'" in str(message)
    scan = Features(clips).scan
    assert f"wrong checksum of the features of video '{video}'" in refusal(scan)
    clips.write_bytes(whole.replace(b"w0003", b"w0009", 1))  # in data.pkl
    assert "is cut off or damaged" in refusal(Features, clips)
    clips.write_bytes(whole)
    name = "layers.1.feed_forward.w2.weight"
    shard = config.llama_model_path / "tiny" / "consolidated.00.pth"
    flip(shard, torch.load(shard, weights_only=True)[name].numpy().tobytes())
    (message,) = take(config, dataclasses.replace(config))[:1]
    assert str(message).startswith(f"{shard}: the shard of LLaMA weights is cut off or damaged")
    assert f"wrong checksum of '{name}'" in str(message)


def test_a_file_without_checksums_is_taken(tmp_path: Path) -> None:
    """torch can save without them; all of them are then 0."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"v": torch.ones(3, 768)}, tmp_path / "f.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    Features(tmp_path / "f.pth").verify("v")


def change_number(folder: Path) -> None:
    """The checksums are those of the changed file."""
    path = folder / "data" / "nextqa" / "clipvitl14.pth"
    features = torch.load(path, weights_only=True)
    features["v0003"][2, 300] += 1
    torch.save(features, path)


def change_norm_eps(folder: Path) -> None:
    path = folder / "llama" / "tiny" / "params.json"
    path.write_text(path.read_text().replace("1e-06", "2e-06"))


def change_score(folder: Path) -> None:
    """Of a piece of the tokenizer, by the last bit of its fp32 number."""
    path = folder / "llama" / "tokenizer.model"
    data = bytearray(path.read_bytes())
    place = data.index("\u2581kitchen\x15".encode()) + len("\u2581kitchen\x15".encode())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (change_number, "data features: "),
        (change_score, "tokenizer: "),
        (change_norm_eps, "backbone norm_eps: 1e-06 -> 2e-06; "),
    ],
)
def test_hosts_with_other_inputs_are_refused(
    toy: ToyData, tmp_path: Path, change: Callable[[Path], None], says: str
) -> None:
    """Of files with one size, which differ neither at their beginnings nor at their ends."""
    shutil.copytree(toy.folder, tmp_path / "host1")
    change(tmp_path / "host1")
    configs = [config_of(folder, tmp_path / "out") for folder in (toy.folder, tmp_path / "host1")]
    first, second = take(*configs)
    assert first == second and str(first).startswith("the ranks have different inputs: ")
    assert says in str(first)


def test_dialogue_and_training_files_of_a_tokenizer(toy: ToyData, tmp_path: Path) -> None:
    """Subtitles are part of a question; where a tokenizer was trained is no part of it."""
    question = questions_about(("v", None))[0]
    with_dialogue = dataclasses.replace(question, dialogue="Leonard: hi")
    assert of_questions([question]) != of_questions([with_dialogue])
    make_tokenizer(tmp_path / "elsewhere.model")
    elsewhere, here = tmp_path / "elsewhere.model", toy.llama / "tokenizer.model"
    assert elsewhere.read_bytes() != here.read_bytes()
    assert content_digests(elsewhere) == content_digests(here)


@pytest.mark.parametrize(
    ("recorded", "hosts", "is_read"),
    [({}, ("a",), False), ({}, ("a", "b"), True), ({"backbone": "0"}, ("a",), True)],
)
def test_an_evaluation_reads_weights_only_to_compare_them(
    toy: ToyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: dict[str, str],
    hosts: tuple[str, ...],
    is_read: bool,
) -> None:
    """With what the checkpoint records, or with other hosts."""
    config = config_of(toy.folder, tmp_path / "out")
    members = tuple(
        topology.Member(i, host, "cpu", None, 0, False, None) for i, host in enumerate(hosts)
    )
    world = EmulatedWorld(0, 1, torch.device("cpu"), None, members=members)
    inputs = read_inputs(config, ("val",), world)
    weights = initial_trainables(inputs.trainable_shapes, bias=0.5, seed=0)
    checkpoint = Checkpoint(tmp_path / "x.pth", weights, fingerprints=recorded)
    taken: list[object] = []
    monkeypatch.setattr(shared_digests, "of_run", lambda *_: taken.append(1) or {})
    monkeypatch.setattr(start, "refuse_other_function", lambda *_: [])
    start.open_evaluation(config, checkpoint, world)
    assert bool(taken) == is_read


def test_a_file_that_changes_meanwhile_is_not_remembered(
    toy: ToyData, tmp_path: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a file of the same size and times, as `cp -p` makes it."""
    shutil.copytree(toy.folder, tmp_path / "toy")
    config = config_of(tmp_path / "toy", tmp_path / "out")
    shard = config.llama_model_path / "tiny" / "consolidated.00.pth"
    digest = TensorSet.digest

    def replace_file(tensors: TensorSet, name: str) -> str:
        copy = tmp_path / f"copy of thread {threading.get_ident()}"
        shutil.copy2(shard, copy)
        os.replace(copy, shard)
        return digest(tensors, name)

    monkeypatch.setattr(TensorSet, "digest", replace_file)
    (message,) = take(config)
    assert str(message).startswith(f"{shard}: changed during the run: another file of the same ")
    monkeypatch.setattr(TensorSet, "digest", digest)
    (first,) = take(config)
    (second,) = take(dataclasses.replace(config, verify=True))
    assert first == second and isinstance(first, dict)


def test_tensors_are_read_in_batches_of_about_a_size() -> None:
    sizes = {"a": 3, "b": 3, "c": 1, "d": 1, "e": 9, "f": 5}
    batches = list(shared_digests._batches(list(sizes), sizes, 5))
    assert batches == [["a", "b"], ["c", "d", "e"], ["f"]]
    assert list(shared_digests._batches([], {}, 5)) == []
    assert list(shared_digests._batches(["a", "b", "c"], sizes, 5)) == [["a", "b"], ["c"]]


def test_ranks_of_a_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_digests, "host_cores", lambda: 12)
    monkeypatch.setattr(shared_digests, "MAX_THREADS", 5)
    here, there = (Member(0, host, "cpu", None, 0, True, 1) for host in (host_name(), "other"))
    for num_ranks, expected in ((0, 5), (1, 5), (4, 3), (5, 2), (13, 1)):
        members = (there, *[here] * num_ranks)
        world = EmulatedWorld(0, 1, torch.device("cpu"), None, members=members)
        assert shared_digests._num_threads(world) == expected


def test_much_is_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By rank 0, with GB and minutes."""
    num_bytes = {"a": 7 * 10**9, "b": 5 * 10**9}
    tensors = cast(TensorSet, SimpleNamespace(num_bytes=num_bytes, what="backbone"))
    monkeypatch.setattr(shared_digests, "MIN_GB_TO_ANNOUNCE", 12.0)
    clock = iter([100.0, 100.0, 250.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    worlds = [EmulatedWorld(rank, 2, torch.device("cpu"), None) for rank in range(2)]
    first, other = (shared_digests._ProgressLines(tensors, world, 2) for world in worlds)
    other.show({"a": "digest"})
    first.show({"a": "digest"})
    line = "backbone: 7.0 of 12.0 GB read in 2.5 min, once: 2 rank(s) share the work"
    assert capsys.readouterr().out == f"{line}, and what is done is kept\n"
    assert first.phase({}) == "taking fingerprints of the backbone: 0.0 of 12.0 GB"
    monkeypatch.setattr(shared_digests, "MIN_GB_TO_ANNOUNCE", 12.1)
    first.show({})
    assert capsys.readouterr().out == ""
