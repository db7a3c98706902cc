"""RMSNorm and the gated product of the language model as one operation each, forward and backward.

The library's modules are two to six elementwise operations, each of which reads and writes every activation. Here each
is one `autograd.Function` that saves less: a norm its input as it came, in 16 bit where it is that, the gated product
gate and up but not gate's SiLU. On GPUs for which torch.compile can make kernels each becomes one kernel; elsewhere
the same lines run operation by operation.
"""

from __future__ import annotations

import os
import shutil
from functools import cache

MIN_ROWS = 256  # below, as in generation token by token, a kernel is not worth the call through torch.compile


def norm_forward(rows, weight, eps: float, dtype):
    """(n, h) normalised in fp32 and times the weight, in `dtype`; and 1/rms (n, 1), fp32."""
    import torch

    values = rows.float()
    scale = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * (values * scale)).to(dtype), scale


def norm_backward(gradient, rows, scale, weight):
    """The gradient of `rows`: s (g w - x s mean(g w x s)), in fp32."""
    weighted, normal = gradient.float() * weight, rows.float() * scale
    return (scale * (weighted - normal * (weighted * normal).mean(-1, keepdim=True))).to(rows.dtype)


def gated_forward(gate, up):
    """SiLU(gate) x up, (n, f)."""
    from torch.nn.functional import silu

    return silu(gate) * up


def gated_backward(gradient, gate, up):
    """The gradients of gate and up; SiLU is computed again, so that it need not be kept."""
    import torch

    of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
    return of_gate, torch.nn.functional.silu(gate).mul_(gradient)


def can_compile(device) -> bool:
    """Whether torch.compile makes kernels for this GPU: compute capability 8.0 or later, Triton, a C compiler."""
    import torch
    from torch.utils._triton import has_triton

    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return has_triton() and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))


@cache
def compiled(function, device):
    """`function` as kernels for `device`, or as it is."""
    import torch

    return torch.compile(function) if can_compile(device) else function


def run(function, *arguments):
    """Call `function`, as a kernel where that is worth it. The tensors are (n, width): n varies, widths do not."""
    import torch

    tensors = [value for value in arguments if isinstance(value, torch.Tensor) and value.ndim == 2]
    if tensors[0].device.type != "cuda" or len(tensors[0]) < MIN_ROWS:
        return function(*arguments)
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_static(tensor, 1)
    return compiled(function, tensors[0].device)(*arguments)


@cache
def classes():
    """(stock norm, fused norm, stock MLP, fused MLP); made on first use, since importing torch takes seconds."""
    import torch
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextMLP, Qwen3VLTextRMSNorm

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

    class FusedNorm(Qwen3VLTextRMSNorm):
        out_dtype = None  # the input's

        def forward(self, hidden_states):
            rows = hidden_states.reshape(-1, hidden_states.shape[-1])
            out = Norm.apply(rows, self.weight, self.variance_epsilon, self.out_dtype or hidden_states.dtype)
            return out.view(hidden_states.shape)

    class FusedMLP(Qwen3VLTextMLP):
        def forward(self, x):
            gate, up = self.gate_proj(x), self.up_proj(x)
            return self.down_proj(Gated.apply(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape))

    return Qwen3VLTextRMSNorm, FusedNorm, Qwen3VLTextMLP, FusedMLP


def fuse(model) -> None:
    """Give the frozen norms and the MLPs of a Qwen3-VL language model their fused forward pass.

    Modules of another class, with another activation, or with a forward of their own (as accelerate's hooks for a
    model spread over devices set one) stay as they are.
    """
    norm, fused_norm, mlp, fused_mlp = classes()
    for module in model.model.language_model.modules():
        if "forward" in vars(module):
            continue
        if type(module) is norm and not module.weight.requires_grad:
            module.__class__ = fused_norm
        elif type(module) is mlp and module.config.hidden_act == "silu":
            module.__class__ = fused_mlp


def unfuse(model) -> None:
    """Give them the library's own again."""
    norm, fused_norm, mlp, fused_mlp = classes()
    for module in model.model.language_model.modules():
        if type(module) in (fused_norm, fused_mlp):
            module.__class__ = norm if type(module) is fused_norm else mlp
