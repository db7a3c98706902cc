"""The bytes that one decoder layer, the logits and the vision tower take in a micro-batch; pure arithmetic.

Symbols: h hidden, f intermediate, q = heads x head_dim, k = key/value heads x head_dim, w bytes of the compute dtype.
The residual stream is in fp32, whatever the compute dtype.
"""

import math
from dataclasses import dataclass

from mmrev_kit.config.sections import Config
from mmrev_kit.memory.shapes import ModelShapes
from mmrev_kit.model.micro_batch import HEAD_SIZES, MAX_RANK, VISION_PATCHES, MicroBatch


def width(config: Config) -> int:
    """Bytes of a number in the compute dtype, on a GPU."""
    return 4 if config.quantization.compute_dtype == "fp32" else 2


def tower_width(config: Config) -> int:
    """Bytes of a number that the vision tower puts out: norms under autocast, and 4-bit layers after them, are fp32."""
    return 4 if config.quantization.bits == 4 else width(config)


@dataclass(frozen=True)
class Activations:
    """Bytes of a whole micro-batch.

    Attributes:
        tensors: what autograd saves for backward in one layer, tensor by tensor.
        inputs: what checkpointing keeps: the input of every layer.
        once: what the recomputed layer adds to that.
        backward: (operation, bytes of gradients on their way, bytes of weights that are turned to 16 bit) at the
            heaviest operation of the last layer's backward pass.
        again: the same of a layer that is recomputed; None: as `backward`.
    """

    tensors: tuple[float, ...]
    inputs: float
    once: float
    backward: tuple[str, float, float]
    again: tuple[str, float, float] | None = None

    @property
    def saved(self) -> float:
        return sum(self.tensors)

    def peak(self, kept: int, recomputed: int, loss: bool) -> tuple[int, tuple[str, float, float]]:
        """How many layers' tensors are there when most is, and in which operation: of the last layer, or, when what was
        kept is gone, of one that is recomputed; in the loss all and none."""
        again = self.again or self.backward
        alone = self.once + sum(again[1:]) > kept * self.saved + sum(self.backward[1:])
        return (0, again) if recomputed and not loss and (alone or not kept) else (kept, self.backward)


def lora_saved(inputs: int, names: list[str], config: Config, shared: bool = False) -> list[float]:
    """Per token, for LoRA layers that read the same `inputs` numbers.

    Each saves the r numbers in between (w) and with dropout its mask (1 B a number). The input (w) is saved once, and
    may be saved already (`shared`).
    """
    lora, found = config.lora, []
    for _ in [name for name in names if name in lora.target_modules]:
        if lora.dropout > 0:
            found.append(inputs)
        if not shared:
            found.append(width(config) * inputs)
            shared = True
        found.append(width(config) * lora.r)
    return found


def attention_saved(shapes: ModelShapes, config: Config, one: MicroBatch) -> list[float]:
    """Per token. SDPA saves queries, keys, values, its output and a number a head; with a mask the keys and values are
    repeated for every head, and the mask is saved as 16-bit numbers; eager attention saves its scores twice."""
    w, q, k, heads = width(config), shapes.query, shapes.key, shapes.num_attention_heads
    if config.model.attn_implementation == "eager":
        return [w * q, w * q, w * q, 4 * heads * one.length, w * heads * one.length]
    if not one.masked:
        return [w * q, w * k, w * k, w * q, 4 * heads]
    rows = 32 * math.ceil(one.length / 32) / one.length
    return [w * q, w * q, w * q, w * q, 4 * heads * rows, w * 8 * math.ceil(one.length / 8)]


def as_operation(shapes: ModelShapes, config: Config, old: bool) -> bool:
    """Whether a GPU, `old` or not, runs a decoder layer as one operation (`model/decoder.py`), or its modules."""
    sized = shapes.head_dim in HEAD_SIZES and config.lora.r <= MAX_RANK
    plain = config.quantization.compute_dtype != "fp32" and config.model.attn_implementation == "sdpa"
    return not old and sized and plain


def activations(shapes: ModelShapes, config: Config, one: MicroBatch, old: bool = False) -> Activations:
    """What a micro-batch saves and moves; see `Activations`, and `estimate` for `old`."""
    return (of_operation if as_operation(shapes, config, old) else of_modules)(shapes, config, one)


@dataclass(frozen=True)
class Projections:
    """Projections that read the same: bytes a token of the input with the columns of adapters behind it, of the
    adapters' part and the dropout masks; and bytes of a product's weights in 16 bit."""

    inputs: float
    low: float
    masks: float
    weights: float


def projections(shapes: ModelShapes, config: Config) -> dict[str, Projections]:
    """By what they read, as `decoder.Layer` has them."""
    names = {
        "qkv": ["q_proj", "k_proj", "v_proj"],
        "o": ["o_proj"],
        "up": ["gate_proj", "up_proj"],
        "down": ["down_proj"],
    }
    w, lora, linears, found = width(config), config.lora, shapes.linears(), {}
    for word, parts in names.items():
        inputs, outputs = linears[parts[0]]
        rank = len(parts) * lora.r if set(parts) & set(lora.target_modules) else 0
        wide = inputs + 64 * math.ceil(rank / 64)
        made = config.quantization.bits == 4 or rank
        product = sum(linears[part][1] for part in parts) if word == "qkv" else outputs
        masks = inputs if rank and lora.dropout > 0 else 0
        found[word] = Projections(w * wide, w * rank, masks, w * wide * product if made else 0.0)
    return found


def heaviest(steps: list[tuple[str, float, float]], tokens: int) -> tuple[str, float, float]:
    """Of steps, as in `Activations.backward` but with bytes a token, the one that holds most, with those of all."""
    return max(((name, size * tokens, weights) for name, size, weights in steps), key=lambda step: step[1] + step[2])


def of_operation(shapes: ModelShapes, config: Config, one: MicroBatch) -> Activations:
    """Of a layer as one operation: the steps at which its backward pass holds most."""
    h, f, q, k, w = shapes.hidden_size, shapes.intermediate_size, shapes.query, shapes.key, width(config)
    parts, heads, tokens = projections(shapes, config), shapes.num_attention_heads, one.tokens
    saved = [4 * h, w * (q + 2 * k), w * q, 4 * heads, 4 * h, 2 * w * f, *(part.low for part in parts.values())]
    masks = parts["qkv"].masks + parts["o"].masks
    outer = 4 * h + w * h + 2 * 4 * shapes.head_dim  # of the output, in fp32 and in 16 bit; cosine and sine, once
    up, down = parts["up"], parts["down"]
    attended = 4 * h + outer + masks
    steps = [
        ("down_proj", outer + down.inputs, down.weights),
        ("gate_proj and up_proj", outer + down.inputs + up.inputs, up.weights),
        ("attention", attended + w * (3 * q + 3 * k) + 4 * heads, 0.0),
        ("q, k and v", attended + w * (q + 2 * k) + parts["qkv"].inputs, parts["qkv"].weights),
    ]
    again = [(steps[1][0], steps[1][1] + masks, up.weights), ("attention", steps[2][1] - 2 * w * f, 0.0)]
    return Activations(
        tensors=tuple(size * tokens for size in saved if size),
        inputs=shapes.num_hidden_layers * 4 * h * tokens,
        once=(sum(saved) - 4 * h) * tokens,
        backward=heaviest(steps, tokens),
        again=heaviest(again, tokens),
    )


def of_modules(shapes: ModelShapes, config: Config, one: MicroBatch) -> Activations:
    """Of a layer's modules."""
    h, f, q, k, w = shapes.hidden_size, shapes.intermediate_size, shapes.query, shapes.key, width(config)
    eager, heads = config.model.attn_implementation == "eager", shapes.num_attention_heads
    norms = [4 * h, 4, 4 * h, 4, w * q, 4 * heads, w * k, 4 * shapes.num_key_value_heads]  # inputs, 1/rms
    attention = attention_saved(shapes, config, one)
    attention += lora_saved(h, ["q_proj", "k_proj", "v_proj"], config)
    attention += lora_saved(q, ["o_proj"], config, shared=not eager)  # SDPA's output is saved anyway
    mlp = [w * f, w * f]  # gate, up
    mlp += lora_saved(h, ["gate_proj", "up_proj"], config)
    mlp += lora_saved(f, ["down_proj"], config)
    per_token = norms + attention + mlp
    gradient = 4 * h + w * h  # of the residual stream, and of what is added to it
    gradient += 2 * 4 * shapes.head_dim  # and cosine and sine, which are there once for all layers
    scores = (2 * w + 4) * heads * one.length if eager else 4 * w * q + 4 * q
    tokens = one.tokens
    operations = [
        ("the gated product", 3 * w * f + gradient, 0.0),
        ("down_proj", w * f + gradient, largest_linear(shapes, config)),
        ("attention", max(0.0, scores + gradient - sum(mlp)), 0.0),  # what the MLP saved is gone by then
    ]
    return Activations(
        tensors=tuple(size * tokens for size in per_token),
        inputs=shapes.num_hidden_layers * 4 * h * tokens,
        once=(sum(per_token) - 4 * h) * tokens,  # a norm's input is the layer's own
        backward=heaviest(operations, tokens),
    )


def largest_linear(shapes: ModelShapes, config: Config) -> float:
    """The MLP's weight in 16 bit, with its constants in fp32; 0 where weights are not quantized."""
    weights = shapes.hidden_size * shapes.intermediate_size
    return width(config) * weights + 4 * weights / 64 if config.quantization.bits == 4 else 0


def largest_product(shapes: ModelShapes, config: Config, old: bool) -> float:
    """The weights of the largest product of a pass without gradients, as above."""
    if as_operation(shapes, config, old):
        return max(part.weights for part in projections(shapes, config).values())
    return largest_linear(shapes, config)


def logits_bytes(shapes: ModelShapes, one: MicroBatch) -> tuple[float, str]:
    """The loss at its peak, in its backward pass: log-probabilities, their gradient, and the logits' gradient, fp32."""
    size = 12 * shapes.vocab_size * one.logits + 4 * shapes.hidden_size * one.tokens
    return size, f"3 x 4 B x {shapes.vocab_size:,} x {one.logits:,} positions"


def vision_bytes(shapes: ModelShapes, config: Config, one: MicroBatch) -> tuple[float, str]:
    """The tower, which keeps nothing for a backward pass: pixels, DeepStack's features, and the most of a block.

    A block's norms are in fp32 under autocast, and so is what 4-bit layers make of them. Attention holds its input,
    queries, keys and values, the rotated queries, and the keys' rotation in four steps of 4 B; the MLP the block's
    input and its own, the norm's output and two times `f`.
    """
    patches = one.visual * shapes.v_merge
    if config.memory.cache_features:
        patches = max(patches, VISION_PATCHES)
    patch = tower_patch(shapes, config)
    return patches * patch, f"{patch:,.0f} B a patch x {patches:,}"


def tower_patch(shapes: ModelShapes, config: Config) -> float:
    """Bytes a patch, see `vision_bytes`."""
    h, w, out = shapes.v_hidden, width(config), tower_width(config)
    held = (4 + w) * shapes.v_patch_values + shapes.v_deepstack * out * shapes.hidden_size / shapes.v_merge
    return held + max((5 * out + 16) * h, (2 * out + 4) * h + 2 * out * shapes.v_inter)


def prefill_bytes(shapes: ModelShapes, config: Config, one: MicroBatch) -> tuple[float, str]:
    """The first pass over prompts at its peak, in the last layer's MLP, without gradients.

    Keys and values of all layers; gate, up, their product, the norm's output and the MLP's; three copies of the
    residual stream. Of the images: pixels, the tower's last states, its features (DeepStack's twice: as they come and
    as they are added) and the tokens made of them in fp32.
    """
    h, w, out = shapes.hidden_size, width(config), tower_width(config)
    token = 2 * w * shapes.key * shapes.num_hidden_layers + w * (3 * shapes.intermediate_size + 2 * h) + 3 * 4 * h
    features = out * h * (1 + 2 * shapes.v_deepstack) + 4 * h
    visual = features + shapes.v_merge * (out * shapes.v_hidden + 4 * shapes.v_patch_values)
    size = token * one.tokens + visual * one.visual
    return size, f"{token:,.0f} B x {one.tokens:,} tokens + {visual:,.0f} B x {one.visual:,} visual tokens"
