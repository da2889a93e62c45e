"""Ranks with other code, settings, files or output folders are refused; waits between ranks end."""

import dataclasses
import json
import os
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.emulated_ranks import EmulatedWorld, Exchange
from support.checkpoints import SHAPES, random_state
from support.processes import PYTHONPATH, ROOT, start
from support.toy_dataset import ToyData
from vico.checkpoint.format import WEIGHTS, TrainState
from vico.checkpoint.write import RunIdentity, save
from vico.errors import UserError
from vico.train import rank_consistency
from vico.train.config import RunConfig

OLD_FORMAT = {"_use_new_zipfile_serialization": False}
TIMEOUT_SECONDS = 120.0
REFUSED_WITHIN_SECONDS = 60.0  # a start on a busy machine takes up to 30
DEEPSPEED_OP = "deepspeed_shm_comm"


def test_other_code_is_refused(toy: ToyData, tmp_path: Path) -> None:
    updated = tmp_path / "other"
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "vico", updated / "vico", ignore=without_caches)
    with (updated / "vico" / "train" / "optim.py").open("a") as file:
        file.write("# updated on one host only\n")
    begin = time.monotonic()
    flags = ["train", *toy.flags, "--output_dir", str(tmp_path / "run")]
    rank_1 = {"PYTHONPATH": os.pathsep.join([str(updated), PYTHONPATH])}
    run = start(*flags, ranks=2, cwd=Path("/"), rank_environments={1: rank_1})
    assert run.wait(TIMEOUT_SECONDS) == [2, 2]
    assert time.monotonic() - begin < REFUSED_WITHIN_SECONDS
    assert not (tmp_path / "run").exists()
    (error,) = [line for line in run.stderrs[0].splitlines() if "error" in line]
    rank_1_differs = f"{socket.gethostname()} (1 rank(s), the first is 1)"
    assert error.startswith(f"vico: error: the ranks have different code: {rank_1_differs}")
    assert "vico/train/optim.py: " in error


# Runs on two ranks; rank 0 prints the errors and times of all steps as JSON.
PROGRAM = """
import json, os, sys, threading, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as torch_dist
from vico.distributed import world as dist
from vico.errors import UserError
from vico.train import rank_consistency
from vico.train.config import RunConfig
from vico.train.rank_consistency import (
    require_same_code, require_same_files, require_same_start
)
from vico.train.saved_run import read_checkpoint
from vico.train.start import start

base = Path(sys.argv[1])
world = dist.connect(timedelta(minutes=2))
results = {}

def check(name, function, *arguments):
    try:
        function(world, *arguments)
        results[name] = ""
    except UserError as error:
        results[name] = str(error)

def config(data="data", out=base / "out", **more):
    paths = dict(llama_model_path=base / "llama", data_path=base / data, output_dir=out)
    return RunConfig(model="tiny", **paths, **more)

check("same", require_same_code, {"seed": 1})
check("settings", require_same_code, {"seed": world.rank, "blr": 0.1})
check("files", require_same_files, config(data=f"data{world.rank}"))
check("same files", require_same_files, config())

# From here on the ranks see different files under the same relative names, like two hosts.
os.chdir(base / f"host{world.rank}")
rank_consistency.VISIBILITY_SECONDS, rank_consistency.SILENT_SECONDS = 10, 1
if world.rank == 1:
    threading.Timer(2, Path("late-hidden").rename, ["late"]).start()
begin = time.monotonic()
check("late", require_same_files, config(out=Path("late")))
results["late after"] = time.monotonic() - begin

rank_consistency.VISIBILITY_SECONDS = 2
begin = time.monotonic()
check("output", require_same_files, config(out=Path("apart")))
results["output after"] = time.monotonic() - begin

ready = dict(num_workers=0, precision="fp32", max_seq_len=256)
check("start", lambda world, config: start(config, world), config(out=Path("starts"), **ready))
published = read_checkpoint(Path("published.pth"))
check("older .pth", require_same_start, published, (), {})

from deepspeed.utils import groups
clone = groups._clone_world_group()
dist.set_collective_timeout(timedelta(seconds=3))
world.barrier()
if world.rank == 0:
    begin = time.monotonic()
    try:
        torch_dist.all_reduce(torch.ones(1), group=clone)
    except RuntimeError:
        results["gave up after"] = time.monotonic() - begin
    print(json.dumps(results), flush=True)
else:
    time.sleep(10)
os._exit(0)
"""


def make_hosts(folder: Path, toy: ToyData) -> None:
    """Data folders of which data1 differs, and output folders as two hosts see them."""
    shutil.copytree(toy.llama, folder / "llama")
    for name in ("data", "data0", "data1"):
        shutil.copytree(toy.data, folder / name / "nextqa")
    with (folder / "data1" / "nextqa" / "val.csv").open("a") as file:
        file.write("\n")
    for name in ("host0/late", "host1/late-hidden", "host0/apart"):
        (folder / name / "checkpoint-7").mkdir(parents=True)
        (folder / name / "args.json").write_text("{}")
    for host in ("host0", "host1"):
        make_starts(folder / host)


def make_starts(host: Path) -> None:
    """A run with two checkpoints, of which host1 has the newer one damaged, and a large old .pth.

    The .pth differs in its middle.
    """
    config = RunConfig(model="tiny", num_workers=0, precision="fp32", max_seq_len=256)
    run = RunIdentity("a run", config.to_json(), {})
    weights, moments = random_state(SHAPES, 0)
    (host / "starts").mkdir()
    (host / "starts" / "args.json").write_text(json.dumps({**config.to_json(), "run": "a run"}))
    for step in (2, 4):
        state = TrainState(step=step, questions_per_step=16, num_updates=step)
        save(host / "starts" / f"checkpoint-{step}", weights, moments, state, run)
    middle = torch.zeros(2**18)
    if host.name == "host1":
        middle[2**17] = 1
        path = host / "starts" / "checkpoint-4" / WEIGHTS
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    torch.save({"model": {"a": middle}}, host / "published.pth", **OLD_FORMAT)


def test_differences_are_refused(
    toy: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings, files and output folders, also one that a network file system shows late.

    DeepSpeed's own group, made without a timeout, gives up too once it has been given one. Where a
    build of DeepSpeed's op was killed, no start waits for its lock: nothing is built.
    """
    (tmp_path / "extensions" / DEEPSPEED_OP).mkdir(parents=True)
    (tmp_path / "extensions" / DEEPSPEED_OP / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    make_hosts(tmp_path, toy)
    run = start(str(tmp_path), ranks=2, program=("-c", PROGRAM), cwd=Path("/"))
    run.wait(TIMEOUT_SECONDS)
    assert run.stdouts[0].strip(), run.stderrs[0]
    results = json.loads(run.stdouts[0].splitlines()[-1])
    check_refusals(results)
    check_late_files(results, run.stderrs[1])
    check_starts(results)
    assert 2 < results["gave up after"] < 8


def check_refusals(results: dict[str, Any]) -> None:
    assert results["same"] == results["same files"] == ""
    assert "the ranks have different settings: " in results["settings"]
    assert "--seed: 0 -> 1; give every rank" in results["settings"]
    assert "the ranks have different files: " in results["files"]
    assert "val.csv: " in results["files"]


def check_starts(results: dict[str, Any]) -> None:
    """What a rank falls back to, and a file of which only the middle differs."""
    damaged = f"passed over: starts/checkpoint-4/{WEIGHTS}: damaged"
    assert results["start"].startswith("the ranks have different starting points: ")
    assert "start: starts/checkpoint-4 (step 4, digest " in results["start"]
    assert "-> starts/checkpoint-2 (step 2, digest " in results["start"]
    assert damaged in results["start"]
    assert "start: published.pth (step 0, digest " in results["older .pth"]


def check_late_files(results: dict[str, Any], stderr_of_rank_1: str) -> None:
    """A late file is waited for, with one warning; a folder that is not shared is refused."""
    assert results["late"] == "" and 1.5 < results["late after"] < 8
    warnings = [line for line in stderr_of_rank_1.splitlines() if line.startswith("vico: ")]
    late_rank = f"vico: [rank 1] {socket.gethostname()} (1 of 2 ranks) does not see"
    late_files = "late/checkpoint-7 or late/args.json yet, which another host sees; "
    assert len(warnings) == 2
    assert warnings[0].startswith(f"{late_rank} {late_files}")
    assert warnings[1].startswith(f"{late_rank} apart/checkpoint-7 ")
    assert results["output"].startswith("the ranks have different checkpoints: ")
    assert 2 <= results["output after"] < 5
    assert "apart: checkpoint-7 -> no checkpoint; apart/args.json: " in results["output"]


def test_the_version_of_a_library() -> None:
    assert rank_consistency._installed_version("torch") == torch.__version__
    assert rank_consistency._installed_version("vico-unheard") == "none"


def test_both_ends_of_a_file_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they overlap, or are the whole file."""
    monkeypatch.setattr(rank_consistency, "END_BYTES", 8)
    path, seen, contents = tmp_path / "file", set(), set()
    for size in (1, 7, 8, 9, 15, 16, 17, 40):
        contents |= {bytes(size), b"\1".ljust(size, b"\0"), b"\1".rjust(size, b"\0")}
    for content in contents:
        path.write_bytes(content)
        seen.add(rank_consistency._fingerprint(path))
    assert len(seen) == len(contents)


def test_a_late_file_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second at a time, until both ranks see the same; a world of one waits for nobody."""
    host_0, host_1 = (RunConfig(output_dir=tmp_path / name) for name in ("host 0", "host 1"))
    (host_0.output_dir / "checkpoint-7").mkdir(parents=True)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) > 4:
            (host_1.output_dir / "checkpoint-7").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(time, "sleep", sleep)
    exchange = Exchange(2)
    first = EmulatedWorld(0, 2, torch.device("cpu"), None, exchange=exchange)
    worlds = [first, dataclasses.replace(first, rank=1)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rank_consistency._wait_until_visible, worlds, [host_0, host_1]))
    assert len(slept) in (6, 8) and set(slept) == {1}
    slept.clear()
    alone = EmulatedWorld(0, 1, torch.device("cpu"), None)
    rank_consistency._wait_until_visible(alone, host_0)
    assert slept == []


def test_the_ranks_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against rank 0, on every rank, with a few of the values."""
    hosts = iter(["a", "b", "a", "c"])
    monkeypatch.setattr(rank_consistency, "host_name", lambda: next(hosts))
    size, names = 4, ("--lr", "--seed", "--cap", "--bias")
    values = [dict.fromkeys(names, str(rank % 2)) | {"same": "1"} for rank in range(size)]
    values[0].pop("--bias"), values[2].pop("--bias"), values[3].pop("--lr")
    exchange = Exchange(size)
    first = EmulatedWorld(0, size, torch.device("cpu"), None, exchange=exchange)

    def compare(rank: int) -> tuple[str, bool]:
        world = dataclasses.replace(first, rank=rank)
        with pytest.raises(UserError) as refused:
            rank_consistency._require_same(world, "settings", values[rank], "do this")
        return str(refused.value), refused.value.of_all_ranks

    with ThreadPoolExecutor(size) as pool:
        ends = list(pool.map(compare, range(size)))
    assert set(ends) == {ends[0]} and ends[0][1]
    message = ends[0][0]
    assert message.startswith("the ranks have different settings: ")
    assert " (2 rank(s), the first is 1) against rank 0 on " in message
    assert message.endswith(": --lr: 0 -> 1; --seed: 0 -> 1; --cap: 0 -> 1; ...; do this")
    few = rank_consistency._describe_differences({"a": "1", "b": "2"}, {"b": "3", "c": "4"})
    assert few == "a: 1 -> none; b: 2 -> 3; c: none -> 4"
    for same_size in (1, 2):
        exchange = Exchange(same_size)
        first = EmulatedWorld(0, same_size, torch.device("cpu"), None, exchange=exchange)
        same = [dataclasses.replace(first, rank=rank) for rank in range(same_size)]
        agree = partial(rank_consistency._require_same, subject="", own=values[0], remedy="")
        with ThreadPoolExecutor(same_size) as pool:
            list(pool.map(agree, same))
