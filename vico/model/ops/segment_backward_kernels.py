# mypy: ignore-errors
"""The gradients of segment_kernels.py, whose docstring has the formulas and the order of sums."""

import triton
import triton.language as tl

from vico.model.ops.segment_kernels import (
    dot,
    listed_keys,
    load_prompt,
    load_rows,
    own_keys,
    prompt_weights,
    store_rows,
    turn_rows,
)


@triton.jit
def _load_gradients(
    gradients,
    rows,
    wanted,
    head,
    heads,
    width: tl.constexpr,
    WIDTH: tl.constexpr,
    AS_FP32: tl.constexpr,
):
    """(g, delta, lse) of a tile of query rows; P is 0 in rows that are not wanted."""
    g, rows_out, log_sums = gradients
    g_tile = load_rows(g, rows, wanted, head, heads, width, WIDTH, AS_FP32)
    rows_tile = load_rows(rows_out, rows, wanted, head, heads, width, WIDTH, AS_FP32)
    sums = tl.load(log_sums + rows * heads + head, mask=wanted, other=float("inf"))
    return g_tile, tl.sum(g_tile.to(tl.float32) * rows_tile.to(tl.float32), axis=1), sums


@triton.jit
def _score_gradients(scores, sums, g_tile, v_tile, delta):
    """(P, dS), in fp32."""
    weights = tl.exp(scores - sums[:, None])
    return weights, weights * (dot(g_tile, tl.trans(v_tile)) - delta[:, None])


@triton.jit
def _key_gradients(
    piece,
    key_head,
    inputs,
    gradients,
    angles,
    visits,
    outputs,
    heads: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    AS_FP32: tl.constexpr,
):
    """dk and dv of a tile of keys, from the visits of one piece."""
    q, k, v, gate2 = inputs
    key_heads: tl.constexpr = heads // group
    keys = tl.load(piece) + tl.arange(0, TILE)
    exists = keys < tl.load(piece + 1)
    k_tile = load_rows(k, keys, exists, key_head, key_heads, width, WIDTH, AS_FP32)
    v_tile = load_rows(v, keys, exists, key_head, key_heads, width, WIDTH, AS_FP32)
    dk_tile = tl.zeros((TILE, WIDTH), dtype=tl.float32)
    dv_tile = tl.zeros((TILE, WIDTH), dtype=tl.float32)
    for head in range(key_head * group, key_head * group + group):
        for visit in range(tl.load(piece + 2), tl.load(piece + 3)):
            rows = tl.load(visits + visit * 3) + tl.arange(0, TILE)
            wanted = rows < tl.load(visits + visit * 3 + 1)
            q_tile = load_rows(q, rows, wanted, head, heads, width, WIDTH, AS_FP32)
            g_tile, delta, sums = _load_gradients(
                gradients, rows, wanted, head, heads, width, WIDTH, AS_FP32
            )
            scores = dot(q_tile, tl.trans(k_tile)) * width**-0.5
            if HAS_GATE:
                scores += tl.load(gate2 + head) * tl.load(visits + visit * 3 + 2)
            # Ancestors' rows come before those of their descendants.
            visible = (keys[None, :] <= rows[:, None]) & exists[None, :]
            scores = tl.where(visible, scores, float("-inf"))
            weights, dscores = _score_gradients(scores, sums, g_tile, v_tile, delta)
            dk_tile += dot(tl.trans(dscores.to(q_tile.dtype)), q_tile)
            dv_tile += dot(tl.trans(weights.to(g_tile.dtype)), g_tile)
    dk, dv, partial = outputs
    dk_tile *= width**-0.5
    if angles is not None:
        dk_tile = turn_rows(dk_tile, angles, keys, exists, -1.0, TILE, width, WIDTH)
    partial_row = tl.load(piece + 4)
    if partial_row < 0:
        store_rows(dk, dk_tile, keys, exists, key_head, key_heads, width, WIDTH)
        store_rows(dv, dv_tile, keys, exists, key_head, key_heads, width, WIDTH)
    else:
        places = 2 * (partial_row + tl.arange(0, TILE))  # [rows, 2, J, d]: dk, dv
        store_rows(partial, dk_tile, places, exists, key_head, key_heads, width, WIDTH)
        store_rows(partial, dv_tile, places + 1, exists, key_head, key_heads, width, WIDTH)


@triton.jit
def _own_gradients(
    table,
    rows,
    wanted,
    head,
    q_tile,
    inputs,
    gradient_tiles,
    tables,
    heads: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    AS_FP32: tl.constexpr,
):
    """(sum_k dS k [TILE, WIDTH], sum of dS over gated pairs) of a query tile."""
    g_tile, delta, sums = gradient_tiles
    list_rows, by_row = tables[1], tables[2]
    own_starts_tile = tl.load(by_row + 2 * rows, mask=wanted, other=0)
    dq_tile = tl.zeros((TILE, WIDTH), dtype=tl.float32)
    gate2_sum = tl.zeros((TILE,), dtype=tl.float32)
    list_stop, after_video = tl.load(table + 4), tl.load(table + 5)
    for first in range(tl.load(table + 3), list_stop, TILE):
        k_tile, v_tile, scores, gated = listed_keys(
            *(q_tile, inputs, (list_rows, by_row), first, list_stop, after_video, head),
            *(heads, group, width, TILE, WIDTH, HAS_GATE, AS_FP32),
        )
        _, dscores = _score_gradients(scores, sums, g_tile, v_tile, delta)
        if HAS_GATE:
            gate2_sum += tl.sum(tl.where(gated[None, :], dscores, 0.0), axis=1)
        dq_tile += dot(dscores.to(k_tile.dtype), k_tile)
    stop = tl.load(table + 1)
    for first in range(tl.load(table + 2), stop, TILE):
        k_tile, v_tile, scores = own_keys(
            *(q_tile, inputs, first, stop, rows, own_starts_tile, head),
            *(heads, group, width, TILE, WIDTH, AS_FP32),
        )
        _, dscores = _score_gradients(scores, sums, g_tile, v_tile, delta)
        dq_tile += dot(dscores.to(k_tile.dtype), k_tile)
    return dq_tile, tl.sum(gate2_sum, axis=0)


@triton.jit
def _query_gradients(
    tile,
    head,
    inputs,
    gradients,
    angles,
    prompt,
    tables,
    outputs,
    heads: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    length: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    AS_FP32: tl.constexpr,
):
    """dq of a tile of query rows, and its part of dgate2."""
    dq, gate2_sums = outputs
    table = tables[0] + tile * 6
    rows = tl.load(table) + tl.arange(0, TILE)
    wanted = rows < tl.load(table + 1)
    q_tile = load_rows(inputs[0], rows, wanted, head, heads, width, WIDTH, AS_FP32)
    gradient_tiles = _load_gradients(gradients, rows, wanted, head, heads, width, WIDTH, AS_FP32)
    dq_tile, gate2_sum = _own_gradients(
        *(table, rows, wanted, head, q_tile, inputs, gradient_tiles, tables),
        *(heads, group, width, TILE, WIDTH, HAS_GATE, AS_FP32),
    )
    if length > 0:
        prompt_k, prompt_v, tanh_gate1 = prompt
        pk_tile, pv_tile = load_prompt(
            prompt_k, prompt_v, head // group, heads // group, length, KEYS, width, WIDTH, AS_FP32
        )
        weights = prompt_weights(q_tile, pk_tile, length, width, KEYS)
        dweights = dot(gradient_tiles[0], tl.trans(pv_tile))
        mean = tl.sum(weights * dweights, axis=1)
        dscores = weights * (dweights - mean[:, None]) * tl.load(tanh_gate1 + head)
        dq_tile += dot(dscores.to(pk_tile.dtype), pk_tile)
    dq_tile *= width**-0.5
    if angles is not None:
        dq_tile = turn_rows(dq_tile, angles, rows, wanted, -1.0, TILE, width, WIDTH)
    store_rows(dq, dq_tile, rows, wanted, head, heads, width, WIDTH)
    if HAS_GATE:
        tl.store(gate2_sums + tile * heads + head, gate2_sum)


@triton.jit
def _prompt_gradients(
    piece,
    key_head,
    q,
    g,
    prompt,
    outputs,
    num_rows,
    heads: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    length: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    PIECE: tl.constexpr,
    AS_FP32: tl.constexpr,
):
    """From PIECE rows: their part of the sums over rows for the prompt and for gate1."""
    prompt_k, prompt_v, tanh_gate1 = prompt
    prompt_sums, gate1_sums = outputs
    key_heads: tl.constexpr = heads // group
    pk_tile, pv_tile = load_prompt(
        prompt_k, prompt_v, key_head, key_heads, length, KEYS, width, WIDTH, AS_FP32
    )
    dk_tile = tl.zeros((KEYS, WIDTH), dtype=tl.float32)
    dv_tile = tl.zeros((KEYS, WIDTH), dtype=tl.float32)
    start = piece.to(tl.int64) * PIECE
    for head in range(key_head * group, key_head * group + group):
        gate = tl.load(tanh_gate1 + head)
        mean_sum = tl.zeros((TILE,), dtype=tl.float32)
        for first in range(start, tl.minimum(start + PIECE, num_rows), TILE):
            rows = first + tl.arange(0, TILE)
            wanted = rows < num_rows
            q_tile = load_rows(q, rows, wanted, head, heads, width, WIDTH, AS_FP32)
            # Zeros for rows past the end, which so add nothing.
            g_tile = load_rows(g, rows, wanted, head, heads, width, WIDTH, AS_FP32)
            weights = prompt_weights(q_tile, pk_tile, length, width, KEYS)
            dweights = dot(g_tile, tl.trans(pv_tile))
            mean = tl.sum(weights * dweights, axis=1)
            mean_sum += mean
            dscores = weights * (dweights - mean[:, None]) * gate
            dk_tile += dot(tl.trans(dscores.to(q_tile.dtype)), q_tile)
            dv_tile += dot(tl.trans((weights * gate).to(g_tile.dtype)), g_tile)
        tl.store(gate1_sums + piece * heads + head, tl.sum(mean_sum, axis=0))
    # [pieces, 2, A, J, d]: all keys of a piece, then all its values.
    key = tl.arange(0, KEYS)
    places = piece.to(tl.int64) * (2 * length) + key
    store_rows(
        prompt_sums, dk_tile * width**-0.5, places, key < length, key_head, key_heads, width, WIDTH
    )
    places += length
    store_rows(prompt_sums, dv_tile, places, key < length, key_head, key_heads, width, WIDTH)


@triton.jit(do_not_specialize=["num_rows", "num_key_pieces", "num_query_tiles"])
def segment_backward_kernel(
    g,
    q,
    k,
    v,
    gate2,
    prompt_k,
    prompt_v,
    tanh_gate1,
    rows_out,
    log_sums,
    angles,
    query_tiles,
    list_rows,
    by_row,
    key_pieces,
    visits,
    dq,
    dk,
    dv,
    partial,
    prompt_sums,
    gate1_sums,
    gate2_sums,
    num_rows,
    num_key_pieces,
    num_query_tiles,
    heads: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    length: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    PIECE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    AS_FP32: tl.constexpr,
):
    """Per head: programs of key pieces, query tiles, prompt; one launch, to share their reads."""
    program, head, inputs = tl.program_id(0), tl.program_id(1), (q, k, v, gate2)
    prompt, gradients = (prompt_k, prompt_v, tanh_gate1), (g, rows_out, log_sums)
    if program < num_key_pieces:
        if head < heads // group:
            _key_gradients(
                *(key_pieces + program * 5, head, inputs, gradients, angles, visits),
                *((dk, dv, partial), heads, group, width, TILE, WIDTH, HAS_GATE, AS_FP32),
            )
    elif program < num_key_pieces + num_query_tiles:
        _query_gradients(
            *(program - num_key_pieces, head, inputs, gradients, angles, prompt),
            *((query_tiles, list_rows, by_row), (dq, gate2_sums), heads, group, width, length),
            *(TILE, WIDTH, KEYS, HAS_GATE, AS_FP32),
        )
    elif length > 0:  # noqa: SIM102  (known at compilation, as the next condition is not)
        if head < heads // group:
            _prompt_gradients(
                *(program - num_key_pieces - num_query_tiles, head, q, g, prompt),
                *((prompt_sums, gate1_sums), num_rows, heads, group, width, length),
                *(TILE, WIDTH, KEYS, PIECE, AS_FP32),
            )
