# mypy: ignore-errors
"""The Triton programs of kernels.py, which says what each computes and starts it. Pointers first, then sizes, then constants.

Rows of a stream are counted in int64: rows times width can pass 2^31 elements.
"""

import triton
import triton.language as tl


@triton.jit
def norm_kernel(x, weight, out, scale, eps, dim: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    value = tl.load(x + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / dim + eps)
    tl.store(scale + row, factor)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    rounded = (value * factor).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * dim + columns, (rounded * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(gradient, x, scale, weight, out, dim: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    factor = tl.load(scale + row)
    x_hat = tl.load(x + row * dim + columns, mask=inside, other=0.0).to(tl.float32) * factor
    g = tl.load(gradient + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    along = tl.sum(g * x_hat, axis=0) / dim
    tl.store(
        out + row * dim + columns,
        ((g - x_hat * along) * factor).to(out.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def swiglu_kernel(a, b, out, count, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    x = tl.load(a + places, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(b + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, (x * tl.sigmoid(x) * y).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(gradient, a, b, da, db, count, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    g = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(a + places, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(b + places, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(x)
    silu = x * sigmoid
    tl.store(
        da + places,
        ((sigmoid + silu * (1.0 - sigmoid)) * g * y).to(da.dtype.element_ty),
        mask=inside,
    )
    tl.store(db + places, (silu * g).to(db.dtype.element_ty), mask=inside)


@triton.jit
def _turned(value, angles, row, sign: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr):
    first, second = tl.split(tl.reshape(value, (HEADS, WIDTH // 2, 2)))
    cosine, sine = tl.split(
        tl.reshape(tl.load(angles + row * WIDTH + tl.arange(0, WIDTH)), (WIDTH // 2, 2))
    )
    cosine, sine = cosine[None, :], sine[None, :] * sign
    return tl.reshape(
        tl.join(first * cosine - second * sine, first * sine + second * cosine), (HEADS, WIDTH)
    )


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
    """x, and in a grid that has a third dimension y, whose strides are the same."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = head < heads
    at, to = row * row_stride + head * head_stride + column, (row * heads + head) * WIDTH + column
    if tl.program_id(2) == 0:
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(
            out_x + to,
            _turned(value, angles, row, sign, WIDTH, HEADS).to(out_x.dtype.element_ty),
            mask=inside,
        )
    else:
        value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(
            out_y + to,
            _turned(value, angles, row, sign, WIDTH, HEADS).to(out_y.dtype.element_ty),
            mask=inside,
        )


@triton.jit
def _widened(
    x, row, extra, out, place, head, heads: tl.constexpr, WIDTH: tl.constexpr, EXTRA: tl.constexpr
):
    """Each head's numbers, and `extra` behind them."""
    column, more = tl.arange(0, WIDTH)[None, :], tl.arange(0, EXTRA)[None, :]
    inside = head < heads
    to = out + (place * heads + head) * (WIDTH + EXTRA)
    tl.store(
        to + column,
        tl.load(x + (row * heads + head) * WIDTH + column, mask=inside, other=0.0),
        mask=inside,
    )
    tl.store(to + WIDTH + more, extra.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def widen_kernel(
    q,
    k,
    v,
    rows,
    after,
    video,
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
    """The grid's third dimension: q with the gates' two parts where its row is behind the video, k with `unit` twice where its
    row is the video's, v with zeros; k and v gathered by `rows`."""
    place = tl.program_id(0).to(tl.int64)
    head_1 = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    head, more = head_1[:, None], tl.arange(0, EXTRA)[None, :]
    nothing = tl.zeros((HEADS, EXTRA), dtype=tl.float32)
    if tl.program_id(2) == 0:
        if place < num_rows:
            gate = tl.load(gates + head_1, mask=head_1 < heads, other=0.0)[:, None] * factor
            high = gate.to(out_q.dtype.element_ty).to(tl.float32)
            extra = tl.where(more == 0, high, tl.where(more == 1, gate - high, 0.0)) * tl.load(
                after + place
            ).to(tl.float32)
            _widened(q, place, nothing + extra, out_q, place, head, heads, WIDTH, EXTRA)
    elif place < num_keys:
        row = tl.load(rows + place)
        if tl.program_id(2) == 1:
            extra = tl.where(more < 2, unit, 0.0) * tl.load(video + row).to(tl.float32)
            _widened(k, row, nothing + extra, out_k, place, head, heads, WIDTH, EXTRA)
        else:
            _widened(v, row, nothing, out_v, place, head, heads, WIDTH, EXTRA)


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
    base_row,
    base_head,
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
    inside = row < rows
    key = tl.arange(0, KEYS)[:, None]
    at, keys = (row * heads + head) * WIDTH + column, (key * heads + head) * WIDTH + column
    k_tile = tl.load(k + keys, mask=key < length, other=0.0)
    v_tile = tl.load(v + keys, mask=key < length, other=0.0)
    q_tile = tl.load(q + at, mask=inside, other=0.0)
    weights = _adapter_weights(q_tile, k_tile, scale, length, KEYS) * tl.load(gates + head)
    value = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
    value += tl.load(base + row * base_row + head * base_head + column, mask=inside, other=0.0).to(
        tl.float32
    )
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def adapter_backward_kernel(
    gradient,
    q,
    k,
    v,
    gates,
    dq,
    parts,
    gate_parts,
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
    inside = row < rows
    key = tl.arange(0, KEYS)[:, None]
    at, keys = (row * heads + head) * WIDTH + column, (key * heads + head) * WIDTH + column
    k_tile = tl.load(k + keys, mask=key < length, other=0.0)
    v_tile = tl.load(v + keys, mask=key < length, other=0.0)
    q_tile = tl.load(q + at, mask=inside, other=0.0)
    g_tile = tl.load(gradient + at, mask=inside, other=0.0)
    gate = tl.load(gates + head)
    weights = _adapter_weights(q_tile, k_tile, scale, length, KEYS)
    along = tl.dot(
        g_tile, tl.trans(v_tile), input_precision="ieee"
    )  # of the softmax's output, before the gate
    mean = tl.sum(weights * along, axis=1)  # 0 for rows past the end, whose gradient is
    tl.store(gate_parts + block * heads + head, tl.sum(mean, axis=0))
    scores = (weights * (along - mean[:, None]) * (gate * scale)).to(q_tile.dtype)
    tl.store(
        dq + at, tl.dot(scores, k_tile, input_precision="ieee").to(dq.dtype.element_ty), mask=inside
    )
    to = parts + ((block * heads + head) * 2 * KEYS + key) * WIDTH + column
    tl.store(to, tl.dot(tl.trans(scores), q_tile, input_precision="ieee"))
    tl.store(
        to + KEYS * WIDTH,
        tl.dot(tl.trans((weights * gate).to(g_tile.dtype)), g_tile, input_precision="ieee"),
    )
