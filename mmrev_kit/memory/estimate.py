"""How much memory a run needs, from shapes alone: arithmetic, no weights, no GPU.

`estimate` adds up what stays on a card for the whole run (weights, adapter, optimizer) and what comes and goes with a
micro-batch, in the phase when most of it is there at once. The phases are: the backward pass of the last decoder layer
(everything saved for the others is still there), the loss (logits), the optimizer's step, and the vision tower.
The bytes of a layer are those that autograd saves in the kit's layers and in bitsandbytes' Linear4bit;
`tests/memory/test_memory.py` compares them with the tensors that autograd really saves, and the totals with measured
runs. All sizes are in bytes until the table, which is in GiB.
"""

import math
from dataclasses import dataclass, replace

from mmrev_kit.config.optimizers import OPTIMIZERS
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.memory.layers import (
    activations,
    largest_product,
    logits_bytes,
    prefill_bytes,
    tower_width,
    vision_bytes,
    width,
)
from mmrev_kit.memory.shapes import ModelShapes, as_shapes, visual_tokens
from mmrev_kit.model.micro_batch import MicroBatch

GIB = 2**30
MIB = 2**20
BLOCK, NESTED = 64, 256  # weights per constant of NF4, constants per constant of the double quantization
MIN_8BIT, MIN_PAGED = 4096, 100_000  # bitsandbytes: smaller tensors keep fp32 states; smaller ones are not paged
PHASES = ("last layer", "loss", "optimizer step", "vision tower")
WORKSPACE = 2 * 32 * MIB  # cuBLAS: one workspace a thread that multiplies, forward and backward
CONTEXT_GIB, NCCL_GIB = 0.76, 0.4  # of a process on a card, outside PyTorch's allocator: measured on an H100
# What the allocator holds beyond what is in use, with segments that grow; fitted to the cells of configs/README.md.
SLACK_STATIC, SLACK_MOVING = 0.02, 0.04


@dataclass(frozen=True)
class Component:
    """One component: its bytes, how they come about, and the setting that changes them."""

    name: str
    size: float
    formula: str
    setting: str

    @property
    def gib(self) -> float:
        return self.size / GIB


@dataclass
class Estimate:
    """The components in the phase of the peak.

    Attributes:
        phase: which phase that is.
        peaks: {phase: GiB allocated}.
        static_gib: what of it is there during the whole run.
        context_gib: what the process takes on the card outside PyTorch's allocator.
        micro_batch: the costliest one, of which this is the memory.
    """

    components: list[Component]
    phase: str
    peaks: dict[str, float]
    static_gib: float
    context_gib: float
    micro_batch: MicroBatch

    @property
    def allocated_gib(self) -> float:
        return sum(component.gib for component in self.components)

    @property
    def reserved_gib(self) -> float:
        """With what the allocator keeps: rounding, and blocks of other sizes than are wanted."""
        return self.allocated_gib + self.slack_gib

    @property
    def slack_gib(self) -> float:
        moving = self.allocated_gib - self.static_gib
        return SLACK_STATIC * self.static_gib + SLACK_MOVING * moving

    @property
    def device_gib(self) -> float:
        return self.reserved_gib + self.context_gib

    def sizes(self) -> dict[str, float]:
        """The totals in GiB, for a record."""
        return {"allocated": self.allocated_gib, "reserved": self.reserved_gib, "device": self.device_gib}

    def table(self):
        """A pandas DataFrame: component, GiB, formula, setting; then the totals."""
        import pandas

        lines = [(one.name, one.gib, one.formula, one.setting) for one in self.components]
        rate = f"{SLACK_STATIC:.0%} of what stays, {SLACK_MOVING:.0%} of what comes and goes"
        lines += [
            ("= allocated", self.allocated_gib, f"the sum, at the peak: {self.phase}", ""),
            ("allocator slack", self.slack_gib, rate, ""),
            ("= reserved", self.reserved_gib, "what PyTorch holds", ""),
            ("CUDA context", self.context_gib, "kernels and handles of one process", ""),
            ("= device", self.device_gib, "what nvidia-smi shows", ""),
        ]
        return pandas.DataFrame(lines, columns=["component", "GiB", "how", "setting"]).set_index("component")


def nf4_bytes(shape: tuple[int, int], double_quant: bool) -> float:
    """One linear layer in NF4: half a byte a weight and its constants, each tensor rounded up to 512 bytes."""
    weights = shape[0] * shape[1]
    blocks = math.ceil(weights / BLOCK)
    parts = [weights / 2, 64]  # the weights, the table of 16 values
    parts += [blocks, 4 * math.ceil(blocks / NESTED), 1024, 4] if double_quant else [4 * blocks]
    return sum(512 * math.ceil(part / 512) for part in parts)


def lora_tensors(shapes: ModelShapes, r: int, targets: list[str]) -> list[int]:
    """Numbers in each tensor of the adapter: A is r x inputs, B is outputs x r."""
    linears = shapes.linears()
    unknown = [name for name in targets if name not in linears]
    if unknown:
        raise ConfigError(f"lora.target_modules: the language model has no {', '.join(unknown)}.")
    return [r * side for name in targets for side in linears[name]] * shapes.num_hidden_layers


def optimizer_bytes(tensors: list[int], optimizer: str, paged_too: bool = False) -> int:
    """The states of an optimizer for trained tensors of so many numbers: fp32, or 8 bit with an fp32 constant per 256
    numbers; those that are paged are not on the card, and count only with `paged_too`.

    Raises:
        ConfigError: an optimizer that is not in `OPTIMIZERS`, whose states nobody has counted.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"training.optimizer = {optimizer!r}: the estimate knows {', '.join(OPTIMIZERS)}.")
    kind = OPTIMIZERS[optimizer]
    if kind.bits == 32:
        return 4 * kind.states * sum(tensors)
    total = 1024 * kind.states  # the tables of the 8-bit codes
    for count in tensors:
        if kind.paged and count >= MIN_PAGED and not paged_too:
            continue
        total += kind.states * (4 * count if count < MIN_8BIT else count + 4 * math.ceil(count / 256))
    return total


def weight_components(shapes: ModelShapes, config: Config, tower: bool) -> list[Component]:
    """What the frozen model takes."""
    double, four, w = config.quantization.double_quant, config.quantization.bits == 4, width(config)
    word = f"model.name (now {shapes.name})" if four else f"quantization.bits=4, or model.name (now {shapes.name})"

    def linear(shape):
        return nf4_bytes(shape, double) if four else w * shape[0] * shape[1]

    layers, h = shapes.num_hidden_layers, shapes.hidden_size
    text = layers * sum(linear(shape) for shape in shapes.linears().values())
    norms = layers * (2 * h + 2 * shapes.head_dim) + h
    table, tables = shapes.vocab_size * h, 1 if shapes.tied else 2
    nf4 = "0.5 B a weight + 1 B a 64 weights + 4 B a 16,384" if double else "0.5 B + 4 B a 64 weights"
    found = [
        Component("decoder weights", text, nf4 if four else f"{w} B a weight", word),
        Component(
            "embedding, head, norms", w * (norms + table * tables), f"{w} B x ({table:,} x {tables} + norms)", word
        ),
    ]
    if tower:
        v, merge = shapes.v_hidden, shapes.v_merge
        small = sum(outputs for _, outputs in shapes.vision_linears()) + 4 * v * shapes.v_depth
        small += 2 * v * (1 + merge * shapes.v_deepstack)
        small += v * (shapes.v_patch_values + 1) + shapes.v_positions * v
        size = sum(linear(shape) for shape in shapes.vision_linears()) + w * small
        how = "its weights as above, its patch embedding and biases in 16 bit"
        found.append(Component("vision tower", size, how, "memory.cache_features=true takes it off the card"))
    return found


def static_components(
    shapes: ModelShapes, config: Config, processes: int, accumulates: bool, phase: str
) -> list[Component]:
    """What stays on the card, in one phase: the model; adapter, optimizer and gradients, and what a step adds."""
    cached, word = config.memory.cache_features, f"lora.r (now {config.lora.r})"
    how = "32 MiB each for the forward and the backward thread"
    found = weight_components(shapes, config, tower=not cached or phase in ("vision tower", "evaluation"))
    found.append(Component("cuBLAS workspace", WORKSPACE, how, ""))
    if phase == "vision tower" and cached:  # features are made before there is an adapter
        return found
    tensors, optimizer = lora_tensors(shapes, config.lora.r, config.lora.target_modules), config.training.optimizer
    count = sum(tensors)
    found.append(Component("LoRA adapter", 4 * count, f"4 B x {count:,} trainable numbers", word))
    if phase == "evaluation":
        return found
    size = optimizer_bytes(tensors, optimizer)
    how = f"{optimizer}, {OPTIMIZERS[optimizer].states} states a number"
    if config.launch.mode == "deepspeed":  # it takes the steps on an fp32 copy of its share of the adapter
        size, how = (size + 4 * count) / processes, f"{how}, and a copy of it; one share in {processes}"
    found.append(Component("optimizer states", size, how, "training.optimizer=adamw_8bit"))
    if accumulates or phase == "optimizer step":
        found.append(Component("gradients", 4 * count, "4 B a trainable number", word))
    if phase == "optimizer step":
        how = "4 B for the optimizer's temporaries, 4 B for the summed gradients"
        found.append(Component("step", (8 if processes > 1 else 4) * count, how, word))
    return found


def moving_components(shapes: ModelShapes, config: Config, one: MicroBatch, phase: str, old: bool) -> list[Component]:
    """What comes and goes with a micro-batch, in one phase of it."""
    if phase == "optimizer step":
        return []
    if phase == "vision tower":
        return [Component("vision activations", *vision_bytes(shapes, config, one), "model.max_pixels")]
    found, word, cached = activations(shapes, config, one, old), "memory.micro_tokens", config.memory.cache_features
    out, tokens, layers = tower_width(config), one.tokens, shapes.num_hidden_layers
    visual = (1 + shapes.v_deepstack) * shapes.hidden_size * (width(config) if cached else out)
    visual += 0 if cached else out * shapes.v_merge * shapes.v_hidden
    pixels = 0 if cached else one.visual * shapes.v_merge * 4 * shapes.v_patch_values
    inputs = tokens * (8 * 6 + (one.length if one.masked else 0)) + pixels
    again = config.memory.recomputed_layers(layers)
    kept, (name, size, weight) = found.peak(layers - again, again, phase == "loss")
    setting = "memory.kept_layers" if config.memory.gradient_checkpointing else "memory.gradient_checkpointing=true"
    states = "" if cached else ", and the last states of the tower"
    components = [
        Component("vision features", one.visual * visual, f"{visual:,.0f} B x {one.visual:,} visual tokens: "
            f"{1 + shapes.v_deepstack} x hidden{states}", word),
        Component("inputs", inputs, "ids, positions, the mask (1 B a pair of tokens); pixels without the cache", word),
        Component("layer inputs", found.inputs * again / layers,
            f"4 B x hidden x {again} layers x {tokens:,} tokens", word),
        Component("saved activations", found.saved * kept,
            f"{found.saved / tokens:,.0f} B a token and layer x {tokens:,} x {kept}", setting),
        Component("rounding of blocks", kept * sum(map(unsplit, found.tensors)),
            "a block's rest below 1 MiB is not split off", word),
    ]  # fmt: skip
    if phase == "loss":
        return [*components, Component("logits", *logits_bytes(shapes, one), word)]
    if not kept:
        how = f"{found.once / tokens:,.0f} B a token x {tokens:,}, of one layer at a time"
        components.append(Component("recomputed layer", found.once, how, word))
    return [*components, Component("gradients of activations", size, f"in {name}", word), weight_in_16_bit(weight)]


def weight_in_16_bit(size: float) -> Component:
    return Component("16-bit weight", size, "one weight at a time is turned to 16 bit for its product", "")


def unsplit(size: float) -> float:
    """What a large tensor's block holds beyond it: segments are multiples of 2 MiB from 10 MiB on, and a rest of up to
    1 MiB stays with the block; smaller tensors share segments of 20 MiB, with half a MiB lost in each."""
    if size < MIB:
        return 0
    if size < 10 * MIB:
        return size / 40
    rest = -size % (2 * MIB)
    return rest if rest <= MIB else 0


def estimate(
    config: Config, model_config=None, micro_batches: list[MicroBatch] | None = None, processes: int = 1,
    accumulates: bool = True, phases: tuple[str, ...] = PHASES, old: bool = False,
) -> Estimate:  # fmt: skip
    """Memory of a training run on one card, by component.

    Args:
        model_config: anything that `read_shapes` takes, or `ModelShapes`; None for the configured model.
        micro_batches: those of the run; the costliest counts. None: the largest that the configuration allows.
        processes: one a card.
        accumulates: whether gradients of an earlier micro-batch of the same update are there.
        phases: those that count, of `PHASES`.
        old: whether the card is older than the kernels of a decoder layer (`kernels.can_compile`), whose modules run.

    Raises:
        ConfigError: see `read_shapes`; sizes that are not positive; an optimizer that is not known.
    """
    shapes = as_shapes(model_config or config.model.name)
    if processes < 1:
        raise ConfigError(f"launch.num_processes = {processes}: must be a number from 1.")
    micro_batches = micro_batches or [largest_micro_batch(config, shapes)]
    for one in micro_batches:
        one.check()
    static = {phase: static_components(shapes, config, processes, accumulates, phase) for phase in phases}
    found = [
        at_peak(static, {phase: moving_components(shapes, config, one, phase, old) for phase in phases}, processes, one)
        for one in dict.fromkeys(micro_batches)
    ]
    return max(found, key=lambda estimate: estimate.allocated_gib)


def at_peak(
    static: dict[str, list[Component]], moving: dict[str, list[Component]], processes: int, one: MicroBatch
) -> Estimate:
    """The estimate of a micro-batch, from the components of each phase."""
    present = {phase: [part for part in static[phase] + parts if part.size > 0] for phase, parts in moving.items()}
    peaks = {phase: sum(component.gib for component in components) for phase, components in present.items()}
    phase = max(peaks, key=peaks.get)
    static_gib = sum(component.gib for component in static[phase])
    context_gib = CONTEXT_GIB + (NCCL_GIB if processes > 1 else 0)
    return Estimate(present[phase], phase, peaks, static_gib, context_gib, one)


def largest_micro_batch(config: Config, shapes: ModelShapes) -> MicroBatch:
    """The largest that a configuration allows: rows of training.max_length up to memory.micro_tokens."""
    length, limit = config.training.max_length, config.memory.micro_tokens or 4096
    rows = max(1, limit // length)
    visual = min(length, visual_tokens(shapes, config.model.max_pixels))
    return MicroBatch(rows, length, rows * 32, visual * rows)


def evaluation(config: Config, model_config, length: int, visual: int, option: int = 9) -> Estimate:
    """Memory of an evaluation's batch of `evaluation.batch_size` prompts.

    Args:
        length, visual: tokens and visual tokens of the longest prompt.
        option: tokens of the longest option.
    """
    shapes, size, word = as_shapes(model_config), config.evaluation.batch_size, "evaluation.batch_size"
    config = replace(config, memory=replace(config.memory, cache_features=False))
    one = MicroBatch(size, length, size * option, visual * size)
    static = static_components(shapes, config, 1, True, "evaluation")
    tokens = size * (length + max(option, config.evaluation.max_new_tokens))
    moving = {"vision tower": [Component("vision activations", *vision_bytes(shapes, config, one), word)]}
    moving |= asking_components(shapes, config, one, tokens, True, word)
    return at_peak(dict.fromkeys(moving, static), moving, 1, one)


def questions(
    config: Config, model_config, micro_batches: list[MicroBatch], processes: int = 1, old: bool = False
) -> Estimate:
    """Memory of the tests after an epoch: a pass without gradients beside what training keeps; the costliest counts."""
    shapes, word = as_shapes(model_config), "evaluation.by_epoch=false, or memory.micro_tokens"
    static, found = static_components(shapes, config, processes, False, "loss"), []
    for one in dict.fromkeys(micro_batches):
        moving = asking_components(shapes, config, one, one.tokens, old, word)
        found.append(at_peak(dict.fromkeys(moving, static), moving, processes, one))
    return max(found, key=lambda estimate: estimate.allocated_gib)


def asking_components(
    shapes: ModelShapes, config: Config, one: MicroBatch, tokens: int, old: bool, word: str
) -> dict[str, list[Component]]:
    """What comes and goes while questions are asked, by phase; `tokens`: those whose keys and values are kept."""
    cache = 2 * width(config) * shapes.key * shapes.num_hidden_layers
    return {
        "prompts": [
            Component("keys, values and states", *prefill_bytes(shapes, config, one), word),
            weight_in_16_bit(largest_product(shapes, config, old)),
        ],
        "options": [
            Component("keys and values", cache * tokens, f"{cache:,} B x {tokens:,} tokens", word),
            Component("logits", *logits_bytes(shapes, one), word),
        ],
    }
