"""What is drawn with, and tables that are data: the JSON files of `mmrev_kit/assets`, and DiceBear's styles."""

import io
import json
from functools import cache
from importlib import resources
from typing import Any

from PIL import Image


@cache
def read_asset(name: str) -> Any:
    """The content of `mmrev_kit/assets/<name>.json`; read once, and not to be changed."""
    return json.loads((resources.files("mmrev_kit") / "assets" / f"{name}.json").read_text(encoding="utf-8"))


@cache
def style_definition(style: str) -> dict:
    """A DiceBear style's own file; its `meta` says who drew it and under which licence."""
    return json.loads((resources.files("dicebear_styles") / f"{style}.json").read_text(encoding="utf-8"))


@cache
def _style(style: str):
    import dicebear

    return dicebear.Style(style_definition(style))


def draw(style: str, options: dict, size: int, background: str | None = None) -> Image.Image:
    """A picture of a DiceBear style, `size` pixels a side, RGB; equal arguments give equal pixels."""
    import dicebear
    import resvg_py

    svg = str(dicebear.Avatar(_style(style), options | {"size": size}))
    png = resvg_py.svg_to_bytes(svg_string=svg, background=background, width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return image.convert("RGB")
