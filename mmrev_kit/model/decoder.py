"""A decoder layer of Qwen3-VL as one operation, its backward pass by hand: for 16-bit training on GPUs.

The modules' own operations are some two hundred and forty starts a layer and update, each from Python; with few tokens
an update the GPU waits for them. Here they are about eighty: q, k and v are one product; an adapter is part of its
layer's product, as columns that stand behind the weight and the input; dropout's masks come from a seed and are drawn
again instead of being kept; 4-bit weights take one kernel each.

A layer that is *recomputed* saves its input alone. One that is *kept* saves what costs products to make: what
projections and attention put out, in 16 bit, and the residual stream before the MLP. Of the weights, the largest thing
in a pass over few tokens, one is there in 16 bit at a time (q, k and v count as one).
"""

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import torch

from mmrev_kit.model import layer_lines
from mmrev_kit.model.kernels import can_compile
from mmrev_kit.model.projections import ALIGNED, Group, Layer


@cache
def operations(device):
    """The operations of `layer_lines`, as kernels where the device can have them."""
    found = vars(layer_lines)
    if can_compile(device):
        from mmrev_kit.model import layer_attention, layer_kernels

        found = found | vars(layer_kernels) | vars(layer_attention)
    return SimpleNamespace(**found)


@dataclass
class Given:
    """What a layer is used with, besides its input: the compute dtype, seeds of its dropout, cosine and sine of the
    positions (n, d), what attention sees, and whether what it computes is kept for the backward pass."""

    layer: Layer
    dtype: torch.dtype
    seeds: dict[str, int] | None
    angles: tuple
    mask: object
    keep: bool


class Pass:
    """One pass through a layer, forward or backward.

    Attributes:
        held: by group, the weight in 16 bit of its last product, where that is used next again.
    """

    def __init__(self, given: Given, matrices):
        self.given, self.layer, self.dtype, self.held = given, given.layer, given.dtype, {}
        self.device, tokens = given.angles[0].device, len(given.angles[0])
        self.run = operations(self.device)
        self.seen = self.run.seen_by(given.mask, tokens, self.device)
        rest, self.ups, self.downs, self.masks = iter(matrices), {}, {}, {}
        for name, group in self.layer.groups.items():
            pairs = [(None, None) if module is None else (next(rest), next(rest)) for module in group.adapters]
            self.ups[name] = [up for _, up in pairs]
            self.downs[name] = self.stacked(group, [down for down, _ in pairs]) if group.rank else None

    def empty(self, rows: int, width: int):
        return torch.empty(rows, width, dtype=self.dtype, device=self.device)

    def stacked(self, group: Group, parts: list):
        """Every A of a group below the other in 16 bit, zeros where a projection has none."""
        make = torch.zeros if any(part is None for part in parts) else torch.empty
        found = make(len(parts), group.rank, group.inputs, dtype=self.dtype, device=self.device)
        there = [(place, part) for place, part in zip(found, parts, strict=True) if part is not None]
        torch._foreach_copy_(*map(list, zip(*there, strict=True)))
        return found.flatten(0, 1)

    def dropped(self, name: str, rows: int):
        """A group's dropout masks for so many tokens, or None, and the factor of what is kept."""
        group, seeds = self.layer.groups[name], self.given.seeds
        if seeds is None or not group.p:
            return None, 1.0
        if name not in self.masks:
            sizes = rows, group.inputs, len(group.starts)
            self.masks[name] = self.run.draw(seeds[name], *sizes, group.p, self.device)
        return self.masks[name], layer_lines.STEPS / (layer_lines.STEPS - layer_lines.threshold(group.p))

    def weight(self, name: str, numbers: list):
        """The first output and the matrix in 16 bit of a product: several extended weights, or one as it is."""
        group = self.layer.groups[name]
        start, bases = group.starts[numbers[0]], [group.bases[number] for number in numbers]
        if not group.made:
            return start, bases[0].weight
        sizes = [base.out_features for base in bases]
        whole = self.empty(sum(sizes), group.inputs + group.extra)
        for number, base, part in zip(numbers, bases, whole.split(sizes), strict=True):
            quantized = hasattr(base.weight, "quant_state") and group.inputs % ALIGNED == 0
            run = self.run if quantized else layer_lines
            run.dequantize(base, part, self.ups[name][number], group.scaling, number * group.rank)
        return start, whole

    def project(self, name: str, rows, hold: bool = False):
        """A group's input, extended where there are adapters, to (n, outputs); see `held`."""
        group = self.layer.groups[name]
        out = self.empty(len(rows), group.outputs)
        for numbers in group.products:
            matrix = None  # gone before the next is made
            start, matrix = self.weight(name, numbers)
            torch.mm(rows, matrix.t(), out=out[:, start : start + len(matrix)])
        if hold:
            self.held[name] = start, matrix
        return out

    def project_back(self, name: str, gradient):
        """The other way, to the gradient of the input, extended where there are adapters."""
        group = self.layer.groups[name]
        found = self.empty(len(gradient), group.inputs + group.extra)
        for count, numbers in enumerate(reversed(group.products)):
            matrix = None
            start, matrix = self.held.pop(name, None) or self.weight(name, numbers)
            part = gradient[:, start : start + len(matrix)]
            torch.addmm(found, part, matrix, beta=min(count, 1), out=found)  # with 0 what was there does not count
        return found

    def extended(self, name: str, rows, out=None):
        """A group's input (n, inputs) with its adapters' part behind it, and that alone; without adapters the input
        and None. `out` is a matrix that begins with the input and has room behind it."""
        group = self.layer.groups[name]
        if not group.rank:
            return rows, None
        out = self.empty(len(rows), group.inputs + group.extra) if out is None else out
        mask, factor = self.dropped(name, len(rows))
        return out, self.run.lora_down(group, rows, mask, self.downs[name], factor, out)

    def of_input(self, name: str, gradient, rows, of_out, low, found: dict):
        """The gradient of a group's input (n, inputs) from the extended one; those of its adapters go to `found`."""
        group = self.layer.groups[name]
        if not group.rank:
            return gradient
        mask, factor = self.dropped(name, len(rows))
        found[name] = self.run.lora_gradients(group, gradient, rows, mask, factor, of_out, low)
        return self.run.lora_up(group, gradient, mask, self.downs[name], factor)

    def normed(self, norm: str, name: str, stream, added=None):
        """The stream (n, h), or its sum with `added`; and that normalised, first in a matrix with room behind it."""
        group = self.layer.groups[name]
        out = self.empty(len(stream), group.inputs + group.extra)
        return self.run.norm(stream, added, *self.layer.norm(norm), out), out

    def rotation(self) -> tuple:
        own = self.layer.module.self_attn
        weights = own.q_norm.weight, own.k_norm.weight, own.q_norm.variance_epsilon
        return self.layer.heads, self.layer.key_heads, *weights, *self.given.angles

    def rotated(self, joined):
        value = layer_lines.split(joined, self.layer.heads, self.layer.key_heads)[2]
        return *self.run.rotate(joined, *self.rotation()), value

    def attention(self, stream):
        """The stream (n, h) with attention added, and the MLP's input. And what the backward pass wants: q, k and v as
        they are projected, attention's output with its sums, and the adapters' parts of q, k, v and of o."""
        _, rows = self.normed("input_layernorm", "qkv", stream)
        rows, low = self.extended("qkv", rows[:, : stream.shape[1]], rows)
        joined = self.project("qkv", rows)
        del rows
        out, sums = self.run.attend(*self.rotated(joined), self.seen, self.layer.scaling)
        rows, low_out = self.extended("o", out.flatten(1))
        added = self.project("o", rows)
        middle, rows = self.normed("post_attention_layernorm", "up", stream, added)
        return middle, rows, (joined, out, sums, low, low_out)

    def gates(self, rows, width: int, hold: bool = False):
        """Gate and up of the MLP's input, and its adapters' part."""
        rows, low = self.extended("up", rows[:, :width], rows)
        return self.project("up", rows, hold), low

    def gated(self, joined):
        """down_proj's input, and its adapter's part."""
        group = self.layer.groups["down"]
        out = self.empty(len(joined), group.inputs + group.extra)
        self.run.gate(joined, out)
        return self.extended("down", out[:, : group.inputs], out)

    def mlp_backward(self, of_rows, gradient, half, middle, joined, low, low_down, found: dict):
        """From the gradients of down_proj's input, extended, and of the layer's output, in fp32 and in 16 bit, to that
        of `middle`, in both, too. `joined`, gate and up, is used up."""
        groups, width, norm = self.layer.groups, gradient.shape[1], "post_attention_layernorm"
        rows = self.gated(joined)[0][:, : groups["down"].inputs] if groups["down"].rank else None
        of_rows = self.of_input("down", of_rows, rows, half, low_down, found)
        self.run.gate_backward(of_rows, joined)
        torch.autograd.graph.increment_version(joined)  # so that a second backward pass is refused
        del rows
        of_rows = self.project_back("up", joined)
        rows = self.normed(norm, "up", middle)[1][:, :width] if groups["up"].rank else None
        of_rows = self.of_input("up", of_rows, rows, joined, low, found)
        return self.run.norm_backward(of_rows, middle, *self.layer.norm(norm), gradient, self.dtype)

    def attention_backward(self, gradient, half, stream, saved: tuple, found: dict):
        """From the gradient of `middle` to that of the layer's input, (n, h) fp32."""
        joined, out, sums, low, low_out = saved
        of_out = self.of_input("o", self.project_back("o", half), out.flatten(1), half, low_out, found)
        of_joined = torch.empty_like(joined)
        attended = *self.rotated(joined), out, sums, self.seen, self.layer.scaling
        self.run.attend_backward(of_out, *attended, of_joined)
        del of_out, attended
        self.run.rotate_backward(of_joined, joined, *self.rotation())
        of_rows = self.project_back("qkv", of_joined)
        rows = self.normed("input_layernorm", "qkv", stream)[1] if self.layer.groups["qkv"].rank else stream
        of_rows = self.of_input("qkv", of_rows, rows[:, : stream.shape[1]], of_joined, low, found)
        return self.run.norm_backward(of_rows, stream, *self.layer.norm("input_layernorm"), gradient, self.dtype)[0]


class DecoderLayer(torch.autograd.Function):
    """A layer's output from its input, (sequences, length, h) in fp32; `matrices` are those of `Layer.matrices`."""

    @staticmethod
    def forward(ctx, hidden, given: Given, *matrices):
        own, stream = Pass(given, matrices), hidden.flatten(0, 1)
        middle, rows, saved = own.attention(stream)
        joined, low = own.gates(rows, stream.shape[1])
        del rows
        rows, low_down = own.gated(joined)
        kept = (*saved, middle, joined, low, low_down) if given.keep else ()
        del saved, joined
        out = middle + own.project("down", rows)
        ctx.given, ctx.kept = given, len(kept)
        ctx.save_for_backward(hidden, *kept, *matrices)
        return out.view(hidden.shape)

    @staticmethod
    def backward(ctx, gradient):
        hidden, *rest = ctx.saved_tensors
        given, kept, matrices = ctx.given, rest[: ctx.kept], rest[ctx.kept :]
        stream, found, groups = hidden.flatten(0, 1), {}, given.layer.groups
        del rest
        own = Pass(given, matrices)
        gradient = gradient.flatten(0, 1).contiguous()
        half = gradient.to(given.dtype)
        of_rows = own.project_back("down", half)  # first: its weight is gone before others come
        if kept:
            *saved, middle, joined, low, low_down = kept
        else:
            middle, rows, saved = own.attention(stream)
            joined, low = own.gates(rows, stream.shape[1], hold=True)
            low_down = own.gated(joined)[1] if groups["down"].rank else None
            del rows
        gradient, half = own.mlp_backward(of_rows, gradient, half, middle, joined, low, low_down, found)
        del middle, joined, kept, of_rows
        of_hidden = own.attention_backward(gradient, half, stream, saved, found).view(hidden.shape)
        return of_hidden if ctx.needs_input_grad[0] else None, None, *parted(groups, found)


def parted(groups: dict[str, Group], found: dict) -> list:
    """The gradients of all trained matrices, in order, from those of each group."""
    parts = []
    for name, (of_down, of_up) in ((name, found[name]) for name in groups if name in found):
        group = groups[name]
        ends = [*group.starts[1:], group.outputs]
        for number, module in enumerate(group.adapters):
            if module is not None:
                down = of_down[number * group.rank : (number + 1) * group.rank]
                parts += [down, of_up[group.starts[number] : ends[number]]]
    return parts
