"""start.py SCRIPT FLAGS: one rank per device of this node, by DeepSpeed's per-node launcher; ends as the ranks end.

It calls `deepspeed.launcher.launch`, which the `deepspeed` command starts as a child of its own, without that command
around it. On one node the command (0.19.8) only adds ways to fail: SIGTERM ends it and leaves the ranks running, Ctrl-C
prints its traceback, given a number of devices it ignores CUDA_VISIBLE_DEVICES, it obeys a /job/hostfile, its port is
29500 whoever else uses it, and it imports torch a second time.
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
from typing import NoReturn

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def fail(message: str, code: int = 2) -> NoReturn:
    print(f"vico: error: {message}", file=sys.stderr, flush=True)
    if "SLURM_STEP_ID" in os.environ:
        time.sleep(0.5)  # srun can lose what a task that fails says last
    sys.exit(code)


def asked_ranks() -> int | None:
    asked = os.environ.get("VICO_RANKS") or None
    if asked and not (asked.isdecimal() and int(asked) >= 1):
        fail(f"VICO_RANKS={asked}: must be a whole number of at least 1")
    return int(asked) if asked else None


def node_devices(ranks: int | None) -> list[str]:
    """What the launcher shows to the ranks, one entry each: all devices of the node, or the first `ranks` of them."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # or each rank warns that it found no GPU
        return ["-1"] * (
            ranks or 1
        )  # -1 shows no GPU to a rank, also where DS_ACCELERATOR=cpu passes over some
    count = accelerator.device_count()
    visible = os.environ.get(accelerator.visible_devices_envs()[0])
    devices = (
        [name.strip() for name in visible.split(",")][:count]
        if visible
        else [str(i) for i in range(count)]
    )
    if ranks and ranks > len(devices):
        fail(
            f"VICO_RANKS={ranks}: this node shows {len(devices)} devices, and each rank needs its own"
        )
    return devices[:ranks]


def master_port() -> int:
    """MASTER_PORT, or one that is free: with a fixed default, two jobs of a node collide."""
    asked = os.environ.get("MASTER_PORT") or "0"
    if not (asked.isdecimal() and int(asked) < 65536):
        fail(f"MASTER_PORT={asked}: must be a port number; unset it to get a free one")
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as torch does: a port just left is free
        try:
            probe.bind(("", int(asked)))
        except OSError as problem:
            fail(f"MASTER_PORT={asked}: {problem.strerror}; unset it to get a free one", code=6)
        return int(probe.getsockname()[1])


def main() -> None:
    passed_on: list[int] = []
    # The launcher would end the ranks, by force after 30 s, and end with 1 itself. Blocked here and in the ranks, which inherit
    # that, signals reach a rank once it can hear them (vico/distributed/signals.py); none is lost in the seconds before. This comes first:
    # threads that libraries start would take them otherwise.
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    threading.Thread(target=pass_signals_on, args=(passed_on,), daemon=True).start()
    ranks, port = asked_ranks(), master_port()
    logging.disable(
        logging.WARNING
    )  # DeepSpeed's remarks on this process; the ranks make their own
    try:
        from deepspeed.launcher import launch
    except ModuleNotFoundError as missing:
        fail(
            f"{sys.executable} has no module '{missing.name}'; run 'bash launch/environment.sh', or set PYTHON to one that has"
        )
    devices = node_devices(ranks)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, cores // len(devices)))
    )  # or every rank takes all cores
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    # critical: below it the launcher repeats the whole command after a rank's own last line
    sys.argv = [
        "launch",
        f"--world_info={world}",
        f"--master_port={port}",
        "--log_level=critical",
        *sys.argv[1:],
    ]
    try:
        launch.main()
    except SystemExit as end:
        if not isinstance(end.code, int) or end.code >= 0:
            raise
        if -end.code in passed_on:
            sys.exit(128 - end.code)
        name = signal.Signals(-end.code).name
        whys = {
            "SIGKILL": "; the kernel does that when memory runs out",
            "SIGBUS": "; a file that it reads was cut off meanwhile",
        }
        fail(f"a rank was ended by {name}{whys.get(name, '')}", code=128 - end.code)


def pass_signals_on(passed_on: list[int]) -> NoReturn:
    """Hands what this process is sent to the ranks, which decide how they end; where there are none yet, ends."""
    while True:
        number = signal.sigwait(PASSED_ON)
        passed_on.append(number)
        import psutil

        ranks = psutil.Process().children()
        if not ranks:
            os._exit(128 + number)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)


if __name__ == "__main__":
    main()
