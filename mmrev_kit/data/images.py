"""Images: where those named in a data file lie, and decoding that never returns part of a picture."""

import hashlib
import os
import re
import stat
import struct
import unicodedata
import zlib
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from mmrev_kit.config.errors import Told
from mmrev_kit.config.project import experiment_dir, project_root, resolve
from mmrev_kit.config.sections import Config

# What Pillow decodes by itself. EPS, which it also knows, it hands to a program; a JPEG may hold several pictures
# (MPO), of which the first is the photograph.
FORMATS = tuple("PNG JPEG WEBP GIF BMP DIB TIFF PPM ICO PCX SGI QOI JPEG2000 AVIF TGA".split())
MAX_PIXELS = 2**26  # 8,192 x 8,192: each core that decodes one needs up to 1 GiB
# How files that are no such picture begin, and what to do about them.
WAYS_OUT = {
    rb".{4}ftyp(hei|hev|mif1|msf1)": "a HEIC picture, which is not read: export it as JPEG or PNG",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "a JPEG XL picture, which is not read: export it as JPEG or PNG",
    rb"%!PS|\xc5\xd0\xd3\xc6|%PDF": "PostScript or PDF, which only a program can draw: export it as PNG",
    rb"\s*<(\?xml|svg)": "a vector drawing (SVG), which is not read: export it as PNG",
    rb"8BPS": "a Photoshop file, which is not read: export it as PNG",
    rb"\s*<(!doctype html|html)": "a web page, not a picture: download the picture itself",
    rb"version https://git-lfs": "a pointer of Git LFS, not the picture: fetch it with git lfs pull",
}
RAW_ENDINGS = tuple(".dng .nef .nrw .cr2 .arw .sr2 .srf .pef .orf .rw2 .raw .3fr .iiq .erf .kdc .dcr .mos".split())
GREY_16_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
# What Pillow's decoders raise on damaged files (cut short, bytes flipped); they share no base class.
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, RuntimeError, TypeError, LookupError, EOFError, OverflowError, MemoryError,
    struct.error, zlib.error,
)  # fmt: skip


class ImageError(Told, ValueError):
    """An image cannot be used; the message names the path and the reason."""


def image_roots(config: Config) -> tuple[Path, ...] | None:
    """The folders of this configuration that images may lie in, see `find_image`; None: anywhere."""
    if config.data.allow_outside:
        return None
    linked = [resolve(config.data.images_dir)] if config.data.images_dir else []
    return (experiment_dir(config), *linked)


def lie_beside(folder: Path, names: Iterable[str]) -> bool:
    """Whether the images of a data file lie in its folder, as far as one of them does: then all must, and a missing one
    is not looked for in the project, where another may be called so."""
    return any(not os.path.isabs(name) and os.path.isfile(folder / name) for name in names)


def locate_image(folder: Path, name: str, beside: bool = False) -> Path | None:
    """Where an image named in a data file lies: at an absolute path, or relative to the file's folder, or else, but for
    `beside`, relative to the project; never to the folder that this process happens to run in. None: there is none."""
    places = (folder / name,) if beside else (folder / name, project_root() / name)
    return next((path for path in places if os.path.isfile(path)), None)


def find_image(folder: Path, name: str, roots: tuple[Path, ...] | None = (), beside: bool = False) -> Path:
    """The image that `locate_image` finds, as an absolute path, if it may be read.

    Where `..`, an absolute path or a link leads out of the data and the project the image is refused: data of others
    shall not bring a picture of yours into a notebook that you share.

    Args:
        folder: the data file's.
        roots: more folders in which it may lie; None: it may lie anywhere.
        beside: see `lie_beside`.

    Raises:
        ImageError: there is no such file, or it may not be read.
    """
    located = locate_image(folder, name, beside)
    if located is None:
        raise ImageError(why_missing(folder, name))
    path = located.resolve()
    allowed = (folder, project_root(), *(roots or ()))
    if roots is not None and not any(path.is_relative_to(root.resolve()) for root in allowed):
        raise ImageError(
            f"the image {name} leads out of the data, to {path}. To read it all the same set data.allow_outside=true."
        )
    return path


def why_missing(folder: Path, name: str) -> str:
    """Why `folder` has no image of that name: a sentence, which names those that are nearly called so."""
    if os.path.lexists(folder / name):
        return f"the image {name} is no regular file, or a link that leads nowhere."
    near = " and ".join(near_names(folder, name))
    return f"there is no image {name}{near and f', but {near}'}. Paths start from {folder}."


def near_names(folder: Path, name: str) -> list[str]:
    """The files of `folder` whose names differ from `name` in case, Unicode form or kind of slash only, else in the
    ending; as paths from `folder`."""

    def fold(text: str) -> str:
        return unicodedata.normalize("NFKC", text).casefold()

    wanted = Path(name.replace("\\", "/"))
    try:
        parent = (folder / wanted).parent.resolve()
        if not (parent.is_relative_to(folder.resolve()) and parent.is_dir()):
            parent = folder.resolve()
        names = sorted(os.listdir(parent))
    except (OSError, ValueError, RuntimeError):  # not to be looked at: a loop of links, a NUL in the name
        return []
    near = [other for other in names if fold(other) == fold(wanted.name)]
    near = near or [other for other in names if fold(Path(other).stem) == fold(wanted.stem)]
    return [str((parent / other).relative_to(folder.resolve())) for other in near]


@contextmanager
def whole_pictures():
    """Within it Pillow decodes no part of a picture, although another library may have told it to. Threads that decode
    share one around all of them: the first to leave its own would give the setting back before the others are done."""
    allowed, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = allowed


@whole_pictures()
def load_image(path: str | Path) -> Image.Image:
    """The whole picture at `path` as 8-bit RGB, upright as its EXIF orientation says, clear areas white.

    Raises:
        ImageError: missing, truncated, damaged or no image; none of `FORMATS`; several frames, or more than
            `MAX_PIXELS`; or a mode that has no known white.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("a directory, pipe or device, not a regular file")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.format == "TIFF" and _is_raw(path, image):
                raise ValueError(
                    "a camera's RAW file, of which only a thumbnail can be read; develop it as JPEG or PNG"
                )
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"it has {image.n_frames} frames, and which is meant is not said; save one as PNG")
            image.load()
            wide = image.mode == "I" and image.format not in ("PNG", "PPM")  # those hold 16 bits at most
            return _to_rgb(ImageOps.exif_transpose(image), wide)
    except UnidentifiedImageError:
        raise ImageError(f"{path}: {_way_out(path)}.") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path}: more than {MAX_PIXELS:,} pixels; save it smaller.") from None
    except DECODING_ERRORS as error:
        raise ImageError(f"{path}: {error or type(error).__name__}") from error


def _is_raw(path: str | Path, image: Image.Image) -> bool:
    """Whether a TIFF is a camera's RAW file: by its name, or because its first picture says that it is a reduced one
    (NewSubfileType), or has the tag of Adobe's DNG."""
    return Path(path).suffix.lower() in RAW_ENDINGS or bool(image.tag_v2.get(254, 0) & 1) or 50706 in image.tag_v2


def look_of(image: Image.Image) -> str:
    """A digest of a picture's pixels: that of two files of one picture is the same, however it was compressed."""
    return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).hexdigest()


def _way_out(path: str | Path) -> str:
    """What a file is that is none of `FORMATS`, and what to do."""
    with open(path, "rb") as file:
        head = file.read(64)
    found = (told for begins, told in WAYS_OUT.items() if re.match(begins, head, re.DOTALL | re.IGNORECASE))
    return next(found, "cannot identify a picture in it; save it as PNG or JPEG")


def _to_rgb(image: Image.Image, wide: bool) -> Image.Image:
    if image.mode in GREY_16_MODES:
        return _grey_16_to_rgb(image, wide)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known white; save it with 8 or 16 bits")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def _grey_16_to_rgb(image: Image.Image, wide: bool) -> Image.Image:
    """16-bit grey: 65,535 / 257 = 255. Pillow's own conversion clips instead: 300 and 40,000 both become 255.

    Args:
        wide: the file has 32 bits a pixel.
    """
    import numpy

    values = numpy.asarray(image).astype(numpy.int64)
    if values.min() < 0 or values.max() > 65_535 or wide:
        raise ValueError("32-bit pixels have no known white; save it with 8 or 16 bits")
    if values.max() < 4096:
        raise ValueError(
            f"16-bit grey that is nowhere brighter than {values.max():,} of 65,535, as where a camera writes 8 or 12 "
            "bits into 16: it would be black; rescale it, or save it with 8 bits"
        )
    grey = numpy.rint(values / 257).astype(numpy.uint8)
    clear = image.info.get("transparency")
    if clear is not None:
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")
