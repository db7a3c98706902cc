"""Qwen3-VL's vision tower without a Python loop over images.

The stock tower, without flash attention, attends image by image and computes its position table anew at each call.
Here images of equal size are one batch, positions are computed once per size, and the patch embedding, whose
convolution kernels cover one patch each, is a matrix product. The numbers are the same.
"""

from functools import cache

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from mmrev_kit.model.plain import core_model

PARTS = (
    "patch_embed", "pos_embed", "rotary_pos_emb", "blocks", "merger", "deepstack_merger_list", "num_grid_per_side",
    "interpolation_mode", "interpolation_align_corners", "deepstack_visual_indexes", "spatial_merge_size",
)  # fmt: skip
BLOCK_PARTS = ("norm1", "norm2", "attn.qkv", "attn.proj", "attn.num_heads", "attn.scaling", "mlp")
KEPT_SIZES = 256  # image sizes whose positions are kept


def _has(module, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True


def missing_parts(visual) -> list[str]:
    """What a vision tower lacks of the structure that `tower_outputs` computes; empty if it can be used."""
    lacking = [name for name in PARTS if not _has(visual, name)]
    if lacking:
        return lacking
    lacking += [f"blocks.0.{path}" for path in BLOCK_PARTS if not _has(visual.blocks[0], path)]
    if not _has(visual, "patch_embed.proj.weight") or visual.patch_embed.proj.weight.ndim != 5:
        lacking.append("patch_embed.proj, a three-dimensional convolution")
    try:
        from transformers.vision_utils import (  # noqa: F401
            get_vision_interpolation_indices_and_weights,
            get_vision_position_ids,
        )
    except ImportError as error:
        lacking.append(str(error))
    return lacking


def positions(visual, rows: int, columns: int, device):
    """Of one image of rows x columns patches, kept on the tower after the first call.

    Returns:
        indices, weights: (patches, taps), where in the position table and how much of it.
        cos, sin: (patches, head dimension), fp32.
    """
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

    known = visual.__dict__.setdefault("_positions", {})
    key = (rows, columns, str(device))
    if key not in known:
        if len(known) >= KEPT_SIZES:
            known.pop(next(iter(known)))
        merge = visual.spatial_merge_size
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            grid = torch.tensor([[1, rows, columns]], device=device)
            indices, weights = get_vision_interpolation_indices_and_weights(
                grid,
                num_grid_per_side=visual.num_grid_per_side,
                mode=visual.interpolation_mode,
                align_corners=visual.interpolation_align_corners,
                spatial_merge_size=merge,
            )
            position_ids = get_vision_position_ids(grid, merge)
            cos, sin = visual.rotary_pos_emb(torch.zeros(1, device=device), position_ids)
        known[key] = (indices, weights, cos.float(), sin.float())
    return known[key]


def _rotate(states, cos, sin):
    """Rotary positions, in fp32 as the stock tower does."""
    values = states.float()
    left, right = values.chunk(2, dim=-1)
    return (values * cos + torch.cat((-right, left), dim=-1) * sin).to(states.dtype)


def attend(attention, hidden, cos, sin):
    """Attention on (images, patches, hidden), all patches of an image attending to each other."""
    images, patches, _ = hidden.shape
    states = attention.qkv(hidden).view(images, patches, 3, attention.num_heads, -1)
    query, key, value = states.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    mixed = scaled_dot_product_attention(query, key, value, scale=attention.scaling)
    return attention.proj(mixed.transpose(1, 2).reshape(images, patches, -1))


def tower_block(block, hidden, cos, sin):
    """One layer on (images, patches, hidden). Nothing of attention is held any more when the MLP runs."""
    hidden = hidden + attend(block.attn, block.norm1(hidden), cos, sin)
    return hidden + block.mlp(block.norm2(hidden))


def equal_sized(visual, pixels, rows: int, columns: int):
    """The tower on images of one size.

    Args:
        pixels: (images, patches, values), patches in the processor's order.

    Returns:
        hidden (images, patches, hidden), merged (images, tokens, out), and one such tensor a deepstack layer.
    """
    indices, weights, cos, sin = positions(visual, rows, columns, pixels.device)
    images, patches, _ = pixels.shape
    projection = visual.patch_embed.proj
    kernel = projection.weight.view(projection.weight.shape[0], -1)
    hidden = linear(pixels.to(kernel.dtype), kernel, projection.bias)
    table = (visual.pos_embed(indices) * weights[:, :, None]).sum(1)
    hidden = hidden + table.to(hidden.dtype)
    tokens = patches // visual.spatial_merge_size**2
    layers, deepstack = list(visual.deepstack_visual_indexes), []
    for number, block in enumerate(visual.blocks):
        hidden = tower_block(block, hidden, cos, sin)
        if number in layers:
            merger = visual.deepstack_merger_list[layers.index(number)]
            deepstack.append(merger(hidden.flatten(0, 1)).view(images, tokens, -1))
    return hidden, visual.merger(hidden.flatten(0, 1)).view(images, tokens, -1), deepstack


def tower_outputs(visual, pixel_values, grid):
    """What the stock tower returns, for images of any sizes; frames of a video count as images.

    Args:
        visual: a `Qwen3VLVisionModel`, its linear layers of any kind.
        pixel_values: (patches, values) of all images, one after the other.
        grid: (images, 3) integers: frames, rows and columns of patches.

    Returns:
        hidden (patches, hidden), merged (tokens, out), and a list of (tokens, out), one a deepstack layer.
    """
    frames = [(rows, columns) for count, rows, columns in grid.tolist() for _ in range(count)]
    pixels = pixel_values.to(visual.patch_embed.proj.weight.dtype)
    if len(set(frames)) == 1:
        rows, columns = frames[0]
        hidden, merged, deepstack = equal_sized(visual, pixels.view(len(frames), rows * columns, -1), rows, columns)
        return hidden.flatten(0, 1), merged.flatten(0, 1), [part.flatten(0, 1) for part in deepstack]
    pieces = pixels.split([rows * columns for rows, columns in frames])
    outputs: list = [None] * len(frames)
    for size in dict.fromkeys(frames):
        alike = [index for index, other in enumerate(frames) if other == size]
        hidden, merged, deepstack = equal_sized(visual, torch.stack([pieces[index] for index in alike]), *size)
        for number, index in enumerate(alike):
            outputs[index] = (hidden[number], merged[number], *(part[number] for part in deepstack))
    hidden, merged, *deepstack = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return hidden, merged, deepstack


@cache
def _fast_class(stock: type) -> type:
    """The stock class with this module's forward; asked for its inner states, it runs the stock forward."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    def forward(self, hidden_states, grid_thw, **kwargs):
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            return stock.forward(self, hidden_states, grid_thw, **kwargs)
        hidden, merged, deepstack = tower_outputs(self, hidden_states, grid_thw)
        outputs = BaseModelOutputWithDeepstackFeatures(
            last_hidden_state=hidden, pooler_output=merged, deepstack_features=deepstack
        )
        return outputs.to_tuple() if kwargs.get("return_dict") is False else outputs

    return type(f"Fast{stock.__name__}", (stock,), {"forward": forward, "__module__": __name__})


def use_fast_tower(model) -> bool:
    """Let the vision tower of `model`, also of a PEFT model, compute as this module does; weights stay as they are.

    Returns:
        Whether it does now. If not, the stock forward stays and one line says why.
    """
    visual = core_model(model).model.visual
    if type(visual).__name__.startswith("Fast"):
        return True
    lacking = missing_parts(visual)
    if any(hasattr(part, "_hf_hook") for part in visual.modules()):
        lacking.append("weights in one place (they are spread over devices)")
    if lacking:
        print(f"vision: the stock tower is used, which is slower on many images; missing: {', '.join(lacking)}.")
        return False
    visual.__class__ = _fast_class(type(visual))
    return True
