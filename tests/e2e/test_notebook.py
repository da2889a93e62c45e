"""Several commands in one process, as a notebook or another program calls them."""

import sys
from pathlib import Path

from support.processes import ROOT, base_environment, run_command
from support.toy_dataset import ToyData

PROGRAM = """
import os, sys
from vico.cli.main import main

def call(*words):
    before = dict(os.environ)
    print("code", main(list(words)), dict(os.environ) == before, flush=True)

if __name__ == "__main__":
    out, *flags = sys.argv[1:]
    train = ["train", *flags, *"--max_steps 1 --warmup_epochs 1 --batch_size 4".split()]
    call(*train, "--output_dir", out + "/a", "--resume", "/nowhere")
    call(*train, "--output_dir", out + "/a")
    call(*train, "--output_dir", out + "/b", "--num_workers", "1")
    call("eval", *flags, "--resume", out + "/b/checkpoint-1")
"""


def test_one_command_after_another(toy: ToyData, tmp_path: Path) -> None:
    """A failing one ends its group of ranks too. Each leaves the environment as it was."""
    script, out = tmp_path / "notebook.py", tmp_path / "out"
    script.write_text(PROGRAM)
    run = run_command([sys.executable, str(script), str(out), *toy.flags], ROOT, base_environment())
    lines = [line for line in run.stdouts[0].splitlines() if line.startswith("code ")]
    assert lines == ["code 3 True", *["code 0 True"] * 3], run.output
    weights = [(out / f / "checkpoint-1" / "adapter_model.safetensors").read_bytes() for f in "ab"]
    assert weights[0] == weights[1]
