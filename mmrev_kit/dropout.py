"""LoRA's dropout for `fused`: on GPUs torch's own, on CPUs with fewer draws and a mask of numbers."""

from __future__ import annotations

LANES = 4  # 16-bit numbers in one draw of 64 bits


def kept(shape, p: float, dtype):
    """Which numbers dropout keeps on a CPU, as 0 and 1, and the factor 1 / (1 - p) for those.

    A draw of 64 bits decides four numbers (torch draws for each alone, a sixth of the embedded model's training time),
    so that p is taken in steps of 2^-16. Booleans would be turned into numbers again at every use, which takes longer
    than the product.
    """
    import torch

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
    import torch

    if rows.device.type == "cpu":
        mask, factor = kept(rows.shape, p, rows.dtype)
        return rows * mask, mask, None, factor
    return *torch.native_dropout(rows, p, True), 1 / (1 - p), 1.0


def redrop(values, mask, factor: float):
    """values x mask x factor, in one kernel."""
    import torch

    return torch.ops.aten.native_dropout_backward(values, mask, factor)
