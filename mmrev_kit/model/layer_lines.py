"""The operations of `decoder` line by line, on any device: what its kernels are held to, and parts without a kernel.

n tokens, h hidden, f intermediate, H and K query and key/value heads of d numbers, r the rank of an adapter, J
projections that read the same input. A matrix that is read by several is *extended*: (n, inputs + extra) in 16 bit,
with each adapter's r numbers in columns of its own behind the input, zeros behind them.
"""

from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from mmrev_kit.model import kernels

STEPS = 2**16  # dropout is taken in steps of 1 / STEPS


def threshold(p: float) -> int:
    """Of the draws 0 to STEPS - 1 those from here on are kept."""
    return min(round(p * STEPS), STEPS - 1)


def draw(seed: int, rows: int, width: int, count: int, p: float, device):
    """Dropout masks, (rows, width) bytes: bit j is set where the j-th of `count` masks keeps the number. The same seed
    and shape give the same masks."""
    generator = torch.Generator(device).manual_seed(seed)
    found = torch.zeros(rows, width, dtype=torch.uint8, device=device)
    for number in range(count):
        draws = torch.randint(STEPS, (rows, width), generator=generator, device=device)
        found |= (draws >= threshold(p)).to(torch.uint8) << number
    return found


def masked(rows, mask, number: int):
    """The rows where bit `number` of the mask is set, else 0."""
    return rows if mask is None else rows * ((mask >> number) & 1)


def dequantize(layer, out, up, scaling: float, column: int) -> None:
    """Fill `out`, rows of an extended matrix, with a linear layer's weight, (outputs, inputs), and with scaling x `up`,
    (outputs, r) or None, in the columns from inputs + column on; the other columns behind the weight become 0."""
    outputs, inputs = out.shape[0], layer.in_features
    out[:, :inputs] = kernels.weight_of(layer, out.dtype).view(outputs, inputs)
    out[:, inputs:] = 0
    if up is not None:
        out[:, inputs + column : inputs + column + up.shape[1]] = scaling * up


def lora_down(group, rows, mask, down, factor: float, out):
    """factor x (rows where kept) A', for each A of `down`, (J r, inputs).

    Writes rows (which may be `out`'s own columns) and that into the extended `out`; returns that alone, (n, J r).
    """
    parts = [masked(rows, mask, j) @ part.t() for j, part in enumerate(down.split(group.rank))]
    low = torch.cat(parts, 1).mul_(factor)
    out[:, : group.inputs] = rows
    out[:, group.inputs :] = 0
    out[:, group.inputs : group.inputs + len(down)] = low
    return low


def lora_up(group, gradient, mask, down, factor: float):
    """The input's gradient, (n, inputs), from an extended one: its own columns, and those of the adapters through A."""
    out = gradient[:, : group.inputs].float()
    behind = gradient[:, group.inputs :].split(group.rank, 1)
    for j, part in enumerate(down.split(group.rank)):
        out += masked((behind[j] @ part).float(), mask, j) * factor
    return out.to(gradient.dtype)


def lora_gradients(group, gradient, rows, mask, factor: float, of_out, low):
    """The gradients of adapters, fp32.

    Args:
        gradient: extended, of the input.
        rows: the input, (n, inputs).
        of_out: of the output, (n, outputs of all), whose parts begin at `group.starts`.
        low: from `lora_down`.

    Returns:
        Of every A, (J r, inputs), and of every B, one below the other, (outputs of all, r).
    """
    behind = gradient[:, group.inputs :].float().split(group.rank, 1)
    sizes = [end - start for start, end in pairwise([*group.starts, of_out.shape[1]])]
    of_down = [behind[j].t() @ masked(rows, mask, j).float() for j in range(len(sizes))]
    pairs = zip(of_out.float().split(sizes, 1), low.float().split(group.rank, 1), strict=True)
    of_up = [part.t() @ own for part, own in pairs]
    return torch.cat(of_down).mul_(factor), torch.cat(of_up).mul_(group.scaling)


def norm(rows, added, weight, eps: float, out):
    """RMSNorm of `rows` (n, h) in fp32, or of their sum with `added` (n, h), into the first h columns of `out`; returns
    what was normalised."""
    rows = rows if added is None else rows + added
    out[:, : rows.shape[1]] = kernels.norm_forward(rows, weight, eps, out.dtype)[0]
    return rows


def norm_backward(gradient, rows, weight, eps: float, stream, dtype):
    """The gradient of `rows`, to that of what is added beside the norm, `stream` (n, h): in fp32 and in `dtype`."""
    scale = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    summed = stream + kernels.norm_backward(gradient[:, : rows.shape[1]], rows, scale, weight)
    return summed, summed.to(dtype)


def split(joined, heads: int, key_heads: int):
    """Queries, keys and values, (n, heads, d) each, of joined ones (n, (H + 2 K) d)."""
    return joined.view(len(joined), heads + 2 * key_heads, -1).split([heads, key_heads, key_heads], 1)


def rotate(joined, heads: int, key_heads: int, of_query, of_key, eps: float, cosine, sine):
    """Queries (n, H, d) and keys (n, K, d) of joined ones, normalised and rotated."""
    query, key, _ = split(joined, heads, key_heads)
    return kernels.rotated_forward(query, key, of_query, of_key, eps, cosine, sine)[:2]


def rotate_backward(gradient, joined, heads: int, key_heads: int, of_query, of_key, eps: float, cosine, sine) -> None:
    """The other way: `gradient`, (n, (H + 2 K) d), of rotated queries and keys becomes that of joined ones."""
    (query, key, _), (of_queries, of_keys, _) = (split(part, heads, key_heads) for part in (joined, gradient))
    scales = [torch.rsqrt(part.float().pow(2).mean(-1, keepdim=True) + eps) for part in (query, key)]
    own = kernels.rotated_backward(of_queries, of_keys, query, key, *scales, of_query, of_key, cosine, sine)
    for place, value in zip((of_queries, of_keys), own, strict=True):
        place.copy_(value)


def gate(joined, out) -> None:
    """SiLU(gate) x up of (n, 2 f) into the first f columns of `out`."""
    first, second = joined.chunk(2, 1)
    out[:, : first.shape[1]] = silu(first) * second


def gate_backward(gradient, joined) -> None:
    """Gate and up, (n, 2 f), become their own gradients."""
    first, second = joined.chunk(2, 1)
    of_gate, of_up = kernels.gated_backward(gradient[:, : first.shape[1]], first, second)
    first.copy_(of_gate)
    second.copy_(of_up)


def seen_by(mask, tokens: int, device):
    """What `attend` is given for a mask of so many tokens: here the mask itself."""
    return mask


def attend(query, key, value, mask, scaling: float):
    """Causal attention.

    Args:
        query, key, value: (sequences x length, heads, d).
        mask: (sequences, 1, length, length) booleans, which queries see which keys, never later ones; or the number of
            sequences, where each sees all keys up to itself.

    Returns:
        (n, H, d), and what `attend_backward` wants of it (here nothing).
    """
    sequences = mask if isinstance(mask, int) else len(mask)
    parts = [part.unflatten(0, (sequences, -1)).transpose(1, 2) for part in (query, key, value)]
    how = {"is_causal": True} if isinstance(mask, int) else {"attn_mask": mask}
    out = scaled_dot_product_attention(*parts, scale=scaling, enable_gqa=True, **how)
    return out.transpose(1, 2).reshape(query.shape), None


def attend_backward(gradient, query, key, value, out, rest, mask, scaling: float, into) -> None:
    """The gradients of queries, keys and values, into the three parts of `into`, joined (n, (H + 2 K) d)."""
    with torch.enable_grad():
        parts = [part.detach().requires_grad_() for part in (query, key, value)]
        again, _ = attend(*parts, mask, scaling)
    found = torch.autograd.grad(again, parts, gradient.view(again.shape))
    for place, own in zip(split(into, query.shape[1], key.shape[1]), found, strict=True):
        place.copy_(own)
