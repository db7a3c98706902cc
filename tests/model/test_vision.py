"""The fast vision tower against transformers' own."""

import copy

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from mmrev_kit.config.project import EMBEDDED_MODEL
from mmrev_kit.model.vision import missing_parts, tower_outputs, use_fast_tower

SIZES = {
    "equal": [[1, 8, 8]] * 3,
    "mixed": [[1, 8, 8], [1, 4, 4], [1, 8, 8], [1, 4, 16], [1, 16, 16], [1, 16, 4], [1, 4, 4]],
    "frames": [[3, 4, 8], [1, 8, 8]],
    "one": [[1, 6, 10]],
}


@pytest.fixture(scope="module")
def model():
    """The embedded architecture with random fp32 weights, biases and norms too, so that none is at rest."""
    from transformers import AutoConfig

    torch.manual_seed(1)
    model = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(EMBEDDED_MODEL)).float()
    with torch.no_grad():
        for parameter in model.model.visual.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def pixels_of(grid: torch.Tensor, visual) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    values = visual.patch_embed.proj.weight[0].numel()
    return torch.rand(int(grid.prod(-1).sum()), values, generator=generator) * 2 - 1


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_fast_tower_equals_the_stock_tower_to_1e_5(model, sizes):
    grid = torch.tensor(sizes)
    pixels = pixels_of(grid, model.model.visual)
    fast = copy.deepcopy(model)
    assert use_fast_tower(fast) and use_fast_tower(fast)
    assert type(model.model.visual).__name__ == "Qwen3VLVisionModel"
    with torch.no_grad():
        stock, ours = model.get_image_features(pixels, grid), fast.get_image_features(pixels, grid)
    for a, b in zip(stock.pooler_output, ours.pooler_output, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-5
    assert len(stock.deepstack_features) == len(ours.deepstack_features) == 2
    for a, b in zip(stock.deepstack_features, ours.deepstack_features, strict=True):
        assert all((x - y).abs().max() < 1e-5 for x, y in zip(a, b, strict=True))
    assert (stock.last_hidden_state - ours.last_hidden_state).abs().max() < 1e-5
    hidden, merged, deepstack = tower_outputs(model.model.visual, pixels, grid)
    assert torch.equal(merged, torch.cat(list(ours.pooler_output))) and len(deepstack) == 2
    assert torch.equal(hidden, ours.last_hidden_state)


def test_the_gradients_are_the_stock_towers(model):
    grid = torch.tensor(SIZES["mixed"])
    pixels = pixels_of(grid, model.model.visual)
    found = []
    for fast in (False, True):
        twin = copy.deepcopy(model)
        if fast:
            use_fast_tower(twin)
        out = twin.model.visual(pixels, grid_thw=grid, return_dict=True)
        (out.pooler_output.square().mean() + sum(part.sin().mean() for part in out.deepstack_features)).backward()
        found.append({name: value.grad for name, value in twin.model.visual.named_parameters()})
    assert all(value is not None for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-3, msg=name)


def test_under_autocast_it_is_as_near_to_fp32_as_the_stock_tower(model):
    grid = torch.tensor(SIZES["equal"])
    pixels = pixels_of(grid, model.model.visual)
    fast = copy.deepcopy(model)
    use_fast_tower(fast)
    with torch.no_grad():
        exact = torch.cat(list(model.get_image_features(pixels, grid).pooler_output))
        with torch.autocast("cpu", torch.bfloat16):
            stock = torch.cat(list(model.get_image_features(pixels, grid).pooler_output)).float()
            ours = torch.cat(list(fast.get_image_features(pixels, grid).pooler_output)).float()
    assert (ours - exact).norm() < 1.5 * (stock - exact).norm() + 1e-6


def test_a_tower_of_another_structure_keeps_its_own_forward(model, capsys):
    other = copy.deepcopy(model)
    del other.model.visual.rotary_pos_emb
    assert missing_parts(other.model.visual) == ["rotary_pos_emb"]
    assert not use_fast_tower(other)
    assert type(other.model.visual).__name__ == "Qwen3VLVisionModel"
    assert capsys.readouterr().out.count("\n") == 1


def test_the_whole_model_generates_with_the_fast_tower(model):
    from transformers import AutoProcessor

    from mmrev_kit.data.images import Image

    processor = AutoProcessor.from_pretrained(EMBEDDED_MODEL)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " is"}, {"type": "image"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    images = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (96, 48), "blue")]
    inputs = processor(text=[text], images=images, return_tensors="pt")
    fast = copy.deepcopy(model)
    use_fast_tower(fast)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**inputs, **options), fast.generate(**inputs, **options))
