"""Invented faces, drawn offline, and what is seen of them in words.

A drawn face is a dict of seven identity attributes, each of which can be seen and be said in words. Expression and
background are not part of the identity: they change from one picture of a person to the next.
"""

import itertools
import random
from collections.abc import Iterable
from functools import cache

from PIL import Image

from mmrev_kit.config.sections import ConfigError
from mmrev_kit.config.seeds import rng_for, seed_for
from mmrev_kit.data.assets import draw, read_asset, style_definition

STYLE = "toon-head"
TABLES = read_asset("faces")
# Attribute -> value -> how it is drawn: a colour, or the style's name for a part (None: the part is left out).
# Hair and skin colours also differ from each other, as a beard is hair on skin. "black" clothes are not quite black,
# so that the style's shading still tells a black jacket from a black T-shirt.
DRAWN: dict[str, dict[str, str | None]] = TABLES["drawn"]
# Two values of an attribute must exclude each other in words too, or a "Wrong" description would be true: hence
# "no facial hair" (a man with only a moustache has no beard) and "short beard" (a long beard is also a full one).
PHRASES: dict[str, dict[str, str]] = TABLES["phrases"]
VALUES = {attribute: tuple(values) for attribute, values in DRAWN.items()}
# Percent of all faces in each share; a face belongs to one share for good, whatever seed draws it.
SHARES = {"experiment": 20, "pool": 30, "held_out": 10, "pretrain": 40}
PATIENCE = 20_000  # draws without a new face after which a share counts as used up
NEUTRAL = ("smile", "happy", "neutral")  # mouth, eyes, eyebrows of variant 0
WHITE = "#ffffff"
BACKGROUNDS: list[str] = TABLES["backgrounds"]


def credits() -> dict[str, str]:
    """Who drew the style and under which licence, from the style's own metadata."""
    meta = style_definition(STYLE)["meta"]
    return {
        "style": meta["source"]["name"],
        "artist": meta["creator"]["name"],
        "license": meta["license"]["name"],
        "license_url": meta["license"]["url"],
        "source": meta["source"]["url"],
        "text": meta["license"]["text"],
        "changes": "drawn by DiceBear, in colours chosen by mmrev_kit",
    }


def _check_attributes(attributes: dict[str, str], names: Iterable[str]) -> None:
    for name in names:
        if name not in VALUES:
            raise ValueError(f"{name!r} is no attribute of a drawn face; known: {', '.join(VALUES)}.")
        if attributes.get(name) not in VALUES[name]:
            known = ", ".join(VALUES[name])
            raise ValueError(f"{name} = {attributes.get(name)!r}: a drawn face has one of {known}.")


@cache
def _expressions() -> list[tuple[str, str, str]]:
    """Every (mouth, eyes, eyebrows) but the neutral one, in a fixed mixed order, so that neighbours differ well."""
    expressions = [
        looks for looks in itertools.product(TABLES["mouths"], TABLES["eyes"], TABLES["eyebrows"]) if looks != NEUTRAL
    ]
    rng_for(0, "expressions").shuffle(expressions)
    return expressions


def _look(variant: int) -> tuple[tuple[str, str, str], str]:
    """(mouth, eyes, eyebrows) and background of a variant; 124 expressions and 7 backgrounds share no factor."""
    if variant == 0:
        return NEUTRAL, WHITE
    expressions = _expressions()
    last = len(expressions) * len(BACKGROUNDS)
    if not 0 < variant <= last:
        raise ValueError(f"variant = {variant}: a drawn face has the variants 0 to {last}.")
    return expressions[(variant - 1) % len(expressions)], BACKGROUNDS[(variant - 1) % len(BACKGROUNDS)]


def draw_face(attributes: dict[str, str], size: int, variant: int = 0) -> Image.Image:
    """A face as a size x size RGB picture; equal arguments give equal pixels.

    Args:
        attributes: all seven attributes of `VALUES`.
        size: pixels on a side.
        variant: 0 is a neutral expression on white; 1 to 868 change expression and background only, all different.

    Raises:
        ValueError: unknown attribute or value, missing attribute, unknown variant.
    """
    _check_attributes(attributes, [*VALUES, *attributes])
    (mouth, eyes, eyebrows), background = _look(variant)
    part = {name: DRAWN[name][attributes[name]] for name in VALUES}
    options = {
        "seed": "face",  # every choice is made below; a fixed seed keeps the rest fixed
        "hairVariant": part["hair_cut"],
        "hairColor": part["hair_color"],
        "rearHairProbability": 100 if part["back_hair"] else 0,
        "beardProbability": 100 if part["beard"] else 0,
        "skinColor": part["skin"],
        "clothesVariant": part["clothes"],
        "clothesColor": part["clothes_color"],
        "mouthVariant": mouth,
        "eyesVariant": eyes,
        "eyebrowsVariant": eyebrows,
    }
    options |= {"rearHairVariant": part["back_hair"]} if part["back_hair"] else {}
    options |= {"beardVariant": part["beard"]} if part["beard"] else {}
    return draw(STYLE, options, size, background)


def share_of(attributes: dict[str, str]) -> str:
    """The share of `SHARES` that a face belongs to, by a stable hash of its attributes.

    So a face of a pool, or of the embedded model's pretraining, is never a face of any experiment.
    """
    percentile = seed_for(0, "share", *(attributes[name] for name in VALUES)) % 100
    ends = itertools.accumulate(SHARES.values())  # the last one is 100
    return next(share for share, end in zip(SHARES, ends, strict=True) if percentile < end)


def sample_faces(rng: random.Random, count: int, share: str, min_difference: int = 2) -> list[dict[str, str]]:
    """`count` faces of one share, any two of which differ in at least `min_difference` attributes.

    Raises:
        ValueError: unknown share, or more faces than were found.
    """
    if share not in SHARES:
        raise ValueError(f"share = {share!r}: must be one of {', '.join(SHARES)}.")
    # Two faces differ in fewer than m attributes exactly if they agree on some len - (m - 1) of them.
    kept = list(itertools.combinations(VALUES, len(VALUES) - (min_difference - 1)))
    faces, taken, failed = [], set(), 0
    while len(faces) < count:
        face = {name: rng.choice(values) for name, values in VALUES.items()}
        keys = {(names, *(face[name] for name in names)) for names in kept}
        if share_of(face) == share and not keys & taken:
            faces.append(face)
            taken |= keys
            failed = 0
        elif (failed := failed + 1) > PATIENCE:
            raise ConfigError(
                f"{count} faces of the share {share!r} that differ in {min_difference} or more attributes: "
                f"only {len(faces)} were found. Ask for fewer."
            )
    return faces


def phrases(attributes: dict[str, str]) -> dict[str, str]:
    """What can be seen of each of the given attributes, in words: {"hair_color": "ginger hair", ...}.

    Raises:
        ValueError: unknown attribute or value.
    """
    _check_attributes(attributes, attributes)
    return {name: PHRASES[name][value] for name, value in attributes.items()}


def describe(attributes: dict[str, str], names: Iterable[str]) -> str:
    """A person by the attributes in `names`: "a person with ginger hair in a bun, a green T-shirt".

    The order is that of `VALUES`, whatever the order of `names`. A colour joins the thing that it colours.

    Raises:
        ValueError: no name, unknown attribute or value.
    """
    names = set(names)
    if not names:
        raise ValueError("A person is described by at least one attribute.")
    _check_attributes(attributes, names)
    words = phrases({name: attributes[name] for name in VALUES if name in names})
    if {"hair_color", "hair_cut"} <= names:
        words["hair_cut"] = f"{attributes['hair_color']} {words['hair_cut']}"
        del words["hair_color"]
    if {"clothes_color", "clothes"} <= names:
        coloured = f"{attributes['clothes_color']} {attributes['clothes']}"
        words["clothes"] = f"{'an' if coloured[0] in 'aeiou' else 'a'} {coloured}"
        del words["clothes_color"]
    return "a person with " + ", ".join(words.values())
