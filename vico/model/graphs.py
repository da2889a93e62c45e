"""All blocks but the last of a training micro-batch as two CUDA graphs, forward and backward, each started by one call.

A block is sixty kernels there and back, and a host needs 5 to 40 us to start one: at the published batch size a GPU would wait
for its host more than half of the time (benchmarks/LOG.md). Streams are filled up to a few sizes (layout.py). The first
micro-batch of a size runs as it is, the second is recorded, and later ones replay the record: the same kernels on the same
shapes, so that no result depends on what was recorded when. Embeddings, last block and head are prepared while the GPU works.

Shapes: L adapted blocks among these, T rows as filled up, N numbers of a layout.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import functional_call

from vico.model.attention import Attend, Visibility
from vico.model.attention_packed import KERNELS, PackedAttention
from vico.model.layout import Sizes, on_device, places, sent
from vico.model.llama import Block, Context, Llama
from vico.records import Segment

USED = os.environ.get("VICO_GRAPHS", "on") != "off"  # the one switch, for comparisons
MOST_ROWS = 4096  # of more, a GPU takes longer than any host
MOST_SIZES = 32  # each record holds its output and the stream's gradient: 16 KiB per row at 7B
SPARE = 2.5  # times what a forward keeps must be free: for the record, a forward of another size, and what is not foreseen


def attach(model: Llama, attend: Attend, why_not: str | None = None) -> str:
    """Let `model` replay where it can; what was decided, and why, for the start line. `why_not`: the caller's own reason."""
    reasons = (
        (not _is_gpu(model.tok_embeddings.weight.device), "a CPU"), (not USED, "VICO_GRAPHS=off"), (why_not is not None, why_not),
        (not isinstance(attend, PackedAttention) or attend.kernel is not KERNELS["varlen"], "only with --attention varlen"),
        (model.num_checkpointed > 0, "layers are recomputed"), (model.num_adapted < 2, "one adapted layer"),
    )  # fmt: skip
    model.replayed = None
    if (why := next((why for is_so, why in reasons if is_so), None)) is not None:
        return f"no CUDA graphs ({why})"
    assert isinstance(attend, PackedAttention)
    model.replayed = Replayed(model, attend)
    return f"micro-batches of up to {MOST_ROWS:,} rows as CUDA graphs"


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


class Replayed:
    """The blocks below the last one, for training; has a program for each size it has met."""

    def __init__(self, model: Llama, attend: PackedAttention) -> None:
        self.blocks = [block for block in model.layers if isinstance(block, Block)][:-1]
        self.num_plain = len(model.layers) - model.num_adapted
        self.attend = attend
        self.programs: dict[Sizes, _Program] = {}
        self.gates = [gate for block in self.blocks[self.num_plain :] for gate in (block.attention.gate1, block.attention.gate2)]
        self._streams: tuple[Tensor, Tensor] | None = None
        self._pool: Any = None  # records take turns: they share their memory
        self._pooled = 0  # bytes that the largest forward of a record keeps
        self.turn = 0  # the number of the forward whose results lie there

    def serves(self, x_TD: Tensor) -> bool:
        return torch.is_grad_enabled() and len(x_TD) < MOST_ROWS

    def __call__(self, x_TD: Tensor, prompts: Sequence[Tensor | None], context: Context) -> Tensor:
        """The stream [T, D] above these blocks; `prompts`: [A, D] for each block, None for those that are not adapted."""
        found = places(context.seen.segments)
        sizes = found.rounded
        prompts_LAD = torch.stack([prompt_AD for prompt_AD in prompts if prompt_AD is not None])
        gates_2LH = torch.stack([gate.flatten() for gate in self.gates])
        if (program := self.programs.get(sizes)) is None:
            program = self.programs[sizes] = _Program(self, sizes, x_TD, prompts_LAD, gates_2LH, context.rotary_T)
        out: Tensor = _Replay.apply(x_TD, prompts_LAD, gates_2LH, context.rotary_T, found.numbers(sizes), program)
        return out

    def is_recorded(self, segments: tuple[Segment, ...]) -> bool:
        program = self.programs.get(places(segments).rounded)
        return program is not None and program.is_recorded

    def streams(self, rows: int, like_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Where the stream comes in and where its gradient does, [rows, D]: the same place for every size."""
        if self._streams is None:
            self._streams = like_TD.new_zeros((MOST_ROWS, like_TD.shape[1])), like_TD.new_zeros((MOST_ROWS, like_TD.shape[1]))
        return self._streams[0][:rows].detach().requires_grad_(), self._streams[1][:rows]

    def may_record(self, kept: int) -> bool:
        """Whether there is room for a record of a forward that keeps so many bytes."""
        if sum(program.is_recorded for program in self.programs.values()) >= MOST_SIZES:
            return False
        if kept <= self._pooled:
            return True
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - self._pooled
        return free >= SPARE * kept

    def record(self, run: Callable[[], None], kept: int) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._pooled = max(self._pooled, kept)
        # thread_local: the threads of the data loader and of NCCL go on with what is theirs.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        replay: Callable[[], None] = graph.replay
        return replay


class _Program:
    """The blocks at one size, over tensors of their own: what comes in is copied there, what goes out is read there."""

    def __init__(self, owner: Replayed, sizes: Sizes, x_TD: Tensor, prompts_LAD: Tensor, gates_2LH: Tensor, rotary_T: Tensor) -> None:
        self.owner, self.sizes = owner, sizes
        self._numbers_N = torch.empty(sizes.numbers, dtype=torch.int64, device=x_TD.device)
        self._x_TD, self._gradient_TD = owner.streams(sizes.rows, x_TD.detach())
        self._rotary_T = rotary_T.new_zeros((sizes.rows, *rotary_T.shape[1:]))
        self._prompts_LAD, self._gates_2LH = (torch.empty_like(x).requires_grad_() for x in (prompts_LAD, gates_2LH))
        self._out_TD: Tensor | None = None
        self._gradients: tuple[Tensor, ...] = ()
        self._kept = -1  # bytes that a forward keeps; -1: none has run
        self._replay: tuple[Callable[[], None], Callable[[], None]] | None = None

    @property
    def is_recorded(self) -> bool:
        return self._replay is not None

    def forward(self, x_TD: Tensor, prompts_LAD: Tensor, gates_2LH: Tensor, rotary_T: Tensor, numbers: np.ndarray) -> Tensor:
        rows = len(x_TD)
        self.owner.turn += 1
        self._numbers_N.copy_(sent(numbers, x_TD.device))
        for own, new in ((self._x_TD, x_TD), (self._rotary_T, rotary_T)):
            own[:rows] = new
            own[rows:] = 0
        self._prompts_LAD.copy_(prompts_LAD)
        self._gates_2LH.copy_(gates_2LH)
        self._run_forward()
        assert self._out_TD is not None
        return self._out_TD.detach()[:rows]

    def backward(self, gradient_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = len(gradient_TD)
        self._gradient_TD[:rows] = gradient_TD
        self._gradient_TD[rows:] = 0
        if self._replay is None:
            self._compute_gradients()
            self._out_TD = None
        else:
            self._replay[1]()
        x_TD, prompts_LAD, gates_2LH = self._gradients
        # Copies of what may become a parameter's own gradient: the next replay writes here again.
        return x_TD[:rows], prompts_LAD.clone(), gates_2LH.clone()

    def _run_forward(self) -> None:
        if self._replay is None and self._kept >= 0 and self._x_TD.is_cuda and self.owner.may_record(self._kept):
            record = self.owner.record
            self._replay = record(self._compute, self._kept), record(self._compute_gradients, self._kept)
        if self._replay is not None:
            self._replay[0]()
            return
        before = torch.cuda.memory_allocated() if self._x_TD.is_cuda else 0
        self._compute()
        self._kept = (torch.cuda.memory_allocated() if self._x_TD.is_cuda else 0) - before

    def _compute(self) -> None:
        owner = self.owner
        layout = on_device(self._numbers_N, self.sizes, self._x_TD.dtype, gradient=True)
        context = Context(self._rotary_T, Visibility((), ()), owner.attend.at(layout))
        with torch.enable_grad():
            out_TD, prompts, gates = self._x_TD, self._prompts_LAD.unbind(0), self._gates_2LH.unbind(0)
            for i, block in enumerate(owner.blocks):
                if (j := i - owner.num_plain) < 0:
                    out_TD = block(out_TD, None, context)
                    continue
                pair = zip(("attention.gate1", "attention.gate2"), gates[2 * j : 2 * j + 2], strict=True)
                own = {name: gate[None, :, None, None] for name, gate in pair}
                out_TD = functional_call(block, own, (out_TD, prompts[j], context))
        self._out_TD = out_TD

    def _compute_gradients(self) -> None:
        assert self._out_TD is not None
        self._gradients = torch.autograd.grad(self._out_TD, [self._x_TD, self._prompts_LAD, self._gates_2LH], self._gradient_TD)


class _Replay(Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, prompts_LAD: Tensor, gates_2LH: Tensor, rotary_T: Tensor, numbers: np.ndarray, program: _Program
    ) -> Tensor:
        out = program.forward(x_TD, prompts_LAD, gates_2LH, rotary_T, numbers)
        ctx.program, ctx.turn = program, program.owner.turn
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.turn != ctx.program.owner.turn:
            raise RuntimeError("a micro-batch's backward came after another one's forward; with VICO_GRAPHS=off that is possible")
        return *ctx.program.backward(gradients[0]), None, None, None
