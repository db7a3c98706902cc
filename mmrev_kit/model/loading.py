"""The base model in 4 or 16 bit with its adapter, and the base's fingerprint."""

from __future__ import annotations

from pathlib import Path

from mmrev_kit.config.project import EMBEDDED_MODEL, resolve
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.config.seeds import seed_for
from mmrev_kit.data.prompts import Encoder
from mmrev_kit.model.bases import base_fingerprint, check_base, is_random, model_folder
from mmrev_kit.model.fused import fuse
from mmrev_kit.model.qwen3vl import read_architecture
from mmrev_kit.model.vision import use_fast_tower


def load_processor(config: Config):
    """The base model's own processor. Code that lies beside a model is never run.

    A random model has none: Qwen3-VL's image processor with the embedded tokenizer stands in.
    """
    from transformers import AutoProcessor

    if not is_random(config):
        return AutoProcessor.from_pretrained(model_folder(config, weights=False), trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(EMBEDDED_MODEL)
    vision = read_architecture(config).vision_config
    processor.image_processor.patch_size = vision.patch_size
    processor.image_processor.merge_size = vision.spatial_merge_size
    processor.image_processor.temporal_patch_size = vision.temporal_patch_size
    return processor


def make_encoder(config: Config, drop: str = "none") -> Encoder:
    """The encoder of a configuration: its processor, pixel limits and length limit; `drop` as in `Encoder`."""
    limits = config.model.min_pixels, config.model.max_pixels, config.training.max_length
    return Encoder(load_processor(config), *limits, drop=drop)


def compute_dtype(config: Config, device):
    """The dtype of matrix products on `device`: as configured; `auto` is bf16 where the GPU has it, else fp16, and
    fp32 on CPU."""
    import torch

    name = config.quantization.compute_dtype
    if name == "auto":
        if torch.device(device).type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def load_base(config: Config, device):
    """The frozen base model on `device`: NF4 for bits = 4, else 16-bit weights (fp32 where `auto` means fp32).

    The embedding and the head stay as they are: turning them to fp32 costs memory and buys only an fp32 residual
    stream, which `keep_residual_in_fp32` gives as well.
    """
    from transformers import Qwen3VLForConditionalGeneration

    if is_random(config):
        return finish_base(random_model(read_architecture(config), config, device))
    spread = config.launch.mode == "auto"
    options = {"quantization_config": nf4_config(config, device)} if config.quantization.bits == 4 else {}
    if spread:
        options |= spread_options(config)
    folder = model_folder(config)
    if (folder / "adapter_config.json").is_file():  # transformers would put it on the model by itself
        raise ConfigError(f"model.name: {folder} holds an adapter; name the base model without one.")
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        folder,
        use_safetensors=True,  # never a pickle
        dtype=compute_dtype(config, device),
        device_map="auto" if spread else {"": str(device)},
        attn_implementation=config.model.attn_implementation,
        **options,
    )
    return finish_base(model)


def nf4_config(config: Config, device):
    """What transformers is told about NF4: everything but the head, which stays in 16 bit as the embedding does."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype(config, device),
        llm_int8_skip_modules=["lm_head"],
    )


def spread_options(config: Config) -> dict:
    """Mode `auto`: layers over all visible GPUs, then the host's memory, then disk.

    Raises:
        ConfigError: 4-bit weights, which are not spread.
    """
    import torch

    if config.quantization.bits != 16:
        raise ConfigError("launch.mode = 'auto' spreads a 16-bit model: set quantization.bits=16.")
    if config.launch.cpu_gib is None:
        return {}
    gpus = range(torch.cuda.device_count())
    limits = {index: int(0.9 * torch.cuda.mem_get_info(index)[0]) for index in gpus}
    folder = resolve(config.launch.output_dir) / "offload"
    folder.mkdir(parents=True, exist_ok=True)
    return {"max_memory": limits | {"cpu": int(config.launch.cpu_gib * 2**30)}, "offload_folder": str(folder)}


def finish_base(model):
    """What every base needs, wherever its weights come from: frozen, unpacked on CPU, elementwise steps fused, summed
    in fp32, and a vision tower that takes images together."""
    model.requires_grad_(False)
    model.config.use_cache = model.config.text_config.use_cache = False  # evaluation asks for it where it wants it
    keep_cpu_weights_as_they_are(model)
    fuse(model)
    keep_residual_in_fp32(model)
    use_fast_tower(model)
    return model


def random_model(architecture, config: Config, device):
    """The architecture with seeded random weights (normal, std 0.02), made and quantized layer by layer on `device`.

    Args:
        architecture: a `Qwen3VLConfig`.

    Returns:
        A `Qwen3VLForConditionalGeneration`; equal seeds give equal weights on one kind of device.
    """
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import Qwen3VLForConditionalGeneration
    from transformers.integrations import replace_with_bnb_linear

    dtype, four = compute_dtype(config, device), config.quantization.bits == 4
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(architecture)
        if four:
            wanted, model.is_loaded_in_4bit = nf4_config(config, device), True  # PEFT asks, to take its 4-bit adapter
            model = replace_with_bnb_linear(model, wanted.llm_int8_skip_modules, quantization_config=wanted)
    model.set_attn_implementation(config.model.attn_implementation)
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if f"{name}.{key}" == "lm_head.weight" and architecture.tie_word_embeddings:
                continue
            random = torch.Generator(device).manual_seed(seed_for(config.experiment.seed, "weights", name, key))
            value = torch.zeros(parameter.shape, dtype=dtype, device=device)
            if parameter.ndim > 1:
                value.normal_(std=0.02, generator=random)
            elif key == "weight":
                value += 1
            if four and key == "weight" and isinstance(module, Linear4bit):
                options = {"quant_type": "nf4", "compress_statistics": config.quantization.double_quant}
                setattr(module, key, Params4bit(value, requires_grad=False, module=module, **options).to(device))
            else:
                setattr(module, key, torch.nn.Parameter(value, requires_grad=False))
    if architecture.tie_word_embeddings:
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    text, vision = model.model.language_model, model.model.visual
    text.rotary_emb = type(text.rotary_emb)(architecture.text_config).to(device)
    vision.rotary_pos_emb = type(vision.rotary_pos_emb)(architecture.vision_config).to(device)
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
    import torch

    dtype = model.dtype
    if dtype == torch.float32:
        return
    language = model.model.language_model
    language.embed_tokens.register_forward_hook(lambda module, args, output: output.float())
    norms = [language.norm]
    for layer in language.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    for norm in norms:
        if hasattr(norm, "out_dtype"):  # a fused norm rounds its output itself
            norm.out_dtype = dtype
        else:
            norm.register_forward_hook(lambda module, args, output: output.to(dtype))


def add_adapter(model, config: Config):
    """A fresh LoRA adapter, fp32, on the named projections of the language model only.

    Returns:
        A `peft.PeftModel` whose trainable parameters are exactly the adapter's.

    Raises:
        ConfigError: lora.target_modules names a module that the language model does not have.
    """
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    names = {name.rsplit(".", 1)[-1] for name, _ in model.model.language_model.layers.named_modules()}
    unknown = [name for name in lora.target_modules if name not in names]
    if unknown:
        raise ConfigError(f"lora.target_modules: the language model has no {', '.join(unknown)}.")
    adapter = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf"model\.language_model\.layers\..*\.({'|'.join(lora.target_modules)})",
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, adapter)
    peft_model.peft_config["default"].base_model_name_or_path = config.model.name
    fuse(model)
    if config.memory.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        set_recomputed(model, config)
    return peft_model


def set_recomputed(model, config: Config) -> None:
    """Which layers of a model with checkpointing are recomputed: the first, but for `memory.kept_layers`."""
    layers = model.model.language_model.layers
    again = len(layers) - config.memory.kept_layers
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < again


def load_adapter(model, adapter: Path, config: Config):
    """A saved adapter on its base, for inference.

    Raises:
        ConfigError: the adapter was trained on another base; both fingerprints are named.
    """
    from peft import PeftModel

    check_base(adapter, base_fingerprint(config), config.model.name)
    peft_model = PeftModel.from_pretrained(model, adapter)
    fuse(model)
    return peft_model


def trainable(model) -> list:
    """The parameters that receive gradients, in a fixed order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
