"""A decoder layer's projections by what they read, with their adapters: what `decoder` knows of the modules."""

import torch

from mmrev_kit.model.micro_batch import HEAD_SIZES, MAX_RANK

ALIGNED = 64  # columns behind a weight are filled up to a multiple of this
PART = 32  # projections of one product begin at multiples of this


class Group:
    """Projections that read the same input, with their adapters.

    Attributes:
        bases, adapters: the frozen linear layers; PEFT's layers around them, or None.
        inputs, outputs, starts: numbers of the input, of all outputs, and where each projection's outputs begin.
        rank, extra: of the adapters (0: there are none), and the columns behind the weights.
        made: whether weights in 16 bit are made for each use, of 4-bit ones or with adapters' columns behind them.
        products: numbers of the projections that are one product.
    """

    def __init__(self, modules: list, joined: bool = False):
        self.adapters = [module if hasattr(module, "lora_A") else None for module in modules]
        self.bases = [module.base_layer if hasattr(module, "lora_A") else module for module in modules]
        self.inputs, sizes = self.bases[0].in_features, [base.out_features for base in self.bases]
        self.starts, self.outputs = [sum(sizes[:number]) for number in range(len(sizes))], sum(sizes)
        self.adapted = [module for module in self.adapters if module is not None]
        self.names = self.adapted[0].active_adapters if self.adapted else []
        self.known = {
            (len(module.lora_A[name].weight), module.scaling[name], getattr(module.lora_dropout[name], "p", 0.0))
            for module in self.adapted for name in self.names
        }  # fmt: skip
        self.rank, self.scaling, self.p = next(iter(self.known), (0, 0.0, 0.0))
        self.extra = -(-self.rank * len(modules) // ALIGNED) * ALIGNED
        self.made = bool(self.rank) or hasattr(self.bases[0].weight, "quant_state")
        numbers = list(range(len(modules)))
        self.products = [numbers] if joined and self.made else [[number] for number in numbers]

    def possible(self) -> bool:
        """See `Layer.possible`."""

        def plain(base) -> bool:
            state = getattr(base.weight, "quant_state", None)
            if state is not None:
                outer = state.state2.blocksize if state.nested else 256
                if (state.quant_type, state.blocksize, outer, base.weight.dtype) != ("nf4", 64, 256, torch.uint8):
                    return False
            return base.bias is None and not base.weight.requires_grad and "forward" not in vars(base)

        def own(module) -> bool:
            trained = [*module.lora_A.parameters(), *module.lora_B.parameters()]
            return not module.lora_variant and len(trained) == 2 and all(one.dtype == torch.float32 for one in trained)

        alike = len(self.known) < 2 and self.rank <= MAX_RANK and all(start % PART == 0 for start in self.starts)
        return alike and all(map(plain, self.bases)) and all(map(own, self.adapted))

    def usable(self, dtype) -> bool:
        for base in self.bases:
            state = getattr(base.weight, "quant_state", None)
            if (base.weight.dtype if state is None else state.dtype) != dtype:
                return False
        if any(m.disable_adapters or m.merged or m.active_adapters != self.names for m in self.adapted):
            return False
        return all(m.scaling[name] == self.scaling for m in self.adapted for name in self.names)

    def matrices(self) -> list:
        """A and B of each adapter, in order."""
        return [kind[self.names[0]].weight for module in self.adapted for kind in (module.lora_A, module.lora_B)]


class Layer:
    """What the operation knows of a decoder layer: its sizes, its norms and its projections by what they read."""

    def __init__(self, module):
        own, mlp = module.self_attn, module.mlp
        self.module, self.scaling = module, own.scaling
        self.parts = list(module.modules())
        self.heads, self.key_heads = own.config.num_attention_heads, own.config.num_key_value_heads
        self.groups = {
            "qkv": Group([own.q_proj, own.k_proj, own.v_proj], joined=True),
            "o": Group([own.o_proj]),
            "up": Group([mlp.gate_proj, mlp.up_proj]),
            "down": Group([mlp.down_proj]),
        }

    def norm(self, name: str) -> tuple:
        module = getattr(self.module, name)
        return module.weight, module.variance_epsilon

    def matrices(self) -> list:
        """The trained matrices of all groups, in order."""
        return [matrix for group in self.groups.values() for matrix in group.matrices()]

    def possible(self) -> bool:
        """Whether the operation computes what these modules do: frozen layers without bias, in 16 bit or NF4 in blocks
        of 64, and adapters in fp32 of PEFT's plain kind, alike among those that read the same. And whether there are
        kernels for its sizes: a program holds a head, and all of an adapter's rank."""
        return self.module.self_attn.head_dim in HEAD_SIZES and all(group.possible() for group in self.groups.values())

    def usable(self, dtype) -> bool:
        """Whether it does so now, in this compute dtype: no module has a hook, and no adapter is off,
        merged or scaled anew."""
        watched = any(part._forward_hooks or part._forward_pre_hooks for part in self.parts)
        return not watched and all(group.usable(dtype) for group in self.groups.values())

    def seeds(self) -> dict[str, int] | None:
        """A seed for the dropout of each group, from torch's random numbers; None where nothing is dropped."""
        if not self.module.training or not any(group.p for group in self.groups.values()):
            return None
        return dict(zip(self.groups, torch.randint(2**31 - 1, (len(self.groups),)).tolist(), strict=True))
