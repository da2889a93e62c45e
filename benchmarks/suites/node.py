"""The `node` suite: one optimizer step of the real engine on 1, 2, 4, 8 and more ranks; here the flags, the starts and what follows from all.

Inside a launcher (deepspeed, torchrun, srun, mpirun) it measures on the ranks it finds. Alone it starts itself, once per number
of ranks and size, by launch/start.py as training is started, and makes one record of all. What a rank does: benchmarks/ranks.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.baseline.variants import MODELS
from benchmarks.measure.metrics import FORMULAS, UNKNOWN, median_of
from benchmarks.report.record import ROOT, new_record, settings, write
from vico.distributed import launcher_env
from vico.errors import UserError

# Of every step's losses: the same samples and weights on other ranks, or under another stage, give the same.
LOSS_BOUNDS = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}


def add_flags(parser: argparse.ArgumentParser) -> None:
    sizes = [name for name in MODELS if name != "toy"]
    parser.add_argument(
        "--ranks",
        help="numbers of ranks to start on this machine, as 1,2,4,8; default: all GPUs in powers of two",
    )
    parser.add_argument("--sizes", nargs="+", choices=[*sizes, "toy"], default=["7B"])
    parser.add_argument(
        "--stages", nargs="+", type=int, choices=[2, 3], default=[2, 3], help="ZeRO stages"
    )
    parser.add_argument(
        "--scaling", nargs="+", choices=["weak", "strong"], default=["weak", "strong"]
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=24,
        help="of a micro-batch; weak scaling: of each rank's step",
    )
    parser.add_argument(
        "--strong_questions",
        type=int,
        default=192,
        help="of all ranks' step together, strong scaling",
    )
    parser.add_argument("--precision", choices=sorted(LOSS_BOUNDS), default="bf16")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--num_workers", type=int, default=2, help="data workers of each rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a toy model, few steps: tries the harness, its figures mean nothing",
    )
    parser.add_argument(
        "--part", type=Path, help=argparse.SUPPRESS
    )  # where the ranks that this suite starts leave what they measured


def run(args: argparse.Namespace) -> int:
    if args.tiny:
        args.sizes, args.steps, args.warmup, args.num_workers = ["toy"], min(args.steps, 3), 1, 0
        args.questions, args.strong_questions = (
            min(args.questions, 2),
            min(args.strong_questions, 4),
        )
    launcher_env.set_rank_variables()
    if "RANK" in os.environ:
        return _as_rank(args)
    return _finish(args, *_start_all(args))


def _as_rank(args: argparse.Namespace) -> int:
    from benchmarks.suites import node_rank as ranks

    if args.ranks is not None:
        raise UserError(
            "--ranks: a launcher has started this process, and its number of ranks stands; leave --ranks out"
        )
    found = ranks.measure(args)
    if found is None or args.part is not None:
        return 0
    return _finish(args, [found], [])


def _start_all(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(what each start measured, the starts that ended with an error)."""
    parts, failures = [], []
    with tempfile.TemporaryDirectory() as folder:
        for num in _numbers_of_ranks(args.ranks):
            for size in args.sizes:
                print(f"{size} on {num} rank(s)", flush=True)
                part = Path(folder) / f"{size}-{num}.json"
                code = _start(args, num, size, part)
                if code:
                    failures.append({"size": size, "ranks": num, "exit_code": code})
                if part.exists():  # what was measured before an error counts
                    parts.append(json.loads(part.read_text(encoding="utf-8")))
    return parts, failures


def _numbers_of_ranks(text: str | None) -> list[int]:
    if text is None:
        import torch

        most = torch.cuda.device_count() if torch.cuda.is_available() else 1
        return [n for n in (1, 2, 4, 8, 16) if n <= most]
    words = text.split(",")
    if not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise UserError(
            f"--ranks {text}: must be whole numbers of at least 1 with commas between them, as 1,2,4,8"
        )
    return sorted({int(word) for word in words})


def _start(args: argparse.Namespace, num: int, size: str, part: Path) -> int:
    """The ranks of one start, as launch/train.sh starts its own; their output is ours."""
    flags = ["--sizes", size, "--part", str(part)]
    for name in ("stages", "scaling"):
        flags += [f"--{name}", *map(str, getattr(args, name))]
    for name in (
        "questions",
        "strong_questions",
        "precision",
        "attention",
        "steps",
        "warmup",
        "num_workers",
        "seed",
    ):
        flags += [f"--{name}", str(getattr(args, name))]
    command = [
        sys.executable,
        str(ROOT / "launch" / "start.py"),
        str(ROOT / "benchmarks" / "run.py"),
        "node",
        *flags,
    ]
    return subprocess.run(
        command, env={**os.environ, "VICO_RANKS": str(num)}, check=False
    ).returncode


def _finish(
    args: argparse.Namespace, parts: list[dict[str, Any]], failures: list[dict[str, Any]]
) -> int:
    record = new_record("node", settings(args)) | {"formulas": FORMULAS, "failures": failures}
    record["machines"] = [
        {key: value for key, value in part.items() if key != "cases"} for part in parts
    ]
    record["cases"] = [case for part in parts for case in part["cases"]]
    record["differences"] = disagreements(record["cases"], LOSS_BOUNDS[args.precision])
    record["equal"] = not record["differences"]
    if not record["equal"]:
        print(
            "vico: error: the same samples gave other losses (see differences in the record); nothing to report",
            file=sys.stderr,
        )
        record["cases"] = [
            {k: v for k, v in case.items() if k not in ("seconds", "figures")}
            for case in record["cases"]
        ]
    else:
        record["scaling"] = scaling(record["cases"])
        for row in record["scaling"]:
            print(_line(row), flush=True)
    for failure in failures:
        print(
            f"vico: error: {failure['size']} on {failure['ranks']} rank(s) ended with {failure['exit_code']}; its lines are above",
            file=sys.stderr,
        )
    write(record, args.results)
    return 0 if record["equal"] and not failures else 1


def disagreements(cases: list[dict[str, Any]], bound: float) -> list[dict[str, Any]]:
    """Cases whose losses are not those of another case with the same model and samples."""
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    found = []
    for case in cases:
        if "losses" not in case:
            continue
        other = first.setdefault((case["size"], case["questions_per_step"]), case)
        pairs = [
            pair
            for steps in zip(case["losses"], other["losses"], strict=True)
            for pair in zip(*steps, strict=True)
        ]
        distance = max(abs(a - b) / abs(b) for a, b in pairs)
        if not all(abs(a - b) <= bound * abs(b) for a, b in pairs):  # nan is no agreement
            names = ("size", "stage", "ranks", "scaling")
            found.append(
                {
                    "relative": distance,
                    "bound": bound,
                    "cases": [{name: c[name] for name in names} for c in (case, other)],
                }
            )
    return found


def scaling(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens per second by number of ranks, and their share of what as many times the smallest number of ranks would give."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for case in cases:
        if "figures" in case:
            groups[case["size"], case["stage"], case["scaling"]].append(case)
    rows = []
    for (size, stage, kind), members in groups.items():
        members.sort(key=lambda case: case["ranks"])
        base = members[0]
        for case in members:
            speed, base_speed = (
                median_of(c["figures"]["real_tokens_per_second"]) or 0.0 for c in (case, base)
            )
            efficiency = (
                speed / base_speed * base["ranks"] / case["ranks"] if len(members) > 1 else UNKNOWN
            )
            rows.append(
                {
                    "size": size,
                    "stage": stage,
                    "scaling": kind,
                    "ranks": case["ranks"],
                    "real_tokens_per_second": speed,
                    "efficiency": efficiency,
                    "against_ranks": base["ranks"],
                }
            )
    return rows


def _line(row: dict[str, Any]) -> str:
    efficiency = (
        row["efficiency"]
        if isinstance(row["efficiency"], str)
        else f"{row['efficiency']:.1%} of {row['against_ranks']} rank(s)"
    )
    head = f"{row['size']} ZeRO-{row['stage']} {row['scaling']:6s} {row['ranks']:3d} rank(s)"
    return f"{head} {row['real_tokens_per_second']:12.1f} real tokens/s   efficiency {efficiency}"
