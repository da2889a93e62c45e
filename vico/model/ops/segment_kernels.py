# mypy: ignore-errors
"""The Triton kernels of segment_ops.py: attention over a stream of segments; the forward kernel.

segment_backward_kernels.py has the gradients.

For a query row i of head h, with s = 1 / sqrt(d) (METHOD section 1; q and k with their rotary
embedding):

    S_ik = s q_i.k_k + gate2_h [the pair is gated]     k: the visible rows
    P_ik = exp(S_ik - lse_i),  lse_i = log sum_k exp S_ik
    rows_i = sum_k P_ik v_k
    out_i = rows_i + tanh(gate1_h) sum_a W_ia pv_a,  W_ia = softmax_a(s q_i.pk_a)

and with the gradient g_i of out_i, delta_i = g_i.rows_i and mean_i = sum_a W_ia (g_i.pv_a):

    dS_ik = P_ik (g_i.v_k - delta_i)
    dU_ia = W_ia (g_i.pv_a - mean_i) tanh(gate1_h)     of the scores U that W is the softmax of
    dq_i = s (sum_k dS_ik k_k + sum_a dU_ia pk_a)
    dk_k = s sum_i dS_ik q_i,  dv_k = sum_i P_ik g_i
    dpk_a = s sum_i dU_ia q_i,  dpv_a = tanh(gate1_h) sum_i W_ia g_i
    dgate2_h = sum of dS_ik over gated pairs,  dgate1_h = (1 - tanh(gate1_h)^2) sum_i mean_i

Shapes: q, out, rows, g, dq are [T, H, d]; k, v, dk, dv [T, J, d]; prompts [A, J, d]; lse [T, H] in
fp32; angles [T, d], the cosine and the sine of each pair, in fp32. The query heads j * H / J up to
(j + 1) * H / J share the key head j. Tables of attention/segment_tiles.py are int64; all tensors
are contiguous.

With angles (they may be None), q comes without its rotary embedding, and the forward kernel writes
it with: a row of q is read by one program forward, but by many backward. k comes with its own, as
many programs read it. dq and dk are turned back before they are written.

No program waits for another or adds to what another has written. Every sum runs in an order that
the tables alone decide, so equal inputs give equal bits: over keys (and over query rows in the sums
for keys) tile by tile in the order of the tables; over the query heads of a group in their order;
over pieces by `segment_sums_kernel` in their order.

Programs go tile by tile through a head, then to the next head: what programs of one head read
again is then in the cache. Products are in the type of q, their sums in fp32. AS_FP32: in fp32,
for Triton's interpreter, which cannot multiply bf16.
"""

import triton
import triton.language as tl

from vico.model.ops.triton_kernels import turn_pairs

# Below every score, and finite: exp(-inf - NOTHING) is 0, and not NaN as with -inf.
NOTHING = tl.constexpr(-1e30)


@triton.jit
def load_rows(
    x, rows, wanted, head, heads, width: tl.constexpr, WIDTH: tl.constexpr, AS_FP32: tl.constexpr
):
    """[rows, WIDTH] of one head; zeros where a row is not wanted, and past the head's width."""
    column = tl.arange(0, WIDTH)[None, :]
    mask = wanted[:, None] & (column < width)
    tile = tl.load(x + (rows[:, None] * heads + head) * width + column, mask=mask, other=0.0)
    if AS_FP32:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_rows(x, tile, rows, wanted, head, heads, width: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)[None, :]
    mask = wanted[:, None] & (column < width)
    target = x + (rows[:, None] * heads + head) * width + column
    tl.store(target, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def turn_rows(
    tile,
    angles,
    rows,
    wanted,
    sign: tl.constexpr,
    TILE: tl.constexpr,
    width: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The rotary embedding of rows of a head, in fp32 (`sign` 1), or its inverse (-1)."""
    angle = load_rows(angles, rows, wanted, 0, 1, width, WIDTH, False)
    return turn_pairs(tile.to(tl.float32), angle, sign, TILE, WIDTH)


@triton.jit
def dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def listed_keys(
    q_tile,
    inputs,
    lists,
    first,
    stop,
    after_video,
    head,
    heads: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    AS_FP32: tl.constexpr,
):
    """(k, v, S, which keys are gated) of a tile of the ancestors' rows, in the list at `first`."""
    _, k, v, gate2 = inputs
    list_rows, by_row = lists
    index = first + tl.arange(0, TILE)
    exists = index < stop
    keys = tl.load(list_rows + index, mask=exists, other=0)
    k_tile = load_rows(k, keys, exists, head // group, heads // group, width, WIDTH, AS_FP32)
    v_tile = load_rows(v, keys, exists, head // group, heads // group, width, WIDTH, AS_FP32)
    scores = dot(q_tile, tl.trans(k_tile)) * width**-0.5
    gated = exists & (tl.load(by_row + 2 * keys + 1) * after_video > 0)
    if HAS_GATE:
        scores += tl.where(gated, tl.load(gate2 + head), 0.0)[None, :]
    return k_tile, v_tile, tl.where(exists[None, :], scores, float("-inf")), gated


@triton.jit
def own_keys(
    q_tile,
    inputs,
    first,
    stop,
    rows,
    own_starts_tile,
    head,
    heads: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    AS_FP32: tl.constexpr,
):
    """(k, v, S) of a tile of the rows from `first`, of which each row sees its own segment's."""
    _, k, v, _ = inputs
    keys = first + tl.arange(0, TILE)
    exists = keys < stop
    k_tile = load_rows(k, keys, exists, head // group, heads // group, width, WIDTH, AS_FP32)
    v_tile = load_rows(v, keys, exists, head // group, heads // group, width, WIDTH, AS_FP32)
    scores = dot(q_tile, tl.trans(k_tile)) * width**-0.5
    visible = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= own_starts_tile[:, None])
    return k_tile, v_tile, tl.where(visible, scores, float("-inf"))


@triton.jit
def load_prompt(
    k,
    v,
    head,
    heads,
    length: tl.constexpr,
    KEYS: tl.constexpr,
    width: tl.constexpr,
    WIDTH: tl.constexpr,
    AS_FP32: tl.constexpr,
):
    key = tl.arange(0, KEYS)
    k_tile = load_rows(k, key, key < length, head, heads, width, WIDTH, AS_FP32)
    return k_tile, load_rows(v, key, key < length, head, heads, width, WIDTH, AS_FP32)


@triton.jit
def prompt_weights(q_tile, k_tile, length: tl.constexpr, width: tl.constexpr, KEYS: tl.constexpr):
    scores = dot(q_tile, tl.trans(k_tile)) * width**-0.5
    scores = tl.where(tl.arange(0, KEYS)[None, :] < length, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _add_keys(total, largest, norm, scores, v_tile):
    """The online softmax: a tile of keys more."""
    new_largest = tl.maximum(largest, tl.max(scores, axis=1))
    shrink = tl.exp(largest - new_largest)
    weights = tl.exp(scores - new_largest[:, None])
    norm = norm * shrink + tl.sum(weights, axis=1)
    total = total * shrink[:, None] + dot(weights.to(v_tile.dtype), v_tile)
    return total, new_largest, norm


@triton.jit
def _attend_keys(
    q_tile,
    inputs,
    lists,
    table,
    rows,
    own_starts_tile,
    head,
    heads: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    AS_FP32: tl.constexpr,
):
    """(sum of weights times values, largest score, sum of weights) of a query tile."""
    stop, list_stop, after_video = tl.load(table + 1), tl.load(table + 4), tl.load(table + 5)
    total = tl.zeros((TILE, WIDTH), dtype=tl.float32)
    largest = tl.zeros((TILE,), dtype=tl.float32) + NOTHING
    norm = tl.zeros((TILE,), dtype=tl.float32)
    for first in range(tl.load(table + 3), list_stop, TILE):
        _, v_tile, scores, _ = listed_keys(
            *(q_tile, inputs, lists, first, list_stop, after_video, head),
            *(heads, group, width, TILE, WIDTH, HAS_GATE, AS_FP32),
        )
        total, largest, norm = _add_keys(total, largest, norm, scores, v_tile)
    for first in range(tl.load(table + 2), stop, TILE):
        _, v_tile, scores = own_keys(
            *(q_tile, inputs, first, stop, rows, own_starts_tile, head),
            *(heads, group, width, TILE, WIDTH, AS_FP32),
        )
        total, largest, norm = _add_keys(total, largest, norm, scores, v_tile)
    return total, largest, norm


@triton.jit
def segment_forward_kernel(
    q,
    k,
    v,
    gate2,
    prompt_k,
    prompt_v,
    tanh_gate1,
    angles,
    query_tiles,
    list_rows,
    by_row,
    out,
    turned_q,
    rows_out,
    log_sums,
    heads: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    length: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SAVES: tl.constexpr,
    AS_FP32: tl.constexpr,
):
    """A program per query tile and head."""
    head, table = tl.program_id(1), query_tiles + tl.program_id(0) * 6
    rows = tl.load(table) + tl.arange(0, TILE)
    wanted = rows < tl.load(table + 1)
    own_starts_tile = tl.load(by_row + 2 * rows, mask=wanted, other=0)
    q_tile = load_rows(q, rows, wanted, head, heads, width, WIDTH, AS_FP32)
    if angles is not None:
        q_tile = turn_rows(q_tile, angles, rows, wanted, 1.0, TILE, width, WIDTH)
        q_tile = q_tile.to(q.dtype.element_ty)
        if SAVES:
            store_rows(turned_q, q_tile, rows, wanted, head, heads, width, WIDTH)
        if AS_FP32:
            q_tile = q_tile.to(tl.float32)
    total, largest, norm = _attend_keys(
        *(q_tile, (q, k, v, gate2), (list_rows, by_row), table, rows, own_starts_tile),
        *(head, heads, group, width, TILE, WIDTH, HAS_GATE, AS_FP32),
    )
    norm = tl.where(wanted, norm, 1.0)
    total /= norm[:, None]
    if SAVES:
        tl.store(log_sums + rows * heads + head, largest + tl.log(norm), mask=wanted)
    if length > 0:
        if SAVES:
            store_rows(rows_out, total, rows, wanted, head, heads, width, WIDTH)
        pk_tile, pv_tile = load_prompt(
            prompt_k, prompt_v, head // group, heads // group, length, KEYS, width, WIDTH, AS_FP32
        )
        weights = prompt_weights(q_tile, pk_tile, length, width, KEYS)
        weights *= tl.load(tanh_gate1 + head)
        total += dot(weights.to(pv_tile.dtype), pv_tile)
    store_rows(out, total, rows, wanted, head, heads, width, WIDTH)


@triton.jit
def _sum_pieces(
    sums, first, count, step, places, wanted, head, heads, width: tl.constexpr, WIDTH: tl.constexpr
):
    """sum_i sums[first + i * step + places], in the order of i."""
    total = load_rows(sums, first + places, wanted, head, heads, width, WIDTH, False)
    for i in range(1, count):
        total += load_rows(
            sums, first + i * step + places, wanted, head, heads, width, WIDTH, False
        )
    return total


@triton.jit
def _sum_column(sums, count, head, heads, TILE: tl.constexpr):
    total = tl.zeros((TILE,), dtype=tl.float32)
    for first in range(0, count, TILE):
        index = first + tl.arange(0, TILE)
        total += tl.load(sums + index * heads + head, mask=index < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _sum_shared_keys(
    table,
    partial,
    which,
    out,
    head,
    heads,
    width: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dk (`which` is 0) or dv (1) of a tile of keys that has several pieces."""
    start, stop = tl.load(table), tl.load(table + 1)
    first, count = tl.load(table + 2), tl.load(table + 3)
    places = tl.arange(0, TILE)
    wanted = start + places < stop
    first, step = 2 * first + which, 2 * (stop - start)
    total = _sum_pieces(partial, first, count, step, 2 * places, wanted, head, heads, width, WIDTH)
    store_rows(out, total, start + places, wanted, head, heads, width, WIDTH)


@triton.jit
def _sum_prompt(
    sums,
    first,
    num_pieces,
    out,
    head,
    heads,
    length: tl.constexpr,
    width: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The gradient of the prompt's keys (`first` is 0) or values (`length`)."""
    key = tl.arange(0, KEYS)
    is_key, step = key < length, 2 * length
    total = _sum_pieces(sums, first, num_pieces, step, key, is_key, head, heads, width, WIDTH)
    store_rows(out, total, key, is_key, head, heads, width, WIDTH)


@triton.jit(do_not_specialize=["num_shared_tiles", "num_prompt_pieces", "num_query_tiles"])
def segment_sums_kernel(
    partial,
    prompt_sums,
    gate1_sums,
    gate2_sums,
    tanh_gate1,
    shared_tiles,
    dk,
    dv,
    dprompt_k,
    dprompt_v,
    dgate1,
    dgate2,
    num_shared_tiles,
    num_prompt_pieces,
    num_query_tiles,
    heads: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    length: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    """Per head: a program for each key tile in several pieces, and one for prompt and gates."""
    program, head = tl.program_id(0), tl.program_id(1)
    key_heads: tl.constexpr = heads // group
    if program < num_shared_tiles:
        if head < key_heads:
            table = shared_tiles + program * 4
            _sum_shared_keys(table, partial, 0, dk, head, key_heads, width, TILE, WIDTH)
            _sum_shared_keys(table, partial, 1, dv, head, key_heads, width, TILE, WIDTH)
    else:
        if HAS_GATE:
            tl.store(dgate2 + head, _sum_column(gate2_sums, num_query_tiles, head, heads, TILE))
        if length > 0:
            gate = tl.load(tanh_gate1 + head)
            total = _sum_column(gate1_sums, num_prompt_pieces, head, heads, TILE)
            tl.store(dgate1 + head, total * (1.0 - gate * gate))
            if head < key_heads:
                _sum_prompt(
                    *(prompt_sums, 0, num_prompt_pieces, dprompt_k, head, key_heads),
                    *(length, width, WIDTH, KEYS),
                )
                _sum_prompt(
                    *(prompt_sums, length, num_prompt_pieces, dprompt_v, head, key_heads),
                    *(length, width, WIDTH, KEYS),
                )
