"""The base model: where its files are, and the fingerprint that ties an adapter to it."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from mmrev_kit.config.project import EMBEDDED_MODEL, hide_secrets, model_path, resolve
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.files import checksum
from mmrev_kit.model.base_files import FAMILY, family_in, read_config, read_object, weight_files
from mmrev_kit.model.qwen3vl import read_architecture

FIRST_EMBEDDED = "0499e6afd093aac8"  # the fingerprint of what the first version called embedded
SMALL_FILES, WEIGHTS = ["*.json", "*.jinja", "*.txt"], ["*.safetensors"]
VERSION = 3  # of the fingerprint; those of earlier versions are still checked where they were written
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
PROCESSOR = ["tokenizer*", "*processor_config.json", "chat_template*", "vocab.*", "merges.txt", "*_tokens*.json"]


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
        ConfigError: neither a folder nor a model that the hub or its cache has; the folder holds an adapter; or its
            files are not those of a model that the kit can use, see `read_config` and `weight_files`.
    """
    folder = model_path(name)
    on_hub = not folder.is_dir()
    if revision and not on_hub:
        raise ConfigError(f"model.revision = {revision!r}: {name} is no model on the hub and has no revisions.")
    if on_hub:
        folder = _download(name, revision, SMALL_FILES)
    if (folder / "adapter_config.json").is_file():  # transformers would put it on the model by itself
        raise ConfigError(f"model.name: {folder} holds an adapter; name the base model without one.")
    read_config(folder / "config.json", name)
    if weights:
        if on_hub:
            check_download_fits(folder, name)
            folder = _download(name, revision, SMALL_FILES + WEIGHTS)
        weight_files(folder)
    return folder


def bytes_to_download(folder: Path) -> int:
    """What a model's weight files still lack in the hub's cache, by their index; 0 for a model of one file, whose size
    the small files do not tell.

    Args:
        folder: the cache's, with the small files.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return 0
    values = read_object(index)
    size, places = values.get("metadata", {}).get("total_size", 0), set(values.get("weight_map", {}).values())
    return max(0, int(size) - sum((folder / name).stat().st_size for name in places if (folder / name).is_file()))


def check_download_fits(folder: Path, name: str) -> None:
    """Raises ConfigError where the disk of the hub's cache has no room for the rest of a model's weights."""
    needed, free = bytes_to_download(folder), shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"model.name = {name!r}: {needed:,} bytes of it are not downloaded yet, and {free:,} are free in {folder}. "
            "Free some space, or set HF_HOME to a folder on another disk."
        )


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = hide_secrets(str(error).strip().splitlines()[0])
        raise ConfigError(f"model.name = {name!r}: no such folder, and the hub gave no model: {reason}") from None


def known_config(config: Config) -> Path | None:
    """The configured model's config.json or architecture file; None for a model that is not here yet."""
    from huggingface_hub import try_to_load_from_cache

    name = config.model.name
    source = model_path(name)
    if source.exists():
        return source / "config.json" if source.is_dir() else source
    cached = try_to_load_from_cache(name, "config.json", revision=config.model.revision)
    return Path(cached) if isinstance(cached, str) else None


def processor_folder(name: str, revision: str | None = None) -> Path:
    """The folder with a base's processor. A random Qwen3-VL's is the embedded model's, a random model's of another
    family lies beside its architecture file."""
    if not is_random(name):
        return model_folder(name, revision, weights=False)
    return EMBEDDED_MODEL if stands_in(name) else resolve(name).parent


def stands_in(name: str) -> bool:
    """Whether a base is a random Qwen3-VL, for which the embedded model's tokenizer stands in."""
    return is_random(name) and family_of(name) == FAMILY


def family_of(name: str) -> str:
    """transformers' word for a base's family, its `model_type`."""
    path = resolve(name) if is_random(name) else model_folder(name, weights=False) / "config.json"
    return family_in(path, name)


def is_random(name: str) -> bool:
    """Whether a model's name is an architecture file, which stands for that model with seeded random weights."""
    return name.endswith(".json")


def check_base(adapter: Path, base: Callable[..., str], name: str, unbound: bool = False) -> str | None:
    """Refuse an adapter whose model card names another base than `name`, or other files than its own.

    Args:
        base: gives that base's fingerprint for `version=...`, see `base_fingerprint`; the card decides which.
        unbound: take an adapter that no such card binds to the base all the same.

    Returns:
        None where the card binds it; else, with `unbound`, why none does.

    Raises:
        ConfigError: without `unbound`, naming both fingerprints where they differ; or it is not in safetensors.
    """
    reason, there = _why_unbound(adapter, base, name), (adapter / "adapter_config.json").is_file()
    if reason and not (unbound and there):
        way = f" To put it onto {name} all the same set adapter.unbound=true; every result then says so."
        raise ConfigError(f"{adapter}{reason}{way if there else ''}")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ConfigError(f"{adapter}: no adapter_model.safetensors. Other files may run code when read; they are not.")
    return reason and f"{adapter}{reason}"


def _why_unbound(adapter: Path, base: Callable[..., str], name: str) -> str | None:
    """What an adapter's card says against it, or lacks, as the end of a sentence that begins with its folder."""
    card = adapter / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    trained_on = re.search(r"^base_fingerprint: (([23]-)?[0-9a-f]{16})$", text, re.MULTILINE)
    if not trained_on:
        return ": not an adapter of a run: no model card with a base_fingerprint in it."
    present = base(version=version_of(trained_on[1]))
    if trained_on[1] != present:
        renamed = " The first version's embedded model is embedded-one-order now." * (trained_on[1] == FIRST_EMBEDDED)
        return f" was trained on the base {trained_on[1]}; {name} is {present}.{renamed}"
    written = re.search(r"^adapter_sha256: ([0-9a-f]{64})$", text, re.MULTILINE)
    whole = all((adapter / file).is_file() for file in ADAPTER)
    if written and whole and written[1] != adapter_digest(adapter):
        told = "adapter_config.json or adapter_model.safetensors is not what the run wrote"
        return f": {told} (adapter_sha256 in README.md). Restore the folder, or train again."
    return None


def adapter_digest(folder: Path) -> str:
    """The SHA-256, in hex digits, of an adapter's configuration and then its tensors."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in ADAPTER)).hexdigest()


def version_of(fingerprint: str) -> int:
    """The version of the rule that a fingerprint was made by."""
    return int(fingerprint.partition("-")[0]) if "-" in fingerprint else 1


def base_fingerprint(
    name: str, revision: str | None = None, bits: int = 4, seed: int = 0, version: int = VERSION
) -> str:
    """`fingerprint` of a base by its name; of a random model, a digest of its architecture, seed and bits."""
    if not is_random(name):
        return fingerprint(model_folder(name, revision), version)
    values = read_architecture(name).to_dict()
    values.pop("transformers_version", None)
    return _marked([values, seed, bits], version)


def fingerprint(folder: str | Path, version: int = VERSION) -> str:
    """16 hex digits that tell one base model from another, after the version of the rule: `3-0123456789abcdef`.

    Version 3 digests the architecture, the SHA-256 of every weight file (each byte counts, and so does how the weights
    are split into files) and the files of the processor: another chat template, tokenizer or image mean is another
    base. Version 2 left the processor out; version 1, without a mark, took each tensor's name, shape and 12 KiB of its
    values.

    Raises:
        ConfigError: see `model_folder`.
    """
    folder = Path(folder)
    config, files = read_config(folder / "config.json", folder.name), weight_files(folder)
    for key in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        config.pop(key, None)
    facts = [config, _samples(folder) if version == 1 else sorted(map(checksum, files))]
    if version >= 3:
        small = sorted({path for pattern in PROCESSOR for path in folder.glob(pattern)})
        facts.append([[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in small])
    return _marked(facts, version)


def _marked(facts: list, version: int) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return digest if version == 1 else f"{version}-{digest}"


def _samples(folder: Path) -> list:
    """Dtype, shape and the first, middle and last 4 KiB of each tensor, as the first fingerprints took them."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            for name, info in header.items():
                begin, end = (8 + length + offset for offset in info["data_offsets"])
                tensors[name] = [info["dtype"], info["shape"], _sample(stream, begin, end)]
    return sorted(tensors.items())


def _sample(stream, begin: int, end: int) -> str:
    digest, size = hashlib.sha256(), 4096
    for start in sorted({begin, max(begin, (begin + end) // 2), max(begin, end - size)}):
        stream.seek(start)
        digest.update(stream.read(min(size, end - start)))
    return digest.hexdigest()
