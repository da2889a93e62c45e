"""The doors: `vico train`, `vico eval`, `vico plan`, `vico demo`. Here a mistake becomes one line and an exit code."""

import atexit
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from vico.cli import flags
from vico.distributed import launcher_env, signals
from vico.errors import EXIT_CODES, INTERNAL_ERROR, UnreachableError, UserError, one_line
from vico.io import output_dir
from vico.train import config as configs

if TYPE_CHECKING:
    from vico.distributed.world import World

TRAIN = "Train ViCo, or resume the run that OUTPUT_DIR holds. Start it on all devices by `bash launch/train.sh FLAGS`."
EVAL = (
    "Evaluate a checkpoint (--resume). Settings come from the checkpoint; a flag that is given wins, except for shapes "
    "(adapter_layer, adapter_len, max_feats), which are the checkpoint's."
)

QUANTIZE_EVAL = (
    "Compare scores and answers of a checkpoint (--resume) on --split with and without --quantize. The model must fit "
    "without it, too. Settings come from the checkpoint, as for `vico eval`."
)

SECONDS_FOR_RANK_0 = 10.0
SECONDS_FOR_SRUN = 0.5  # it ends a step as soon as one task has failed, and can lose what that task said last: 1 line of 30 (22.05)


def main(argv: Sequence[str]) -> int:
    """Run one subcommand; returns the exit code (errors.py, EXIT_CODES)."""
    debug = "--debug" in argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # as stderr is: a terminal that cannot show a name must not end a run
    signals.unblock()
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = (
        "1"  # for libraries, DeepSpeed above all: nobody runs a pickle here
    )
    try:
        launcher_env.set_rank_variables()
        command, *rest = argv or [""]
        if command in ("-h", "--help", ""):
            print(
                "usage: vico COMMAND FLAGS\n"
                + "\n".join(f"  {name:<14}{text}" for name, (text, _) in COMMANDS.items())
            )
            print(
                "exit codes\n"
                + "\n".join(f"  {code:<14}{meaning}" for code, meaning in EXIT_CODES.items())
            )
            return 0 if command else 2
        if command not in COMMANDS:
            raise UserError(f"unknown command '{command}'; use one of {', '.join(COMMANDS)}")
        return COMMANDS[command][1](rest)
    except UserError as error:
        return _fail(error, debug)
    except signals.Stopped as stop:  # before the ranks had met
        signals.ignore_all()
        if "0" in (
            os.environ.get("RANK", "0"),
            os.environ.get("LOCAL_RANK"),
        ):  # each host may have been asked alone
            print(f"vico: {stop.line}", flush=True)
        return stop.exit_code
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(
                "vico: stopped by Ctrl-C; the same command goes on at the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        os._exit(130)  # at once: other ranks may be gone, and a collective would wait for them


def _fail(error: UserError, debug: bool) -> int:
    """The line is said by rank 0, and no rank ends before it: launchers end every rank as soon as one has ended."""
    signals.restore_default_handlers()
    first_of_host = isinstance(error, UnreachableError) and os.environ.get("LOCAL_RANK", "0") == "0"
    if os.environ.get("RANK", "0") == "0" or first_of_host:
        if debug:
            traceback.print_exception(error)
        print(
            "\n  ".join(one_line(line) for line in (f"vico: error: {error}", *error.rows)),
            file=sys.stderr,
            flush=True,
        )
    else:
        time.sleep(SECONDS_FOR_RANK_0)
    return error.exit_code


def _train(argv: list[str]) -> int:
    signals.install_handlers()
    line = flags.parse(argv, "vico train", TRAIN)
    config = line.resolve()

    writes = not (config.init_eval and config.resume is not None)
    if (
        writes
        and os.environ.get("RANK", "0") == "0"
        and os.path.exists(config.output_dir / "args.json")
    ):
        output_dir.take(config.output_dir)  # a folder without a run is locked when it gets one

    def run(world: "World") -> None:
        from vico.train.loop import train

        train(config, world)

    return _with_world(line, run)


def _line_with_checkpoint(argv: list[str], command: str, description: str) -> flags.CommandLine:
    line = flags.parse(argv, command, description)
    if line.given.get("resume") is None:
        raise UserError("--resume is missing: name the checkpoint folder or .pth file to evaluate")
    return line


def _quantize_eval(argv: list[str]) -> int:
    line = _line_with_checkpoint(argv, "vico quantize-eval", QUANTIZE_EVAL)

    def run(world: "World") -> None:
        from vico.cli.quantize_eval import quantize_eval

        quantize_eval(line, world)

    return _with_world(line, run)


def _evaluate(argv: list[str]) -> int:
    line = _line_with_checkpoint(argv, "vico eval", EVAL)

    def run(world: "World") -> None:
        from vico.cli.evaluate import evaluate_checkpoint

        evaluate_checkpoint(line, world)

    return _with_world(line, run)


def _with_world(line: flags.CommandLine, run: Callable[["World"], None]) -> int:
    """Connect the ranks, run, and leave together. Torch is loaded only here: a mistyped flag is answered before."""
    if (
        "LOCAL_RANK" in os.environ
    ):  # a launcher that is killed outright would leave its ranks training, and a second start write beside them
        signals.die_with_parent(os.getppid())
    told = {
        name: line.given[name]
        for name in ("collective_timeout", "hang_timeout", "expect_world_size")
        if name in line.given
    }
    meeting = configs.RunConfig(**told)
    launcher_env.check_world_size(meeting.expect_world_size)
    cores, ranks = (
        len(os.sched_getaffinity(0)),
        int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1),
    )
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, cores // ranks))
    )  # launchers differ in what they set
    if not line.debug:
        os.environ.setdefault(
            "TORCH_CPP_LOG_LEVEL", "ERROR"
        )  # a lost rank is a warning there, with pages of C++ frames
    from vico.cli import exit_cause
    from vico.distributed import world as dist
    from vico.train.rank_consistency import require_same_code

    world = dist.connect(
        timedelta(minutes=meeting.collective_timeout),
        meeting.expect_world_size,
        60 * meeting.hang_timeout,
    )
    code, together = 0, True
    try:
        for note in line.notes:
            world.print_rank0(f"note: {note}")
        require_same_code(world, line.given)
        run(world)
    except signals.Stopped as stop:
        signals.ignore_all()  # a launcher sends another as soon as the first rank has ended; all is saved
        world.print_rank0(f"vico: {stop.line}")
        code = stop.exit_code
    except UserError as error:
        code, together = _fail(error, line.debug), False
    except Exception as problem:  # of this rank alone
        signals.restore_default_handlers()
        code, together = exit_cause.report(world, problem, line.debug), False
    dist.disconnect(
        world, together
    )  # behind `except`, where the error is gone and holds nothing any more
    return code


def _demo(argv: list[str]) -> int:
    from vico.cli.demo import main as demo_main

    demo_main(argv)
    return 0


def _plan(argv: list[str]) -> int:
    from vico.cli.plan import main as plan_main

    return plan_main(argv)


def _selftest(argv: list[str]) -> int:
    from vico.cli.selftest import main as selftest_main

    return selftest_main(argv)


def _check(argv: list[str]) -> int:
    from vico.cli.check import main as check_main

    return check_main(argv)


def _convert(argv: list[str]) -> int:
    from vico.cli.convert import main as convert_main

    convert_main(argv)
    return 0


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "train": (TRAIN, _train),
    "eval": (EVAL, _evaluate),
    "check": (
        "Find what is wrong with a run's files before it starts: the flags of train, nothing is trained.",
        _check,
    ),
    "quantize-eval": (
        "Compare scores and answers of a checkpoint with and without --quantize.",
        _quantize_eval,
    ),
    "cost": ("The older name of quantize-eval.", _quantize_eval),
    "plan": (
        "What a run will need (memory, ZeRO stage, token budget) and how fast it can be; no weights are loaded.",
        _plan,
    ),
    "demo": (
        "Make a small world to try everything on: tokenizer, trained tiny LLaMA, videos, questions, captions.",
        _demo,
    ),
    "convert": (
        "Weights between Meta's layout and Hugging Face's, adapters between ours and the lineage's.",
        _convert,
    ),
    "selftest": (
        "Breaks runs, files and disks on purpose and counts what must hold then; its last line is one JSON object.",
        _selftest,
    ),
}


def console(argv: Sequence[str] | None = None) -> NoReturn:
    """A process's whole life.

    It ends without Python's own end, which aborts where torch's threads are still letting go of an exchange (2.13), as they are
    when a rank was lost; whether it can also wait for them for ever was not worth finding out in a user's run.
    """
    try:
        code = main(sys.argv[1:] if argv is None else argv)
    except Exception:  # a mistake of ours
        traceback.print_exc()
        code = INTERNAL_ERROR
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    if code and "SLURM_STEP_ID" in os.environ:
        time.sleep(SECONDS_FOR_SRUN)
    os._exit(code)
