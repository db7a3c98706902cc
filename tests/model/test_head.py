"""Logits in fp32 against the library's head."""

import pytest
import torch

from mmrev_kit.model.fused import fuse, unfuse
from mmrev_kit.model.kernels import FusedHead
from mmrev_kit.model.loading import base_arguments, load_base


def small_head(dtype):
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 50, bias=False).to(dtype).requires_grad_(False)
    return head, (10 * torch.randn(2, 7, 64)).to(dtype)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_not_rounded_to_16_bit(dtype, autocast):
    """Against float64 products of the same 16-bit numbers; gradients are the library's."""
    head, values = small_head(dtype)
    exact = values.double() @ head.weight.double().t()
    gradient, found = torch.randn(2, 7, 50), []
    for kind in (torch.nn.Linear, FusedHead):
        head.__class__, given = kind, values.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast):
            out = head(given)
        out.float().backward(gradient)
        found.append((out.detach(), given.grad))
    (rounded, expected), (logits, ours) = found
    assert rounded.dtype == ours.dtype == dtype and logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-6 * exact.abs().max() < 0.1 * (rounded - exact).abs().max()
    assert torch.equal(ours, expected)


def test_a_head_in_fp32_is_the_librarys():
    head, values = small_head(torch.float32)
    expected = head(values)
    head.__class__ = FusedHead
    assert torch.equal(head(values), expected)


def test_only_a_frozen_plain_head_is_changed(small_config):
    base = load_base(**base_arguments(small_config(), torch.device("cpu")))
    assert type(base.lm_head) is FusedHead
    unfuse(base)
    assert type(base.lm_head) is torch.nn.Linear
    base.lm_head.weight.requires_grad_(True)
    fuse(base)
    assert type(base.lm_head) is torch.nn.Linear
    base.lm_head.weight.requires_grad_(False)
    base.lm_head.forward = base.lm_head.forward  # as accelerate's hooks do
    fuse(base)
    assert type(base.lm_head) is torch.nn.Linear
