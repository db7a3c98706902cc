"""Seeds: one for each purpose, so that no random draw depends on another."""

import hashlib
import random


def seed_for(seed: int, *purpose) -> int:
    """A 63-bit seed that depends on every word of `purpose`; equal inputs give equal seeds on every machine."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng_for(seed: int, *purpose) -> random.Random:
    """A random generator of its own for one purpose, so that no draw depends on another."""
    return random.Random(seed_for(seed, *purpose))
