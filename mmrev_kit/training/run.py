"""A run: what it will do, and everything that it needs in one process."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mmrev_kit.config.project import effective_batch, experiment_dir, run_dir
from mmrev_kit.config.reporting import MARK
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.config.seeds import seed_for
from mmrev_kit.data.checks import (
    check_account,
    check_entities,
    check_people,
    check_statements,
    encode_all,
    longest_prompts,
)
from mmrev_kit.data.faults import DataError, Fault, raise_faults
from mmrev_kit.data.mixing import MixingPlan, make_plan
from mmrev_kit.data.prompts import Encoder, Sample, describe_lengths
from mmrev_kit.data.questions import Asked, encode_questions
from mmrev_kit.data.rows import read_entities
from mmrev_kit.data.run_data import RunData, read_run_data, source_weights, uses_retention
from mmrev_kit.data.tasks import IDENTITY, TASK_TYPES
from mmrev_kit.memory.plan import MemoryPlan, configured_shapes, plan_or_refuse
from mmrev_kit.model.batches import Batcher, make_layout, obstacle
from mmrev_kit.model.features import build_features, bytes_to_write
from mmrev_kit.model.loading import (
    adapter_arguments,
    add_adapter,
    base_arguments,
    load_base,
    torch_dtype,
    trainable,
)
from mmrev_kit.model.packing import gather_images, image_key
from mmrev_kit.model.plain import takes_fast_path, text_config
from mmrev_kit.model.processor import make_encoder
from mmrev_kit.model.qwen3vl import drop_tower
from mmrev_kit.training.by_epoch import ROW_BYTES, cost_line
from mmrev_kit.training.checkpoints import load_last
from mmrev_kit.training.history import History
from mmrev_kit.training.optimizer import make_optimizer
from mmrev_kit.training.preflight import disk_problems, free_bytes
from mmrev_kit.training.processes import check_agreement
from mmrev_kit.training.scheduler import Schedule
from mmrev_kit.training.throughput import measure_peak_flops
from mmrev_kit.training.update import chunks
from mmrev_kit.training.zero import ShardedOptimizer

STEP_BYTES = 512  # at most, of a step in training_history.json
EPOCH_START = {"step_in_epoch": 0, "loss_sum": 0.0, "rows": 0}


@dataclass
class Prepared:
    """What a run will do, known before any weight is read: rows as samples, and the plan over them."""

    data: RunData
    encoder: Encoder
    train: dict[str, list[Sample]]
    val: dict[str, list[Sample]]
    plan: MixingPlan
    asked: list[Asked] = field(default_factory=list)  # after each epoch; none without evaluation.by_epoch
    cost: list[str] = field(default_factory=list)  # of asking them, in a line

    @property
    def rows_by_group(self) -> dict[str, Counter]:
        """{group: {source: rows of the group that an epoch takes of it, on average}} of what is taught."""
        found: dict[str, Counter] = defaultdict(Counter)
        for source in self.plan.tasks:
            for sample in self.train[source]:
                found[sample.row.group][source] += self.plan.counts[source] / self.plan.sizes[source]
        return {group: found[group] for group in sorted(found, reverse=True)}

    @property
    def exposure(self) -> dict[str, float]:
        """{group: how often one of its people comes in an epoch, on average}."""
        people = defaultdict(set)
        for sample in (sample for source in self.plan.tasks for sample in self.train[source]):
            people[sample.row.group].add(sample.row.entity_id)
        return {group: rows.total() / len(people[group]) for group, rows in self.rows_by_group.items()}

    def describe(self) -> list[str]:
        """Plain lines about the rows: how long, how often a person of each group comes, with a third group of which
        sources, and what is not as in the files."""
        rows = [sample for part in (self.train, self.val) for samples in part.values() for sample in samples]
        often = ", ".join(f"{group} {times:g}" for group, times in self.exposure.items())
        lines = [*describe_lengths(rows, self.encoder), f"rows of one person in an epoch: {often}"]
        parts = [
            f"{group} {', '.join(f'{source} {count:g}' for source, count in own.items())}"
            for group, own in self.rows_by_group.items()
        ]
        lines += [f"rows in an epoch: {'; '.join(parts)}"] if len(parts) > 2 else []
        return [*lines, *self.data.notes, *self.cost]


def prepare(config: Config) -> Prepared:
    """Read, check and encode everything a run uses, and plan its epochs.

    Raises:
        DataError: with every fault of the data.
        ConfigError: the plan cannot be met.
    """
    data, faults = read_run_data(config)
    folder = experiment_dir(config)
    entities = read_entities(folder)
    faults += check_entities(entities, folder / "entities.json")
    own = [row for _, source, rows in data.sources() if source in (*TASK_TYPES, IDENTITY.name) for row in rows]
    faults += check_people(own, entities, folder, config.taught)
    rows = [row for _, _, rows in data.sources() for row in rows]
    encoder = make_encoder(config)
    samples, more = encode_all(rows, encoder)
    faults += check_statements(rows, encoder.looks)
    raise_faults(faults + more, config.data.drop_faulty)
    taken = iter(samples)
    encoded = {"train": {}, "pools": {}, "val": {}}
    for part, source, rows in data.sources():
        encoded[part][source] = [sample for sample in (next(taken) for _ in rows) if sample is not None]
    kept = [sample.row for sources in encoded.values() for part in sources.values() for sample in part]
    check_account(data.files, kept + data.left_out, faults + more)
    empty = [f"{source} ({part})" for part, sources in encoded.items() for source in sources if not sources[source]]
    if empty:
        reason = f"no row is left for {', '.join(empty)}."
        raise DataError([Fault(str(folder), reason, "Restore the rows, or make the data again.")])
    mixed, repeated = uses_retention(config), {}
    if config.experiment.match_exposure:
        encoded["train"], repeated = match_exposure(encoded["train"])
        if not repeated:
            data.notes.append("experiment.match_exposure: there is no control group whose exposure main could match")
    try:
        plan = make_plan(
            {source: len(samples) for source, samples in encoded["train"].items()},
            {source: len(samples) for source, samples in encoded["pools"].items()},
            source_weights(config.retention) if mixed else {},
            config.retention.retention_ratio if mixed else 0.0,
            config.experiment.seed,
            config.training.num_epochs,
            repeated,
            {IDENTITY.name: config.mitigation.identity},
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    task = Prepared(data, encoder, encoded["train"] | encoded["pools"], encoded["val"], plan)
    if config.evaluation.by_epoch:
        task.asked = encode_questions(config, encoder)
        updates = epoch_updates(config, task, 0, effective_batch(config, config.launch.num_processes or 1))
        packing, recomputed = "none", float(config.memory.gradient_checkpointing)  # of a family on the plain path
        if shapes := configured_shapes(config):
            packing, layers = config.training.packing, shapes.num_hidden_layers
            recomputed = config.memory.recomputed_layers(layers) / layers
        task.cost = [cost_line(task.asked, updates, packing, encoder.image_id, recomputed)]
    return task


def match_exposure(train: dict[str, list[Sample]]) -> tuple[dict[str, list[Sample]], dict[str, int]]:
    """The sources with main's rows in sources of their own, and how many of these an epoch takes, drawn in shuffled
    passes, so that a main person comes as often as a control one; no row comes less than once. Without a control
    group nothing is repeated.
    """
    main, others = {}, {}
    for source, samples in train.items():
        for name, part, own in ((f"{source}_main", main, True), (source, others, False)):
            if rows := [sample for sample in samples if (sample.row.group == "main") == own]:
                part[name] = rows
    rows, people = Counter(), defaultdict(set)
    for sample in (sample for samples in train.values() for sample in samples):
        rows[sample.row.group] += 1
        people[sample.row.group].add(sample.row.entity_id)
    if not rows["control"]:
        return train, {}
    factor = max(1.0, rows["control"] / len(people["control"]) / (rows["main"] / len(people["main"])))
    return main | others, {name: round(factor * len(part)) for name, part in main.items()}


def steps_per_epoch(config: Config, plan: MixingPlan, num_processes: int) -> int:
    """Optimizer steps an epoch; the last one may hold fewer samples."""
    return math.ceil(plan.rows_per_epoch / effective_batch(config, num_processes))


@dataclass
class Run:
    """A run under way in one process. `progress` is what `last/` saves beside the tensors."""

    config: Config
    state: Any  # accelerate.PartialState
    task: Prepared
    model: Any
    optimizer: Any
    scaler: Any
    dtype: Any
    schedule: Schedule
    history: History
    batcher: Batcher
    memory: MemoryPlan | None = None  # None: on a CPU, or memory.plan is off
    peak_flops: float | None = None  # FLOP/s of one card's matrix products; None: not known, or the model's are not
    computed: tuple[int, int] = (0, 0)  # tokens and logits of the latest update
    peaks: list[float] = field(default_factory=list)  # GiB so far, of each process
    progress: dict = field(default_factory=lambda: {"epoch": 0, "global_step": 0} | EPOCH_START)
    skipped: int = 0  # updates without a step, in a row
    taken: int = 0  # steps of the optimizer so far, which the warm-up counts
    interrupted: bool = False  # an interrupt has arrived in this process
    stops: bool = False  # all processes know of it, and stop together

    @cached_property
    def parameters(self) -> list:
        """What is trained; looked up once: to walk through the whole model takes milliseconds."""
        return trainable(self.model)

    @property
    def num_trained(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def batch(self) -> int:
        return effective_batch(self.config, self.state.num_processes)

    @property
    def folder(self) -> Path:
        return run_dir(self.config)


def used_samples(task: Prepared) -> list[Sample]:
    """Every sample that the run will meet: the rows of its planned epochs, the validation rows, and each question that
    is asked after an epoch, with one of its options."""
    rows = dict.fromkeys(row for epoch in range(task.plan.epochs) for row in task.plan.epoch_rows(epoch))
    samples = [task.train[source][index] for source, index in rows]
    samples += [sample for part in task.val.values() for sample in part]
    return samples + [one.samples[0] for one in task.asked]


def make_batcher(config: Config, model, task: Prepared, dtype, state) -> Batcher:
    """How this process makes its batches: with vision features from the cache, unless that is off or impossible.

    Once the features are made the vision tower leaves the GPU.
    """
    reason = obstacle(model)
    if reason and state.is_main_process:
        print(f"{MARK}rows are not packed and vision features not kept: {reason}", flush=True)
    features = None
    if config.memory.cache_features and reason is None:
        features = build_features(config, model, task.encoder, used_samples(task), dtype, state)
        drop_tower(model)
    additive = text_config(model)._attn_implementation == "eager"
    return Batcher(make_layout(config, model, state.device), task.encoder, features, state.device, additive)


def epoch_updates(config: Config, task: Prepared, epoch: int, batch: int) -> list[list[Sample]]:
    """The samples of every update of an epoch."""
    rows = [task.train[source][index] for source, index in ordered_rows(config, task, epoch)]
    return chunks(rows, batch)


def planned_updates(config: Config, task: Prepared, batch: int) -> list[list[Sample]]:
    """The samples of every update of the run."""
    return [update for epoch in range(task.plan.epochs) for update in epoch_updates(config, task, epoch, batch)]


def plan_memory(config: Config, task: Prepared, state) -> tuple[Config, MemoryPlan | None]:
    """See `memory.plan.plan_or_refuse`; the rows are those of every update, and the longest that an evaluation asks;
    with `evaluation.by_epoch` the questions after an epoch, too."""
    updates = planned_updates(config, task, effective_batch(config, state.num_processes))
    samples = used_samples(task) + longest_prompts(config, task.encoder)
    asked = [sample for one in task.asked for sample in one.samples]
    return plan_or_refuse(config, updates, samples, task.encoder.image_id, state, asked)


def check_disk(config: Config, task: Prepared, steps: int, dtype, device) -> None:
    """Refuse a run that will write more than the disk has room for, before any weight is read.

    Args:
        steps: of the optimizer, in the whole run.

    Raises:
        ConfigError: with what is needed for what, and what is free.
    """
    shapes, features = configured_shapes(config), 0
    if config.memory.cache_features and shapes:
        shape = 1 + shapes.v_deepstack, shapes.hidden_size
        features = bytes_to_write(config, task.encoder, used_samples(task), shape, dtype, device)
    history = 2 * (STEP_BYTES * steps + ROW_BYTES * len(task.asked) * config.training.num_epochs)
    if problems := disk_problems(config, free_bytes(config), shapes, history, features):
        raise ConfigError("\n".join(problems))


def start(config: Config, state) -> Run:
    """Build everything in this process: data, plan, model, optimizer, schedule; go on from `last/` if there is one."""
    task = prepare(config)
    if state.num_processes > 1:
        check_agreement(config, task.data.files)
    config, memory = plan_memory(config, task, state)
    dtype = torch_dtype(config.quantization.compute_dtype, state.device)
    steps = steps_per_epoch(config, task.plan, state.num_processes)
    check_disk(config, task, steps * config.training.num_epochs, dtype, state.device)
    if state.is_main_process:
        for line in [*task.cost, f"loading {config.model.name}"]:
            print(f"{MARK}{line}", flush=True)
    base = load_base(**base_arguments(config, state.device))
    batcher = make_batcher(config, base, task, dtype, state)
    torch.manual_seed(seed_for(config.experiment.seed, "adapter"))  # equal LoRA initialisation on every rank
    model = add_adapter(base, **adapter_arguments(config))
    optimizer = make_optimizer(config, trainable(model), state.device)
    if config.launch.mode == "deepspeed":
        optimizer = ShardedOptimizer(config, optimizer, trainable(model), state.device)
    scaler = torch.amp.GradScaler(state.device.type, enabled=dtype == torch.float16)
    scaler.scale(torch.zeros(1, device=state.device))  # makes the scale: a process's first update may have no row
    run = Run(
        config=config,
        state=state,
        task=task,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        dtype=dtype,
        schedule=Schedule.from_config(config.training, steps),
        history=History(run_dir(config) / "training_history.json"),
        batcher=batcher,
        memory=memory,
        peak_flops=measure_peak_flops(state.device, dtype) if takes_fast_path(base) else None,
    )
    shape = {"task": config.experiment.task, "steps_per_epoch": steps}
    run.history.data |= shape | {"total_steps": steps * config.training.num_epochs}
    if not config.launch.overwrite:  # what is to be replaced is still there
        load_last(run)
    return run


def ordered_rows(config: Config, task: Prepared, epoch: int) -> list[tuple[str, int]]:
    """(source, row index) of an epoch in training order; a function of the seed and the epoch alone."""
    rows = task.plan.epoch_rows(epoch)
    if config.training.grouping == "batch":
        return rows

    def key(row: tuple[str, int]):
        return image_key(task.train[row[0]][row[1]], task.encoder.image_id)

    return gather_images(rows, source_of=lambda row: row[0], key_of=key)
