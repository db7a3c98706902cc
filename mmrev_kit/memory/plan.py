"""The fastest way to run an update that fits a card, chosen from estimates; and the refusal where none fits.

What is chosen (tokens of a micro-batch, checkpointing, layers that are kept from it) changes neither the effective
batch nor the gradient, only how an update is split.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from mmrev_kit.config.project import effective_batch
from mmrev_kit.config.sections import Config, ConfigError, MemoryConfig
from mmrev_kit.data.prompts import Sample
from mmrev_kit.memory.estimate import GIB, Estimate, estimate, evaluation, questions
from mmrev_kit.memory.shapes import UNKNOWN, ModelShapes, as_shapes, read_shapes
from mmrev_kit.model.base_files import FAMILY, family_in
from mmrev_kit.model.bases import family_of, is_random, model_folder
from mmrev_kit.model.batches import GPU_MULTIPLE, answer_tokens, lay_out, micro_tokens, question_shares, shares
from mmrev_kit.model.micro_batch import MicroBatch
from mmrev_kit.model.packing import Layout, attention_scale, layer_weights

MARGIN = 0.08  # of the card that stays free
SIZES = (512, 1024, 2048, 4096, 8192, 16384)  # tokens of a micro-batch that are tried
FIXED = 3000  # tokens' forward pass: what a micro-batch of the 32B takes beside, for launches and 4-bit weights
EXAMINED = 24  # updates looked at: the heaviest of the run
FREE_SETTINGS = ("micro_tokens", "gradient_checkpointing", "kept_layers", "cache_features")  # not in the result
Splitter = Callable[[int], list[list[MicroBatch]]]  # tokens of a micro-batch -> one process's micro-batches by update


def with_memory(config: Config, **settings) -> Config:
    """The configuration with other settings of `memory`."""
    return replace(config, memory=replace(config.memory, **settings))


def free_settings(memory: MemoryConfig) -> dict:
    """The settings of `memory` that the result of a run does not depend on, so that a plan may choose them."""
    return {name: getattr(memory, name) for name in FREE_SETTINGS}


def split_updates(
    updates: Sequence[list[Sample]], config: Config, shapes: ModelShapes, image_id: int, processes: int, limit: int
) -> list[list[MicroBatch]]:
    """The batcher's own micro-batches of each update on a GPU, those of the process that has the largest one."""
    packing, found = config.training.packing, []
    layout = Layout(packing, limit, attention_scale(shapes), GPU_MULTIPLE)
    for samples in updates:
        dealt = [list(lay_out(share, layout)) for share in shares(samples, packing, image_id, processes) if share]
        found.append(max(dealt, key=lambda micro_batches: max(one.tokens for one in micro_batches)))
    return found


def split_questions(
    asked: Sequence[Sample], config: Config, shapes: ModelShapes, image_id: int, processes: int
) -> list[MicroBatch]:
    """The batcher's own micro-batches of the tests after an epoch, of all processes."""
    packing, limit = config.training.packing, config.memory.micro_tokens
    layout = Layout(packing, limit, attention_scale(shapes), GPU_MULTIPLE)
    dealt = question_shares(list(asked), packing, image_id, processes)
    return [one for share in dealt for one in lay_out(share, layout)]


def heaviest_updates(updates: Sequence[list[Sample]], count: int = EXAMINED) -> list[list[Sample]]:
    """The updates with most tokens, and those with the longest row."""
    by_sum = sorted(updates, key=lambda samples: -sum(len(sample.input_ids) for sample in samples))[:count]
    by_row = sorted(updates, key=lambda samples: -max(len(sample.input_ids) for sample in samples))[:2]
    return by_sum + [samples for samples in by_row if not any(samples is other for other in by_sum)]


def padded_updates(lengths: Sequence[tuple[int, int, int]], size: int) -> Splitter:
    """The splitter of updates of `size` rows, side by side, that are known by (tokens, answer, visual tokens)."""
    samples = [Sample(None, range(tokens), tokens - answer, 0, visual) for tokens, answer, visual in lengths]
    updates = [samples[start : start + size] for start in range(0, len(samples), size)]

    def split(limit: int) -> list[list[MicroBatch]]:
        layout = Layout("none", limit)
        return [[replace(one, masked=True) for one in lay_out(update, layout)] for update in updates]

    return split


@dataclass
class Candidate:
    """One way to run an update: its settings, its relative time, and its estimate."""

    memory: MemoryConfig
    cost: float
    estimate: Estimate

    def __str__(self) -> str:
        memory, kept = self.memory, self.memory.kept_layers
        how = "with" if memory.gradient_checkpointing else "without"
        but = f" but for the last {kept} layer{'s' * (kept > 1)}" if kept else ""
        features = "cached vision features" if memory.cache_features else "the vision tower in every pass"
        return f"passes of {memory.micro_tokens:,} tokens {how} checkpointing{but}, {features}"


@dataclass
class MemoryPlan:
    """What was chosen for a card, and what the next faster way would need.

    Attributes:
        fits: whether the margin stays free.
        batch: the effective batch.
        faster: the least of those that would be faster and do not fit.
        evaluation: the estimate of the run's evaluation, to be named.
    """

    chosen: Candidate
    fits: bool
    card_gib: float
    batch: int
    faster: Candidate | None
    evaluation: Estimate | None = None

    def apply(self, config: Config) -> Config:
        """The configuration with the chosen settings; nothing that the result depends on changes."""
        return with_memory(config, **free_settings(self.chosen.memory))

    def lines(self) -> list[str]:
        found, faster = self.chosen.estimate, self.faster
        lines = [
            f"memory: {self.chosen}: {found.allocated_gib:.1f} GiB allocated, {found.device_gib:.1f} on the card, of "
            f"{self.card_gib:.1f} GiB less {MARGIN:.0%}; the costliest pass has {found.micro_batch.tokens:,} tokens in "
            f"{found.micro_batch.sequences} sequences; effective batch {self.batch}, as configured"
        ]
        if faster:
            lines.append(
                f"memory: {self.chosen.cost / faster.cost:.2f} x as fast, {faster} would need "
                f"{faster.estimate.device_gib:.1f} GiB and {MARGIN:.0%}"
            )
        if not self.fits:
            lines.append("memory: nothing leaves the margin free; this takes the least")
        if self.evaluation:
            lines.append(f"memory: evaluation {self.evaluation.device_gib:.1f} GiB on the card")
        return lines

    def record(self) -> dict:
        """For the manifest."""
        record = free_settings(self.chosen.memory) | {"effective_batch": self.batch, "card_gib": self.card_gib}
        return record | {"margin": MARGIN, "estimated_gib": self.chosen.estimate.sizes()}


def candidate(config: Config, shapes: ModelShapes, split: Splitter, processes: int, old: bool = False) -> Candidate:
    """The configured way with its estimate; `memory.micro_tokens` must be configured.

    Its time is that of each token's forward and backward pass, and once more forward in layers that are recomputed,
    and `FIXED` a micro-batch; a smaller layer is done sooner with the same launches, so that these are more. Of 43
    rates of the 32B on three hosts, measured as `benchmarks/speed_32b.py` does with layers as modules, this is 3 % off
    (root mean square), and 9 % at most; of 12 on one host with layers as operations 2.5 % and 4 %.
    """
    updates, layers = split(config.memory.micro_tokens), shapes.num_hidden_layers
    micro_batches = [one for update in updates for one in update]
    fixed = FIXED * layer_weights(as_shapes("32b")) / layer_weights(shapes)
    each = 2 + config.memory.recomputed_layers(layers) / layers
    cost = sum(each * one.tokens + fixed for one in micro_batches)
    accumulates = len(micro_batches) > len(updates)
    return Candidate(config.memory, cost, estimate(config, shapes, micro_batches, processes, accumulates, old=old))


def plan(
    config: Config, gpu_gib: float, num_processes: int = 1, model_config=None, split: Splitter | None = None,
    old: bool = False,
) -> MemoryPlan:  # fmt: skip
    """The fastest micro-batches that fit.

    `memory.micro_tokens` is kept where it is configured, and so is `memory.cache_features`. Chosen is whether there is
    checkpointing, and how many of the last layers keep what they computed all the same: as many as fit.

    Args:
        gpu_gib: memory of the smallest card.
        model_config: as in `memory.estimate`.
        split: how the run's updates are split; None: updates of rows of `training.max_length`.
        old: as in `memory.estimate`.

    Raises:
        ConfigError: a card or a number of processes that cannot be.
    """
    if not gpu_gib > 0 or num_processes < 1:
        raise ConfigError(f"a plan for {num_processes} processes with {gpu_gib} GiB each: both must be above 0.")
    shapes = as_shapes(model_config or config.model.name)
    batch, room, candidates = effective_batch(config, num_processes), gpu_gib * (1 - MARGIN), []
    if split is None:
        length = config.training.max_length
        row = (length, min(32, length - 1), min(length - 33, 196) if length > 64 else 0)
        split = padded_updates([row] * batch, math.ceil(batch / num_processes))

    def way(size: int, checkpointing: bool, kept: int = 0) -> Candidate:
        settings = {"micro_tokens": size, "gradient_checkpointing": checkpointing, "kept_layers": kept}
        return candidate(with_memory(config, **settings), shapes, split, num_processes, old)

    def with_most_kept(size: int) -> Candidate:
        fewer = range(1, shapes.num_hidden_layers)
        return way(size, True, bisect_right(fewer, room, key=lambda kept: way(size, True, kept).estimate.device_gib))

    for size in [config.memory.micro_tokens] if config.memory.micro_tokens else SIZES:
        candidates += [way(size, False), with_most_kept(size)]
    fitting = [one for one in candidates if one.estimate.device_gib <= room]
    if not fitting:
        least = min(candidates, key=lambda one: one.estimate.allocated_gib)
        return MemoryPlan(least, False, gpu_gib, batch, None)
    chosen = min(fitting, key=lambda one: (one.cost, one.estimate.device_gib))
    faster = [one for one in candidates if one.cost < chosen.cost and one.estimate.device_gib > room]
    nearest = min(faster, key=lambda one: one.estimate.device_gib, default=None)
    return MemoryPlan(chosen, True, gpu_gib, batch, nearest)


def refusal(found: Estimate, card_gib: float, name: str, what: str = "training") -> str | None:
    """Why this does not fit a card, with the component that costs most and what to change; None where it fits."""
    needed = found.allocated_gib + found.context_gib
    if needed <= card_gib:
        return None
    most = max(found.components, key=lambda one: one.size)
    changeable = [one for one in found.components if one.setting.startswith(("memory.", "training.", "lora."))]
    change = max(changeable, key=lambda one: one.size)  # without another model
    advice = f"Change {most.setting}" if most.setting else "Choose a smaller model"
    if change is not most:
        advice += f", or {change.setting} ({change.name}: {change.gib:.2f} GiB)"
    return (
        f"{name}: {what} needs {needed:.1f} GiB and the card has {card_gib:.1f}. {most.name} takes most: "
        f"{most.gib:.1f} GiB ({most.formula}). {advice}. To try all the same: memory.force=true."
    )


def card_memory(config: Config, device) -> tuple[float, bool] | None:
    """GiB of the run's smallest GPU, and whether one of them is `old` (see `estimate`), so that all processes make one
    plan; None for a CPU: nothing is planned there.

    With `memory.gpu_gib` this process takes no more than that from now on.
    """
    import torch

    from mmrev_kit.model.kernels import can_compile

    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    if config.memory.gpu_gib is not None:
        cap = min(1.0, config.memory.gpu_gib * GIB / total)
        torch.cuda.set_per_process_memory_fraction(cap)  # of the current device, which is this process's
        total *= cap
    least = torch.tensor([total, can_compile(device)], dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return least[0].item() / GIB, not least[1]


def configured_shapes(config: Config) -> ModelShapes | None:
    """The sizes of the configured model; None for another family than Qwen3-VL, which the estimate does not know."""
    name = config.model.name
    if is_random(name):
        return read_shapes(name) if family_of(name) == FAMILY else None
    folder = model_folder(name, config.model.revision, weights=False)
    return read_shapes(folder, name) if family_in(folder / "config.json", name) == FAMILY else None


def plan_or_refuse(
    config: Config, updates, samples: list[Sample], image_id: int, state, asked: Sequence[Sample] = ()
) -> tuple[Config, MemoryPlan | None]:
    """The plan of a run, or its refusal, before any weight is read.

    Args:
        updates: the rows of every update.
        samples: every row of training and validation, and the longest of the tests.
        asked: the prompts that are asked after each epoch, with each of their options.

    Returns:
        The configuration to go on with, and the plan; on a CPU, and for a family that the estimate does not know, the
        configuration as it is and None, and None too where `memory.plan` is off.

    Raises:
        ConfigError: the run or its evaluation does not fit, and `memory.force` is not set.
    """
    on_card, processes = card_memory(config, state.device), state.num_processes
    if on_card is None:
        return config, None
    card, old = on_card
    shapes, heavy, found = configured_shapes(config), heaviest_updates(updates), None
    if shapes is None:
        if state.is_main_process:
            print(f"memory: as configured, nothing is planned or refused: {UNKNOWN}", flush=True)
        return config, None
    longest = max(samples, key=lambda sample: len(sample.input_ids))
    option = max(answer_tokens([sample]) for sample in samples)
    tested = evaluation(config, shapes, len(longest.input_ids), longest.image_tokens, option)

    @cache
    def split(limit: int) -> list[list[MicroBatch]]:
        return split_updates(heavy, config, shapes, image_id, processes, limit)

    if config.memory.plan == "auto":
        found = replace(plan(config, card, processes, shapes, split, old), evaluation=tested)
        config = split_so = found.apply(config)
        needed = found.chosen.estimate
        if state.is_main_process:
            print("\n".join(found.lines()), flush=True)
    else:
        split_so = with_memory(config, micro_tokens=micro_tokens(config, state.device))
        needed = candidate(split_so, shapes, split, processes, old).estimate
    refusals = [refusal(needed, card, shapes.name), refusal(tested, card, shapes.name, "evaluation")]
    if asked:
        micro_batches = split_questions(asked, split_so, shapes, image_id, processes)
        by_epoch = questions(config, shapes, micro_batches, processes, old)
        if state.is_main_process:
            print(f"memory: the tests after an epoch {by_epoch.device_gib:.1f} GiB on the card", flush=True)
        refusals.append(refusal(by_epoch, card, shapes.name, "asking the tests after an epoch"))
    problems = list(filter(None, refusals))
    if problems and not config.memory.force:
        raise ConfigError("\n".join(problems))
    return config, found
