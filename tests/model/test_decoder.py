"""A decoder layer as one operation against its modules, on a CPU, where its operations run line by line."""

from copy import deepcopy
from itertools import product

import pytest
import torch

from mmrev_kit.model import decoder, fused, kernels, layer_lines
from mmrev_kit.model.loading import adapter_arguments, add_adapter, base_arguments, load_base, trainable
from mmrev_kit.model.packing import attention_mask
from mmrev_kit.training.run import prepare
from mmrev_kit.training.update import sample_losses

CPU = torch.device("cpu")
TARGETS = ("q_proj,k_proj,v_proj,o_proj", "q_proj,v_proj", "o_proj,up_proj,down_proj", "gate_proj,up_proj,k_proj")


def adapted_layer(small_config, more: str):
    """A decoder layer of the embedded model with random adapters, norms and weights of its own, in fp32."""
    config = small_config(more)
    torch.manual_seed(0)
    model = add_adapter(load_base(**base_arguments(config, CPU)), **adapter_arguments(config)).train()
    for parameter in trainable(model):
        torch.nn.init.normal_(parameter, std=0.1)
    text = model.get_base_model().model.language_model
    layer = text.layers[2]
    for name, weight in layer.named_parameters():
        if "norm" in name:
            weight.data = 1 + 0.2 * torch.randn_like(weight)
    layer.gradient_checkpointing = False
    return layer, text


def given_inputs(text, sequences=2, length=19):
    """Hidden states, positions that differ by axis, and the mask of packed groups."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(sequences, length, text.config.hidden_size, generator=generator)
    places = torch.randint(0, 40, (3, sequences, length), generator=generator)
    group = torch.tensor([[-2] * 3 + [0] * 9 + [1] * 7, [-2] * 3 + [0] * 12 + [-1] * 4])
    segment = torch.tensor([[0] * 7 + [1, 1, 1, 2, 2] + [0] * 3 + [1, 1, 2, 2], [0] * 9 + [1] * 3 + [2] * 3 + [-1] * 4])
    return hidden, text.rotary_emb(hidden, places), attention_mask(group, segment)


def answer(layer, run, hidden, gradient):
    """Output, and the gradients of the input and of every adapter."""
    hidden = hidden.clone().requires_grad_()
    out = run(hidden)
    out.backward(gradient)
    found = [out.detach(), hidden.grad, *(parameter.grad for parameter in trainable(layer))]
    layer.zero_grad()
    return found


def as_operation(layer, hidden, angles, mask, keep, seeds=None, dtype=torch.float32):
    operation = fused.make_operation(layer)
    angles = tuple(part.flatten(0, 1) for part in angles)
    given = decoder.Given(operation, dtype, seeds, angles, len(hidden) if mask is None else mask, keep)
    return decoder.DecoderLayer.apply(hidden, given, *operation.matrices())


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize(("bits", "masked", "keep"), product((4, 16), (True, False), (True, False)))
def test_the_operation_is_the_layer(small_config, targets, bits, masked, keep):
    more = f"lora.dropout=0 lora.target_modules=[{targets}] quantization.bits={bits}"
    layer, text = adapted_layer(small_config, more)
    hidden, angles, mask = given_inputs(text)
    mask, gradient = mask if masked else None, torch.randn_like(hidden)
    expected = answer(layer, lambda x: layer(x, position_embeddings=angles, attention_mask=mask), hidden, gradient)
    found = answer(layer, lambda x: as_operation(layer, x, angles, mask, keep), hidden, gradient)
    assert len(found) == 2 + 2 * len(targets.split(","))
    for own, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        assert (own - other).abs().max() < 1e-5 * other.abs().max()
