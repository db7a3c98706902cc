"""Images: where those named in a data file lie, and decoding that never returns part of a picture."""

import os
import struct
import zlib
from pathlib import Path

from PIL import Image, ImageFile, ImageOps

from mmrev_kit.config.project import experiment_dir, project_root, resolve
from mmrev_kit.config.sections import Config
from mmrev_kit.errors import Told

GREY_16_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
# What Pillow's decoders raise on damaged files (cut short, bytes flipped); they share no base class.
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, RuntimeError, TypeError, LookupError, EOFError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class ImageError(Told, ValueError):
    """An image cannot be used; the message names the path and the reason."""


def image_roots(config: Config) -> tuple[Path, ...] | None:
    """The folders of this configuration that images may lie in, see `find_image`; None: anywhere."""
    if config.data.allow_outside:
        return None
    linked = [resolve(config.data.images_dir)] if config.data.images_dir else []
    return (experiment_dir(config), *linked)


def locate_image(folder: Path, name: str) -> Path | None:
    """Where an image named in a data file lies: at an absolute path, or relative to the file's folder, or else relative
    to the project; never relative to the folder that this process happens to run in. None: there is none."""
    return next((path for path in (folder / name, project_root() / name) if os.path.isfile(path)), None)


def find_image(folder: Path, name: str, roots: tuple[Path, ...] | None = ()) -> Path:
    """The image that `locate_image` finds, as an absolute path, if it may be read.

    Where `..`, an absolute path or a link leads out of the data and the project the image is refused: data of others
    shall not bring a picture of yours into a notebook that you share.

    Args:
        folder: the data file's.
        roots: more folders in which it may lie; None: it may lie anywhere.

    Raises:
        ImageError: there is no such file, or it may not be read.
    """
    located = locate_image(folder, name)
    if located is None:
        raise ImageError(f"there is no image {name}. Paths start from {folder}.")
    path = located.resolve()
    allowed = (folder, project_root(), *(roots or ()))
    if roots is not None and not any(path.is_relative_to(root.resolve()) for root in allowed):
        raise ImageError(
            f"the image {name} leads out of the data, to {path}. To read it all the same set data.allow_outside=true."
        )
    return path


def load_image(path: str | Path) -> Image.Image:
    """The whole picture at `path` as 8-bit RGB, upright as its EXIF orientation says, clear areas white.

    Raises:
        ImageError: missing, truncated, damaged or no image, or a mode that has no known white.
    """
    allowed = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # another library may have set it, and half a picture would pass
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except DECODING_ERRORS as error:
        raise ImageError(f"{path}: {error or type(error).__name__}") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = allowed


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in GREY_16_MODES:
        return _grey_16_to_rgb(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known white; save it with 8 or 16 bits")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def _grey_16_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit grey: 65,535 / 257 = 255. Pillow's own conversion clips instead: 300 and 40,000 both become 255."""
    import numpy

    values = numpy.asarray(image).astype(numpy.int64)
    if values.min() < 0 or values.max() > 65_535:
        raise ValueError("32-bit pixels have no known white; save it with 8 or 16 bits")
    grey = numpy.rint(values / 257).astype(numpy.uint8)
    clear = image.info.get("transparency")
    if clear is not None:
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")
