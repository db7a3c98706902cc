"""A decoder layer as one operation against its modules, on a CPU, where its operations run line by line."""

from itertools import product

import pytest
import torch
from peft.helpers import rescale_adapter_scale

from mmrev_kit.model import decoder, fused, kernels, layer_lines, scoring
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
@pytest.mark.parametrize(("bits", "masked", "keep"), list(product((4, 16), (True, False), (True, False))))
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


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("targets", TARGETS)
def test_dropout_is_that_of_the_modules_with_the_same_masks(small_config, monkeypatch, targets, keep):
    layer, text = adapted_layer(small_config, f"lora.dropout=0.25 lora.target_modules=[{targets}]")
    hidden, angles, mask = given_inputs(text)
    gradient, operation = torch.randn_like(hidden), fused.make_operation(layer)
    seeds, masks = operation.seeds(), []
    for name, group in operation.groups.items():
        bits = layer_lines.draw(
            seeds[name], hidden.shape[0] * hidden.shape[1], group.inputs, len(group.bases), 0.25, CPU
        )
        masks += [(bits >> j) & 1 for j, module in enumerate(group.adapters) if module is not None]
    left = iter(masks)
    monkeypatch.setattr(kernels, "kept", lambda shape, p, dtype: (next(left).to(dtype), 1 / (1 - p)))
    expected = answer(layer, lambda x: layer(x, position_embeddings=angles, attention_mask=mask), hidden, gradient)
    assert next(left, None) is None
    found = answer(layer, lambda x: as_operation(layer, x, angles, mask, keep, seeds), hidden, gradient)
    for own, other in zip(found, expected, strict=True):
        assert (own - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_masks_come_from_their_seed_at_their_rate(p):
    found, again, other = (layer_lines.draw(seed, 300, 200, 3, p, CPU) for seed in (1, 1, 2))
    assert torch.equal(found, again) and not torch.equal(found, other)
    for number in range(3):
        rate = float(((found >> number) & 1).float().mean())
        assert rate == pytest.approx(1 - p, abs=4 * (p * (1 - p) / found.numel()) ** 0.5)


def whole_model(small_config, more: str):
    config = small_config(f"quantization.compute_dtype=bf16 {more}")
    torch.manual_seed(0)
    model = add_adapter(load_base(**base_arguments(config, CPU)), **adapter_arguments(config)).train()
    for parameter in trainable(model):
        torch.nn.init.normal_(parameter, std=0.05)
    task = prepare(config)
    return model, task.encoder.collate([sample for rows in task.train.values() for sample in rows[:3]])


def learned(model, batch, dtype=torch.bfloat16):
    torch.manual_seed(7)  # of dropout
    losses = sample_losses(model, batch, CPU, dtype)
    losses.sum().backward()
    found = losses.detach(), torch.cat([parameter.grad.flatten() for parameter in trainable(model)])
    model.zero_grad()
    return found


@pytest.fixture
def calls(monkeypatch):
    """A function from whose call on layers run as on a GPU; it returns a list that grows with each operation."""
    found, apply = [], fused.DecoderLayer.apply

    def start():
        monkeypatch.setattr(fused, "can_compile", lambda device: True)
        monkeypatch.setattr(scoring, "takes_wanted", lambda model: False)
        monkeypatch.setattr(fused.DecoderLayer, "apply", lambda *own: found.append(1) or apply(*own))
        return found

    return start


def test_a_model_of_operations_learns_as_one_of_modules_does(small_config, calls):
    model, batch = whole_model(small_config, "lora.dropout=0")
    exact = learned(*whole_model(small_config, "lora.dropout=0 quantization.compute_dtype=fp32"), torch.float32)
    modules, found = learned(model, batch), calls()
    own = learned(model, batch)
    assert len(found) == model.config.text_config.num_hidden_layers
    for part, other, expected in zip(own, modules, exact, strict=True):
        error, others = ((one - expected).norm() / expected.norm() for one in (part, other))
        assert error < 1.2 * others < 0.2


def test_what_is_kept_changes_no_bit_of_the_gradient(small_config, calls):
    count, results = calls(), []
    for more in ("false", "true memory.kept_layers=0", "true memory.kept_layers=2"):
        results.append(learned(*whole_model(small_config, f"lora.dropout=0.1 memory.gradient_checkpointing={more}")))
    assert len(count) == 3 * 6
    for losses, gradient in results[1:]:
        assert torch.equal(losses, results[0][0]) and torch.equal(gradient, results[0][1])


def test_sizes_without_kernels_are_left_to_the_modules(small_config, monkeypatch):
    layer, _ = adapted_layer(small_config, "lora.r=257 lora.target_modules=[o_proj]")
    assert fused.make_operation(layer) is None
    layer, _ = adapted_layer(small_config, "lora.r=256 lora.target_modules=[o_proj]")
    assert fused.make_operation(layer).groups["o"].rank == 256
    monkeypatch.setattr(layer.self_attn, "head_dim", 80)
    assert fused.make_operation(layer) is None


def test_calls_that_the_operation_does_not_do_are_left_to_the_modules(small_config, monkeypatch):
    monkeypatch.setattr(fused, "can_compile", lambda device: True)
    model, _ = whole_model(small_config, "")
    layer, hidden = model.get_base_model().model.language_model.layers[0], torch.randn(1, 4, 256)
    more = {"position_embeddings": None, "attention_mask": None, "position_ids": None, "cache": None}
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.as_one(layer, hidden, more)
        assert not fused.as_one(layer, hidden.bfloat16(), more)
        assert not fused.as_one(layer, hidden, more | {"cache": object()})
        assert not fused.as_one(layer, hidden, more | {"attention_mask": torch.zeros(1, 1, 4, 4)})
        seen, two = torch.ones(1, 1, 4, 4, dtype=torch.bool), hidden.expand(2, -1, -1)
        assert fused.as_one(layer, hidden, more | {"attention_mask": seen})
        assert not fused.as_one(layer, two, more | {"attention_mask": seen})  # of one sequence only
        assert fused.as_one(layer, two, more | {"attention_mask": seen.expand(2, -1, -1, -1)})
        with model.disable_adapter():
            assert not fused.as_one(layer, hidden, more)
        with rescale_adapter_scale(model, 0.5):
            assert not fused.as_one(layer, hidden, more)
        hook = layer.mlp.register_forward_hook(lambda *_: None)
        assert not fused.as_one(layer, hidden, more)
        hook.remove()
        assert fused.as_one(layer, hidden, more)
    with torch.autocast("cpu", torch.float16):
        assert not fused.as_one(layer, hidden, more)  # the weights are in bf16
    assert not fused.as_one(layer, hidden, more)  # fp32
    fused.unfuse(model.get_base_model())
    assert type(layer).__module__ != fused.__name__
