"""What is Qwen3-VL's own: its parts by name, its positions, its architecture file."""

from __future__ import annotations

import json
from inspect import signature

from mmrev_kit.config.project import EMBEDDED_MODEL, resolve
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.data.prompts import Sample


def read_architecture(config: Config):
    """The architecture file of a random model as a `Qwen3VLConfig`, with the special tokens of the embedded tokenizer.

    Raises:
        ConfigError: there is no such file.
    """
    from transformers import AutoTokenizer, Qwen3VLConfig

    path = resolve(config.model.name)
    if not path.is_file():
        raise ConfigError(f"model.name = {config.model.name!r}: there is no such architecture file.")
    values = json.loads(path.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names]
    return Qwen3VLConfig(**values | dict(zip(keys, ids, strict=True)))


def core_model(model):
    """The transformers model inside an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def takes_features(model) -> bool:
    """Whether the model's forward pass accepts precomputed vision features."""
    return "mm_encoder_outputs" in signature(core_model(model).forward).parameters


def tower_outputs(model, pixel_values, grid) -> list:
    """The vision tower's outputs for a batch of images.

    Returns:
        One (1 + DeepStack layers, visual tokens, hidden) tensor an image: what takes the place of its tokens, then
        what is added after the first layers.
    """
    import torch

    out = core_model(model).model.get_image_features(pixel_values, grid)
    return [torch.stack(parts) for parts in zip(out.pooler_output, *out.deepstack_features, strict=True)]


def as_model_input(features: list, device) -> dict:
    """Features of images, in the order of their tokens, as the model's `mm_encoder_outputs`."""
    import torch
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    if device.type == "cuda":  # through pinned memory, which PyTorch keeps for the next time: nothing waits for it
        parts, _, width = features[0].shape
        pinned = torch.empty(
            parts, sum(part.shape[1] for part in features), width, dtype=features[0].dtype, pin_memory=True
        )
        joined = torch.cat(features, dim=1, out=pinned).to(device, non_blocking=True)
    else:
        joined = torch.cat(features, dim=1)
    layers = [[part] for part in joined[1:]]
    return {"image": BaseModelOutputWithDeepstackFeatures(pooler_output=[joined[0]], deepstack_features=layers)}


def row_positions(sample: Sample, grids: list[tuple[int, int]], image_id: int):
    """The M-RoPE positions of a row, (3, tokens) integers: time, height, width, as `get_rope_index` gives them."""
    import numpy

    ids = numpy.asarray(sample.input_ids)
    positions = numpy.empty((3, len(ids)), dtype=numpy.int64)
    start, place = 0, 0  # the next position, the next token
    marks = numpy.flatnonzero(ids == image_id)
    for rows, columns in grids:
        first = int(marks[0])
        positions[:, place:first] = numpy.arange(start, start + first - place)
        start += first - place
        place = first + rows * columns
        positions[0, first:place] = start
        positions[1, first:place] = start + numpy.repeat(numpy.arange(rows), columns)
        positions[2, first:place] = start + numpy.tile(numpy.arange(columns), rows)
        start += max(rows, columns)
        marks = marks[rows * columns :]
    positions[:, place:] = numpy.arange(start, start + len(ids) - place)
    return positions
