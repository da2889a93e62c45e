"""The `node` suite: optimizer steps of the real engine on 1, 2, 4, 8 and more ranks.

Inside a launcher (deepspeed, torchrun, srun, mpirun) it measures on the ranks it finds. Otherwise
it starts its own ranks with launch/start.py, as a training run does, once per number of ranks, size
and stage, so that one which runs out of memory ends no other. It makes one record of all starts.
rank.py is what a rank does.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.baseline.models import MODELS
from benchmarks.measure.metrics import FORMULAS
from benchmarks.paths import ROOT
from benchmarks.report.record import new_record, settings, write_record
from benchmarks.report.scaling import disagreements, scaling
from vico.distributed import launcher_env
from vico.errors import UserError
from vico.io import log

# Of every step's losses, relative: the same samples and weights give the same losses on any number
# of ranks and under any stage.
LOSS_BOUNDS = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
# Ending of the file that says at which case a rank ran out of memory, beside that of --part.
OUT_OF_MEMORY = ".out_of_memory"
DEFAULT_RANKS = (1, 2, 4, 8, 16)
# Flags that a rank gets from the process that starts it, one value each and several.
SINGLE_FLAGS = (
    *("questions", "strong_questions", "precision", "attention"),
    *("steps", "warmup", "num_workers", "seed"),
)
LIST_FLAGS = ("scaling",)
# Kinds of cases.
WEAK, STRONG, RECIPE, LONG, KEPT = KINDS = ("weak", "strong", "recipe", "long", "kept")
ALONE = "one rank alone"  # of the one_of_eight suite


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--ranks",
        help="numbers of ranks to start on this machine, as 1,2,4,8; "
        "default: all GPUs in powers of two",
    )
    add("--sizes", nargs="+", choices=list(MODELS), help="default: 7B, with --tiny the toy")
    add("--stages", nargs="+", type=int, choices=[2, 3], default=[2, 3], help="ZeRO stages")
    add(
        "--scaling",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="recipe: 16 questions of each rank in 2 micro-batches, as published, and the times of "
        "scoring, save, resume and start; long: as weak, with longer captions; kept: as weak under "
        "ZeRO-3, with all frozen weights on each rank: no gathers",
    )
    add(
        "--questions",
        type=int,
        help="of a micro-batch; weak scaling: of each rank's step; default: as many as the planner "
        "says fit, at most 24",
    )
    add(
        "--strong_questions",
        type=int,
        default=192,
        help="of all ranks' step together, strong scaling",
    )
    add("--precision", choices=sorted(LOSS_BOUNDS), default="bf16")
    add("--attention", default="auto")
    add("--steps", type=int, default=30, help="timed steps")
    add("--warmup", type=int, default=5, help="steps before them")
    add("--num_workers", type=int, default=2, help="data workers of each rank")
    add("--seed", type=int, default=0)
    add(
        "--tiny",
        action="store_true",
        help="toy models and few steps, to try the harness; its metrics mean nothing",
    )
    # Where the ranks that this suite starts write their measurements.
    add("--part", type=Path, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    if args.tiny:
        args.steps, args.warmup, args.num_workers = min(args.steps, 3), 1, 0
        args.strong_questions = min(args.strong_questions, 4)
    args.sizes = args.sizes or (["toy"] if args.tiny else ["7B"])
    launcher_env.set_rank_variables()
    if "RANK" in os.environ:
        return _run_rank(args)
    parts, failures = _start_all(args)
    return _write(args, parts, failures)


def _run_rank(args: argparse.Namespace) -> int:
    if args.ranks is not None:
        raise UserError(
            "--ranks: a launcher has started this process and decides the number of ranks; "
            "leave --ranks out"
        )
    # Imports DeepSpeed, which the process that starts the ranks does not need.
    from benchmarks.suites.node.rank import measure

    part = measure(args)
    if part is None or args.part is not None:
        return 0
    return _write(args, [part], [])


def _start_all(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(what each start measured, the starts that ended with an error)."""
    parts, failures = [], []
    with tempfile.TemporaryDirectory() as folder:
        for num_ranks in rank_numbers(args.ranks):
            for size, stage in product(args.sizes, args.stages):
                log.info(f"{size} ZeRO-{stage} on {num_ranks} rank(s)")
                path = Path(folder) / f"{size}-{stage}-{num_ranks}.json"
                exit_code = _start(args, num_ranks, size, stage, path)
                # What was measured before an error counts.
                part = _read(path) or {"cases": []}
                ended = _read(path.with_suffix(OUT_OF_MEMORY))
                if ended is not None:
                    part["cases"].append(ended)
                elif exit_code:
                    failures.append({"size": size, "ranks": num_ranks, "exit_code": exit_code})
                parts.append(part)
    return parts, failures


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def rank_numbers(text: str | None) -> list[int]:
    """The numbers of --ranks in ascending order. Raises UserError where one is not a number."""
    if text is None:
        import torch  # slow to import, and not needed where --ranks is given

        num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 1
        return [n for n in DEFAULT_RANKS if n <= num_devices]
    words = text.split(",")
    if not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise UserError(
            f"--ranks {text}: must be whole numbers of at least 1, separated by commas, as 1,2,4,8"
        )
    return sorted({int(word) for word in words})


def _start(args: argparse.Namespace, num_ranks: int, size: str, stage: int, part: Path) -> int:
    """Starts ranks as launch/train.sh does and waits for them. Their output goes to ours."""
    flags = ["--sizes", size, "--stages", str(stage), "--part", str(part)]
    for name in LIST_FLAGS:
        flags += [f"--{name}", *map(str, getattr(args, name))]
    for name in SINGLE_FLAGS:
        if getattr(args, name) is not None:
            flags += [f"--{name}", str(getattr(args, name))]
    if args.tiny:
        flags.append("--tiny")
    launcher, program = ROOT / "launch" / "start.py", ROOT / "benchmarks" / "run.py"
    command = [sys.executable, str(launcher), str(program), "node", *flags]
    environment = {**os.environ, "VICO_RANKS": str(num_ranks)}
    return subprocess.run(command, env=environment, check=False).returncode


def _write(
    args: argparse.Namespace, parts: list[dict[str, Any]], failures: list[dict[str, Any]]
) -> int:
    """Writes the record of all starts. Returns the exit code."""
    record = new_record("node", settings(args)) | {"formulas": FORMULAS, "failures": failures}
    machines, cases = [], []
    for part in parts:
        cases += part.pop("cases")
        if part:  # none was measured before memory ended
            machines.append(part)
    record |= {"machines": machines, "cases": cases}
    record["differences"] = disagreements(cases, LOSS_BOUNDS[args.precision])
    record["equal"] = not record["differences"]
    if record["equal"]:
        record["scaling"] = scaling(cases)
        for row in record["scaling"]:
            log.info(_scaling_line(row))
    else:
        log.error(
            "the same samples gave other losses (see differences in the record); "
            "there is nothing to report"
        )
        for case in cases:
            for name in ("seconds", "figures"):
                case.pop(name, None)
    for failure in failures:
        log.error(
            f"{failure['size']} on {failure['ranks']} rank(s) ended with exit code "
            f"{failure['exit_code']}; its messages are above"
        )
    write_record(record, args.results)
    return 0 if record["equal"] and not failures else 1


def _scaling_line(row: dict[str, Any]) -> str:
    efficiency = row["efficiency"]
    if not isinstance(efficiency, str):
        efficiency = f"{efficiency:.1%} of {row['against_ranks']} rank(s)"
    return (
        f"{row['size']} ZeRO-{row['stage']} {row['scaling']:6s} {row['ranks']:3d} rank(s) "
        f"{row['real_tokens_per_second']:12.1f} real tokens/s   efficiency {efficiency}"
    )
