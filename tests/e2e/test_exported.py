"""`vico export` of a trained demo reads back bit for bit, by whole commands."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.run_fixture import WEIGHTS, make_run_fixture
from support.toy_dataset import records
from support.warm_process import CommandResult, WarmProcess
from vico.checkpoint.format import CONFIG

Run = Callable[[str], CommandResult]


@pytest.mark.slow
def test_an_export_reads_back(tmp_path: Path) -> None:
    """Evaluation and training from the export are those from the checkpoint.

    Another LLaMA's is refused.
    """
    with WarmProcess() as warm:
        fixture = make_run_fixture(tmp_path / "demo", warm)
        folder = fixture.folder

        def run(line: str) -> CommandResult:
            return warm.run(fixture.command(line), folder)

        assert run(f"!export {folder}/run {folder}/hub").code == 0
        for name in ("run", "hub"):
            done = run(f"eval --resume {folder}/{name} --output_dir {folder}/eval_{name}")
            assert done.code == 0, done.stderr
        scores = [folder / f"eval_{name}" / "predictions_val.jsonl" for name in ("run", "hub")]
        assert scores[0].read_bytes() == scores[1].read_bytes()
        assert len(records(scores[0])) == 10
        assert same_training(run, folder)
        record = json.loads((folder / "hub" / CONFIG).read_text())
        record["auto_mapping"]["vico"]["fingerprints"]["backbone"] = "another"
        (folder / "hub" / CONFIG).write_text(json.dumps(record))
        refused = run(f"eval --resume {folder}/hub --output_dir {folder}/x")
    assert refused.code == 2 and "was trained with other files (backbone" in refused.stderr


def same_training(run: Run, folder: Path) -> bool:
    """Whether two steps from the export are those from the same weights in a published file."""
    weights = load_file(folder / WEIGHTS)
    torch.save({"model": weights}, folder / "bare.pth")
    found = []
    for source in ("hub", "bare.pth"):
        out = folder / f"from_{source}"
        line = f"--resume {folder}/{source} --output_dir {out} --max_steps 2 --warmup_epochs 0"
        done = run(line)
        assert done.code == 0, done.stderr
        found.append(load_file(out / "checkpoint-2" / "adapter_model.safetensors"))
    assert not torch.equal(found[0]["visual_proj.weight"], weights["visual_proj.weight"])
    return all(torch.equal(value, found[1][name]) for name, value in found[0].items())
