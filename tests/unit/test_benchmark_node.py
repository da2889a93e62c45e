"""The `node` suite's plans, rows for memory that ended, and figures of each rank."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.baseline.models import MODELS, SIZES
from benchmarks.measure.workload import SyntheticWorkload
from benchmarks.report.sections import node_section, one_of_section
from benchmarks.suites.node import plan as node_plan
from benchmarks.suites.node import rank as node_rank
from benchmarks.suites.node import suite as node
from benchmarks.suites.node.communication_time import exposed
from benchmarks.suites.node.plan import CasePlan, plan_on
from support.processes import ROOT, base_environment, run_command, start
from vico.distributed.world import World
from vico.errors import UserError
from vico.planner.gpu_specs import GPUS, Hardware

WORKLOAD = SyntheticWorkload(32_000)


@pytest.mark.parametrize(
    ("size", "gpus", "stage", "fits"),
    [("7B", 1, 2, True), ("33B", 8, 3, True), ("65B", 8, 3, True), ("65B", 8, 2, False)],
)
def test_questions_fit(size: str, gpus: int, stage: int, fits: bool) -> None:
    """The documented commands ask for no more than an H100 holds; 24 questions of 65B do not."""
    hardware = Hardware(GPUS["H100"], gpus)
    chosen = plan_on(hardware, None, "bf16", size, MODELS[size], stage, WORKLOAD)
    assert (chosen.questions > 0) == fits
    if fits:
        assert chosen.predicted["memory_gib"] <= chosen.predicted["available_gib"]
        assert chosen.predicted["real_tokens_per_second"] > 0
    given = plan_on(hardware, 24, "bf16", size, MODELS[size], stage, WORKLOAD)
    assert given.questions == 24
    too_much = given.predicted["memory_gib"] > given.predicted["available_gib"]
    assert too_much == (size == "65B")


@pytest.mark.parametrize("size", SIZES)
def test_small_sizes(size: str) -> None:
    """Every size has a small model with fewer layers than a larger size."""
    small = node_plan.small(MODELS[size])
    assert small.n_layers == MODELS[size].n_layers // 16 and small.num_parameters < 2 * 10**6


def arguments(**changes: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    node.add_flags(parser)
    flags = "--tiny --sizes 7B --stages 2 --precision fp32 --num_workers 0 --steps 2 --warmup 1"
    args = parser.parse_args([*flags.split(), "--strong_questions", "2"])
    vars(args).update(changes)
    return args


def test_memory_ends(alone: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A case that runs out of memory is a row with what was predicted; earlier ones stay."""
    time_steps = node_rank.time_steps

    def out_of_memory(*arguments: Any) -> Any:
        if arguments[4] == (2, 2) and cases:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return time_steps(*arguments)

    monkeypatch.setattr(node_rank, "time_steps", out_of_memory)
    cases: list[dict[str, Any]] = []
    for case in node_rank._cases(arguments(scaling=["weak", "strong"]), alone, "7B", 2, 1.0):
        cases.append(case)
    weak, strong = cases
    assert len(weak["by_rank"]["seconds"]) == 1 and weak["by_rank"]["imbalance"] == 1.0
    assert weak["questions_per_micro_batch"] == 2
    assert strong["not_run"] == "out of memory: CUDA out of memory"
    assert strong["scaling"] == "strong"
    record = {"cases": cases, "failures": [], "machines": []}
    text = "\n".join(node_section(record, tmp_path).lines)
    assert "out of memory: CUDA out of memory" in text and "not measured" in text


def test_recipe() -> None:
    """16 questions of each rank in two micro-batches, or in smaller ones where memory asks it."""
    args = arguments()
    assert node_rank._case_work("recipe", args, 4, CasePlan(2, {})) == (64, 8)
    planned = {"memory_gib": 72.0}
    assert node_rank._case_work("recipe", args, 4, CasePlan(24, planned)) == (64, 8)
    assert node_rank._case_work("recipe", args, 4, CasePlan(3, planned)) == (64, 3)
    assert node_rank._case_work("weak", args, 4, CasePlan(3, planned)) == (12, 3)
    assert node_rank._case_work("strong", args, 4, CasePlan(3, planned)) == (2, 3)


def test_memory_ends_on_a_rank(tmp_path: Path) -> None:
    """A rank of several leaves its row for the process that started it, and ends."""
    facts = {"size": "65B", "stage": 3, "ranks": 2, "scaling": "weak", "not_run": "out of memory"}
    args = arguments(part=tmp_path / "65B.json")
    with pytest.raises(UserError, match="65B ZeRO-3: out of memory"):
        node_rank._end_out_of_memory(args, facts)
    assert json.loads((tmp_path / f"65B{node.OUT_OF_MEMORY}").read_text()) == facts


def test_lost_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that ends in one stage is a row of the record and ends no other stage."""

    def start(args: Any, ranks: int, size: str, stage: int, part: Path) -> int:
        facts = {"size": size, "stage": stage, "ranks": ranks}
        if stage == 2:
            text = json.dumps(facts | {"not_run": "out of memory"})
            part.with_suffix(node.OUT_OF_MEMORY).write_text(text, encoding="utf-8")
            return 2
        content = json.dumps({"ranks": ranks, "cases": [facts]})
        part.write_text(content, encoding="utf-8")
        return 0 if size == "7B" else 3

    monkeypatch.setattr(node, "_start", start)
    args = arguments(ranks="2", sizes=["7B", "13B"], stages=[2, 3])
    parts, failures = node._start_all(args)
    cases = [case for part in parts for case in part["cases"]]
    assert [(c["size"], c["stage"], "not_run" in c) for c in cases] == [
        ("7B", 2, True),
        ("7B", 3, False),
        ("13B", 2, True),
        ("13B", 3, False),
    ]
    assert failures == [{"size": "13B", "ranks": 2, "exit_code": 3}]


def test_nothing_fits(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the planner says that no question fits, nothing is loaded."""
    monkeypatch.setattr(node_rank, "plan_case", lambda *_: CasePlan(0, {"memory_gib": 128.0}))
    (case,) = node_rank._cases(arguments(), alone, "65B", 3, 1.0)
    assert case["not_run"] == "the planner says no question fits"
    assert case["predicted"] == {"memory_gib": 128.0}


def test_threads_of_a_bound_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks divide the host's cores, as counted before each is bound to those of one node."""
    numbers: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(node_rank, "host_cores", lambda: 96)
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    node_rank._set_num_threads()
    assert numbers == [12]


def test_exposed() -> None:
    """Of transfers the time in which no kernel runs; those that overlap count once."""
    transfers = [(0.0, 4.0), (3.0, 5.0), (9.0, 10.0)]
    assert exposed(transfers, [(1.0, 3.5), (2.0, 4.5), (20.0, 30.0)]) == pytest.approx(2.5)
    assert exposed(transfers, []) == 6.0
    assert exposed([], [(1.0, 2.0)]) == 0.0


def test_besides_steps(alone: World, tmp_path: Path) -> None:
    """The recipe also starts, scores, saves and resumes; what was saved comes back."""
    args = arguments(scaling=["recipe", "long", "kept"], warmup=0, steps=1)
    recipe, longer = node_rank._cases(args, alone, "toy", 3, 1.0, {"imports_seconds": 1.0})
    run = recipe["run"]
    assert run["equal"] and run["checkpoint_bytes"] > 0
    assert run["scoring"]["questions"] > 1 and run["scoring"]["questions_per_second"] > 0
    for name in ("imports", "engine", "first_step", "save", "resume"):
        assert run[f"{name}_seconds"] > 0
    assert (recipe["captions"], longer["captions"]) == ([80, 250], [200, 358])
    tokens = [
        case["work"][0]["real_tokens"] / case["work"][0]["questions"] for case in (recipe, longer)
    ]
    assert tokens[1] > 1.2 * tokens[0]
    record = {"cases": [recipe, longer], "failures": [], "machines": []}
    text = "\n".join(node_section(record, tmp_path).lines)
    assert "questions scored/s" in text and "not hidden, s" in text


@pytest.mark.slow
def test_node_shards(tmp_path: Path) -> None:
    """Frozen weights are divided within each of two nodes, or kept whole: no number changes."""
    flags = "node --tiny --stages 3 --precision fp32 --steps 1 --scaling weak kept".split()
    program = (str(ROOT / "benchmarks" / "run.py"),)
    run = start(
        *flags,
        "--results",
        str(tmp_path),
        ranks=4,
        program=program,
        environment={"LOCAL_WORLD_SIZE": "2"},
    )
    assert run.wait() == [0] * 4, run.output
    (path,) = tmp_path.glob("node-*.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    weak, kept = record["cases"]
    assert record["equal"] is True and kept["scaling"] == "kept"
    shards = [case["communication"]["frozen_shards"] for case in (weak, kept)]
    assert shards == [2, 1]
    received = [case["communication"]["parameters"] for case in (weak, kept)]
    assert received[0] > received[1]
    overlap = kept["overlap"]
    difference = overlap["seconds"] - overlap["kept_seconds"]
    assert overlap["gathers_cost_seconds"] == difference and overlap["communication_seconds"] > 0
    text = "\n".join(node_section(record, tmp_path).lines)
    assert "what gathers cost" in text


def test_nodes_of_the_planner() -> None:
    """As in training: within nodes where there are several of several GPUs."""
    for nodes, expected in ((1, False), (2, True)):
        hardware = Hardware(GPUS["H100"], 8, nodes=nodes, network_gbit=400)
        chosen = plan_on(hardware, None, "bf16", "65B", MODELS["65B"], 3, WORKLOAD)
        assert chosen.in_nodes == expected and not chosen.keeps_fit
    small_enough = plan_on(Hardware(GPUS["H100"], 8), None, "bf16", "7B", MODELS["7B"], 3, WORKLOAD)
    assert small_enough.keeps_fit


def test_one_of_eight(tmp_path: Path) -> None:
    """One rank alone holds an eighth of the weights and runs whole steps."""
    words = "one_of_eight --tiny --sizes 65B --steps 1 --results".split()
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *words, str(tmp_path)]
    run = run_command(command, cwd=tmp_path, environment=base_environment())
    assert run.codes == [0], run.output
    record = json.loads(run.stdouts[0].splitlines()[-1])
    (case,) = record["cases"]
    assert case["ranks"] == case["communication"]["frozen_shards"] == 8
    assert case["figures"]["seconds"]["median"] > 0 and case["memory"]["allocated_gib"] > 0
    text = "\n".join(one_of_section(record, tmp_path).lines)
    assert "no communication takes time" in text and "one rank alone" in text
