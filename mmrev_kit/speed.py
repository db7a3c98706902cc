"""How much of a card's matrix rate a run uses: the work of its tokens, and what the card can do."""

from __future__ import annotations

import time

from mmrev_kit.packing import layer_weights

SIDE, PRODUCTS = 8192, 12


def work(text_config, tokens: int, logits: int, recompute: bool, backward: bool = True) -> float:
    """Floating-point operations of `tokens` tokens, `logits` of which are followed into the vocabulary.

    2 operations a weight and token in each pass: forward, backward to the activations (the base is frozen, its
    weights get no gradient), and the layers' forward once more where gradient checkpointing recomputes them.
    Left out: attention's own products, the adapter, 4-bit weights being turned to 16 bit, the vision tower.
    """
    layers = layer_weights(text_config) * text_config.num_hidden_layers
    head = text_config.hidden_size * text_config.vocab_size
    passes = 2 if backward else 1
    return 2.0 * (layers * tokens * (passes + (1 if recompute and backward else 0)) + head * logits * passes)


def matrix_rate(device, dtype) -> float | None:
    """Operations a second in products of two 8192 x 8192 matrices of random numbers; None on a CPU."""
    import torch

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
