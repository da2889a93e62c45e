"""The `vico` command: runs a subcommand, and turns errors into one line and an exit code."""

import atexit
import importlib
import io
import os
import resource
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from vico.cli import interpreter  # first: it refuses old Pythons
from vico.cli.version import version
from vico.cli.with_world import report_error
from vico.distributed import launcher_env, signals
from vico.errors import (
    DONE,
    EXIT_CODES,
    INTERNAL_ERROR,
    INTERRUPTED,
    DiskError,
    UserError,
    missing_package,
    nearest,
    show,
)
from vico.io import log, streams

# Command: (its module in this folder, what it does). A module is imported when its command runs.
COMMANDS = {
    "train": ("train", "Train ViCo, or resume the run in OUTPUT_DIR."),
    "eval": ("evaluate", "Evaluate a checkpoint on a split."),
    "extract": ("extract", "Make features of your own videos, by FFmpeg and CLIP."),
    "ask": ("ask", "Ask a checkpoint a question about a video; its answer with probabilities."),
    "caption": (
        "caption",
        "Write captions of a video or of a split's videos, and measure them.",
    ),
    "cognition": (
        "cognition",
        "Measure what a checkpoint's adapter does to plain language: perplexity, KL, agreement.",
    ),
    "ablate": (
        "ablate",
        "Measure what the video and the adapter prompts are worth: accuracy without each.",
    ),
    "check": ("check", "Check a run's files before it starts; takes the flags of train."),
    "quantize-eval": (
        "quantize_eval",
        "Measure how --quantize changes a checkpoint's scores and answers.",
    ),
    "plan": ("plan", "Plan memory, ZeRO stage, token budget and speed; no weights are loaded."),
    "demo": (
        "demo",
        "Make a toy dataset: tokenizer, trained tiny LLaMA, videos, questions, captions.",
    ),
    "convert": (
        "convert",
        "Convert weights between Meta's and Hugging Face's layout, adapters to the published "
        "format and back.",
    ),
    "data": (
        "data",
        "Write a data set in the general schema, or features that can be memory-mapped.",
    ),
    "env": ("env", "Show versions, devices, and what would compute on them; for bug reports."),
    "export": (
        "export",
        "Write a checkpoint's adapter as a folder for a model hub, with a model card.",
    ),
    "submission": (
        "submission",
        "Write predictions as the file that the server of NExT-QA, TVQA or STAR takes.",
    ),
    "report": (
        "report",
        "Write runs as one HTML page: curves, accuracies, differences, predictions to browse.",
    ),
    "selftest": (
        "selftest",
        "Inject faults into runs, files and disks, and check that none does harm.",
    ),
}
OF_SEVERAL_RANKS = set("train eval extract ask caption cognition ablate quantize-eval cost".split())
ALIASES = {"cost": "quantize-eval"}

# Open files, sockets and pipes: a run of one rank needs some 60, each further rank a few.
MIN_DESCRIPTORS, MAX_DESCRIPTORS = 128, 1024
# srun ends a step as soon as one task has failed, and can lose that task's last line (22.05).
SRUN_LINGER_SECONDS = 0.5


def main(argv: Sequence[str]) -> int:
    """Run one subcommand; returns the exit code (errors.EXIT_CODES).

    For other programs and notebooks: their signal handlers and environment are put back at the end.
    """
    handlers, environment = signals.handlers(), dict(os.environ)
    try:
        return _main(argv)
    except KeyboardInterrupt:
        return _interrupted()
    finally:
        signals.put_back(handlers)
        _put_back(environment)


def _put_back(environment: dict[str, str]) -> None:
    """End this command's rank variables and settings: the next one has its own."""
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)


def _interrupted() -> int:
    """Ctrl-C in a command that does not save, or before a training run could handle it."""
    if launcher_env.is_rank_0():
        log.warning("stopped by Ctrl-C; the same command starts it again")
    return INTERRUPTED


def _main(argv: Sequence[str]) -> int:
    debug, announces = "--debug" in argv, bool({*argv[:1]} & OF_SEVERAL_RANKS)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As on stderr: a name that the terminal cannot show must not end a run.
        sys.stdout.reconfigure(errors="backslashreplace")
    signals.print_stacks_on_quit()
    signals.unblock()
    # For libraries, DeepSpeed in particular: torch.load executes no pickle.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        require_descriptors()
        launcher_env.set_rank_variables()
        command, *rest = argv or [""]
        if command in ("-h", "--help", ""):
            print(usage())
            return 0 if command else 2
        if command == "--version":
            print(f"vico {version()}")
            return 0
        return _run(command, rest)
    except UserError as error:
        return report_error(error, debug, announces)
    except ModuleNotFoundError as error:
        if (error.name or "vico").partition(".")[0] == "vico":
            raise  # a bug
        return report_error(missing_package(error), debug, announces)
    except signals.Stopped as stop:  # before the ranks were connected
        signals.ignore_all()
        # Each host may be the only one that got the signal.
        if "0" in (os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK")):
            print(f"vico: {stop.line}", flush=True)
        return stop.exit_code


def require_descriptors() -> None:
    """Raise the limit of open files to MAX_DESCRIPTORS; UserError for one that is too small.

    A run would end in the middle, wherever the next file, socket or pipe is opened.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    largest = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < largest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (largest, hard))
    if largest < MIN_DESCRIPTORS:
        raise UserError(
            f"this process may open {largest} files at a time, and needs {MIN_DESCRIPTORS} at "
            f"least; start it with a higher limit (ulimit -n {MAX_DESCRIPTORS})"
        )


def _run(command: str, argv: list[str]) -> int:
    command = ALIASES.get(command, command)
    if command not in COMMANDS:
        known = f"use one of {', '.join(COMMANDS)}"
        if command.startswith("-"):
            raise UserError(
                f"{command}: a command comes first, as in vico train {command}; {known}"
            )
        raise UserError(f"unknown command {show(command)}{nearest(command, COMMANDS)}; {known}")
    module, _ = COMMANDS[command]
    code: int = importlib.import_module(f"vico.cli.{module}").main(argv)
    return code


def usage() -> str:
    """The text of `vico --help`."""
    lines = ["usage: vico COMMAND FLAGS"]
    lines += [f"  {name:<15}{text}" for name, (_, text) in COMMANDS.items()]
    lines += ["  --version      Print the version.", "exit codes"]
    lines += [f"  {code:<15}{meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(lines)


def console(argv: Sequence[str] | None = None, command: str | None = None) -> NoReturn:
    """A whole process: run the command and exit with its code.

    `command` stands before `argv`, which is by default that of the process.

    Ends without Python's own shutdown, which aborts while torch's threads still leave a collective
    (torch 2.13). They do when a rank was lost.
    """
    interpreter.prepare()
    streams.guard()
    words = [*([command] if command else []), *(sys.argv[1:] if argv is None else argv)]
    try:
        code = _main(words)
    except KeyboardInterrupt:
        os._exit(_interrupted())  # at once: a collective would wait for ranks that may be gone
    except SystemExit as end:  # argparse's, after --help
        code = end.code if isinstance(end.code, int) else DONE
    except Exception:  # a bug
        traceback.print_exc()
        code = INTERNAL_ERROR
    sys.stdout.flush()
    sys.stderr.flush()
    if code == DONE and (reason := streams.loss()):
        log.error(f"not all that this command printed could be written ({reason})")
        code = DiskError.exit_code
    atexit._run_exitfuncs()
    if code and "SLURM_STEP_ID" in os.environ:
        time.sleep(SRUN_LINGER_SECONDS)
    os._exit(code)


if __name__ == "__main__":  # `python -m vico.cli.main`, or this file
    console()
