"""Whether the gradients of the trainables arrive in the same order on all ranks.

DeepSpeed fills its buckets in the order of arrival and sums them over the ranks as flat tensors:
ranks with other orders would add gradients of different parameters, and nothing would show it.
(Under ZeRO-3 a block's gradients go together; the order that is compared here is the finer one.)
"""

from collections.abc import Mapping
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

from vico.distributed.launcher_env import host_name
from vico.distributed.world import World
from vico.errors import UserError
from vico.io.digest import digest_json

NUM_CHECKS = 11  # the dry run and the first ten steps


class GradientOrder:
    """Records the order while it is checked; afterwards its hooks are gone."""

    def __init__(self, trainables: Mapping[str, nn.Parameter]) -> None:
        self._names: list[str] = []
        self._checks_left = NUM_CHECKS
        self._hooks = []
        for name, parameter in trainables.items():
            self._hooks.append(parameter.register_hook(partial(self._record, name)))

    def _record(self, name: str, _gradient: Tensor) -> None:
        self._names.append(name)

    def check(self, world: World) -> None:
        """Compare what has arrived since the last check. A collective of all ranks.

        Raises UserError, the same on every rank, naming the ranks that differ from rank 0 and the
        first parameter. Does nothing after NUM_CHECKS calls.
        """
        if not self._checks_left:
            return
        names, self._names = self._names, []
        self._checks_left -= 1
        if not self._checks_left or world.size == 1:
            self._stop()
        digests_R = world.gather(torch.tensor(int(digest_json(names, length=14), 16)))
        if not (digests_R == digests_R[0]).all():
            raise _disagreement(world.gather_objects((host_name(), names)))

    def _stop(self) -> None:
        self._checks_left = 0
        for hook in self._hooks:
            hook.remove()


def _disagreement(reports: list[tuple[str, list[str]]]) -> UserError:
    """`reports`: host and names of each rank, in rank order."""
    _, expected = reports[0]
    differing = [rank for rank, (_, names) in enumerate(reports) if names != expected]
    host, names = reports[differing[0]]
    place, pair = _first_difference(names, expected)
    error = UserError(
        f"the ranks' gradients arrive in different orders, so sums over ranks would mix "
        f"parameters: rank(s) {', '.join(map(str, differing))} (the first on {host}) against rank "
        f"0; first at number {place + 1}: {pair}; nothing of this start is saved; "
        "use equal GPUs and the same environment on all hosts, or VICO_GRAPHS=off"
    )
    error.of_all_ranks = True
    return error


def _first_difference(names: list[str], expected: list[str]) -> tuple[int, str]:
    """Where two lists differ, and what each has there."""
    pairs = zip_longest(names, expected, fillvalue="none")
    for place, (own, other) in enumerate(pairs):
        if own != other:
            return place, f"{own} against {other}"
    raise ValueError("the lists are the same")
