"""A base model's files, refused in one sentence where they are missing, cut, or of a kind that the kit cannot train."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mmrev_kit.config.sections import ConfigError

FAMILY = "qwen3_vl"  # which has a module of its own
AGAIN = "Download or copy it again."
# What publishers add to a model's name when they quantize it.
QUANTIZED = re.compile(r"(-unsloth)?[-_](FP8|NVFP4|MXFP\d|AWQ|GPTQ|bnb|W\d+A\d+|Int\d|\d-?bits?)\b.*$", re.IGNORECASE)


def read_object(path: Path) -> dict:
    """The object that a JSON file holds.

    Raises:
        ConfigError: no such file, not JSON, or another value than an object.
    """
    if not path.is_file():
        raise ConfigError(f"{path.parent} has no {path.name}. {AGAIN}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}). {AGAIN}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__} where a JSON object belongs. {AGAIN}")
    return values


def read_config(path: Path, name: str) -> dict:
    """A base model's config.json, or an architecture file.

    Args:
        name: the model's, from which the one that it was quantized from may be told.

    Raises:
        ConfigError: see `read_object`; the model answers no images and texts with texts, or is already quantized.
    """
    values = read_object(path)
    family = values.get("model_type", FAMILY)
    if family != FAMILY:
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

        if family not in KNOWN:
            raise ConfigError(
                f"model.name: {path} has model_type = {family!r}, which transformers knows as no model that answers "
                "pictures and texts with text. Name a vision-language model."
            )
    for part in ("text_config", "vision_config") if family == FAMILY else ():
        if not isinstance(values.get(part), dict):
            raise ConfigError(f"model.name: {path} has no {part}. {AGAIN}")
    quantized = values.get("quantization_config") or dict(values.get("text_config") or {}).get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else quantized
        original = QUANTIZED.sub("", name)
        instead = original if original != name else "the one that it was made from, which its model card names"
        raise ConfigError(
            f"model.name = {name!r} is already quantized ({method}), and the kit quantizes 16-bit weights by itself. "
            f"Take the 16-bit model: {instead}."
        )
    return values


def family_in(path: Path, name: str = "") -> str:
    """transformers' word for the family of a model, its `model_type`, in a config.json or an architecture file.

    Raises:
        ConfigError: see `read_config`.
    """
    return read_config(path, name or path.parent.name).get("model_type", FAMILY)


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a safetensors file; only its header is read.

    Raises:
        ConfigError: the file is cut, or its header is broken.
    """
    try:
        with safe_open(file, framework="np") as stored:
            return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is not a whole safetensors file ({error}). {AGAIN}") from None


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads a model's weights from: model.safetensors, or all that its index names.

    Raises:
        ConfigError: there are none, or one is missing or broken.
    """
    names, index = {"model.safetensors"}, folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        places = read_object(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ConfigError(f"{index} has no weight_map. {AGAIN}")
        names = set(map(str, places.values()))
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise ConfigError(f"{folder} lacks {', '.join(missing)}; only safetensors files are read. Download it again.")
    files = [folder / name for name in sorted(names)]
    for file in files:
        tensor_shapes(file)
    return files


def refuse_tensors(where: str, missing: Iterable[str], unexpected: Iterable[str], reshaped: Iterable[str]) -> None:
    """Raises ConfigError where there are such tensors, with the first three names of each kind."""
    faults = []
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)):
        if first := sorted(names):
            more = f" and {len(first) - 3} more" if len(first) > 3 else ""
            faults.append(f"{kind}: {', '.join(first[:3])}{more}")
    if faults:
        raise ConfigError(f"The tensors in {where} are not those that its configuration asks for; {'; '.join(faults)}.")
