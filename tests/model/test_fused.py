"""Fused modules against the libraries' own."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, DynamicCache
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextAttention,
    Qwen3VLTextMLP,
    Qwen3VLTextRMSNorm,
    Qwen3VLTextRotaryEmbedding,
)

from mmrev_kit.config.project import EMBEDDED_MODEL
from mmrev_kit.model import kernels
from mmrev_kit.model.fused import classes, fuse, fused_class, takes_wanted, unfuse
from mmrev_kit.model.kernels import can_compile
from mmrev_kit.model.loading import adapter_arguments, add_adapter, base_arguments, load_base, trainable
from mmrev_kit.training.run import prepare
from mmrev_kit.training.update import sample_losses

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
    module.requires_grad_(False)
    answers = []
    for kind in (type(module), classes()[type(module)]):
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


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03), (torch.float16, 0.005)])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_the_librarys(dtype, close, masked):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(EMBEDDED_MODEL).text_config
    config._attn_implementation = "sdpa"
    own = Qwen3VLTextAttention(config, 0).to(dtype).requires_grad_(False)
    for norm in (own.q_norm, own.k_norm):
        norm.weight.data = (1 + 0.3 * torch.randn(config.head_dim)).to(dtype)
    values, gradient = (torch.randn(2, 9, config.hidden_size).to(dtype) for _ in range(2))
    places = torch.randint(0, 50, (3, 2, 9))  # time, height and width differ
    positions = Qwen3VLTextRotaryEmbedding(config)(values, places)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril() if masked else None
    found = []
    for kind in (Qwen3VLTextAttention, classes()[Qwen3VLTextAttention]):
        own.__class__ = kind
        given = values.clone().requires_grad_()
        out, _ = own(given, position_embeddings=positions, attention_mask=mask)
        out.backward(gradient)
        found.append((out.detach().float(), given.grad.float()))
    for expected, ours in zip(*found, strict=True):
        assert (ours - expected).abs().max() <= close * expected.abs().max()


def test_attention_with_dropout_stays_the_librarys():
    config = AutoConfig.from_pretrained(EMBEDDED_MODEL).text_config
    own = Qwen3VLTextAttention(config, 0).requires_grad_(False)
    assert fused_class(own) is classes()[Qwen3VLTextAttention]
    own.attention_dropout = 0.1
    assert fused_class(own) is None


def test_attention_with_a_cache_is_the_librarys():
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(EMBEDDED_MODEL).text_config
    config._attn_implementation = "sdpa"
    own, found = Qwen3VLTextAttention(config, 0).requires_grad_(False), []
    values = torch.randn(1, 6, config.hidden_size)
    positions = Qwen3VLTextRotaryEmbedding(config)(values, torch.arange(6).expand(3, 1, 6))
    for kind in (Qwen3VLTextAttention, classes()[Qwen3VLTextAttention]):
        own.__class__, cache, parts = kind, DynamicCache(config=config), []
        for start, end in ((0, 5), (5, 6)):
            place = tuple(part[:, start:end] for part in positions)
            parts.append(own(values[:, start:end], place, None, cache=cache)[0])
        found.append(torch.cat(parts, 1))
    assert (found[1] - found[0]).abs().max() < 2e-6 * found[0].abs().max()


def lora_layer(four: bool, dropout: float):
    """A PEFT layer with random numbers in both of its matrices, 24 in, 40 out."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False))
    if four:
        from bitsandbytes.nn import Linear4bit

        new = Linear4bit(24, 40, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        new.load_state_dict(layer[0].state_dict())
        layer[0], layer.is_loaded_in_4bit = new.to("cpu"), True
        layer.config = None
    model = get_peft_model(layer, LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=["0"]))
    for parameter in trainable(model):
        torch.nn.init.normal_(parameter, std=0.3)
    return model.base_model.model[0]


@pytest.mark.parametrize("four", [True, False])
@pytest.mark.parametrize(("dropout", "kind"), [(0.0, "cpu"), (0.25, "cpu"), (0.25, "cuda")])
def test_a_lora_layer_is_pefts_with_the_same_mask(four, dropout, kind, monkeypatch):
    """With kind cuda by the lines that GPUs take: native dropout's mask, and no product kept."""
    stock = lora_layer(four, dropout).train()
    own = deepcopy(stock)
    own.__class__ = fused_class(own)
    assert type(own).__mro__[1] is type(stock) and type(stock).__name__ == ("Linear4bit" if four else "Linear")
    mask = torch.rand(2, 7, 24) > dropout
    monkeypatch.setattr(kernels, "kept", lambda shape, p, dtype: (mask.view(shape).to(dtype), 1 / (1 - p)))
    if kind == "cuda":
        flat, factor = mask.view(-1, 24), 1 / (1 - dropout)
        monkeypatch.setattr(kernels, "drop", lambda rows, p: (rows * flat * factor, flat, factor, 1.0))
    if dropout:
        stock.lora_dropout["default"].forward = lambda x: x * mask / (1 - dropout)
    gradient, found = torch.randn(2, 7, 40), []
    for layer in (stock, own):
        values = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = layer(values)
        out.backward(gradient)
        found.append((out.detach(), values.grad, *(part.grad for part in trainable(layer))))
    assert len(found[0]) == 4
    for expected, ours in zip(*found, strict=True):
        assert expected.abs().max() > 0.1
        assert (ours - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lora_layer_under_autocast_is_pefts(dtype):
    stock = lora_layer(False, 0.0).train()
    stock.base_layer.to(dtype)
    own, found = deepcopy(stock), []
    own.__class__ = fused_class(own)
    values, gradient = torch.randn(5, 24).to(dtype), torch.randn(5, 40).to(dtype)
    for layer in (stock, own):
        given = values.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            out = layer(given)
        out.backward(gradient)
        found.append((out.detach(), given.grad, *(part.grad for part in trainable(layer))))
    for expected, ours in zip(*found, strict=True):
        assert ours.dtype == expected.dtype
        assert (ours.float() - expected.float()).abs().max() < 0.03 * expected.float().abs().max()


def test_a_lora_layer_leaves_to_peft_what_it_does_not_do():
    stock = lora_layer(False, 0.0).eval()
    own = deepcopy(stock)
    own.__class__ = fused_class(own)
    values = torch.randn(3, 24)
    assert not torch.equal(own(values), own.base_layer(values))
    for layer in (stock, own):
        layer.enable_adapters(False)
    assert torch.equal(own(values), own.base_layer(values)) and torch.equal(own(values), stock(values))
    for layer in (stock, own):
        layer.enable_adapters(True)
        layer.merge()
    assert torch.equal(own(values), stock(values))
    biased = lora_layer(False, 0.0)
    biased.base_layer.bias = torch.nn.Parameter(torch.ones(40), requires_grad=False)
    assert fused_class(biased) is None


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_keeps_each_number_with_its_probability(p):
    torch.manual_seed(3)
    mask, factor = kernels.kept(torch.Size((1001, 401)), p, torch.float32)
    assert mask.shape == (1001, 401) and factor == pytest.approx(1 / (1 - p), rel=2e-4)
    parts = [mask.flatten()[lane::4].float() for lane in range(4)]  # the four numbers of a draw
    for part in parts:
        assert float(part.mean()) == pytest.approx(1 - p, abs=5 * (p * (1 - p) / len(part)) ** 0.5)
    together = torch.corrcoef(torch.stack([part[: len(parts[3])] for part in parts]))
    assert (together - torch.eye(4)).abs().max() < 5 / len(parts[3]) ** 0.5
    torch.manual_seed(3)
    assert torch.equal(kernels.kept(torch.Size((1001, 401)), p, torch.float32)[0], mask)


@pytest.mark.parametrize("more", ["", "quantization.bits=16 memory.gradient_checkpointing=true"])
def test_a_model_learns_the_same(small_config, more):
    config = small_config(f"lora.dropout=0 {more}")
    torch.manual_seed(0)
    model = add_adapter(load_base(**base_arguments(config, CPU)), **adapter_arguments(config)).train()
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


def test_the_last_mlp_sees_only_what_predicts_an_answer(small_config):
    """One row's losses are those that it has with every other token's MLP, as a test above shows for its gradient."""
    config = small_config()
    model = load_base(**base_arguments(config, CPU))
    task, seen = prepare(config), []
    batch = task.encoder.collate([sample for rows in task.train.values() for sample in rows[:3]])
    for place in (-2, -1):
        model.model.language_model.layers[place].mlp.register_forward_hook(lambda m, given, out: seen.append(out.shape))
    losses = []
    for change in (fuse, unfuse):
        change(model)
        assert takes_wanted(model) == (change is fuse)
        with torch.no_grad():
            losses.append(sample_losses(model, batch, CPU, torch.float32))
    answers = int((batch["labels"] != -100).sum())
    every = (*batch["input_ids"].shape, 256)
    assert seen == [every, (1, answers, 256), every, every] and answers < every[0] * every[1] / 2
    assert (losses[0] - losses[1]).abs().max() < 1e-6 * losses[1].abs().max()
    fuse(model)
    model.config.vision_config.deepstack_visual_indexes = list(range(6))
    assert not takes_wanted(model)  # DeepStack adds to every token of each of its layers


def test_only_frozen_modules_of_the_librarys_own_forward_are_fused(small_config):
    base = load_base(**base_arguments(small_config(), CPU))
    norms = [module for module in base.model.language_model.modules() if isinstance(module, Qwen3VLTextRMSNorm)]
    assert len(norms) == 4 * len(base.model.language_model.layers) + 1
    assert all(type(norm) is classes()[Qwen3VLTextRMSNorm] for norm in norms)
    unfuse(base)
    norms[0].weight.requires_grad_(True)
    norms[1].forward = norms[1].forward  # as accelerate's hooks do
    fuse(base)
    assert [type(norm) is classes()[Qwen3VLTextRMSNorm] for norm in norms] == [False, False] + [True] * (len(norms) - 2)


def test_a_cpu_runs_the_lines_as_they_are():
    assert not can_compile(CPU)


@pytest.mark.parametrize(("capability", "can"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_kernels_are_made_for_cards_from_compute_capability_8_on(monkeypatch, capability, can):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert can_compile.__wrapped__(torch.device("cuda")) is can
