"""Fused norms and gated products against the library's own modules."""

import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextMLP, Qwen3VLTextRMSNorm

from mmrev_kit.fused import can_compile, classes, fuse, unfuse
from mmrev_kit.loading import add_adapter, load_base, trainable
from mmrev_kit.steps import sample_losses
from mmrev_kit.train import prepare

CPU = torch.device("cpu")


def saved_bytes(module, values):
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(values)
    return out, found


def both(module, values, gradient):
    """Output and input gradient of a module in its own class and fused."""
    stock, fused = (classes()[:2], classes()[2:])[isinstance(module, Qwen3VLTextMLP)]
    module.requires_grad_(False)
    answers = []
    for kind in (stock, fused):
        module.__class__ = kind
        given = values.clone().requires_grad_()
        out, saved = saved_bytes(module, given)
        out.backward(gradient)
        answers.append((out.detach(), given.grad, sum(saved.values())))
    return answers


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01), (torch.float16, 0.002)])
@pytest.mark.parametrize("shape", [(2, 7, 64), (2, 7, 3, 16), (1, 1, 64)])
def test_a_norm_is_the_librarys(dtype, close, shape):
    torch.manual_seed(0)
    norm = Qwen3VLTextRMSNorm(shape[-1], eps=1e-6)
    norm.weight.data = (1 + 0.3 * torch.randn(shape[-1])).to(dtype)
    values, gradient = (3 * torch.randn(shape).to(dtype) for _ in range(2))
    (out, grad, saved), (own, own_grad, own_saved) = both(norm, values, gradient)
    assert own.dtype == out.dtype == dtype and own_grad.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(own, out)
    assert (own.float() - out.float()).abs().max() <= close * out.float().abs().max()
    assert (own_grad.float() - grad.float()).abs().max() <= close * grad.float().abs().max()
    assert own_saved < saved or dtype == torch.float32


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_a_gated_product_is_the_librarys_and_saves_less(dtype, close):
    torch.manual_seed(0)
    config = type("Sizes", (), {"hidden_size": 16, "intermediate_size": 48, "hidden_act": "silu"})
    mlp = Qwen3VLTextMLP(config).to(dtype)
    values, gradient = (torch.randn(2, 5, 16).to(dtype) for _ in range(2))
    (out, grad, saved), (own, own_grad, own_saved) = both(mlp, values, gradient)
    assert torch.equal(own, out)
    assert (own_grad.float() - grad.float()).abs().max() <= close * grad.float().abs().max()
    assert saved - own_saved == 2 * 5 * 48 * values.element_size()  # SiLU(gate)


@pytest.mark.parametrize("more", ["", "quantization.bits=16 memory.gradient_checkpointing=true"])
def test_a_model_learns_the_same(small_config, more):
    config = small_config(f"lora.dropout=0 {more}")
    torch.manual_seed(0)
    model = add_adapter(load_base(config, CPU), config).train()
    for parameter in trainable(model):
        torch.nn.init.normal_(parameter, std=0.05)
    task = prepare(config)
    batch = task.encoder.collate([sample for rows in task.train.values() for sample in rows[:3]])
    found = []
    for change in (unfuse, fuse):
        change(model.get_base_model())
        losses = sample_losses(model, batch, CPU, torch.float32)
        losses.sum().backward()
        found.append((losses.detach(), torch.cat([parameter.grad.flatten() for parameter in trainable(model)])))
        model.zero_grad()
    assert (found[0][0] - found[1][0]).abs().max() < 1e-6 * found[0][0].abs().max()
    assert (found[0][1] - found[1][1]).norm() < 1e-6 * found[0][1].norm()


def test_only_frozen_modules_of_the_librarys_own_forward_are_fused(small_config):
    base = load_base(small_config(), CPU)
    norms = [module for module in base.model.language_model.modules() if isinstance(module, Qwen3VLTextRMSNorm)]
    assert len(norms) == 4 * len(base.model.language_model.layers) + 1
    assert all(type(norm) is classes()[1] for norm in norms)
    unfuse(base)
    norms[0].weight.requires_grad_(True)
    norms[1].forward = norms[1].forward  # as accelerate's hooks do
    fuse(base)
    assert [type(norm) is classes()[1] for norm in norms] == [False, False] + [True] * (len(norms) - 2)


def test_a_cpu_runs_the_lines_as_they_are():
    assert not can_compile(CPU)
