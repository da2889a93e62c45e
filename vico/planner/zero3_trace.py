"""How many bytes of gathered parameters ZeRO-3 holds at once.

Simulates how DeepSpeed 0.19.8 fetches, prefetches and releases parameters
(partitioned_param_coordinator.py). A test compares it with the parameters that a real run holds.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vico.model.config import ViCoConfig, block_shapes

# In a ds_config's leaf_module.classes: ZeRO-3 gathers each decoder block as one module.
BLOCK = "vico.model.llama.Block"


@dataclass(frozen=True)
class Parameter:
    name: str
    numel: int
    itemsize: int

    @property
    def num_bytes(self) -> int:
        return self.numel * self.itemsize


Module = tuple[Parameter, ...]


def gathered_modules(
    config: ViCoConfig,
    itemsize: int,
    threshold: int,
    whole_blocks: bool,
    linear_itemsize: int | None = None,
) -> list[Module]:
    """Modules in forward's order, with the parameters that each gathers.

    `linear_itemsize`: of the blocks' linear layers, where they have a type of their own.
    Parameters of fewer than `threshold` elements are left out: every rank keeps them whole.
    """
    gathered: list[Module] = []
    for module in _modules(config, itemsize, whole_blocks, linear_itemsize or itemsize):
        large = tuple(parameter for parameter in module if parameter.numel >= threshold)
        if large:
            gathered.append(large)
    return gathered


def _modules(
    config: ViCoConfig, itemsize: int, whole_blocks: bool, linear_itemsize: int
) -> Iterator[Module]:
    for name in ("adapter_query", "visual_proj", "temporal_emb"):
        yield (Parameter(name, math.prod(config.trainable_shapes[f"{name}.weight"]), 4),)
    yield (Parameter("tok_embeddings", config.num_embedding_parameters, itemsize),)
    for i in range(config.n_layers):
        modules = _block_modules(config, itemsize, i, linear_itemsize)
        if whole_blocks:
            parameters = [parameter for module in modules for parameter in module]
            yield tuple(dict.fromkeys(parameters))  # each one once
        else:
            yield from modules
    yield (Parameter("norm", config.dim, itemsize),)
    yield (Parameter("output", config.num_embedding_parameters, itemsize),)


def _block_modules(
    config: ViCoConfig, itemsize: int, index: int, linear_itemsize: int
) -> list[Module]:
    """Modules of one decoder block. wk and wv run twice: for the stream and for the prompt."""
    shapes = block_shapes(config)

    def frozen(name: str, itemsize: int = itemsize) -> Module:
        return (Parameter(f"{index}.{name}", math.prod(shapes[f"{name}.weight"]), itemsize),)

    def linear(name: str) -> Module:
        return frozen(name, linear_itemsize)

    gates = tuple(Parameter(f"{index}.gate{g}", config.n_heads, 4) for g in (1, 2))
    linears = [linear(f"attention.{name}") for name in "wq wk wv wk wv wo".split()]
    swiglu = [linear(f"feed_forward.{name}") for name in "w1 w3 w2".split()]
    return [frozen("attention_norm"), gates, *linears, frozen("ffn_norm"), *swiglu]


@dataclass
class _Fetch:
    """One all-gather into one buffer.

    The first wait copies all its parameters out. The buffer is freed when each was waited for.
    """

    waiting: set[Parameter]
    num_bytes: int
    arrived: bool = False


class FetchSimulator:
    """DeepSpeed's parameter coordinator over one pass through `order`."""

    def __init__(self, order: Sequence[Module], prefetch: int, max_live: int) -> None:
        self._prefetch, self._max_live = prefetch, max_live
        self._queue: deque[tuple[Parameter, int]] = deque()
        for step, module in enumerate(order):
            self._queue.extend((parameter, step) for parameter in module)
        self._last_use: dict[Parameter, int] = {}  # as far as the queue has been read
        self._live: dict[Parameter, _Fetch] = {}
        self._fetches: list[_Fetch] = []
        self.peak_parameter_bytes = self.peak_bytes = 0

    def run(self, step: int, module: Module) -> None:
        """Fetch a module's parameters, prefetch later ones, and release what is not used again."""
        self._fetch([parameter for parameter in module if parameter not in self._live])
        for parameter in module:
            fetch = self._live[parameter]
            fetch.arrived = True
            self._update_peaks()
            fetch.waiting.discard(parameter)
        self._fetch(self._next_parameters(step, module))
        self._update_peaks()
        for parameter in module:  # a parameter that the prefetch met again stays
            if self._last_use[parameter] <= step:
                self._live.pop(parameter, None)

    def _next_parameters(self, step: int, module: Module) -> list[Parameter]:
        """Read the queue past `module`, and on until enough elements are to be prefetched."""
        unread = {parameter for parameter in module if self._last_use.get(parameter, -1) < step}
        for _ in unread:
            self._read_queue()
        room = min(self._prefetch, self._max_live - _num_elements(self._live))
        ahead: list[Parameter] = []
        while self._queue and _num_elements(ahead) < room:
            parameter = self._read_queue()
            if parameter not in self._live and parameter not in ahead:
                ahead.append(parameter)
        return ahead

    def _read_queue(self) -> Parameter:
        parameter, step = self._queue.popleft()
        self._last_use[parameter] = step
        return parameter

    def _fetch(self, parameters: list[Parameter]) -> None:
        if not parameters:
            return
        fetch = _Fetch(set(parameters), _num_bytes(parameters))
        self._fetches = [*(other for other in self._fetches if other.waiting), fetch]
        self._live |= dict.fromkeys(parameters, fetch)

    def _update_peaks(self) -> None:
        copied = [parameter for parameter, fetch in self._live.items() if fetch.arrived]
        buffers = sum(fetch.num_bytes for fetch in self._fetches if fetch.waiting)
        self.peak_parameter_bytes = max(self.peak_parameter_bytes, _num_bytes(self._live))
        self.peak_bytes = max(self.peak_bytes, _num_bytes(copied) + buffers)


def _num_elements(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.numel for parameter in parameters)


def _num_bytes(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.num_bytes for parameter in parameters)


def live_bytes(modules: Sequence[Module], prefetch: int, max_live: int) -> tuple[int, int]:
    """The most bytes over forward and backward: (of parameters, with their receive buffers).

    With each module, DeepSpeed prefetches whole parameters until `prefetch` elements are on their
    way, as long as fewer than `max_live` elements are live. A recomputed block runs again on
    what backward has gathered for it.
    """
    whole_model: Module = ()  # a step of its own, which only prefetches
    order = [whole_model, *modules, whole_model, *reversed(modules)]
    simulator = FetchSimulator(order, prefetch, max_live)
    for step, module in enumerate(order):
        simulator.run(step, module)
    return simulator.peak_parameter_bytes, simulator.peak_bytes
