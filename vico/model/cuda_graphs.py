"""All blocks but the last of a training micro-batch as two CUDA graphs, forward and backward.

A block is sixty kernels in forward and backward, and a host needs 5 to 40 us to launch one: at the
published batch size a GPU would wait for its host more than half of the time (benchmarks/LOG.md). A
graph is launched by one call. Meanwhile the host prepares embeddings, last block and head.

Streams are padded to a few sizes (`HostLayout` of attention/stream.py). The first micro-batch of a
size runs eagerly, the second is captured, and later ones replay the graphs. These are the same
kernels on the same shapes, so no result depends on what was captured when.

The ranks decide as one, before each step, whether to capture in it (`can_capture`,
`allow_captures`): the others wait for a rank that captures, and a step is as fast as its slowest
rank, so one without memory for a capture makes those of the others useless.

G counts the adapted blocks among these, T the rows with their padding.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import functional_call

from vico.model.attention.masks import AttentionMask
from vico.model.attention.segment_layout import send_to_device
from vico.model.attention.stream import HostLayout, StreamAttention
from vico.model.batch import Segment
from vico.model.config import MAX_GRAPH_ROWS
from vico.model.interfaces import Context
from vico.model.vico import ViCo

# Each captured size holds its output and the stream's gradient: 16 KiB per row at 7B.
MAX_GRAPHS = 32
# Memory that a capture takes, as a multiple of what a forward keeps: backward's work and the
# allocator's rounding come on top (measured: 1.2). And the least that it takes, although it can use
# most of the memory of earlier captures.
CAPTURE_FACTOR, MIN_CAPTURE_FACTOR = 1.25, 0.3
# Memory that must be left after a capture: for another size that runs eagerly, as a multiple of
# what a forward keeps, and for the largest step so far, as a multiple of its peak.
EAGER_FACTOR, PEAK_FACTOR = 1.5, 1.1


class GraphedBlocks:
    """The blocks below the last one, for training, with graphs for each layout size seen so far."""

    def __init__(self, model: ViCo) -> None:
        """`model.attend`: a StreamAttention."""
        assert isinstance(model.attend, StreamAttention)
        self.attend, self._dtype = model.attend, model.dtype
        self.blocks = model.blocks[:-1]
        self.num_plain = len(model.layers) - model.num_adapted
        # Number of the forward or backward that wrote last to the static tensors.
        self.generation = 0
        self.entries: dict[Any, _GraphEntry] = {}  # by HostLayout.padded_sizes
        self._gates: list[Tensor] = []
        for block in self.blocks[self.num_plain :]:
            self._gates += [block.attention.gate1, block.attention.gate2]
        self._static: tuple[_GraphInputs, Tensor] | None = None
        self._pool: Any = None  # captures replay one after the other: they share their memory
        self._pool_bytes = 0  # reserved for the pool; nothing else can use it
        self._is_full = False  # a capture ran out of memory
        # Sizes to capture in this step, as all ranks have agreed; None: nobody asks other ranks.
        self._agreed: frozenset[Any] | None = None

    def accepts(self, x_TD: Tensor) -> bool:
        return torch.is_grad_enabled() and len(x_TD) < MAX_GRAPH_ROWS

    def is_captured(self, segments: tuple[Segment, ...]) -> bool:
        entry = self.entries.get(self._layout(segments).padded_sizes)
        return entry is not None and entry.is_captured

    def _layout(self, segments: tuple[Segment, ...]) -> HostLayout:
        return self.attend.host_layout(segments, self._dtype)

    def __call__(self, x_TD: Tensor, prompts: Sequence[Tensor | None], context: Context) -> Tensor:
        """The stream [T, D] above these blocks.

        `prompts`: [A, D] for each block, None for those that are not adapted.
        """
        layout = self._layout(context.mask.segments)
        sizes = layout.padded_sizes
        inputs = _GraphInputs(
            x_TD,
            context.rotary_T1h,
            torch.stack([prompt_AD for prompt_AD in prompts if prompt_AD is not None]),
            torch.stack([gate.flatten() for gate in self._gates]),
        )
        if self._static is None:
            self._static = _static_tensors(inputs)
        if sizes not in self.entries:
            self.entries[sizes] = _GraphEntry(self, *self._static, sizes)
        numbers = layout.joined(sizes)
        out: Tensor = _ReplayFunction.apply(*inputs, numbers, self.entries[sizes])
        return out

    def can_capture(self, micro_batches: Iterable[tuple[Segment, ...]]) -> bool:
        """Whether this rank can capture what is new in a step; before `allow_captures`.

        A size is due once it has run.
        """
        due = {sizes for sizes, entry in self.entries.items() if entry.is_due}
        if due:
            due &= {self._layout(segments).padded_sizes for segments in micro_batches}
        self._agreed = frozenset(due)
        kept = [self.entries[sizes].kept_bytes for sizes in due]
        return not self._is_full and (not kept or self.has_room(*kept))

    def allow_captures(self, allowed: bool) -> None:
        """Whether all ranks can capture in this step."""
        if not allowed:
            self._agreed = frozenset()

    def may_capture(self, entry: "_GraphEntry") -> bool:
        if self._is_full or not entry.is_due:
            return False
        if self._agreed is None:
            return self.has_room(entry.kept_bytes)
        return entry.sizes in self._agreed

    def has_room(self, *kept_bytes: int) -> bool:
        """Whether memory suffices for captures of forwards that keep so many bytes each.

        It must also suffice for the largest step after them.
        """
        num_captured = sum(entry.is_captured for entry in self.entries.values())
        if self._is_full or num_captured + len(kept_bytes) > MAX_GRAPHS:
            return False
        allocated = torch.cuda.memory_allocated()
        needed = 0.0
        for kept in kept_bytes:
            shared = self._pool_bytes + needed
            needed += max(CAPTURE_FACTOR * kept - shared, MIN_CAPTURE_FACTOR * kept)
        unused_bytes = torch.cuda.memory_reserved() - allocated - self._pool_bytes
        free = torch.cuda.mem_get_info()[0] + unused_bytes
        largest_step = PEAK_FACTOR * (torch.cuda.max_memory_allocated() - allocated)
        return free - needed >= max(largest_step, EAGER_FACTOR * max(kept_bytes))

    def capture(self, *functions: Callable[[], None]) -> list[Callable[[], None]]:
        """The replay of each function, whose kernels are captured and do not run.

        Empty where memory runs out.
        """
        try:
            replays = [self._capture(function) for function in functions]
        except torch.cuda.OutOfMemoryError:
            self._is_full = True
            return []
        # Replays use the pool's memory. What this size's first pass had would stay reserved beside.
        torch.cuda.empty_cache()
        return replays

    def _capture(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # thread_local: the threads of the data loader and of NCCL may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            before = torch.cuda.memory_reserved()
            function()
            self._pool_bytes += torch.cuda.memory_reserved() - before
        replay: Callable[[], None] = graph.replay
        return replay


class _GraphInputs(NamedTuple):
    """The inputs besides the layout, of a call or static.

    The static ones that all sizes share have MAX_GRAPH_ROWS rows.
    """

    x_TD: Tensor
    rotary_T1h: Tensor
    prompts_GAD: Tensor
    gates_2GH: Tensor


def _static_tensors(inputs: _GraphInputs) -> tuple[_GraphInputs, Tensor]:
    """(inputs, gradient of the output) at fixed addresses, for all sizes."""
    x_TD = inputs.x_TD.detach().new_zeros((MAX_GRAPH_ROWS, *inputs.x_TD.shape[1:]))
    rotary_T1h = inputs.rotary_T1h.detach().new_zeros(
        (MAX_GRAPH_ROWS, *inputs.rotary_T1h.shape[1:])
    )
    prompts_GAD, gates_2GH = (
        torch.empty_like(inputs.prompts_GAD),
        torch.empty_like(inputs.gates_2GH),
    )
    return _GraphInputs(x_TD, rotary_T1h, prompts_GAD, gates_2GH), torch.empty_like(x_TD)


class _GraphEntry:
    """The blocks at one layout size, over static tensors.

    Inputs are copied there, outputs are read there.
    """

    def __init__(
        self, owner: GraphedBlocks, static: _GraphInputs, upstream_TD: Tensor, sizes: Any
    ) -> None:
        self.owner, self.sizes = owner, sizes
        num_numbers = sum(sizes.array_lengths)
        self._numbers = torch.empty(num_numbers, dtype=torch.int64, device=static.x_TD.device)
        self._inputs = _GraphInputs(
            static.x_TD.detach()[: sizes.num_rows],
            static.rotary_T1h.detach()[: sizes.num_rows],
            static.prompts_GAD.detach(),
            static.gates_2GH.detach(),
        )
        self._upstream_TD = upstream_TD[: sizes.num_rows]
        differentiable = (self._inputs.x_TD, self._inputs.prompts_GAD, self._inputs.gates_2GH)
        self._differentiable = [x.requires_grad_() for x in differentiable]
        self._out_TD: Tensor | None = None
        self._gradients: tuple[Tensor, ...] = ()
        self.kept_bytes = 0  # by a forward; 0: none has run
        self._replays: list[Callable[[], None]] = []  # of forward and of backward

    @property
    def is_captured(self) -> bool:
        return bool(self._replays)

    @property
    def is_due(self) -> bool:
        """Whether a forward has shown what a capture takes, and none was made."""
        return bool(self.kept_bytes) and not self.is_captured

    def forward(self, inputs: _GraphInputs, numbers: np.ndarray) -> Tensor:
        """`numbers`: the layout's arrays, joined."""
        self.owner.generation += 1
        self._copy_inputs(inputs, numbers)
        if self.owner.may_capture(self):
            self._replays = self.owner.capture(self._compute, self._compute_gradients)
        if self.is_captured:
            self._replays[0]()
        else:
            self._compute_and_measure()
        assert self._out_TD is not None
        return self._out_TD.detach()[: len(inputs.x_TD)]

    def _copy_inputs(self, inputs: _GraphInputs, numbers: np.ndarray) -> None:
        static, num_rows = self._inputs, len(inputs.x_TD)
        self._numbers.copy_(send_to_device(numbers, static.x_TD.device))
        for static_T, input_T in zip(static[:2], inputs[:2], strict=True):
            static_T[:num_rows] = input_T
            static_T[num_rows:] = input_T[:1]  # padding: as finite as a row of the stream
        static.prompts_GAD.copy_(inputs.prompts_GAD)
        static.gates_2GH.copy_(inputs.gates_2GH)

    def backward(self, gradient_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the stream, the prompts and the gates."""
        num_rows = len(gradient_TD)
        self._upstream_TD[:num_rows] = gradient_TD
        self._upstream_TD[num_rows:] = 0
        if self.is_captured:
            self._replays[1]()
            x_TD, prompts_GAD, gates_2GH = self._gradients
        else:
            self._compute_gradients()
            x_TD, prompts_GAD, gates_2GH = self._gradients
            self._gradients, self._out_TD = (), None
        # Copies of what may become a parameter's own gradient: the next replay writes here again.
        return x_TD[:num_rows], prompts_GAD.clone(), gates_2GH.clone()

    def _compute_and_measure(self) -> None:
        on_gpu = self._numbers.is_cuda
        before = torch.cuda.memory_allocated() if on_gpu else 0
        self._compute()
        self.kept_bytes = torch.cuda.memory_allocated() - before if on_gpu else 0

    def _compute(self) -> None:
        static, owner = self._inputs, self.owner
        dtype = static.x_TD.dtype
        layout = owner.attend.layout_from_numbers(self._numbers, self.sizes, dtype)
        attend = owner.attend.with_layout(layout)
        context = Context(static.rotary_T1h, AttentionMask((), ()), attend)
        out_TD = static.x_TD
        with torch.enable_grad():
            prompts = static.prompts_GAD.unbind(0)
            gates = [gate_H[None, :, None, None] for gate_H in static.gates_2GH.unbind(0)]
            for block in owner.blocks[: owner.num_plain]:
                out_TD = block(out_TD, None, context)
            for i, block in enumerate(owner.blocks[owner.num_plain :]):
                own = {"attention.gate1": gates[2 * i], "attention.gate2": gates[2 * i + 1]}
                out_TD = functional_call(block, own, (out_TD, prompts[i], context))
        self._out_TD = out_TD

    def _compute_gradients(self) -> None:
        assert self._out_TD is not None
        self._gradients = torch.autograd.grad(self._out_TD, self._differentiable, self._upstream_TD)


class _ReplayFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        rotary_T1h: Tensor,
        prompts_GAD: Tensor,
        gates_2GH: Tensor,
        numbers: np.ndarray,
        entry: _GraphEntry,
    ) -> Tensor:
        out = entry.forward(_GraphInputs(x_TD, rotary_T1h, prompts_GAD, gates_2GH), numbers)
        ctx.entry, ctx.generation = entry, entry.owner.generation
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        owner = ctx.entry.owner
        if ctx.generation != owner.generation:
            raise RuntimeError(
                "a micro-batch's backward came after another one's forward; "
                "with VICO_GRAPHS=off that is possible"
            )
        owner.generation += 1  # what backward needs is gone: it cannot run twice
        x_TD, prompts_GAD, gates_2GH = ctx.entry.backward(gradients[0])
        return x_TD, None, prompts_GAD, gates_2GH, None, None
