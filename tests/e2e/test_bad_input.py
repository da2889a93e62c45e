"""Bad input: the command ends with one line that says where and what to do, and changes nothing.

The cases are those of the self-test (tests/faults/cases_*.py), which runs them all. Here are some
of them, and some on two ranks.
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

from faults.case import Case, ds_config, flags, own, refused
from faults.cases import CASES
from faults.cases_containers import HDF5
from faults.damage import ds, flip, gone, pth
from faults.damage_tables import rows
from faults.scenario_inputs import try_all
from support.processes import Processes, start
from support.run_fixture import FEATURES, OPTIMIZER, PUBLISHED, RunFixture, make_run_fixture
from support.warm_process import WarmProcess, warm_processes
from vico.cli.main import main
from vico.distributed import signals
from vico.io import output_dir

# One case in EVERY is run, and ALWAYS.
EVERY = 6
ALWAYS = (*HDF5, "features of another width than the checkpoint's")


@pytest.fixture(scope="module")
def workers() -> Iterator[list[WarmProcess]]:
    with warm_processes(2) as processes:
        yield processes


@pytest.fixture(scope="module")
def original(workers: list[WarmProcess], tmp_path_factory: pytest.TempPathFactory) -> RunFixture:
    return make_run_fixture(tmp_path_factory.mktemp("original") / "fixture", workers[0])


@pytest.fixture
def copied(original: RunFixture, tmp_path: Path) -> RunFixture:
    return original.copy(tmp_path / "fixture")


def test_one_line_says_where_and_what_to_do(
    original: RunFixture, workers: list[WarmProcess], tmp_path: Path
) -> None:
    assert len(CASES) > 200
    # The self-test limits the seconds; a busy machine is no fault here.
    chosen = list(dict.fromkeys([*list(CASES)[::EVERY], *ALWAYS]))
    results = try_all(chosen, original, workers, tmp_path, limit=60)
    assert not {name: fault for name, (fault, _) in results.items() if fault}


def test_debug_shows_where_an_error_comes_from(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--debug", "--batch_size", "0"]) == 2
    err = capfd.readouterr().err
    message = "vico: error: --batch_size 0: must be a whole number of at least 1, "
    message += "and at most a billion"
    assert "Traceback" in err and err.splitlines()[-1] == message


def test_odd_but_legal_settings(copied: RunFixture, in_this_process: None) -> None:
    """Unusable settings in a published checkpoint, and a ds_config with every harmless word."""
    saved = argparse.Namespace(
        batch_size=-3, lr="nan", sub=True, resume="", epochs=1.5, max_feats=10, data_path=3
    )
    pth(PUBLISHED, lambda content: content.update(args=saved))(copied)
    switched_off = {name: {"enabled": False} for name in ("bf16", "amp", "wandb")}
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": "auto"}
    ds(
        **switched_off,
        fp16={"enabled": "auto", "loss_scale": 0},
        gradient_clipping=0.0,
        steps_per_print="auto",
        train_batch_size=4,
        zero_optimization=offload,
    )(copied)
    line = f"eval --resume {{fixture}}/{PUBLISHED} --deepspeed {{fixture}}/ds.json"
    assert main(copied.command(line)) == 0


def test_main_in_another_program(copied: RunFixture, in_this_process: None) -> None:
    """A notebook or a thread calls `main`: it gets the code, and its own signal handlers back."""
    before = signals.handlers()
    line = ["train", *copied.flags, "--output_dir", str(copied.folder / "threads")]
    line += "--max_steps 1 --warmup_epochs 1 --epochs 1".split()
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(main, line).result() == 0
    assert main([*line, "--batch_size", "0"]) == 2
    assert signals.handlers() == before and signals.stop_requested() == 0


@pytest.mark.parametrize("size", [150_000, 100_000, 2_500])
def test_a_full_disk_leaves_nothing_half_written(
    size: int,
    copied: RunFixture,
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """No file can exceed `size`: the optimizer's state, the weights, or the curves do not fit."""
    # TensorBoard writes in a thread.
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    capfd.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        code = main(["train", *copied.flags])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    *notes, error = capfd.readouterr().err.splitlines()
    assert len(notes) == (size < 10_000)  # curves end no run
    out = copied.folder / "out"
    assert code == 6 and error.startswith(f"vico: error: {out}")
    assert f"({os.strerror(errno.EFBIG)}); free space" in error
    names = {path.name for path in out.iterdir()} - {output_dir.LOCK}
    assert not [name for name in names if name.startswith((".", "checkpoint"))]
    # With enough space the same command runs.
    assert main(["train", *copied.flags]) == 0


# ---- two ranks ----------------------------------------------------------------------------------


def damage_rank_1(fixture: RunFixture) -> None:
    """NaN in the one video that only the second of two ranks checks before training."""
    rows({}, {"video": "100001"}, {}, {})(fixture)
    pth(FEATURES, lambda videos: videos["100001"].fill_(torch.nan) is None or videos)(fixture)


TWO_RANKS: dict[str, Case] = {
    "unknown flag": flags("--epoch 3", "unknown flag --epoch; did you mean '--epochs'?"),
    "no features": refused(
        gone(FEATURES), "clipvitl14.pth: no such file; the video feature file should be there"
    ),
    "a feature of rank 1": refused(
        damage_rank_1,
        "clipvitl14.pth: 1 of 2 questions (1 videos) have features with NaN or infinite values, "
        "e.g. '100001'",
    ),
    "batch size of one rank": ds_config(
        ds(train_batch_size=4),
        "train_batch_size 4 does not fit --batch_size 4 --accum_iter 1 on 2 rank(s), which make 8",
    ),
    "damaged checkpoint": own(
        flip(OPTIMIZER, 5000), "optimizer.safetensors: damaged (its sha256 is not the recorded one)"
    ),
    "output_dir fails late": flags(
        "--output_dir /proc/vico",
        "/proc/vico: cannot be made (No such file or directory); choose another",
    ),
}
# The case whose second rank may end by itself.
WAITED_FOR = "unknown flag"


def run_as_launchers_do(fixture: RunFixture, line: str, wait: bool) -> tuple[list[bool], Processes]:
    """(which ranks had ended when an end was seen, the run).

    Then the other is ended; with `wait` it may end.
    """
    run = start(*fixture.command(line), ranks=2)
    run.wait_until(lambda: not run.running)
    has_ended = [process.poll() is not None for process in run.processes]
    for process in run.processes:
        if process.poll() is None and not wait:
            os.killpg(process.pid, signal.SIGTERM)
    run.wait(60)
    return has_ended, run


@pytest.fixture(scope="module")
def two_ranks(
    original: RunFixture, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[bool], Processes]]:
    """All cases at once: one waits."""

    def run(name: str) -> tuple[list[bool], Processes]:
        fixture = original.copy(tmp_path_factory.mktemp("two") / "fixture")
        case = TWO_RANKS[name]
        if case.damage is not None:
            case.damage(fixture)
        return run_as_launchers_do(fixture, case.line, wait=name == WAITED_FOR)

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(TWO_RANKS, pool.map(run, TWO_RANKS), strict=True))


@pytest.mark.parametrize("name", TWO_RANKS)
def test_rank_0_speaks_before_any_rank_ends(
    name: str, two_ranks: dict[str, tuple[list[bool], Processes]]
) -> None:
    case = TWO_RANKS[name]
    has_ended, run = two_ranks[name]
    # On a busy machine the end of rank 0 may be seen so late that rank 1 has ended by itself.
    ends_itself = name == WAITED_FOR or has_ended[1]
    code_of_rank_1 = case.code if ends_itself else -signal.SIGTERM
    assert has_ended[0] and run.codes == [case.code, code_of_rank_1], run.output
    assert "Traceback" not in run.output and run.stderrs[1] == ""
    line = run.stderrs[0]
    assert line.startswith("vico: error: ") and line.count("\n") == 1, line
    assert all(part in line for part in case.parts), line
