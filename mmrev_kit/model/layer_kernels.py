"""`layer_lines` as Triton kernels, for 16-bit numbers on GPUs of compute capability 8.0 or later.

Imported only where kernels can be made. A kernel's pointers come first, then its sizes, then what it is compiled for.
"""

import torch
import triton
import triton.language as tl

from mmrev_kit.model.layer_lines import draw as draw_by_line
from mmrev_kit.model.layer_lines import threshold

BLOCK = 64  # weights per constant of NF4
CONSTANTS = 256  # constants per constant of the double quantization


def cdiv(count: int, size: int) -> int:
    """Rounded up; this and the next are Triton's own, whose calls take ten times as long."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    return 1 << (count - 1).bit_length()


@triton.jit(do_not_specialize=["seed", "words"])
def draw_kernel(out, seed, words, threshold, BITS: tl.constexpr, SIZE: tl.constexpr):
    """A draw of 128 bits decides eight masks of a number each: 8 / BITS bytes of `out`, one word of it."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    first, second, third, fourth = tl.randint4x(seed, place)
    word = tl.zeros((SIZE,), tl.int64)
    for lane in tl.static_range(8):
        draws = first
        if lane // 2 == 1:
            draws = second
        if lane // 2 == 2:
            draws = third
        if lane // 2 == 3:
            draws = fourth
        keep = ((draws >> (16 * (lane % 2))) & 0xFFFF) >= threshold
        word |= keep.to(tl.int64) << (8 * (lane // BITS) + lane % BITS)
    tl.store(out + place, word.to(out.dtype.element_ty), place < words)


def draw(seed: int, rows: int, width: int, count: int, p: float, device):
    bits = next_power_of_2(count)
    if bits > 4 or rows * width % 8:
        return draw_by_line(seed, rows, width, count, p, device)
    found = torch.empty(rows, width, dtype=torch.uint8, device=device)
    words = found.view(-1).view({1: torch.int64, 2: torch.int32, 4: torch.int16}[bits])
    draw_kernel[(cdiv(len(words), 1024),)](words, seed, len(words), threshold(p), BITS=bits, SIZE=1024)
    return found


@triton.jit(do_not_specialize=["blocks", "rows", "column"])
def dequantize_kernel(
    codes, table, constants, outer_table, outer, offset, up, out, blocks, blocks_a_row, stride, rows, scaling, column,
    extra, NESTED: tl.constexpr, RANK: tl.constexpr, EXTRA: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    CONSTANTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of weights; the last programs fill the `extra` columns behind ROWS rows each."""
    program, of_weights = tl.program_id(0), tl.cdiv(blocks, BLOCKS)
    if program < of_weights:
        block = program * BLOCKS + tl.arange(0, BLOCKS)
        here = block < blocks
        if NESTED:  # product and sum are rounded apart, as in bitsandbytes: compiled without fused multiply-add
            scale = tl.load(outer_table + tl.load(constants + block, here, 0).to(tl.int32))
            scale = scale * tl.load(outer + block // CONSTANTS, here, 0.0) + tl.load(offset)
        else:
            scale = tl.load(constants + block, here, 0.0)
        place = block.to(tl.int64)[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        pair = tl.load(codes + place, here[:, None], 0).to(tl.int32)
        high = (tl.load(table + (pair >> 4)) * scale[:, None]).to(out.dtype.element_ty)
        low = (tl.load(table + (pair & 15)) * scale[:, None]).to(out.dtype.element_ty)
        line = block // blocks_a_row
        begin = line.to(tl.int64) * stride + (block - line * blocks_a_row) * BLOCK
        tl.store(out + begin[:, None] + tl.arange(0, BLOCK)[None, :], tl.interleave(high, low), here[:, None])
    else:
        row = ((program - of_weights) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        behind = tl.arange(0, EXTRA)[None, :]
        own = (row < rows) & (behind >= column) & (behind < column + RANK)
        value = scaling * tl.load(up + row * RANK + behind - column, own, 0.0)
        inside = (row < rows) & (behind < extra)
        tl.store(out + row * stride + blocks_a_row * BLOCK + behind, value.to(out.dtype.element_ty), inside)


def dequantize(layer, out, up, scaling: float, column: int) -> None:
    weight = layer.weight
    state, (rows, width), inputs = weight.quant_state, out.shape, layer.in_features
    extra, nested = width - inputs, state.nested
    blocks, a_row = cdiv(rows * inputs, BLOCK), inputs // BLOCK
    outer = (state.state2.code, state.state2.absmax, state.offset) if nested else (state.code,) * 3
    ends = cdiv(rows, 64) if extra else 0
    dequantize_kernel[(cdiv(blocks, 64) + ends,)](
        weight, state.code, state.absmax, *outer, state.code if up is None else up, out, blocks, a_row, out.stride(0),
        rows, scaling, column, extra, NESTED=nested, RANK=0 if up is None else up.shape[1],
        EXTRA=next_power_of_2(max(extra, 1)), BLOCKS=64, BLOCK=BLOCK, CONSTANTS=CONSTANTS, ROWS=64,
        enable_fp_fusion=False,
    )  # fmt: skip


def stages(rank: int) -> int:
    """Parts of a long sum that are in shared memory at once: at rank 256, too, in the 99 KiB that every card has."""
    return 4 if rank <= 64 else 2


@triton.jit(do_not_specialize=["count"])
def lora_down_kernel(
    rows, mask, down, out, low, count, inputs, rows_stride, out_stride, rank, extra, factor,
    MASKED: tl.constexpr, COPY: tl.constexpr, J: tl.constexpr, RANK: tl.constexpr, EXTRA: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    number = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, inputs, STEP):
        column = start + tl.arange(0, STEP)
        here = (row < count) & (column < inputs)[None, :]
        value = tl.load(rows + row * rows_stride + column[None, :], here, 0.0)
        if COPY:
            if j == 0:
                tl.store(out + row * out_stride + column[None, :], value, here)
        if MASKED:
            bits = tl.load(mask + row * inputs + column[None, :], here, 0).to(tl.int32)
            value = tl.where(((bits >> j) & 1) != 0, value, 0.0)
        inner = (number < rank)[None, :] & (column < inputs)[:, None]
        part = tl.load(down + (j * rank + number)[None, :] * inputs + column[:, None], inner, 0.0)
        total = tl.dot(value, part, total)
    total = (total * factor).to(out.dtype.element_ty)
    here = (row < count) & (number < rank)[None, :]
    tl.store(out + row * out_stride + inputs + (j * rank + number)[None, :], total, here)
    tl.store(low + row * (J * rank) + (j * rank + number)[None, :], total, here)
    if j == J - 1:
        behind = tl.arange(0, EXTRA)[None, :]
        zero = tl.zeros((ROWS, EXTRA), out.dtype.element_ty)
        tl.store(
            out + row * out_stride + inputs + behind, zero, (row < count) & (behind >= J * rank) & (behind < extra)
        )


def lora_down(group, rows, mask, down, factor: float, out):
    count, extra, j = len(rows), out.shape[1] - group.inputs, len(group.starts)
    low = torch.empty(count, len(down), dtype=out.dtype, device=out.device)
    lora_down_kernel[(cdiv(count, 32), j)](
        rows, down if mask is None else mask, down, out, low, count, group.inputs, rows.stride(0), out.stride(0),
        group.rank, extra, factor, MASKED=mask is not None, COPY=rows.data_ptr() != out.data_ptr(), J=j,
        RANK=max(16, next_power_of_2(group.rank)), EXTRA=next_power_of_2(extra), ROWS=32, STEP=128,
        num_stages=stages(group.rank),
    )  # fmt: skip
    return low


@triton.jit(do_not_specialize=["count"])
def lora_up_kernel(
    gradient, mask, down, out, count, inputs, stride, rank, factor,
    MASKED: tl.constexpr, J: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column, number = tl.program_id(1) * SIZE + tl.arange(0, SIZE)[None, :], tl.arange(0, RANK)
    here = (row < count) & (column < inputs)
    total = tl.load(gradient + row * stride + column, here, 0.0).to(tl.float32)
    if MASKED:
        bits = tl.load(mask + row * inputs + column, here, 0).to(tl.int32)
    for j in tl.static_range(J):
        own = (row < count) & (number < rank)[None, :]
        left = tl.load(gradient + row * stride + inputs + (j * rank + number)[None, :], own, 0.0)
        inner = (number < rank)[:, None] & (column < inputs)
        part = tl.dot(left, tl.load(down + (j * rank + number)[:, None] * inputs + column, inner, 0.0)) * factor
        if MASKED:
            part = tl.where(((bits >> j) & 1) != 0, part, 0.0)
        total += part
    tl.store(out + row * inputs + column, total.to(out.dtype.element_ty), here)


def lora_up(group, gradient, mask, down, factor: float):
    out = torch.empty(len(gradient), group.inputs, dtype=gradient.dtype, device=gradient.device)
    lora_up_kernel[(cdiv(len(out), 64), cdiv(group.inputs, 64))](
        gradient, down if mask is None else mask, down, out, len(out), group.inputs, gradient.stride(0), group.rank,
        factor, MASKED=mask is not None, J=len(group.starts), RANK=max(16, next_power_of_2(group.rank)), ROWS=64,
        SIZE=64,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["count", "first", "second"])
def thin_kernel(
    thin, wide, mask, out, count, width, thin_stride, wide_stride, row_stride, column_stride, rank, first, second,
    factor, MASKED: tl.constexpr, EACH: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """thin' (J r, n) x wide (n, width), r rows of it: with EACH, of all J, and `out` is (J r, width); else of the one
    to whose part of the width a column belongs, parts end at `first` and `second`, and `out` is (r, width)."""
    column, number = tl.program_id(0) * SIZE + tl.arange(0, SIZE), tl.arange(0, RANK)
    begin = tl.program_id(0) * SIZE
    j = tl.program_id(1) if EACH else (begin >= first).to(tl.int32) + (begin >= second).to(tl.int32)
    total = tl.zeros((RANK, SIZE), tl.float32)
    for start in range(0, count, STEP):
        row = (start + tl.arange(0, STEP)).to(tl.int64)
        left = tl.load(
            thin + row[None, :] * thin_stride + (j * rank + number)[:, None],
            (row < count)[None, :] & (number < rank)[:, None], 0.0,
        )  # fmt: skip
        here = (row < count)[:, None] & (column < width)[None, :]
        right = tl.load(wide + row[:, None] * wide_stride + column[None, :], here, 0.0)
        if MASKED:
            bits = tl.load(mask + row[:, None] * width + column[None, :], here, 0).to(tl.int32)
            right = tl.where(((bits >> j) & 1) != 0, right, 0.0)
        total = tl.dot(left, right, total)
    place = number + (j * rank if EACH else 0)
    here = (number < rank)[:, None] & (column < width)[None, :]
    tl.store(out + place[:, None] * row_stride + column[None, :] * column_stride, total * factor, here)


def lora_gradients(group, gradient, rows, mask, factor: float, of_out, low):
    rank, j, outputs = group.rank, len(group.starts), of_out.shape[1]
    of_down = torch.empty(j * rank, group.inputs, device=rows.device)
    of_up = torch.empty(outputs, rank, device=rows.device)
    ends = [*group.starts[1:], outputs, outputs]
    own = {"RANK": max(16, next_power_of_2(rank)), "SIZE": 32, "STEP": 64, "num_stages": stages(rank)}
    thin_kernel[(cdiv(group.inputs, 32), j)](
        gradient[:, group.inputs :], rows, rows if mask is None else mask, of_down, len(rows), group.inputs,
        gradient.stride(0), rows.stride(0), group.inputs, 1, rank, 0, 0, factor, MASKED=mask is not None, EACH=True,
        **own,
    )  # fmt: skip
    thin_kernel[(cdiv(outputs, 32), 1)](
        low, of_out, of_out, of_up, len(rows), outputs, low.stride(0), of_out.stride(0), 1, rank, rank, ends[0],
        ends[1], group.scaling, MASKED=False, EACH=False, **own,
    )  # fmt: skip
    return of_down, of_up


@triton.jit
def norm_kernel(rows, added, weight, summed, out, width, stride, eps, ADD: tl.constexpr, SIZE: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    here = column < width
    value = tl.load(rows + row * width + column, here, 0.0)
    if ADD:
        value += tl.load(added + row * width + column, here, 0.0).to(tl.float32)
        tl.store(summed + row * width + column, value, here)
    scale = tl.rsqrt(tl.sum(value * value) / width + eps)
    value = value * scale * tl.load(weight + column, here, 0.0).to(tl.float32)
    tl.store(out + row * stride + column, value.to(out.dtype.element_ty), here)


def warps(size: int) -> int:
    return min(16, max(4, size // 512))


def norm(rows, added, weight, eps: float, out):
    count, width = rows.shape
    summed, size = rows if added is None else torch.empty_like(rows), next_power_of_2(width)
    norm_kernel[(count,)](
        rows, rows if added is None else added, weight, summed, out, width, out.stride(0), eps,
        ADD=added is not None, SIZE=size, num_warps=warps(size),
    )  # fmt: skip
    return summed


@triton.jit
def norm_backward_kernel(gradient, rows, weight, stream, out, half, width, stride, eps, SIZE: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    here, place = column < width, row * width + column
    value = tl.load(rows + place, here, 0.0)
    scale = tl.rsqrt(tl.sum(value * value) / width + eps)
    value *= scale
    weighted = tl.load(gradient + row * stride + column, here, 0.0).to(tl.float32)
    weighted *= tl.load(weight + column, here, 0.0).to(tl.float32)
    own = scale * (weighted - value * (tl.sum(weighted * value) / width))
    own += tl.load(stream + place, here, 0.0)
    tl.store(out + place, own, here)
    tl.store(half + place, own.to(half.dtype.element_ty), here)


def norm_backward(gradient, rows, weight, eps: float, stream, dtype):
    count, width = rows.shape
    out, half, size = torch.empty_like(rows), torch.empty_like(rows, dtype=dtype), next_power_of_2(width)
    norm_backward_kernel[(count,)](
        gradient, rows, weight, stream, out, half, width, gradient.stride(0), eps, SIZE=size, num_warps=warps(size)
    )
    return out, half


@triton.jit
def gate_kernel(joined, out, half, stride, SIZE: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    here, place = column < half, joined + row * (2 * half) + column
    first = tl.load(place, here, 0.0).to(tl.float32)
    second = tl.load(place + half, here, 0.0).to(tl.float32)
    tl.store(out + row * stride + column, (first * tl.sigmoid(first) * second).to(out.dtype.element_ty), here)


def gate(joined, out) -> None:
    count, half = len(joined), joined.shape[1] // 2
    gate_kernel[(count, cdiv(half, 2048))](joined, out, half, out.stride(0), SIZE=2048)


@triton.jit
def gate_backward_kernel(gradient, joined, half, stride, SIZE: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    here, place = column < half, joined + row * (2 * half) + column
    first = tl.load(place, here, 0.0).to(tl.float32)
    second = tl.load(place + half, here, 0.0).to(tl.float32)
    given = tl.load(gradient + row * stride + column, here, 0.0).to(tl.float32)
    share = tl.sigmoid(first)
    of_first = given * second * share * (1 + first * (1 - share))
    tl.store(place, of_first.to(joined.dtype.element_ty), here)
    tl.store(place + half, (given * first * share).to(joined.dtype.element_ty), here)


def gate_backward(gradient, joined) -> None:
    count, half = len(joined), joined.shape[1] // 2
    gate_backward_kernel[(count, cdiv(half, 2048))](gradient, joined, half, gradient.stride(0), SIZE=2048)
