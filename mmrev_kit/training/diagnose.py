"""Where values that are not finite come from, and what to change."""

import torch

from mmrev_kit.config.seeds import seed_for
from mmrev_kit.data.prompts import Sample
from mmrev_kit.model.batches import Batch
from mmrev_kit.model.finite import is_finite, library_modules, tensors_in, watched
from mmrev_kit.training.update import TrainingError, sample_losses

MAX_SKIPPED = 8  # fp16: updates in a row without a finite gradient before the run stops
MIN_SCALE = 1.0  # fp16: a loss scale below it (2^16 at first, halved by each skipped update) stops the run too


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


def check_learning(run, record: dict) -> None:
    """Stop a run whose first update has changed nothing: whatever it saved would be the base model.

    Adam's first update changes a weight by about the learning rate, unless its gradient is far below Adam's epsilon
    (1e-8); LoRA's B is 0 until then.

    Raises:
        TrainingError: no B has an element of a thousandth of the learning rate, or of 1e-12.
    """
    if record.get("skipped") or run.taken != 1:
        return
    largest = max(p.abs().max().item() for name, p in run.model.named_parameters() if ".lora_B." in name)
    if largest < max(record["lr"] / 1000, 1e-12):
        raise TrainingError(
            f"Step {record['global_step']}: the first update changed no weight by more than {largest:.1g}, at a "
            f"learning rate of {record['lr']:.1g}: the run would learn nothing. Raise training.max_grad_norm or "
            "training.learning_rate, or lower lora.dropout."
        )


def explain(run, samples: list[Sample]) -> str:
    """Where values that are not finite come from, as every process sees it in its share; see `find_fault`."""
    faults = [find_fault(run, samples)]
    if run.state.num_processes > 1:
        from accelerate.utils import gather_object

        faults = gather_object(faults)
    ranks = [rank for rank, fault in enumerate(faults) if fault]
    if not ranks:
        return "One more pass over the same rows met no such value: look for a faulty card, or lower the learning rate."
    if len(faults) == 1:
        return faults[0]
    return f"In process {', '.join(map(str, ranks))} of 0 to {len(faults) - 1}: {faults[ranks[0]]}"


def find_fault(run, samples: list[Sample]) -> str | None:
    """One more pass over this process's share of the samples, watching every layer.

    Returns:
        The first thing that is not finite, in the order data, forward, backward, and what to change; None if all is.
        The backward pass is made in training only, with the loss scale that failed.
    """
    state, scaler = run.state, run.scaler
    scale = scaler.get_scale() / scaler.get_backoff_factor() if scaler.is_enabled() else 1.0
    step = run.progress["global_step"] - 1
    torch.manual_seed(seed_for(run.config.experiment.seed, "dropout", step, state.process_index))
    run.optimizer.zero_grad(set_to_none=True)
    for batch in run.batcher.batches(samples, state.process_index, state.num_processes):
        if fault := broken_image(run, batch.samples):
            return fault
        met, losses = _look(run, batch, scale / len(samples))
        if "forward" in met:
            with library_modules(run.model):
                finer, _ = _look(run, batch, None)
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
        What was met, see `watched`, and the losses.
    """
    with watched(run.model) as met:
        losses = sample_losses(run.model, batch, run.state.device, run.dtype)
        if factor is not None and run.model.training and "forward" not in met:
            (factor * losses.sum()).backward()
    return met, losses


def _advice(run, batch: Batch, met: dict[str, str], rows: list[str]) -> str:
    """A fault in words: the layer, the rows, whether the base model has it by itself, and what to change."""
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
            if features is None:
                return fault + "Replace the image."
            return fault + f"Its vision features are in {features.file(features.key(image))}: remove that file."
    return None
