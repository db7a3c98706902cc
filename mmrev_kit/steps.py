"""One update and one validation: the arithmetic that every split of the work must agree on.

Gradients are summed over processes once an update, after all its samples have been through: the result depends on
neither the micro-batch nor the number of processes, and a process without rows in a last, partial window takes part
with zeros.
"""

from __future__ import annotations

import math
import resource
import time
from functools import partial

from mmrev_kit.batches import Batch, from_labels
from mmrev_kit.config import seed_for
from mmrev_kit.features import core_model
from mmrev_kit.fused import fuse, takes_wanted, unfuse
from mmrev_kit.layers import Recipe
from mmrev_kit.prompts import Sample
from mmrev_kit.speed import work

MAX_SKIPPED = 8  # fp16: updates in a row without a finite gradient before the run stops
MIN_SCALE = 1.0  # fp16: a loss scale below it (2^16 at first, halved by each skipped update) stops the run too


def chunks(items: list, size: int) -> list[list]:
    """`items` in runs of `size`; the last one may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


def sample_losses(model, batch: Batch | dict, device, dtype):
    """The loss of each sample of a batch: the mean cross-entropy over its answer tokens, <|im_end|> included.

    Args:
        batch: from a `Batcher`, or from `Encoder.collate`.

    Returns:
        (samples,) fp32 losses, in nats a token.

    Raises:
        TrainingError: a sample has no answer token.
    """
    import torch

    if isinstance(batch, dict):
        batch = from_labels(batch, device)
    counts = torch.bincount(batch.owner, minlength=batch.rows)  # on the CPU: nothing waits for the GPU
    if (counts == 0).any():
        raise TrainingError("A sample has no answer token left to learn from. Run the data check.")
    inputs = dict(batch.inputs)
    if takes_wanted(core_model(model)):
        inputs["wanted"] = inputs.pop("logits_to_keep")
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = model(**inputs).logits.flatten(0, -2)
    if batch.predictor is not None:
        logits = logits[batch.predictor]
    losses = torch.nn.functional.cross_entropy(logits.float(), batch.target, reduction="none")
    totals = torch.zeros(batch.rows, device=device).index_add(0, batch.owner.to(device), losses)
    return totals / counts.to(device)


def _sum_over_processes(run, values: list[float]) -> list[float]:
    import torch

    total = torch.tensor(values, dtype=torch.float64, device=run.state.device)
    if run.state.num_processes > 1:
        torch.distributed.all_reduce(total)
    return total.tolist()


def _sum_gradients(run) -> None:
    """Add up the gradients of all processes; a process that had no row in this window adds zeros."""
    import torch

    parameters = run.parameters
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
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
        found = sample_losses(run.model, batch, run.state.device, run.dtype)
        run.scaler.scale(found.sum() / len(samples)).backward()
        losses.append(found.detach())  # read at the end: the next batch is made while the GPU works on this one
        tokens, logits = tokens + batch.tokens, logits + len(batch.target)
    _sum_gradients(run)
    total = sum(part.double().sum().item() for part in losses)
    peaks = [0.0] * run.state.num_processes
    peaks[run.state.process_index] = peak_memory_gib(run.state.device)
    sums = _sum_over_processes(run, [total, tokens, logits, float(run.interrupted), *peaks])
    loss, tokens, logits, run.stops, *run.peaks = sums
    run.computed = int(tokens), int(logits)
    return loss / len(samples)


def update(run, samples: list[Sample]) -> dict:
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
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.config.training.max_grad_norm).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite or run.scaler.is_enabled():
        run.scaler.step(run.optimizer)
        run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.skipped = 0 if finite else run.skipped + 1
    run.progress["global_step"] += 1
    record = {"global_step": step + 1, "epoch": run.progress["epoch"] + 1, "loss": loss, "lr": rate, "grad_norm": norm}
    record |= speed(run, len(samples), time.perf_counter() - began)
    record["peak_memory_gib"] = max(run.peaks)
    if run.state.num_processes > 1:
        record["peak_memory_gib_by_process"] = run.peaks
    return record if finite else record | {"skipped": True}


def speed(run, rows: int, seconds: float) -> dict[str, float | None]:
    """samples_per_second and tokens_per_second (tokens that went through the model) over all processes, and
    matrix_share: the share of the cards' matrix rate that `work` of these tokens is, recomputation counted as work;
    None where the rate is unknown."""
    tokens, logits = run.computed
    share = None
    if run.matrix_rate:
        text = core_model(run.model).config.text_config
        again = Recipe.of(run.config).recomputed(text.num_hidden_layers) / text.num_hidden_layers
        done = work(text, tokens, logits, again, run.config.lora.target_modules)
        share = done / seconds / run.matrix_rate / run.state.num_processes
    return {"samples_per_second": rows / seconds, "tokens_per_second": tokens / seconds, "matrix_share": share}


def check_finite(run, record: dict, samples: list[Sample]) -> None:
    """Stop a run that no longer learns, and find out where it fails.

    Args:
        record: of the latest update, which was made on `samples`.

    Raises:
        TrainingError: naming the step, the first layer or image with a value that is not finite, and what to change.
            All processes raise the same.
    """
    if not record.get("skipped"):
        return
    reason = f"loss {record['loss']}, gradient norm {record['grad_norm']}"
    if run.scaler.is_enabled():
        scale = run.scaler.get_scale()
        if run.skipped < MAX_SKIPPED and scale >= MIN_SCALE:
            return
        reason = f"{run.skipped} fp16 updates in a row had no finite gradient and were skipped; loss scale {scale:g}"
    raise TrainingError(f"Step {record['global_step']}: {reason}. {explain(run, samples)}")


def explain(run, samples: list[Sample]) -> str:
    """Where values that are not finite come from, as every process sees it in its share; see `find_fault`."""
    found = [find_fault(run, samples)]
    if run.state.num_processes > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
    ranks = [rank for rank, fault in enumerate(found) if fault]
    if not ranks:
        return "One more pass over the same rows met no such value: look for a faulty card, or lower the learning rate."
    if len(found) == 1:
        return found[0]
    return f"In process {', '.join(map(str, ranks))} of 0 to {len(found) - 1}: {found[ranks[0]]}"


def find_fault(run, samples: list[Sample]) -> str | None:
    """One more pass over this process's share of the samples, watching every layer.

    Returns:
        The first thing that is not finite, in the order data, forward, backward, and what to change; None if all is.
        The backward pass is made in training only, with the loss scale that failed.
    """
    import torch

    state, scaler = run.state, run.scaler
    scale = scaler.get_scale() / scaler.get_backoff_factor() if scaler.is_enabled() else 1.0
    step = run.progress["global_step"] - 1
    torch.manual_seed(seed_for(run.config.experiment.seed, "dropout", step, state.process_index))
    run.optimizer.zero_grad(set_to_none=True)
    for batch in run.batcher.batches(samples, state.process_index, state.num_processes):
        if fault := broken_image(run, batch.samples):
            return fault
        met, losses = _look(run, batch, scale / len(samples))
        if "forward" in met:  # the libraries' own modules name the part of a joined one
            unfuse(core_model(run.model))
            try:
                finer, _ = _look(run, batch, None)
            finally:
                fuse(core_model(run.model))
            met = finer if "forward" in finer else met
        if met or not is_finite(losses):
            rows = [sample.row.where for sample, loss in zip(batch.samples, losses, strict=True) if not is_finite(loss)]
            return _advice(run, batch, met, rows or [sample.row.where for sample in batch.samples])
    broken = (name for name, p in run.model.named_parameters() if p.grad is not None and not is_finite(p.grad))
    name = next(broken, None)
    return name and f"The gradient of {name} is not finite. Lower training.learning_rate."


def _look(run, batch: Batch, factor: float | None):
    """One pass with every layer watched; with a `factor` on the losses' sum, in training, the backward pass too.

    Returns:
        What `_watch` met, and the losses.
    """
    met, hooks = {}, []
    for name, module in run.model.named_modules():
        hooks.append(module.register_forward_hook(partial(_watch, met, name.removeprefix("base_model.model."))))
    try:
        losses = sample_losses(run.model, batch, run.state.device, run.dtype)
        if factor is not None and run.model.training and "forward" not in met:
            (factor * losses.sum()).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return met, losses


def _watch(met: dict[str, str], name: str, module, arguments, output) -> None:
    """A forward hook: notes the first layer whose output, or the first met whose output's gradient, is not finite."""
    for tensor in tensors_in(output):
        if not is_finite(tensor):
            broken = not all(map(is_finite, module.parameters(recurse=False)))
            met.setdefault("forward", f"{name}, whose own weights are not finite" if broken else name)
        elif tensor.requires_grad:
            tensor.register_hook(lambda grad: None if is_finite(grad) else met.setdefault("backward", name) and None)


def _advice(run, batch: Batch, met: dict[str, str], rows: list[str]) -> str:
    """A fault in words: the layer, the rows, whether the base model has it by itself, and what to change."""
    import torch

    fp16 = run.dtype == torch.float16
    of = ", ".join(rows[:3]) + (f" and {len(rows) - 3} more rows" if len(rows) > 3 else "")
    bf16 = "use quantization.compute_dtype=bf16, on GPUs that have it (compute capability 8.0 or more)"
    other = f", or {bf16}." if fp16 else "."
    if "forward" not in met:
        what = (
            f"gradient that is not finite is that of the output of {met['backward']}" if met else "loss is not finite"
        )
        return f"The first {what}, in {of}. Lower training.learning_rate{other}"
    limit = " (fp16 ends at 65,504)" if fp16 else ""
    text = f"The first output that is not finite is that of {met['forward']}{limit}, in {of}. The base model alone"
    with torch.no_grad(), run.model.disable_adapter():
        alone = not is_finite(sample_losses(run.model, batch, run.state.device, run.dtype))
    if alone:
        return f"{text} has it too: {bf16 if fp16 else 'look for a broken model file'}."
    return f"{text} does not have it: lower training.learning_rate or lora.alpha{other}"


def broken_image(run, samples: tuple[Sample, ...]) -> str | None:
    """The first image of these samples that the model would be given with a value that is not finite."""
    for sample in samples:
        for path in sample.row.images:
            image = path, sample.max_pixels
            if all(map(is_finite, tensors_in(run.batcher.images([image])))):
                continue
            fault = f"The data has a value that is not finite: image {path} of {sample.row.where}. "
            features = run.batcher.features
            if features is None or image not in features:
                return fault + "Replace the image."
            return fault + f"Its vision features are in {features.file(features.key(image))}: remove that file."
    return None


def tensors_in(value):
    """All tensors in nested dicts, lists and tuples."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def is_finite(tensor) -> bool:
    """Whether no element is NaN or infinite; integers never are."""
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def peak_memory_gib(device) -> float:
    """Highest memory use of this process so far: allocated on the GPU, or resident on CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def validate(run) -> dict[str, float]:
    """The mean loss of the validation rows of each source, each row counted once over all processes."""
    import torch

    run.model.eval()
    totals = []
    with torch.no_grad():
        for samples in run.task.val.values():
            total = 0.0
            for batch in run.batcher.batches(samples, run.state.process_index, run.state.num_processes):
                total += sample_losses(run.model, batch, run.state.device, run.dtype).sum().item()
            totals.append(total)
    *sums, run.stops = _sum_over_processes(run, [*totals, float(run.interrupted)])
    return {source: total / len(rows) for (source, rows), total in zip(run.task.val.items(), sums, strict=True)}
