"""The base model: where its files are, what it is made of, and the fingerprint that ties an adapter to it."""

import hashlib
import json
import re
from pathlib import Path

from mmrev_kit.config.project import ASSETS, EMBEDDED, hide_secrets, resolve
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.model.qwen3vl import read_architecture

SMALL_FILES, WEIGHTS = ["*.json", "*.jinja", "*.txt"], ["*.safetensors"]


def base_of(config: Config) -> dict:
    """Which base a configuration means, as the arguments of `base_fingerprint`."""
    chosen = {"name": config.model.name, "revision": config.model.revision, "bits": config.quantization.bits}
    return chosen | {"seed": config.experiment.seed}


def model_folder(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder with a base model's files; a name on the hub is downloaded (or found in the cache) first.

    Args:
        name: of `EMBEDDED`, a folder, or a name on the hub.
        weights: False where sizes and the processor are enough: a run that cannot fit downloads no more than that.

    Raises:
        ConfigError: neither a folder nor a model that the hub or its cache has.
    """
    if name in EMBEDDED:
        return ASSETS / name
    if resolve(name).is_dir():
        return resolve(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = SMALL_FILES + (WEIGHTS if weights else [])
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = hide_secrets(str(error).strip().splitlines()[0])
        raise ConfigError(f"model.name = {name!r}: no such folder, and the hub gave no model: {reason}") from None


def is_random(name: str) -> bool:
    """Whether a model's name is an architecture file, which stands for that model with seeded random weights."""
    return name.endswith(".json")


def check_base(adapter: Path, base: str, name: str) -> None:
    """Refuse an adapter whose model card names another base than `name`, which has the fingerprint `base`.

    Raises:
        ConfigError: naming both fingerprints; the folder is no adapter of the kit's; or it is not in safetensors.
    """
    card = adapter / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    trained_on = re.search(r"^base_fingerprint: ([0-9a-f]{16})$", text, re.MULTILINE)
    if not trained_on:
        raise ConfigError(f"{adapter}: not an adapter of a run: no model card with a base_fingerprint in it.")
    if trained_on[1] != base:
        raise ConfigError(f"{adapter} was trained on the base {trained_on[1]}; {name} is {base}.")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ConfigError(f"{adapter}: no adapter_model.safetensors. Other files may run code when read; they are not.")


def base_fingerprint(name: str, revision: str | None = None, bits: int = 4, seed: int = 0) -> str:
    """`fingerprint` of a base by its name; of a random model, a digest of its architecture, seed and bits."""
    if not is_random(name):
        return fingerprint(model_folder(name, revision))
    values = read_architecture(name).to_dict()
    values.pop("transformers_version", None)
    text = json.dumps([values, seed, bits], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
