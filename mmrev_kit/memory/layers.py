"""The bytes that one decoder layer, the logits and the vision tower take in a pass; pure arithmetic.

Symbols: h hidden, f intermediate, q = heads x head_dim, k = key/value heads x head_dim, w bytes of the compute dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmrev_kit.config.sections import Config, ConfigError

VISION_PATCHES = 8_192  # patches that go through the tower at once when features are made (features.BATCH_PATCHES)


@dataclass(frozen=True)
class Pass:
    """One pass: `sequences` of `length` tokens with padding, of which `visual` are visual tokens.

    Attributes:
        logits: positions at which logits are computed; None: all.
        masked: whether attention is given a mask (packed or padded rows) or is plainly causal.
    """

    sequences: int
    length: int
    logits: int | None
    visual: int
    masked: bool = True

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    def check(self) -> None:
        """Raises ConfigError for sizes that no pass can have."""
        for name, value, low in (
            ("sequences", self.sequences, 1),
            ("length", self.length, 1),
            ("visual", self.visual, 0),
        ):
            if value < low:
                raise ConfigError(f"a pass with {name} = {value}: must be a number from {low}.")


@dataclass(frozen=True)
class Recipe:
    """How a pass is run. The defaults are the kit's; the others describe recipes it is compared with.

    Attributes:
        width: bytes of the compute dtype.
        residual: bytes of a number of the residual stream: 4 in the kit; 2 in a 16-bit model as it is loaded.
        kept: with checkpointing, the last layers that keep what they computed.
        upcast: embedding, head and norms in fp32, as PEFT's k-bit preparation leaves them, so that every layer's
            outputs are fp32, too.
        accumulates: whether gradients of an earlier pass are there.
        eager: attention that keeps its scores.
        fused: norms, the gated product and LoRA save what `fused` saves, not what the libraries' modules do.
        four: 4-bit linear layers; PEFT's own adapter of others casts its input to fp32 first, so that none is shared.
    """

    width: int = 2
    residual: int = 4
    checkpointing: bool = True
    kept: int = 0
    cached: bool = True
    answer_logits: bool = True
    upcast: bool = False
    accumulates: bool = True
    eager: bool = False
    fused: bool = True
    four: bool = True

    @classmethod
    def of(cls, config: Config) -> Recipe:
        """The kit's own way with a configuration, on a GPU."""
        memory = config.memory
        eager = config.model.attn_implementation == "eager"
        four, width = config.quantization.bits == 4, 4 if config.quantization.compute_dtype == "fp32" else 2
        return cls(
            width=width, checkpointing=memory.gradient_checkpointing, kept=memory.kept_layers,
            cached=memory.cache_features, eager=eager, four=four,
        )  # fmt: skip

    def recomputed(self, layers: int) -> int:
        """How many of `layers` are computed again in the backward pass: the first so many."""
        return max(0, layers - self.kept) if self.checkpointing else 0

    @property
    def rest_width(self) -> int:
        return 4 if self.upcast else self.width

    @property
    def tower_out(self) -> int:
        """Bytes of a number that the vision tower puts out: norms under autocast, and 4-bit layers after them, are
        in fp32."""
        return 4 if self.four else self.width

    @property
    def out(self) -> int:
        """Bytes of a number that a linear layer of the decoder puts out."""
        return 4 if self.upcast else self.width


@dataclass(frozen=True)
class Activations:
    """Bytes of a whole pass.

    Attributes:
        tensors: what autograd saves for backward in one layer, tensor by tensor.
        inputs: what checkpointing keeps: the input of every layer.
        once: what the recomputed layer adds to that.
        mlp, attention: gradients on their way through the last layer, at its two heaviest places.
        down: the same where the first weight of the backward pass is turned to 16 bit.
        mlp_saved: what of `tensors` is gone when attention is reached.
    """

    tensors: tuple[float, ...]
    inputs: float
    once: float
    mlp: float
    down: float
    attention: float
    mlp_saved: float

    @property
    def saved(self) -> float:
        return sum(self.tensors)

    def moments(self, weight: float) -> list[tuple[str, float, float]]:
        """(place, bytes, bytes of a weight in 16 bit) of the places in a layer's backward pass."""
        return [
            ("the gated product", self.mlp, 0.0),
            ("down_proj", self.down, weight),
            ("attention", max(0.0, self.attention - self.mlp_saved), 0.0),
        ]


def lora_saved(inputs: int, names: list[str], lora, recipe: Recipe, shared: bool) -> list[float]:
    """Per token, for LoRA layers that read the same `inputs` numbers.

    Each saves the r numbers in between (w) and with dropout its mask (1 B a number). The input (w) is saved once, and
    may be saved already (`shared`); PEFT's own layers save one each where dropout made it another one.
    """
    found = []
    for _ in [name for name in names if name in lora.target_modules]:
        if lora.dropout > 0:
            found.append(inputs)
        if not shared or (lora.dropout > 0 and not recipe.fused):
            found.append(recipe.width * inputs)
            shared = recipe.fused or recipe.four
        found.append(recipe.width * lora.r)
    return found


def attention_saved(shapes, recipe: Recipe, one: Pass) -> list[float]:
    """Per token. SDPA saves queries, keys, values, its output and a number a head; with a mask the keys and values are
    repeated for every head, and the mask is saved as 16-bit numbers; eager attention saves its scores twice."""
    w, q, k, heads = recipe.width, shapes.query, shapes.key, shapes.heads
    if recipe.eager:
        return [w * q, w * q, w * q, 4 * heads * one.length, w * heads * one.length]
    if not one.masked:
        return [w * q, w * k, w * k, w * q, 4 * heads]
    rows = 32 * math.ceil(one.length / 32) / one.length
    return [w * q, w * q, w * q, w * q, 4 * heads * rows, w * 8 * math.ceil(one.length / 8)]


def activations(shapes, lora, recipe: Recipe, one: Pass) -> Activations:
    """What a pass saves and moves; see `Activations`."""
    h, f, q, k, w = shapes.hidden, shapes.inter, shapes.query, shapes.key, recipe.width
    width = w if recipe.fused else 4  # the library's norms turn their inputs to fp32 first
    norms = [4 * h, 4, 4 * h, 4, width * q, 4 * shapes.heads, width * k, 4 * shapes.kv_heads]  # inputs, 1/rms
    attention = attention_saved(shapes, recipe, one)
    attention += lora_saved(h, ["q_proj", "k_proj", "v_proj"], lora, recipe, shared=False)
    own = (recipe.fused or recipe.four) and not recipe.eager
    attention += lora_saved(q, ["o_proj"], lora, recipe, shared=own)
    mlp = [recipe.out * f] * (2 if recipe.fused else 3)  # gate, up, and without fusion gate's SiLU
    mlp += lora_saved(h, ["gate_proj", "up_proj"], lora, recipe, shared=False)
    mlp += lora_saved(f, ["down_proj"], lora, recipe, shared=False)
    per_token = norms + attention + mlp
    wide = recipe.residual == 4 or recipe.upcast  # a norm's fp32 input is the layer's own
    inputs = (4 if wide else recipe.residual) * h
    gradient = (4 if wide else recipe.residual) * h + w * h  # of the residual stream, and of what is added to it
    positions = 2 * (4 if wide else w) * shapes.head_dim  # cosine and sine, once for all layers
    scores = (2 * w + 4) * shapes.heads * one.length if recipe.eager else 4 * w * q + 4 * q
    tokens = one.tokens
    return Activations(
        tensors=tuple(size * tokens for size in per_token),
        inputs=shapes.layers * inputs * tokens,
        once=(sum(per_token) - (4 * h if wide else 0)) * tokens,
        mlp=(3 * recipe.out * f + gradient + positions) * tokens,
        down=(recipe.out * f + gradient + positions) * tokens,
        attention=(scores + gradient + positions) * tokens,
        mlp_saved=sum(mlp) * tokens,
    )


def largest_linear(shapes, recipe: Recipe) -> float:
    """The MLP's weight in 16 bit, with its constants in fp32."""
    weights = shapes.hidden * shapes.inter
    return recipe.width * weights + 4 * weights / 64


def logits_bytes(shapes, recipe: Recipe, one: Pass) -> tuple[float, str]:
    """The loss at its peak, in its backward pass: log-probabilities, their gradient, and the logits' gradient, fp32;
    a head in fp32 is cast to 16 bit, and kept."""
    count = one.tokens if one.logits is None or not recipe.answer_logits else one.logits
    cast = recipe.width * shapes.vocab * shapes.hidden if recipe.upcast else 0
    norm = 4 * shapes.hidden * one.tokens
    how = f"3 x 4 B x {shapes.vocab:,} x {count:,} positions" + (" + the head in 16 bit" if cast else "")
    return 12 * shapes.vocab * count + cast + norm, how


def vision_bytes(shapes, recipe: Recipe, one: Pass) -> tuple[float, str]:
    """The tower, which keeps nothing for a backward pass: pixels, DeepStack's features, and a block's widest place.

    A block's norms are in fp32 under autocast, and so is what 4-bit layers make of them. Attention holds its input,
    queries, keys and values, the rotated queries, and the keys' rotation in four steps of 4 B; the MLP the block's
    input and its own, the norm's output and two times `f`.
    """
    patches = one.visual * shapes.v_merge
    if recipe.cached:
        patches = max(patches, VISION_PATCHES)
    return patches * tower_patch(shapes, recipe), f"{tower_patch(shapes, recipe):,.0f} B a patch x {patches:,}"


def tower_patch(shapes, recipe: Recipe) -> float:
    """Bytes a patch, see `vision_bytes`."""
    h, w, out = shapes.v_hidden, recipe.width, recipe.tower_out
    held = (4 + w) * shapes.v_patch_values + shapes.v_deepstack * out * shapes.hidden / shapes.v_merge
    return held + max((5 * out + 16) * h, (2 * out + 4) * h + 2 * out * shapes.v_inter)


def prefill_bytes(shapes, recipe: Recipe, one: Pass) -> tuple[float, str]:
    """The first pass over prompts at its peak, in the last layer's MLP, without gradients.

    Keys and values of all layers; gate, up, their product, the norm's output and the MLP's; the residual stream at
    three places. Of the images: pixels, the tower's last states, its features (DeepStack's twice: as they come and as
    they are added) and the tokens made of them in fp32.
    """
    h, w, out = shapes.hidden, recipe.width, recipe.tower_out
    token = 2 * w * shapes.key * shapes.layers + w * (3 * shapes.inter + 2 * h) + 3 * recipe.residual * h
    features = out * h * (1 + 2 * shapes.v_deepstack) + 4 * h
    visual = features + shapes.v_merge * (out * shapes.v_hidden + 4 * shapes.v_patch_values)
    size = token * one.tokens + visual * one.visual
    return size, f"{token:,.0f} B x {one.tokens:,} tokens + {visual:,.0f} B x {one.visual:,} visual tokens"
