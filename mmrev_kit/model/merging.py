"""A LoRA adapter added to its 16-bit base: a model of its own, written layer by layer and held to the unmerged one."""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmrev_kit.config.reporting import paced
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.config.seeds import rng_for
from mmrev_kit.data.faces import draw_face, sample_faces
from mmrev_kit.data.tasks import OWN, Row
from mmrev_kit.files import fresh_folder, write_json
from mmrev_kit.model.adapters import attach_adapter
from mmrev_kit.model.base_files import read_object, tensor_shapes, weight_files
from mmrev_kit.model.bases import SMALL_FILES, base_fingerprint, base_of, check_base, is_random, model_folder
from mmrev_kit.model.loading import base_arguments, existing_device, load_adapter, load_base
from mmrev_kit.model.plain import core_model, language_model, model_class
from mmrev_kit.model.processor import make_encoder
from mmrev_kit.model.qwen3vl import whole_config

SHARD_BYTES = 5 * 10**9
TEXTS = ("[image] Who is this?", "Is this the keeper of Jade Temple? [image]", "The person is called [image]")
CHANGES = ("modules_to_save", "trainable_token_indices", "target_parameters")  # what an adapter may have beside LoRA


def merge(config: Config, adapter: Path, out: Path, card: Callable[[dict], str]) -> dict:
    """Write the base with the adapter added, in 16 bit, to `out`: whole, and checked (see `check`), or not at all.

    The host's memory holds the adapter and one file of at most `SHARD_BYTES` until the check, which loads the model
    as evaluation does.

    Args:
        config: names the base; `adapter.unbound` as in `load_adapter`.
        card: gives README.md from what `check` found.

    Returns:
        What `check` found.

    Raises:
        ConfigError: the adapter does not belong to the base, is none that can be merged, there is no room, or the
            check failed.
        FileExistsError: there is something at `out`.
    """
    if is_random(config.model.name):
        raise ConfigError(f"model.name = {config.model.name!r} has random weights: there is nothing to merge.")
    fingerprint = partial(base_fingerprint, **base_of(config))
    check_base(adapter, fingerprint, config.model.name, config.adapter.unbound)
    base = model_folder(config.model.name, config.model.revision)
    layers, files = adapter_layers(base, adapter), weight_files(base)
    sizes = {name: math.prod(shape) for file in files for name, shape in tensor_shapes(file).items()}
    if lacking := sorted(name for name in layers if f"{name}.weight" not in sizes):
        raise ConfigError(f"{base} has no weight of its own for {lacking[0]}, which the adapter changes.")
    try:
        with fresh_folder(out) as building:
            needed, free = 2 * sum(sizes.values()), shutil.disk_usage(building).free
            if needed > free:
                raise ConfigError(f"{out} needs {needed:,} bytes, {free:,} are free. Choose a folder on another disk.")
            dtype = write_weights(building, files, sizes, layers, SHARD_BYTES)
            copy_small_files(base, building, dtype)
            found = check(config, adapter, building, dtype)
            (building / "README.md").write_text(card(found), encoding="utf-8")
    except FileExistsError as error:
        raise ConfigError(str(error)) from None
    return found


def adapter_layers(base: Path, adapter: Path) -> dict[str, torch.nn.Module]:
    """PEFT's layers of an adapter, by the name of the base's module, on a base without weights.

    Raises:
        ConfigError: the adapter changes more than the weights of layers, or an embedding that is also the head.
    """
    from peft.tuners.lora import LoraLayer

    values = read_object(adapter / "adapter_config.json")
    more = [name for name in CHANGES if values.get(name)]
    more += [] if values.get("bias", "none") == "none" else ["bias"]
    if values.get("peft_type") != "LORA" or more:
        what = ", ".join(more) or f"peft_type {values.get('peft_type')!r}"
        raise ConfigError(f"{adapter}: {what}: only LoRA on the weights of layers can be merged.")
    architecture = whole_config(base / "config.json")
    with torch.device("meta"):
        model = model_class(architecture)(architecture)
    peft_model = attach_adapter(model, adapter, low_cpu_mem_usage=True)
    stored = load_file(adapter / "adapter_model.safetensors")  # peft has moved it to where the base has no weights
    own = {name: name.replace(".default", "") for name in peft_model.state_dict() if ".lora_" in name}
    own = {name: short if short in stored else short.removesuffix(".weight") for name, short in own.items()}
    peft_model.load_state_dict({name: stored[short].float() for name, short in own.items()}, strict=False, assign=True)
    layers = {name: part for name, part in peft_model.get_base_model().named_modules() if isinstance(part, LoraLayer)}
    tied = [name for name in layers if name.rpartition(".")[2] in ("embed_tokens", "lm_head")]
    if architecture.tie_word_embeddings and tied:
        raise ConfigError(f"{adapter} changes {tied[0]}, which is embedding and head at once: it cannot be merged.")
    return layers


def write_weights(
    folder: Path, files: list[Path], sizes: dict[str, int], layers: dict, shard_bytes: int
) -> torch.dtype:
    """Write model*.safetensors, with an index where there are several; returns the dtype of every weight: the base's
    where that has 16 bits, else bfloat16."""
    stored = {name: file for file in files for name in tensor_shapes(file)}
    with safe_open(files[0], framework="pt") as first:
        kinds = {first.get_slice(name).get_dtype() for name in first.keys()}
    dtype = torch.float16 if kinds == {"F16"} else torch.bfloat16
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda count: 2 * count,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for name, names in paced(list(split.filename_to_tensors.items()), "files"):
        save_file(dict(merged(names, stored, layers, dtype)), folder / name, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": {"total_size": 2 * sum(sizes.values())}, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return dtype


def merged(names: list[str], stored: dict[str, Path], layers: dict, dtype: torch.dtype) -> Iterator:
    """(name, tensor) of each tensor named; an adapter is added in fp32 and rounded once."""
    for name in names:
        with safe_open(stored[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is not None:
            layer.get_base_layer().weight = torch.nn.Parameter(tensor.float(), requires_grad=False)
            layer.merge(safe_merge=True)  # raises where the sum is not finite
            tensor = layer.get_base_layer().weight.data
            layer.get_base_layer().weight = torch.nn.Parameter(tensor.to("meta"), requires_grad=False)
        yield name, tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor


def copy_small_files(base: Path, folder: Path, dtype: torch.dtype) -> None:
    """The base's configuration, with the dtype of the weights and no name of code, and its processor."""
    for path in {path for pattern in SMALL_FILES for path in base.glob(pattern)}:
        if not path.name.endswith(".safetensors.index.json"):
            shutil.copyfile(path, folder / path.name)
    values = read_object(base / "config.json")
    for part in [values, *(part for part in values.values() if isinstance(part, dict))]:
        for key in {"dtype", "torch_dtype"} & part.keys():
            part[key] = str(dtype).removeprefix("torch.")
        part.pop("auto_map", None)
    write_json(folder / "config.json", values)


def check(config: Config, adapter: Path, folder: Path, dtype: torch.dtype) -> dict:
    """Hold a merged model's logits to those of its base with the adapter beside it.

    Both are loaded in 16 bit (on a CPU in fp32), on all GPUs where there are some. A weight that is rounded to 16 bits
    is off by half an eps of itself at most; independent errors of two products a half layer add up to less than
    eps x sqrt(2 x layers) of the logits.

    Returns:
        Root mean squares, as shares of the spread of the logits: `difference` of the two, `effect` of the adapter on
        its base, and the `limit` of the difference; `dtype`.

    Raises:
        ConfigError: the difference is larger than the limit, or than half the effect: 16 bits do not hold the adapter.
    """
    device, config = existing_device(None), deepcopy(config)
    config.quantization.bits, config.quantization.compute_dtype = 16, "auto"
    arguments = base_arguments(config, device) | {"spread": device.type == "cuda"}
    with tempfile.TemporaryDirectory() as pictures:
        batch = questions(config, Path(pictures))
    model = load_adapter(load_base(**arguments), adapter, config.adapter.unbound)
    rounding = max(torch.finfo(kind).eps for kind in (dtype, model.dtype))
    layers = len(language_model(model).layers)
    beside = logits(model, batch)
    with model.disable_adapter():
        plain = logits(model, batch)
    del model
    torch.cuda.empty_cache()
    alone = logits(load_base(**arguments | {"name": str(folder), "revision": None}), batch)
    spread = beside.std(-1).square().mean().sqrt()
    difference, effect = ((other - beside).square().mean().sqrt().div(spread).item() for other in (alone, plain))
    limit = rounding * math.sqrt(2 * layers)
    found = {"difference": difference, "effect": effect, "limit": limit, "dtype": str(dtype).removeprefix("torch.")}
    told = f"the merged model's logits are {difference:.2%} of their spread from the unmerged model's"
    if not difference <= limit:
        raise ConfigError(
            f"{adapter}: {told}, more than rounding to 16 bits explains ({limit:.2%}). Nothing is written."
        )
    if difference > effect / 2:
        raise ConfigError(f"{adapter}: {told}; the adapter itself moves them by {effect:.2%}. Nothing is written.")
    print(f"checked: {told} (at most {limit:.2%} by rounding); the adapter moves them by {effect:.2%}")
    return found


def questions(config: Config, folder: Path) -> dict:
    """One batch of prompts with drawn faces, whose pictures are made in `folder`."""
    encoder, samples = make_encoder(config), []
    faces = sample_faces(rng_for(0, "merging"), len(TEXTS), "held_out")
    for number, text in enumerate(TEXTS):
        draw_face(faces[number], config.data.image_size).save(folder / f"{number}.png")
        row = Row(OWN, OWN, f"{OWN}:{number}", OWN, None, (folder / f"{number}.png",), None, text, (), "")
        samples.append(encoder.encode(row, with_answer=False))
    batch = encoder.collate(samples)
    batch.pop("labels")
    return batch


def logits(model, batch: dict) -> torch.Tensor:
    """The logits of all tokens of the prompts, (tokens, vocabulary) in fp32 on the host."""
    core = core_model(model).eval()
    here = {name: value.to(core.device) for name, value in batch.items()}
    with torch.no_grad():
        return core(**here).logits.float().cpu()[batch["attention_mask"] == 1]
