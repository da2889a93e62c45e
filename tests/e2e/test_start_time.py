"""How long a start takes, with many questions and a file for each video; what it loads."""

from pathlib import Path

import numpy as np
import psutil
import pytest

from support.processes import start
from support.toy_dataset import ToyData, make_rows, write_csv

NUM_QUESTIONS = {"train": 34_000, "val": 5_000}  # of NExT-QA, nearly
NUM_VIDEOS = {"train": 5_000, "val": 440}
# Imports included. The time of a clock would be that of whatever else the machine does; that of the
# process is longer, too, beside other work. Measured on two cores of an EPYC with five other
# processes: 9 to 12; users wait for at most 10 on idle cores.
MAX_CPU_SECONDS = 15.0

# Whether the command has loaded what torch.compile compiles with.
TRAIN = """
import sys
from vico.cli.main import main
code = main(["train", *sys.argv[1:]])
print(code, "torch._inductor.compile_fx" in sys.modules)
"""


@pytest.mark.parametrize("ds_config", ["zero2", "zero3"])
def test_no_compiler_is_loaded(ds_config: str, toy: ToyData, tmp_path: Path) -> None:
    """It takes a second of each rank."""
    flags = [*toy.flags, "--deepspeed", ds_config, "--max_steps", "1", "--no_eval"]
    run = start(*flags, "--output_dir", str(tmp_path / "out"), ranks=1, program=("-c", TRAIN))
    assert run.wait() == [0] and run.stdouts[0].splitlines()[-1] == "0 False", run.output


@pytest.mark.slow
def test_many_questions_and_a_folder_of_features(tmp_path: Path) -> None:
    """The first start, which reads everything, until the first step."""
    toy = ToyData(tmp_path)
    (toy.data / "clipvitl14.pth").unlink()
    (toy.data / "features").mkdir()
    frames = np.random.default_rng(0).standard_normal((8, 768)).astype(np.float16)
    for seed, (split, num_videos) in enumerate(NUM_VIDEOS.items()):
        rows = make_rows(NUM_QUESTIONS[split], num_videos, seed, split)
        write_csv(toy.data / f"{split}.csv", rows)
        for video in {row["video"] for row in rows}:
            np.save(toy.data / "features" / f"{video}.npy", frames)
    flags = [*toy.flags, "--cap", "0", "--output_dir", str(tmp_path / "out")]
    run = start("train", *flags, ranks=1, forks=False)  # it loads as well
    try:
        assert run.wait_until(lambda: "training: " in run.output), run.output
        times = psutil.Process(run.processes[0].pid).cpu_times()
    finally:
        run.kill()
    assert "train: 34000 questions" in run.output and "features, 768 wide" in run.output
    assert times.user + times.system < MAX_CPU_SECONDS
