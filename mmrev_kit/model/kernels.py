"""The joined operations that `fused` puts into a model, forward and backward.

First the elementwise ones (RMSNorm, the gated product, RMSNorm with rotary positions) as plain functions, which `run`
calls as kernels where torch.compile can make them; then the linear layer with LoRA and its dropout; last the head,
16-bit weights to fp32 logits.
"""

import os
import shutil
from functools import cache

import torch
from torch.nn.functional import silu
from torch.utils._triton import has_triton

LANES = 4  # 16-bit numbers in one draw of 64 bits, see `kept`
MIN_ROWS = 256  # below, as in generation token by token, a kernel is not worth the call through torch.compile


def norm_forward(rows, weight, eps: float, dtype):
    """(n, ..., h) normalised over h in fp32 and times the weight, in `dtype`; and 1/rms (n, ..., 1), fp32."""
    values = rows.float()
    scale = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * (values * scale)).to(dtype), scale


def norm_backward(gradient, rows, scale, weight):
    """The gradient of `rows`: s (g w - x s mean(g w x s)), in fp32."""
    weighted, normal = gradient.float() * weight, rows.float() * scale
    return (scale * (weighted - normal * (weighted * normal).mean(-1, keepdim=True))).to(rows.dtype)


def rotate(values, cosine, sine, sign: int):
    """Values (n, heads, d) rotated by the angles of `cosine` and `sine`, (n, d) with both halves alike; `sign` -1: to
    their positions, as `apply_rotary_pos_emb` does; 1: back."""
    rotated = values * cosine[:, None]
    (left, right), (half, _) = values.chunk(2, -1), sine[:, None].chunk(2, -1)
    to_left, to_right = rotated.chunk(2, -1)
    to_left.addcmul_(right, half, value=sign)
    to_right.addcmul_(left, half, value=-sign)
    return rotated


def rotated_forward(queries, keys, of_query, of_key, eps: float, cosine, sine):
    """Queries (n, heads, d) and keys (n, key heads, d) normalised with weights (d,) and rotated; and both 1/rms."""
    normal, query_scale = norm_forward(queries, of_query, eps, torch.float32)
    query = rotate(normal, cosine, sine, -1).to(queries.dtype)
    normal, key_scale = norm_forward(keys, of_key, eps, torch.float32)
    return query, rotate(normal, cosine, sine, -1).to(keys.dtype), query_scale, key_scale


def rotated_backward(of_queries, of_keys, queries, keys, query_scale, key_scale, of_query, of_key, cosine, sine):
    """The gradients of queries and keys: rotated back, then through the norms."""
    query = norm_backward(rotate(of_queries.float(), cosine, sine, 1), queries, query_scale, of_query)
    return query, norm_backward(rotate(of_keys.float(), cosine, sine, 1), keys, key_scale, of_key)


def gated_forward(gate, up):
    """SiLU(gate) x up, (n, f)."""
    return silu(gate) * up


def gated_backward(gradient, gate, up):
    """The gradients of gate and up; SiLU is computed again, so that it need not be kept."""
    of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
    return of_gate, silu(gate).mul_(gradient)


@cache
def can_compile(device) -> bool:
    """Whether kernels can be made for this GPU: compute capability 8.0 or later, Triton, a C compiler."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return has_triton() and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))


@cache
def compiled(function, device):
    """`function` as kernels for `device`, or as it is."""
    return torch.compile(function) if can_compile(device) else function


def run(function, *arguments):
    """Call `function`, as a kernel where that is worth it. The first axis of its tensors varies, the others do not."""
    tensors = [value for value in arguments if isinstance(value, torch.Tensor) and value.ndim > 1]
    if tensors[0].device.type != "cuda" or len(tensors[0]) < MIN_ROWS:
        return function(*arguments)
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_static(tensor, list(range(1, tensor.ndim)))
    return compiled(function, tensors[0].device)(*arguments)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, eps, dtype):
        out, scale = run(norm_forward, rows, weight, eps, dtype)
        ctx.save_for_backward(rows, scale, weight)
        return out

    @staticmethod
    def backward(ctx, gradient):
        rows, scale, weight = ctx.saved_tensors
        return run(norm_backward, gradient.contiguous(), rows, scale, weight), None, None, None


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return run(gated_forward, gate, up)

    @staticmethod
    def backward(ctx, gradient):
        return run(gated_backward, gradient.contiguous(), *ctx.saved_tensors)


class Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, of_query, of_key, eps, cosine, sine):
        own = (of_query, of_key, eps, cosine, sine)
        *rotated, query_scale, key_scale = run(rotated_forward, queries, keys, *own)
        ctx.save_for_backward(queries, keys, query_scale, key_scale, of_query, of_key, cosine, sine)
        return tuple(rotated)

    @staticmethod
    def backward(ctx, *gradients):
        gradients = [gradient.contiguous() for gradient in gradients]
        return *run(rotated_backward, *gradients, *ctx.saved_tensors), None, None, None, None, None


class Lora(torch.autograd.Function):
    """layer(x) + s drop(x) A' B'; the layer's weight gets no gradient."""

    @staticmethod
    def forward(ctx, rows, down, up, layer, scaling, p):
        dropped, mask, factor, left = drop(rows, p) if p > 0 else (rows, None, None, 1.0)
        low = dropped @ down.t().to(rows.dtype)
        ctx.layer, ctx.scaling, ctx.factor = layer, scaling * left, factor
        ctx.save_for_backward(dropped if factor is None else rows, mask, low, down, up)
        return layer(rows).addmm_(low, up.t().to(rows.dtype), alpha=ctx.scaling)

    @staticmethod
    def backward(ctx, gradient):
        rows, mask, low, down, up = ctx.saved_tensors
        of_low = (gradient @ up.to(gradient.dtype)).mul_(ctx.scaling)
        of_up = (gradient.t() @ low).to(up.dtype).mul_(ctx.scaling)
        dropped = rows if ctx.factor is None else redrop(rows, mask, ctx.factor)
        of_down, of_rows = (of_low.t() @ dropped).to(down.dtype), None
        if ctx.needs_input_grad[0]:
            del dropped
            of_rows = gradient @ weight_of(ctx.layer, gradient.dtype)
            of_dropped = of_low @ down.to(gradient.dtype)
            if mask is None:
                of_rows += of_dropped
            elif ctx.factor is None:
                of_rows.addcmul_(of_dropped, mask)
            else:
                of_rows += redrop(of_dropped, mask, ctx.factor)
        return of_rows, of_down, of_up, None, None, None


def weight_of(layer, dtype):
    """A linear layer's weight (out, in) in `dtype`, from 4 bit where it is that."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data.view(-1, 1), state).to(dtype)


def kept(shape, p: float, dtype):
    """Which numbers dropout keeps on a CPU, as 0 and 1, and the factor 1 / (1 - p) for those.

    A draw of 64 bits decides four numbers (torch draws for each alone, a sixth of the embedded model's training time),
    so that p is taken in steps of 2^-16. Booleans would be turned into numbers again at every use, which takes longer
    than the product.
    """
    dropped = min(round(p * 2**16), 2**16 - 1)
    draws = torch.empty(-(-shape.numel() // LANES), dtype=torch.int64).random_(-(2**63), None)
    lanes = draws.view(torch.int16)[: shape.numel()].view(shape)
    mask = torch.ge(lanes, dropped - 2**15, out=torch.empty(shape, dtype=dtype))
    return mask, 2**16 / (2**16 - dropped)


def drop(rows, p: float):
    """Dropout.

    Returns:
        Its output, its mask, the factor with which `redrop` makes the output from `rows` again (None: the output is
        kept instead, as on a CPU, where time counts and not memory), and the factor that is left to apply: on a CPU
        it goes where the numbers are few.
    """
    if rows.device.type == "cpu":
        mask, factor = kept(rows.shape, p, rows.dtype)
        return rows * mask, mask, None, factor
    return *torch.native_dropout(rows, p, True), 1 / (1 - p), 1.0


def redrop(values, mask, factor: float):
    """values x mask x factor, in one kernel."""
    return torch.ops.aten.native_dropout_backward(values, mask, factor)


class Head(torch.autograd.Function):
    """Rows (n, h) and the head's frozen weight (v, h), both in 16 bit, to logits (n, v) in fp32."""

    @staticmethod
    def forward(ctx, rows, weight):
        ctx.save_for_backward(weight)
        with torch.autocast(rows.device.type, enabled=False):
            if rows.device.type == "cuda":
                return torch.mm(rows, weight.t(), out_dtype=torch.float32)
            return rows.float() @ weight.float().t()  # no such product on CPUs

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient.to(weight.dtype) @ weight, None


class FusedHead(torch.nn.Linear):
    """What a model's frozen head, a linear layer without bias, may be given instead of its own class."""

    def forward(self, x):
        if x.dtype == torch.float32 or x.dtype != self.weight.dtype:
            return super().forward(x)
        return Head.apply(x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)
