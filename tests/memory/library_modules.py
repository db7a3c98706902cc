"""What other recipes' passes take: the library's own norms, gated product and LoRA layers instead of the kit's.

For the passes that were measured with them; nothing that the kit does depends on it.
"""

from mmrev_kit.memory import layers
from mmrev_kit.memory.estimate import GIB, lora_tensors, weight_components


def lora_saved(inputs: int, names: list[str], config, shared: bool = False) -> list[float]:
    """As `layers.lora_saved`; PEFT's layers save one input each, as dropout made it another one."""
    return [
        size for name in names if name in config.lora.target_modules for size in (inputs, 2 * inputs, 2 * config.lora.r)
    ]


def activations(upcast: bool, residual: int):
    """A function in the place of `layers.activations`.

    Args:
        upcast: embedding, head and norms in fp32, as PEFT's k-bit preparation leaves them, so that every layer's
            outputs are fp32, too.
        residual: bytes of a number of the residual stream: 2 in a 16-bit model as it is loaded.
    """

    def found(shapes, config, one, old) -> layers.Activations:
        h, f, q, k = shapes.hidden_size, shapes.intermediate_size, shapes.query, shapes.key
        eager, heads = config.model.attn_implementation == "eager", shapes.num_attention_heads
        out, wide, tokens = 4 if upcast else 2, residual == 4 or upcast, one.tokens
        norms = [4 * h, 4, 4 * h, 4, 4 * q, 4 * heads, 4 * k, 4 * shapes.num_key_value_heads]  # cast to fp32 first
        attention = layers.attention_saved(shapes, config, one)
        attention += lora_saved(h, ["q_proj", "k_proj", "v_proj"], config) + lora_saved(q, ["o_proj"], config)
        mlp = [out * f] * 3  # gate, up, gate's SiLU
        per_token, stream = norms + attention + mlp, 4 if wide else 2
        gradient = stream * h + 2 * h + 2 * stream * shapes.head_dim
        scores = 8 * heads * one.length if eager else 12 * q
        operations = [
            ("the gated product", (3 * out * f + gradient) * tokens, 0.0),
            ("down_proj", (out * f + gradient) * tokens, layers.largest_linear(shapes, config)),
            ("attention", max(0.0, scores + gradient - sum(mlp)) * tokens, 0.0),
        ]
        return layers.Activations(
            tensors=tuple(size * tokens for size in per_token),
            inputs=shapes.num_hidden_layers * stream * h * tokens,
            once=(sum(per_token) - (4 * h if wide else 0)) * tokens,
            backward=max(operations, key=lambda operation: operation[1] + operation[2]),
        )

    return found


def allocated_beside(shapes, config, upcast: bool, phase: str) -> float:
    """GiB that these modules hold in a phase and the kit's do not: 16-bit copies of LoRA, which autocast casts once and
    keeps for backward; and `upcast` embedding, head and norms, the head also cast to 16 bit and kept for the loss."""
    count = sum(lora_tensors(shapes, config.lora.r, config.lora.target_modules))
    kept = shapes.num_hidden_layers - config.memory.recomputed_layers(shapes.num_hidden_layers)
    size = 0.0
    if phase != "optimizer step":
        size += 2 * count * min(shapes.num_hidden_layers, 1 + kept) / shapes.num_hidden_layers
    if upcast:
        size += weight_components(shapes, config, False)[1].size
        size += 2 * shapes.vocab_size * shapes.hidden_size if phase == "loss" else 0
    return size / GIB
