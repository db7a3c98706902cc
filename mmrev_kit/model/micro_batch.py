"""The shape of a micro-batch, which is all that its memory and its time depend on."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mmrev_kit.config.sections import ConfigError

HEAD_SIZES, MAX_RANK = (16, 32, 64, 128), 256  # for which a decoder layer has kernels
VISION_PATCHES = 8_192  # that go through the vision tower at once: ten images of 448 x 448 pixels


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once: `sequences` of `length` tokens with padding, `visual` of them of images.

    Attributes:
        logits: positions at which logits are computed.
        masked: whether attention is given a mask (packed or padded rows) or is plainly causal.
        content: the rows themselves, padded ones as samples, packed ones as each sequence's groups; not compared.
    """

    sequences: int
    length: int
    logits: int
    visual: int
    masked: bool = True
    content: Sequence = field(default=(), compare=False, repr=False)

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    def check(self) -> None:
        """Raises ConfigError for sizes that no micro-batch can have."""
        for name, low in (("sequences", 1), ("length", 1), ("logits", 0), ("visual", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"a micro-batch with {name} = {getattr(self, name)}: must be a number from {low}.")
