"""The `gpu` and `node` suites with a toy model on a CPU, their metrics, and the report."""

import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import run
from benchmarks.baseline import correctness
from benchmarks.baseline.models import MODELS, SIZES, make_shared_pair
from benchmarks.baseline.variants import Packed, scoring_batches, training_batch
from benchmarks.measure import metrics
from benchmarks.measure.ceilings import device_ceilings
from benchmarks.measure.clocks import Clock
from benchmarks.measure.metrics import WorkCounts, layer_parameters
from benchmarks.measure.peak_rates import SOURCES, fp8_peak_tflops, peak_rate
from benchmarks.measure.workload import SyntheticWorkload
from benchmarks.paths import RESULTS, ROOT
from benchmarks.report.scaling import disagreements, scaling
from benchmarks.suites.node.suite import rank_numbers
from support.processes import base_environment, run_command
from vico.errors import UserError
from vico.model.attention import backends
from vico.model.attention.masks import AttentionMask, attention_mask, restrict_queries
from vico.model.attention.reference import attend_plain
from vico.model.batch import PackedBatch
from vico.planner.gpu_specs import GPUS

CPU = torch.device("cpu")
GPU_FLAGS = "gpu --tiny --device cpu --tasks both both_long".split()
H100 = "NVIDIA H100 80GB HBM3"
PNG = b"\x89PNG"


def last_record(out: str, folder: Path) -> dict[str, Any]:
    """The record that `out` ends with, which must be in a file of `folder`, too."""
    record: dict[str, Any] = json.loads(out.splitlines()[-1])
    paths = folder.glob(f"{record['suite']}-*.json")
    assert record in [json.loads(path.read_text()) for path in paths]
    return record


def make_report(
    suite: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> tuple[str, list[str]]:
    """(text, names of the plots) of a report on the one record in `folder`."""
    path, out = next(folder.glob(f"{suite}-*.json")), folder / "report"
    assert run.main(["report", str(path), "--out", str(out)]) == 0
    plots = [Path(p) for p in json.loads(capfd.readouterr().out.splitlines()[-1])["plots"]]
    assert all(plot.read_bytes().startswith(PNG) for plot in plots)
    return (out / "report.md").read_text(), [plot.name for plot in plots]


@pytest.mark.slow
def test_gpu_suite(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All parts but the device's events and allocator run on a CPU; the report draws them."""
    assert run.main([*GPU_FLAGS, "--results", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    record = last_record(out, tmp_path)
    assert record["equal"] is True and record["peak"] == "n/a" and record["clock"] == "process time"
    ratios = "train_both train_both_long score peak_memory_train peak_memory_score"
    assert set(record["ratios"]) == set(ratios.split())
    checked = record["checks"]["attention"]["backends"]
    running = {name for name, backend in checked.items() if backend["runs"]}
    assert running == {"blocks", "sdpa", "plain"}
    compared = checked["sdpa"]["distances"]["scoring, asked rows"]
    assert set(compared) == {"output", "q", "k", "v", "gate2"}
    assert len(next(iter(record["checks"]["steps"]["losses"].values()))) == 20

    assert set(record["peer_ratios"]) == {"train_both", "train_both_long", "score"}
    packed = record["peers"]["train_both"]["HF + PEFT LoRA, packed, flash attention"]
    assert packed == {"not_run": "the flash-attn package is not installed"}
    timed = record["memory"]["train"]["fast"]["timed"]
    assert timed["allocated_gib"] >= 0 and timed["reserved_gib"] == "n/a"

    if "not_run" not in record["fp8"]:  # with torch 2.12 or newer
        assert set(record["fp8"]["steps"]) == {"train_both", "score"}
        for step in record["fp8"]["steps"].values():
            # The same work, of which fp8 moves the results; the shares are of its own peak.
            assert 1e-5 < step["worst_distance"] < 0.1 and step["figures"]["hfu"] == "n/a"
            assert len(step["seconds"]["fp8"]) == len(step["seconds"]["without"]) == 2

    both = record["training"]["both"]
    assert len(both["rounds"]) == 3
    for key in ("seconds", "data_wait_seconds"):
        assert len(both[key]["plain"]) == len(both[key]["fast"]) == 2
    plain, fast = (both["figures"][variant] for variant in ("plain", "fast"))
    assert plain["mfu"] == fast["hfu"] == "n/a"
    assert fast["share_of_measured_ceiling"]["median"] > 0
    assert padded_tokens(plain) > 2 * padded_tokens(fast)
    assert "backbone products" in record["time_split"]["fast"]["train"]
    assert record["budgets"]["2048"]["questions"] > 2
    for part in ("vqa, cap ", "distance to fp32 of fast", "MFU = 4 P"):
        assert part in out

    text, plots = make_report("gpu", tmp_path, capfd)
    assert plots == ["memory.png", "time-split.png"]
    parts = (
        "its figures mean nothing",
        "fp8",
        "No plot of the ratio's waterfall",
        "1-gpu/time-split.png",
    )
    for part in parts:
        assert part in text


def padded_tokens(rates: dict[str, Any]) -> float:
    """Of a step, from its rate."""
    tokens: float = rates["padded_tokens_per_second"]["median"] * rates["seconds"]["median"]
    return tokens


def test_gpu_suite_refuses_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A loss that is 3 % off ends the suite with 1 and without times."""
    train = Packed.train_batch

    def wrong_train(self: Packed, batch: PackedBatch) -> list[float]:
        vqa, cap = train(self, batch)
        return [vqa * 1.03, cap]

    monkeypatch.setattr(Packed, "train_batch", wrong_train)
    # The twenty steps find it first.
    steps = {"equal": True, "worst_relative": 0.0}
    monkeypatch.setattr(correctness, "twenty_steps", lambda *_: steps)
    assert run.main([*GPU_FLAGS, "--no_peers", "--results", str(tmp_path)]) == 1
    out, err = capfd.readouterr()
    record = last_record(out, tmp_path)
    assert record["equal"] is False and record["ratios"] == {}
    assert "do not compute the same" in err
    both = record["training"]["both"]
    assert both["rounds"] and not {"figures", "seconds"} & set(both)


def test_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that scales scores differently is found."""

    def scaled(*arguments: Any) -> Tensor:
        *others, scale = arguments
        return backends.sdpa(*others, scale * math.sqrt(64 / 72))

    monkeypatch.setitem(backends.KERNELS, "sdpa", backends.AutogradKernel(scaled))
    result = correctness.attention_backends(MODELS["toy"], CPU, torch.float32, repeats=1)
    assert result["backends"]["blocks"]["equal"]
    assert not result["backends"]["sdpa"]["equal"] and not result["equal"]


def test_no_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    """Without a GPU the `gpu` suite ends with one line."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run.main(["gpu"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_published_parameters() -> None:
    """The models have as many parameters as the published ones."""
    assert {size: MODELS[size].num_parameters for size in SIZES} == {
        "7B": 6_738_415_616,
        "13B": 13_015_864_320,
        "33B": 32_528_943_616,
        "65B": 65_285_660_672,
    }


def packed_batches() -> list[PackedBatch]:
    work = SyntheticWorkload(600)
    return [training_batch(work.training(0, 4)), *scoring_batches(work.scoring(0, 1))]


def test_packed_counts() -> None:
    """Pairs of query and key are those of the definition; FLOPs follow from rows."""
    config = MODELS["toy"]
    for batch in packed_batches():
        mask = attention_mask(batch.segments)
        assert metrics.visible_pairs(batch.segments) == count_visible(batch, mask)
        assert restrict_queries(mask, batch.wanted_rows_R).query_rows is not None
        counts = metrics.count_packed(config, [batch], samples=2, questions=1, training=True)
        assert counts.useful_flops == 4 * layer_parameters(config) * batch.num_real_tokens
        all_rows = 4 * layer_parameters(config) * batch.num_rows
        assert 0.5 * all_rows < counts.run_flops < 1.5 * all_rows


def count_visible(batch: PackedBatch, mask: AttentionMask) -> int:
    """With equal scores, a row's mean of one-hot values has an entry for each key it sees."""
    ones = torch.ones(batch.num_rows, 1, 1)
    one_hot = torch.eye(batch.num_rows).unsqueeze(1)
    return int((attend_plain(ones, ones, one_hot, None, mask) > 0).sum())


def test_rates() -> None:
    """Shares of a peak, against numbers by hand."""
    counts = WorkCounts(1000, 1500, 100, 16, 8, useful_flops=4e12, run_flops=5e12)
    rates = metrics.rates(
        [2.0, 2.0], [counts, counts], peak_tflops=100.0, ceiling_tflops=80.0, num_devices=2
    )
    assert rates["mfu"]["median"] == pytest.approx(0.01)
    assert rates["hfu"]["median"] == pytest.approx(0.0125)
    assert rates["share_of_measured_ceiling"]["median"] == pytest.approx(0.0125)
    assert rates["real_tokens_per_second"]["median"] == 500
    assert rates["questions_per_second"]["median"] == 4


def test_peak_rates() -> None:
    """Only a device's exact name has a peak, and only in its precisions; each has a source."""
    known = peak_rate(H100, "bf16")
    assert known is not None and known.tflops == 989
    assert peak_rate(f"{H100} MIG 1g.10gb", "bf16") is None
    assert fp8_peak_tflops(H100) == pytest.approx(1979, rel=1e-3)  # of its datasheet, too
    assert fp8_peak_tflops("NVIDIA A100-SXM4-80GB") is fp8_peak_tflops("cpu") is None
    assert peak_rate(H100, "fp32") is None
    assert peak_rate("Tesla V100-SXM2-16GB", "bf16") is None
    assert peak_rate("Tesla V100-SXM2-16GB", "fp16") is not None
    assert set(SOURCES) == {gpu.name for gpu in GPUS.values() if gpu.tflops is not None}


def test_clock_and_ceilings() -> None:
    """Wall time includes waiting, process time does not."""
    for clock in (Clock(CPU), Clock(CPU, wall=True)):
        assert clock.time(lambda: torch.ones(400, 400) @ torch.ones(400, 400)) > 0
    slept = Clock(CPU, wall=True).time(lambda: subprocess.run(["sleep", "0.2"], check=True))
    assert slept > 0.2 > Clock(CPU).time(lambda: None)
    ceilings = device_ceilings(CPU, torch.float32, 128, 1, repeats=3)
    assert ceilings["matmul_tflops"] > 0 and ceilings["copy_gb_per_second"] > 0
    assert ceilings["product"].startswith("float32 128")
    assert "sustained_matmul_tflops" not in ceilings
    ceilings = device_ceilings(CPU, torch.float32, 64, 1, repeats=3, sustained_seconds=0.1)
    assert ceilings["sustained_matmul_tflops"] > 0 and ceilings["gpu_state"]


def test_shared_pair() -> None:
    """Both models hold the same parameter tensors, so that memory holds them once."""
    plain, fast = make_shared_pair(MODELS["toy"], torch.bfloat16, CPU)
    for name, parameter in plain.state_dict(keep_vars=True).items():
        assert parameter is fast.get_parameter(name), name
    frozen = {p.dtype for p in fast.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


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


def test_scaling() -> None:
    """Efficiency compares cases of one size, stage and kind; losses must agree within all."""
    cases = [
        case(2, 4, "weak", 300.0, 1.0, 32),
        case(2, 1, "weak", 100.0, 1.5),
        case(2, 1, "strong", 100.0, 1.5),
        case(3, 1, "weak", 90.0, 1.5),
    ]
    efficiencies = {}
    for row in scaling(cases):
        efficiencies[row["stage"], row["scaling"], row["ranks"]] = row["efficiency"]
    assert efficiencies == {
        (2, "weak", 1): 1.0,
        (2, "weak", 4): 0.75,
        (2, "strong", 1): "n/a",
        (3, "weak", 1): "n/a",
    }
    assert disagreements(cases, 1e-5) == []
    for wrong in (1.6, math.nan):
        (found,) = disagreements([*cases, case(3, 2, "strong", 1.0, wrong)], 1e-2)
        assert {c["stage"] for c in found["cases"]} == {2, 3}


@pytest.mark.slow
def test_node_suite(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two ranks of this machine: stages and kinds of scaling, with equal losses; the report."""
    environment = base_environment()
    # run.sh must find the checkout by itself.
    environment.pop("PYTHONPATH")
    environment.pop("VICO_RANKS", None)
    flags = ["--tiny", "--ranks", "2", "--scaling", "weak", "strong", "--results", str(tmp_path)]
    command = ["bash", str(ROOT / "benchmarks" / "run.sh"), "node", *flags]
    suite = run_command(command, cwd=tmp_path, environment=environment)
    assert suite.codes == [0], suite.output
    record = last_record(suite.stdouts[0], tmp_path)
    cases = record["cases"]
    assert record["equal"] is True and record["failures"] == []
    assert len(cases) == 4 and {c["ranks"] for c in cases} == {2}
    kinds = {(c["stage"], c["scaling"]) for c in cases}
    assert kinds == {(2, "weak"), (2, "strong"), (3, "weak"), (3, "strong")}
    weak = [c["losses"] for c in cases if c["scaling"] == "weak"]
    first, second = (torch.tensor(x, dtype=torch.float64).round(decimals=2) for x in weak)
    assert torch.equal(first, second)
    for measured in cases:
        assert len(measured["seconds"]) == 3
        assert measured["figures"]["mfu"] == "n/a"
        assert measured["memory"]["allocated_gib"] > 0
        assert measured["work"][0]["questions"] == measured["questions_per_step"] == 4
        assert len(measured["by_rank"]["seconds"]) == 2 and measured["predicted"] == {}
        assert measured["communication_time"]["seconds"] > 0
    received = {c["stage"]: c["communication"]["bytes_per_step"] for c in cases}
    assert received[3] > received[2] > 0
    assert record["machines"][0]["collectives"]["all_gather_gb_per_second"] > 0

    text, plots = make_report("node", tmp_path, capfd)
    assert plots == ["memory.png"]
    assert "No plot of scaling: the record has one number of ranks" in text


@pytest.mark.parametrize("text", ["0", "1,x", ""])
def test_bad_ranks(text: str) -> None:
    with pytest.raises(UserError, match="--ranks"):
        rank_numbers(text)


def test_committed_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The committed report is what `report` makes of the committed records that it names."""
    committed = (RESULTS / "report" / "report.md").read_text()
    names = re.findall(r"`((?:cpu|gpu|node)-[^`]*\.json)`", committed)
    records = [str(RESULTS / name) for name in names]
    assert len(records) == 4
    assert run.main(["report", *records, "--out", str(tmp_path)]) == 0
    capfd.readouterr()
    assert (tmp_path / "report.md").read_text() == committed


def test_report_refuses_other_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text('{"suite": "other"}')
    assert run.main(["report", str(tmp_path / "x.json"), "--out", str(tmp_path)]) == 2
    assert "is no record of a suite" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--sizes 7B 13B --stages 2", "--sizes 33B 65B --stages 3"])
def test_documented_sizes_start(flags: str, tmp_path: Path) -> None:
    """The node commands of the README at every size, in small, on two ranks."""
    words = ["--tiny", "--ranks", "2", *flags.split(), "--results", str(tmp_path)]
    command = ["bash", str(ROOT / "benchmarks" / "run.sh"), "node", *words]
    suite = run_command(command, cwd=tmp_path, environment=base_environment())
    assert suite.codes == [0], suite.output
    record = last_record(suite.stdouts[0], tmp_path)
    kinds = [(case["size"], case["scaling"]) for case in record["cases"]]
    sizes = [word for word in flags.split() if word in SIZES]
    kinds_of_size = ["weak", "strong", "recipe", "long"]
    if "--stages 3" in flags:
        kinds_of_size.append("kept")
    assert kinds == [(size, kind) for size in sizes for kind in kinds_of_size]
    assert all("figures" in case for case in record["cases"])
