"""Pictures for pretraining: drawn faces and icons, and what is held out of training.

Held out are the faces of the share `held_out`, every face that shows one of the `held_out_combinations`, and one
background of every icon. Faces of the shares `experiment` and `pool` are in no part of it.
"""

import itertools
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import numpy

from mmrev_kit.config.seeds import rng_for, seed_for
from mmrev_kit.data.faces import VALUES, draw_face, share_of
from mmrev_kit.data.objects import BACKGROUNDS, FAMILIES, draw_object
from mmrev_kit.data.pools import Subject

HELD_OUT = {
    "faces": "faces that training did not show",
    "combinations": "faces with three attributes that training did not show together",
    "icons": "icons on a background on which training did not show them",
}
TRIPLE = ("hair_color", "clothes_color", "clothes")
PERCENT_HELD_OUT = 8  # of all triples
VARIANTS = 868  # of a drawn face, beside the neutral one
SIZE = 64  # pixels on a side


@cache
def held_out_combinations() -> frozenset[tuple[str, ...]]:
    """The values of `TRIPLE` that training never shows or names together; the same for every seed."""
    triples = itertools.product(*(VALUES[name] for name in TRIPLE))
    return frozenset(t for t in triples if seed_for(0, "combination", *t) % 100 < PERCENT_HELD_OUT)


def shows_combination(face: dict[str, str]) -> bool:
    """Whether a face shows one of the `held_out_combinations`."""
    return tuple(face[name] for name in TRIPLE) in held_out_combinations()


def names_combination(text: str) -> bool:
    """Whether a description, as `faces.describe` words it, names one of the `held_out_combinations`."""
    return any(f"{hair} hair" in text and f"{color} {kind}" in text for hair, color, kind in held_out_combinations())


@cache
def all_faces() -> dict[str, list[dict[str, str]]]:
    """Every face of pretraining by kind: `train`, or held out, `faces` and `combinations`."""
    found: dict[str, list[dict[str, str]]] = {"train": [], "faces": [], "combinations": []}
    for values in itertools.product(*VALUES.values()):
        face = dict(zip(VALUES, values, strict=True))
        share, hidden = share_of(face), shows_combination(face)
        if share == "held_out":
            found["combinations" if hidden else "faces"].append(face)
        elif share == "pretrain" and not hidden:
            found["train"].append(face)
    return found


def held_out_background(icon: str) -> str:
    """The background with which training never shows an icon."""
    return BACKGROUNDS[seed_for(0, "background", icon) % len(BACKGROUNDS)]


def make_subjects(kind: str, seed: int, num_faces: int | None, looks: int) -> list[Subject]:
    """What is pictured: faces and icons for `train`, or a kind of `HELD_OUT`. A subject's id is its picture's number.

    Args:
        num_faces: how many faces; None: all there are.
        looks: pictures of each face, the first neutral on white, the others with an expression and a background.
    """
    rng = rng_for(seed, "pictures", kind)
    faces = [] if kind == "icons" else rng.sample(all_faces()[kind], len(all_faces()[kind]))[:num_faces]
    attributes = [
        face | {"look": str(look)}
        for face in faces
        for look in (0, *(rng.randint(1, VARIANTS) for _ in range(looks - 1)))
    ]
    for number, family in enumerate(FAMILIES if kind in ("train", "icons") else []):
        for name, background in itertools.product(family, BACKGROUNDS):
            attributes += [
                {"name": name, "family": str(number), "icon": icon, "background": background}
                for icon in family[name]
                if (background == held_out_background(icon)) == (kind == "icons")
            ]
    return [Subject(str(number), each) for number, each in enumerate(attributes)]


def is_face(subject: Subject) -> bool:
    """Whether a subject is a face; else it is an icon."""
    return "icon" not in subject.attributes


def draw_subject(subject: Subject) -> numpy.ndarray:
    """The picture of a subject, (SIZE, SIZE, 3) bytes."""
    seen = subject.attributes
    if is_face(subject):
        return numpy.asarray(draw_face({name: seen[name] for name in VALUES}, SIZE, int(seen["look"])))
    return numpy.asarray(draw_object(seen["icon"], SIZE, seen["background"]))


@cache
def draw_pictures(
    kind: str, seed: int, num_faces: int | None, looks: int, workers: int
) -> tuple[list[Subject], numpy.ndarray]:
    """`make_subjects`, and their pictures, (subjects, SIZE, SIZE, 3) bytes, in their order; drawn once a process.

    Args:
        workers: processes that draw; 0: this one does.
    """
    subjects = make_subjects(kind, seed, num_faces, looks)
    if not workers:
        return subjects, numpy.stack([draw_subject(subject) for subject in subjects])
    with ProcessPoolExecutor(workers) as pool:
        return subjects, numpy.stack(list(pool.map(draw_subject, subjects, chunksize=64)))
