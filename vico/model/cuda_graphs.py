"""All blocks but the last of a training micro-batch as two CUDA graphs, forward and backward, each started by one call.

A block is sixty kernels there and back, and a host needs 5 to 40 us to start one: at the published batch size a GPU would wait
for its host more than half of the time (benchmarks/LOG.md). Streams are filled up to a few sizes (layout.py). The first
micro-batch of a size runs as it is, the second is recorded, and later ones replay the record: the same kernels on the same
shapes, so that no result depends on what was recorded when. Embeddings, last block and head are prepared while the GPU works.

Shapes: L adapted blocks among these, T rows as filled up, N numbers of a layout.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import functional_call

from vico.model.attention.masks import AttentionMask
from vico.model.attention.segment_layout import LayoutSizes, on_device, segment_layout, sent
from vico.model.attention.varlen import KERNELS, PackedAttention
from vico.model.batch import Segment
from vico.model.config import MAX_GRAPH_ROWS
from vico.model.llama import Block, Context
from vico.model.vico import ViCo

USED = os.environ.get("VICO_GRAPHS", "on") != "off"  # the one switch, for comparisons
MAX_GRAPHS = 32  # each record holds its output and the stream's gradient: 16 KiB per row at 7B
# What a record takes, of what a forward keeps: backward's work and the allocator's rounding besides (seen: 1.2); and at least, though
# it can use most of what earlier records took.
TAKES, TAKES_AT_LEAST = 1.25, 0.3
SPARE, MARGIN = (
    1.5,
    1.1,
)  # of what a forward keeps must then be left for one of another size that runs as it is; of the largest step so far


def attach(model: ViCo, why_not: str | None = None) -> str:
    """Let `model` replay where it can; what was decided, and why, for the start line. `why_not`: the caller's own reason."""
    reasons = (
        (not _is_gpu(model.tok_embeddings.weight.device), "a CPU"),
        (not USED, "VICO_GRAPHS=off"),
        (why_not is not None, why_not),
        (
            getattr(model.attend, "kernel", None) is not KERNELS["varlen"],
            "only with --attention varlen",
        ),
        (model.num_checkpointed > 0, "layers are recomputed"),
        (model.num_adapted < 2, "one adapted layer"),
    )
    model.graphed = None
    if (why := next((why for is_so, why in reasons if is_so), None)) is not None:
        return f"no CUDA graphs ({why})"
    model.graphed = GraphedBlocks(model)
    return f"training on up to {MAX_GRAPH_ROWS:,} rows by CUDA graphs"


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


class GraphedBlocks:
    """The blocks below the last one, for training; has a program for each size it has met."""

    def __init__(self, model: ViCo) -> None:
        """`model.attend`: a PackedAttention."""
        assert isinstance(model.attend, PackedAttention)
        self.kernel = model.attend.kernel
        self.blocks = [block for block in model.layers if isinstance(block, Block)][:-1]
        self.num_plain = len(model.layers) - model.num_adapted
        self.turn = 0  # the number of the forward whose results lie in the programs' tensors
        self.programs: dict[LayoutSizes, _Program] = {}
        self._gates = [
            gate
            for block in self.blocks[self.num_plain :]
            for gate in (block.attention.gate1, block.attention.gate2)
        ]
        self._inputs: tuple[_Inputs, Tensor] | None = None  # and the gradient of what goes out
        self._pool: Any = None  # records take turns: they share their memory
        self._pooled = 0  # bytes of it, which nobody else can have
        self._is_full = False  # memory ended while a record was made

    def serves(self, x_TD: Tensor) -> bool:
        return torch.is_grad_enabled() and len(x_TD) < MAX_GRAPH_ROWS

    def is_recorded(self, segments: tuple[Segment, ...]) -> bool:
        program = self.programs.get(segment_layout(segments).rounded)
        return program is not None and program.is_recorded

    def __call__(self, x_TD: Tensor, prompts: Sequence[Tensor | None], context: Context) -> Tensor:
        """The stream [T, D] above these blocks; `prompts`: [A, D] for each block, None for those that are not adapted."""
        found = segment_layout(context.mask.segments)
        sizes = found.rounded
        given = _Inputs(
            x_TD,
            context.rotary_T,
            torch.stack([prompt_AD for prompt_AD in prompts if prompt_AD is not None]),
            torch.stack([gate.flatten() for gate in self._gates]),
        )
        if self._inputs is None:
            most = [x.detach().new_zeros((MAX_GRAPH_ROWS, *x.shape[1:])) for x in given[:2]]
            self._inputs = (
                _Inputs(*most, *(torch.empty_like(x) for x in given[2:])),
                torch.empty_like(most[0]),
            )
        if (program := self.programs.get(sizes)) is None:
            program = self.programs[sizes] = _Program(self, *self._inputs, sizes)
        out: Tensor = _Replay.apply(*given, found.numbers(sizes), program)
        return out

    def may_record(self, kept: int) -> bool:
        """Whether there is room for one record more, of a forward that keeps so many bytes, and then for the largest step so far."""
        if (
            self._is_full
            or sum(program.is_recorded for program in self.programs.values()) >= MAX_GRAPHS
        ):
            return False
        allocated, taken = (
            torch.cuda.memory_allocated(),
            max(TAKES * kept - self._pooled, TAKES_AT_LEAST * kept),
        )
        free = (
            torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - allocated - self._pooled
        )
        return free - taken >= max(
            MARGIN * (torch.cuda.max_memory_allocated() - allocated), SPARE * kept
        )

    def record(self, *runs: Callable[[], None]) -> list[Callable[[], None]]:
        """Each of `runs`, whose kernels are only noted, as a graph; none where memory ends."""
        try:
            return [self._record(run) for run in runs]
        except torch.cuda.OutOfMemoryError:
            self._is_full = True
            return []

    def _record(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # thread_local: the threads of the data loader and of NCCL go on with what is theirs.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            before = torch.cuda.memory_reserved()
            run()
            self._pooled += torch.cuda.memory_reserved() - before
        replay: Callable[[], None] = graph.replay
        return replay


class _Inputs(NamedTuple):
    """What comes in besides the layout; for the programs' own, which all of them share, T is MAX_GRAPH_ROWS."""

    x_TD: Tensor
    rotary_T: Tensor
    prompts_LAD: Tensor
    gates_2LH: Tensor


class _Program:
    """The blocks at one size, over tensors of their own: what comes in is copied there, what goes out is read there."""

    def __init__(
        self, owner: GraphedBlocks, inputs: _Inputs, upstream_TD: Tensor, sizes: LayoutSizes
    ) -> None:
        self.owner, self._sizes = owner, sizes
        self._numbers_N = torch.empty(sizes.numbers, dtype=torch.int64, device=inputs.x_TD.device)
        self._inputs = _Inputs(
            *(x.detach()[: sizes.rows] for x in inputs[:2]), *(x.detach() for x in inputs[2:])
        )
        self._upstream_TD = upstream_TD[: sizes.rows]
        self._differentiable = [x.requires_grad_() for x in (self._inputs.x_TD, *self._inputs[2:])]
        self._out_TD: Tensor | None = None
        self._gradients: tuple[Tensor, ...] = ()
        self._kept = 0  # bytes that a forward keeps; 0: none has run
        self._replays: list[Callable[[], None]] = []  # of forward and of backward

    @property
    def is_recorded(self) -> bool:
        return bool(self._replays)

    def forward(self, given: _Inputs, numbers: np.ndarray) -> Tensor:
        rows, own = len(given.x_TD), self._inputs
        self.owner.turn += 1
        self._numbers_N.copy_(sent(numbers, own.x_TD.device))
        for mine, its in zip(own[:2], given[:2], strict=True):
            mine[:rows] = its
            mine[rows:] = its[:1]  # the rows behind the stream: as finite as a row of it
        own.prompts_LAD.copy_(given.prompts_LAD)
        own.gates_2LH.copy_(given.gates_2LH)
        if not self.is_recorded and self._kept and self.owner.may_record(self._kept):
            self._replays = self.owner.record(self._compute, self._compute_gradients)
        if self.is_recorded:
            self._replays[0]()
        else:
            self._compute_and_measure()
        assert self._out_TD is not None
        return self._out_TD.detach()[:rows]

    def backward(self, gradient_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the stream, the prompts and the gates."""
        rows = len(gradient_TD)
        self._upstream_TD[:rows] = gradient_TD
        self._upstream_TD[rows:] = 0
        if self.is_recorded:
            self._replays[1]()
            x_TD, prompts_LAD, gates_2LH = self._gradients
        else:
            self._compute_gradients()
            x_TD, prompts_LAD, gates_2LH = self._gradients
            self._gradients, self._out_TD = (), None
        # Copies of what may become a parameter's own gradient: the next replay writes here again.
        return x_TD[:rows], prompts_LAD.clone(), gates_2LH.clone()

    def _compute_and_measure(self) -> None:
        on_gpu = self._numbers_N.is_cuda
        before = torch.cuda.memory_allocated() if on_gpu else 0
        self._compute()
        self._kept = torch.cuda.memory_allocated() - before if on_gpu else 0

    def _compute(self) -> None:
        owner, own = self.owner, self._inputs
        layout = on_device(self._numbers_N, self._sizes, own.x_TD.dtype, gradient=True)
        context = Context(
            own.rotary_T, AttentionMask((), ()), PackedAttention(owner.kernel, layout)
        )
        out_TD, names = own.x_TD, ("attention.gate1", "attention.gate2")
        with torch.enable_grad():
            prompts, gates = (
                own.prompts_LAD.unbind(0),
                [gate_H[None, :, None, None] for gate_H in own.gates_2LH.unbind(0)],
            )
            for block in owner.blocks[: owner.num_plain]:
                out_TD = block(out_TD, None, context)
            for i, block in enumerate(owner.blocks[owner.num_plain :]):
                its_gates = dict(zip(names, gates[2 * i : 2 * i + 2], strict=True))
                out_TD = functional_call(block, its_gates, (out_TD, prompts[i], context))
        self._out_TD = out_TD

    def _compute_gradients(self) -> None:
        assert self._out_TD is not None
        self._gradients = torch.autograd.grad(self._out_TD, self._differentiable, self._upstream_TD)


class _Replay(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        rotary_T: Tensor,
        prompts_LAD: Tensor,
        gates_2LH: Tensor,
        numbers: np.ndarray,
        program: _Program,
    ) -> Tensor:
        out = program.forward(_Inputs(x_TD, rotary_T, prompts_LAD, gates_2LH), numbers)
        ctx.program, ctx.turn = program, program.owner.turn
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        owner = ctx.program.owner
        if ctx.turn != owner.turn:
            raise RuntimeError(
                "a micro-batch's backward came after another one's forward; with VICO_GRAPHS=off that is possible"
            )
        owner.turn += 1  # what backward needs is gone: it does not come twice
        x_TD, prompts_LAD, gates_2LH = ctx.program.backward(gradients[0])
        return x_TD, None, prompts_LAD, gates_2LH, None, None
