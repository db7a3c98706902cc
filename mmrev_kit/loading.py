"""The base model in 4 or 16 bit with its adapter, the base's fingerprint, and a look at the machine beforehand."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from mmrev_kit.config import EMBEDDED_MODEL, Config, ConfigError, resolve, run_dir
from mmrev_kit.prompts import Encoder

PACKAGES = ("torch", "torchvision", "transformers", "peft", "accelerate", "bitsandbytes")
FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt")


def model_folder(config: Config) -> Path:
    """The folder with the base model's files; a name on the hub is downloaded (or found in the cache) first.

    Raises:
        ConfigError: neither a folder nor a model that the hub or its cache has.
    """
    name = config.model.name
    if name == "embedded":
        return EMBEDDED_MODEL
    if resolve(name).is_dir():
        return resolve(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=config.model.revision, allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.name = {name!r}: no such folder, and the hub gave no model: {reason}") from None


def load_processor(config: Config):
    """The base model's own processor."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model_folder(config))


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
    return {"fp16": torch.float16, "bf16": torch.bfloat16}[name]


def load_base(config: Config, device):
    """The frozen base model on `device`: NF4 for bits = 4, else 16-bit weights (fp32 where `auto` means fp32).

    The embedding and the head stay as they are: turning them to fp32 costs memory and buys only an fp32 residual
    stream, which `keep_residual_in_fp32` gives as well.
    """
    from transformers import BitsAndBytesConfig, Qwen3VLForConditionalGeneration

    dtype = compute_dtype(config, device)
    options = {}
    if config.quantization.bits == 4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.quantization.double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head"],
        )
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        model_folder(config),
        dtype=dtype,
        device_map={"": str(device)},
        attn_implementation=config.model.attn_implementation,
        **options,
    )
    model.requires_grad_(False)
    model.config.use_cache = False
    keep_cpu_weights_as_they_are(model)
    keep_residual_in_fp32(model)
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
    if config.memory.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return peft_model


def read_fingerprint(adapter: Path) -> str:
    """The fingerprint of the base that an adapter was trained on, from its model card.

    Raises:
        ConfigError: the folder is no adapter of the kit's.
    """
    card = adapter / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = re.search(r"^base_fingerprint: ([0-9a-f]{16})$", text, re.MULTILINE)
    if not found:
        raise ConfigError(f"{adapter}: not an adapter of a run: no model card with a base_fingerprint in it.")
    return found[1]


def check_base(adapter: Path, found: str, name: str) -> None:
    """Refuse an adapter that was trained on another base than `name` with the fingerprint `found`.

    Raises:
        ConfigError: naming both fingerprints.
    """
    wanted = read_fingerprint(adapter)
    if wanted != found:
        raise ConfigError(f"{adapter} was trained on the base {wanted}; {name} is {found}.")


def load_adapter(model, adapter: Path, config: Config):
    """A saved adapter on its base, for inference.

    Raises:
        ConfigError: the adapter was trained on another base; both fingerprints are named.
    """
    from peft import PeftModel

    check_base(adapter, fingerprint(model_folder(config)), config.model.name)
    return PeftModel.from_pretrained(model, adapter)


def trainable(model) -> list:
    """The parameters that receive gradients, in a fixed order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fingerprint(folder: str | Path) -> str:
    """16 hex digits that tell one base model from another: architecture, and every tensor's name, shape and a sample.

    The sample is the first, middle and last 4 KiB of each tensor, so that 64 GB are read in seconds. How the weights
    are split into files does not matter.

    Raises:
        ConfigError: the folder has no config.json or no safetensors file.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: not a model folder; config.json and *.safetensors files are needed.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        config.pop(key, None)
    tensors = {}
    for file in files:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            for name, info in header.items():
                begin, end = (8 + length + offset for offset in info["data_offsets"])
                tensors[name] = [info["dtype"], info["shape"], _sample(stream, begin, end)]
    text = json.dumps([config, sorted(tensors.items())], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sample(stream, begin: int, end: int, size: int = 4096) -> str:
    digest = hashlib.sha256()
    for start in sorted({begin, max(begin, (begin + end) // 2), max(begin, end - size)}):
        stream.seek(start)
        digest.update(stream.read(min(size, end - start)))
    return digest.hexdigest()


@dataclass
class Card:
    """One GPU as the driver reports it; memory in GiB."""

    name: str
    capability: tuple[int, int]
    total_gib: float
    free_gib: float
    driver: str
    holders: list[str] = field(default_factory=list)  # "pid 123 (python)"


def read_cards() -> list[Card]:
    """The GPUs of this machine, asked of the driver's own tool so that this process never touches CUDA."""
    if shutil.which("nvidia-smi") is None:
        return []

    def ask(*query: str) -> list[list[str]]:
        command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return [[cell.strip() for cell in line.split(",")] for line in out.stdout.splitlines() if "," in line]

    holders: dict[str, list[str]] = {}
    for uuid, pid, name in ask("--query-compute-apps=gpu_uuid,pid,process_name"):
        holders.setdefault(uuid, []).append(f"pid {pid} ({Path(name).name})")
    cards = []
    for row in ask("--query-gpu=uuid,name,compute_cap,memory.total,memory.free,driver_version"):
        uuid, name, capability, total, free, driver = row
        major, minor = capability.split(".")
        gib = float(total) / 1024, float(free) / 1024
        cards.append(Card(name, (int(major), int(minor)), *gib, driver, holders.get(uuid, [])))
    return cards


def has_kernels(capability: tuple[int, int], build: list[str]) -> bool:
    """Whether a torch build with these targets (`sm_80`, `compute_90`) runs on a card of this compute capability.

    Machine code for sm_XY runs on X.Z with Z >= Y; compute_XY is compiled at load time for any later card.
    """
    for target in build:
        kind, _, digits = target.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False


@dataclass
class Preflight:
    """What was found before any weight is read. `problems` are reasons not to start."""

    facts: list[str]
    problems: list[str]

    def __str__(self) -> str:
        return "\n".join(self.facts + [f"PROBLEM: {problem}" for problem in self.problems])


def preflight(config: Config, cards: list[Card] | None = None, build: list[str] | None = None) -> Preflight:
    """Cards, kernels, disk and versions, without touching CUDA.

    Args:
        cards, build: given by tests; otherwise read from this machine and this torch.
    """
    import torch

    if cards is None:
        cards = read_cards()
    if build is None:
        build = torch._C._cuda_getArchFlags().split() if hasattr(torch._C, "_cuda_getArchFlags") else []
    facts, problems = [], []
    for index, card in enumerate(cards):
        held = f", held by {', '.join(card.holders)}" if card.holders else ""
        memory = f"{card.free_gib:.1f} of {card.total_gib:.1f} GiB free{held}"
        facts.append(f"GPU {index}: {card.name}, {memory}, driver {card.driver}")
        if not has_kernels(card.capability, build):
            capability = ".".join(str(number) for number in card.capability)
            problems.append(
                f"GPU {index} ({card.name}, compute capability {capability}): this torch {torch.__version__} has no "
                f"kernels for it (built for {', '.join(build) or 'no GPU'}). For a V100 install torch 2.10.0 with "
                "torchvision 0.25.0 (environment.yml)."
            )
    if not cards:
        facts.append("no GPU: the run uses the CPU")
    parent = next(folder for folder in (run_dir(config), *run_dir(config).parents) if folder.exists())
    facts.append(f"disk: {shutil.disk_usage(parent).free / 2**30:.1f} GiB free for {run_dir(config)}")
    facts.append("versions: " + ", ".join(f"{name} {version(name)}" for name in PACKAGES))
    return Preflight(facts, problems)
