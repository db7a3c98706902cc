"""The language model's small operations joined, forward and backward, to the library's numbers.

RMSNorm, the gated product, RMSNorm with rotary positions, and a linear layer with LoRA are two to twelve operations in
the libraries' modules, each of which reads and writes every activation and is started by the host. Here each is one
`autograd.Function` that saves less: a norm its input as it came, in 16 bit where it is that; the gated product gate
and up but not gate's SiLU; LoRA its input, which q, k and v share, and the mask of its dropout. On GPUs for which
torch.compile can make kernels the elementwise ones become one kernel each; elsewhere the same lines run operation by
operation. Where such kernels can be made, training runs whole decoder layers as one operation instead (`decoder`).
"""

from functools import cache

import torch

from mmrev_kit.model.decoder import DecoderLayer, Given
from mmrev_kit.model.kernels import FusedHead, Gated, Lora, Norm, Rotated, can_compile
from mmrev_kit.model.plain import language_model, takes_fast_path
from mmrev_kit.model.projections import Layer


@cache
def classes() -> dict:
    """From a stock class of the model to its fused one."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

    class FusedNorm(stock.Qwen3VLTextRMSNorm):
        out_dtype = None  # the input's

        def forward(self, hidden_states):
            rows, dtype = hidden_states.flatten(0, -2), self.out_dtype or hidden_states.dtype
            return Norm.apply(rows, self.weight, self.variance_epsilon, dtype).view(hidden_states.shape)

    class FusedMLP(stock.Qwen3VLTextMLP):
        def forward(self, x):
            gate, up = self.gate_proj(x), self.up_proj(x)
            return self.down_proj(Gated.apply(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape))

    class FusedLayer(stock.Qwen3VLTextDecoderLayer):
        operation = None  # a `decoder.Layer`, where all of the layer can be one operation

        def __call__(self, hidden_states, *arguments, **more):
            if arguments or not as_one(self, hidden_states, more):
                return super().__call__(hidden_states, *arguments, **more)
            return one_operation(self, hidden_states, more["position_embeddings"], more["attention_mask"])

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
            rotated = Rotated.apply(query.flatten(0, 1), key.flatten(0, 1), *norms, cosine, sine)
            query, key = (new.view(old.shape) for new, old in zip(rotated, (query, key), strict=True))
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
            out = Lora.apply(rows, down.weight, up.weight, self.base_layer, scaling, p)
            return out.view(*x.shape[:-1], -1)

    return FusedLora


OPERATION_INPUTS = ("attention_mask", "position_embeddings", "position_ids", "use_cache")


def make_operation(layer):
    """The `decoder.Layer` of a decoder layer whose every part is the kit's own; None for another one."""
    own, mlp = layer.self_attn, layer.mlp
    parts = [layer.input_layernorm, layer.post_attention_layernorm, own, own.q_norm, own.k_norm, mlp]
    linears = [own.q_proj, own.k_proj, own.v_proj, own.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    parts += [linear for linear in linears if hasattr(linear, "base_layer")]
    if any(type(part).__module__ != __name__ for part in parts) or own.config._attn_implementation != "sdpa":
        return None
    found = Layer(layer)
    return found if found.possible() else None


def as_one(layer, hidden, more: dict) -> bool:
    """Whether this call of a decoder layer can be one operation: training or a loss in 16 bit, and no hook looks on.

    On older GPUs, and on a CPU, where it is no faster by more than a sixth, the modules run.
    """
    operation, device = layer.operation, hidden.device.type
    if operation is None or not torch.is_autocast_enabled(device) or not can_compile(hidden.device):
        return False
    dtype, mask, (sequences, length, _) = torch.get_autocast_dtype(device), more.get("attention_mask"), hidden.shape
    plain = all(more[name] is None or name in OPERATION_INPUTS for name in more)
    whole = mask is None or (mask.dtype == torch.bool and mask.shape == (sequences, 1, length, length))
    return plain and whole and hidden.dtype == torch.float32 and hidden.numel() > 0 and operation.usable(dtype)


def one_operation(layer, hidden, angles, mask):
    """A decoder layer's output, (sequences, length, h)."""
    sequences, length, _ = hidden.shape
    angles = tuple(part.expand(sequences, length, -1).flatten(0, 1) for part in angles)
    keep = torch.is_grad_enabled() and not (layer.gradient_checkpointing and layer.training)
    dtype = torch.get_autocast_dtype(hidden.device.type)
    given = Given(layer.operation, dtype, layer.operation.seeds(), angles, sequences if mask is None else mask, keep)
    here = torch.cuda.device_of(hidden)  # Triton starts its kernels on the current device, wherever their tensors lie
    with here, torch.autocast(hidden.device.type, enabled=False):
        return DecoderLayer.apply(hidden.contiguous(), given, *layer.operation.matrices())


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
    model spread over devices set one) stay as they are, and so does a model of another family.
    """
    if not takes_fast_path(model):
        return
    for module in language_model(model).modules():
        module.__class__ = fused_class(module) or type(module)
    for layer in language_model(model).layers:
        if type(layer).__module__ == __name__:
            layer.operation = make_operation(layer)
    head = model.lm_head
    plain = type(head) is torch.nn.Linear and head.bias is None and "forward" not in vars(head)
    if plain and not head.weight.requires_grad:
        head.__class__ = FusedHead


def takes_wanted(model) -> bool:
    """Whether this Qwen3-VL is to be given `wanted`: its last decoder layer is fused, adds no vision features, and is
    on a CPU. On a GPU that would spare the 32B 1 % of its work, and memory is estimated without it."""
    layers = language_model(model).layers
    fused = takes_fast_path(model) and type(layers[-1]).__module__ == __name__ and model.device.type == "cpu"
    return fused and len(layers) > len(model.config.vision_config.deepstack_visual_indexes)


def unfuse(model) -> None:
    """Give them the library's own again."""
    if not takes_fast_path(model):
        return
    for module in language_model(model).modules():
        if type(module).__module__ == __name__:
            module.__class__ = type(module).__mro__[1]
    if isinstance(model.lm_head, FusedHead):
        model.lm_head.__class__ = torch.nn.Linear
