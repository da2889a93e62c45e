"""Options of ZeRO: a save and a resume under each that is let through, on two ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support.processes import ROOT, start
from support.toy_dataset import ToyData
from support.training_steps import config_of, training_steps
from vico.distributed.world import World
from vico.errors import TrainingError
from vico.model.ops import fp8
from vico.model.vico import initial_trainables
from vico.train.build import build_engine, read_inputs
from vico.train.ds_config import TESTED_OFFLOAD_OPTIONS, TESTED_OPTIONS
from vico.train.step import train_step

ZERO_OPTIONS = (str(ROOT / "tests" / "support" / "zero_options.py"),)
CPU = {"device": "cpu", "pin_memory": False, "nvme_path": "/local_nvme", "buffer_count": 3}
CPU_PARAM = {**CPU, "buffer_size": 1000, "max_in_cpu": 1000}
# A bucket holds a part of the larger tensors only, and two groups split the partitions.
BELOW_3: dict[str, Any] = {
    "reduce_bucket_size": 1000,
    "allgather_bucket_size": 1000,
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "allgather_partitions": False,
    "overlap_comm": True,
    "ignore_unused_parameters": False,
    "use_multi_rank_bucket_allreduce": False,
}
STAGE_3: dict[str, Any] = {
    "stage": 3,
    "reduce_bucket_size": 1000,
    "stage3_prefetch_bucket_size": 1000,
    "stage3_max_live_parameters": 1000,
    "stage3_max_reuse_distance": 1000,
    "stage3_param_persistence_threshold": 0,
    "sub_group_size": 10_000,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "zero2": {"stage": 2},
    "zero1": {"stage": 1},
    "zero1, all": {"stage": 1, **BELOW_3},
    "zero2, all": {"stage": 2, **BELOW_3},
    "zero2, contiguous": {"stage": 2, "reduce_bucket_size": 1000, "contiguous_gradients": True},
    "zero2, by rank": {"stage": 2, "reduce_bucket_size": 1000, "reduce_scatter": True},
    "zero2, offload": {"stage": 2, "offload_optimizer": CPU},
    "zero3": {"stage": 3},
    "zero3, all": {
        **STAGE_3,
        "overlap_comm": True,
        "contiguous_gradients": False,
        "reduce_scatter": False,
        "memory_efficient_linear": False,
        "log_trace_cache_warnings": True,
        "stage3_model_persistence_threshold": 1000,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero3, leaves": {
        **STAGE_3,
        "leaf_module": {"classes": ["vico.model.llama.Block"]},
        "stage3_gather_fp16_weights_on_model_save": True,
    },
    "zero3, offload": {**STAGE_3, "offload_param": CPU_PARAM, "offload_optimizer": CPU},
}
ROUND_ROBIN = {"stage": 2, "round_robin_gradients": True}
# A run whose saves would hold the values of one tensor in another order.
WRONG_SAVES = """
from vico.cli.main import console
from vico.train.engine import Engine

right = Engine.state

def wrong(engine):
    weights, moments = right(engine)
    weights["temporal_emb.weight"] = weights["temporal_emb.weight"].flip(1)
    return weights, moments

Engine.state = wrong
console()
"""


@pytest.fixture(scope="module")
def lines(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run on two ranks says of each section, and of one that is refused."""
    path = tmp_path_factory.mktemp("sections") / "sections.json"
    return lines_of(path, {**SECTIONS, "round robin": ROUND_ROBIN}, toy.flags)


def lines_of(path: Path, sections: dict[str, Any], flags: list[str]) -> dict[str, str]:
    path.write_text(json.dumps(sections), encoding="utf-8")
    run = start(str(path), *flags, "--batch_size", "2", ranks=2, program=ZERO_OPTIONS)
    assert run.wait() == [0, 0], run.output
    pairs = [line.split(": ", 1) for line in run.stdouts[0].splitlines() if ": " in line]
    return {pair[0]: pair[1] for pair in pairs}


@pytest.mark.parametrize("name", SECTIONS)
def test_save_and_resume(lines: dict[str, str], name: str) -> None:
    """The save holds the live weights, and the step after it is the same to the bit."""
    assert lines[name] == "ok"


@pytest.mark.slow
@pytest.mark.skipif(
    fp8.why_not(torch.device("cpu"), torch.float32) is not None,
    reason="torch 2.11 has no such product on a CPU",
)
def test_in_fp8(toy: ToyData, tmp_path: Path) -> None:
    """Stage 3 in all its forms, from weights that are one byte a number, as stage 2."""
    sections = {name: SECTIONS[name] for name in SECTIONS if name == "zero2" or "zero3" in name}
    flags = [*toy.flags, "--quantize", "fp8", "--attention", "sdpa"]
    lines = lines_of(tmp_path / "sections.json", sections, flags)
    assert {name: lines[name] for name in sections} == dict.fromkeys(sections, "ok")


def test_a_save_of_other_tensors_is_seen(lines: dict[str, str]) -> None:
    """round_robin_gradients, which the ds_config refuses: trains right and would save wrong."""
    assert "saves what is not live" in lines["round robin"]


def test_every_option_that_is_let_through_is_tested() -> None:
    assert {key for section in SECTIONS.values() for key in section} == TESTED_OPTIONS
    assert set(CPU_PARAM) == TESTED_OFFLOAD_OPTIONS


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_that_are_not_live_are_not_saved(toy: ToyData, alone: World, stage: int) -> None:
    config = config_of(toy, "--deepspeed", f"zero{stage}")
    inputs = read_inputs(config, ("train",), alone)
    values = initial_trainables(inputs.trainable_shapes, bias=0.5, seed=0)
    engine = build_engine(config, inputs, values, alone)
    train_step(engine, training_steps(inputs)[0, 0], 1, (1.0, 0.5), lr=1e-3, world=alone)
    weights, _ = engine.state()
    engine.require_live(weights)
    saved = weights["temporal_emb.weight"]
    for place in ((0, 0), (-1, -1)):
        weights["temporal_emb.weight"] = saved.clone()
        weights["temporal_emb.weight"][place] += 1e-3
        with pytest.raises(TrainingError, match=r"values of temporal_emb\.weight than the model"):
            engine.require_live(weights)


def test_a_run_saves_nothing_that_is_not_live(toy: ToyData, tmp_path: Path) -> None:
    flags = ("train", *toy.flags, "--output_dir", str(tmp_path / "run"), "--save_steps", "1")
    run = start(*flags, ranks=1, program=("-c", WRONG_SAVES))
    assert run.wait() == [TrainingError.exit_code], run.output
    assert "other values of temporal_emb.weight than the model has" in run.output
    assert not list((tmp_path / "run").glob("checkpoint*"))
