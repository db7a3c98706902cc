"""One update and one validation: the arithmetic that every split into micro-batches and processes must agree on.

Gradients are summed over processes once an update, after all its samples have been through: the result depends on
neither the micro-batch nor the number of processes, and a process without rows in a last, smaller update takes part
with zeros.
"""

import math
import time

import torch

from mmrev_kit.config.errors import Told
from mmrev_kit.config.seeds import seed_for
from mmrev_kit.data.prompts import Sample
from mmrev_kit.model.batches import Batch, from_labels
from mmrev_kit.model.scoring import answer_losses
from mmrev_kit.training.throughput import peak_memory_gib, speed
from mmrev_kit.training.zero import ShardedOptimizer


def chunks(items: list, size: int) -> list[list]:
    """`items` in runs of `size`; the last one may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


class TrainingError(Told, RuntimeError):
    """Training cannot go on; the message says why and what to change."""


def sample_losses(model, batch: Batch | dict, device, dtype):
    """The loss of each sample of a batch: the mean cross-entropy over its answer tokens, with the one that ends it.

    Args:
        batch: from a `Batcher`, or from `Encoder.collate`.

    Returns:
        (samples,) fp32 losses, in nats a token.

    Raises:
        TrainingError: a sample has no answer token.
    """
    if isinstance(batch, dict):
        batch = from_labels(batch, device)
    counts = torch.bincount(batch.owner, minlength=batch.rows)  # on the CPU: nothing waits for the GPU
    if (counts == 0).any():
        raise TrainingError("A sample has no answer token left to learn from. Run the data check.")
    losses = answer_losses(model, batch, device, dtype)
    totals = torch.zeros(batch.rows, device=device).index_add(0, batch.owner.to(device), losses)
    return totals / counts.to(device)


def sum_over_processes(run, values: list[float]) -> list[float]:
    """The values, each summed over all processes, which give as many."""
    total = torch.tensor(values, dtype=torch.float64, device=run.state.device)
    if run.state.num_processes > 1:
        torch.distributed.all_reduce(total)
    return total.tolist()


def _sum_gradients(run) -> None:
    """Add up the gradients of all processes; a process that had no row in this update adds zeros.

    A `ShardedOptimizer` keeps each process's share of the sum and leaves none in the parameters.
    """
    parameters = run.parameters
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if isinstance(run.optimizer, ShardedOptimizer):
        run.optimizer.sum_gradients()
        return
    if run.state.num_processes == 1:
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    torch.distributed.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


def accumulate(run, samples: list[Sample]) -> float:
    """Backward through one effective batch; afterwards `.grad` holds the gradient of its mean loss on every rank.

    `run.computed` is set to the tokens and logits computed for it by all processes, `run.peaks` to each process's peak
    memory so far, in GiB.

    Returns:
        The mean loss over `samples`.
    """
    losses, tokens, logits = [], 0, 0
    for batch in run.batcher.batches(samples, run.state.process_index, run.state.num_processes):
        batch_losses = sample_losses(run.model, batch, run.state.device, run.dtype)
        run.scaler.scale(batch_losses.sum() / len(samples)).backward()
        losses.append(batch_losses.detach())  # read at the end: the next batch is made while the GPU works on this one
        tokens, logits = tokens + batch.tokens, logits + len(batch.target)
    _sum_gradients(run)
    total = sum(part.double().sum().item() for part in losses)
    peaks = [0.0] * run.state.num_processes
    peaks[run.state.process_index] = peak_memory_gib(run.state.device)
    sums = sum_over_processes(run, [total, tokens, logits, float(run.interrupted), *peaks])
    loss, tokens, logits, run.stops, *run.peaks = sums
    run.computed = int(tokens), int(logits)
    return loss / len(samples)


def _step(run, loss: float) -> float:
    """Clip and step, unless something is not finite; returns the norm of the gradient before it was clipped."""
    if isinstance(run.optimizer, ShardedOptimizer):
        return run.optimizer.step(run.scaler)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.config.training.max_grad_norm).item()
    if (math.isfinite(loss) and math.isfinite(norm)) or run.scaler.is_enabled():
        run.scaler.step(run.optimizer)
        run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return norm


def update(run, samples: list[Sample]) -> dict:
    """One optimizer step on one effective batch.

    Returns:
        The step's record for the history; `skipped` is set where the gradient was not finite and no step was taken,
        which `diagnose.check_finite` judges.
    """
    began, step = time.perf_counter(), run.progress["global_step"]
    torch.manual_seed(seed_for(run.config.experiment.seed, "dropout", step, run.state.process_index))
    rate = run.schedule.lr_at(run.taken)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    loss = accumulate(run, samples)
    norm = _step(run, loss)
    finite = math.isfinite(loss) and math.isfinite(norm)
    run.skipped, run.taken = (0, run.taken + 1) if finite else (run.skipped + 1, run.taken)
    run.progress["global_step"] += 1
    record = {"global_step": step + 1, "epoch": run.progress["epoch"] + 1, "loss": loss, "lr": rate, "grad_norm": norm}
    record["samples"] = len(samples)
    record |= speed(run, len(samples), time.perf_counter() - began)
    record["peak_memory_gib"] = max(run.peaks)
    if run.state.num_processes > 1:
        record["peak_memory_gib_by_process"] = run.peaks
    return record if finite else record | {"skipped": True}


def validate(run) -> dict[str, float]:
    """The mean loss of the validation rows of each source, each row counted once over all processes."""
    run.model.eval()
    totals = []
    with torch.no_grad():
        for samples in run.task.val.values():
            total = 0.0
            for batch in run.batcher.batches(samples, run.state.process_index, run.state.num_processes):
                total += sample_losses(run.model, batch, run.state.device, run.dtype).sum().item()
            totals.append(total)
    *sums, run.stops = sum_over_processes(run, [*totals, float(run.interrupted)])
    return {source: total / len(rows) for (source, rows), total in zip(run.task.val.items(), sums, strict=True)}
