"""The frozen LLaMA backbone (Meta's layout and names), with the adapter's places in its attention.

`run_modules` is the definition of a block. fused_block.py computes the same block as one autograd
Function, and cuda_graphs.py replays all blocks but the last; block_runners.py chooses.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vico.model.attention.cache import LayerCache
from vico.model.attention.stream import StreamAttention
from vico.model.config import LlamaConfig, RopeScaling
from vico.model.interfaces import Context, LowerLayers, MakeLinear
from vico.model.ops.autograd import (
    AdapterAttention,
    FrozenLinearFunction,
    FrozenRMSNorm,
    RotaryEmbedding,
    SwiGLU,
    linear_cross_entropy,
)
from vico.model.ops.logits import Divergence, compare_predictions, vocabulary_logits


def _frozen(*size: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)


class FrozenLinear(nn.Module):
    """x W^T with a weight that is never trained."""

    def __init__(self, num_in: int, num_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _frozen(num_out, num_in, dtype=dtype)

    def forward(self, x: Tensor, exact: bool = False) -> Tensor:
        """`exact`: for quantized_linear.Fp8Linear; here every product is."""
        return FrozenLinearFunction.apply(x, self.weight)


class FrozenEmbedding(nn.Module):
    def __init__(self, num: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _frozen(num, dim, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class OutputHead(nn.Module):
    """The product with the vocabulary, fused with the cross-entropy: the logits are never whole."""

    def __init__(self, dim: int, vocab_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _frozen(vocab_size, dim, dtype=dtype)

    def forward(
        self,
        h_RD: Tensor,
        rows_N: Tensor | None = None,
        ids_N: Tensor | None = None,
        frozen_RD: Tensor | None = None,
        kept_ND: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy [N], fp32, of token ids_N[n] at row rows_N[n] of h_RD.

        Without targets: the logits [R, W] in fp32, as generation needs them. With the frozen
        model's `frozen_RD`: `compare_predictions` [6, N]. With its `kept_ND` of the last targets,
        [N, D]: their `Divergence` in place of the cross-entropy.
        """
        if rows_N is None or ids_N is None:
            return vocabulary_logits(h_RD, self.weight)
        if frozen_RD is not None:
            return compare_predictions(frozen_RD, h_RD, self.weight, rows_N, ids_N)
        if kept_ND is None:
            return linear_cross_entropy(h_RD, self.weight, rows_N, ids_N)
        rows = rows_N.split([len(rows_N) - len(kept_ND), len(kept_ND)])
        losses = linear_cross_entropy(h_RD, self.weight, rows[0], ids_N[: len(rows[0])])
        # embedding, not indexing: windows of short texts share rows, whose gradient is then
        # deterministic.
        h_ND = F.embedding(rows[1], h_RD)
        divergences = Divergence.apply(h_ND, kept_ND, self.weight)
        return torch.cat([losses, divergences])


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, then the frozen weight."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _frozen(dim, dtype=dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        return FrozenRMSNorm.apply(x_TD, self.weight, self.eps)


def rotary_angles(
    positions_T: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Tensor:
    """exp(i angle) of each row's position, complex64 [T, 1, h] (RoFormer, Su et al. 2021)."""
    pairs_h = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32)
    frequencies_h = theta ** (-pairs_h / head_dim)
    if scaling is not None:
        frequencies_h = _scaled(frequencies_h, scaling)
    angles_T1h = positions_T.float()[:, None, None] * frequencies_h
    return torch.polar(torch.ones_like(angles_T1h), angles_T1h)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """LLaMA-3.1's scaling: high frequencies are kept, low ones divided by the factor.

    Those between are blended by their number of turns in the old context.
    """
    turns = scaling.old_context * frequencies / (2 * math.pi)
    width = scaling.high_factor - scaling.low_factor
    kept = ((turns - scaling.low_factor) / width).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


class Attention(nn.Module):
    """wo(softmax over the visible rows, plus tanh(gate1) times the softmax over the prompt)."""

    def __init__(
        self, config: LlamaConfig, adapted: bool, dtype: torch.dtype, linear: MakeLinear
    ) -> None:
        super().__init__()
        kv_dim = config.kv_heads * config.head_dim
        self.head_dim, self.group_size = config.head_dim, config.n_heads // config.kv_heads
        self.wq = linear(config.dim, config.heads_dim, dtype)
        self.wk = linear(config.dim, kv_dim, dtype)
        self.wv = linear(config.dim, kv_dim, dtype)
        self.wo = linear(config.heads_dim, config.dim, dtype)
        if adapted:
            self.gate1 = nn.Parameter(torch.empty(1, config.n_heads, 1, 1, dtype=torch.float32))
            self.gate2 = nn.Parameter(torch.empty(1, config.n_heads, 1, 1, dtype=torch.float32))

    def forward(self, x_TD: Tensor, prompt_AD: Tensor | None, context: Context) -> Tensor:
        """[Q, D] for the query rows: context.query_rows_Q, or all."""
        gates = None
        if prompt_AD is not None:
            # Together, so that their gradients come together and in this order: DeepSpeed sums the
            # ranks' gradients in the order in which they come.
            gates = self.gate1.flatten(), self.gate2.flatten()
        x_QD, rotary_Q1h = x_TD, context.rotary_T1h
        if context.query_rows_Q is not None:
            x_QD = x_TD[context.query_rows_Q]
            rotary_Q1h = context.rotary_T1h[context.query_rows_Q]
        q_QHd = self.heads(self.wq(x_QD))
        k_TJd, v_TJd = self.heads(self.wk(x_TD)), self.heads(self.wv(x_TD))
        q_QHd = RotaryEmbedding.apply(q_QHd, rotary_Q1h)
        k_TJd = RotaryEmbedding.apply(k_TJd, context.rotary_T1h)
        if prompt_AD is None or gates is None:
            return self.wo(self._attend(q_QHd, k_TJd, v_TJd, None, context).flatten(-2))
        gate1_H, gate2_H = gates
        out_QHd = self._attend(q_QHd, k_TJd, v_TJd, gate2_H, context)
        k_AHd, v_AHd = self._prompt_heads(prompt_AD, context.cache)
        out_QHd = AdapterAttention.apply(out_QHd, q_QHd, k_AHd, v_AHd, gate1_H)
        return self.wo(out_QHd.flatten(-2))

    def _attend(
        self, q_QHd: Tensor, k_TJd: Tensor, v_TJd: Tensor, gate2_H: Tensor | None, context: Context
    ) -> Tensor:
        """Over the rows of the stream; in generation over those of the cache and the own one."""
        if context.cache is not None:
            if context.cache.is_filled:
                return context.cache.attend(q_QHd, k_TJd, v_TJd, gate2_H)
            context.cache.fill(k_TJd, v_TJd)
        attend = context.attend
        if not (isinstance(attend, StreamAttention) and attend.takes_grouped_heads):
            k_TJd, v_TJd = self._for_every_head(k_TJd), self._for_every_head(v_TJd)
        return attend(q_QHd, k_TJd, v_TJd, gate2_H, context.mask)

    def _prompt_heads(self, prompt_AD: Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """Keys and values [A, H, d] of the adapter prompt; a cache keeps them.

        Its rows are trained, and few: they are not quantized.
        """
        if cache is not None and cache.prompt_heads is not None:
            return cache.prompt_heads
        k_AHd = self._for_every_head(self.heads(self.wk(prompt_AD, exact=True)))
        v_AHd = self._for_every_head(self.heads(self.wv(prompt_AD, exact=True)))
        if cache is not None:
            cache.prompt_heads = k_AHd, v_AHd
        return k_AHd, v_AHd

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _for_every_head(self, x: Tensor) -> Tensor:
        """Keys or values, one for each query head; no copy where every query head has its own."""
        return x if self.group_size == 1 else x.repeat_interleave(self.group_size, dim=1)


class FeedForward(nn.Module):
    def __init__(self, config: LlamaConfig, dtype: torch.dtype, linear: MakeLinear) -> None:
        super().__init__()
        self.w1 = linear(config.dim, config.hidden_dim, dtype)
        self.w2 = linear(config.hidden_dim, config.dim, dtype)
        self.w3 = linear(config.dim, config.hidden_dim, dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.w2(SwiGLU.apply(self.w1(x_TD), self.w3(x_TD)))


class Block(nn.Module):
    """A decoder layer, computed by `run`.

    block_runners.py may replace `run_modules` there.
    """

    def __init__(
        self, config: LlamaConfig, adapted: bool, dtype: torch.dtype, linear: MakeLinear
    ) -> None:
        super().__init__()
        self.run: BlockRunner = run_modules
        self.adapted = adapted
        self.attention = Attention(config, adapted, dtype, linear)
        self.feed_forward = FeedForward(config, dtype, linear)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, dtype)

    def forward(self, x_TD: Tensor, prompt_AD: Tensor | None, context: Context) -> Tensor:
        """[Q, D] for the query rows; where these are not all rows, the others end here."""
        is_frozen_pass = self.adapted and prompt_AD is None
        run = run_modules if is_frozen_pass or context.cache is not None else self.run
        return run(self, x_TD, prompt_AD, context)


BlockRunner = Callable[[Block, Tensor, Tensor | None, Context], Tensor]


def run_modules(block: Block, x_TD: Tensor, prompt_AD: Tensor | None, context: Context) -> Tensor:
    """The block by its modules, for any attention and any query rows."""
    residual_QD = x_TD if context.query_rows_Q is None else x_TD[context.query_rows_Q]
    h_QD = residual_QD + block.attention(block.attention_norm(x_TD), prompt_AD, context)
    return h_QD + block.feed_forward(block.ffn_norm(h_QD))


def _checkpointed(
    layer: nn.Module, x_TD: Tensor, prompt_AD: Tensor | None, context: Context
) -> Tensor:
    """The layer with activation checkpointing: it keeps only its input, and runs again in backward.

    The second run skips the layer's own hooks: under ZeRO-3 backward has gathered the weights by
    then, and the hook after a forward would release them. It runs to its end: the hooks of the
    modules inside must come in pairs.
    """
    calls = itertools.count()

    def run(x_TD: Tensor, prompt_AD: Tensor | None, context: Context) -> Tensor:
        is_first = next(calls) == 0
        return (layer if is_first else layer.forward)(x_TD, prompt_AD, context)

    inputs = (x_TD, prompt_AD, context)
    out: Tensor = checkpoint(
        run, *inputs, use_reentrant=False, preserve_rng_state=False, early_stop=False
    )
    return out


class Llama(nn.Module):
    """Embeddings, blocks, final norm and output head; the top `num_adapted` blocks carry gates.

    `num_checkpointed`: of the lowest layers, how many keep only their input and run again in
    backward. `graphed`: what runs all layers but the last where it can; None: nothing.
    """

    def __init__(
        self,
        config: LlamaConfig,
        num_adapted: int,
        dtype: torch.dtype,
        linear: MakeLinear = FrozenLinear,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.num_adapted = config, dtype, num_adapted
        self.num_checkpointed = 0
        self.graphed: LowerLayers | None = None
        self.tok_embeddings = FrozenEmbedding(config.vocab_size, config.dim, dtype)
        num_plain = config.n_layers - num_adapted
        self.layers = nn.ModuleList(
            Block(config, i >= num_plain, dtype, linear) for i in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.output = OutputHead(config.dim, config.vocab_size, dtype)

    @property
    def blocks(self) -> list[Block]:
        return [block for block in self.layers if isinstance(block, Block)]

    def trunk(
        self, x_TD: Tensor, prompts_GAD: Tensor | None, context: Context, wanted_rows_R: Tensor
    ) -> Tensor:
        """Hidden states [R, D] after the final norm, of the rows `wanted_rows_R`.

        `wanted_rows_R`: host int64, ascending. All layers run, the lower ones without prompt and
        gates; the last one only where its output is wanted. Without prompts no layer is adapted:
        the frozen model.
        """
        num_plain = len(self.layers) - self.num_adapted
        prompts: list[Tensor | None] = [None] * len(self.layers)
        if prompts_GAD is not None:
            # unbind: one gradient for all; that of a slice would be as large as the whole.
            prompts[num_plain:] = prompts_GAD.unbind(0)
        x_TD = self._run_lower_layers(x_TD, prompts[:-1], context)
        last_context = context.restrict_queries(wanted_rows_R)
        last = len(self.layers) - 1
        return self.norm(self._run_layer(last, x_TD, prompts[-1], last_context))

    def _run_lower_layers(
        self, x_TD: Tensor, prompts: Sequence[Tensor | None], context: Context
    ) -> Tensor:
        """All layers but the last: by CUDA graphs where they accept the stream, else one by one."""
        if self.graphed is not None and self.graphed.accepts(x_TD):
            return self.graphed(x_TD, prompts, context)
        for i, prompt_AD in enumerate(prompts):
            x_TD = self._run_layer(i, x_TD, prompt_AD, context)
        return x_TD

    def _run_layer(
        self, index: int, x_TD: Tensor, prompt_AD: Tensor | None, context: Context
    ) -> Tensor:
        layer, context = self.layers[index], context.at_layer(index)
        if index < self.num_checkpointed and torch.is_grad_enabled():
            return _checkpointed(layer, x_TD, prompt_AD, context)
        out: Tensor = layer(x_TD, prompt_AD, context)
        return out
