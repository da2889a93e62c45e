"""The report's section of each suite: tables and plots of one record."""

from pathlib import Path
from typing import Any

from benchmarks.measure.spreads import median_of
from benchmarks.report import plot_data, plots, tables
from benchmarks.report.markdown import NOT_MEASURED, Section, measured, number, percent
from benchmarks.report.scaling import CASE_NAMES, scaling

Record = dict[str, Any]

CPU_COLUMNS = (
    "train_seconds",
    "real_tokens_per_second",
    "padded_tokens_per_second",
    "target_tokens_per_second",
    "samples_per_second",
    "share_of_measured_ceiling",
    "run_share_of_measured_ceiling",
    "score_seconds",
    "questions_per_second",
)
GPU_COLUMNS = (
    "seconds",
    "real_tokens_per_second",
    "padded_tokens_per_second",
    "target_tokens_per_second",
    "questions_per_second",
    "data_wait_seconds",
)
GPU_SHARES = {
    "mfu": "MFU",
    "hfu": "HFU",
    "share_of_measured_ceiling": "of measured ceiling",
}
UTILIZATION = (
    "MFU counts every token of every sequence as done, those that sharing saves too, and can "
    "exceed 1. HFU counts the rows that run, to compare with other programs."
)
NODE_COLUMNS = [
    *("size", "stage", "ranks", "scaling", "real tokens/s", "s/step", "MFU", "HFU"),
    *("GiB allocated / reserved", "MiB per step (computed)"),
]


def cpu_section(record: Record, folder: Path) -> Section:
    section = Section()
    _add_ratios(section, record)
    for name, geometry in record["geometries"].items():
        if "figures" not in geometry:
            continue
        section.add_text(f"### {name}")
        section.add_text(f"{geometry['workload']}; all times are process CPU time.")
        rows = []
        for variant, metrics in geometry["figures"].items():
            rows.append([variant, *(measured(metrics, c, _three_digits) for c in CPU_COLUMNS)])
        section.add_table(["variant", *(c.replace("_", " ") for c in CPU_COLUMNS)], rows)
        _add_peers(section, geometry.get("peers", {}))
    _add_memory_plot(section, record, folder)
    section.add_plots(
        plots.draw_waterfall(plot_data.waterfalls(record), folder / "waterfall.png"),
        "the ratio's waterfall",
        "the record has no steps between plain and fast (`--waterfall` measures them)",
    )
    _add_time_split_plot(
        section, record, folder, "the record has no profile (`--profile` makes one)"
    )
    return section


def gpu_section(record: Record, folder: Path) -> Section:
    section = Section()
    _add_checks(section, record["checks"])
    _add_ratios(section, record)
    rows = []
    for part in ("training", "scoring"):
        for kind, compared in record.get(part, {}).items():
            for variant, metrics in compared.get("figures", {}).items():
                values = [number(median_of(metrics[c])) for c in GPU_COLUMNS]
                shares = [percent(metrics[s]) for s in GPU_SHARES]
                rows.append([f"{part} {kind}", variant, *values, *shares])
    if rows:
        names = [c.replace("_per_second", "/s").replace("_", " ") for c in GPU_COLUMNS]
        section.add_table(["step", "variant", *names, *GPU_SHARES.values()], rows)
        section.add_text(UTILIZATION)
    samples = {}
    for part in ("training", "scoring"):
        for kind, compared in record.get(part, {}).items():
            samples[f"{part} {kind}"] = compared.get("gpu_samples")
    tables.add_gpu_samples(section, samples)
    _add_fp8(section, record.get("fp8", {"not_run": NOT_MEASURED}))
    _add_peers(section, record.get("peers", {}))
    if "both_long" not in record.get("training", {}):
        section.add_text("A step with longer captions: not measured.")
    _add_memory(section, record)
    _add_kernel_shares(section, record)
    _add_small_cards(section, record)
    _add_memory_plot(section, record, folder)
    section.add_plots(
        plots.draw_budgets(record.get("budgets", {}), folder / "budgets.png"),
        "speed by token budget",
        "the record has fewer than two budgets",
    )
    why_none = "the gpu suite measures plain and fast alone"
    section.add_plots([], "the ratio's waterfall", why_none)
    _add_time_split_plot(section, record, folder, "the record has no profile")
    return section


def node_section(record: Record, folder: Path) -> Section:
    section = Section()
    section.add_table(NODE_COLUMNS, [_node_row(case) for case in record["cases"]])
    section.add_text(UTILIZATION)
    tables.add_ranks(section, record["cases"])
    tables.add_overlap(section, record["cases"])
    tables.add_runs(section, record["cases"])
    samples = {}
    for case in record["cases"]:
        name = " ".join(str(case.get(key, "")) for key in CASE_NAMES)
        samples[name] = case.get("gpu_samples")
    tables.add_gpu_samples(section, samples)
    for failure in record["failures"]:
        start = f"{failure['size']} on {failure['ranks']} rank(s)"
        section.add_text(f"{start} ended with exit code {failure['exit_code']}.")
    rows = []
    for machine in record["machines"]:
        collectives = machine["collectives"]
        gather, reduce = (
            number(collectives[f"all_{name}_gb_per_second"], 3) for name in ("gather", "reduce")
        )
        rows.append([str(machine["ranks"]), gather, reduce])
    section.add_table(["ranks", "all-gather, GB/s (bus)", "all-reduce, GB/s (bus)"], rows)
    section.add_plots(
        plots.draw_scaling(scaling(record["cases"]), folder),
        "scaling",
        "the record has one number of ranks",
    )
    section.add_plots(
        plots.draw_node_memory(plot_data.node_memory(record["cases"]), folder / "memory.png"),
        "memory",
        "the record has no weak scaling",
    )
    return section


def one_of_section(record: Record, folder: Path) -> Section:
    section = Section()
    section.add_text(f"{record['limits']}.")
    section.add_table(NODE_COLUMNS, [_node_row(case) for case in record["cases"]])
    section.add_text(UTILIZATION)
    return section


SECTIONS = {
    "cpu": cpu_section,
    "gpu": gpu_section,
    "node": node_section,
    "one_of_eight": one_of_section,
}


def _add_ratios(section: Section, record: Record) -> None:
    """Against plain, and beside it against the fastest peer."""
    spreads, peers = record.get("ratio_spreads", {}), record.get("peer_ratios", {})
    rows = []
    for key, value in record.get("ratios", {}).items():
        row = [key, number(spreads.get(key, value), 3)]
        if key in peers:
            rows.append([*row, number(peers[key], 3), peers[key]["peer"]])
        else:
            rows.append([*row, NOT_MEASURED, ""])
    if rows:
        columns = ["", "plain / fast, median (p10 to p90)", "fastest peer / fast", "the peer"]
        section.add_table(columns, rows)


def _three_digits(metric: Any) -> str:
    return number(metric, 3)


def _add_peers(section: Section, peers: dict[str, Any]) -> None:
    """Every peer's time over that of fast, by what was run."""
    rows = []
    for what, by_peer in peers.items():
        for name, result in by_peer.items():
            shown = result.get("not_run") or number(result, 3)
            rows.append([plot_data.STEPS.get(what, what), name, shown])
    if rows:
        section.add_table(["step", "peer", "peer / fast, median (p10 to p90)"], rows)


def _add_fp8(section: Section, measured: Record) -> None:
    """--quantize fp8: its shares are of the fp8 rates, whatever runs in half precision."""
    if "not_run" in measured:
        section.add_text(f"Products in fp8: {measured['not_run']}.")
        return
    rows = []
    for step, result in measured["steps"].items():
        figures = result["figures"]
        values = [number(median_of(figures[c])) for c in GPU_COLUMNS if c in figures]
        shares = [percent(figures[share]) for share in GPU_SHARES]
        rows.append([step, number(result["ratio"], 3), *values, *shares])
    names = [c.replace("_per_second", "/s").replace("_", " ") for c in GPU_COLUMNS[:-1]]
    shares = [f"{name} (of fp8)" for name in GPU_SHARES.values()]
    section.add_table(["step in fp8", "without fp8 / with it", *names, *shares], rows)


def _add_memory(section: Section, record: Record) -> None:
    """Peaks of a step alone, and of the timed mode, in which graphs' memory is reserved."""
    rows = []
    for what, by_variant in (record.get("memory") or {}).items():
        for variant, peaks in by_variant.items():
            alone = [number(peaks[f"{kind}_gib"], 3) for kind in ("allocated", "reserved")]
            pairs = [_pair(peaks.get(name)) for name in ("timed", "replayed")]
            rows.append([what, variant, " / ".join(alone), *pairs])
    if rows:
        pair_name = "GiB allocated / reserved"
        kinds = ("kernels one by one", "in the timed steps", "once all is captured")
        section.add_table(["step", "variant", *(f"{pair_name}, {kind}" for kind in kinds)], rows)


def _pair(memory: Record | None) -> str:
    if memory is None:
        return NOT_MEASURED
    return f"{number(memory['allocated_gib'], 3)} / {number(memory['reserved_gib'], 3)}"


def _add_memory_plot(section: Section, record: Record, folder: Path) -> None:
    paths = plots.draw_memory(plot_data.memory_bars(record), folder / "memory.png")
    section.add_plots(paths, "memory", "the record has no memory")


def _add_time_split_plot(section: Section, record: Record, folder: Path, why_none: str) -> None:
    paths = plots.draw_time_split(plot_data.time_splits(record), folder / "time-split.png")
    section.add_plots(paths, "the time split", why_none)


def _add_checks(section: Section, checks: dict[str, Any]) -> None:
    attention, steps = checks["attention"], checks["steps"]
    section.add_text(
        "Attention against its definition in fp32, worst relative distance of output and gradients "
        f"(bound {attention['bound']:.0e}):"
    )
    rows = []
    for name, backend in attention["backends"].items():
        if backend["runs"]:
            seconds = [backend["seconds"][stream]["median"] for stream in ("training", "scoring")]
            milliseconds = [number(1e3 * s, 3) for s in seconds]
            rows.append([name, f"{backend['worst']:.1e}", *milliseconds])
        else:
            rows.append([name, backend["why"].split(": ", 1)[-1], "", ""])
    columns = ["backend", "distance", "training, ms per layer", "scoring, ms per layer"]
    section.add_table(columns, rows)
    distances = []
    for name, means in checks["distance_to_fp32"]["means"].items():
        distances.append(f"{name} {means['score_distance']:.2e}")
    section.add_text(
        f"Toy steps against fp32 on the CPU: losses within {steps['worst_relative']:.1e} "
        f"(bound {steps['bound']:.0e}). "
        f"Mean distance of toy scores to fp32: {', '.join(distances)}."
    )


def _add_kernel_shares(section: Section, record: Record) -> None:
    """How much of a step the device computes. The rest of the time it waits for the host."""
    training = record.get("training", {})
    steps = {
        "train": training.get("both"),
        "train_vqa": training.get("vqa"),
        "train_cap": training.get("cap"),
        "train_both_long": training.get("both_long"),
        "score": record.get("scoring", {}).get("score"),
    }
    splits = record.get("time_split") or {}
    rows = []
    for key, compared in steps.items():
        for variant, split in splits.items():
            if not compared or "figures" not in compared or key not in split:
                continue
            kernels = sum(split[key].values())
            seconds = compared["figures"][variant]["seconds"]["median"]
            share = f"{kernels / seconds:.0%}"
            rows.append([key, variant, number(kernels, 3), number(seconds, 3), share])
    if rows:
        columns = ["step", "variant", "its kernels, s", "the step, s", "share"]
        section.add_table(columns, rows)


def _add_small_cards(section: Section, record: Record) -> None:
    rows = []
    for card, result in record.get("small_cards", {}).items():
        peak = "memory ended"
        if "out_of_memory" not in result:
            peak = number(result["allocated_gib"], 3)
        allowed = number(result["allowed_gib"], 3)
        rows.append([card, allowed, str(result["recomputed_layers"]), peak])
    if rows:
        columns = ["card (its memory capped)", "GiB allowed", "layers recomputed"]
        section.add_table([*columns, "peak of a training step, GiB"], rows)


def _node_row(case: Record) -> list[str]:
    stage, kind = f"ZeRO-{case['stage']}", case.get("scaling", "")
    row = [case["size"], stage, str(case["ranks"]), kind]
    if "figures" not in case:
        row.append(case.get("not_run", "refused"))
        return row + [""] * (len(NODE_COLUMNS) - len(row))
    metrics, memory = case["figures"], case["memory"]
    return [
        *row,
        number(median_of(metrics["real_tokens_per_second"])),
        number(median_of(metrics["seconds"]), 3),
        percent(metrics["mfu"]),
        percent(metrics["hfu"]),
        _pair(memory),
        f"{case['communication']['bytes_per_step'] / 2**20:,.1f}",
    ]
