"""The forward pass of pretraining, written for steps of one shape, and its optimizer.

It runs the modules of a `Qwen3VLForConditionalGeneration` in the order in which transformers does, on all tokens of a
step in one row; only attention sees the blocks apart. Rows are padded on the right, so causal attention needs no mask.
"""

import math
from dataclasses import dataclass

import numpy

from mmrev_kit.model.vision import equal_sized, tower_block
from mmrev_kit.pretraining.text import NO_TARGET, Block

# Each task's part of a step's loss, whatever its number of prompts or tokens; I2D has two blocks.
TASK_WEIGHTS = {"caption": 1.0, "reverse": 1.5, "mcq_i2d": 0.75, "mcq_d2i": 1.5, "text": 0.4}
STOP_WEIGHT = 0.1  # of the end token after a letter or a verdict, which is learnt at once
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic iteration of Muon (Jordan et al. 2024)
MUON_SCALE = 0.2  # times sqrt(longer side): the update's size is AdamW's (Liu et al. 2025, "Muon is scalable")


def to_arrays(blocks: list[Block], images: numpy.ndarray) -> dict[str, numpy.ndarray]:
    """A step as flat arrays: all tokens in one row, everything else pointing into it.

    ids (tokens,), places (3, tokens), images (pictures,), slots (images,), image_at (image tokens,),
    answer_at, targets, weights (answer tokens,). The weights add up to 1.
    """
    starts = numpy.cumsum([0] + [block.ids.size for block in blocks])
    weights = []
    for block in blocks:
        real = block.targets != NO_TARGET
        share = real.astype(numpy.float32)
        if block.targets.shape[1] == 2:
            share[:, 1] = STOP_WEIGHT
        share /= share.sum(axis=1, keepdims=True) * len(share)
        weights.append((share * TASK_WEIGHTS[block.task]).ravel())
    weights = numpy.concatenate(weights)
    moved = list(zip(blocks, starts, strict=False))
    return {
        "ids": numpy.concatenate([block.ids.ravel() for block in blocks]),
        "places": numpy.concatenate([block.places.reshape(3, -1) for block in blocks], axis=1),
        "images": images.astype(numpy.int32),
        "slots": numpy.concatenate([block.slots for block in blocks]),
        "image_at": numpy.concatenate([block.image_at + start for block, start in moved]).astype(numpy.int32),
        "answer_at": numpy.concatenate([(block.answer_at + start).ravel() for block, start in moved]).astype("int32"),
        "targets": numpy.concatenate([block.targets.ravel() for block in blocks]),
        "weights": (weights / weights.sum()).astype(numpy.float32),
    }


def shapes_of(blocks: list[Block]) -> tuple[tuple[int, int], ...]:
    """(rows, tokens of a row) of each block."""
    return tuple(block.ids.shape for block in blocks)


def patches_of(pixels, patch: int = 8, merge: int = 2):
    """Pictures as the processor's patches: (pictures, height, width, 3) bytes to (pictures, patches, values)."""
    count, height, width, _ = pixels.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    values = (pixels.float() / 127.5 - 1).view(count, rows, merge, patch, columns, merge, patch, 3)
    values = values.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(count, rows * columns * merge**2, 3, 1, patch * patch)
    return values.expand(-1, -1, -1, 2, -1).reshape(count, rows * columns * merge**2, -1)  # two equal frames


def _rotate(states, cos, sin):
    import torch

    left, right = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-right, left), dim=-1) * sin


def text_layer(layer, hidden, cos, sin, shapes, at=None):
    """One decoder layer on (tokens, hidden); with `at`, only those tokens leave it, as nothing reads the others."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    attention = layer.self_attn
    size, groups = attention.head_dim, attention.num_key_value_groups
    normed = layer.input_layernorm(hidden)
    value = attention.v_proj(normed).view(len(normed), -1, size)
    query = attention.q_norm(attention.q_proj(normed).view(len(normed), -1, size))
    key = attention.k_norm(attention.k_proj(normed).view(len(normed), -1, size))
    query, key = _rotate(query, cos, sin).to(value.dtype), _rotate(key, cos, sin).to(value.dtype)
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    mixed, start = [], 0
    for rows, length in shapes:
        part = slice(start, start + rows * length)
        three = (states[part].view(rows, length, -1, size).transpose(1, 2) for states in (query, key, value))
        out = scaled_dot_product_attention(*three, is_causal=True, scale=attention.scaling)
        mixed.append(out.transpose(1, 2).reshape(rows * length, -1))
        start += rows * length
    joined = torch.cat(mixed)
    if at is not None:
        hidden, joined = hidden.index_select(0, at), joined.index_select(0, at)
    hidden = hidden + attention.o_proj(joined)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def answer_logits(model, batch: dict, pixels, shapes, layer=text_layer, block=tower_block):
    """The logits at every answer token, (answer tokens, vocabulary).

    Args:
        batch: `to_arrays`'s arrays as tensors.
        pixels: (all pictures, height, width, 3) bytes.
        shapes: see `shapes_of`.
        layer, block: `text_layer` and `vision.tower_block`, or compiled forms of them.
    """
    text, visual = model.model.language_model, model.model.visual
    hidden = text.embed_tokens(batch["ids"].long())
    deepstack = []
    if len(batch["slots"]):
        patch = visual.patch_size
        shown = patches_of(pixels[batch["images"]], patch, visual.spatial_merge_size)
        grid = pixels.shape[1] // patch, pixels.shape[2] // patch
        _, merged, deepstack = equal_sized(visual, shown, *grid, block)
        shown = merged.index_select(0, batch["slots"]).flatten(0, 1)
        hidden = hidden.index_copy(0, batch["image_at"].long(), shown.to(hidden.dtype))
    cos, sin = text.rotary_emb(hidden[None], batch["places"][:, None].long())
    cos, sin = cos[0, :, None], sin[0, :, None]
    at, last = batch["answer_at"].long(), len(text.layers) - 1
    for number, part in enumerate(text.layers):
        hidden = layer(part, hidden, cos, sin, shapes, at if number == last else None)
        if number < len(deepstack):
            extra = deepstack[number].index_select(0, batch["slots"]).flatten(0, 1)
            hidden = hidden.index_add(0, batch["image_at"].long(), extra.to(hidden.dtype))
    return model.lm_head(text.norm(hidden))


def losses_of(logits, batch: dict, answers: tuple[tuple[int, int], ...]):
    """The loss of a step, and what became of each block.

    Args:
        answers: (rows, tokens of the longest answer) of each block.

    Returns:
        loss: the weighted cross entropy of the answer tokens.
        report (2, blocks): each block's own mean loss, and the share of answers that are right as a whole.
    """
    import torch
    from torch.nn.functional import cross_entropy

    targets = batch["targets"].long()
    losses = cross_entropy(logits.float(), targets, reduction="none", ignore_index=NO_TARGET) * batch["weights"]
    with torch.no_grad():
        sizes = [rows * longest for rows, longest in answers]
        weights = [part.sum() for part in batch["weights"].split(sizes)]
        means = [part.sum() / weight for part, weight in zip(losses.detach().split(sizes), weights, strict=True)]
        right = ((logits.argmax(-1) == targets) | (targets == NO_TARGET)).split(sizes)
        right = [part.view(shape).all(dim=1).float().mean() for part, shape in zip(right, answers, strict=True)]
        report = torch.stack([torch.stack(means), torch.stack(right)])
    return losses.sum(), report


def is_matrix(name: str, parameter) -> bool:
    """Whether Muon takes a parameter: the matrices between layers, but no table of embeddings."""
    return parameter.ndim == 2 and not any(word in name for word in ("embed", "lm_head"))


@dataclass
class Rates:
    """The learning rate of a step and Adam's bias corrections, on the device, so that a captured step reads them."""

    values: object  # (3,) fp32

    def set(self, rate: float, step: int, betas: tuple[float, float]) -> None:
        import torch

        corrections = 1 / (1 - betas[0] ** step), 1 / math.sqrt(1 - betas[1] ** step)
        values = torch.tensor([rate, *corrections])
        self.values.copy_(values.pin_memory() if self.values.is_cuda else values, non_blocking=True)


class Optimizer:
    """Muon for matrices, AdamW for the rest, without anything that waits for the device.

    Args:
        model: with fp32 parameters.
        weight_decay: of matrices, times the learning rate.
        muon: False: AdamW for everything.
    """

    def __init__(self, model, weight_decay: float = 0.05, muon: bool = True, betas: tuple[float, float] = (0.9, 0.98)):
        import torch

        named = [(name, part) for name, part in model.named_parameters() if part.requires_grad]
        self.parameters = [part for _, part in named]
        self.matrices: dict[tuple[int, int], list] = {}
        self.others, self.decays = [], []
        for name, part in named:
            if muon and is_matrix(name, part):
                self.matrices.setdefault(tuple(part.shape), []).append(part)
            else:
                self.others.append(part)
                self.decays.append(weight_decay if part.ndim > 1 else 0.0)
        self.momenta = {
            shape: torch.zeros(len(parts), *shape, device=parts[0].device) for shape, parts in self.matrices.items()
        }
        self.first = [torch.zeros_like(part) for part in self.others]
        self.second = [torch.zeros_like(part) for part in self.others]
        self.weight_decay, self.betas, self.taken = weight_decay, betas, 0
        self.rates = Rates(torch.zeros(3, device=self.parameters[0].device))

    def prepare(self, rate: float) -> None:
        """Set the rate of the next step."""
        self.taken += 1
        self.rates.set(rate, self.taken, self.betas)

    def step(self) -> None:
        """One update from the gradients at hand, clipped to norm 1."""
        import torch

        with torch.no_grad():
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
            rate, scale_first, scale_second = self.rates.values.unbind()
            if self.others:
                self._adam(rate, scale_first, scale_second)
            for shape, parts in self.matrices.items():
                self._muon(shape, parts, rate)

    def _adam(self, rate, scale_first, scale_second) -> None:
        import torch

        grads = [part.grad for part in self.others]
        torch._foreach_lerp_(self.first, grads, 1 - self.betas[0])
        torch._foreach_mul_(self.second, self.betas[1])
        torch._foreach_addcmul_(self.second, grads, grads, 1 - self.betas[1])
        roots = torch._foreach_sqrt(self.second)
        torch._foreach_mul_(roots, scale_second)
        torch._foreach_add_(roots, 1e-8)
        updates = torch._foreach_div(self.first, roots)
        torch._foreach_mul_(updates, scale_first)
        decayed = [part for part, decay in zip(self.others, self.decays, strict=True) if decay]
        kept = [update for update, decay in zip(updates, self.decays, strict=True) if decay]
        torch._foreach_add_(kept, torch._foreach_mul(decayed, self.weight_decay))
        torch._foreach_mul_(updates, rate)
        torch._foreach_sub_(self.others, updates)

    def _muon(self, shape, parts, rate) -> None:
        import torch

        grads = torch.stack([part.grad for part in parts])
        momentum = self.momenta[shape]
        momentum.lerp_(grads, 0.05)
        direction = orthogonal(grads.lerp(momentum, 0.95), split=3 if shape[0] == 3 * shape[1] else 1)
        weights = torch.stack(parts)
        side = max(shape[1], shape[0] // 3 if shape[0] == 3 * shape[1] else shape[0])
        step = (direction * (MUON_SCALE * math.sqrt(side)) + weights * self.weight_decay) * rate
        torch._foreach_sub_(parts, list(step.unbind()))


def orthogonal(matrices, split: int = 1, rounds: int = 5):
    """The nearest (semi-)orthogonal matrices, roughly, by Newton-Schulz; singular values come out near 1.

    Args:
        matrices: (n, rows, columns).
        split: into how many matrices each is cut along its rows (3 for a joint projection of query, key and value).
    """
    import torch

    count, rows, columns = matrices.shape
    found = matrices.reshape(count * split, rows // split, columns)
    tall = found.shape[1] > found.shape[2]
    found = (found.mT if tall else found).to(torch.bfloat16 if matrices.is_cuda else matrices.dtype)
    found = found / (found.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(rounds):
        gram = found @ found.mT
        found = a * found + (b * gram + c * gram @ gram) @ found
    return (found.mT if tall else found).reshape(count, rows, columns).to(matrices.dtype)
