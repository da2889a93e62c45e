"""The hostile user: whatever is wrong, the command ends with one line that says where and what to do, and changes nothing.

The cases are the self-test's (vico/selftest/cases_*.py), which runs them all; here are some of them, and two ranks.
"""

import argparse
import errno
import os
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from faults.cases_settings import DS, EVAL
from faults.damage import Case, ds, flip, gone, pth, rows
from faults.scenario_inputs import CASES, attempt_all
from support.processes import Processes, start
from support.run_fixture import CHECKPOINT, FEATURES, OPTIMIZER, RunFixture, make_run_fixture
from support.warm_process import WarmProcess, warm_processes
from vico.cli.main import main
from vico.distributed import world as dist
from vico.io import output_dir

EVERY = 6  # so many cases are passed over for one


@pytest.fixture(scope="module")
def workers() -> Iterator[list[WarmProcess]]:
    with warm_processes(2) as found:
        yield found


@pytest.fixture(scope="module")
def original(workers: list[WarmProcess], tmp_path_factory: pytest.TempPathFactory) -> RunFixture:
    return make_run_fixture(tmp_path_factory.mktemp("original") / "fixture", workers[0])


@pytest.fixture
def fixture(original: RunFixture, tmp_path: Path) -> RunFixture:
    return original.copy(tmp_path / "fixture")


def in_this_process(patch: pytest.MonkeyPatch, alone: dist.World) -> None:
    """DeepSpeed connects once per process, so the commands here share a world of one rank."""
    patch.setattr(dist, "connect", lambda *_: alone)
    patch.setattr(dist, "disconnect", lambda world, together: None)


def test_one_line_says_where_and_what_to_do(
    original: RunFixture, workers: list[WarmProcess], tmp_path: Path
) -> None:
    assert len(CASES) > 200
    results = attempt_all(
        list(CASES)[::EVERY], original, workers, tmp_path, limit=60
    )  # a busy machine is no fault
    assert not {name: fault for name, (fault, _) in results.items() if fault}


def test_debug_shows_where_an_error_comes_from(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--debug", "--batch_size", "0"]) == 2
    err = capfd.readouterr().err
    assert (
        "Traceback" in err
        and err.splitlines()[-1]
        == "vico: error: --batch_size 0: must be a whole number of at least 1"
    )


def test_what_looks_odd_and_is_legal(
    fixture: RunFixture, alone: dist.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that the lineage saved and nobody can use, a byte order mark, a ds_config with every harmless word."""
    in_this_process(monkeypatch, alone)
    saved = argparse.Namespace(
        batch_size=-3, lr="nan", sub=True, resume="", epochs=1.5, max_feats=10, data_path=3
    )
    pth("lineage.pth", lambda content: content.update(args=saved))(fixture)
    quiet = {
        "bf16": {"enabled": False},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "amp": {"enabled": False},
        "wandb": {"enabled": False},
    }
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": "auto"}
    ds(
        **quiet,
        gradient_clipping=0.0,
        steps_per_print="auto",
        train_batch_size=4,
        zero_optimization=offload,
    )(fixture)
    flags = f"--resume {fixture.folder}/lineage.pth --deepspeed {fixture.folder}/ds.json".split()
    assert main(["eval", *fixture.flags, *flags]) == 0


@pytest.mark.parametrize("size", [150_000, 100_000, 2_500])
def test_a_full_disk_ends_the_run_and_leaves_nothing_half_written(
    size: int,
    fixture: RunFixture,
    alone: dist.World,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """No file can grow beyond `size`: the optimizer's state, the weights, or the curves are what does not fit."""
    in_this_process(monkeypatch, alone)
    monkeypatch.setattr(
        "threading.excepthook", lambda args: None
    )  # the thread that TensorBoard writes in
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    capfd.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        code = main(["train", *fixture.flags])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    err = capfd.readouterr().err.splitlines()
    assert code == 6 and len(err) == 1
    assert (
        err[0].startswith(f"vico: error: {fixture.folder}/out")
        and f"({os.strerror(errno.EFBIG)}); free space" in err[0]
    )
    assert not [
        p.name
        for p in (fixture.folder / "out").iterdir()
        if p.name.startswith((".", "checkpoint")) and p.name != output_dir.NAME
    ]
    assert main(["train", *fixture.flags]) == 0, "the same command goes on when there is space"


# ---- two ranks -------------------------------------------------------------------------------------------------------


def spoil_rank_1(fixture: RunFixture) -> None:
    """NaN in the one video that only the second of two ranks looks at before training."""
    rows({}, {"video": "100001"}, {}, {})(fixture)
    pth(FEATURES, lambda videos: videos["100001"].fill_(torch.nan) is None or videos)(fixture)


TWO_RANKS: dict[str, Case] = {
    "unknown flag": (None, "--epoch 3", 2, ["unknown flag --epoch; did you mean '--epochs'?"]),
    "no features": (
        gone(FEATURES),
        "",
        2,
        ["clipvitl14.pth: no such file; the video feature file should be there"],
    ),
    "a feature of rank 1": (
        spoil_rank_1,
        "",
        2,
        [
            "clipvitl14.pth: 1 of 2 questions (1 videos) have features with NaN or infinite values, e.g. '100001'"
        ],
    ),
    "batch size of one rank": (
        ds(train_batch_size=4),
        DS,
        2,
        [
            "train_batch_size 4 does not fit --batch_size 4 --accum_iter 1 on 2 rank(s), which make 8"
        ],
    ),
    "damaged checkpoint": (
        flip(OPTIMIZER, 5000),
        EVAL + CHECKPOINT,
        3,
        ["optimizer.safetensors: damaged (its sha256 is not the recorded one)"],
    ),
    "output_dir fails late": (
        None,
        "--output_dir /proc/vico",
        2,
        ["/proc/vico: cannot be made (No such file or directory); choose another"],
    ),
}
WAITED_FOR = "unknown flag"  # the case whose second rank may end by itself


def end_as_launchers_do(fixture: RunFixture, line: str, wait: bool) -> tuple[int, Processes]:
    """(the rank that ended first, how all ended): every rank is ended as soon as one has; with `wait` only at last."""
    run = start(*fixture.command(line), ranks=2)
    run.wait_until(lambda: not run.running)
    has_ended = [process.poll() is not None for process in run.processes]
    for process in run.processes:
        if process.poll() is None and not wait:
            os.killpg(process.pid, signal.SIGTERM)
    run.wait(60)
    return has_ended.index(True) if any(has_ended) else -1, run


@pytest.fixture(scope="module")
def two_ranks(
    original: RunFixture, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[int, Processes]]]:
    """All cases at once: most of their time is spent in loading torch, and one in waiting."""

    def run(name: str) -> tuple[int, Processes]:
        fixture = original.copy(tmp_path_factory.mktemp("two") / "fixture")
        damage, line, _, _ = TWO_RANKS[name]
        if damage is not None:
            damage(fixture)
        return end_as_launchers_do(fixture, line, wait=name == WAITED_FOR)

    with ThreadPoolExecutor(3) as pool:
        yield dict(zip(TWO_RANKS, pool.map(run, TWO_RANKS), strict=True))


@pytest.mark.parametrize("name", TWO_RANKS)
def test_rank_0_says_it_before_any_rank_ends(
    name: str, two_ranks: dict[str, tuple[int, Processes]]
) -> None:
    _, _, code, parts = TWO_RANKS[name]
    first, ended = two_ranks[name]
    assert first == 0 and ended.codes == [code, code if name == WAITED_FOR else -signal.SIGTERM], (
        ended.output
    )
    assert "Traceback" not in ended.output and ended.stderrs[1] == ""
    line = ended.stderrs[0]
    assert (
        line.startswith("vico: error: ")
        and line.count("\n") == 1
        and all(part in line for part in parts)
    ), line
