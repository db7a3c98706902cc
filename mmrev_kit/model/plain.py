"""What every image-text-to-text model of transformers has, by the library's own names: the plain path needs no more.

On the plain path the library's modules run as they are on padded rows: nothing is packed, no vision features are kept
and no operations are joined. The fast path belongs to families that have a module of their own (`qwen3vl.py`).
"""

import re
from pathlib import Path

import torch

from mmrev_kit.config.sections import ConfigError
from mmrev_kit.model.base_files import FAMILY, family_in

ATTENTION = "q_proj, k_proj, v_proj, o_proj"
# The `lora.target_modules` with which attention is adapted in every layer of the language model. Three of four layers
# of Qwen3.5 have linear attention, with projections of other names.
LORA_TARGETS = {
    "qwen3_vl": ATTENTION,
    "qwen2_5_vl": ATTENTION,
    "qwen3_5": f"{ATTENTION}, in_proj_qkv, in_proj_z, out_proj",
    "smolvlm": ATTENTION,
    "internvl": ATTENTION,
}


def describe_path(path: Path, targets: list[str]) -> list[str]:
    """Plain lines: which path the model of a config.json takes, why, and what follows.

    Args:
        targets: the configured `lora.target_modules`.
    """
    family = family_in(path)
    if family == FAMILY:
        return [f"path: fast ({family} has a module of its own)"]
    lines = [
        f"path: plain ({family} has no module of its own): the library's modules on padded rows; training.packing, "
        "memory.cache_features and memory.plan are of no effect; the memory estimate knows Qwen3-VL only, "
        "mmrev_kit.training.rehearse.rehearse(cfg) measures a few updates"
    ]
    known = LORA_TARGETS.get(family)
    if known and not set(known.split(", ")) <= set(targets):
        lines.append(f"lora.target_modules=[{known}] adapt the attention of every layer of {family}")
    return lines


def core_model(model):
    """The transformers model inside an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def takes_fast_path(model) -> bool:
    """Whether the kit has a module of its own for the model's family."""
    return core_model(model).config.model_type == FAMILY


def language_model(model):
    """The language model without its head: `embed_tokens`, `layers`, `norm`.

    Raises:
        ConfigError: no part of the model has layers where transformers' models have them.
    """
    decoder = core_model(model).get_decoder()
    if not hasattr(decoder, "layers"):
        raise ConfigError(f"{type(core_model(model)).__name__} has no language model with layers to be adapted.")
    return decoder


def text_config(model):
    """The sizes of the language model, under transformers' names."""
    return core_model(model).config.get_text_config()


def projections(model, names) -> str:
    """A regular expression for the linear layers of these names in the language model, and nowhere else."""
    decoder = language_model(model)
    prefix = next(name for name, module in core_model(model).named_modules() if module is decoder)
    return rf"{re.escape(prefix)}\.layers\..*\.({'|'.join(names)})"


def model_class(architecture):
    """transformers' class for a configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(architecture)]


def complete(model, device) -> None:
    """Put in place what a model made on the device `meta` lacks beside its parameters: tied weights, and the buffers
    that no file holds, such as rotary angles, which the library computes where it makes weights anew."""
    model.tie_weights()
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # these the library leaves alone
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    model.initialize_weights()
