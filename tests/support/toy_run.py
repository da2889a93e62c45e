"""A toy run to break: its data set and flags, starts of it, and what it leaves behind."""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from support.processes import Processes, launch, start
from vico.checkpoint.format import OPTIMIZER, WEIGHTS
from vico.cli.demo import make_toy_dataset
from vico.io.atomic import REPLACED_SUFFIX, TEMPORARY_SUFFIX, write_json
from vico.io.output_dir import OutputDir, step_of
from vico.io.text import read_json_object
from vico.planner.estimate import SHIPPED_CONFIGS
from vico.train.run_log import read_logs, read_records

RANKS = 2
LAST_STEP = 10  # of two epochs
SAVE_STEPS = 2
SETTINGS = (
    "--model tiny --precision fp32 --max_seq_len 128 --max_cap_len 128 --num_workers 0 "
    f"--batch_size 2 --epochs 2 --warmup_epochs 1 --lr 0.02 --bias 0.7 --save_steps {SAVE_STEPS}"
).split()
# Stacks of a process that hangs are written when it is aborted.
STACKS = {"PYTHONFAULTHANDLER": "1"}


@dataclass(frozen=True)
class ToyRun:
    """20 training and 10 validation questions, and a random LLaMA.

    ZeRO-3 partitions even its smallest tensor.
    """

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
        config = "zero2" if stage == 2 else str(self.folder / "zero3.json")
        paths = {
            "--data_path": self.folder / "data",
            "--llama_model_path": self.folder / "pretrained" / "llama",
            "--output_dir": out,
        }
        flags = [*SETTINGS, "--deepspeed", config]
        for flag, path in paths.items():
            flags += [flag, str(path)]
        return flags


def start_training(flags: list[str], failpoint: str = "", ranks: int = RANKS) -> Processes:
    """`vico train FLAGS`, one process per rank."""
    environment = {**STACKS, "VICO_FAILPOINT": failpoint}
    return start("train", *flags, ranks=ranks, environment=environment)


def launch_training(flags: list[str], failpoint: str = "") -> Processes:
    """By launch/train.sh."""
    environment = {**STACKS, "VICO_FAILPOINT": failpoint}
    return launch("train.sh", *flags, ranks=RANKS, environment=environment)


def sha256(out: Path, step: int = LAST_STEP) -> str:
    """Of the weights and the optimizer state of a step's checkpoint; empty: there is none."""
    files = [out / f"checkpoint-{step}" / name for name in (WEIGHTS, OPTIMIZER)]
    if not all(path.exists() for path in files):
        return ""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def losses(out: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_records(out / "steps.jsonl")]


def newest_step(out: Path) -> int:
    """Of the checkpoints in `out`; 0: there is none."""
    folders = OutputDir(out).step_checkpoints()
    return (step_of(folders[0]) or 0) if folders else 0


def steps_logged(out: Path) -> int:
    return read_logs(OutputDir(out)).last_step


def stray_files(out: Path) -> list[str]:
    """Temporary files that a save leaves only when it is killed."""
    return sorted(
        path.name
        for path in out.rglob("*")
        if path.name.endswith((TEMPORARY_SUFFIX, REPLACED_SUFFIX))
    )


def undisturbed(toy: ToyRun, stage: int) -> tuple[str, list[tuple[int, float]]]:
    """(sha256, losses) of a run that nothing disturbs, made once per folder.

    Raises RuntimeError when it fails.
    """
    out = toy.folder / f"undisturbed{stage}"
    if not out.exists():
        run = start_training(toy.flags(stage, out))
        if run.wait() != [0] * RANKS:
            raise RuntimeError(f"the undisturbed run failed: {run.output[-2000:]}")
    return sha256(out), losses(out)


def difference(toy: ToyRun, stage: int, out: Path) -> str:
    """What differs between a run that has ended and the undisturbed one; empty: nothing."""
    expected_sha256, expected_losses = undisturbed(toy, stage)
    if sha256(out) != expected_sha256:
        return "the final sha256 is not that of the undisturbed run"
    if losses(out) != expected_losses:
        return "the logged losses are not those of the undisturbed run"
    return f"left behind: {stray_files(out)}" if stray_files(out) else ""


def last_line(text: str) -> str:
    return json.dumps(text.strip().splitlines()[-1][:300]) if text.strip() else "(no output)"
