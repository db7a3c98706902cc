"""Numbers that are not finite: the first module that gives one, and the error that names it."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch

from mmrev_kit.config.errors import Told
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.model.base_files import AGAIN
from mmrev_kit.model.fused import fuse, unfuse
from mmrev_kit.model.plain import core_model


class NotFiniteError(Told, ArithmeticError):
    """The model gives a value that is not finite; the message says for what, and names the first module."""


def tensors_in(value):
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def is_finite(tensor) -> bool:
    """Whether no element is NaN or infinite; integers never are."""
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


@contextmanager
def watched(model):
    """Within it the output of every module is looked at.

    Yields:
        A dict that gets `forward`, the first module whose output is not finite, and `backward`, the first met whose
        output's gradient is not.
    """
    met, hooks = {}, []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(partial(_watch, met, name.removeprefix("base_model.model."))))
    try:
        yield met
    finally:
        for hook in hooks:
            hook.remove()


def _watch(met: dict[str, str], name: str, module, arguments, output) -> None:
    for tensor in tensors_in(output):
        if not is_finite(tensor):
            broken = not all(map(is_finite, module.parameters(recurse=False)))
            met.setdefault("forward", f"{name}, whose own weights are not finite" if broken else name)
        elif tensor.requires_grad:
            tensor.register_hook(lambda grad: None if is_finite(grad) else met.setdefault("backward", name) and None)


@contextmanager
def library_modules(model):
    """Within it the libraries' own modules run, so that the part of a fused one has a name."""
    unfuse(core_model(model))
    try:
        yield
    finally:
        fuse(core_model(model))


def refuse(model, what: str, again: Callable[[], object]) -> None:
    """Stop on a value that is not finite.

    Args:
        what: it was met in.
        again: puts the same through the model once more.

    Raises:
        NotFiniteError: always.
    """
    with library_modules(model), watched(model) as met:
        again()
    first = met.get("forward", "none of its modules, asked once more: look for a faulty card")
    raise NotFiniteError(
        f"{what}: the model gives a value that is not finite. The first module that does is {first}. Take whole files "
        "of the base and the adapter; where they are, use quantization.compute_dtype=bf16 (GPUs) or fp32."
    )


@contextmanager
def sums_of_quantized():
    """Within it what bitsandbytes quantizes leaves the sum of its 16-bit values as `quant_state.sum`: on a GPU the
    largest value of a block is found without looking at a NaN, which then becomes a number like any other."""
    from bitsandbytes import functional

    quantize = functional.quantize_4bit

    def noting(weight, *arguments, **options):
        values, state = quantize(weight, *arguments, **options)
        state.sum = weight.sum(dtype=torch.float32)
        return values, state

    functional.quantize_4bit = noting
    try:
        yield
    finally:
        functional.quantize_4bit = quantize


def refuse_not_finite(where: str, model) -> None:
    """Raises ConfigError where a weight holds NaN or infinity; a layer on disk is looked at when it is used."""
    for name, weight in model.named_parameters():
        total = getattr(getattr(weight, "quant_state", None), "sum", None)
        total = weight.sum(dtype=torch.float32) if total is None else total  # takes no memory, as isfinite() would
        if not total.is_meta and not total.isfinite():
            raise ConfigError(f"{where}: {name} holds a value that is not finite. {AGAIN}")
