"""A decoder layer as one operation on a GPU: `pytest tests/gpu` on a machine with one."""

import pytest
import torch

from mmrev_kit.model import fused
from mmrev_kit.model.loading import adapter_arguments, add_adapter, base_arguments, load_base, trainable
from mmrev_kit.model.packing import attention_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: run it on a machine with one"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def model_of(small_config, more: str):
    """The embedded model with random adapters, quantized on the CPU: a GPU rounds some of NF4's constants otherwise."""
    config = small_config(more)
    torch.manual_seed(0)
    model = add_adapter(load_base(**base_arguments(config, CPU)).to(GPU), **adapter_arguments(config)).train()
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model):
        parameter.data = (0.05 * torch.randn(parameter.shape, generator=generator)).to(GPU)
    return model


def inputs_of(model, length: int = 200):
    """Hidden states, angles, the mask of packed groups and a gradient, of two sequences."""
    text = model.get_base_model().model.language_model
    generator = torch.Generator().manual_seed(2)
    hidden, gradient = (torch.randn(2, length, text.config.hidden_size, generator=generator).to(GPU) for _ in range(2))
    places = torch.randint(0, 40, (3, 2, length), generator=generator).to(GPU)
    group = torch.tensor([[-2] * 9 + [0] * 91 + [1] * 100, [-2] * 9 + [0] * 151 + [-1] * 40])
    segment = torch.zeros_like(group)
    segment[:, 60:80], segment[:, 80:100], segment[1, 160:] = 1, 2, -1
    return hidden, text.rotary_emb(hidden, places), attention_mask(group, segment).to(GPU), gradient


def answer(model, given, dtype, recomputed: bool = False, seed: int = 0):
    """A layer's output, and the gradients of its input and of its adapters, as one vector each."""
    hidden, angles, mask, gradient = given
    layer = model.get_base_model().model.language_model.layers[2]
    layer.gradient_checkpointing = recomputed
    if recomputed:
        layer._gradient_checkpointing_func = None  # the operation does not need it
    hidden = hidden.clone().requires_grad_()
    torch.manual_seed(seed)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        out = layer(hidden, position_embeddings=angles, attention_mask=mask)
    out.backward(gradient)
    found = out.detach(), hidden.grad, torch.cat([parameter.grad.flatten() for parameter in trainable(layer)])
    model.zero_grad()
    return found


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("targets", ["q_proj,k_proj,v_proj,o_proj", "q_proj,o_proj,up_proj,down_proj"])
def test_the_operation_is_as_near_to_fp32_as_the_modules(small_config, monkeypatch, dtype, bits, targets):
    more = f"lora.dropout=0 lora.target_modules=[{targets}] quantization.bits={bits}"
    given = inputs_of(exact := model_of(small_config, f"{more} quantization.compute_dtype=fp32"))
    expected = answer(exact, given, torch.float32)
    model = model_of(small_config, f"{more} quantization.compute_dtype={dtype}")
    calls, apply = [], fused.DecoderLayer.apply
    monkeypatch.setattr(fused.DecoderLayer, "apply", lambda *own: calls.append(1) or apply(*own))
    own = answer(model, given, DTYPES[dtype])
    assert calls == [1]
    monkeypatch.setattr(fused, "can_compile", lambda device: False)
    modules = answer(model, given, DTYPES[dtype])
    assert calls == [1]
    # 0.4 % of the weights, rounded to bf16 before they are quantized, take another of NF4's values than in fp32
    bound = {"fp16": 0.004, "bf16": 0.03 if bits == 16 else 0.08}[dtype]
    for found, other, exact in zip(own, modules, expected, strict=True):
        error, others = ((part - exact).norm() / exact.norm() for part in (found, other))
        assert error < max(1.2 * others, 1e-4) and error < bound


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_recomputed_layer_draws_the_same_masks(small_config, dtype):
    model = model_of(small_config, f"lora.dropout=0.3 quantization.compute_dtype={dtype}")
    given = inputs_of(model)
    kept, recomputed = (answer(model, given, DTYPES[dtype], recomputed) for recomputed in (False, True))
    other = answer(model, given, DTYPES[dtype], seed=1)
    for one, another in zip(kept, recomputed, strict=True):
        assert torch.equal(one, another)
    assert not torch.equal(kept[0], other[0])


def test_a_second_backward_pass_is_refused(small_config):
    model = model_of(small_config, "quantization.compute_dtype=fp16")
    hidden, angles, mask, gradient = inputs_of(model)
    layer = model.get_base_model().model.language_model.layers[2]
    with torch.autocast("cuda", torch.float16):
        out = layer(hidden.requires_grad_(), position_embeddings=angles, attention_mask=mask)
    out.backward(gradient, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(gradient)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_model_on_another_card_than_the_current_one(small_config):
    model = model_of(small_config, "lora.dropout=0 quantization.compute_dtype=fp16")
    given = inputs_of(model)
    expected, other = answer(model, given, torch.float16), torch.device("cuda", 1)
    hidden, angles, mask, gradient = given
    moved = hidden.to(other), tuple(part.to(other) for part in angles), mask.to(other), gradient.to(other)
    found = answer(model.to(other), moved, torch.float16)
    assert torch.cuda.current_device() == 0
    for own, one in zip(found, expected, strict=True):
        assert torch.equal(own.to(GPU), one)
