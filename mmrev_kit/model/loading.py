"""A base model in 4 or 16 bit with a LoRA adapter, for training and for answering.

Usable alone; it knows nothing of the kit's data or of its training loop:

    model = load_base("Qwen/Qwen3-VL-8B-Instruct", bits=4)
    model = add_adapter(model, r=8, alpha=16, target_modules=("q_proj", "v_proj"))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-4)
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from mmrev_kit.config import sections
from mmrev_kit.config.project import resolve
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.config.seeds import seed_for
from mmrev_kit.model.adapters import attach_adapter
from mmrev_kit.model.base_files import refuse_tensors
from mmrev_kit.model.bases import base_fingerprint, base_of, check_base, is_random, model_folder
from mmrev_kit.model.finite import refuse_not_finite, sums_of_quantized
from mmrev_kit.model.fused import fuse
from mmrev_kit.model.plain import complete, language_model, model_class, projections, takes_fast_path, text_config
from mmrev_kit.model.qwen3vl import read_architecture, whole_config
from mmrev_kit.model.strict import strict
from mmrev_kit.model.vision import use_fast_tower

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def torch_dtype(name: str, device) -> torch.dtype:
    """The dtype of matrix products on `device`: fp16, bf16 or fp32 as named; `auto` is bf16 where the GPU has it, else
    fp16, and fp32 on a CPU."""
    if name not in (*DTYPES, "auto"):
        raise ConfigError(f"compute_dtype = {name!r}: must be one of {', '.join(DTYPES)}, auto.")
    if name != "auto":
        return DTYPES[name]
    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


@strict()
def load_base(
    name: str, *, revision: str | None = None, bits: int = 4, double_quant: bool = True, compute_dtype: str = "auto",
    device=None, attn_implementation: str = "sdpa", seed: int = 0, spread: bool = False, cpu_gib: float | None = None,
    offload_folder: str | Path | None = None,
):  # fmt: skip
    """A frozen base model: NF4 for bits = 4, else 16-bit weights (fp32 where the compute dtype is that).

    Args:
        name: "embedded" (the 10 million parameters that come with the kit), a folder, a name on the Hugging Face hub,
            or an architecture file (.json), which stands for that model with random weights.
        revision: of a model on the hub.
        bits: 4 (NF4) or 16.
        double_quant: whether NF4's scales are quantized too.
        compute_dtype: of matrix products: fp16, bf16, fp32 or auto, see `torch_dtype`.
        device: None: the first GPU, or the CPU where there is none.
        attn_implementation: as in transformers.
        spread: put the layers of a 16-bit model on all visible GPUs, then in the host's memory, then on disk.
        cpu_gib: GiB of the host's memory that `spread` may take; the rest goes to `offload_folder`, which must then be
            given. None: all of it.
        seed: of random weights.

    Returns:
        A `Qwen3VLForConditionalGeneration`, or transformers' class of another family; its `name_or_path` is `name`, and
        `fingerprint()` tells its weights from those of other bases.

    Raises:
        ConfigError: see `model_folder`; the files' tensors are not the model's, one for one; a library warns of wrong
            numbers (see `strict`); a weight is not finite; bits are not 4 or 16; or such weights cannot be spread.
    """
    if bits not in (4, 16):
        raise ConfigError(f"bits = {bits}: must be 4 or 16.")
    name, device = str(name), existing_device(device)
    dtype = torch_dtype(compute_dtype, device)
    nf4 = nf4_config(double_quant, dtype) if bits == 4 else None
    if is_random(name):
        if spread:
            raise ConfigError(f"launch.mode = 'auto' spreads weights that are in files; {name} has none.")
        model = random_model(read_architecture(name), dtype, device, seed, nf4)
        model.set_attn_implementation(attn_implementation)
    else:
        placement = spread_options(bits, cpu_gib, offload_folder) if spread else {"device_map": {"": str(device)}}
        folder = model_folder(name, revision)
        architecture = whole_config(folder / "config.json")
        with sums_of_quantized():
            model, met = model_class(architecture).from_pretrained(
                folder,
                use_safetensors=True,  # never a pickle
                dtype=dtype,
                attn_implementation=attn_implementation,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
                quantization_config=nf4,
                **placement,
            )
        reshaped = [key for key, *_ in met["mismatched_keys"]] + reshaped_in_4_bit(model)
        refuse_tensors(str(folder), met["missing_keys"], met["unexpected_keys"], reshaped)
        refuse_not_finite(str(folder), model)
    model.name_or_path = name  # what PEFT writes into an adapter
    model.fingerprint = partial(base_fingerprint, name, revision, bits, seed)
    return make_ready(model)


def existing_device(device) -> torch.device:
    """The device of this name; None: the first GPU, or the CPU where there is none.

    Raises:
        ConfigError: no such device here.
    """
    try:
        found = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device = {device!r}: {str(error).splitlines()[0]}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device = {device!r}: there are {torch.cuda.device_count()} GPUs here.")
    return found


def make_ready(model):
    """The model frozen, answering greedily whatever lies beside its weights; a Qwen3-VL with the kit's operations."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()
    model.requires_grad_(False)
    model.config.use_cache = text_config(model).use_cache = False  # evaluation asks for it where it wants it
    keep_cpu_weights_as_they_are(model)
    if takes_fast_path(model):
        fuse(model)
        keep_residual_in_fp32(model)
        use_fast_tower(model)
    return model


def reshaped_in_4_bit(model) -> list[str]:
    """The names of 4-bit weights that came with another shape than their layer's, which transformers lets pass."""
    found = []
    for name, layer in model.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (layer.out_features, layer.in_features):
            found.append(f"{name}.weight")
    return found


def base_arguments(config: Config, device) -> dict:
    """The arguments of `load_base` that a configuration stands for."""
    quantization, launch = config.quantization, config.launch
    return base_of(config) | {
        "double_quant": quantization.double_quant,
        "compute_dtype": quantization.compute_dtype,
        "device": device,
        "attn_implementation": config.model.attn_implementation,
        "spread": launch.mode == "auto",
        "cpu_gib": launch.cpu_gib,
        "offload_folder": resolve(launch.output_dir) / "offload",
    }


def nf4_config(double_quant: bool, dtype: torch.dtype):
    """What transformers is told about NF4: everything but the head, which stays in 16 bit as the embedding does."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    )


def spread_options(bits: int, cpu_gib: float | None, offload_folder: str | Path | None) -> dict:
    """Layers over all visible GPUs, then the host's memory, then disk.

    Raises:
        ConfigError: 4-bit weights, which are not spread.
    """
    if bits != 16:
        raise ConfigError("launch.mode = 'auto' spreads a 16-bit model: set quantization.bits=16.")
    options = {"device_map": "auto"}
    if cpu_gib is None:
        return options
    gpus = range(torch.cuda.device_count())
    limits = {index: int(0.9 * torch.cuda.mem_get_info(index)[0]) for index in gpus}
    Path(offload_folder).mkdir(parents=True, exist_ok=True)
    return options | {"max_memory": limits | {"cpu": int(cpu_gib * 2**30)}, "offload_folder": str(offload_folder)}


def random_model(architecture, dtype: torch.dtype, device, seed: int, nf4):
    """The architecture with seeded random weights (normal, std 0.02), made and quantized layer by layer on `device`.

    Equal seeds give equal weights on one kind of device.

    Args:
        architecture: of the model, as transformers' configuration.
        nf4: a `BitsAndBytesConfig`, see `nf4_config`; None: weights of `dtype`.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.integrations import replace_with_bnb_linear

    with torch.device("meta"):
        model = model_class(architecture)(architecture)
        if nf4:
            model.is_loaded_in_4bit = True  # PEFT asks, to take its 4-bit adapter
            model = replace_with_bnb_linear(model, nf4.llm_int8_skip_modules, quantization_config=nf4)
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if f"{name}.{key}" == "lm_head.weight" and architecture.tie_word_embeddings:
                continue
            random = torch.Generator(device).manual_seed(seed_for(seed, "weights", name, key))
            value = torch.zeros(parameter.shape, dtype=dtype, device=device)
            if parameter.ndim > 1:
                value.normal_(std=0.02, generator=random)
            elif key == "weight":
                value += 1
            if nf4 and key == "weight" and isinstance(module, Linear4bit):
                options = {"quant_type": "nf4", "compress_statistics": nf4.bnb_4bit_use_double_quant}
                setattr(module, key, Params4bit(value, requires_grad=False, module=module, **options).to(device))
            else:
                setattr(module, key, torch.nn.Parameter(value, requires_grad=False))
    complete(model, device)
    return model


def keep_cpu_weights_as_they_are(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    The repacking happens at the first forward pass in eval mode and stays: from then on training would run a product
    that has no gradient, so that everything after the first validation would silently train on wrong gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def keep_residual_in_fp32(model) -> None:
    """Sum the language model's layers in fp32 while their inputs stay in the model's 16-bit dtype.

    The embedding's output is cast up once; each layer norm's output is cast down again, so that every product and
    stored activation keeps the 16-bit dtype.
    """
    dtype = model.dtype
    if dtype == torch.float32:
        return
    language = language_model(model)
    language.embed_tokens.register_forward_hook(lambda module, args, output: output.float())
    norms = [language.norm]
    for layer in language.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    for norm in norms:
        if hasattr(norm, "out_dtype"):  # a fused norm rounds its output itself
            norm.out_dtype = dtype
        else:
            norm.register_forward_hook(lambda module, args, output: output.to(dtype))


@strict()
def add_adapter(
    model, *, r: int = 8, alpha: int = 16, dropout: float = 0.05,
    target_modules: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"), gradient_checkpointing: bool = True,
    kept_layers: int = 0,
):  # fmt: skip
    """A fresh LoRA adapter, fp32, on the named projections of the language model only.

    Args:
        model: from `load_base`; it is changed. Its random numbers are torch's: call `torch.manual_seed` before.
        r, alpha, dropout: LoRA's rank, scale (alpha / r is what the adapter is multiplied by) and dropout.
        target_modules: of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.
        gradient_checkpointing: compute the layers again in the backward pass instead of keeping their activations.
        kept_layers: with it, the last this many layers keep theirs and are not computed again.

    Returns:
        A `peft.PeftModel` whose trainable parameters are exactly the adapter's.

    Raises:
        ConfigError: target_modules names a module that the language model does not have, the model has an adapter, or
            a number cannot be.
    """
    from peft import LoraConfig, get_peft_model

    target_modules = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    sections.LoraConfig(r, alpha, dropout, target_modules)  # its limits hold here
    if kept_layers < 0:
        raise ConfigError(f"kept_layers = {kept_layers}: must be a number from 0.")
    if hasattr(model, "peft_config"):
        raise ConfigError("This model has an adapter already. Load the base anew.")
    names = {name.rsplit(".", 1)[-1] for name, _ in language_model(model).layers.named_modules()}
    unknown = [name for name in target_modules if name not in names]
    if unknown:
        raise ConfigError(f"lora.target_modules: the language model has no {', '.join(unknown)}.")
    lora = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": projections(model, target_modules)}
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    fuse(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        set_recomputed(model, kept_layers)
    return peft_model


def adapter_arguments(config: Config) -> dict:
    """The arguments of `add_adapter` that a configuration stands for."""
    checkpointing, kept_layers = config.memory.gradient_checkpointing, config.memory.kept_layers
    return asdict(config.lora) | {"gradient_checkpointing": checkpointing, "kept_layers": kept_layers}


def set_recomputed(model, kept_layers: int) -> None:
    """Which layers of a model with checkpointing are recomputed: the first, but for the last `kept_layers`."""
    layers = language_model(model).layers
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < len(layers) - kept_layers


def load_adapter(model, folder: str | Path, unbound: bool = False):
    """A saved adapter on its base, for inference: a `peft.PeftModel`.

    Args:
        model: from `load_base`; it is changed.
        folder: with the adapter and its model card, as a run's `best/` and `final/` are.
        unbound: take an adapter in peft's format from elsewhere, which no card binds to this base, too.

    Raises:
        ConfigError: the adapter was trained on another base (both fingerprints are named); a file of it is missing or
            broken; its tensors are not those that its adapter_config.json asks for, one for one; or it is of a kind
            that would not count here.
    """
    check_base(Path(folder), model.fingerprint, model.name_or_path, unbound)
    peft_model = attach_adapter(model, Path(folder))
    fuse(model)
    return peft_model


def trainable(model) -> list:
    """The parameters that receive gradients, in a fixed order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
