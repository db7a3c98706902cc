"""The fastest way to run an update that fits a card, chosen from estimates; and the refusal where none fits.

What is chosen (tokens of a pass, checkpointing, layers that are kept from it) changes neither the effective batch nor
the gradient, only how the work of an update is split.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

from mmrev_kit.config.project import effective_batch
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.data.prompts import Sample
from mmrev_kit.memory.estimate import Estimate, estimate, evaluation
from mmrev_kit.memory.layers import Pass, Recipe
from mmrev_kit.memory.shapes import ModelShapes, as_shapes, read_shapes
from mmrev_kit.model.bases import is_random, model_folder
from mmrev_kit.model.batches import micro_tokens, padded
from mmrev_kit.model.packing import (
    arrange,
    attention_scale,
    heaviest,
    layer_weights,
    make_groups,
    micro_batches,
    share_out,
)

MARGIN = 0.08  # of the card that stays free
SIZES = (512, 1024, 2048, 4096, 8192, 16384)  # tokens of a pass that are tried
FIXED = 3000  # tokens' forward pass: what a pass of the 32B takes beside, for its launches and its 4-bit weights
WINDOWS = 24  # updates looked at: the heaviest of the run
MULTIPLE = 8  # sequences on a GPU are filled up to this
FREE_SETTINGS = ("micro_tokens", "gradient_checkpointing", "kept_layers", "cache_features")  # not in the result
Workload = Callable[[int], list[list[Pass]]]  # from tokens of a pass to the passes of every update of one process


def text_sizes(shapes: ModelShapes) -> SimpleNamespace:
    """The shapes under the names of a transformers text configuration."""
    return SimpleNamespace(
        hidden_size=shapes.hidden, intermediate_size=shapes.inter, num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads, head_dim=shapes.head_dim,
    )  # fmt: skip


def answers(samples: Sequence[Sample]) -> int:
    return sum(len(sample.input_ids) - sample.answer_start for sample in samples)


def plain_pass(samples: Sequence[Sample]) -> Pass:
    """Rows side by side, padded to the longest."""
    lengths = [len(sample.input_ids) for sample in samples]
    visual = sum(sample.image_tokens for sample in samples)
    return Pass(len(samples), max(lengths), answers(samples), visual, masked=len(set(lengths)) > 1)


def packed_pass(groups: list, scale: float) -> Pass:
    """Groups as `Batcher.packed` lays them out; an image that rows share is there once."""
    rows = arrange(groups, scale, MULTIPLE)
    length = -(-heaviest(rows) // MULTIPLE) * MULTIPLE
    visual = sum(group.samples[0].image_tokens for group in groups)
    return Pass(len(rows), length, sum(answers(group.samples) for group in groups), visual, masked=True)


def passes_of(
    windows: Sequence[list[Sample]], config: Config, shapes: ModelShapes, image_id: int, processes: int, limit: int
) -> list[list[Pass]]:
    """The passes of each update for the process that has the largest one, exactly as the batcher makes them."""
    packing, scale, found = config.training.packing, attention_scale(text_sizes(shapes)), []
    for window in windows:
        if packing == "none":
            shares = [window[process::processes] for process in range(processes)]
            dealt = [[plain_pass(part) for part in padded(share, limit)] for share in shares if share]
        else:
            shares = share_out(make_groups(window, packing, image_id), processes)
            dealt = [[packed_pass(part, scale) for part in micro_batches(share, limit)] for share in shares if share]
        found.append(max(dealt, key=lambda passes: max(one.tokens for one in passes)))
    return found


def heaviest_windows(windows: Sequence[list[Sample]], count: int = WINDOWS) -> list[list[Sample]]:
    """The updates with most tokens, and those with the longest row."""
    by_sum = sorted(windows, key=lambda window: -sum(len(sample.input_ids) for sample in window))[:count]
    by_row = sorted(windows, key=lambda window: -max(len(sample.input_ids) for sample in window))[:2]
    return by_sum + [window for window in by_row if not any(window is other for other in by_sum)]


def from_lengths(
    lengths: Sequence[tuple[int, int, int]], config: Config, processes: int = 1, update: int | None = None
) -> Workload:
    """The workload of rows known by (tokens, answer tokens, visual tokens), padded; `update` of them in each of
    a process's updates, None: as configured."""
    for tokens, answer, visual in lengths:
        if tokens < 1 or answer < 0 or visual < 0 or answer + visual > tokens:
            raise ConfigError(f"a row of {tokens} tokens, {answer} answer and {visual} visual tokens: no such row.")
    share = update or max(1, math.ceil(effective_batch(config, processes) / processes))

    def work(limit: int) -> list[list[Pass]]:
        found = []
        for start in range(0, len(lengths), share):
            passes, part = [], []
            for row in [*lengths[start : start + share], None]:
                longest = max(tokens for tokens, *_ in [*part, row or (0, 0, 0)])
                if part and (row is None or longest * (len(part) + 1) > limit):
                    total = [sum(column) for column in zip(*part, strict=True)]
                    passes.append(Pass(len(part), max(tokens for tokens, *_ in part), total[1], total[2]))
                    part = []
                part += [row] if row else []
            found.append(passes)
        return found

    return work


@dataclass
class Option:
    """One way to run an update: settings, estimate, and its relative time."""

    micro_tokens: int
    checkpointing: bool
    cached: bool
    kept: int
    cost: float
    estimate: Estimate

    def __str__(self) -> str:
        how = "with" if self.checkpointing else "without"
        but = f" but for the last {self.kept} layer{'s' * (self.kept > 1)}" if self.kept else ""
        features = "cached vision features" if self.cached else "the vision tower in every pass"
        return f"passes of {self.micro_tokens:,} tokens {how} checkpointing{but}, {features}"


@dataclass
class Plan:
    """What was chosen for a card, and what the next faster way would need."""

    chosen: Option
    fits: bool
    card_gib: float
    margin: float
    processes: int
    batch: int
    faster: Option | None
    evaluation: Estimate | None

    @property
    def room_gib(self) -> float:
        return self.card_gib * (1 - self.margin)

    def apply(self, config: Config) -> Config:
        """The configuration with the chosen settings; nothing that the result depends on changes."""
        chosen = self.chosen
        memory = replace(
            config.memory, micro_tokens=chosen.micro_tokens, gradient_checkpointing=chosen.checkpointing,
            kept_layers=chosen.kept, cache_features=chosen.cached,
        )  # fmt: skip
        return replace(config, memory=memory)

    def lines(self) -> list[str]:
        found = self.chosen.estimate
        passes = found.pass_
        lines = [
            f"memory: {self.chosen}: {found.allocated_gib:.1f} GiB allocated, {found.device_gib:.1f} on the card, of "
            f"{self.card_gib:.1f} GiB less {self.margin:.0%}; the costliest pass has {passes.tokens:,} tokens in "
            f"{passes.sequences} sequences; effective batch {self.batch}, as configured"
        ]
        if self.faster:
            times = self.chosen.cost / self.faster.cost
            lines.append(
                f"memory: {times:.2f} x as fast, {self.faster} would need "
                f"{self.faster.estimate.device_gib:.1f} GiB and {self.margin:.0%}"
            )
        if not self.fits:
            lines.append("memory: nothing leaves the margin free; this takes the least")
        if self.evaluation:
            lines.append(f"memory: evaluation {self.evaluation.device_gib:.1f} GiB on the card")
        return lines

    def record(self) -> dict:
        """For the manifest."""
        chosen = self.chosen
        return {
            "micro_tokens": chosen.micro_tokens,
            "gradient_checkpointing": chosen.checkpointing,
            "kept_layers": chosen.kept,
            "cache_features": chosen.cached,
            "effective_batch": self.batch,
            "card_gib": self.card_gib,
            "margin": self.margin,
            "estimated_gib": {
                "allocated": chosen.estimate.allocated_gib, "reserved": chosen.estimate.reserved_gib,
                "device": chosen.estimate.device_gib,
            },
        }  # fmt: skip


def relative_time(updates: list[list[Pass]], shapes: ModelShapes, recomputed: int) -> float:
    """Forward and backward, and forward again for the layers that are `recomputed`, and `FIXED` a pass.

    A smaller layer is done sooner with the same launches, so that these are more. Of 43 rates of the 32B on three
    hosts, measured as `benchmarks/speed_32b.py` does, this is 3 % off (root mean square), and 9 % at most.
    """
    fixed = FIXED * layer_weights(text_sizes(as_shapes("32b"))) / layer_weights(text_sizes(shapes))
    return sum((2 + recomputed / shapes.layers) * one.tokens + fixed for passes in updates for one in passes)


def option(
    config, shapes, work: Workload, processes: int, micro: int, checkpointing: bool, cached: bool, kept: int = 0
) -> Option:
    """One candidate with its estimate."""
    memory = replace(
        config.memory, micro_tokens=micro, gradient_checkpointing=checkpointing, kept_layers=kept,
        cache_features=cached,
    )  # fmt: skip
    config, updates = replace(config, memory=memory), work(micro)
    recipe = replace(Recipe.of(config), accumulates=any(len(passes) > 1 for passes in updates))
    distinct = list(dict.fromkeys(one for passes in updates for one in passes))
    found = estimate(config, shapes, distinct, processes, recipe)
    cost = relative_time(updates, shapes, recipe.recomputed(shapes.layers))
    return Option(micro, checkpointing, cached, kept, cost, found)


def plan(
    config: Config, gpu_gib: float, num_processes: int = 1, model_config=None, workload: Workload | None = None,
    margin: float = MARGIN, evaluated: Estimate | None = None,
) -> Plan:  # fmt: skip
    """The fastest passes that fit.

    `memory.micro_tokens` is kept where it is configured, and so is `memory.cache_features`. Chosen is whether there is
    checkpointing, and how many of the last layers keep what they computed all the same: as many as fit.

    Args:
        gpu_gib: memory of the smallest card.
        model_config: as in `memory.estimate`.
        workload: the passes of the run; None: rows of `training.max_length`.
        margin: share of the card that is to stay free.
        evaluated: an estimate of the evaluation, to be named.

    Raises:
        ConfigError: a card, process number or margin that cannot be.
    """
    if not gpu_gib > 0 or num_processes < 1 or not 0 <= margin < 1:
        raise ConfigError(
            f"a plan for {num_processes} processes with {gpu_gib} GiB each and a margin of {margin}: "
            "processes and memory must be above 0, the margin from 0 to 1."
        )
    shapes = as_shapes(model_config if model_config is not None else config.model.name)
    if workload is None:
        length = config.training.max_length
        row = (length, min(32, length - 1), min(length - 33, 196) if length > 64 else 0)
        workload = from_lengths([row] * effective_batch(config, num_processes), config, num_processes)
    sizes = [config.memory.micro_tokens] if config.memory.micro_tokens else SIZES
    room, options = gpu_gib * (1 - margin), []
    for size in sizes:
        way = partial(option, config, shapes, workload, num_processes, size, cached=config.memory.cache_features)
        kept = bisect_right(
            range(1, shapes.layers), room, key=lambda kept: way(checkpointing=True, kept=kept).estimate.device_gib
        )
        options += [way(checkpointing=False), way(checkpointing=True, kept=kept)]
    fitting = [one for one in options if one.estimate.device_gib <= room]
    if fits := bool(fitting):
        chosen = min(fitting, key=lambda one: (one.cost, one.estimate.device_gib))
    else:
        chosen = min(options, key=lambda one: one.estimate.allocated_gib)
    faster = [one for one in options if one.cost < chosen.cost and one.estimate.device_gib > room]
    nearest = min(faster, key=lambda one: one.estimate.device_gib, default=None) if fits else None
    batch = effective_batch(config, num_processes)
    return Plan(chosen, fits, gpu_gib, margin, num_processes, batch, nearest, evaluated)


def refusal(found: Estimate, card_gib: float, name: str, what: str = "training") -> str | None:
    """Why this does not fit a card, with the row that costs most and what to change; None where it fits."""
    needed = found.allocated_gib + found.context_gib
    if needed <= card_gib:
        return None
    most, change = found.costliest(), found.costliest_to_change()
    advice = f"Change {most.setting}" if most.setting else "Choose a smaller model"
    if change and change is not most:
        advice += f", or {change.setting} ({change.name}: {change.gib:.2f} GiB)"
    return (
        f"{name}: {what} needs {needed:.1f} GiB and the card has {card_gib:.1f}. {most.name} takes most: "
        f"{most.gib:.1f} GiB ({most.formula}). {advice}. To try all the same: memory.force=true."
    )


def card_memory(config: Config, device) -> float | None:
    """GiB of the run's smallest GPU, so that all processes make one plan; None for a CPU: nothing is planned there.

    With `memory.gpu_gib` this process takes no more than that from now on.
    """
    import torch

    if device.type != "cuda":
        return None
    total = torch.tensor(float(torch.cuda.get_device_properties(device).total_memory), device=device)
    if config.memory.gpu_gib is not None:
        cap = min(1.0, config.memory.gpu_gib * 2**30 / total.item())
        torch.cuda.set_per_process_memory_fraction(cap)  # of the current device, which is this process's
        total *= cap
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.MIN)
    return total.item() / 2**30


def read_sizes(config: Config) -> ModelShapes:
    """The sizes of the configured model."""
    if is_random(config.model.name):
        return read_shapes(config.model.name)
    return read_shapes(model_folder(config.model.name, config.model.revision, weights=False), config.model.name)


def settle_memory(config: Config, windows, samples: list[Sample], image_id: int, state) -> tuple[Config, Plan | None]:
    """The plan of a run, or its refusal, before any weight is read.

    Args:
        windows: the rows of every update.
        samples: every row of training and validation, and the longest of the tests.

    Returns:
        The configuration to go on with, and a `Plan`; on a CPU the configuration as it is and None, and None too where
        `memory.plan` is off.

    Raises:
        ConfigError: the run or its evaluation does not fit, and `memory.force` is not set.
    """
    card, processes = card_memory(config, state.device), state.num_processes
    if card is None:
        return config, None
    shapes, heavy = read_sizes(config), heaviest_windows(windows)
    longest = max(samples, key=lambda sample: len(sample.input_ids))
    option = max(map(answers, ([sample] for sample in samples)))
    tested = evaluation(config, shapes, len(longest.input_ids), longest.image_tokens, option)
    made: dict[int, list[list[Pass]]] = {}

    def work(limit: int) -> list[list[Pass]]:
        if limit not in made:
            made[limit] = passes_of(heavy, config, shapes, image_id, processes, limit)
        return made[limit]

    if config.memory.plan == "auto":
        found = plan(config, card, processes, shapes, work, evaluated=tested)
        config, needed = found.apply(config), found.chosen.estimate
        if state.is_main_process:
            print("\n".join(found.lines()), flush=True)
    else:
        memory, limit, found = config.memory, micro_tokens(config, state.device), None
        settings = limit, memory.gradient_checkpointing, memory.cache_features, memory.kept_layers
        needed = option(config, shapes, work, processes, *settings).estimate
    problems = [refusal(needed, card, shapes.name), refusal(tested, card, shapes.name, "evaluation")]
    problems = [problem for problem in problems if problem]
    if problems and not config.memory.force:
        raise ConfigError("\n".join(problems))
    return config, found
