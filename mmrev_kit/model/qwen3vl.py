"""What is Qwen3-VL's own: its vision features, its positions, its architecture file."""

from difflib import get_close_matches
from inspect import signature
from pathlib import Path

import torch

from mmrev_kit.config.project import EMBEDDED_MODEL, resolve
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.model.base_files import FAMILY, read_config, read_object
from mmrev_kit.model.plain import core_model

TOKENS = {  # by the names that a config.json gives their numbers
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def read_architecture(name: str):
    """The architecture file of a random model as transformers' configuration; a Qwen3-VL's has the special tokens of
    the embedded tokenizer.

    Raises:
        ConfigError: there is no such file, or it is not one of a model in 16 bit, see `read_config`.
    """
    from transformers import AutoTokenizer

    path = resolve(name)
    if not path.is_file():
        raise ConfigError(f"model.name = {name!r}: there is no such architecture file.")
    values = read_config(path, name)
    if values.get("model_type", FAMILY) == FAMILY:
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
        values |= {key: tokenizer.convert_tokens_to_ids(token) for key, token in TOKENS.items()}
    return whole_config(path, values)


def whole_config(path: Path, values: dict | None = None):
    """transformers' configuration of a config.json that `read_config` takes; `values`: instead of what is in it.

    Raises:
        ConfigError: a value of another type; or, in a Qwen3-VL's, no rope_theta, or a name that transformers does not
            know, beside one that is not given and is nearly called so: a default would be used without a word.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    values = values or read_object(path)
    family = values.get("model_type", FAMILY)
    try:
        config = CONFIG_MAPPING[family](**{"model_type": family} | values)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ConfigError(f"{path} is no configuration of a {family} ({' '.join(str(error).split())}).") from None
    if family != FAMILY:
        return config
    default, text, vision = CONFIG_MAPPING[FAMILY](), values["text_config"], values["vision_config"]
    for given, known in ((values, default), (text, default.text_config), (vision, default.vision_config)):
        names = known.to_dict().keys()
        for name in given.keys() - names:
            if near := get_close_matches(name, names - given.keys(), 1, 0.8):
                raise ConfigError(f"{path} has the field {name!r}, which is not known; {near[0]} is. Rename it.")
    if "rope_theta" not in text | (text.get("rope_scaling") or {}) | (text.get("rope_parameters") or {}):
        raise ConfigError(f"{path} has no rope_theta in its text_config: copy it anew.")
    return config


def takes_features(model) -> bool:
    """Whether the model's forward pass accepts precomputed vision features."""
    return "mm_encoder_outputs" in signature(core_model(model).forward).parameters


def feature_shape(model) -> tuple[int, int]:
    """(1 + DeepStack layers, hidden): what `library_tower_outputs` gives for a visual token."""
    vision = core_model(model).config.vision_config
    return 1 + len(vision.deepstack_visual_indexes), vision.out_hidden_size


def library_tower_outputs(model, pixel_values, grid) -> list:
    """The vision tower's outputs for a batch of images.

    Returns:
        One (1 + DeepStack layers, visual tokens, hidden) tensor an image: what takes the place of its tokens, then
        what is added after the first layers.
    """
    out = core_model(model).model.get_image_features(pixel_values, grid)
    return [torch.stack(parts) for parts in zip(out.pooler_output, *out.deepstack_features, strict=True)]


def as_model_input(features: list, device) -> dict:
    """Features of images, in the order of their tokens, as a keyword argument of the model's forward pass."""
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
    outputs = BaseModelOutputWithDeepstackFeatures(pooler_output=[joined[0]], deepstack_features=layers)
    return {"mm_encoder_outputs": {"image": outputs}}


def drop_tower(model) -> None:
    """Take the vision tower off the GPU: it is frozen, and every feature that a run needs has been made."""
    core = core_model(model).model
    if next(core.visual.parameters()).device.type == "cuda":
        core.visual = None
        torch.cuda.empty_cache()


def prompt_positions(model, batch: dict):
    """The M-RoPE positions of a padded batch with images, (3, samples, tokens)."""
    names = ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")
    return core_model(model).model.get_rope_index(**{name: batch[name] for name in names})[0]


def positions_after(positions, count: int):
    """The M-RoPE positions (3, samples, count) of text that follows a prompt with `positions`."""
    following = positions.amax(dim=(0, 2))[:, None] + 1
    return (following + torch.arange(count, device=positions.device))[None].expand(3, -1, -1)


def row_positions(input_ids, grids: list[tuple[int, int]], image_id: int):
    """The M-RoPE positions of a row, (3, tokens) integers: time, height, width, as `get_rope_index` gives them.

    Args:
        input_ids: of the row; every visual token is an `image_id`.
        grids: visual tokens (rows, columns) of each image.
    """
    import numpy

    ids = numpy.asarray(input_ids)
    positions = numpy.empty((3, len(ids)), dtype=numpy.int64)
    start, token = 0, 0  # the next position, the next token
    marks = numpy.flatnonzero(ids == image_id)
    for rows, columns in grids:
        first = int(marks[0])
        positions[:, token:first] = numpy.arange(start, start + first - token)
        start += first - token
        token = first + rows * columns
        positions[0, first:token] = start
        positions[1, first:token] = start + numpy.repeat(numpy.arange(rows), columns)
        positions[2, first:token] = start + numpy.tile(numpy.arange(columns), rows)
        start += max(rows, columns)
        marks = marks[rows * columns :]
    positions[:, token:] = numpy.arange(start, start + len(ids) - token)
    return positions
