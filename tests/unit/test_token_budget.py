"""--max_tokens where it is not given: the planner's on a GPU, and a resumed run's own."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from support.toy_dataset import ToyData
from vico.checkpoint.format import Checkpoint
from vico.cli.train import main
from vico.planner.gpu_specs import GPUS, Hardware
from vico.train import zero_stage
from vico.train.config import RunConfig
from vico.train.resume import keep_max_tokens
from vico.train.saved_run import Start


@pytest.mark.usefixtures("in_this_process")
def test_the_planners_budget_is_recorded_and_kept(
    toy: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that takes this CPU for an H100; its second start sees a smaller one."""
    for gib, steps in ((80, 1), (2, 2)):
        gpu = replace(GPUS["H100"], memory_gib=gib)
        monkeypatch.setattr(zero_stage, "hardware", lambda _, gpu=gpu: Hardware(gpu))
        flags = ["--output_dir", str(tmp_path / "run"), "--max_steps", str(steps), "--no_eval"]
        assert main([*toy.flags, *flags]) == 0
        assert json.loads((tmp_path / "run" / "args.json").read_text())["max_tokens"] == 8192
        assert "micro-batches: at most 8,192 tokens each" in caplog.text
        was_planned = "--max_tokens 8192: not given, so the planner's" in caplog.text
        assert was_planned == (steps == 1)
        caplog.clear()


@pytest.mark.parametrize(
    ("recorded", "on_cpu", "on_gpu"), [(640, 640, 640), (None, None, 0), ("damaged", None, 0)]
)
def test_a_resumed_run_keeps_its_own(
    recorded: Any, on_cpu: int | None, on_gpu: int | None, tmp_path: Path
) -> None:
    """Also none, as runs began before there was a planner's; a flag counts more."""
    settings = {"max_tokens": recorded}
    (tmp_path / "args.json").write_text(json.dumps(settings))
    own, other = RunConfig(output_dir=tmp_path), RunConfig(output_dir=tmp_path / "other")
    checkpoint = cast(Checkpoint, SimpleNamespace(moments={}, settings=settings))
    for config, found in ((own, Start(None)), (other, Start(checkpoint))):
        assert keep_max_tokens(config, found, on_gpu=False).max_tokens == on_cpu
        assert keep_max_tokens(config, found, on_gpu=True).max_tokens == on_gpu
        given = replace(config, max_tokens=100)
        assert keep_max_tokens(given, found, on_gpu=True).max_tokens == 100
    weights_only = cast(Checkpoint, SimpleNamespace(moments=None, settings=settings))
    for found in (Start(None), Start(weights_only)):
        assert keep_max_tokens(other, found, on_gpu=True).max_tokens is None, "a new run"
