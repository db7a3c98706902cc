"""Attention of `layer_lines` as Triton kernels: rotary positions with their norms, and causal attention with a mask.

Attention is FlashAttention-2 (Dao, 2023): scores are made block by block and again in the backward pass. A mask is
read as bits, and blocks of 64 x 64 that it leaves empty are not computed: of packed sequences most.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from mmrev_kit.model.layer_kernels import cdiv

LOG2E = math.log2(math.e)
BLOCK = 64  # tokens: a row of a block of a mask is a word
HEADS = 16  # of a token, that one program rotates


@triton.jit
def rotate_kernel(
    joined, query, key, of_query, of_key, cosine, sine, heads, key_heads, angle_stride, eps,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, place = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    is_query, here = head < heads, head < heads + key_heads
    begin = joined + (row * (heads + 2 * key_heads) + head) * (2 * HALF) + place
    left = tl.load(begin, here, 0.0).to(tl.float32)
    right = tl.load(begin + HALF, here, 0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / (2 * HALF) + eps)[:, None]
    left *= scale * tl.where(is_query, tl.load(of_query + place), tl.load(of_key + place)).to(tl.float32)
    right *= scale * tl.where(is_query, tl.load(of_query + HALF + place), tl.load(of_key + HALF + place)).to(tl.float32)
    turn, lift = tl.load(cosine + row * angle_stride + place), tl.load(sine + row * angle_stride + place)
    new_left = (left * turn - right * lift).to(query.dtype.element_ty)
    new_right = (right * turn + left * lift).to(query.dtype.element_ty)
    own = query + (row * heads + head) * (2 * HALF) + place
    tl.store(own, new_left, is_query)
    tl.store(own + HALF, new_right, is_query)
    own = key + (row * key_heads + head - heads) * (2 * HALF) + place
    tl.store(own, new_left, here & (head >= heads))
    tl.store(own + HALF, new_right, here & (head >= heads))


def rotate(joined, heads: int, key_heads: int, of_query, of_key, eps: float, cosine, sine):
    count, half = len(joined), cosine.shape[-1] // 2
    query = torch.empty(count, heads, 2 * half, dtype=joined.dtype, device=joined.device)
    key = torch.empty(count, key_heads, 2 * half, dtype=joined.dtype, device=joined.device)
    rotate_kernel[(count, cdiv(heads + key_heads, HEADS))](
        joined, query, key, of_query, of_key, cosine, sine, heads, key_heads, cosine.stride(0), eps, HALF=half,
        HEADS=HEADS,
    )  # fmt: skip
    return query, key


@triton.jit
def rotate_backward_kernel(
    gradient, joined, of_query, of_key, cosine, sine, heads, key_heads, angle_stride, eps,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head, place = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    is_query, here = head < heads, head < heads + key_heads
    begin = (row * (heads + 2 * key_heads) + head) * (2 * HALF) + place
    left = tl.load(joined + begin, here, 0.0).to(tl.float32)
    right = tl.load(joined + begin + HALF, here, 0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / (2 * HALF) + eps)[:, None]
    left, right = left * scale, right * scale
    turn, lift = tl.load(cosine + row * angle_stride + place), tl.load(sine + row * angle_stride + place)
    of_left = tl.load(gradient + begin, here, 0.0).to(tl.float32)
    of_right = tl.load(gradient + begin + HALF, here, 0.0).to(tl.float32)
    back_left, back_right = of_left * turn + of_right * lift, of_right * turn - of_left * lift
    back_left *= tl.where(is_query, tl.load(of_query + place), tl.load(of_key + place)).to(tl.float32)
    weight = tl.where(is_query, tl.load(of_query + HALF + place), tl.load(of_key + HALF + place)).to(tl.float32)
    back_right *= weight
    mean = ((tl.sum(back_left * left, 1) + tl.sum(back_right * right, 1)) / (2 * HALF))[:, None]
    tl.store(gradient + begin, (scale * (back_left - left * mean)).to(gradient.dtype.element_ty), here)
    tl.store(gradient + begin + HALF, (scale * (back_right - right * mean)).to(gradient.dtype.element_ty), here)


def rotate_backward(gradient, joined, heads: int, key_heads: int, of_query, of_key, eps: float, cosine, sine) -> None:
    rotate_backward_kernel[(len(joined), cdiv(heads + key_heads, HEADS))](
        gradient, joined, of_query, of_key, cosine, sine, heads, key_heads, cosine.stride(0), eps,
        HALF=cosine.shape[-1] // 2, HEADS=HEADS,
    )  # fmt: skip


@dataclass
class Seen:
    """A mask by blocks of queries and of keys: (sequences, length, blocks) words of 64 bits, key by key; and for each
    block of queries how many blocks of keys it sees and which, in the first of `blocks` places; and the other way."""

    words: torch.Tensor
    of_query: tuple[torch.Tensor, torch.Tensor]
    of_key: tuple[torch.Tensor, torch.Tensor]


@triton.jit(do_not_specialize=["length", "blocks"])
def words_kernel(mask, words, length, blocks, BLOCK: tl.constexpr):
    row, bit = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + bit
    seen = tl.load(mask + row * length + column, column < length, 0).to(tl.int64)
    tl.store(words + row * blocks + tl.program_id(1), tl.sum(seen << bit))


def by_blocks(mask) -> Seen:
    """Of booleans (sequences, 1, length, length)."""
    sequences, _, length, _ = mask.shape
    blocks = cdiv(length, BLOCK)
    words = torch.empty(sequences, length, blocks, dtype=torch.int64, device=mask.device)
    words_kernel[(sequences * length, blocks)](mask.contiguous().view(torch.uint8), words, length, blocks, BLOCK=BLOCK)
    padded = torch.nn.functional.pad(words != 0, (0, 0, 0, blocks * BLOCK - length))
    there = padded.view(sequences, blocks, BLOCK, blocks).any(2)

    def places(there) -> tuple:
        order = there.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        return there.sum(-1, dtype=torch.int32), order.to(torch.int32)

    return Seen(words, places(there), places(there.mT.contiguous()))


@lru_cache(8)  # each length that a run meets would stay on the card otherwise
def causal(sequences: int, length: int, device) -> Seen:
    return by_blocks(torch.ones(length, length, dtype=torch.bool, device=device).tril().expand(sequences, 1, -1, -1))


masks = WeakTensorKeyDictionary()  # all layers of a pass are given the same


def seen_by(mask, tokens: int, device) -> Seen:
    if isinstance(mask, int):
        return causal(mask, tokens // mask, device)
    if mask not in masks:
        masks[mask] = by_blocks(mask)
    return masks[mask]


@triton.jit(do_not_specialize=["length", "blocks"])
def attend_kernel(
    query, key, value, words, counts, order, out, sums, length, blocks, value_stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    own_block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    step, place = tl.arange(0, BLOCK), tl.arange(0, D)
    row, first = own_block * BLOCK + step, sequence * length
    own = ((first + row) * HEADS + head)[:, None] * D + place[None, :]
    queries = tl.load(query + own, (row < length)[:, None], 0.0)
    highest = tl.full((BLOCK,), -1e30, tl.float32)
    total, result = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK, D), tl.float32)
    key += (first * (HEADS // GROUP) + head // GROUP) * D
    value += first * value_stride + (head // GROUP) * D
    list_of_blocks = sequence * blocks + own_block
    for turn in range(0, tl.load(counts + list_of_blocks)):
        block = tl.load(order + list_of_blocks * blocks + turn)
        column = block * BLOCK + step
        keys = tl.load(key + place[:, None] + column[None, :] * (HEADS // GROUP * D), (column < length)[None, :], 0.0)
        scores = tl.dot(queries, keys) * scale
        word = tl.load(words + (first + row) * blocks + block, row < length, 0)
        scores = tl.where(((word[:, None] >> step[None, :]) & 1) != 0, scores, -1e30)
        new = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.where(scores > -1e29, tl.exp2(scores - new[:, None]), 0.0)
        shrink = tl.exp2(highest - new)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(value + column[:, None] * value_stride + place[None, :], (column < length)[:, None], 0.0)
        result = tl.dot(weights.to(values.dtype), values, result * shrink[:, None])
        highest = new
    total = tl.where(total > 0, total, 1.0)  # a token that sees nothing
    tl.store(out + own, (result / total[:, None]).to(out.dtype.element_ty), (row < length)[:, None])
    tl.store(sums + (sequence * HEADS + head) * length + row, highest + tl.log2(total), row < length)


def options(query, key) -> dict:
    """What the kernels are compiled for."""
    _, heads, d = query.shape
    return {"HEADS": heads, "GROUP": heads // key.shape[1], "D": d, "BLOCK": BLOCK}


def attend(query, key, value, seen: Seen, scaling: float):
    (sequences, length, blocks), heads = seen.words.shape, query.shape[1]
    out = torch.empty_like(query)
    sums = torch.empty(sequences, heads, length, device=query.device)
    attend_kernel[(blocks, heads, sequences)](
        query, key, value, seen.words, *seen.of_query, out, sums, length, blocks, value.stride(0), scaling * LOG2E,
        **options(query, key), num_stages=3,
    )  # fmt: skip
    return out, sums


@triton.jit(do_not_specialize=["count", "length"])
def product_kernel(gradient, out, found, count, length, HEADS: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr):
    """The sum over d of a gradient times its output, for each head: (sequences, H, length)."""
    number = (tl.program_id(0) * SIZE + tl.arange(0, SIZE)).to(tl.int64)
    place, here = number[:, None] * D + tl.arange(0, D)[None, :], (number < count)[:, None]
    product = tl.load(gradient + place, here, 0.0).to(tl.float32) * tl.load(out + place, here, 0.0).to(tl.float32)
    row, head = number // HEADS, number % HEADS
    place = ((row // length) * HEADS + head) * length + row % length
    tl.store(found + place, tl.sum(product, 1), number < count)


@triton.jit(do_not_specialize=["length", "blocks"])
def of_queries_kernel(
    gradient, query, key, value, words, counts, order, sums, products, into, length, blocks, value_stride, stride,
    scale, scaling, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    own_block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    step, place = tl.arange(0, BLOCK), tl.arange(0, D)
    row, first = own_block * BLOCK + step, sequence * length
    own, here = ((first + row) * HEADS + head)[:, None] * D + place[None, :], (row < length)[:, None]
    queries, given = tl.load(query + own, here, 0.0), tl.load(gradient + own, here, 0.0)
    number = (sequence * HEADS + head) * length + row
    highest, product = tl.load(sums + number, row < length, 0.0), tl.load(products + number, row < length, 0.0)
    key += (first * (HEADS // GROUP) + head // GROUP) * D
    value += first * value_stride + (head // GROUP) * D
    total = tl.zeros((BLOCK, D), tl.float32)
    list_of_blocks = sequence * blocks + own_block
    for turn in range(0, tl.load(counts + list_of_blocks)):
        block = tl.load(order + list_of_blocks * blocks + turn)
        column = block * BLOCK + step
        inside = (column < length)[:, None]
        keys = tl.load(key + column[:, None] * (HEADS // GROUP * D) + place[None, :], inside, 0.0)
        values = tl.load(value + column[:, None] * value_stride + place[None, :], inside, 0.0)
        word = tl.load(words + (first + row) * blocks + block, row < length, 0)
        weights = tl.exp2(tl.dot(queries, tl.trans(keys)) * scale - highest[:, None])
        weights = tl.where(((word[:, None] >> step[None, :]) & 1) != 0, weights, 0.0)
        of_scores = weights * (tl.dot(given, tl.trans(values)) - product[:, None])
        total = tl.dot(of_scores.to(keys.dtype), keys, total)
    place = (first + row)[:, None] * stride + head * D + place[None, :]
    tl.store(into + place, (total * scaling).to(into.dtype.element_ty), here)


@triton.jit(do_not_specialize=["length", "blocks"])
def of_keys_kernel(
    gradient, query, key, value, words, counts, order, sums, products, into, length, blocks, value_stride, stride,
    scale, scaling, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    own_block, key_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    step, place = tl.arange(0, BLOCK), tl.arange(0, D)
    column, first = own_block * BLOCK + step, sequence * length
    here = (column < length)[:, None]
    keys = tl.load(key + ((first + column) * (HEADS // GROUP) + key_head)[:, None] * D + place[None, :], here, 0.0)
    values = tl.load(value + (first + column)[:, None] * value_stride + key_head * D + place[None, :], here, 0.0)
    of_key, of_value = tl.zeros((BLOCK, D), tl.float32), tl.zeros((BLOCK, D), tl.float32)
    list_of_blocks = sequence * blocks + own_block
    count = tl.load(counts + list_of_blocks)
    for turn in range(0, GROUP * count):
        head = key_head * GROUP + turn // count
        row = tl.load(order + list_of_blocks * blocks + turn % count) * BLOCK + step
        inside = row < length
        own = ((first + row) * HEADS + head)[:, None] * D + place[None, :]
        queries, given = tl.load(query + own, inside[:, None], 0.0), tl.load(gradient + own, inside[:, None], 0.0)
        number = (sequence * HEADS + head) * length + row
        highest, product = tl.load(sums + number, inside, 0.0), tl.load(products + number, inside, 0.0)
        word = tl.load(words + (first + row) * blocks + own_block, inside, 0)
        weights = tl.exp2(tl.dot(keys, tl.trans(queries)) * scale - highest[None, :])
        weights = tl.where(((word[None, :] >> step[:, None]) & 1) != 0, weights, 0.0)
        of_value = tl.dot(weights.to(given.dtype), given, of_value)
        of_scores = weights * (tl.dot(values, tl.trans(given)) - product[None, :])
        of_key = tl.dot(of_scores.to(queries.dtype), queries, of_key)
    place = (first + column)[:, None] * stride + (HEADS + key_head) * D + place[None, :]
    tl.store(into + place, (of_key * scaling).to(into.dtype.element_ty), here)
    tl.store(into + place + HEADS // GROUP * D, of_value.to(into.dtype.element_ty), here)


def attend_backward(gradient, query, key, value, out, sums, seen: Seen, scaling: float, into) -> None:
    (sequences, length, blocks), (count, heads, d) = seen.words.shape, query.shape
    products = torch.empty_like(sums)
    product_kernel[(cdiv(count * heads, 64),)](gradient, out, products, count * heads, length, heads, d, SIZE=64)
    kernels = (of_keys_kernel, key.shape[1], seen.of_key), (of_queries_kernel, heads, seen.of_query)
    for kernel, number, own in kernels:
        kernel[(blocks, number, sequences)](
            gradient, query, key, value, seen.words, *own, sums, products, into, length, blocks, value.stride(0),
            into.stride(0), scaling * LOG2E, scaling, **options(query, key), num_stages=2,
        )  # fmt: skip
