# mypy: ignore-errors
"""The Triton kernels of triton_ops.py, which says what each computes and launches it.

Arguments are pointers first, then sizes, then constants. Rows of a stream are counted in int64:
rows times width can pass 2^31 elements.
"""

import triton
import triton.language as tl


@triton.jit
def norm_kernel(x, weight, out, scale, eps, dim: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    value = tl.load(x + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / dim + eps)
    tl.store(scale + row, factor)
    w = tl.load(weight + columns, mask=mask).to(tl.float32)
    rounded = (value * factor).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * dim + columns, (rounded * w).to(out.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward_kernel(
    gradient, x, scale, weight, residual, out, dim: tl.constexpr, BLOCK: tl.constexpr
):
    """`residual` may be None."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    factor = tl.load(scale + row)
    x_hat = tl.load(x + row * dim + columns, mask=mask, other=0.0).to(tl.float32) * factor
    g = tl.load(gradient + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
    g *= tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    along = tl.sum(g * x_hat, axis=0) / dim
    result = (g - x_hat * along) * factor
    if residual is not None:
        result += tl.load(residual + row * dim + columns, mask=mask).to(tl.float32)
    tl.store(out + row * dim + columns, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_kernel(a, b, out, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    x = tl.load(a + offsets, mask=mask).to(tl.float32)
    y = tl.load(b + offsets, mask=mask).to(tl.float32)
    tl.store(out + offsets, (x * tl.sigmoid(x) * y).to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(gradient, a, b, da, db, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    g = tl.load(gradient + offsets, mask=mask).to(tl.float32)
    x = tl.load(a + offsets, mask=mask).to(tl.float32)
    y = tl.load(b + offsets, mask=mask).to(tl.float32)
    sigmoid = tl.sigmoid(x)
    silu = x * sigmoid
    dx = (sigmoid + silu * (1.0 - sigmoid)) * g * y
    tl.store(da + offsets, dx.to(da.dtype.element_ty), mask=mask)
    tl.store(db + offsets, (silu * g).to(db.dtype.element_ty), mask=mask)


@triton.jit
def turn_pairs(value, angle, sign: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Neighbours in a row of `value` [ROWS, WIDTH] turned; `angle` [ROWS or 1, WIDTH]: as value.

    (cosine, sine) are neighbours there.
    """
    first, second = tl.split(tl.reshape(value, (ROWS, WIDTH // 2, 2)))
    cosine, sine = tl.split(tl.reshape(angle, (angle.shape[0], WIDTH // 2, 2)))
    sine *= sign
    pairs = tl.join(first * cosine - second * sine, first * sine + second * cosine)
    return tl.reshape(pairs, (ROWS, WIDTH))


@triton.jit
def _rotated(value, angles, row, sign: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr):
    angle = tl.load(angles + row * WIDTH + tl.arange(0, WIDTH))[None, :]
    return turn_pairs(value, angle, sign, HEADS, WIDTH)


@triton.jit
def rotate_kernel(
    x,
    y,
    angles,
    out_x,
    out_y,
    row_stride,
    head_stride,
    sign: tl.constexpr,
    heads: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
):
    """x, and in a grid with a third dimension also y, which has the same strides."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mask = head < heads
    source = row * row_stride + head * head_stride + column
    target = (row * heads + head) * WIDTH + column
    if tl.program_id(2) == 0:
        value = tl.load(x + source, mask=mask).to(tl.float32)
        result = _rotated(value, angles, row, sign, WIDTH, HEADS)
        tl.store(out_x + target, result.to(out_x.dtype.element_ty), mask=mask)
    else:
        value = tl.load(y + source, mask=mask).to(tl.float32)
        result = _rotated(value, angles, row, sign, WIDTH, HEADS)
        tl.store(out_y + target, result.to(out_y.dtype.element_ty), mask=mask)


@triton.jit
def _store_widened(
    x, row, extra, out, out_row, head, heads: tl.constexpr, WIDTH: tl.constexpr, EXTRA: tl.constexpr
):
    """Each head's numbers, and `extra` after them."""
    column, extra_column = tl.arange(0, WIDTH)[None, :], tl.arange(0, EXTRA)[None, :]
    mask = head < heads
    source = x + (row * heads + head) * WIDTH + column
    target = out + (out_row * heads + head) * (WIDTH + EXTRA)
    tl.store(target + column, tl.load(source, mask=mask), mask=mask)
    tl.store(target + WIDTH + extra_column, extra.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def widen_kernel(
    q,
    k,
    v,
    rows,
    after_video,
    is_video,
    gates,
    out_q,
    out_k,
    out_v,
    num_rows,
    num_keys,
    factor,
    unit,
    heads: tl.constexpr,
    WIDTH: tl.constexpr,
    EXTRA: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The grid's third dimension is q, k, v; k and v are gathered by `rows`.

    q gets the gates' two parts where its row is after the video, k gets `unit` twice where its row
    is the video's, and v gets zeros.
    """
    place = tl.program_id(0).to(tl.int64)
    head_1 = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    head, column = head_1[:, None], tl.arange(0, EXTRA)[None, :]
    zeros = tl.zeros((HEADS, EXTRA), dtype=tl.float32)
    if tl.program_id(2) == 0:
        if place < num_rows:
            gate = tl.load(gates + head_1, mask=head_1 < heads, other=0.0)[:, None] * factor
            high = gate.to(out_q.dtype.element_ty).to(tl.float32)
            parts = tl.where(column == 0, high, tl.where(column == 1, gate - high, 0.0))
            extra = parts * tl.load(after_video + place).to(tl.float32)
            _store_widened(q, place, zeros + extra, out_q, place, head, heads, WIDTH, EXTRA)
    elif place < num_keys:
        row = tl.load(rows + place)
        if tl.program_id(2) == 1:
            extra = tl.where(column < 2, unit, 0.0) * tl.load(is_video + row).to(tl.float32)
            _store_widened(k, row, zeros + extra, out_k, place, head, heads, WIDTH, EXTRA)
        else:
            _store_widened(v, row, zeros, out_v, place, head, heads, WIDTH, EXTRA)


@triton.jit
def _adapter_weights(q, k, scale, length: tl.constexpr, KEYS: tl.constexpr):
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(tl.arange(0, KEYS)[None, :] < length, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit(do_not_specialize=["rows"])
def adapter_kernel(
    base,
    q,
    k,
    v,
    gates,
    out,
    rows,
    base_row_stride,
    base_head_stride,
    scale,
    heads: tl.constexpr,
    length: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mask = row < rows
    key = tl.arange(0, KEYS)[:, None]
    q_offsets, k_offsets = (
        (row * heads + head) * WIDTH + column,
        (key * heads + head) * WIDTH + column,
    )
    k_tile = tl.load(k + k_offsets, mask=key < length, other=0.0)
    v_tile = tl.load(v + k_offsets, mask=key < length, other=0.0)
    q_tile = tl.load(q + q_offsets, mask=mask, other=0.0)
    weights = _adapter_weights(q_tile, k_tile, scale, length, KEYS) * tl.load(gates + head)
    value = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
    base_offsets = row * base_row_stride + head * base_head_stride + column
    value += tl.load(base + base_offsets, mask=mask).to(tl.float32)
    tl.store(out + q_offsets, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def adapter_backward_kernel(
    gradient,
    q,
    k,
    v,
    gates,
    dq,
    kv_sums,
    gate_sums,
    rows,
    scale,
    heads: tl.constexpr,
    length: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    block, head = tl.program_id(0), tl.program_id(1)
    row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mask = row < rows
    key = tl.arange(0, KEYS)[:, None]
    q_offsets, k_offsets = (
        (row * heads + head) * WIDTH + column,
        (key * heads + head) * WIDTH + column,
    )
    k_tile = tl.load(k + k_offsets, mask=key < length, other=0.0)
    v_tile = tl.load(v + k_offsets, mask=key < length, other=0.0)
    q_tile = tl.load(q + q_offsets, mask=mask, other=0.0)
    g_tile = tl.load(gradient + q_offsets, mask=mask, other=0.0)
    gate = tl.load(gates + head)
    weights = _adapter_weights(q_tile, k_tile, scale, length, KEYS)
    # The gradient with respect to the softmax's weights, before the gate; 0 for rows past the end.
    dweights = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
    mean = tl.sum(weights * dweights, axis=1)
    tl.store(gate_sums + block * heads + head, tl.sum(mean, axis=0))
    dscores = (weights * (dweights - mean[:, None]) * (gate * scale)).to(q_tile.dtype)
    dq_tile = tl.dot(dscores, k_tile, input_precision="ieee")
    tl.store(dq + q_offsets, dq_tile.to(dq.dtype.element_ty), mask=mask)
    target = kv_sums + ((block * heads + head) * 2 * KEYS + key) * WIDTH + column
    tl.store(target, tl.dot(tl.trans(dscores), q_tile, input_precision="ieee"))
    gated = (weights * gate).to(g_tile.dtype)
    dv_tile = tl.dot(tl.trans(gated), g_tile, input_precision="ieee")
    tl.store(target + KEYS * WIDTH, dv_tile)
