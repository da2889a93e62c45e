"""What checkpoints cost: the share of a demo run, and the time to read one of 7B's size."""

import time
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from faults.result import Result, Scale
from support.processes import ROOT
from support.toy_run import last_line, launch_training
from vico.checkpoint.format import MOMENTS, TrainState
from vico.checkpoint.read import read
from vico.checkpoint.validate import validate_for_model
from vico.checkpoint.write import RunIdentity, save
from vico.cli.demo import make_toy_dataset
from vico.model.config import LlamaConfig, trainable_shapes
from vico.train.config import RunConfig
from vico.train.run_log import read_records

NAME = "save_cost"
TITLE = "saves take at most 1 % of a demo run; a checkpoint of 7B's size is read in 5 s"
MINUTES = (0.5, 1.8)
# The demo has eight epochs. Its first save costs more than the others.
EPOCHS = (3, 8)
MAX_SHARE, MAX_READ_SECONDS = 0.01, 5.0
LLAMA_7B = LlamaConfig(dim=4096, n_layers=32, n_heads=32, vocab_size=32000)


def run(scale: Scale) -> Result:
    failures = []
    size, save_seconds, read_seconds = _time_7b(scale.folder)
    if read_seconds > MAX_READ_SECONDS:
        failures.append(f"a checkpoint of {size / 2**20:.0f} MiB was read in {read_seconds:.1f} s")
    share, facts = _share_of_demo(scale.folder, EPOCHS[not scale.quick])
    if share is None:
        failures.append(f"the demo run failed: {facts['said']}")
    elif share > MAX_SHARE:
        failures.append(f"saves took {share:.2%} of the run")
    seconds = {
        "seconds_to_save_7b": round(save_seconds, 2),
        "seconds_to_read_7b": round(read_seconds, 2),
        "mib_7b": round(size / 2**20, 1),
    }
    return Result(2 - len(failures), 2, {"failures": failures, **facts, **seconds})


def _time_7b(folder: Path) -> tuple[int, float, float]:
    """(bytes, seconds to save, seconds to check and read) of LLaMA-7B's adapter."""
    shapes = trainable_shapes(LLAMA_7B, num_adapted=32, adapter_len=10, num_slots=10)
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    moments = {}
    for name, shape in shapes.items():
        for moment in MOMENTS:
            moments[f"{name}.{moment}"] = torch.rand(shape)
    target = folder / "checkpoint-1"
    began = time.monotonic()
    run = RunIdentity("selftest", RunConfig().to_json(), {})
    save(target, weights, moments, TrainState(step=1), run)
    saved = time.monotonic()
    validate_for_model(read(target), shapes, LLAMA_7B.n_layers)
    read_seconds = time.monotonic() - saved
    return sum(path.stat().st_size for path in target.iterdir()), saved - began, read_seconds


def _share_of_demo(folder: Path, epochs: int) -> tuple[float | None, dict[str, object]]:
    """The share of saves in a demo run, from its first step to its end; None: the run failed."""
    make_toy_dataset(folder / "demo", steps=0)  # an untrained LLaMA takes the same time
    out = folder / "run"
    settings = {
        "--config": ROOT / "launch" / "recipes" / "demo.yaml",
        "--epochs": epochs,
        "--output_dir": out,
        "--data_path": folder / "demo" / "data",
        "--llama_model_path": folder / "demo" / "pretrained" / "llama",
    }
    flags = []
    for flag, value in settings.items():
        flags += [flag, str(value)]
    run = launch_training(flags)
    if run.wait(900) != [0]:
        return None, {"said": last_line(run.output)}
    steps = read_records(out / "steps.jsonl")
    board = EventAccumulator(str(out / "runs"))
    board.Reload()
    saves = [event.value for event in board.Scalars("perf/save_seconds")]
    speeds = [event.value for event in board.Scalars("perf/eval_questions_per_second")]
    saving = sum(saves)
    training = sum(record["step_seconds"] for record in steps)
    num_val = read_records(out / "log.txt")[0]["val_n"]
    evaluating = sum(num_val / speed for speed in speeds)
    share = saving / (saving + training + evaluating)
    return share, {
        "share": round(share, 5),
        "saves": len(saves),
        "steps": len(steps),
        "seconds_per_save": round(saving / len(saves), 3),
        "training_seconds": round(training, 1),
        "evaluation_seconds": round(evaluating, 1),
        "share_without_evaluation": round(saving / (saving + training), 5),
    }
