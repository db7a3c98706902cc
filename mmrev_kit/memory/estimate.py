"""How much memory a run needs, from shapes alone: arithmetic, no weights, no GPU.

`estimate` adds up what stays on a card for the whole run (weights, adapter, optimizer) and what comes and goes with a
pass, at the moment when most of it is there at once. The moments are: the backward pass of the last decoder layer
(everything saved for the others is still there), the loss (logits), the optimizer's step, and the vision tower.
The bytes of a layer are those that autograd saves in transformers' Qwen3-VL, PEFT's LoRA and bitsandbytes' Linear4bit;
`tests/test_memory.py` compares them with the tensors that autograd really saves, and the totals with measured runs.
All sizes are in bytes until the table, which is in GiB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.memory.layers import Pass, Recipe, activations, largest_linear, logits_bytes, prefill_bytes, vision_bytes
from mmrev_kit.memory.shapes import ModelShapes, as_shapes, visual_tokens

GIB = 2**30
MIB = 2**20
BLOCK, NESTED = 64, 256  # weights per constant of NF4, constants per constant of the double quantization
MIN_8BIT, MIN_PAGED = 4096, 100_000  # bitsandbytes: smaller tensors keep fp32 states; smaller ones are not paged
MOMENTS = ("last layer", "loss", "optimizer step", "vision tower")
WORKSPACE = 2 * 32 * MIB  # cuBLAS: one workspace a thread that multiplies, forward and backward
CONTEXT_GIB, NCCL_GIB = 0.76, 0.4  # of a process on a card, outside PyTorch's allocator: measured on an H100
# What the allocator holds beyond what is in use, with segments that grow; fitted to the cells of configs/README.md.
SLACK_STATIC, SLACK_MOVING = 0.02, 0.04


@dataclass(frozen=True)
class Row:
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
    """The components at the moment of the peak.

    Attributes:
        moment: which moment that is.
        moments: {moment: GiB allocated}.
        context_gib: what the process takes on the card outside PyTorch's allocator.
    """

    rows: list[Row]
    moment: str
    moments: dict[str, float]
    static_gib: float
    context_gib: float
    pass_: Pass

    @property
    def allocated_gib(self) -> float:
        return sum(row.gib for row in self.rows)

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

    def costliest(self) -> Row:
        return max(self.rows, key=lambda row: row.size)

    def costliest_to_change(self) -> Row:
        """The largest component that a setting makes smaller without another model."""
        found = [row for row in self.rows if row.setting.startswith(("memory.", "training.", "lora."))]
        return max(found, key=lambda row: row.size)

    def table(self):
        """A pandas DataFrame: component, GiB, formula, setting; then the totals."""
        import pandas

        lines = [(row.name, row.gib, row.formula, row.setting) for row in self.rows]
        rate = f"{SLACK_STATIC:.0%} of what stays, {SLACK_MOVING:.0%} of what comes and goes"
        lines += [
            ("= allocated", self.allocated_gib, f"the sum, at the peak: {self.moment}", ""),
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
    return [r * side for name in targets for side in linears[name]] * shapes.layers


def optimizer_bytes(tensors: list[int], optimizer: str) -> float:
    """Two states a number: fp32, or 8 bit with an fp32 constant per 256 numbers; paged ones are not on the card."""
    if optimizer == "adamw":
        return 8 * sum(tensors)
    total = 2 * 1024  # the tables of the two 8-bit codes
    for count in tensors:
        if count >= MIN_PAGED and optimizer == "paged_adamw_8bit":
            continue
        total += 8 * count if count < MIN_8BIT else 2 * count + 8 * math.ceil(count / 256)
    return total


def weight_rows(shapes: ModelShapes, config: Config, recipe: Recipe, tower: bool) -> list[Row]:
    """What the frozen model takes."""
    quantization, four = config.quantization, config.quantization.bits == 4
    word = f"model.name (now {shapes.name})" if four else f"quantization.bits=4, or model.name (now {shapes.name})"

    def linear(shape):
        return nf4_bytes(shape, quantization.double_quant) if four else recipe.width * shape[0] * shape[1]

    text = shapes.layers * sum(linear(shape) for shape in shapes.linears().values())
    norms = shapes.layers * (2 * shapes.hidden + 2 * shapes.head_dim) + shapes.hidden
    table = shapes.vocab * shapes.hidden
    rest = recipe.rest_width * (norms + table * (1 if shapes.tied else 2))
    how = (
        "0.5 B a weight + 1 B a 64 weights + 4 B a 16,384" if quantization.double_quant else "0.5 B + 4 B a 64 weights"
    )
    rows = [
        Row("decoder weights", text, how if four else f"{recipe.width} B a weight", word),
        Row(
            "embedding, head, norms", rest,
            f"{recipe.rest_width} B x ({table:,} x {1 if shapes.tied else 2} + norms)", word,
        ),
    ]  # fmt: skip
    if tower:
        h, merge = shapes.v_hidden, shapes.v_merge
        small = sum(outputs for _, outputs in shapes.vision_linears()) + 4 * h * shapes.v_depth
        small += 2 * h * (1 + merge * shapes.v_deepstack)
        small += h * (shapes.v_patch_values + 1) + shapes.v_positions * h
        size = sum(linear(shape) for shape in shapes.vision_linears()) + recipe.rest_width * small
        rows.append(Row("vision tower", size, "its weights as above, its patch embedding and biases in 16 bit",
                        "memory.cache_features=true takes it off the card"))  # fmt: skip
    return rows


def adapter_rows(shapes: ModelShapes, config: Config, recipe: Recipe, processes: int, moment: str) -> list[Row]:
    """Adapter, optimizer and gradients, and what an optimizer step adds."""
    tensors = lora_tensors(shapes, config.lora.r, config.lora.target_modules)
    count, optimizer = sum(tensors), config.training.optimizer
    word = f"lora.r (now {config.lora.r})"
    if moment == "evaluation":
        return [Row("LoRA adapter", 4 * count, f"4 B x {count:,}", word)]
    rows = [
        Row("LoRA adapter", 4 * count, f"4 B x {count:,} trainable numbers", word),
        Row("optimizer states", optimizer_bytes(tensors, optimizer), f"{optimizer}, two states a number",
            "training.optimizer=adamw_8bit"),
    ]  # fmt: skip
    if moment == "vision tower" and recipe.cached:  # features are made before there is an adapter
        return []
    if recipe.accumulates or moment == "optimizer step":
        rows.append(Row("gradients", 4 * count, "4 B a trainable number", word))
    if recipe.width < 4 and not recipe.fused and moment != "optimizer step":
        copies = min(shapes.layers, 1 + shapes.layers - recipe.recomputed(shapes.layers))
        size = recipe.width * count * copies / shapes.layers
        rows.append(Row("16-bit copies of LoRA", size, "autocast casts each once and keeps it for backward", word))
    if moment == "optimizer step":
        bucket = 4 * count if processes > 1 else 0
        rows.append(Row("step", 4 * count + bucket, "4 B for AdamW's temporaries, 4 B for the summed gradients", word))
    return rows


def moving_rows(shapes: ModelShapes, config: Config, recipe: Recipe, one: Pass, moment: str) -> list[Row]:
    """What comes and goes with a pass, at one moment of it."""
    found, word = activations(shapes, config.lora, recipe, one), "memory.micro_tokens"
    each = (1 + shapes.v_deepstack) * shapes.hidden * (recipe.width if recipe.cached else recipe.tower_out)
    states = 0 if recipe.cached else recipe.tower_out * shapes.v_merge * shapes.v_hidden
    features = one.visual * (each + states) if recipe.cached or moment != "vision tower" else 0
    pixels = 0 if recipe.cached else one.visual * shapes.v_merge * 4 * shapes.v_patch_values
    inputs = one.tokens * (8 * 6 + (one.length if one.masked else 0)) + pixels
    rows = [
        Row("vision features", features, f"{each + states:,.0f} B x {one.visual:,} visual tokens: "
            f"{1 + shapes.v_deepstack} x hidden{', and the last states of the tower' if states else ''}", word),
        Row("inputs", inputs, "ids, positions, the mask (1 B a pair of tokens); pixels without the cache", word),
    ]  # fmt: skip
    again = recipe.recomputed(shapes.layers)
    kept = shapes.layers - again
    how = f"{recipe.residual} B x hidden x {again} layers x {one.tokens:,} tokens"
    rows.append(Row("layer inputs", found.inputs * again / shapes.layers, how, word))
    how = f"{found.saved / one.tokens:,.0f} B a token and layer x {one.tokens:,} x {kept}"
    setting = "memory.kept_layers" if recipe.checkpointing else "memory.gradient_checkpointing=true"
    rows.append(Row("saved activations", found.saved * kept, how, setting))
    waste = kept * sum(map(unsplit, found.tensors))
    rows.append(Row("rounding of blocks", waste, "a block's rest below 1 MiB is not split off", word))
    if moment == "last layer":
        if not kept:
            how = f"{found.once / one.tokens:,.0f} B a token x {one.tokens:,}, of one layer at a time"
            rows.append(Row("recomputed layer", found.once, how, word))
        weight = largest_linear(shapes, recipe) if config.quantization.bits == 4 else 0
        name, size, weight = max(found.moments(weight), key=lambda item: item[1] + item[2])
        rows.append(Row("gradients of activations", size, f"in {name} of the last layer", word))
        rows.append(Row("16-bit weight", weight, "one weight at a time is turned to 16 bit for its product", ""))
    if moment == "loss":
        size, how = logits_bytes(shapes, recipe, one)
        setting = "memory.micro_tokens" if recipe.answer_logits else "logits for answer tokens only"
        rows.append(Row("logits", size, how, setting))
    return rows


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
    config: Config, model_config=None, passes: list[Pass] | None = None, processes: int = 1,
    recipe: Recipe | None = None, moments: tuple[str, ...] = MOMENTS,
) -> Estimate:  # fmt: skip
    """Memory of a training run on one card, by component.

    Args:
        model_config: anything that `read_shapes` takes, or `ModelShapes`; None for the configured model.
        passes: the passes of the run; the costliest counts. None: the largest that the configuration allows.
        processes: one a card.
        recipe: how the passes are run; None for the kit's own way with this configuration.
        moments: those that count, of `MOMENTS`.

    Raises:
        ConfigError: see `read_shapes`; sizes that are not positive.
    """
    shapes = as_shapes(model_config if model_config is not None else config.model.name)
    if processes < 1:
        raise ConfigError(f"launch.num_processes = {processes}: must be a number from 1.")
    recipe = recipe or Recipe.of(config)
    passes = passes or [largest_pass(config, shapes)]
    for one in passes:
        one.check()
    context = CONTEXT_GIB + (NCCL_GIB if processes > 1 else 0)
    peaks = {one: _peak(shapes, config, recipe, one, processes, moments) for one in dict.fromkeys(passes)}
    best = max(peaks, key=lambda one: max(peaks[one].values()))
    moment = max(peaks[best], key=peaks[best].get)
    rows = _rows(shapes, config, recipe, best, processes, moment)
    static = sum(row.gib for row in _static(shapes, config, recipe, processes, moment))
    return Estimate(rows, moment, peaks[best], static, context, best)


def _static(shapes, config, recipe, processes, moment) -> list[Row]:
    tower = not recipe.cached or moment in ("vision tower", "evaluation")
    rows = weight_rows(shapes, config, recipe, tower) + adapter_rows(shapes, config, recipe, processes, moment)
    return [*rows, Row("cuBLAS workspace", WORKSPACE, "32 MiB each for the forward and the backward thread", "")]


def _rows(shapes, config, recipe, one, processes, moment) -> list[Row]:
    rows = _static(shapes, config, recipe, processes, moment)
    if moment in ("last layer", "loss"):
        rows += moving_rows(shapes, config, recipe, one, moment)
    if moment == "vision tower":
        size, how = vision_bytes(shapes, recipe, one)
        rows.append(Row("vision activations", size, how, "model.max_pixels"))
    return [row for row in rows if row.size > 0]


def _peak(shapes, config, recipe, one, processes, moments) -> dict[str, float]:
    """GiB at each moment of a pass."""
    return {moment: sum(row.gib for row in _rows(shapes, config, recipe, one, processes, moment)) for moment in moments}


def largest_pass(config: Config, shapes: ModelShapes) -> Pass:
    """The largest pass that a configuration allows: rows of training.max_length up to memory.micro_tokens."""
    length, limit = config.training.max_length, config.memory.micro_tokens or 4096
    rows = max(1, limit // length)
    visual = min(length, visual_tokens(shapes, config.model.max_pixels))
    return Pass(rows, length, rows * 32, visual * rows, masked=True)


def evaluation(config: Config, model_config, length: int, visual: int, option: int = 9) -> Estimate:
    """Memory of an evaluation's batch of `evaluation.batch_size` prompts.

    Args:
        length, visual: tokens and visual tokens of the longest prompt.
        option: tokens of the longest option.
    """
    shapes, size, word = as_shapes(model_config), config.evaluation.batch_size, "evaluation.batch_size"
    recipe = replace(Recipe.of(config), cached=False)
    one = Pass(size, length, size * option, visual * size, masked=True)
    static = _static(shapes, config, recipe, 1, "evaluation")
    weight = largest_linear(shapes, recipe) if recipe.four else 0
    cache = 2 * recipe.width * shapes.key * shapes.layers
    tokens = size * (length + max(option, config.evaluation.max_new_tokens))
    logits, how = logits_bytes(shapes, recipe, one)
    moving = {
        "vision tower": [Row("vision activations", *vision_bytes(shapes, recipe, one), word)],
        "prompts": [
            Row("keys, values and states", *prefill_bytes(shapes, recipe, one), word),
            Row("16-bit weight", weight, "one weight at a time is turned to 16 bit for its product", ""),
        ],
        "options": [
            Row("keys and values", cache * tokens, f"{cache:,} B x {tokens:,} tokens", word),
            Row("logits", logits, how, word),
        ],
    }
    found = {moment: [row for row in static + rows if row.size > 0] for moment, rows in moving.items()}
    moments = {moment: sum(row.gib for row in rows) for moment, rows in found.items()}
    moment = max(moments, key=moments.get)
    still = sum(row.gib for row in static)
    return Estimate(found[moment], moment, moments, still, CONTEXT_GIB, one)
