"""Tables of the report: ranks, overlap, what a run does besides its steps, clocks and power."""

from typing import Any

from benchmarks.measure.spreads import median_of
from benchmarks.report.markdown import NOT_MEASURED, Section, number
from benchmarks.report.scaling import CASE_NAMES

Record = dict[str, Any]
RUN_SECONDS = {
    "imports_seconds": "imports",
    "connect_seconds": "connecting",
    "engine_seconds": "the engine, random weights",
    "first_step_seconds": "the first step",
    "save_seconds": "a save",
    "resume_seconds": "reading it back",
}

GPU_SAMPLES = {
    "clocks.sm": "clock, MHz: min, median, max",
    "power.draw": "power, W",
    "temperature.gpu": "temperature, C",
}


def add_ranks(section: Section, cases: list[Record]) -> None:
    """How ranks differ, what was predicted, and one profiled step's communication."""
    rows = []
    for case in cases:
        name = _name(case)
        if "by_rank" not in case:
            rows.append([name, *[NOT_MEASURED] * 5])
            continue
        by_rank, profiled = case["by_rank"], case["communication_time"]
        seconds, memory = (_range(by_rank[key]) for key in ("seconds", "allocated_gib"))
        predicted = case["predicted"]
        pair = (predicted.get(key) for key in ("memory_gib", "real_tokens_per_second"))
        communication = number(profiled["seconds"], 3)
        imbalance = number(by_rank["imbalance"], 3)
        rows.append(
            [name, seconds, memory, imbalance, communication, " / ".join(map(number, pair))]
        )
    if rows:
        columns = ["case", "s/step of a rank: min, median, max", "GiB allocated: min, median, max"]
        columns += ["tokens, most over mean", "communication of a profiled step, s"]
        section.add_table([*columns, "predicted GiB / tokens/s"], rows)


def _range(values: list[float]) -> str:
    ordered = sorted(values)
    return ", ".join(number(x, 3) for x in (ordered[0], ordered[len(ordered) // 2], ordered[-1]))


def add_overlap(section: Section, cases: list[Record]) -> None:
    """What of the communication costs time: of a profiled step, and by steps without gathers."""
    rows = []
    for case in cases:
        profiled, found = case.get("communication_time", {}), case.get("overlap", {})
        if "exposed_seconds" not in profiled:
            continue
        row = [_name(case), number(median_of(case["figures"]["seconds"]), 3)]
        row += [number(profiled[key], 3) for key in ("seconds", "exposed_seconds")]
        cost = NOT_MEASURED
        if found:
            share = found["gathers_cost_seconds"] / found["seconds"]
            cost = f"{number(found['gathers_cost_seconds'], 3)} ({share:.1%} of the weak case)"
        rows.append([*row, cost])
    if rows:
        columns = ["case", "s/step", "communication of a profiled step, s", "not hidden, s"]
        section.add_table([*columns, "what gathers cost, s: the weak case less this one"], rows)


def add_runs(section: Section, cases: list[Record]) -> None:
    """What a run does besides its steps, in seconds, and how fast it scores."""
    rows = []
    for case in cases:
        if run := case.get("run"):
            row = [_name(case), *(number(run.get(key), 3) for key in RUN_SECONDS)]
            rows.append([*row, number(run["scoring"]["questions_per_second"], 3)])
    if rows:
        columns = ["case", *(f"{what}, s" for what in RUN_SECONDS.values())]
        section.add_table([*columns, "questions scored/s"], rows)


def add_gpu_samples(section: Section, samples: dict[str, Any]) -> None:
    """`samples`: of nvidia-smi, by what was timed meanwhile."""
    rows = []
    for what, by_gpu in samples.items():
        if not isinstance(by_gpu, dict):
            continue
        for index, found in by_gpu.items():
            measured = [_low_median_high(found[name]) for name in GPU_SAMPLES]
            reasons = ", ".join(found["clocks_throttle_reasons.active"])
            rows.append([what, index, str(found["samples"]), *measured, reasons])
    if rows:
        columns = ["while timed", "GPU", "samples", *GPU_SAMPLES.values(), "throttle reasons"]
        section.add_table(columns, rows)


def _low_median_high(found: Any) -> str:
    if not isinstance(found, dict):
        return number(found)
    return ", ".join(number(found[key]) for key in ("min", "median", "max"))


def _name(case: Record) -> str:
    return " ".join(str(case.get(key, "")) for key in CASE_NAMES)
