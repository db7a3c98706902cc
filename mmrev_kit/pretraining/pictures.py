"""Pictures for pretraining: drawn faces and things as arrays, with what is held out of training.

Held out are the faces of the share `held_out`, every face with one of the `combinations` (three attributes that
training never shows together), and one background of every icon.
"""

import itertools
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy

from mmrev_kit.config.seeds import rng_for, seed_for
from mmrev_kit.data.faces import BACKGROUNDS as FACE_BACKGROUNDS
from mmrev_kit.data.faces import VALUES, draw_face, share_of
from mmrev_kit.data.objects import BACKGROUNDS, FAMILIES, draw_object
from mmrev_kit.pretraining.text import object_names

SIZES = tuple(len(values) for values in VALUES.values())  # values an attribute
TRIPLE = ("hair_color", "clothes_color", "clothes")
TRIPLES_HELD_OUT = 8  # percent of all triples
VARIANTS = 868  # of a drawn face, beside the neutral one
SIZE = 64
OTHER_SIZES = ((32, 32), (48, 48), (96, 96), (128, 128), (64, 96), (96, 64))  # width, height
ICONS = [(name, icon) for family in FAMILIES for name, icons in family.items() for icon in icons]


@cache
def _held_out_triples() -> frozenset[tuple[str, ...]]:
    triples = itertools.product(*(VALUES[name] for name in TRIPLE))
    return frozenset(t for t in triples if seed_for(0, "combination", *t) % 100 < TRIPLES_HELD_OUT)


def holds_combination(face: dict[str, str]) -> bool:
    """Whether a face shows three attributes together that pretraining never shows together."""
    return tuple(face[name] for name in TRIPLE) in _held_out_triples()


def hidden_triples() -> numpy.ndarray:
    """(values of each attribute in `TRIPLE`) booleans: the triples held out of training, in pictures and in words."""
    table = numpy.zeros([len(VALUES[name]) for name in TRIPLE], dtype=bool)
    for triple in _held_out_triples():
        table[tuple(VALUES[name].index(value) for name, value in zip(TRIPLE, triple, strict=True))] = True
    return table


@cache
def faces_of(kind: str) -> tuple[tuple[str, ...], ...]:
    """All faces of a kind, `train`, `faces` or `combinations` (the last two are held out), as tuples of values."""
    found = {"train": [], "faces": [], "combinations": []}
    for values in itertools.product(*VALUES.values()):
        face = dict(zip(VALUES, values, strict=True))
        share = share_of(face)
        if share in ("pretrain", "held_out"):
            hidden = holds_combination(face)
            if share == "held_out":
                found["combinations" if hidden else "faces"].append(values)
            elif not hidden:
                found["train"].append(values)
    return tuple(found[kind])


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size: first those of faces, `looks` of each, then those of things.

    pixels (pictures, height, width, 3) uint8; codes (faces, 7): places in `VALUES`; names, families (things,): a
    thing's name in `object_names()` and its family; index: a face's number by its values, -1 where there is none.
    """

    pixels: numpy.ndarray
    codes: numpy.ndarray
    looks: int
    names: numpy.ndarray
    families: numpy.ndarray
    index: numpy.ndarray

    @property
    def num_faces(self) -> int:
        """Pictures of faces."""
        return len(self.codes) * self.looks


def face_index(codes: numpy.ndarray) -> numpy.ndarray:
    """The number of each face by its values, -1 where there is none."""
    index = numpy.full(int(numpy.prod(SIZES)), -1, dtype=numpy.int32)
    if len(codes):
        index[numpy.ravel_multi_index(tuple(codes.T), SIZES)] = numpy.arange(len(codes))
    return index


def _draw(job: tuple) -> numpy.ndarray:
    """One picture; a narrow or low one shows a square drawing on a ground of its own colour."""
    kind, what, look, (width, height) = job
    side = min(width, height)
    if kind == "face":
        square = draw_face(dict(zip(VALUES, what, strict=True)), side, look)
        ground = "#ffffff" if look == 0 else FACE_BACKGROUNDS[(look - 1) % len(FACE_BACKGROUNDS)]
    else:
        square, ground = draw_object(what, side, look), look
    if width == height:
        return numpy.asarray(square)
    from PIL import Image

    image = Image.new("RGB", (width, height), ground)
    image.paste(square, ((width - side) // 2, (height - side) // 2))
    return numpy.asarray(image)


def _draw_many(jobs: list[tuple]) -> numpy.ndarray:
    return numpy.stack([_draw(job) for job in jobs])


def draw_all(jobs: list[tuple], workers: int) -> numpy.ndarray:
    """The pictures of jobs (kind, what, look, size) of one size, in their order."""
    if workers < 2:
        return _draw_many(jobs)
    parts = [jobs[start : start + 200] for start in range(0, len(jobs), 200)]
    with ProcessPoolExecutor(workers) as pool:
        return numpy.concatenate(list(pool.map(_draw_many, parts)))


def held_out_background(icon: str) -> str:
    """The background with which pretraining never shows an icon."""
    return BACKGROUNDS[seed_for(0, "background", icon) % len(BACKGROUNDS)]


def make_pictures(
    kind: str, seed: int, num_faces: int | None, looks: int, with_icons: bool, size: tuple[int, int], workers: int
) -> Pictures:
    """Draw the pictures of a kind: `train`, or held out: `faces`, `combinations`, `icons`.

    Args:
        num_faces: how many faces; None: all there are; 0 for `icons`.
        looks: pictures of each face, the first neutral on white, the others with an expression and a background.
        with_icons: whether the training icons are among them (held-out icons are `icons`).
        size: width and height in pixels.
    """
    rng = rng_for(seed, "pictures", kind, size)
    faces = [] if kind == "icons" else list(faces_of(kind))
    rng.shuffle(faces)
    faces = faces if num_faces is None else faces[:num_faces]
    jobs = []
    for face in faces:
        variants = [0, *(rng.randint(1, VARIANTS) for _ in range(looks - 1))]
        jobs += [("face", face, variant, size) for variant in variants]
    things = []
    names = {name: number for number, (name, _) in enumerate(object_names())}
    families = [family for _, family in object_names()]
    for name, icon in ICONS if with_icons or kind == "icons" else []:
        for background in BACKGROUNDS:
            if (background == held_out_background(icon)) == (kind == "icons"):
                jobs.append(("thing", icon, background, size))
                things.append(names[name])
    codes = [[VALUES[name].index(value) for name, value in zip(VALUES, face, strict=True)] for face in faces]
    codes = numpy.array(codes, dtype=numpy.int64).reshape(-1, len(VALUES))
    kinds = numpy.array(things, dtype=numpy.int64)
    return Pictures(
        pixels=draw_all(jobs, workers),
        codes=codes,
        looks=looks,
        names=kinds,
        families=numpy.array(families)[kinds] if things else kinds,
        index=face_index(codes),
    )
