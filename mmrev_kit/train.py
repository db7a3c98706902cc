"""The training loop: one function that every process runs, whatever their number."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmrev_kit import runs
from mmrev_kit.batches import Batcher, make_layout, obstacle
from mmrev_kit.checkpoints import load_last, save_adapter, save_last, tidy_run, write_manifest
from mmrev_kit.checks import check_entities, check_statements, encode_all, longest_prompts, settle
from mmrev_kit.config import Config, ConfigError, effective_batch, experiment_dir, load_config, run_dir, seed_for
from mmrev_kit.data import DataError, RunData, read_entities, read_run_data, uses_retention
from mmrev_kit.features import build_features, core_model, drop_tower
from mmrev_kit.loading import add_adapter, compute_dtype, load_base, make_encoder, trainable
from mmrev_kit.mixing import Plan, make_plan
from mmrev_kit.packing import gather_images, image_key
from mmrev_kit.planning import Plan as MemoryPlan
from mmrev_kit.planning import settle_memory
from mmrev_kit.processes import begin, check_agreement, on_interrupt, place
from mmrev_kit.prompts import Encoder, Sample
from mmrev_kit.scheduler import Schedule
from mmrev_kit.speed import matrix_rate
from mmrev_kit.steps import TrainingError, check_finite, chunks, explain, update, validate

EPOCH_START = {"step_in_epoch": 0, "loss_sum": 0.0, "rows": 0}


@dataclass
class Task:
    """What a run will do, known before any weight is read: rows as samples, and the plan over them."""

    data: RunData
    encoder: Encoder
    train: dict[str, list[Sample]]
    val: dict[str, list[Sample]]
    plan: Plan


def prepare(config: Config) -> Task:
    """Read, check and encode everything a run uses, and plan its epochs.

    Raises:
        DataError: with every fault of the data.
        ValueError: the plan cannot be met.
    """
    data, faults = read_run_data(config)
    folder = experiment_dir(config)
    faults += check_entities(read_entities(folder), folder / "entities.json")
    rows = [row for _, _, rows in data.sources() for row in rows]
    faults += check_statements(rows)
    encoder = make_encoder(config)
    samples, more = encode_all(rows, encoder)
    settle(faults + more, config.data.drop_faulty)
    taken = iter(samples)
    encoded = {"train": {}, "pools": {}, "val": {}}
    for part, source, rows in data.sources():
        encoded[part][source] = [sample for sample in (next(taken) for _ in rows) if sample is not None]
    plan = make_plan(
        {source: len(samples) for source, samples in encoded["train"].items()},
        {source: len(samples) for source, samples in encoded["pools"].items()},
        config.retention if uses_retention(config) else None,
        config.experiment.seed,
        config.training.num_epochs,
    )
    return Task(data, encoder, encoded["train"] | encoded["pools"], encoded["val"], plan)


def steps_per_epoch(config: Config, plan: Plan, num_processes: int) -> int:
    """Optimizer steps an epoch; the last one may hold fewer samples."""
    return math.ceil(plan.rows_per_epoch / effective_batch(config, num_processes))


@dataclass
class Run:
    """A run under way in one process. `progress` is what `last/` saves beside the tensors."""

    config: Config
    state: Any  # accelerate.PartialState
    task: Task
    model: Any
    optimizer: Any
    scaler: Any
    dtype: Any
    schedule: Schedule
    history: runs.History
    batcher: Batcher
    memory: MemoryPlan | None = None  # None: on a CPU, or memory.plan is off
    matrix_rate: float | None = None  # operations a second of one card's matrix products
    computed: tuple[int, int] = (0, 0)  # tokens and logits of the latest update
    peaks: list[float] = field(default_factory=list)  # GiB so far, of each process
    progress: dict = field(default_factory=lambda: {"epoch": 0, "global_step": 0} | EPOCH_START)
    skipped: int = 0
    interrupted: bool = False  # an interrupt has arrived in this process
    stops: bool = False  # all processes know of it, and stop together

    @cached_property
    def parameters(self) -> list:
        """What is trained; looked up once: to walk through the whole model takes milliseconds."""
        return trainable(self.model)

    @property
    def batch(self) -> int:
        return effective_batch(self.config, self.state.num_processes)

    @property
    def folder(self) -> Path:
        return run_dir(self.config)


def make_optimizer(config: Config, parameters: list, device):
    """AdamW, in 32 or 8 bit. On CPU the paged 8-bit form is the plain 8-bit one: there is nothing to page to."""
    import torch

    training = config.training
    options = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=device.type == "cpu" or None, **options)
    import bitsandbytes

    paged = training.optimizer == "paged_adamw_8bit"
    if paged and device.type == "cpu":
        print("paged_adamw_8bit: on CPU this is adamw_8bit", flush=True)
    kind = bitsandbytes.optim.PagedAdamW8bit if paged and device.type != "cpu" else bitsandbytes.optim.AdamW8bit
    return kind(parameters, **options)


def used_samples(task: Task) -> list[Sample]:
    """Every sample that the run will meet: the rows of its planned epochs, and the validation rows."""
    rows = dict.fromkeys(row for epoch in range(task.plan.epochs) for row in task.plan.epoch_rows(epoch))
    samples = [task.train[source][index] for source, index in rows]
    return samples + [sample for part in task.val.values() for sample in part]


def make_batcher(config: Config, model, task: Task, dtype, state) -> Batcher:
    """How this process makes its batches: with vision features from the cache, unless that is off or impossible.

    Once the features are made the vision tower leaves the GPU.
    """
    reason = obstacle(model)
    if reason and state.is_main_process:
        print(f"progress: rows are not packed and vision features not kept: {reason}", flush=True)
    features = None
    if config.memory.cache_features and reason is None:
        features = build_features(config, model, task.encoder, used_samples(task), dtype, state)
        drop_tower(model)
    additive = core_model(model).config.text_config._attn_implementation == "eager"
    return Batcher(make_layout(config, model, state.device), task.encoder, features, state.device, additive)


def planned_windows(config: Config, task: Task, batch: int) -> list[list[Sample]]:
    """The samples of every update of the run."""
    windows = []
    for epoch in range(task.plan.epochs):
        rows = [task.train[source][index] for source, index in ordered_rows(config, task, epoch)]
        windows += chunks(rows, batch)
    return windows


def plan_memory(config: Config, task: Task, state) -> tuple[Config, MemoryPlan | None]:
    """See `planning.settle_memory`; the rows are those of every update, and the longest that an evaluation asks."""
    windows = planned_windows(config, task, effective_batch(config, state.num_processes))
    samples = used_samples(task) + longest_prompts(config, task.encoder)
    return settle_memory(config, windows, samples, task.encoder.image_id, state)


def start(config: Config, state) -> Run:
    """Build everything in this process: data, plan, model, optimizer, schedule; go on from `last/` if there is one."""
    import torch

    task = prepare(config)
    if state.num_processes > 1:
        check_agreement(config, task.data.files)
    config, memory = plan_memory(config, task, state)
    base, dtype = load_base(config, state.device), compute_dtype(config, state.device)
    batcher = make_batcher(config, base, task, dtype, state)
    torch.manual_seed(seed_for(config.experiment.seed, "adapter"))  # equal LoRA initialisation on every rank
    model = add_adapter(base, config)
    steps = steps_per_epoch(config, task.plan, state.num_processes)
    run = Run(
        config=config,
        state=state,
        task=task,
        model=model,
        optimizer=make_optimizer(config, trainable(model), state.device),
        scaler=torch.amp.GradScaler(state.device.type, enabled=dtype == torch.float16),
        dtype=dtype,
        schedule=Schedule.from_config(config.training, steps),
        history=runs.History(run_dir(config) / "training_history.json"),
        batcher=batcher,
        memory=memory,
        matrix_rate=matrix_rate(state.device, dtype),
    )
    shape = {"task": config.experiment.task, "steps_per_epoch": steps}
    run.history.data |= shape | {"total_steps": steps * config.training.num_epochs}
    load_last(run)
    return run


@contextmanager
def interrupts_wait(run: Run):
    """Within it an interrupt is only noted: the loop then stops between two updates, on all ranks after the same one,
    so that no file is half written and no interrupt is swallowed. SIGTERM still ends the process at once."""

    def note(number, frame) -> None:
        run.interrupted = True

    with on_interrupt(note):
        yield


def stop_if_interrupted(run: Run) -> None:
    """Save where the run stands and stop, once every process knows of an interrupt.

    Raises:
        KeyboardInterrupt: the run goes on from here when it is started again.
    """
    if run.stops:
        if run.state.is_main_process:
            save_last(run)
        raise KeyboardInterrupt("interrupted by the user")


def ordered_rows(config: Config, task: Task, epoch: int) -> list[tuple[str, int]]:
    """(source, row index) of an epoch in training order; a function of the seed and the epoch alone."""
    rows = task.plan.epoch_rows(epoch)
    if config.training.grouping == "batch":
        return rows

    def key(row: tuple[str, int]):
        return image_key(task.train[row[0]][row[1]], task.encoder.image_id)

    return gather_images(rows, source_of=lambda row: row[0], key_of=key)


def train_epoch(run: Run) -> float:
    """The rest of the current epoch.

    Returns:
        The mean loss over the epoch's samples; those of skipped updates, which have none, are left out.

    Raises:
        KeyboardInterrupt: see `stop_if_interrupted`.
    """
    windows = chunks(ordered_rows(run.config, run.task, run.progress["epoch"]), run.batch)
    run.model.train()
    for window in windows[run.progress["step_in_epoch"] :]:
        samples = [run.task.train[source][index] for source, index in window]
        record = update(run, samples)
        run.progress["step_in_epoch"] += 1
        if math.isfinite(record["loss"]):
            run.progress["loss_sum"] += record["loss"] * len(window)
            run.progress["rows"] += len(window)
        if run.state.is_main_process:
            run.history.add_step(record)
        check_finite(run, record, samples)
        if run.progress["global_step"] % run.config.training.save_steps == 0 and run.state.is_main_process:
            save_last(run)
        stop_if_interrupted(run)
    return run.progress["loss_sum"] / run.progress["rows"] if run.progress["rows"] else math.nan


def finish_epoch(run: Run, train_loss: float, began: float) -> str | None:
    """Validate, decide, save. Returns the reason to end, or None."""
    losses = validate(run)
    rate = run.schedule.lr
    task = run.config.experiment.task
    decisive = losses[task]
    if not math.isfinite(decisive):
        raise TrainingError(f"The validation loss of {task} is {decisive}. {explain(run, run.task.val[task])}")
    decision = run.schedule.observe(decisive)
    run.progress |= {"epoch": run.progress["epoch"] + 1} | EPOCH_START
    if run.state.is_main_process:
        record = {"epoch": run.progress["epoch"], "train_loss": train_loss, "val_loss": losses, "lr": rate}
        record |= {"decision": asdict(decision), "seconds": time.perf_counter() - began}
        if decision.improved:
            save_adapter(run, run.folder / "best", losses)
        run.history.add_epoch(record)
        save_last(run)
    stop_if_interrupted(run)
    return decision.stop


def train(config: Config, state) -> None:
    """The whole run in this process, from data to `final/`."""
    import torch

    tidy_run(config, state)
    run = start(config, state)
    if run.state.is_main_process:
        write_manifest(run)
        run.history.write()
    try:
        with interrupts_wait(run):
            stop = run.schedule.stop
            while not stop:
                began = time.perf_counter()
                stop = finish_epoch(run, train_epoch(run), began)
        if run.state.is_main_process:
            save_adapter(run, run.folder / "final", run.history.data["epochs"][-1]["val_loss"])
            run.history.end("finished", stop)
    except BaseException as error:
        if run.state.is_main_process:
            status = "failed" if isinstance(error, Exception) else "interrupted"
            with suppress(OSError):  # a full disk must not hide the error
                run.history.end(status, str(error) or type(error).__name__)
        if run.stops and run.state.num_processes > 1:
            torch.distributed.barrier()  # the launcher ends all processes when one has ended: the first writes first
        raise


def worker(config: Config) -> None:
    """What each launched process runs. An error is left in the run folder as error_rank<r>.txt for the parent."""
    with place(run_dir(config)) as state:
        train(config, state)


def main() -> None:
    """`accelerate launch -m mmrev_kit.train --config FILE`: the same worker under any launcher."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, such as a run folder's config.yaml")
    parser.add_argument("--overrides", default="", help="section.key=value words")
    given = parser.parse_args()
    config = load_config(given.config, given.overrides)
    config.launch.num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        with place(run_dir(config)) as state:
            if begin(config, state):
                train(config, state)
    except (ConfigError, DataError, TrainingError) as error:
        rank = os.environ.get("RANK", "0")
        told = error if os.environ.get("LOCAL_RANK", "0") == "0" else f"see {run_dir(config)}/error_rank{rank}.txt"
        sys.exit(f"process {rank}: {told}")


if __name__ == "__main__":
    main()
