"""The object retention pool: everyday things, drawn as icons, with their names for descriptions."""

import itertools
import random
from pathlib import Path

from PIL import Image

from mmrev_kit.config.seeds import rng_for
from mmrev_kit.data.assets import draw, read_asset, style_definition
from mmrev_kit.data.pools import Sampler, Subject, make_pool, split_off

STYLE = "icons"
# Families of things that could be taken for one another: {description: icons}. A wrong text or picture always comes
# from another family, so that it is wrong beyond doubt.
FAMILIES: list[dict[str, list[str]]] = read_asset("icons")["families"]
BACKGROUNDS: list[str] = read_asset("icons")["backgrounds"]


def credits() -> dict[str, str]:
    """Licence and makers of the icons, as the style's own file says."""
    meta = style_definition(STYLE)["meta"]
    return {
        "style": f"DiceBear {STYLE}",
        "creator": meta["creator"]["name"],
        "source": meta["source"]["url"],
        "license": meta["license"]["name"],
        "license_url": meta["license"]["url"],
        "license_text": meta["license"]["text"],
    }


def draw_object(icon: str, size: int, background: str) -> Image.Image:
    """One icon, black on a light ground, `size` pixels a side."""
    options = {"iconVariant": [icon], "iconColor": ["#000000"], "backgroundColor": [background]}
    return draw(STYLE, options | {"scale": 1.25, "seed": icon}, size)


class ObjectSampler(Sampler):
    """Names of things; what is wrong comes from another family. Attributes: name, family, icon, background."""

    def _strangers(self, subject: Subject, rng: random.Random, count: int) -> list[Subject]:
        """Subjects of `count` other families, each from a family of its own."""
        others = [s for s in self.subjects if s.attributes["family"] != subject.attributes["family"]]
        families = rng.sample(sorted({s.attributes["family"] for s in others}), count)
        return [rng.choice([s for s in others if s.attributes["family"] == family]) for family in families]

    def statement(self, rng: random.Random, subject: Subject, truth: bool) -> str:
        return (subject if truth else self._strangers(subject, rng, 1)[0]).attributes["name"]

    def texts(self, rng: random.Random, subject: Subject) -> list[str]:
        return [thing.attributes["name"] for thing in (subject, *self._strangers(subject, rng, 3))]

    def pictures(self, rng: random.Random, subject: Subject) -> tuple[str, list[Subject]]:
        return subject.attributes["name"], [subject, *self._strangers(subject, rng, 3)]


def make_object_pool(
    folder: str | Path, image_size: int, seed: int, rows_per_task: tuple[int, int] = (1200, 60)
) -> Path:
    """Make the object pool, see `make_pool`; `image_size` is in pixels on a side.

    Families, and with them all pictures of a thing, are in one split only.
    """
    parts, number = {}, itertools.count()
    for split, families in split_off(range(len(FAMILIES)), rng_for(seed, "pool", "families")).items():
        looks = [
            {"name": name, "family": str(family), "icon": icon, "background": background}
            for family in sorted(families)
            for name, icons in FAMILIES[family].items()
            for icon in icons
            for background in BACKGROUNDS
        ]
        parts[split] = [Subject(f"object_{next(number):04d}", attributes) for attributes in looks]

    def picture(subject: Subject) -> Image.Image:
        return draw_object(subject.attributes["icon"], image_size, subject.attributes["background"])

    info = {"image_size": image_size, "num_objects": sum(map(len, FAMILIES)), "image_credits": credits()}
    return make_pool(folder, "object", parts, ObjectSampler, picture, rows_per_task, seed, **info)
