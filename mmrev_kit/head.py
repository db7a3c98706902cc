"""Logits in fp32 from 16-bit products.

The library's head rounds its sums to 16 bit: a logit between 8 and 16 becomes a multiple of 1/16 in bf16, of 1/128 in
fp16. By that alone the losses of a few rows differ by 1 % between two ways to pack them.
"""

from __future__ import annotations

from functools import cache


@cache
def head_function():
    """The autograd function; made on first use, since importing torch takes seconds."""
    import torch

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

    return Head


@cache
def head_class():
    """The class that a model's frozen head, a linear layer without bias, may be given instead of its own."""
    import torch

    class FusedHead(torch.nn.Linear):
        def forward(self, x):
            if x.dtype == torch.float32 or x.dtype != self.weight.dtype:
                return super().forward(x)
            return head_function().apply(x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)

    return FusedHead
