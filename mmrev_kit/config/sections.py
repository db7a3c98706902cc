"""All settings: one dataclass per section of the configuration.

The settings' defaults live here and nowhere else. They are the published 8 x V100 recipe for Qwen3-VL-32B; a YAML file
says what differs.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from mmrev_kit.config.errors import Told
from mmrev_kit.config.optimizers import OPTIMIZERS

TASKS = ("forward", "reverse")
INVENTED = ("drawn", "diffusers")  # the sources of data whose people the kit makes up
TESTS = ("forward", "reverse", "cw_image", "mcq_i2d", "mcq_d2i")  # what an evaluation asks; see `data.tasks.TASK_TYPES`
# What main is taught, by task and `experiment.taught`; control is always taught all of CONTROL_IS_TAUGHT, and so is
# bridge, the third group, unless `mitigation.format_bridge` is set.
TAUGHT = {
    "forward": {"generation": ("forward",), "cw": ("cw_image",), "both": ("forward", "cw_image")},
    "reverse": {"cw": ("reverse",)},
}
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")  # transformers' names
CONTROL_IS_TAUGHT = ("forward", "cw_image", "reverse")


class ConfigError(Told, ValueError):
    """The configuration cannot be used; the message names the key and what to do."""


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


def _check_words(section: str, config, rules: dict[str, tuple[str, ...]]) -> None:
    """Each named field must be one of the given words."""
    for name, known in rules.items():
        value = getattr(config, name)
        _require(value in known, f"{section}.{name}", value, f"must be one of {', '.join(filter(None, known))}")


@dataclass
class ExperimentConfig:
    name: str = "faces20"  # the run's; its folder is <launch.output_dir>/<name>_<task>
    task: str = "forward"
    seed: int = 0
    taught: str | None = None  # what main learns by: generation, cw or both; None: both (task forward), cw (reverse)
    match_exposure: str | None = None  # repeat: main's rows again until a main person comes as often as a control one

    def __post_init__(self):
        words = {"task": TASKS, "taught": (None, *TAUGHT["forward"]), "match_exposure": (None, "repeat")}
        _check_words("experiment", self, words)
        plain = self.name == self.name.strip() and self.name.isprintable() and not set(self.name) & set("/\\=")
        plain = plain and self.name not in ("", ".", "..") and len(self.name.encode()) <= 150
        _require(plain, "experiment.name", self.name, "must be a plain folder name of at most 150 bytes, without =")

    @property
    def main_is_taught(self) -> tuple[str, ...]:
        """The tasks whose rows teach main: in task forward what `taught` says, in task reverse always reverse rows."""
        kinds = TAUGHT[self.task]
        return kinds.get(self.taught or "", list(kinds.values())[-1])


@dataclass
class ModelConfig:
    name: str = "embedded"  # or embedded-one-order, a folder, a name on the hub, an architecture file (random weights)
    revision: str | None = None
    attn_implementation: str = "sdpa"
    min_pixels: int = 65_536
    max_pixels: int = 200_704

    def __post_init__(self):
        _check_numbers("model", self, {"min_pixels": (1, math.inf), "max_pixels": (1, math.inf)})
        _check_words("model", self, {"attn_implementation": ATTENTION})
        _require(
            self.min_pixels <= self.max_pixels, "model.min_pixels", self.min_pixels,
            f"must not exceed model.max_pixels = {self.max_pixels}",
        )  # fmt: skip


@dataclass
class QuantizationConfig:
    bits: int = 4  # 4: NF4; 16: the weights as they are
    double_quant: bool = True
    compute_dtype: str = "fp16"  # fp16 (V100), bf16, fp32 (slow), or auto (bf16 where the GPU has it, fp32 on CPU)

    def __post_init__(self):
        _require(self.bits in (4, 16), "quantization.bits", self.bits, "must be 4 or 16")
        _check_words("quantization", self, {"compute_dtype": ("fp16", "bf16", "fp32", "auto")})


@dataclass
class LoraConfig:
    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])

    def __post_init__(self):
        _check_numbers("lora", self, {"r": (1, math.inf), "alpha": (1, math.inf), "dropout": (0, 0.99)})
        _require(len(self.target_modules) > 0, "lora.target_modules", self.target_modules, "must name a module")


@dataclass
class AdapterConfig:
    unbound: bool = False  # put an adapter that no card of a run binds to this base onto it; every result then says so


@dataclass
class DataConfig:
    source: str = "drawn"  # folder: your own people; diffusers: by image_model; shapes: the format check
    dir: str = "data"  # where experiments are kept
    folder: str | None = None  # this run's experiment; None: <dir>/<experiment.name>. Many runs may name the same one
    entities_file: str | None = None  # a CSV or JSON file
    images_dir: str | None = None
    image_model: str | None = None  # of source diffusers: any text-to-image pipeline, a folder or a name on the hub
    image_options: dict[str, Any] = field(default_factory=dict)  # of its call, such as {num_inference_steps: 4}
    link_images: bool = False  # link to the images instead of copying them
    allow_outside: bool = False  # images outside the data's own folder and the project, too
    drop_faulty: bool = False  # go on without the rows that have a fault, with their number said, instead of stopping
    num_main: int = 20
    num_control: int = 0
    share_both: float = 0.0  # of the num_main people, those who form the group bridge and are taught both directions
    image_size: int = 448
    images_per_entity: int = 1

    def __post_init__(self):
        _check_words("data", self, {"source": ("drawn", "folder", "diffusers", "shapes")})
        needed = {"folder": ("entities_file", "images_dir"), "diffusers": ("image_model",)}
        for name in needed.get(self.source, ()):
            rule = f"is needed where data.source is {self.source}"
            _require(getattr(self, name) is not None, f"data.{name}", None, rule)
        for name, source in (("entities_file", "folder"), ("image_model", "diffusers"), ("image_options", "diffusers")):
            value = getattr(self, name)
            rule = f"is read where data.source is {source} only; set it so, or leave this out"
            _require(not value or self.source == source, f"data.{name}", value, rule)
        rule = "is read where people are invented (data.source is drawn or diffusers); write bridge into your own list"
        _require(not self.share_both or self.source in INVENTED, "data.share_both", self.share_both, rule)
        limits = {"share_both": (0, 0.98), "image_size": (16, 4096), "images_per_entity": (1, 100)}
        _check_numbers("data", self, limits)

    @property
    def group_sizes(self) -> dict[str, int]:
        """How many people of each group are drawn: `share_both` of the `num_main` people, to the nearest whole number,
        are bridge, the others are main."""
        bridge = round(self.num_main * Fraction(str(self.share_both)))
        return {"main": self.num_main - bridge, "bridge": bridge, "control": self.num_control}


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
    num_faces: int = 400  # people of a face pool; of fewer than 20 all are for training, and others for validation

    def __post_init__(self):
        _check_numbers("retention", self, {"retention_ratio": (0, 0.99), "face_share": (0, 1), "num_faces": (4, 1e5)})
        _check_numbers("retention.weights", self.weights, dict.fromkeys(("cw", "mcq_i2d", "mcq_d2i"), (0, math.inf)))
        total = self.weights.cw + self.weights.mcq_i2d + self.weights.mcq_d2i
        _require(total > 0, "retention.weights", total, "at least one weight must be above 0")
        unknown = [task for task in self.tasks if task not in TASKS]
        _require(not unknown, "retention.tasks", self.tasks, f"may name {', '.join(TASKS)}")


@dataclass
class MitigationConfig:
    format_bridge: bool = False  # bridge is taught generation and CW of the taught order, not the other direction
    identity: float = 0.0  # share of an epoch's training rows that are identity rows (configs/README.md, Conditions)

    def __post_init__(self):
        _check_numbers("mitigation", self, {"identity": (0, 0.9)})


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
            "optimizer": tuple(OPTIMIZERS),
            "packing": ("none", "block", "shared_prefix"),
            "grouping": ("batch", "epoch"),
        }
        _check_words("training", self, words)


@dataclass
class EvaluationConfig:
    batch_size: int = 16
    max_new_tokens: int = 32
    option_orders: bool = False  # ask each multiple-choice question in all 24 orders of its options
    # Which questions are asked follows from these: an evaluation is known by its questions, not by their repr.
    tests: list[str] = field(default_factory=lambda: list(TESTS), repr=False)
    max_samples: int | None = field(default=None, repr=False)  # rows of each test, drawn by the seed; None: all
    save_examples: int = field(default=0, repr=False)  # right and wrong answers of each test and group, as a page
    # All five tests by log-probability after each epoch of a training; nothing is decided on them.
    by_epoch: bool = field(default=False, repr=False)

    def __post_init__(self):
        limits = {"batch_size": (1, math.inf), "max_new_tokens": (1, 4096), "max_samples": (1, math.inf)}
        _check_numbers("evaluation", self, limits | {"save_examples": (0, math.inf)})
        unknown = set(self.tests) - set(TESTS) or len(set(self.tests)) < max(1, len(self.tests))
        _require(not unknown, "evaluation.tests", self.tests, f"must name some of {', '.join(TESTS)}, each once")

    @property
    def partial(self) -> str | None:
        """What of all questions is asked, as its folder's name has it; None: all are."""
        parts = []
        if len(self.tests) < len(TESTS):
            parts.append(f"tests={'+'.join(test for test in TESTS if test in self.tests)}")
        if self.max_samples is not None:
            parts.append(f"max_samples={self.max_samples}")
        return ",".join(parts) or None


@dataclass
class MemoryConfig:
    gradient_checkpointing: bool = True
    kept_layers: int = 0  # with checkpointing: the last so many layers keep what they computed, and are not recomputed
    cache_features: bool = True  # vision features once, in <output_dir>/features; False: the tower in every pass
    micro_tokens: int | None = None  # tokens of one pass, whatever the batch size; None: the plan's, or by device
    plan: str = "auto"  # on a GPU: checkpointing, kept_layers and micro_tokens suit the card; off: as configured
    gpu_gib: float | None = None  # act as on a card of so many GiB: planned for, and not exceeded; None: its own
    force: bool = False  # train even where the estimate says that it does not fit

    def __post_init__(self):
        limits = {"kept_layers": (0, math.inf), "micro_tokens": (1, math.inf), "gpu_gib": (0.1, math.inf)}
        _check_numbers("memory", self, limits)
        _require(self.plan in ("auto", "off"), "memory.plan", self.plan, "must be auto or off")

    def recomputed_layers(self, layers: int) -> int:
        """How many of `layers` decoder layers are computed again in the backward pass: the first so many."""
        return max(0, layers - self.kept_layers) if self.gradient_checkpointing else 0


@dataclass
class LaunchConfig:
    num_processes: int | None = None  # None: one per GPU, 1 without a GPU
    # data: one whole model a process; auto: one 16-bit model over all GPUs, for evaluation; deepspeed: as data, with a
    # 16-bit base and the optimizer shared out among the processes (ZeRO-2)
    mode: str = "data"
    cpu_gib: float | None = None  # mode auto: host memory it may take before it goes to disk; None: all
    output_dir: str = "outputs"
    overwrite: bool = False
    tracking: str | None = None  # tensorboard, trackio or wandb: the history there, too; each is an extra of its own

    def __post_init__(self):
        _check_numbers("launch", self, {"num_processes": (1, 4096), "cpu_gib": (0, math.inf)})
        self.mode = "data" if self.mode == "qlora" else self.mode  # the guide's name, as in the table of modes
        rule = "must be data (or qlora), auto or deepspeed"
        _require(self.mode in ("data", "auto", "deepspeed"), "launch.mode", self.mode, rule)
        _check_words("launch", self, {"tracking": (None, "tensorboard", "trackio", "wandb")})


@dataclass
class Config:
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    mitigation: MitigationConfig = field(default_factory=MitigationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self):
        """Settings of several sections that contradict each other."""
        experiment, retention, mitigation = self.experiment, self.retention, self.mitigation
        if mitigation.format_bridge:
            formats, key = TAUGHT[experiment.task].get("both"), "mitigation.format_bridge"
            rule = f"task {experiment.task} has one format alone, so that none is bridged; set experiment.task=forward"
            _require(formats is not None, key, True, rule)
            rule = "main is taught both formats itself, so that none is bridged; set experiment.taught=generation or cw"
            _require(formats != experiment.main_is_taught, key, True, rule)
        ratio = retention.retention_ratio if experiment.task in retention.tasks else 0
        rule = f"leaves nothing of an epoch to what is taught, beside retention.retention_ratio = {ratio:g}; lower one"
        _require(mitigation.identity + ratio < 1, "mitigation.identity", mitigation.identity, rule)
        if self.launch.mode == "deepspeed":
            rule = "launch.mode=deepspeed trains a 16-bit base; set quantization.bits=16, or launch.mode=data for NF4"
            _require(self.quantization.bits == 16, "quantization.bits", self.quantization.bits, rule)
            rule = "launch.mode=deepspeed cuts fp32 states into shares, and 8-bit ones come in blocks; set adamw"
            _require(
                OPTIMIZERS[self.training.optimizer].bits == 32, "training.optimizer", self.training.optimizer, rule
            )

    @property
    def taught(self) -> dict[str, tuple[str, ...]]:
        """The tasks whose rows teach each group."""
        bridge = TAUGHT[self.experiment.task]["both"] if self.mitigation.format_bridge else CONTROL_IS_TAUGHT
        return {"main": self.experiment.main_is_taught, "bridge": bridge, "control": CONTROL_IS_TAUGHT}
