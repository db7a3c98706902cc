"""The memory budget for readers: stacked bars against a card, knobs, the modes side by side, the guide's table."""

from dataclasses import replace
from html import escape

from mmrev_kit.config.optimizers import OPTIMIZERS
from mmrev_kit.config.project import resolve
from mmrev_kit.config.reporting import decimal
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.memory.estimate import CONTEXT_GIB, Estimate, estimate, evaluation
from mmrev_kit.memory.plan import MARGIN, MemoryPlan, candidate, configured_shapes, padded_updates, plan, with_memory
from mmrev_kit.memory.shapes import PUBLISHED, UNKNOWN, ModelShapes, as_shapes, size_in_name, visual_tokens
from mmrev_kit.notebook.drawing import COLORS, INK, drawn, subplots
from mmrev_kit.notebook.knobs import panel, picture
from mmrev_kit.notebook.parameters import is_interactive

# GiB that a process can use
CARDS = {
    "V100 32": 31.7, "V100 16": 15.8, "RTX 4090 24": 23.5, "L40S 48": 44.4, "A100 40": 39.4, "A100 80": 79.2,
    "H100 80": 79.2, "H200 141": 139.8,
}  # fmt: skip
OLD = ("V100 32", "V100 16")  # see `estimate`
GROUPS = {
    "weights": ("decoder weights", "embedding, head, norms", "vision tower"),
    "LoRA, gradients, optimizer": ("LoRA adapter", "optimizer states", "gradients", "step", "16-bit weight"),
    "activations": (
        "layer inputs", "saved activations", "recomputed layer", "gradients of activations", "rounding of blocks",
        "keys, values and states",
    ),
    "logits": ("logits",),
    "vision": ("vision features", "vision activations", "inputs"),
}  # fmt: skip
GUIDE_GB = {"base in NF4": 18.0, "LoRA": 0.5, "optimizer": 1.0, "activations": 8.0}


def card_gib(card: str) -> float:
    """Usable GiB of a card by name; ConfigError for an unknown one."""
    if card not in CARDS:
        raise ConfigError(f"card = {card!r}: must be one of {', '.join(CARDS)}.")
    return CARDS[card]


def grouped(found: Estimate) -> dict[str, float]:
    """GiB by group of components, in the order of the bars; their sum is what the card shows."""
    sizes = {component.name: component.gib for component in found.components}
    parts = {group: sum(sizes.pop(name, 0.0) for name in names) for group, names in GROUPS.items()}
    return parts | {"slack, workspace, context": sum(sizes.values()) + found.slack_gib + found.context_gib}


@drawn
def budget_figure(estimates: dict[str, Estimate], card: str):
    """A stacked bar for each of these estimates (by label), the card's capacity, and the margin that a plan keeps."""
    figure, (axis,) = subplots(1, 1.9 + 0.5 * len(estimates))
    capacity, names = card_gib(card), list(estimates)
    parts = [grouped(found) for found in estimates.values()]
    left = [0.0] * len(names)
    for number, group in enumerate(parts[0]):
        widths = [part[group] for part in parts]
        axis.barh(names, widths, left=left, color=COLORS[number], label=group, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    limit = min(1.1 * max(*left, capacity), 2 * capacity)  # a bar far beyond the card is cut off
    for index, total in enumerate(left):
        word = decimal(total, 1) if total <= capacity else f"{decimal(total, 1)}: does not fit"
        axis.annotate(word, (1.01, index), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axis.axvline(capacity, color=INK, linewidth=1.6, label=f"{card}: {capacity:g} GiB")
    axis.axvline(capacity * (1 - MARGIN), color=INK, linewidth=1, linestyle=":", label=f"less {MARGIN:.0%}")
    axis.set_xlim(0, limit)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel("GiB on the card at the peak")
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", alpha=0.25)
    figure.legend(ncols=3, fontsize=9, loc="outside lower center", frameon=False)
    told = [f"{name} {decimal(total, 1)}" for name, total in zip(names, left, strict=True)]
    figure.alt = f"GiB on a card of {capacity:g} ({card}) at the peak: {', '.join(told)}."
    return figure


def shown_model(config: Config, model: str | None = None) -> str | ModelShapes | None:
    """The model that a budget is of, as `as_shapes` takes it: the named one, where None is named the configured one;
    None, with the reason printed, for a family that the estimate does not know.

    Raises:
        ConfigError: there is no such model.
    """
    name = model or config.model.name
    size = size_in_name(name) or name
    if size.lower() in PUBLISHED or (model and not resolve(model).exists()):
        return as_shapes(size) and size
    named = replace(config.model, name=name, revision=None if model else config.model.revision)
    shapes = configured_shapes(replace(config, model=named))
    if shapes is None:
        print(f"{name}: {UNKNOWN}")
    return shapes


def with_configured(config: Config, given: dict) -> dict:
    """The arguments of `budget`: those given, and the configuration's where they are None or left out."""
    configured = {
        "r": config.lora.r, "length": config.training.max_length, "pixels": config.model.max_pixels,
        "optimizer": config.training.optimizer, "checkpointing": config.memory.gradient_checkpointing,
        "processes": config.launch.num_processes or 1,
    }  # fmt: skip
    return configured | {name: value for name, value in given.items() if value is not None}


def budget(
    config: Config, model: str | ModelShapes, card: str, micro_batch: int = 8, **settings
) -> tuple[dict[str, Estimate], MemoryPlan]:
    """Estimates by label, and the plan for the card: the given way, two ways that differ in one thing, the planned one.

    Args:
        micro_batch: rows that go through the model at once, each of `length` tokens with one image.
        settings: r, length, pixels, optimizer, checkpointing, processes; see `with_configured`.
    """
    if micro_batch < 1:
        raise ConfigError(f"micro_batch = {micro_batch}: must be a number from 1.")
    settings, shapes, room = with_configured(config, settings), as_shapes(model), card_gib(card)
    old = card in OLD
    length, pixels, checkpointing = settings["length"], settings["pixels"], settings["checkpointing"]
    config = replace(
        config,
        model=replace(config.model, max_pixels=pixels, min_pixels=min(config.model.min_pixels, pixels)),
        lora=replace(config.lora, r=settings["r"]),
        training=replace(config.training, max_length=length, optimizer=settings["optimizer"]),
    )
    answer, update = min(9, length), config.training.batch_size * config.training.gradient_accumulation_steps
    row = length, answer, min(visual_tokens(shapes, pixels), length - answer)
    given = {"micro_tokens": length * micro_batch, "gradient_checkpointing": checkpointing, "cache_features": True}
    ways = {
        "as set": given,
        "without checkpointing" if checkpointing else "with checkpointing":
            given | {"gradient_checkpointing": not checkpointing},
        "without cached features": given | {"cache_features": False},
    }  # fmt: skip
    found, split = {}, padded_updates([row] * micro_batch, micro_batch)
    for name, memory in ways.items():
        found[name] = candidate(with_memory(config, **memory), shapes, split, settings["processes"], old).estimate
    best = plan(config, room, settings["processes"], shapes, padded_updates([row] * update, update), old)
    return found | {"as planned": best.chosen.estimate}, best


def controls(config: Config, **start):
    """The budget with knobs in JupyterLab; elsewhere the figure. `start`: arguments of `budget`, None as configured."""

    def draw(**knobs) -> str:
        found, chosen = budget(config, **knobs)
        bars = picture(budget_figure(found, knobs["card"]))
        return bars + "".join(f"<div style='line-height:1.4'>{escape(line)}</div>" for line in chosen.lines())

    start = with_configured(config, start)
    if not is_interactive():
        found, chosen = budget(config, **start)
        print("\n".join(chosen.lines()))
        return budget_figure(found, start["card"])
    from ipywidgets import Checkbox, Dropdown, IntSlider, SelectionSlider

    ranks = sorted({1, 2, 4, 8, 16, 32, 64, 128, start["r"]})
    sides = sorted({side * side for side in (224, 256, 320, 448, 512, 640, 768)} | {start["pixels"]})
    models = {getattr(one, "name", one): one for one in (start["model"], *PUBLISHED)}
    knobs = {
        "model": Dropdown(options=models.items(), value=start["model"]),
        "card": Dropdown(options=list(CARDS), value=start["card"]),
        "r": SelectionSlider(options=ranks, value=start["r"]),
        "length": IntSlider(value=start["length"], min=64, max=max(2048, start["length"]), step=16),
        "pixels": SelectionSlider(options=[(f"{side:,}", side) for side in sides], value=start["pixels"]),
        "micro_batch": IntSlider(value=start["micro_batch"], min=1, max=max(64, start["micro_batch"])),
        "checkpointing": Checkbox(value=start["checkpointing"], indent=True),
        "optimizer": Dropdown(options=list(OPTIMIZERS), value=start["optimizer"]),
        "processes": IntSlider(value=start["processes"], min=1, max=max(16, start["processes"])),
    }
    return panel(draw, knobs)


def mode_table(config: Config, card: str, model: str | ModelShapes = "32b", spread: int = 4):
    """The three ways to use several cards, from the estimate; a pandas DataFrame.

    Data-parallel 4-bit training; one 16-bit model spread over `spread` cards, for evaluation; data-parallel training
    with a 16-bit base on each card (ZeRO-2 shares gradients and optimizer states, not the weights).
    """
    import pandas

    shapes, room, cards = as_shapes(model), card_gib(card), 8
    whole = replace(config, quantization=replace(config.quantization, bits=16))
    shared = replace(whole, launch=replace(whole.launch, mode="deepspeed"))
    plans = [plan(way, room, cards, shapes, old=card in OLD) for way in (config, shared)]
    four, zero = (one.chosen.estimate.device_gib for one in plans)
    one = replace(whole, evaluation=replace(whole.evaluation, batch_size=1))
    asked = evaluation(one, shapes, config.training.max_length, 196)
    layer = max(one.gib for one in asked.components if one.name == "decoder weights") / shapes.num_hidden_layers
    auto = asked.allocated_gib / spread + layer + CONTEXT_GIB  # layers are not cut: one card may hold one more
    modes = {
        "qlora": (cards, "data, NF4 base", four, "training"),
        "auto": (spread, "layers over cards, 16-bit base", auto, "inference, evaluation"),
        "deepspeed ZeRO-2": (cards, "data, 16-bit base on each card", zero, "small models"),
    }
    names = ["cards", "parallelism", "GiB a card", "for"]
    table = pandas.DataFrame.from_dict(modes, orient="index", columns=names).rename_axis("mode")
    table[card] = ["fits" if gib <= room else "out of memory" for gib in table["GiB a card"]]
    return table


def guide_table(config: Config):
    """The guide's budget of the 32B on 32 GB (GB, 10^9 bytes) beside the estimate of the largest micro-batch that the
    configuration allows, with the vision tower on the card as in the guide. A pandas DataFrame."""
    import pandas

    found = estimate(with_memory(config, cache_features=False), "32b", old=True)  # on a V100
    parts = {part.name: part for part in found.components}
    ours = {"base in NF4": [parts.pop(name) for name in GROUPS["weights"]], "LoRA": [parts.pop("LoRA adapter")]}
    ours |= {"optimizer": [parts.pop("optimizer states")], "activations": list(parts.values())}
    sizes = {name: sum(part.size for part in own) / 1e9 for name, own in ours.items()}
    table = pandas.DataFrame({"guide (GB)": GUIDE_GB, "estimate (GB)": sizes}).rename_axis("component")
    table.loc["sum"] = table.sum()
    largest = [max(own, key=lambda part: part.size) for own in ours.values()]
    table["largest part"] = [*(f"{part.name}: {part.formula}" for part in largest), ""]
    return table
