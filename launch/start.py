"""start.py SCRIPT FLAGS: one rank per device of this node, by DeepSpeed's per-node launcher.

It calls `deepspeed.launcher.launch`, which the `deepspeed` command starts as a child process. That
command (0.19.8) only adds problems on one node: SIGTERM ends it and leaves the ranks running,
Ctrl-C prints its traceback, with a given number of devices it ignores CUDA_VISIBLE_DEVICES, it
reads a /job/hostfile, its port is always 29500, and it imports torch a second time.
"""

import base64
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

# Before installed packages: the script runs the checkout that it is part of.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vico.cli import interpreter  # first: it refuses old Pythons
from vico.distributed import launcher_env, signals
from vico.io import streams

SIGNALS = signals.blocked()
SRUN_SECONDS = 0.5  # srun can lose the last line of a task that fails
SIGNAL_HINTS = {
    "SIGKILL": "; the kernel does that when memory runs out",
    "SIGBUS": "; a file was truncated while it was read",
}


def fail(message: str, code: int = 2) -> NoReturn:
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"vico: error: {message}", file=sys.stderr, flush=True)
    if "SLURM_STEP_ID" in os.environ:
        time.sleep(SRUN_SECONDS)
    sys.exit(code)


def requested_ranks() -> int | None:
    """VICO_RANKS; None: one rank per device."""
    text = os.environ.get("VICO_RANKS") or None
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        fail(f"VICO_RANKS={text}: must be a whole number of at least 1")
    return int(text)


def node_devices(num_ranks: int | None) -> list[str]:
    """The device of each rank, as the launcher names it: all of this node's, or the first ones."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # otherwise each rank warns that it found no GPU
        # -1 hides all GPUs from a rank, also where DS_ACCELERATOR=cpu overrides existing ones.
        return ["-1"] * (num_ranks or 1)
    count = accelerator.device_count()
    visible = os.environ.get(accelerator.visible_devices_envs()[0])
    devices = (
        [name.strip() for name in visible.split(",")] if visible else list(map(str, range(count)))
    )
    devices = devices[:count]
    num_missing = (num_ranks or 0) - len(devices)
    if num_missing > 0 and not launcher_env.may_share_gpu():
        need = f"this node shows {len(devices)} devices, and each rank needs its own"
        fail(f"VICO_RANKS={num_ranks}: {need}")
    # CUDA shows the devices before the first -1; the ranks divide them by their local ranks.
    return devices[:num_ranks] + ["-1"] * num_missing


def master_port() -> int:
    """MASTER_PORT, or a free port: with a fixed default two jobs on a node would collide."""
    text = os.environ.get("MASTER_PORT") or "0"
    if not text.isdecimal() or int(text) >= 65536:
        fail(f"MASTER_PORT={text}: must be a port number; unset it to get a free one")
    with socket.socket() as probe:
        # As torch does: a port that was closed a moment ago counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(text)))
        except OSError as error:
            fail(f"MASTER_PORT={text}: {error.strerror}; unset it to get a free one", code=6)
        return int(probe.getsockname()[1])


def forward_signals(forwarded: list[int]) -> NoReturn:
    """Send each signal on to the ranks, which decide how they end. Without ranks, end."""
    while True:
        number = signal.sigwait(SIGNALS)
        if number != signal.SIGQUIT:  # it ends nothing
            forwarded.append(number)
        import psutil  # late: where it is missing, `main` reports that packages are missing

        ranks = psutil.Process().children()
        if not ranks and number != signal.SIGQUIT:
            os._exit(128 + number)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)


def set_threads(num_ranks: int) -> None:
    """Divide the cores among the ranks, each of which would use all of them."""
    if hasattr(os, "sched_getaffinity"):
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_ranks)))


def main() -> None:
    # On a signal DeepSpeed's launcher would kill the ranks after 30 s and end with 1. So signals
    # are blocked here, and in the ranks, which inherit that and unblock them once they can handle
    # them (vico/distributed/signals.py): none is lost. This comes first, as threads of libraries
    # would receive the signals otherwise.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    streams.open_closed_descriptors()
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    forwarded: list[int] = []
    threading.Thread(target=forward_signals, args=(forwarded,), daemon=True).start()
    num_ranks, port = requested_ranks(), master_port()
    interpreter.prepare()
    logging.disable(logging.WARNING)  # DeepSpeed's messages about this process, not the ranks'
    try:
        from deepspeed.launcher import launch
    except ModuleNotFoundError as error:
        remedy = "run 'bash launch/environment.sh', or set PYTHON to one that has it"
        fail(f"{sys.executable} has no module '{error.name}'; {remedy}")
    devices = node_devices(num_ranks)
    set_threads(len(devices))
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    # Below the level "critical" the launcher prints the whole command after a rank's error.
    options = [f"--world_info={world}", f"--master_port={port}", "--log_level=critical"]
    sys.argv = ["launch", *options, *sys.argv[1:]]
    try:
        launch.main()
    except SystemExit as end:
        if not isinstance(end.code, int) or end.code >= 0:
            raise
        end_by_signal(-end.code, forwarded)


def end_by_signal(number: int, forwarded: list[int]) -> NoReturn:
    """End like a rank that a signal killed; silent where this process had received that signal."""
    if number in forwarded:
        sys.exit(128 + number)
    name = signal.Signals(number).name
    fail(f"a rank was killed by {name}{SIGNAL_HINTS.get(name, '')}", code=128 + number)


if __name__ == "__main__":
    main()
