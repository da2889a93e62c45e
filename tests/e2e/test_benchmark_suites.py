"""The gpu and node suites in small, on a CPU: what differs is refused, figures follow their formulas, and the report draws what there is."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run
from benchmarks.baseline import correctness
from benchmarks.baseline.variants import (
    MODELS,
    Packed,
    make_shared_pair,
    scoring_batches,
    training_batch,
)
from benchmarks.measure import metrics as figures
from benchmarks.measure.clocks import Clock, device_ceilings
from benchmarks.measure.peak_rates import SOURCES, peak_of
from benchmarks.measure.workload import SyntheticWorkload
from benchmarks.report.record import ROOT
from benchmarks.suites import node
from vico.errors import UserError
from vico.model.attention import backends
from vico.model.attention.masks import attention_mask, restrict_queries
from vico.model.attention.reference import attend_plain
from vico.model.batch import PackedBatch
from vico.planner.gpu_specs import GPUS

CPU = torch.device("cpu")
GPU_FLAGS = ["gpu", "--tiny", "--device", "cpu", "--tasks", "both"]
NODE_SECONDS = 240


def last_record(out: str, folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert record in [
        json.loads(path.read_text()) for path in folder.glob(f"{record['suite']}-*.json")
    ]
    return record


def test_gpu_suite_on_a_cpu_and_its_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*GPU_FLAGS, "--results", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    record = last_record(out, tmp_path)
    assert record["equal"] is True and record["peak"] == "n/a" and record["clock"] == "process time"
    assert set(record["ratios"]) == {
        "train_both",
        "score",
        "peak_memory_train",
        "peak_memory_score",
    }
    backends = record["checks"]["attention"]["backends"]
    assert {name for name, found in backends.items() if found["runs"]} == {
        "blocks",
        "sdpa",
        "plain",
    }
    assert set(backends["sdpa"]["distances"]["scoring, asked rows"]) == {
        "output",
        "q",
        "k",
        "v",
        "gate2",
    }
    assert len(next(iter(record["checks"]["steps"]["losses"].values()))) == 20
    both = record["training"]["both"]
    assert len(both["rounds"]) == 3 and all(
        len(both[key][v]) == 2
        for key in ("seconds", "data_wait_seconds")
        for v in ("plain", "fast")
    )
    plain, fast = (both["figures"][variant] for variant in ("plain", "fast"))
    assert plain["mfu"] == fast["hfu"] == "n/a" and fast["share_of_measured_ceiling"]["median"] > 0
    sizes = [
        f["padded_tokens_per_second"]["median"] * f["seconds"]["median"] for f in (plain, fast)
    ]
    assert sizes[0] > 2 * sizes[1]
    assert (
        "backbone products" in record["time_split"]["fast"]["train"]
        and record["budgets"]["2048"]["questions"] > 2
    )
    assert "vqa, cap " in out and "distance to fp32 of fast" in out and "MFU = 4 P" in out

    written = str(next(tmp_path.glob("gpu-*.json")))
    assert run.main(["report", written, "--out", str(tmp_path / "report")]) == 0
    drawn = json.loads(capfd.readouterr().out.splitlines()[-1])["plots"]
    assert [Path(plot).name for plot in drawn] == ["memory.png", "time-split.png"]
    assert all(Path(plot).read_bytes().startswith(b"\x89PNG") for plot in drawn)
    text = (tmp_path / "report" / "report.md").read_text()
    assert (
        "its figures mean nothing" in text
        and "No plot of the ratio's waterfall" in text
        and "1-gpu/time-split.png" in text
    )


def test_gpu_suite_refuses_another_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    train = Packed.train_batch

    def other_train(self: Packed, batch: PackedBatch) -> list[float]:
        vqa, cap = train(self, batch)
        return [vqa * 1.03, cap]

    monkeypatch.setattr(Packed, "train_batch", other_train)
    monkeypatch.setattr(
        correctness, "twenty_steps", lambda *_: {"equal": True, "worst_relative": 0.0}
    )  # which finds it first
    assert run.main([*GPU_FLAGS, "--results", str(tmp_path)]) == 1
    out, err = capfd.readouterr()
    record = last_record(out, tmp_path)
    assert record["equal"] is False and record["ratios"] == {} and "do not compute the same" in err
    assert record["training"]["both"]["rounds"] and not {"figures", "seconds"} & set(
        record["training"]["both"]
    )


def test_a_backend_with_another_scale_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = backends.AutogradKernel(lambda *a: backends.sdpa(*a[:-1], a[-1] * math.sqrt(64 / 72)))
    monkeypatch.setitem(backends.KERNELS, "sdpa", wrong)
    found = correctness.attention_backends(MODELS["toy"], CPU, torch.float32, repeats=1)
    assert (
        found["backends"]["blocks"]["equal"]
        and not found["backends"]["sdpa"]["equal"]
        and not found["equal"]
    )


def test_a_gpu_that_is_not_there_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run.main(["gpu"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_parameters_are_those_of_the_published_models() -> None:
    published = {
        "7B": 6_738_415_616,
        "13B": 13_015_864_320,
        "33B": 32_528_943_616,
        "65B": 65_285_660_672,
    }
    assert {
        name: figures.all_parameters(shape) for name, shape in MODELS.items() if name != "toy"
    } == published


def packed_batches() -> list[PackedBatch]:
    work = SyntheticWorkload(600)
    return [training_batch(work.training(0, 4)), *scoring_batches(work.scoring(0, 1))]


def test_amounts_of_a_packed_batch() -> None:
    shape = MODELS["toy"]
    for batch in packed_batches():
        seen = attention_mask(batch.segments)
        one = torch.ones(batch.num_rows, 1, 1)
        position = torch.arange(batch.num_rows).view(-1, 1, 1)
        # With equal scores, a row's mean of one-hot values has as many entries as the row sees keys.
        weights = attend_plain(
            one,
            one,
            torch.nn.functional.one_hot(position.squeeze()).float().unsqueeze(1),
            None,
            seen,
        )
        assert figures.visible_pairs(batch.segments) == int((weights > 0).sum())
        assert restrict_queries(seen, batch.wanted_rows_R).query_rows is not None
        amount = figures.of_packed(shape, [batch], samples=2, questions=1, training=True)
        assert amount.useful_flops == 4 * figures.layer_parameters(shape) * batch.num_real_tokens
        whole = 4 * figures.layer_parameters(shape) * batch.num_rows
        assert 0.5 * whole < amount.run_flops < 1.5 * whole


def test_shares_of_a_peak_by_hand() -> None:
    amount = figures.Amount(1000, 1500, 100, 16, 8, useful_flops=4e12, run_flops=5e12)
    found = figures.rates(
        [2.0, 2.0], [amount, amount], peak_tflops=100.0, ceiling_tflops=80.0, devices=2
    )
    assert found["mfu"]["median"] == pytest.approx(0.01) and found["hfu"][
        "median"
    ] == pytest.approx(0.0125)
    assert found["share_of_measured_ceiling"]["median"] == pytest.approx(0.0125)
    assert (
        found["real_tokens_per_second"]["median"] == 500
        and found["questions_per_second"]["median"] == 4
    )


def test_unknown_hardware_has_no_peak() -> None:
    known = peak_of("NVIDIA H100 80GB HBM3", "bf16")
    assert known is not None and known.tflops == 989
    assert (
        peak_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") is None
        and peak_of("NVIDIA H100 80GB HBM3", "fp32") is None
    )
    assert (
        peak_of("Tesla V100-SXM2-16GB", "bf16") is None
        and peak_of("Tesla V100-SXM2-16GB", "fp16") is not None
    )
    assert set(SOURCES) == {gpu.name for gpu in GPUS.values() if gpu.tflops is not None}


def test_clock_and_ceilings() -> None:
    for clock in (Clock(CPU), Clock(CPU, wall=True)):
        assert clock.time(lambda: torch.ones(400, 400) @ torch.ones(400, 400)) > 0
    assert (
        Clock(CPU, wall=True).time(lambda: subprocess.run(["sleep", "0.2"], check=True))
        > 0.2
        > Clock(CPU).time(lambda: None)
    )
    found = device_ceilings(CPU, torch.float32, 128, 1, repeats=3)
    assert (
        found["matmul_tflops"] > 0
        and found["copy_gb_per_second"] > 0
        and found["product"].startswith("float32 128")
    )


def test_both_models_hold_the_same_parameters() -> None:
    plain, fast = make_shared_pair(MODELS["toy"], torch.bfloat16, CPU)
    assert all(
        a is b
        for a, b in zip(
            plain.state_dict(keep_vars=True).values(),
            (fast.get_parameter(n) for n in plain.state_dict()),
            strict=True,
        )
    )
    assert {p.dtype for p in fast.parameters() if not p.requires_grad} == {torch.bfloat16}


def case(
    stage: int, ranks: int, kind: str, speed: float, loss: float, questions: int = 8
) -> dict[str, Any]:
    return {
        "size": "toy",
        "stage": stage,
        "ranks": ranks,
        "scaling": kind,
        "questions_per_step": questions,
        "losses": [[loss, 2.0]],
        "figures": {"real_tokens_per_second": {"median": speed}},
    }


def test_scaling_and_disagreements() -> None:
    cases = [
        case(2, 4, "weak", 300.0, 1.0, 32),
        case(2, 1, "weak", 100.0, 1.5),
        case(2, 1, "strong", 100.0, 1.5),
        case(3, 1, "weak", 90.0, 1.5),
    ]
    rows = {
        (row["stage"], row["scaling"], row["ranks"]): row["efficiency"]
        for row in node.scaling(cases)
    }
    assert rows == {
        (2, "weak", 1): 1.0,
        (2, "weak", 4): 0.75,
        (2, "strong", 1): "n/a",
        (3, "weak", 1): "n/a",
    }
    assert node.disagreements(cases, 1e-5) == []
    for wrong in (1.6, math.nan):
        (found,) = node.disagreements([*cases, case(3, 2, "strong", 1.0, wrong)], 1e-2)
        assert {c["stage"] for c in found["cases"]} == {2, 3}


def test_node_suite_on_two_ranks_and_its_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PYTHONPATH",
        "VICO_RANKS",
    }
    environment = {
        **{name: value for name, value in os.environ.items() if name not in words},
        "PYTHON": sys.executable,
    }
    command = [
        "bash",
        str(ROOT / "benchmarks" / "run.sh"),
        "node",
        "--tiny",
        "--ranks",
        "2",
        "--results",
        str(tmp_path),
    ]
    done = subprocess.run(
        command,
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=NODE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = last_record(done.stdout, tmp_path)
    cases = record["cases"]
    assert {(c["stage"], c["scaling"], c["ranks"]) for c in cases} == {
        (s, k, 2) for s in (2, 3) for k in ("weak", "strong")
    }
    assert record["equal"] is True and record["failures"] == []
    assert (
        len(
            {
                json.dumps([[round(loss, 2) for loss in losses] for losses in c["losses"]])
                for c in cases
                if c["scaling"] == "weak"
            }
        )
        == 1
    )
    for found in cases:
        assert (
            len(found["seconds"]) == 3
            and found["figures"]["mfu"] == "n/a"
            and found["memory"]["allocated_gib"] > 0
        )
        assert found["work"][0]["questions"] == found["questions_per_step"] == 4
    moved = {c["stage"]: c["communication"]["bytes_per_step"] for c in cases}
    assert moved[3] > moved[2] > 0
    assert record["machines"][0]["collectives"]["all_gather_gb_per_second"] > 0

    written = str(next(tmp_path.glob("node-*.json")))
    assert run.main(["report", written, "--out", str(tmp_path / "report")]) == 0
    assert [Path(p).name for p in json.loads(capfd.readouterr().out.splitlines()[-1])["plots"]] == [
        "memory.png"
    ]
    assert (
        "No plot of scaling: the record has one number of ranks"
        in (tmp_path / "report" / "report.md").read_text()
    )


@pytest.mark.parametrize("text", ["0", "1,x", ""])
def test_bad_numbers_of_ranks(text: str) -> None:
    with pytest.raises(UserError, match="--ranks"):
        node._numbers_of_ranks(text)


def test_report_refuses_what_is_no_record(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text('{"suite": "other"}')
    assert run.main(["report", str(tmp_path / "x.json"), "--out", str(tmp_path)]) == 2
    assert "is no record of a suite" in capfd.readouterr().err
