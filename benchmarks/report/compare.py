"""`bash benchmarks/run.sh compare OLD NEW`: which figures of two records got better or worse.

Exit code 1 if a figure is worse by more than the threshold.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure.spreads import median_of, spread
from benchmarks.report.report import machine, read_record
from benchmarks.report.scaling import CASE_NAMES
from vico.errors import UserError
from vico.io import log

Record = dict[str, Any]

# Others follow from these. More is better.
RATES = ("real_tokens_per_second", "questions_per_second")
# Less is better.
MEMORY = ("growth_mib", "allocated_gib", "reserved_gib")
# What must be equal for figures to mean the same: of the suite's flags, these say what was run.
SETTINGS = (
    *("model", "precision", "questions", "strong_questions", "videos", "seed"),
    *("tiny", "data_path", "dataset", "split", "score_tokens"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path, help="a record")
    parser.add_argument("new", type=Path, help="a later record of the same suite and machine")
    parser.add_argument(
        "--threshold", type=float, default=5.0, help="per cent that a figure may be worse"
    )


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.threshold < float("inf"):
        raise UserError(f"--threshold {args.threshold:g}: must be 0 or more per cent")
    old, new = read_record(args.old), read_record(args.new)
    refuse_others(args.old, old, args.new, new)
    compared = compare(dict(figures(old)), dict(figures(new)), args.threshold)
    if not compared["compared"]:
        raise UserError(f"{args.old} and {args.new} have no figure in common; name two whole runs")
    for name in ("worse", "better"):
        for key, change in compared[name].items():
            log.info(f"{name:7s}{key}: {change['old']:.4g} -> {change['new']:.4g} ({change['%']})")
    for name, path in (("only_old", args.old), ("only_new", args.new)):
        for key in compared[name]:
            log.info(f"only in {path.name}: {key}")
    log.info(
        f"{compared['compared']} figures compared: {len(compared['worse'])} worse and "
        f"{len(compared['better'])} better by more than {args.threshold:g} %"
    )
    print(json.dumps(compared), flush=True)
    return 1 if compared["worse"] else 0


def refuse_others(old_path: Path, old: Record, new_path: Path, new: Record) -> None:
    """Raises UserError unless both records are of one suite, machine and work."""
    facts = {"suite": (old["suite"], new["suite"])}
    facts["machine"] = (machine(old["hardware"]), machine(new["hardware"]))
    for name in SETTINGS:
        if name in old["config"] or name in new["config"]:
            facts[f"--{name}"] = (old["config"].get(name), new["config"].get(name))
    for name, (a, b) in facts.items():
        if a != b:
            raise UserError(
                f"{new_path}: {name} {b}, and {name} {a} in {old_path}; "
                "compare records of the same work on the same machine"
            )
    for path, record in ((old_path, old), (new_path, new)):
        if not record["equal"]:
            raise UserError(f"{path}: its variants did not compute the same: it has no figures")


def figures(record: Record) -> Iterator[tuple[str, tuple[float, bool]]]:
    """(name, (value, whether more is better)) of everything that the record measured."""
    for geometry, measured in record.get("geometries", {}).items():
        for variant, metrics in measured.get("figures", {}).items():
            yield from _metrics(f"{geometry}, {variant}", metrics)
        for what, by_peer in measured.get("peer_seconds", {}).items():
            for peer, seconds in by_peer.items():
                yield f"{geometry}, {peer}: {what} seconds", (spread(seconds)["median"], False)
    for part in ("training", "scoring"):
        for kind, compared in record.get(part, {}).items():
            for variant, metrics in compared.get("figures", {}).items():
                yield from _metrics(f"{part} {kind}, {variant}", metrics)
    for budget, measured in record.get("budgets", {}).items():
        yield from _metrics(f"budget {budget}", measured.get("figures", {}))
    for case in record.get("cases", []):
        name = " ".join(str(case.get(key, "")) for key in CASE_NAMES)
        yield from _metrics(f"case {name}", case.get("figures", {}))
        yield from _memory(f"case {name}", case.get("memory", {}))
    memory = record.get("memory") or {}
    for name, values in memory.items():
        yield from _memory(f"memory {name}", values)


def _metrics(name: str, metrics: Record) -> Iterator[tuple[str, tuple[float, bool]]]:
    for key in RATES:
        value = median_of(metrics.get(key))
        if value is not None:
            yield f"{name}: {key}", (value, True)


def _memory(name: str, values: Record) -> Iterator[tuple[str, tuple[float, bool]]]:
    """Peaks, at any depth."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _memory(f"{name} {key}", value)
        elif key in MEMORY and isinstance(value, int | float):
            yield f"{name}: {key}", (float(value), False)


def compare(
    old: dict[str, tuple[float, bool]], new: dict[str, tuple[float, bool]], threshold: float
) -> Record:
    """Figures that changed by more than `threshold` per cent, and those of one record alone."""
    out: Record = {"compared": 0, "worse": {}, "better": {}}
    for key, (before, more_is_better) in old.items():
        if key not in new:
            continue
        after = new[key][0]
        out["compared"] += 1
        gain = after - before if more_is_better else before - after
        change = {"old": before, "new": after, "%": f"{_per_cent(after - before, before):+.1f} %"}
        if _per_cent(gain, before) < -threshold:
            out["worse"][key] = change
        elif _per_cent(gain, before) > threshold:
            out["better"][key] = change
    out["only_old"] = [key for key in old if key not in new]
    out["only_new"] = [key for key in new if key not in old]
    return out


def _per_cent(change: float, before: float) -> float:
    if before:
        return 100 * change / abs(before)
    return 0.0 if change == 0 else float("inf") if change > 0 else float("-inf")
