"""Chains of elementwise operations that torch.compile may make one kernel of.

On a GPU each eager operation reads and writes whole tensors: at 7B the norms, the rotary embedding and SwiGLU of a step then
move three times the bytes that one kernel for each of them moves. On a CPU, where products take nearly all time, and in runs
of a few steps, compiling costs more than it gains; so `choose` decides, once, before the first step.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from vico.errors import UserError

MANY_STEPS = 500  # that are left of a run: compiling takes up to half a minute, and gains some hundredths of a second per step
Chain = TypeVar("Chain", bound=Callable[..., Any])
BACKEND = "inductor"
_compiling = False


def chain(function: Chain) -> Chain:
    """A function of tensors (and constants) whose first dimension is the number of rows, which differs from batch to batch.

    No gradient flows through it: autograd Functions call it in their forward and backward.
    """
    compiled: Callable[..., Any] | None = None

    @wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal compiled
        if not _compiling:
            return function(*arguments)
        if compiled is None:
            compiled = torch.compile(function, fullgraph=True, backend=BACKEND)
        return compiled(*map(_of_any_length, arguments))

    return call  # type: ignore[return-value]


def _of_any_length(argument: Any) -> Any:
    """Rows may differ without a new compilation; what else tensors carry (gradients wanted, a class of their own) is no matter."""
    if isinstance(argument, Tensor):
        argument = argument.detach()
        if argument.ndim > 1 or not argument.is_floating_point():  # weights and gates are vectors that stay as they are
            torch._dynamo.maybe_mark_dynamic(argument, 0)
    return argument


def choose(how: str, device: torch.device, num_steps: int) -> str:
    """Compile the chains from now on, if `--compile` HOW and the run say so; returns what is done and why.

    Raises UserError when this machine cannot compile and was told to.
    """
    global _compiling
    if how == "off" or (how == "auto" and (device.type != "cuda" or num_steps < MANY_STEPS)):
        why = "--compile off" if how == "off" else "a short run" if device.type == "cuda" else "a CPU"
        return f"elementwise kernels not compiled ({why})"
    try:
        torch.compile(_double, fullgraph=True)(torch.ones(64, 64, device=device))
    except Exception as problem:  # whatever a missing or wrong compiler makes of it
        reason = (str(problem).splitlines() or [""])[0] or type(problem).__name__
        if how == "on":
            raise UserError(f"--compile on: torch.compile does not work here ({reason}); mend that, or use --compile off") from None
        return f"elementwise kernels not compiled (torch.compile does not work here: {reason})"
    _compiling = True
    return "elementwise kernels compiled"


def _double(x: Tensor) -> Tensor:
    return x * 2


def compiling() -> bool:
    return _compiling
