"""The memory budget for readers: stacked bars against a card, knobs, the modes side by side, the guide's table."""

from __future__ import annotations

from dataclasses import replace

from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.memory.estimate import (
    CONTEXT_GIB,
    Estimate,
    estimate,
    evaluation,
    lora_tensors,
    optimizer_bytes,
    weight_rows,
)
from mmrev_kit.memory.layers import Recipe
from mmrev_kit.memory.plan import Plan, from_lengths, option, plan
from mmrev_kit.memory.shapes import PUBLISHED, as_shapes, visual_tokens
from mmrev_kit.notebook.plots import subplots
from mmrev_kit.notebook.progress import is_interactive

# GiB that a process can use, and whether the card has bf16
CARDS = {
    "V100 32": 31.7, "V100 16": 15.8, "RTX 4090 24": 23.5, "L40S 48": 44.4, "A100 40": 39.4, "A100 80": 79.2,
    "H100 80": 79.2, "H200 141": 139.8,
}  # fmt: skip
GROUPS = {
    "weights": ("decoder weights", "embedding, head, norms", "vision tower"),
    "LoRA, gradients, optimizer": (
        "LoRA adapter", "optimizer states", "gradients", "16-bit copies of LoRA", "step", "16-bit weight",
    ),
    "activations": (
        "layer inputs", "saved activations", "recomputed layer", "gradients of activations", "rounding of blocks",
        "keys, values and states",
    ),
    "logits": ("logits",),
    "vision": ("vision features", "vision activations", "inputs"),
}  # fmt: skip
GUIDE_GB = (("base in NF4", 18.0), ("LoRA", 0.5), ("optimizer", 1.0), ("activations", 8.0))


def card_gib(card: str) -> float:
    """Usable GiB of a card by name.

    Raises:
        ConfigError: an unknown card.
    """
    if card not in CARDS:
        raise ConfigError(f"card = {card!r}: must be one of {', '.join(CARDS)}.")
    return CARDS[card]


def grouped(found: Estimate) -> dict[str, float]:
    """GiB by group of components, in the order of the bars; their sum is what the card shows."""
    sizes = {row.name: row.gib for row in found.rows}
    parts = {group: sum(sizes.pop(name, 0.0) for name in names) for group, names in GROUPS.items()}
    return parts | {"slack, workspace, context": sum(sizes.values()) + found.slack_gib + found.context_gib}


def budget_figure(estimates: dict[str, Estimate], card: str, margin: float = 0.0):
    """A stacked bar an estimate, and the card's capacity.

    Args:
        estimates: by label.
        margin: share of the card that is to stay free, drawn as a second line.
    """
    figure, (axis,) = subplots(1, 9, 1.7 + 0.5 * len(estimates))
    capacity, names = card_gib(card), list(estimates)
    parts = [grouped(found) for found in estimates.values()]
    left = [0.0] * len(names)
    for number, group in enumerate(parts[0]):
        widths = [part[group] for part in parts]
        axis.barh(names, widths, left=left, color=f"C{number}", label=group, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    limit = min(1.1 * max(*left, capacity), 2 * capacity)  # a bar far beyond the card is cut off
    for place, total in enumerate(left):
        word = f"{total:.1f}" if total <= capacity else f"{total:.1f}: does not fit"
        axis.annotate(word, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axis.axvline(capacity, color="black", linewidth=1.4, label=f"{card}: {capacity:g} GiB")
    if margin:
        axis.axvline(capacity * (1 - margin), color="black", linewidth=0.9, linestyle=":", label=f"less {margin:.0%}")
    axis.set_xlim(0, limit)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel("GiB on the card at the peak")
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", alpha=0.25)
    figure.legend(ncols=4, fontsize=8, loc="outside lower center", frameon=False)
    return figure


def as_configured(config: Config) -> dict:
    """The arguments of `budget` that stand for settings."""
    return {
        "r": config.lora.r, "length": config.training.max_length, "pixels": config.model.max_pixels,
        "optimizer": config.training.optimizer, "checkpointing": config.memory.gradient_checkpointing,
        "processes": config.launch.num_processes or 1,
    }  # fmt: skip


def tuned(config: Config, r: int, length: int, pixels: int, optimizer: str) -> Config:
    """The configuration with a budget's knobs."""
    return replace(
        config,
        model=replace(config.model, max_pixels=pixels, min_pixels=min(config.model.min_pixels, pixels)),
        lora=replace(config.lora, r=r),
        training=replace(config.training, max_length=length, optimizer=optimizer),
    )


def budget(config: Config, model: str, card: str, micro_batch: int = 8, **settings) -> tuple[dict[str, Estimate], Plan]:
    """Estimates by label, and the plan for the card: the given way, two ways that differ in one thing, the planned one.

    Args:
        micro_batch: rows of a pass, each of `length` tokens with one image.
        settings: of `as_configured`; None, or left out: as configured.
    """
    settings = as_configured(config) | {name: value for name, value in settings.items() if value is not None}
    checkpointing, processes = settings.pop("checkpointing"), settings.pop("processes")
    config, shapes = tuned(config, **settings), as_shapes(model)
    if micro_batch < 1:
        raise ConfigError(f"micro_batch = {micro_batch}: must be a number from 1.")
    length, room = config.training.max_length, card_gib(card)
    answer = min(9, length)
    row = length, answer, min(visual_tokens(shapes, config.model.max_pixels), length - answer)
    work, limit = from_lengths([row] * micro_batch, config, update=micro_batch), length * micro_batch
    kept = config.memory.kept_layers
    ways = {
        "as set": (checkpointing, True, kept),
        "without checkpointing" if checkpointing else "with checkpointing": (not checkpointing, True, kept),
        "without cached features": (checkpointing, False, kept),
    }
    found = {name: option(config, shapes, work, processes, limit, *way).estimate for name, way in ways.items()}
    whole = plan(config, room, processes, shapes, from_lengths([row] * training_rows(config), config))
    return found | {"as planned": whole.chosen.estimate}, whole


def training_rows(config: Config) -> int:
    """Rows of one process in an update."""
    return config.training.batch_size * config.training.gradient_accumulation_steps


def controls(config: Config, **start):
    """The budget with knobs in JupyterLab; elsewhere the figure of these parameters.

    Args:
        start: the arguments of `budget`; None: as configured.
    """

    def draw(**knobs):
        found, chosen = budget(config, **knobs)
        print("\n".join(chosen.lines()))
        return budget_figure(found, knobs["card"], chosen.margin)

    start = as_configured(config) | {name: value for name, value in start.items() if value is not None}
    if not is_interactive():
        return draw(**start)
    from ipywidgets import Checkbox, Dropdown, IntSlider, SelectionSlider, interactive

    def near(values: list[int], name: str) -> list[int]:
        return sorted({*values, start[name]})

    sides = near([side * side for side in (224, 256, 320, 448, 512, 640, 768)], "pixels")
    knobs = {
        "model": Dropdown(options=list(dict.fromkeys([start["model"], *PUBLISHED])), value=start["model"]),
        "card": Dropdown(options=list(CARDS), value=start["card"]),
        "r": SelectionSlider(options=near([1, 2, 4, 8, 16, 32, 64, 128], "r"), value=start["r"]),
        "length": IntSlider(value=start["length"], min=64, max=max(2048, start["length"]), step=16),
        "pixels": SelectionSlider(options=[(f"{side:,}", side) for side in sides], value=start["pixels"]),
        "micro_batch": IntSlider(value=start["micro_batch"], min=1, max=max(64, start["micro_batch"])),
        "checkpointing": Checkbox(value=start["checkpointing"], indent=True),
        "optimizer": Dropdown(options=["adamw", "adamw_8bit", "paged_adamw_8bit"], value=start["optimizer"]),
        "processes": IntSlider(value=start["processes"], min=1, max=max(16, start["processes"])),
    }
    for name, knob in knobs.items():
        knob.description, knob.layout.width = name, "460px"
        knob.style = {"description_width": "120px"}
    found = interactive(draw, **knobs)
    found.update()
    return found


def mode_table(config: Config, card: str, model: str = "32b", cards: int = 8, spread: int = 4):
    """The three ways to use several cards, from the estimate; a pandas DataFrame.

    Data-parallel 4-bit training; one 16-bit model spread over `spread` cards, for evaluation; data-parallel training
    with a 16-bit base on each card (ZeRO-2 shares gradients and optimizer states, not the weights).
    """
    import pandas

    shapes, gib = as_shapes(model), card_gib(card)
    whole = replace(config, quantization=replace(config.quantization, bits=16))
    four = plan(config, gib, cards, shapes).chosen.estimate.device_gib
    zero = plan(whole, gib, cards, shapes).chosen.estimate.device_gib
    one = replace(whole, evaluation=replace(whole.evaluation, batch_size=1))
    asked = evaluation(one, shapes, config.training.max_length, 196)
    layer = max(row.gib for row in asked.rows if row.name == "decoder weights") / shapes.layers
    auto = asked.allocated_gib / spread + layer + CONTEXT_GIB  # layers are not cut: one card may hold one more
    lines = [
        ("qlora", cards, "data, NF4 base", four, "training"),
        ("auto", spread, "layers over cards, 16-bit base", auto, "inference, evaluation"),
        ("deepspeed ZeRO-2", cards, "data, 16-bit base on each card", zero, "small models"),
    ]
    names = ["mode", "cards", "parallelism", "GiB a card", "for", card]
    rows = [(*line, "fits" if line[3] <= gib else "out of memory") for line in lines]
    return pandas.DataFrame(rows, columns=names).set_index("mode")


def guide_table(config: Config):
    """The guide's budget of the 32B on 32 GB (GB, 10^9 bytes) beside the estimate, with the arithmetic."""
    import pandas

    shapes, recipe = as_shapes("32b"), Recipe.of(config)
    tensors = lora_tensors(shapes, config.lora.r, config.lora.target_modules)
    count, states = sum(tensors), optimizer_bytes(tensors, "adamw")
    weights = sum(row.size for row in weight_rows(shapes, config, recipe, tower=True))
    found = estimate(config, shapes)
    fixed = weights + 4 * count + states
    moving = found.allocated_gib * 2**30 - fixed
    notes = (
        "0.516 B a quantized weight (constants included), and the embedding and the head in 16 bit",
        f"{config.lora.r} x (inputs + outputs) of {', '.join(config.lora.target_modules)} in {shapes.layers} layers = "
        f"{count:,} numbers x 4 B; {count / 33.4e9:.2%} of the model, not 0.6 %",
        f"AdamW: 2 x 4 B x {count:,}",
        f"of one pass of {found.pass_.tokens:,} tokens: they follow the tokens of a pass, not the accumulation",
    )
    ours = (weights, 4 * count, states, moving)
    lines = [(name, guide, size / 1e9, note) for (name, guide), size, note in zip(GUIDE_GB, ours, notes, strict=True)]
    note = "GB of 10^9 bytes, of which a V100 of 32 GB has 34.0"
    lines.append(("sum", sum(guide for _, guide in GUIDE_GB), sum(ours) / 1e9, note))
    columns = ["component", "guide (GB)", "estimate (GB)", "arithmetic"]
    return pandas.DataFrame(lines, columns=columns).set_index("component")


def corrections(config: Config) -> list[str]:
    """What the guide states and what is the case, with the numbers."""
    shapes = as_shapes("32b")
    count = sum(lora_tensors(shapes, 8, ["q_proj", "k_proj", "v_proj", "o_proj"]))
    few, many = (option(config, shapes, from_lengths([(241, 9, 196)] * rows, config), 8, 241, True, True).estimate
                 for rows in (4, 8))  # fmt: skip
    room, limit = config.training.max_length, 4 * 196
    return [
        f"Trainable: {count:,} numbers at r 8 (0.06 %), not about 200 million (0.6 %). The file is "
        f"{4 * count / 1e6:.0f} MB in fp32; {8 * count / 1e6:.0f} MB is r 16.",
        f"LoRA and optimizer: {4 * count / 1e9:.2f} + {8 * count / 1e9:.2f} GB, not 0.5 + 1 GB.",
        f"Accumulation: 4 steps take {few.allocated_gib:.2f} GiB and 8 take {many.allocated_gib:.2f}. Fewer steps "
        "change the effective batch, not the peak; tokens of a pass, pixels and checkpointing change the peak.",
        f"Four images of 448 x 448 are 4 x 196 = {limit} visual tokens; a max_length of {room} holds "
        f"{'them' if room > limit else 'fewer'}: images are scaled down per prompt until its text fits, too.",
        "4-bit weights are turned to 16 bit for each product, one at a time: "
        f"{shapes.hidden * shapes.inter * 2 / 2**30:.2f} GiB for the largest. Nothing is computed in INT4.",
        f"The first reduction of the learning rate, {config.training.learning_rate:g} x "
        f"{config.training.lr_reduction_factor:g}, is already below min_lr = {config.training.min_lr:g}.",
    ]
