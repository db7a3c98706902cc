"""The language model's small operations joined, forward and backward, to the library's numbers.

RMSNorm, the gated product, RMSNorm with rotary positions, and a linear layer with LoRA are two to twelve operations in
the libraries' modules, each of which reads and writes every activation and is started by the host. Here each is one
`autograd.Function` that saves less: a norm its input as it came, in 16 bit where it is that; the gated product gate
and up but not gate's SiLU; LoRA its input, which q, k and v share, and the mask of its dropout. On GPUs for which
torch.compile can make kernels the elementwise ones become one kernel each; elsewhere the same lines run operation by
operation.
"""

from __future__ import annotations

import os
import shutil
from functools import cache

from mmrev_kit.dropout import drop, redrop
from mmrev_kit.head import head_class

MIN_ROWS = 256  # below, as in generation token by token, a kernel is not worth the call through torch.compile


def norm_forward(rows, weight, eps: float, dtype):
    """(n, ..., h) normalised over h in fp32 and times the weight, in `dtype`; and 1/rms (n, ..., 1), fp32."""
    import torch

    values = rows.float()
    scale = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * (values * scale)).to(dtype), scale


def norm_backward(gradient, rows, scale, weight):
    """The gradient of `rows`: s (g w - x s mean(g w x s)), in fp32."""
    weighted, normal = gradient.float() * weight, rows.float() * scale
    return (scale * (weighted - normal * (weighted * normal).mean(-1, keepdim=True))).to(rows.dtype)


def turn(values, cosine, sine, sign: int):
    """Values (n, heads, d) turned by the angles of `cosine` and `sine`, (n, d) with both halves alike; `sign` -1: to
    their positions, as `apply_rotary_pos_emb` does; 1: back."""
    turned = values * cosine[:, None]
    (left, right), (half, _) = values.chunk(2, -1), sine[:, None].chunk(2, -1)
    to_left, to_right = turned.chunk(2, -1)
    to_left.addcmul_(right, half, value=sign)
    to_right.addcmul_(left, half, value=-sign)
    return turned


def rotated_forward(queries, keys, of_query, of_key, eps: float, cosine, sine):
    """Queries (n, heads, d) and keys (n, key heads, d) normalised with weights (d,) and turned; and both 1/rms."""
    import torch

    found = []
    for rows, weight in ((queries, of_query), (keys, of_key)):
        normal, scale = norm_forward(rows, weight, eps, torch.float32)
        found += [turn(normal, cosine, sine, -1).to(rows.dtype), scale]
    return found[0], found[2], found[1], found[3]


def rotated_backward(of_queries, of_keys, queries, keys, query_scale, key_scale, of_query, of_key, cosine, sine):
    """The gradients of queries and keys: turned back, then through the norms."""
    parts = (of_queries, queries, query_scale, of_query), (of_keys, keys, key_scale, of_key)
    found = (
        norm_backward(turn(gradient.float(), cosine, sine, 1), rows, scale, weight)
        for gradient, rows, scale, weight in parts
    )
    return tuple(found)


def gated_forward(gate, up):
    """SiLU(gate) x up, (n, f)."""
    from torch.nn.functional import silu

    return silu(gate) * up


def gated_backward(gradient, gate, up):
    """The gradients of gate and up; SiLU is computed again, so that it need not be kept."""
    import torch

    of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
    return of_gate, torch.nn.functional.silu(gate).mul_(gradient)


def can_compile(device) -> bool:
    """Whether torch.compile makes kernels for this GPU: compute capability 8.0 or later, Triton, a C compiler."""
    import torch
    from torch.utils._triton import has_triton

    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return has_triton() and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))


@cache
def compiled(function, device):
    """`function` as kernels for `device`, or as it is."""
    import torch

    return torch.compile(function) if can_compile(device) else function


def run(function, *arguments):
    """Call `function`, as a kernel where that is worth it. The first axis of its tensors varies, the others do not."""
    import torch

    tensors = [value for value in arguments if isinstance(value, torch.Tensor) and value.ndim > 1]
    if tensors[0].device.type != "cuda" or len(tensors[0]) < MIN_ROWS:
        return function(*arguments)
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_static(tensor, list(range(1, tensor.ndim)))
    return compiled(function, tensors[0].device)(*arguments)


@cache
def functions():
    """The autograd functions: norm, gated, rotated, lora; made on first use, since importing torch takes seconds."""
    import torch

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows, weight, eps, dtype):
            out, scale = run(norm_forward, rows, weight, eps, dtype)
            ctx.save_for_backward(rows, scale, weight)
            return out

        @staticmethod
        def backward(ctx, gradient):
            rows, scale, weight = ctx.saved_tensors
            return run(norm_backward, gradient.contiguous(), rows, scale, weight), None, None, None

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return run(gated_forward, gate, up)

        @staticmethod
        def backward(ctx, gradient):
            return run(gated_backward, gradient.contiguous(), *ctx.saved_tensors)

    class Rotated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, queries, keys, of_query, of_key, eps, cosine, sine):
            own = (of_query, of_key, eps, cosine, sine)
            *turned, query_scale, key_scale = run(rotated_forward, queries, keys, *own)
            ctx.save_for_backward(queries, keys, query_scale, key_scale, of_query, of_key, cosine, sine)
            return tuple(turned)

        @staticmethod
        def backward(ctx, *gradients):
            gradients = [gradient.contiguous() for gradient in gradients]
            return *run(rotated_backward, *gradients, *ctx.saved_tensors), None, None, None, None, None

    class Lora(torch.autograd.Function):
        """layer(x) + s drop(x) A' B'; the layer's weight gets no gradient."""

        @staticmethod
        def forward(ctx, rows, down, up, layer, scaling, p):
            dropped, mask, factor, left = drop(rows, p) if p > 0 else (rows, None, None, 1.0)
            low = dropped @ down.t().to(rows.dtype)
            ctx.layer, ctx.scaling, ctx.factor = layer, scaling * left, factor
            ctx.save_for_backward(dropped if factor is None else rows, mask, low, down, up)
            return layer(rows).addmm_(low, up.t().to(rows.dtype), alpha=ctx.scaling)

        @staticmethod
        def backward(ctx, gradient):
            rows, mask, low, down, up = ctx.saved_tensors
            of_low = (gradient @ up.to(gradient.dtype)).mul_(ctx.scaling)
            of_up = (gradient.t() @ low).to(up.dtype).mul_(ctx.scaling)
            dropped = rows if ctx.factor is None else redrop(rows, mask, ctx.factor)
            of_down, of_rows = (of_low.t() @ dropped).to(down.dtype), None
            if ctx.needs_input_grad[0]:
                del dropped
                of_rows = gradient @ weight_of(ctx.layer, gradient.dtype)
                of_dropped = of_low @ down.to(gradient.dtype)
                if mask is None:
                    of_rows += of_dropped
                elif ctx.factor is None:
                    of_rows.addcmul_(of_dropped, mask)
                else:
                    of_rows += redrop(of_dropped, mask, ctx.factor)
            return of_rows, of_down, of_up, None, None, None

    return Norm, Gated, Rotated, Lora


def weight_of(layer, dtype):
    """A linear layer's weight (out, in) in `dtype`, from 4 bit where it is that."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data.view(-1, 1), state).to(dtype)


@cache
def classes() -> dict:
    """From a stock class of the model to its fused one."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

    norm_function, gated_function, rotated_function, _ = functions()

    class FusedNorm(stock.Qwen3VLTextRMSNorm):
        out_dtype = None  # the input's

        def forward(self, hidden_states):
            rows, dtype = hidden_states.flatten(0, -2), self.out_dtype or hidden_states.dtype
            return norm_function.apply(rows, self.weight, self.variance_epsilon, dtype).view(hidden_states.shape)

    class FusedMLP(stock.Qwen3VLTextMLP):
        def forward(self, x):
            gate, up = self.gate_proj(x), self.up_proj(x)
            return self.down_proj(gated_function.apply(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape))

    class FusedLayer(stock.Qwen3VLTextDecoderLayer):
        def forward(self, hidden_states, wanted=None, **more):
            """With `wanted`, (sequences, length) booleans, the last layer returns those tokens alone, (1, n, h): its
            MLP is not computed for the others, which nothing looks at."""
            own = self.self_attn
            if wanted is None or own.layer_idx < own.config.num_hidden_layers - 1:
                return super().forward(hidden_states, **more)
            attended, _ = own(hidden_states=self.input_layernorm(hidden_states), **more)
            summed = (hidden_states + attended)[wanted][None]
            return summed + self.mlp(self.post_attention_layernorm(summed))

    class FusedAttention(stock.Qwen3VLTextAttention):
        def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, **more):
            shape = hidden_states.shape[:-1]
            query, key, value = (
                projection(hidden_states).view(*shape, -1, self.head_dim)
                for projection in (self.q_proj, self.k_proj, self.v_proj)
            )
            cosine, sine = (part.expand(*shape, -1).flatten(0, 1) for part in position_embeddings)
            norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.variance_epsilon
            turned = rotated_function.apply(query.flatten(0, 1), key.flatten(0, 1), *norms, cosine, sine)
            query, key = (new.view(old.shape) for new, old in zip(turned, (query, key), strict=True))
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx, kwargs=more)
            attend = stock.ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, stock.eager_attention_forward
            )
            out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **more)
            return self.o_proj(out.reshape(*shape, -1)), weights

    return {
        stock.Qwen3VLTextRMSNorm: FusedNorm,
        stock.Qwen3VLTextMLP: FusedMLP,
        stock.Qwen3VLTextAttention: FusedAttention,
        stock.Qwen3VLTextDecoderLayer: FusedLayer,
    }


@cache
def lora_class(stock):
    """The fused class of one of PEFT's LoRA layers."""
    import torch

    lora_function = functions()[-1]

    class FusedLora(stock):
        def forward(self, x, *args, **more):
            device, width = x.device.type, x.shape[-1]
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            names = self.active_adapters
            plain = not (args or more or self.disable_adapters or self.merged or self.lora_variant)
            if not plain or len(names) != 1 or names[0] not in self.lora_A or x.dtype != dtype or not x.numel():
                return super().forward(x, *args, **more)
            down, up = self.lora_A[names[0]], self.lora_B[names[0]]
            if up.bias is not None or (x.dtype != down.weight.dtype and not torch.is_autocast_enabled(device)):
                return super().forward(x)
            p = getattr(self.lora_dropout[names[0]], "p", 0.0) if self.training else 0.0
            rows, scaling = x.reshape(-1, width), self.scaling[names[0]]
            out = lora_function.apply(rows, down.weight, up.weight, self.base_layer, scaling, p)
            return out.view(*x.shape[:-1], -1)

    return FusedLora


def fused_class(module):
    """The class that a module may be given instead of its own, or None."""

    def frozen(part) -> bool:
        return "forward" not in vars(part) and not part.weight.requires_grad

    kind = type(module)
    if "forward" in vars(module):
        return None
    if kind.__module__.startswith("peft.tuners.lora") and kind.__name__ in ("Linear", "Linear4bit"):
        base = module.get_base_layer()
        return lora_class(kind) if frozen(base) and base.bias is None else None
    norm, mlp, attention, _ = classes()
    if kind is norm and not frozen(module):
        return None
    if kind is mlp and module.config.hidden_act != "silu":
        return None
    if kind is attention and (module.attention_dropout or not (frozen(module.q_norm) and frozen(module.k_norm))):
        return None
    return classes().get(kind)


def fuse(model) -> None:
    """Give the frozen norms, MLPs, attention, LoRA layers and head of a Qwen3-VL their fused forward pass.

    Modules of another class, with another activation, or with a forward of their own (as accelerate's hooks for a
    model spread over devices set one) stay as they are.
    """
    for module in model.model.language_model.modules():
        module.__class__ = fused_class(module) or type(module)
    head = model.lm_head
    plain = type(head) is head_class().__base__ and head.bias is None and "forward" not in vars(head)
    if plain and not head.weight.requires_grad:
        head.__class__ = head_class()


def takes_wanted(model) -> bool:
    """Whether this Qwen3-VL is to be given `wanted`: its last decoder layer is fused, adds no vision features, and is
    on a CPU. On a GPU that would spare the 32B 1 % of its work, and memory is estimated without it."""
    layers = model.model.language_model.layers
    fused = type(layers[-1]).__module__ == __name__ and model.device.type == "cpu"
    return fused and len(layers) > len(model.config.vision_config.deepstack_visual_indexes)


def unfuse(model) -> None:
    """Give them the library's own again."""
    for module in model.model.language_model.modules():
        if type(module).__module__ == __name__:
            module.__class__ = type(module).__mro__[1]
    if isinstance(model.lm_head, head_class()):
        model.lm_head.__class__ = head_class().__base__
