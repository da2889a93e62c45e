"""`bash benchmarks/run.sh report`: a Markdown report and its plots, from records alone. Nothing is measured and nothing is filled in."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from benchmarks.measure.metrics import UNKNOWN, median_of
from benchmarks.report.record import RESULTS
from benchmarks.suites.node import scaling
from vico.errors import UserError
from vico.io.atomic import write_text
from vico.io.text import read_json_object

TITLES = {"cpu": "One thread of a CPU", "gpu": "One GPU", "node": "Several ranks"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "records",
        nargs="*",
        type=Path,
        help="JSON files of runs; default: the newest of each suite in benchmarks/results/",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "report", help="folder of report.md and the plots"
    )


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "matplotlib is not installed; run 'bash launch/environment.sh --dev', or pip install -e '.[benchmarks]'"
        )
    paths = args.records or newest(RESULTS)
    if not paths:
        raise UserError(f"{RESULTS}: holds no record; run a suite first, or name records")
    records = [_read(path) for path in paths]
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Benchmarks",
        "",
        "Made by `bash benchmarks/run.sh report` from the records named below; ratios are plain over fast.",
    ]
    plots: list[str] = []
    for number, (path, record) in enumerate(zip(paths, records, strict=True), start=1):
        folder = args.out / f"{number}-{record['suite']}"
        folder.mkdir(exist_ok=True)
        section, drawn = SECTIONS[record["suite"]](record, folder)
        lines += ["", f"## {TITLES[record['suite']]}", "", *_head(path, record), *section]
        plots += [str(plot) for plot in drawn]
    report = args.out / "report.md"
    write_text(report, "\n".join(lines) + "\n")
    print(f"report: {report}, {len(plots)} plot(s)", flush=True)
    print(
        json.dumps(
            {"report": str(report), "plots": plots, "records": [str(path) for path in paths]}
        ),
        flush=True,
    )
    return 0


def newest(folder: Path) -> list[Path]:
    """The last record of each suite; their names hold the date."""
    found = [sorted(folder.glob(f"{suite}-*.json"))[-1:] for suite in TITLES]
    return [path for paths in found for path in paths]


def _read(path: Path) -> dict[str, Any]:
    record = read_json_object(path, "a benchmark record")
    if record.get("suite") not in TITLES:
        raise UserError(
            f"{path}: is no record of a suite ({', '.join(TITLES)}); name files of benchmarks/results/"
        )
    return record


def _head(path: Path, record: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    hardware = record["hardware"]
    machine = (
        f"{hardware['gpus']} x {hardware['gpu']}"
        if "gpu" in hardware
        else f"{hardware['cpu']}, {hardware['cores']} cores"
    )
    facts = [
        f"`{record['command']}`",
        record["date"],
        f"commit {record['git_commit']}",
        machine,
        versions,
        f"`{path.name}`",
    ]
    lines = ["; ".join(facts) + ".", ""]
    if record["config"].get("tiny"):
        lines += [
            "**A toy model: this shows that the harness runs; its figures mean nothing.**",
            "",
        ]
    if not record["equal"]:
        lines += ["**The variants did not compute the same: there are no figures.**", ""]
    return lines


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def show(figure: Any, digits: int = 4) -> str:
    """Median and spread, or the number itself, or "n/a"."""
    if isinstance(figure, dict):
        return f"{show(figure['median'], digits)} ({show(figure['p10'], digits)} to {show(figure['p90'], digits)})"
    if not isinstance(figure, int | float):
        return UNKNOWN
    return f"{figure:,.0f}" if abs(figure) >= 10**digits else f"{figure:.{digits}g}"


def _plot(lines: list[str], drawn: list[Path], what: str, why_not: str) -> list[Path]:
    lines += (
        [f"![{what}]({path.parent.name}/{path.name})" for path in drawn]
        if drawn
        else [f"No plot of {what}: {why_not}."]
    )
    lines.append("")
    return drawn


def _ratios(record: dict[str, Any]) -> list[str]:
    spreads = record.get("ratio_spreads", {})
    return table(
        ["plain / fast", "median (p10 to p90)"],
        [[k, show(spreads.get(k, v), 3)] for k, v in record["ratios"].items()],
    )


def _cpu(record: dict[str, Any], folder: Path) -> tuple[list[str], list[Path]]:
    from benchmarks.report import plots

    lines: list[str] = []
    if record.get("ratios"):
        lines += _ratios(record)
    columns = (
        "train_seconds",
        "real_tokens_per_second",
        "padded_tokens_per_second",
        "target_tokens_per_second",
        "samples_per_second",
        "share_of_measured_ceiling",
        "score_seconds",
        "questions_per_second",
    )
    for name, measured in record["geometries"].items():
        if "figures" in measured:
            lines += [
                f"### {name}",
                "",
                f"{measured['workload']}; all times are process CPU time.",
                "",
            ]
            rows = [
                [variant, *(show(found.get(c), 3) for c in columns)]
                for variant, found in measured["figures"].items()
            ]
            lines += table(["variant", *(c.replace("_", " ") for c in columns)], rows)
    drawn = _plot(
        lines,
        plots.draw_memory(plots.memory_bars(record), folder / "memory.png"),
        "memory",
        "the record has no memory",
    )
    falls = plots.draw_waterfall(plots.waterfalls(record), folder / "waterfall.png")
    drawn += _plot(
        lines,
        falls,
        "the ratio's waterfall",
        "the record has no steps between plain and fast (`--waterfall` measures them)",
    )
    splits = plots.draw_time_split(plots.time_splits(record), folder / "time-split.png")
    return lines, drawn + _plot(
        lines, splits, "the time split", "the record has no profile (`--profile` makes one)"
    )


def _gpu(record: dict[str, Any], folder: Path) -> tuple[list[str], list[Path]]:
    from benchmarks.report import plots

    lines = _checks(record)
    if record.get("ratios"):
        lines += _ratios(record)
    columns = (
        "seconds",
        "real_tokens_per_second",
        "padded_tokens_per_second",
        "target_tokens_per_second",
        "questions_per_second",
        "data_wait_seconds",
    )
    shares = ("mfu", "hfu", "share_of_measured_ceiling")
    rows = []
    for part in ("training", "scoring"):
        for kind, measured in record.get(part, {}).items():
            for variant, found in measured.get("figures", {}).items():
                rows.append(
                    [
                        f"{part} {kind}",
                        variant,
                        *(show(median_of(found[c])) for c in columns),
                        *(_percent(found[s]) for s in shares),
                    ]
                )
    if rows:
        names = [c.replace("_per_second", "/s").replace("_", " ") for c in columns]
        lines += table(["step", "variant", *names, "MFU", "HFU", "of measured ceiling"], rows)
    lines += _busy(record) + _small_cards(record)
    drawn = _plot(
        lines,
        plots.draw_memory(plots.memory_bars(record), folder / "memory.png"),
        "memory",
        "the record has no memory",
    )
    budgets = plots.draw_budgets(record.get("budgets", {}), folder / "budgets.png")
    drawn += _plot(lines, budgets, "speed by token budget", "the record has fewer than two budgets")
    lines += ["No plot of the ratio's waterfall: the gpu suite measures plain and fast alone.", ""]
    splits = plots.draw_time_split(plots.time_splits(record), folder / "time-split.png")
    return lines, drawn + _plot(lines, splits, "the time split", "the record has no profile")


def _busy(record: dict[str, Any]) -> list[str]:
    """How much of a step the device computes: for the rest it waits for the host, which starts the kernels one by one."""
    training = record.get("training", {})
    steps = {
        "train": training.get("both"),
        "train_vqa": training.get("vqa"),
        "train_cap": training.get("cap"),
    }
    rows = []
    for key, measured in (steps | {"score": record.get("scoring", {}).get("score")}).items():
        for variant, split in (record.get("time_split") or {}).items():
            if measured and "figures" in measured and key in split:
                kernels, seconds = (
                    sum(split[key].values()),
                    measured["figures"][variant]["seconds"]["median"],
                )
                rows.append(
                    [key, variant, show(kernels, 3), show(seconds, 3), f"{kernels / seconds:.0%}"]
                )
    return (
        table(["step", "variant", "its kernels, s", "the step, s", "share"], rows) if rows else []
    )


def _small_cards(record: dict[str, Any]) -> list[str]:
    rows = []
    for nominal, found in record.get("small_cards", {}).items():
        peak = "memory ended" if "out_of_memory" in found else show(found["allocated_gib"], 3)
        rows.append([nominal, show(found["allowed_gib"], 3), str(found["recomputed_layers"]), peak])
    return (
        table(
            [
                "card (its memory capped)",
                "GiB allowed",
                "layers recomputed",
                "peak of a training step, GiB",
            ],
            rows,
        )
        if rows
        else []
    )


def _percent(figure: Any) -> str:
    median = median_of(figure)
    return UNKNOWN if median is None else f"{median:.1%}"


def _checks(record: dict[str, Any]) -> list[str]:
    checks = record["checks"]
    rows = []
    for name, found in checks["attention"]["backends"].items():
        if found["runs"]:
            rows.append(
                [
                    name,
                    f"{found['worst']:.1e}",
                    *(
                        show(1e3 * found["seconds"][s]["median"], 3)
                        for s in ("training", "scoring")
                    ),
                ]
            )
        else:
            rows.append([name, found["why"].split(": ", 1)[-1], "", ""])
    means = checks["distance_to_fp32"]["means"]
    distances = ", ".join(
        f"{name} {values['score_distance']:.2e}" for name, values in means.items()
    )
    return [
        f"Attention against its definition in fp32, worst relative distance of output and gradients (bound {checks['attention']['bound']:.0e}):",
        "",
        *table(["backend", "distance", "training, ms per layer", "scoring, ms per layer"], rows),
        f"Toy steps against fp32 on the CPU: losses within {checks['steps']['worst_relative']:.1e} (bound {checks['steps']['bound']:.0e}). "
        f"Mean distance of toy scores to fp32: {distances}.",
        "",
    ]


def _node(record: dict[str, Any], folder: Path) -> tuple[list[str], list[Path]]:
    from benchmarks.report import plots

    lines: list[str] = []
    rows = []
    for case in record["cases"]:
        name = [case["size"], f"ZeRO-{case['stage']}", str(case["ranks"]), case.get("scaling", "")]
        if "figures" not in case:
            rows.append([*name, case.get("not_run", "refused"), "", "", "", "", ""])
            continue
        found, held = case["figures"], case["memory"]
        speed, moved = (
            show(median_of(found["real_tokens_per_second"])),
            f"{case['communication']['bytes_per_step'] / 2**20:,.1f}",
        )
        memory = f"{show(held['allocated_gib'], 3)} / {show(held['reserved_gib'], 3)}"
        rows.append(
            [
                *name,
                speed,
                show(median_of(found["seconds"]), 3),
                _percent(found["mfu"]),
                _percent(found["hfu"]),
                memory,
                moved,
            ]
        )
    columns = [
        "size",
        "stage",
        "ranks",
        "scaling",
        "real tokens/s",
        "s/step",
        "MFU",
        "HFU",
        "GiB allocated / reserved",
        "MiB per step (computed)",
    ]
    lines += table(columns, rows)
    for failure in record["failures"]:
        lines += [
            f"{failure['size']} on {failure['ranks']} rank(s) ended with exit code {failure['exit_code']}.",
            "",
        ]
    links = [
        [
            str(m["ranks"]),
            *(show(m["collectives"][f"all_{op}_gb_per_second"], 3) for op in ("gather", "reduce")),
        ]
        for m in record["machines"]
    ]
    lines += table(["ranks", "all-gather, GB/s (bus)", "all-reduce, GB/s (bus)"], links)
    scaled = scaling(record["cases"])
    drawn = _plot(
        lines, plots.draw_scaling(scaled, folder), "scaling", "the record has one number of ranks"
    )
    memory_plot = plots.draw_node_memory(record["cases"], folder / "memory.png")
    return lines, drawn + _plot(lines, memory_plot, "memory", "the record has no weak scaling")


SECTIONS = {"cpu": _cpu, "gpu": _gpu, "node": _node}
