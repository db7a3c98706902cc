"""How fast training is: rows and tokens a second, and the share of the card's peak that is (MFU)."""

import resource
import time
from collections.abc import Collection

import torch

from mmrev_kit.model.packing import layer_weights
from mmrev_kit.model.plain import text_config

SIDE, PRODUCTS = 8192, 12  # of the matrices that are multiplied to measure a card, and how often


def flops(text_config, tokens: int, logits: int, recompute: float, adapted: Collection[str] = ()) -> float:
    """FLOPs (floating-point operations) of `tokens` tokens, `logits` of which are followed into the vocabulary.

    2 operations a weight and token in each pass: forward, backward to the activations (the base is frozen, its
    weights get no gradient), and in `recompute`, the share of the layers that gradient checkpointing recomputes,
    forward once more, but for a layer's last product: nothing needs the output of down_proj again, unless it is
    `adapted` (has LoRA).
    Left out: attention's own products, the adapter, 4-bit weights being turned to 16 bit, the vision tower.
    """
    layer, head = layer_weights(text_config), text_config.hidden_size * text_config.vocab_size
    last = 0 if "down_proj" in adapted else text_config.hidden_size * text_config.intermediate_size
    passed = 2 * layer + recompute * (layer - last)
    return 2.0 * (text_config.num_hidden_layers * passed * tokens + 2 * head * logits)


def measure_peak_flops(device, dtype) -> float | None:
    """FLOP/s in products of two 8192 x 8192 matrices of random numbers; None on a CPU."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    left, right = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(PRODUCTS):
        left @ right
    torch.cuda.synchronize(device)
    rate = 2 * SIDE**3 * PRODUCTS / (time.perf_counter() - began)
    del left, right
    torch.cuda.empty_cache()
    return rate


def speed(run, rows: int, seconds: float) -> dict[str, float | None]:
    """samples_per_second and tokens_per_second (tokens that went through the model) over all processes, and mfu: the
    `flops` of these tokens, recomputed ones counted, as a share of what the cards' matrix products could do in that
    time; None where their peak is unknown."""
    tokens, logits = run.computed
    mfu = None
    if run.peak_flops:
        text = text_config(run.model)
        again = run.config.memory.recomputed_layers(text.num_hidden_layers) / text.num_hidden_layers
        done = flops(text, tokens, logits, again, run.config.lora.target_modules)
        mfu = done / seconds / run.peak_flops / run.state.num_processes
    return {"samples_per_second": rows / seconds, "tokens_per_second": tokens / seconds, "mfu": mfu}


def peak_memory_gib(device) -> float:
    """Highest memory use of this process so far: allocated on the GPU, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
