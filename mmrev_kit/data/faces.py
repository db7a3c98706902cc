"""Images: decoding that never returns part of a picture, and invented faces drawn offline.

A drawn face is a dict of seven identity attributes, each of which can be seen and be said in words. Expression and
background are not part of the identity: they change from one picture of a person to the next.
"""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Iterable
from functools import cache
from importlib import resources

from PIL import Image

from mmrev_kit.config.seeds import rng_for, seed_for

STYLE = "toon-head"
# Attribute -> value -> how it is drawn: a colour, or the style's name for a part (None: the part is left out).
# Hair and skin colours also differ from each other, as a beard is hair on skin. "black" clothes are not quite black,
# so that the style's shading still tells a black jacket from a black T-shirt.
DRAWN = {
    "hair_color": {
        "black": "#121014", "brown": "#8f4a12", "blond": "#f5cf4f", "ginger": "#ee6414", "grey": "#a9b0b8",
    },
    "hair_cut": {"bun": "bun", "combed": "sideComed", "spiky": "spiky", "undercut": "undercut"},
    "back_hair": {
        "short": None, "long straight": "longStraight", "long wavy": "longWavy", "shoulder length": "shoulderHigh",
    },
    "beard": {"none": None, "short": "fullBeard", "long": "longBeard", "moustache": "moustacheTwirl"},
    "skin": {"pale": "#fde0d0", "tan": "#e6b388", "brown": "#b57a5c", "dark": "#56352a"},
    "clothes_color": {
        "black": "#2b2b2e", "blue": "#2563d9", "green": "#1c8a3c", "grey": "#8b8f94", "orange": "#f9861a",
        "pink": "#f58cc0", "purple": "#7a2ac4", "red": "#c81e24", "white": "#fbfbf8", "yellow": "#f4d21f",
    },
    "clothes": {
        "collared shirt": "shirt", "dress": "dress", "jacket": "openJacket", "T-shirt": "tShirt",
        "turtleneck": "turtleNeck",
    },
}  # fmt: skip
VALUES = {attribute: tuple(values) for attribute, values in DRAWN.items()}
# Two values of an attribute must exclude each other in words too, or a "Wrong" description would be true: hence
# "no facial hair" (a man with only a moustache has no beard) and "short beard" (a long beard is also a full one).
CUT_PHRASES = {
    "bun": "hair in a bun", "combed": "hair combed to the side", "spiky": "hair in spikes",
    "undercut": "hair in an undercut",
}  # fmt: skip
BACK_PHRASES = {
    "short": "short hair at the back", "long straight": "long straight hair at the back",
    "long wavy": "long wavy hair at the back", "shoulder length": "shoulder-length hair at the back",
}  # fmt: skip
BEARD_PHRASES = {
    "none": "no facial hair", "short": "a short beard", "long": "a long beard", "moustache": "a twirled moustache",
}  # fmt: skip
SKIN_PHRASES = {"pale": "pale skin", "tan": "tan skin", "brown": "brown skin", "dark": "very dark skin"}
# Percent of all faces in each share; a face belongs to one share for good, whatever seed draws it.
SHARES = {"experiment": 20, "pool": 30, "held_out": 10, "pretrain": 40}
PATIENCE = 20_000  # draws without a new face after which a share counts as used up
NEUTRAL = ("smile", "happy", "neutral")  # mouth, eyes, eyebrows of variant 0
MOUTHS = ("smile", "agape", "angry", "laugh", "sad")
EYES = ("happy", "bow", "humble", "wide", "wink")
EYEBROWS = ("neutral", "angry", "happy", "raised", "sad")
WHITE = "#ffffff"
BACKGROUNDS = ("#dbe9f6", "#e3f2dc", "#fbe9d0", "#ecdff5", "#dff3f1", "#f8dede", "#e6e6e6")


@cache
def _definition() -> dict:
    return json.loads((resources.files("dicebear_styles") / f"{STYLE}.json").read_text(encoding="utf-8"))


@cache
def _style():
    import dicebear

    return dicebear.Style(_definition())


def credits() -> dict[str, str]:
    """Who drew the style and under which licence, from the style's own metadata."""
    meta = _definition()["meta"]
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
    found = [looks for looks in itertools.product(MOUTHS, EYES, EYEBROWS) if looks != NEUTRAL]
    rng_for(0, "expressions").shuffle(found)
    return found


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
    import dicebear
    import resvg_py

    _check_attributes(attributes, [*VALUES, *attributes])
    (mouth, eyes, eyebrows), background = _look(variant)
    part = {name: DRAWN[name][attributes[name]] for name in VALUES}
    options = {
        "seed": "face",  # every choice is made below; a fixed seed keeps the rest fixed
        "size": size,
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
    svg = str(dicebear.Avatar(_style(), options))
    png = resvg_py.svg_to_bytes(svg_string=svg, background=background, width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return image.convert("RGB")


def share_of(attributes: dict[str, str]) -> str:
    """The share of `SHARES` that a face belongs to, by a stable hash of its attributes.

    So a face of a pool, or of the embedded model's pretraining, is never a face of any experiment.
    """
    place = seed_for(0, "share", *(attributes[name] for name in VALUES)) % 100
    for share, percent in SHARES.items():
        if place < percent:
            return share
        place -= percent
    raise AssertionError("the shares add up to 100")


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
            raise ValueError(
                f"{count} faces of the share {share!r} that differ in {min_difference} or more attributes: "
                f"only {len(faces)} were found. Ask for fewer."
            )
    return faces


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def phrases(attributes: dict[str, str]) -> dict[str, str]:
    """What can be seen of each of the given attributes, in words: {"hair_color": "ginger hair", ...}.

    Raises:
        ValueError: unknown attribute or value.
    """
    _check_attributes(attributes, attributes)
    words = {
        "hair_color": lambda value: f"{value} hair",
        "hair_cut": CUT_PHRASES.get,
        "back_hair": BACK_PHRASES.get,
        "beard": BEARD_PHRASES.get,
        "skin": SKIN_PHRASES.get,
        "clothes_color": lambda value: f"{value} clothes",
        "clothes": _with_article,
    }
    return {name: words[name](value) for name, value in attributes.items()}


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
    found = phrases({name: attributes[name] for name in VALUES if name in names})
    if {"hair_color", "hair_cut"} <= names:
        found["hair_cut"] = f"{attributes['hair_color']} {found['hair_cut']}"
        del found["hair_color"]
    if {"clothes_color", "clothes"} <= names:
        found["clothes"] = _with_article(f"{attributes['clothes_color']} {attributes['clothes']}")
        del found["clothes_color"]
    return "a person with " + ", ".join(found.values())
