"""The optimizers."""

from __future__ import annotations

from mmrev_kit.config.sections import Config


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
