"""Real runs to break: a tiny world, and `vico train` on ranks of their own processes, as launchers start them."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vico.checkpoint.format import step_folders, step_of
from vico.cli.demo import make_toy_dataset
from vico.io.atomic import REPLACED_SUFFIX, TEMPORARY_SUFFIX, write_json
from vico.io.text import read_json_object
from vico.train.ds_config import SHIPPED_CONFIGS
from vico.train.run_log import read_logs, read_records

ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
RANKS = 2
LAST_STEP = 10  # of two epochs; saved every second step
SAVE_STEPS = 2
SECONDS_OF_A_RUN = 180.0  # a whole one takes about ten on two idle cores
SETTINGS = (
    "--model",
    "tiny",
    "--precision",
    "fp32",
    "--max_seq_len",
    "128",
    "--max_cap_len",
    "128",
    "--epochs",
    "2",
    "--warmup_epochs",
    "1",
    "--lr",
    "0.02",
    "--bias",
    "0.7",
    "--batch_size",
    "2",
    "--save_steps",
    str(SAVE_STEPS),
    "--num_workers",
    "0",
)


@dataclass(frozen=True)
class ToyRun:
    """20 training questions, 10 to validate on, a LLaMA of random numbers; ZeRO-3 partitions even its smallest tensor."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "ToyRun":
        with contextlib.redirect_stdout(None):
            make_toy_dataset(folder, steps=0, splits={"train": 4, "val": 2})
        zero3 = read_json_object(SHIPPED_CONFIGS / "zero3.json", "ds_configs/zero3.json")
        zero3["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
        write_json(folder / "zero3.json", zero3)
        return cls(folder)

    def flags(self, stage: int, out: Path) -> list[str]:
        where = [
            "--data_path",
            str(self.folder / "data"),
            "--llama_model_path",
            str(self.folder / "pretrained" / "llama"),
        ]
        return [
            *where,
            *SETTINGS,
            "--deepspeed",
            "zero2" if stage == 2 else str(self.folder / "zero3.json"),
            "--output_dir",
            str(out),
        ]


class Started:
    """Processes whose output goes to files, so that it can be read while they run."""

    def __init__(self, commands: Sequence[tuple[list[str], dict[str, str]]], logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{time.monotonic_ns()}-{i}.log" for i in range(len(commands))]
        self.processes = []
        for (command, more), log in zip(commands, self.logs, strict=True):
            with log.open("wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        env={
                            **os.environ,
                            "OMP_NUM_THREADS": "1",
                            "PYTHONFAULTHANDLER": "1",
                            "PYTHONPATH": PYTHONPATH,
                            **more,
                        },
                    )
                )

    @property
    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("vico: error: ")]

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def reach(self, condition: Callable[[], bool], seconds: float = SECONDS_OF_A_RUN) -> bool:
        """Wait until it holds; False when a process has ended before, or the time is over."""
        limit = time.monotonic() + seconds
        while not condition():
            if not self.alive or time.monotonic() > limit:
                return condition()
            time.sleep(0.001)
        return True

    def end(self, seconds: float = SECONDS_OF_A_RUN) -> list[int | None]:
        """The exit codes; None for a process that had to be killed when the time was over, its stacks behind what it had said."""
        limit = time.monotonic() + seconds
        codes: list[int | None] = []
        for process in self.processes:
            try:
                codes.append(process.wait(max(0.0, limit - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
                process.send_signal(signal.SIGABRT)  # at which faulthandler writes them
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
        self.kill()
        return codes

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def start_ranks(
    flags: list[str], logs: Path, failpoint: str = "", ranks: int = RANKS, command: str = "train"
) -> Started:
    """One process per rank on a free port, as srun or torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "VICO_FAILPOINT": failpoint,
    }
    line = [sys.executable, "-m", "vico", command, *flags]
    return Started(
        [(line, {**world, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)], logs
    )


def launch(flags: list[str], logs: Path, failpoint: str = "", **more: str) -> Started:
    """By launch/train.sh, as users do."""
    environment = {
        "VICO_RANKS": str(RANKS),
        "PYTHON": sys.executable,
        "VICO_FAILPOINT": failpoint,
        **more,
    }
    return Started([(["bash", str(ROOT / "launch" / "train.sh"), *flags], environment)], logs)


def sha256(out: Path, step: int = LAST_STEP) -> str:
    """Of the weights and the optimizer's state of the checkpoint of a step; empty: there is none."""
    files = [
        out / f"checkpoint-{step}" / name
        for name in ("adapter_model.safetensors", "optimizer.safetensors")
    ]
    if not all(path.exists() for path in files):
        return ""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def losses(out: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_records(out / "steps.jsonl")]


def newest(out: Path) -> int:
    return next(map(step_of, step_folders(out)), 0)


def strays(out: Path) -> list[str]:
    return sorted(
        path.name
        for path in out.rglob("*")
        if path.name.endswith((TEMPORARY_SUFFIX, REPLACED_SUFFIX))
    )


def undisturbed(world: ToyRun, stage: int) -> tuple[str, list[tuple[int, float]]]:
    """(sha256, losses) of a run that nothing disturbs. Raises RuntimeError when it fails: nothing can be compared then."""
    out = world.folder / f"undisturbed{stage}"
    if not out.exists():
        run = start_ranks(world.flags(stage, out), world.folder / "logs")
        if run.end() != [0] * RANKS:
            raise RuntimeError(f"the undisturbed run failed: {run.said[-2000:]}")
    return sha256(out), losses(out)


def difference(world: ToyRun, stage: int, out: Path) -> str:
    """What of a run that has ended is not as in the undisturbed one; empty: nothing."""
    good, good_losses = undisturbed(world, stage)
    if sha256(out) != good:
        return "the final sha256 is not that of the undisturbed run"
    if losses(out) != good_losses:
        return "the logged losses are not those of the undisturbed run"
    return f"left behind: {strays(out)}" if strays(out) else ""


def steps_logged(out: Path) -> int:
    return read_logs(out).last_step


def first_line(text: str) -> str:
    return json.dumps(text.strip().splitlines()[-1][:300]) if text.strip() else "(nothing said)"
