"""The object retention pool: everyday things, drawn as icons, with their names for descriptions."""

from __future__ import annotations

import io
import json
import random
from functools import lru_cache
from importlib import resources
from pathlib import Path

from PIL import Image

from mmrev_kit.config.seeds import rng_for
from mmrev_kit.data.pools import MIN_SUBJECTS, Subject, pool_rows, write_pool
from mmrev_kit.files import fresh_folder

STYLE = "icons"
# Families of things that could be taken for one another: {description: icons}. A wrong text or picture always comes
# from another family, so that it is wrong beyond doubt.
FAMILIES: tuple[dict[str, tuple[str, ...]], ...] = (
    {"a clock": ("clock",), "an alarm clock": ("alarm",), "a stopwatch": ("stopwatch",),
     "a watch": ("watch", "smartwatch")},
    {"a box": ("box", "boxSeam"), "boxes": ("boxes",), "an archive box": ("archive",), "a gift": ("gift",)},
    {"a bag": ("bag",), "a handbag": ("handbag",), "a briefcase": ("briefcase",)},
    {"a basket": ("basket", "basket2", "basket3"), "a shopping cart": ("cart2",),
     "a minecart": ("minecart", "minecartLoaded")},
    {"a bank": ("bank",), "a building": ("building",), "a house": ("house", "houseDoor"),
     "a shop": ("shop", "shopWindow")},
    {"a door": ("doorClosed", "doorOpen")},
    {"a bell": ("bell",)},
    {"a bicycle": ("bicycle",)},
    {"binoculars": ("binoculars",), "eyeglasses": ("eyeglasses",)},
    {"a book": ("book",), "a newspaper": ("newspaper",)},
    {"a boombox": ("boombox",), "a speaker": ("speaker",)},
    {"a brick wall": ("bricks",)},
    {"a brush": ("brush",), "a pen": ("pen",), "a pencil": ("pencil",)},
    {"a palette": ("palette",)},
    {"a bucket": ("bucket",), "a paint bucket": ("paintBucket",), "a rubbish bin": ("trash", "trash2")},
    {"a bug": ("bug",)},
    {"a calculator": ("calculator",), "a phone": ("phone",), "a tablet": ("tablet",), "an SD card": ("sdCard",)},
    {"a camera": ("camera",), "a film camera": ("cameraReels",), "a projector": ("projector",),
     "a webcam": ("webcam",)},
    {"a cloud": ("cloud", "clouds"), "a rain cloud": ("cloudDrizzle",), "a snow cloud": ("cloudSnow",)},
    {"a moon": ("moon", "moonStars"), "a sun": ("sun", "brightnessHigh"), "a snowflake": ("snow", "snow2", "snow3")},
    {"a flower": ("flower1", "flower2", "flower3"), "a tree": ("tree",), "a star": ("star",)},
    {"a compass": ("compass",), "a globe": ("globe", "globe2")},
    {"a game controller": ("controller", "dpad")},
    {"a cup": ("cup",), "a drink with a straw": ("cupStraw",)},
    {"a die": ("dice5",)},
    {"a disc": ("disc",), "a coin": ("coin",), "an egg": ("egg",), "a fried egg": ("eggFried",)},
    {"a screen": ("display",), "a laptop": ("laptop",), "an easel": ("easel",)},
    {"a drop": ("droplet",), "a flash of lightning": ("lightning", "lightningCharge"), "a heart": ("heart",)},
    {"a smiley": ("emojiSmile", "emojiLaughing", "emojiWink", "emojiHeartEyes", "emojiSunglasses")},
    {"an envelope": ("envelope",), "a mailbox": ("mailbox",)},
    {"a flag": ("flag",), "a signpost": ("signpost", "signpost2", "signpostSplit")},
    {"a gem": ("gem",)},
    {"a thumb up": ("handThumbsUp",)},
    {"an hourglass": ("hourglass", "hourglassSplit")},
    {"a key": ("key",)},
    {"a lock": ("lock",)},
    {"a keyboard": ("keyboard",)},
    {"a ladder": ("ladder",)},
    {"a lamp": ("lamp",), "a light bulb": ("lightbulb",)},
    {"a map": ("map",)},
    {"a megaphone": ("megaphone",)},
    {"a mouse": ("mouse", "mouse2")},
    {"a graduate's cap": ("mortarboard",)},
    {"a paper clip": ("paperclip",)},
    {"a piggy bank": ("piggyBank",)},
    {"a plug": ("plug",)},
    {"a printer": ("printer",), "a router": ("router",)},
    {"a puzzle piece": ("puzzle",)},
    {"scissors": ("scissors",)},
    {"traffic lights": ("stoplights",)},
    {"a thermometer": ("thermometer",)},
    {"a tornado": ("tornado",), "a wave": ("tsunami",)},
    {"a trophy": ("trophy",), "a medal": ("award",)},
    {"a truck": ("truck", "truckFlatbed")},
    {"an umbrella": ("umbrella",)},
    {"a wallet": ("wallet", "wallet2")},
    {"a sticking plaster": ("bandaid",)},
    {"a magnifying glass": ("search",)},
    {"a pin": ("pinAngle",)},
)  # fmt: skip
BACKGROUNDS = ("#ffffff", "#fdecc8", "#dcecfb", "#def3de", "#f6dfe8", "#e8e3f6")


@lru_cache(maxsize=1)
def _style():
    import dicebear

    text = (resources.files("dicebear_styles") / f"{STYLE}.json").read_text(encoding="utf-8")
    return dicebear.Style(json.loads(text))


def credits() -> dict[str, str]:
    """Licence and makers of the icons, as the style's own file says."""
    text = (resources.files("dicebear_styles") / f"{STYLE}.json").read_text(encoding="utf-8")
    meta = json.loads(text)["meta"]
    return {
        "style": f"DiceBear {STYLE}",
        "creator": meta["creator"]["name"],
        "source": meta["source"]["url"],
        "license": meta["license"]["name"],
        "license_url": meta["license"]["url"],
        "license_text": meta["license"]["text"],
    }


def draw_object(icon: str, size: int, background: str = BACKGROUNDS[0]) -> Image.Image:
    """One icon, black on a light ground, `size` pixels a side."""
    import dicebear
    import resvg_py

    options = {"iconVariant": [icon], "iconColor": ["#000000"], "backgroundColor": [background], "size": size}
    svg = str(dicebear.Avatar(_style(), options | {"scale": 1.25, "seed": icon}))
    data = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    return Image.open(io.BytesIO(bytes(data))).convert("RGB")


class ObjectSampler:
    """Names of things; what is wrong comes from another family. Attributes: name, family, icon, background."""

    def __init__(self, subjects: list[Subject]):
        self.subjects = subjects

    def _strangers(self, subject: Subject, rng: random.Random, count: int) -> list[Subject]:
        """Subjects of `count` other families, each from a family of its own."""
        others = [s for s in self.subjects if s.attributes["family"] != subject.attributes["family"]]
        families = rng.sample(sorted({s.attributes["family"] for s in others}), count)
        return [rng.choice([s for s in others if s.attributes["family"] == family]) for family in families]

    def statement(self, rng: random.Random, subject: Subject, truth: bool) -> str:
        """The subject's name, or one of another family."""
        return (subject if truth else self._strangers(subject, rng, 1)[0]).attributes["name"]

    def texts(self, rng: random.Random, subject: Subject) -> list[str]:
        """The subject's name and three of other families."""
        return [found.attributes["name"] for found in (subject, *self._strangers(subject, rng, 3))]

    def pictures(self, rng: random.Random, subject: Subject) -> tuple[str, list[Subject]]:
        """The subject's name, the subject, and three subjects of other families."""
        return subject.attributes["name"], [subject, *self._strangers(subject, rng, 3)]


def split_families(rng: random.Random) -> dict[str, list[int]]:
    """{"train": ..., "val": ...}: families, and with them all pictures of a thing, are in one split only."""
    order = rng.sample(range(len(FAMILIES)), len(FAMILIES))
    held_out = max(MIN_SUBJECTS, len(FAMILIES) // 10)
    return {"train": order[held_out:], "val": order[:held_out]}


def make_object_pool(
    folder: str | Path, image_size: int, seed: int, rows_per_task: tuple[int, int] = (1200, 60)
) -> Path:
    """Make the object pool: the same files as a face pool's, with objects.json.

    Args:
        folder: where to make it.
        image_size: pixels on a side.
        seed: the pool's seed.
        rows_per_task: rows of each task in train and in val, even numbers.

    Raises:
        FileExistsError: the folder exists; it is not touched.
        ValueError: rows that cannot be made of so few things.
    """
    parts, number = {}, 0
    for split, families in split_families(rng_for(seed, "pool", "families")).items():
        parts[split] = []
        for family in sorted(families):
            for name, icons in FAMILIES[family].items():
                for icon in icons:
                    for background in BACKGROUNDS:
                        known = {"name": name, "family": str(family), "icon": icon, "background": background}
                        path = f"images/object_{number:04d}.png"
                        parts[split].append(Subject(f"object_{number:04d}", path, known))
                        number += 1
    rows = {
        split: pool_rows(part, ObjectSampler(part), count, seed, split)
        for (split, part), count in zip(parts.items(), rows_per_task, strict=True)
    }
    with fresh_folder(folder) as building:
        write_pool(
            building,
            parts,
            rows,
            lambda subject: draw_object(subject.attributes["icon"], image_size, subject.attributes["background"]),
            kind="object",
            seed=seed,
            image_size=image_size,
            num_objects=sum(len(family) for family in FAMILIES),
            image_credits=credits(),
        )
    return Path(folder)
