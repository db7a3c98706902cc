"""The configuration: one dataclass per YAML section, read strictly, saved with every run.

Defaults live here and nowhere else. They are the published 8 x V100 recipe for Qwen3-VL-32B; a YAML file says
what differs. OmegaConf does the typing: an unknown key or a value of the wrong type is a `ConfigError`.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import shlex
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "tiny"
TASKS = ("forward", "reverse")
NONE_WORDS = ("none", "null", "~")
# A Hugging Face token, or what stands before the host of an address: a name and password.
SECRET = re.compile(r"hf_[A-Za-z0-9]{16,}|(?<=://)[^/\s@]+(?=@)")


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key and what to do."""


def hide_secrets(text: str) -> str:
    """`text` with `***` for every token and password in it, such as an error message that names an address."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if len(os.environ.get(name, "")) >= 8:
            text = text.replace(os.environ[name], "***")
    return SECRET.sub("***", text)


def refuse_secrets(text: str, where: str) -> None:
    """A configuration goes into the run folder, the model card and the notebook: no token may be in it.

    Raises:
        ConfigError: there is one; the message does not repeat it.
    """
    if hide_secrets(text) != text:
        raise ConfigError(
            f"{where}: there is a token or password in it, which would be written to the run folder. Take it out and "
            "give it as HF_TOKEN or by `hf auth login`. A notebook or file that shows it already: delete it, renew it."
        )


def _require(condition: bool, key: str, value, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{key} = {value!r}: {rule}.")


def _check_numbers(section: str, config, rules: dict[str, tuple[float, float]]) -> None:
    """Each named field must be a finite number within [low, high]; the message names the key."""
    for name, (low, high) in rules.items():
        value = getattr(config, name)
        if value is not None:
            fits = math.isfinite(value) and low <= value <= high
            limit = f"between {low:g} and {high:g}" if math.isfinite(high) else f"a number from {low:g}"
            _require(fits, f"{section}.{name}", value, f"must be {limit}")


@dataclass
class ExperimentConfig:
    name: str = "faces20"  # the folder data/<name>, and the first half of the run's name
    task: str = "forward"
    seed: int = 0

    def __post_init__(self):
        _require(self.task in TASKS, "experiment.task", self.task, f"must be one of {', '.join(TASKS)}")
        plain = bool(self.name) and self.name not in (".", "..") and not set(self.name) & set("/\\")
        _require(plain, "experiment.name", self.name, "must be a plain folder name")


@dataclass
class ModelConfig:
    name: str = "embedded"  # or a folder, a name on the Hugging Face hub, or an architecture file (random weights)
    revision: str | None = None
    attn_implementation: str = "sdpa"
    min_pixels: int = 65_536
    max_pixels: int = 200_704

    def __post_init__(self):
        _check_numbers("model", self, {"min_pixels": (1, math.inf), "max_pixels": (1, math.inf)})
        _require(
            self.min_pixels <= self.max_pixels, "model.min_pixels", self.min_pixels,
            f"must not exceed model.max_pixels = {self.max_pixels}",
        )  # fmt: skip


@dataclass
class QuantizationConfig:
    bits: int = 4  # 4: NF4; 16: the weights as they are
    double_quant: bool = True
    compute_dtype: str = "fp16"  # fp16 (V100), bf16, or auto (bf16 where the GPU has it, fp32 on CPU)

    def __post_init__(self):
        _require(self.bits in (4, 16), "quantization.bits", self.bits, "must be 4 or 16")
        known = ("fp16", "bf16", "auto")
        _require(
            self.compute_dtype in known, "quantization.compute_dtype", self.compute_dtype,
            f"must be one of {', '.join(known)}",
        )  # fmt: skip


@dataclass
class LoraConfig:
    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])

    def __post_init__(self):
        _check_numbers("lora", self, {"r": (1, math.inf), "alpha": (1, math.inf), "dropout": (0, 1)})
        _require(len(self.target_modules) > 0, "lora.target_modules", self.target_modules, "must name a module")


@dataclass
class DataConfig:
    source: str = "drawn"  # folder: your own people, from entities_file and images_dir; shapes: the format check
    dir: str = "data"
    entities_file: str | None = None  # a CSV or JSON file
    images_dir: str | None = None
    link_images: bool = False  # link to the images instead of copying them
    allow_outside: bool = False  # images outside the data's own folder, the project and the current folder, too
    drop_faulty: bool = False  # go on without the rows that have a fault, with their number said, instead of stopping
    num_main: int = 20
    num_control: int = 0
    image_size: int = 448
    images_per_entity: int = 1

    def __post_init__(self):
        known = ("drawn", "folder", "shapes")
        _require(self.source in known, "data.source", self.source, f"must be one of {', '.join(known)}")
        if self.source == "folder":
            for name in ("entities_file", "images_dir"):
                _require(getattr(self, name) is not None, f"data.{name}", None, "is needed where data.source is folder")
        _check_numbers("data", self, {"image_size": (16, 4096), "images_per_entity": (1, 100)})


@dataclass
class RetentionWeights:
    cw: float = 1.0
    mcq_i2d: float = 1.0
    mcq_d2i: float = 1.0


@dataclass
class RetentionConfig:
    retention_ratio: float = 0.3  # share of an epoch's training rows that are retention rows
    face_share: float = 1.0  # share of the retention rows that come from the face pool
    weights: RetentionWeights = field(default_factory=RetentionWeights)
    tasks: list[str] = field(default_factory=lambda: ["forward"])
    face_pool: str = "data/pool_faces_448"
    object_pool: str = "data/pool_objects_448"
    num_faces: int = 400

    def __post_init__(self):
        _check_numbers("retention", self, {"retention_ratio": (0, 0.99), "face_share": (0, 1), "num_faces": (40, 1e5)})
        _check_numbers("retention.weights", self.weights, dict.fromkeys(("cw", "mcq_i2d", "mcq_d2i"), (0, math.inf)))
        total = self.weights.cw + self.weights.mcq_i2d + self.weights.mcq_d2i
        _require(total > 0, "retention.weights", total, "at least one weight must be above 0")
        unknown = [task for task in self.tasks if task not in TASKS]
        _require(not unknown, "retention.tasks", self.tasks, f"may name {', '.join(TASKS)}")


@dataclass
class TrainingConfig:
    learning_rate: float = 1e-4
    min_lr: float = 6e-5
    lr_reduction_factor: float = 0.5
    lr_patience: int = 1
    improvement_threshold: float = 0.05
    min_val_loss: float = 0.2
    batch_size: int = 1
    gradient_accumulation_steps: int = 8
    num_epochs: int = 10
    max_length: int = 512
    warmup_ratio: float = 0.02
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    optimizer: str = "adamw"
    save_steps: int = 50  # steps between two saves of last/; each epoch's end is saved, too
    packing: str | None = "shared_prefix"  # rows of one image share it; block: no sharing; none: padded rows
    grouping: str = "batch"  # epoch: orders an epoch so that the rows of one image come in the same update

    def __post_init__(self):
        positive = dict.fromkeys(
            ("batch_size", "gradient_accumulation_steps", "num_epochs", "max_length", "save_steps"), (1, math.inf)
        )
        shares = dict.fromkeys(("improvement_threshold", "warmup_ratio", "weight_decay"), (0, 1))
        rest = {"min_lr": (0, math.inf), "lr_patience": (1, math.inf), "min_val_loss": (0, math.inf)}
        _check_numbers("training", self, positive | shares | rest)
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"training.{name}", value, "must be a number above 0")
        _require(
            0 < self.lr_reduction_factor < 1, "training.lr_reduction_factor", self.lr_reduction_factor,
            "must lie between 0 and 1",
        )  # fmt: skip
        self.packing = self.packing or "none"  # the word none is no value in YAML files and overrides; here it is one
        words = {
            "optimizer": ("adamw", "adamw_8bit", "paged_adamw_8bit"),
            "packing": ("none", "block", "shared_prefix"),
            "grouping": ("batch", "epoch"),
        }
        for name, known in words.items():
            value = getattr(self, name)
            _require(value in known, f"training.{name}", value, f"must be one of {', '.join(known)}")


@dataclass
class EvaluationConfig:
    batch_size: int = 16
    max_new_tokens: int = 32
    option_orders: bool = False  # ask each multiple-choice question in all 24 orders of its options

    def __post_init__(self):
        _check_numbers("evaluation", self, {"batch_size": (1, math.inf), "max_new_tokens": (1, 4096)})


@dataclass
class MemoryConfig:
    gradient_checkpointing: bool = True
    cache_features: bool = True  # vision features once, in <output_dir>/features; False: the tower in every pass
    micro_tokens: int | None = None  # tokens of one pass, whatever the batch size; None: the plan's, or by device
    plan: str = "auto"  # on a GPU: checkpointing and micro_tokens are chosen for the card; off: as configured
    gpu_gib: float | None = None  # act as on a card of so many GiB: planned for, and not exceeded; None: its own
    force: bool = False  # train even where the estimate says that it does not fit

    def __post_init__(self):
        _check_numbers("memory", self, {"micro_tokens": (1, math.inf), "gpu_gib": (0.1, math.inf)})
        _require(self.plan in ("auto", "off"), "memory.plan", self.plan, "must be auto or off")


@dataclass
class LaunchConfig:
    num_processes: int | None = None  # None: one per GPU, 1 without a GPU
    mode: str = "data"  # data: one whole model a process; auto: one 16-bit model over all GPUs, for evaluation
    cpu_gib: float | None = None  # mode auto: host memory it may take before it goes to disk; None: all
    output_dir: str = "outputs"
    overwrite: bool = False

    def __post_init__(self):
        _check_numbers("launch", self, {"num_processes": (1, 4096), "cpu_gib": (0, math.inf)})
        _require(self.mode in ("data", "auto"), "launch.mode", self.mode, "must be data or auto")


@dataclass
class Config:
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


_SECTIONS = {section.name for section in fields(Config)}


def project_root() -> Path:
    """The folder that relative paths start from, whatever folder a notebook kernel was started in.

    It is the nearest folder at or above the working folder that holds `configs/` and `notebooks/`, and the folder
    that holds the package where there is none.
    """
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "configs").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return Path(__file__).resolve().parent.parent


def resolve(path: str | Path) -> Path:
    """`path` as an absolute path; a relative one starts from `project_root()`."""
    return (project_root() / Path(path).expanduser()).resolve()


def _none_words(value):
    """`None`, `none` and `null` typed as text mean no value, in YAML files and overrides alike."""
    if isinstance(value, dict):
        return {key: _none_words(item) for key, item in value.items()}
    return None if isinstance(value, str) and value.strip().lower() in NONE_WORDS else value


def _check_plain(values: dict, where: str) -> None:
    """Sections hold keys, and a value is a value: OmegaConf's own `???` and `${...}` would get past the checks."""
    for section, content in values.items():
        if section in _SECTIONS and not isinstance(content, dict):
            raise ConfigError(f"{where}: {section} is a section: give its keys, not {content!r}.")
        for key, value in content.items() if isinstance(content, dict) else ():
            if "'???'" in repr(value) or "${" in repr(value):  # in lists and mappings, too
                raise ConfigError(f"{where}: {section}.{key} = {value!r}: references are not resolved here.")
            default = getattr(getattr(Config(), section, None), key, None)
            if isinstance(default, bool) and type(value) in (int, float) and value not in (0, 1):
                raise ConfigError(f"{where}: {section}.{key} = {value!r}: must be true or false.")


def _merge(config, values: dict, where: str):
    _check_plain(values, where)
    try:
        return OmegaConf.merge(config, _none_words(values))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a value"
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{where}: {key}: {reason}") from None


def _nest(key: str, value) -> dict:
    """{"a": {"b": value}} for the key "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _read_overrides(text: str) -> list[tuple[str, str, object]]:
    """(word, key, value) of each `section.key=value` word; a value is text, or a list or mapping in YAML's brackets.

    Text stays text until the field's type reads it: YAML would make other numbers of a commit hash such as 0012345.
    """
    found = []
    try:
        for word in shlex.split(text):
            key, equals, value = word.partition("=")
            if not equals:
                raise ConfigError(f"overrides: {word!r} is not of the form section.key=value.")
            bracketed = value.startswith(("[", "{"))
            found.append((word, key, OmegaConf.to_container(OmegaConf.create(value)) if bracketed else value))
    except (ValueError, yaml.YAMLError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"overrides: {text!r} cannot be read: {error}") from None
    return found


def reduced_rate(rate: float, factor: float) -> float:
    """rate * factor as written in decimal: 3e-4 * 0.1 is 3e-5, and not a hair below it."""
    return float(Fraction(str(rate)) * Fraction(str(factor)))


def load_config(path: str | Path | None = None, overrides: str = "", values: dict | None = None) -> Config:
    """Read a configuration; later sources win: defaults, the YAML at `path`, `overrides`, `values`.

    Args:
        path: a YAML file, relative to the project root; None for the defaults alone.
        overrides: `section.key=value` words separated by spaces.
        values: {"section.key": value}, such as a notebook's parameters; a value of None leaves the key as it is.

    Raises:
        ConfigError: missing or unreadable file, unknown key (with the nearest known one), or a value of the wrong
            type or out of range.
    """
    config = OmegaConf.structured(Config)
    if path is not None:
        file = resolve(path)
        if not file.is_file():
            raise ConfigError(f"{file}: there is no such configuration file.")
        try:
            loaded = OmegaConf.to_container(OmegaConf.load(file)) or {}
        except Exception as error:  # PyYAML's and OmegaConf's errors share no base; all mean "not readable YAML"
            raise ConfigError(hide_secrets(f"{file}: {error}")) from None
        refuse_secrets(str(loaded), str(file))
        if not isinstance(loaded, dict):
            raise ConfigError(f"{file}: a configuration is a mapping of sections, not a {type(loaded).__name__}.")
        config = _merge(config, loaded, str(file))
    refuse_secrets(overrides or "", "overrides")
    for word, key, value in _read_overrides(overrides or ""):
        config = _merge(config, _nest(key, value), f"overrides: {word}")
    for key, value in (values or {}).items():
        refuse_secrets(str(value), key.rsplit(".", 1)[-1])
        if value is not None and str(value).strip().lower() not in NONE_WORDS:
            config = _merge(config, _nest(key, value), f"{key.rsplit('.', 1)[-1]} = {value!r}")
    return OmegaConf.to_object(config)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; `load_config` reads it back to an equal `Config`."""
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    refuse_secrets(text, "the configuration")
    return text


def differences(a: Config, b: Config) -> dict[str, tuple]:
    """{"section.key": (value in a, value in b)} for every key that differs."""
    found = {}
    for section in fields(Config):
        left, right = getattr(a, section.name), getattr(b, section.name)
        for item in fields(left):
            pair = getattr(left, item.name), getattr(right, item.name)
            if pair[0] != pair[1]:
                found[f"{section.name}.{item.name}"] = pair
    return found


def effective_batch(config: Config, num_processes: int) -> int:
    """Samples per optimizer step: batch_size x gradient_accumulation_steps x processes."""
    return config.training.batch_size * config.training.gradient_accumulation_steps * num_processes


def warnings_for(config: Config) -> list[str]:
    """What a reader of this configuration should know before it is run; nothing is changed."""
    training = config.training
    halved = reduced_rate(training.learning_rate, training.lr_reduction_factor)
    found = []
    if halved < training.min_lr:
        found.append(
            f"The first learning-rate reduction gives {halved:g}, already below min_lr = {training.min_lr:g}: "
            "training ends at the first plateau. Lower training.min_lr to allow more than one rate."
        )
    return found


def run_dir(config: Config) -> Path:
    """The run folder: <output_dir>/<experiment name>_<task>."""
    return resolve(config.launch.output_dir) / f"{config.experiment.name}_{config.experiment.task}"


def experiment_dir(config: Config) -> Path:
    """The experiment's folder: <data dir>/<experiment name>."""
    return resolve(config.data.dir) / config.experiment.name


def seed_for(seed: int, *purpose) -> int:
    """A 63-bit seed that depends on every word of `purpose`; equal inputs give equal seeds on every machine."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng_for(seed: int, *purpose) -> random.Random:
    """A random generator of its own for one purpose, so that no draw depends on another."""
    return random.Random(seed_for(seed, *purpose))
