"""How many bytes of gathered parameters ZeRO-3 holds at once: DeepSpeed's fetching, prefetching and releasing, replayed.

DeepSpeed 0.19.8 (partitioned_param_coordinator.py). A test holds the replay against the parameters that a real run holds.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vico.planner.memory import FEATURE_WIDTH, ModelSize

BLOCK = "vico.model.llama.Block"  # in a ds_config's leaf_module.classes: decoder blocks are gathered as one


@dataclass(frozen=True)
class Parameter:
    name: str
    numel: int
    width: int

    @property
    def size(self) -> int:
        return self.numel * self.width


Module = tuple[Parameter, ...]


def gathered_modules(
    size: ModelSize, width: int, threshold: int, whole_blocks: bool
) -> list[Module]:
    """Modules in forward's order with the parameters that each gathers; those smaller than `threshold` always stay."""
    kept = (
        tuple(p for p in module if p.numel >= threshold)
        for module in _modules(size, width, whole_blocks)
    )
    return [module for module in kept if module]


def _modules(size: ModelSize, width: int, whole_blocks: bool) -> Iterator[Module]:
    yield (Parameter("adapter_query", size.prompts, 4),)
    yield (Parameter("visual_proj", FEATURE_WIDTH * size.dim, 4),)
    yield (Parameter("temporal_emb", size.num_slots * size.dim, 4),)
    yield (Parameter("tok_embeddings", size.head, width),)
    for i in range(size.n_layers):
        block = list(_block(size, width, i))
        if whole_blocks:
            yield tuple(dict.fromkeys(parameter for module in block for parameter in module))
        else:
            yield from block
    yield (Parameter("norm", size.dim, width),)
    yield (Parameter("output", size.head, width),)


def _block(size: ModelSize, width: int, place: int) -> Iterator[Module]:
    """wk and wv run twice: for the stream and for the prompt."""
    square, hidden = size.dim * size.dim, size.dim * size.hidden_dim
    kv = size.dim * (size.kv_heads or size.n_heads) * size.head_dim
    yield (Parameter(f"{place}.attention_norm", size.dim, width),)
    yield tuple(Parameter(f"{place}.gate{g}", size.n_heads, 4) for g in (1, 2))
    for name, numel in (
        ("wq", square),
        ("wk", kv),
        ("wv", kv),
        ("wk", kv),
        ("wv", kv),
        ("wo", square),
    ):
        yield (Parameter(f"{place}.{name}", numel, width),)
    yield (Parameter(f"{place}.ffn_norm", size.dim, width),)
    for name in ("w1", "w3", "w2"):
        yield (Parameter(f"{place}.{name}", hidden, width),)


@dataclass
class _Fetch:
    """One all-gather. Its buffer is let go when all its parameters have been waited for; the first wait copies them all out."""

    waiting: set[Parameter]
    size: int
    arrived: bool = False


class FetchSimulator:
    def __init__(self, order: Sequence[Module], prefetch: int, most_live: int) -> None:
        self._prefetch, self._most_live = prefetch, most_live
        self._queue = deque(
            (parameter, step) for step, module in enumerate(order) for parameter in module
        )
        self._last_use: dict[Parameter, int] = {}  # as far as the queue has been looked at
        self._live: dict[Parameter, _Fetch] = {}
        self._fetches: list[_Fetch] = []
        self.most_parameters = self.most_bytes = 0

    def run(self, step: int, module: Module) -> None:
        self._fetch([parameter for parameter in module if parameter not in self._live])
        for parameter in module:
            fetch = self._live[parameter]
            fetch.arrived = True
            self._note()
            fetch.waiting.discard(parameter)
        new = {parameter for parameter in module if self._last_use.get(parameter, -1) < step}
        for _ in new:
            parameter, use = self._queue.popleft()
            self._last_use[parameter] = use
        room = min(
            self._prefetch, self._most_live - sum(parameter.numel for parameter in self._live)
        )
        ahead: list[Parameter] = []
        while self._queue and sum(parameter.numel for parameter in ahead) < room:
            parameter, use = self._queue.popleft()
            self._last_use[parameter] = use
            if parameter not in self._live and parameter not in ahead:
                ahead.append(parameter)
        self._fetch(ahead)
        self._note()
        for parameter in module:  # one whose next use a prefetch has passed over stays
            if self._last_use[parameter] <= step:
                self._live.pop(parameter, None)

    def _fetch(self, parameters: list[Parameter]) -> None:
        if parameters:
            fetch = _Fetch(set(parameters), sum(parameter.size for parameter in parameters))
            self._fetches = [*(f for f in self._fetches if f.waiting), fetch]
            self._live |= dict.fromkeys(parameters, fetch)

    def _note(self) -> None:
        copies = sum(parameter.size for parameter, fetch in self._live.items() if fetch.arrived)
        buffers = sum(fetch.size for fetch in self._fetches if fetch.waiting)
        self.most_parameters = max(
            self.most_parameters, sum(parameter.size for parameter in self._live)
        )
        self.most_bytes = max(self.most_bytes, copies + buffers)


def live_bytes(modules: Sequence[Module], prefetch: int, most_live: int) -> tuple[int, int]:
    """The most bytes over forward and backward: of gathered parameters, and with the buffers that they arrive in.

    DeepSpeed prefetches whole parameters until it has `prefetch` elements on their way, with each module anew, while fewer
    than `most_live` elements are there in all. A recomputed block runs again on what backward has gathered for it.
    """
    order = [*modules, *reversed(modules)]
    replay = FetchSimulator(order, prefetch, most_live)
    for step, module in enumerate(order):
        replay.run(step, module)
    return replay.most_parameters, replay.most_bytes
