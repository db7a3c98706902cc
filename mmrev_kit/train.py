"""The training loop: one function that every process runs, whatever their number.

Gradients are summed over processes once an update, after all its samples have been through: the result depends on
neither the micro-batch nor the number of processes, and a process without rows in a last, partial window takes part
with zeros.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmrev_kit import runs
from mmrev_kit.checkpoints import load_last, save_adapter, save_last, write_manifest
from mmrev_kit.checks import check_entities, check_statements, encode_all, settle
from mmrev_kit.config import Config, effective_batch, experiment_dir, load_config, run_dir, seed_for
from mmrev_kit.data import RunData, read_entities, read_run_data, uses_retention
from mmrev_kit.loading import add_adapter, compute_dtype, load_base, make_encoder, trainable
from mmrev_kit.mixing import Plan, make_plan
from mmrev_kit.prompts import IGNORED, Encoder, Sample
from mmrev_kit.scheduler import Schedule

EPOCH_START = {"step_in_epoch": 0, "loss_sum": 0.0, "rows": 0}
MAX_SKIPPED = 8  # fp16: updates in a row without a finite gradient before the run stops


def chunks(items: list, size: int) -> list[list]:
    """`items` in runs of `size`; the last one may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


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
    progress: dict = field(default_factory=lambda: {"epoch": 0, "global_step": 0} | EPOCH_START)
    skipped: int = 0

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
        return torch.optim.AdamW(parameters, **options)
    import bitsandbytes

    paged = training.optimizer == "paged_adamw_8bit"
    if paged and device.type == "cpu":
        print("paged_adamw_8bit: on CPU this is adamw_8bit", flush=True)
    kind = bitsandbytes.optim.PagedAdamW8bit if paged and device.type != "cpu" else bitsandbytes.optim.AdamW8bit
    return kind(parameters, **options)


def start(config: Config, state) -> Run:
    """Build everything in this process: data, plan, model, optimizer, schedule; go on from `last/` if there is one."""
    import torch

    task = prepare(config)
    torch.manual_seed(seed_for(config.experiment.seed, "adapter"))  # equal LoRA initialisation on every rank
    model = add_adapter(load_base(config, state.device), config)
    dtype = compute_dtype(config, state.device)
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
    )
    shape = {"task": config.experiment.task, "steps_per_epoch": steps}
    run.history.data |= shape | {"total_steps": steps * config.training.num_epochs}
    load_last(run)
    return run


def sample_losses(model, batch: dict, device, dtype):
    """The loss of each sample of a batch: the mean cross-entropy over its answer tokens, <|im_end|> included.

    Args:
        batch: from `Encoder.collate`.

    Returns:
        (samples,) fp32 losses, in nats a token.

    Raises:
        TrainingError: a sample has no answer token.
    """
    import torch

    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    labels = batch.pop("labels")[:, 1:]  # position i predicts token i + 1
    kept = labels != IGNORED
    counts = kept.sum(1)
    if (counts == 0).any():
        raise TrainingError("A sample has no answer token left to learn from. Run the data check.")
    wanted = torch.nn.functional.pad(kept, (0, 1))  # logits where an answer token is predicted, nowhere else
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = model(**batch, logits_to_keep=wanted).logits
    losses = torch.nn.functional.cross_entropy(logits.float(), labels[kept], reduction="none")
    owner = kept.nonzero()[:, 0]
    return torch.zeros(len(labels), device=device).index_add(0, owner, losses) / counts


def _sum_over_processes(run: Run, values: list[float]) -> list[float]:
    import torch

    total = torch.tensor(values, dtype=torch.float64, device=run.state.device)
    if run.state.num_processes > 1:
        torch.distributed.all_reduce(total)
    return total.tolist()


def _sum_gradients(run: Run) -> None:
    """Add up the gradients of all processes; a process that had no row in this window adds zeros."""
    import torch

    parameters = trainable(run.model)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if run.state.num_processes == 1:
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    torch.distributed.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


def accumulate(run: Run, samples: list[Sample]) -> float:
    """Backward through one effective batch; afterwards `.grad` holds the gradient of its mean loss on every rank.

    Returns:
        The mean loss over `samples`.
    """
    mine = samples[run.state.process_index :: run.state.num_processes]
    total = 0.0
    for micro in chunks(mine, run.config.training.batch_size):
        losses = sample_losses(run.model, run.task.encoder.collate(micro), run.state.device, run.dtype)
        run.scaler.scale(losses.sum() / len(samples)).backward()
        total += losses.detach().sum().item()
    _sum_gradients(run)
    return _sum_over_processes(run, [total])[0] / len(samples)


def update(run: Run, samples: list[Sample]) -> dict:
    """One optimizer step on one effective batch.

    Returns:
        The step's record for the history; `skipped` is set where the gradient was not finite and no step was taken.

    Raises:
        TrainingError: a loss or gradient that is not finite (in fp16: `MAX_SKIPPED` updates in a row).
    """
    import torch

    began, step = time.perf_counter(), run.progress["global_step"]
    torch.manual_seed(seed_for(run.config.experiment.seed, "dropout", step, run.state.process_index))
    rate = run.schedule.lr_at(step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    loss = accumulate(run, samples)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(trainable(run.model), run.config.training.max_grad_norm).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite or run.scaler.is_enabled():
        run.scaler.step(run.optimizer)
        run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.skipped = 0 if finite else run.skipped + 1
    run.progress["global_step"] += 1
    record = {"global_step": step + 1, "epoch": run.progress["epoch"] + 1, "loss": loss, "lr": rate, "grad_norm": norm}
    record["samples_per_second"] = len(samples) / (time.perf_counter() - began)
    record["peak_memory_gib"] = peak_memory_gib(run.state.device)
    return record if finite else record | {"skipped": True}


def check_finite(run: Run, record: dict) -> None:
    """Stop a run that no longer learns.

    Raises:
        TrainingError: naming the step and what to change.
    """
    if not record.get("skipped"):
        return
    if not run.scaler.is_enabled():
        raise TrainingError(
            f"Step {record['global_step']}: loss {record['loss']}, gradient norm {record['grad_norm']}. "
            "Lower training.learning_rate, or look for a broken weight or image."
        )
    if run.skipped >= MAX_SKIPPED:
        raise TrainingError(
            f"Step {record['global_step']}: {run.skipped} fp16 updates in a row had no finite gradient. "
            "Use quantization.compute_dtype=bf16 where the GPU has it, or lower training.learning_rate."
        )


def peak_memory_gib(device) -> float:
    """Highest memory use of this process so far: allocated on the GPU, or resident on CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def train_epoch(run: Run) -> float:
    """The rest of the current epoch.

    Returns:
        The mean loss over the epoch's samples; those of skipped updates, which have none, are left out.
    """
    rows = run.task.plan.epoch_rows(run.progress["epoch"])
    windows = chunks(rows, run.batch)
    run.model.train()
    for window in windows[run.progress["step_in_epoch"] :]:
        record = update(run, [run.task.train[source][index] for source, index in window])
        run.progress["step_in_epoch"] += 1
        if math.isfinite(record["loss"]):
            run.progress["loss_sum"] += record["loss"] * len(window)
            run.progress["rows"] += len(window)
        if run.state.is_main_process:
            run.history.add_step(record)
        check_finite(run, record)
        if run.progress["global_step"] % run.config.training.save_steps == 0 and run.state.is_main_process:
            save_last(run)
    return run.progress["loss_sum"] / run.progress["rows"] if run.progress["rows"] else math.nan


def validate(run: Run) -> dict[str, float]:
    """The mean loss of the validation rows of each source, each row counted once over all processes."""
    import torch

    run.model.eval()
    totals = []
    with torch.no_grad():
        for samples in run.task.val.values():
            mine, total = samples[run.state.process_index :: run.state.num_processes], 0.0
            for micro in chunks(mine, max(8, run.config.training.batch_size)):
                batch = run.task.encoder.collate(micro)
                total += sample_losses(run.model, batch, run.state.device, run.dtype).sum().item()
            totals.append(total)
    sums = _sum_over_processes(run, totals)
    return {source: total / len(rows) for (source, rows), total in zip(run.task.val.items(), sums, strict=True)}


def finish_epoch(run: Run, train_loss: float, began: float) -> str | None:
    """Validate, decide, save. Returns the reason to end, or None."""
    losses = validate(run)
    rate = run.schedule.lr
    decisive = losses[run.config.experiment.task]
    if not math.isfinite(decisive):
        raise TrainingError(f"The validation loss of {run.config.experiment.task} is {decisive}.")
    decision = run.schedule.observe(decisive)
    run.progress |= {"epoch": run.progress["epoch"] + 1} | EPOCH_START
    if run.state.is_main_process:
        record = {"epoch": run.progress["epoch"], "train_loss": train_loss, "val_loss": losses, "lr": rate}
        record |= {"decision": asdict(decision), "seconds": time.perf_counter() - began}
        if decision.improved:
            save_adapter(run, run.folder / "best", losses)
        run.history.add_epoch(record)
        save_last(run)
    return decision.stop


def train(config: Config, state) -> None:
    """The whole run in this process, from data to `final/`."""
    run = start(config, state)
    if run.state.is_main_process:
        write_manifest(run)
        run.history.write()
    try:
        stop = run.schedule.stop
        while not stop:
            began = time.perf_counter()
            stop = finish_epoch(run, train_epoch(run), began)
    except BaseException as error:
        if run.state.is_main_process:
            status = "failed" if isinstance(error, Exception) else "interrupted"
            run.history.end(status, str(error) or type(error).__name__)
        raise
    if run.state.is_main_process:
        save_adapter(run, run.folder / "final", run.history.data["epochs"][-1]["val_loss"])
        run.history.end("finished", stop)


def worker(config: Config) -> None:
    """What each launched process runs. An error is left in the run folder as error_rank<r>.txt for the parent."""
    import torch

    on_cpu, several = not torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1")) > 1
    if on_cpu and several:
        torch.set_num_threads(1)  # a forked process hangs in its first threaded region if the kernel ran one before
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # so that accelerate does not raise the number again
    from accelerate import PartialState

    state = PartialState(cpu=on_cpu)
    try:
        train(config, state)
    except BaseException as error:
        text = traceback.format_exc() if not isinstance(error, TrainingError) else f"TrainingError: {error}\n"
        runs.write_text(run_dir(config) / f"error_rank{state.process_index}.txt", text)
        raise
    finally:
        state.destroy_process_group()


def main() -> None:
    """`accelerate launch -m mmrev_kit.train --config FILE`: the same worker under any launcher."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, such as a run folder's config.yaml")
    parser.add_argument("--overrides", default="", help="section.key=value words")
    given = parser.parse_args()
    worker(load_config(given.config, given.overrides))


if __name__ == "__main__":
    main()
