"""Decoding, and drawn faces: every attribute can be seen, be said, and be told from its other values."""

import itertools
import json
import os
import random
import struct
import zlib
from importlib import resources

import numpy
import pytest
from PIL import Image, ImageFile, TiffImagePlugin

from mmrev_kit.data import faces
from mmrev_kit.data.faces import (
    DRAWN,
    SHARES,
    VALUES,
    _look,
    credits,
    describe,
    draw_face,
    phrases,
    sample_faces,
    share_of,
)
from mmrev_kit.data.images import ImageError, find_image, load_image

FACE = {
    "hair_color": "ginger", "hair_cut": "bun", "back_hair": "long wavy", "beard": "none", "skin": "tan",
    "clothes_color": "orange", "clothes": "T-shirt",
}  # fmt: skip
ORIENTATION = 0x0112


def two_pixels(mode, first, second, **info):
    """A 2 x 1 image; the PNG options in `info` are returned with it."""
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), first)
    image.putpixel((1, 0), second)
    return image, info


def palette(*colours, **info):
    image, info = two_pixels("P", 0, 1, **info)
    image.putpalette([value for colour in colours for value in colour])
    return image, info


def grey_16(*values):
    return Image.fromarray(numpy.array([values], numpy.uint16)), {}


WHITE, BLACK = (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (two_pixels("RGB", (1, 2, 3), (4, 5, 6)), [(1, 2, 3), (4, 5, 6)]),
        (two_pixels("RGB", (1, 2, 3), (4, 5, 6), transparency=(1, 2, 3)), [WHITE, (4, 5, 6)]),
        (two_pixels("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), [WHITE, BLACK]),
        (two_pixels("RGBA", (9, 9, 9, 0), (0, 0, 0, 51)), [WHITE, (204, 204, 204)]),  # 255 * (1 - 51/255)
        (two_pixels("LA", (0, 0), (7, 255)), [WHITE, (7, 7, 7)]),
        (two_pixels("L", 7, 200), [(7, 7, 7), (200, 200, 200)]),
        (two_pixels("L", 7, 200, transparency=7), [WHITE, (200, 200, 200)]),
        (two_pixels("1", 0, 1), [BLACK, WHITE]),
        (two_pixels("1", 0, 1, transparency=0), [WHITE, WHITE]),
        (palette((10, 20, 30), (40, 50, 60)), [(10, 20, 30), (40, 50, 60)]),
        (palette((10, 20, 30), (40, 50, 60), transparency=0), [WHITE, (40, 50, 60)]),
        (palette((0, 0, 0), (40, 50, 60), transparency=b"\x33\xff"), [(204, 204, 204), (40, 50, 60)]),
        (grey_16(300, 40_000), [(1, 1, 1), (156, 156, 156)]),  # 300/257 = 1.2, 40,000/257 = 155.6
        (grey_16(0, 65_535), [BLACK, WHITE]),
    ],
)
def test_every_png_mode_loads_as_rgb_with_white_for_clear(tmp_path, made, expected):
    image, info = made
    image.save(tmp_path / "a.png", **info)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.mode == "RGB"
    assert [loaded.getpixel((0, 0)), loaded.getpixel((1, 0))] == expected


def test_other_formats_and_modes(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert numpy.abs(numpy.array(load_image(tmp_path / "cmyk.jpg")).astype(int) - (255, 0, 0)).max() <= 2
    Image.new("CMYK", (1, 1), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert load_image(tmp_path / "cmyk.tif").getpixel((0, 0)) == (255, 0, 0)
    Image.fromarray(numpy.array([[300, 40_000]], numpy.uint16)).save(tmp_path / "i.tif")
    assert [load_image(tmp_path / "i.tif").getpixel((x, 0))[0] for x in (0, 1)] == [1, 156]
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + bytes([0x01, 0x2C, 0x9C, 0x40]))  # 300 and 40,000
    assert [load_image(tmp_path / "a.pgm").getpixel((x, 0))[0] for x in (0, 1)] == [1, 156]


@pytest.mark.parametrize(
    "values",
    [
        numpy.array([[0.0, 1.0]], numpy.float32),
        numpy.array([[0, 70_000]], numpy.int32),
        numpy.array([[0, 255]], numpy.int32),
    ],
)
def test_a_mode_without_a_known_white_is_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="no known white"):
        load_image(tmp_path / "a.tif")


@pytest.mark.parametrize(("most", "read"), [(255, False), (4095, False), (4096, True)])
def test_8_or_12_bits_written_into_16_are_refused_rather_than_black(tmp_path, most, read):
    image, _ = grey_16(0, most)
    for name in ("a.png", "a.tif"):
        image.save(tmp_path / name)
        if read:
            assert load_image(tmp_path / name).getpixel((1, 0)) == (16, 16, 16)  # 4096 / 257 = 15.9
        else:
            with pytest.raises(ImageError, match=f"nowhere brighter than {most:,} of 65,535"):
                load_image(tmp_path / name)


def test_a_cameras_raw_file_is_named_and_its_thumbnail_not_taken_for_the_picture(tmp_path):
    """Pillow reads the first picture of the TIFF that such a file is. Tag 254 is NewSubfileType (1: a reduced picture),
    50706 DNGVersion."""
    image = draw_face(FACE, 64)
    image.save(tmp_path / "plain.tif")
    assert load_image(tmp_path / "plain.tif").size == (64, 64)
    image.save(tmp_path / "reduced.tif", tiffinfo={254: 1})
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[50706], tags[50706] = 1, bytes([1, 4, 0, 0])
    image.save(tmp_path / "dng.tif", tiffinfo=tags)
    for name in ("a.NEF", "a.cr2", "a.arw"):
        image.save(tmp_path / name, "TIFF")
    for name in ("reduced.tif", "dng.tif", "a.NEF", "a.cr2", "a.arw"):
        with pytest.raises(ImageError, match=rf"{name}: a camera's RAW file, .* develop it as JPEG or PNG"):
            load_image(tmp_path / name)


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned a quarter clockwise: the left pixel comes on top
    for name, (image, info) in {"rgb": two_pixels("RGB", (255, 0, 0), (0, 0, 255)), "grey": grey_16(0, 65_535)}.items():
        image.save(tmp_path / f"{name}.png", exif=exif, **info)
    loaded = load_image(tmp_path / "rgb.png")
    assert loaded.size == (1, 2)
    assert [loaded.getpixel((0, y)) for y in (0, 1)] == [(255, 0, 0), (0, 0, 255)]
    assert [load_image(tmp_path / "grey.png").getpixel((0, y)) for y in (0, 1)] == [BLACK, WHITE]
    image, info = palette((1, 1, 1), (40, 50, 60), transparency=0)
    image.save(tmp_path / "p.png", exif=exif, **info)
    assert [load_image(tmp_path / "p.png").getpixel((0, y)) for y in (0, 1)] == [WHITE, (40, 50, 60)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("lenient", [False, True])
def test_half_a_file_is_never_half_a_picture(tmp_path, monkeypatch, kind, lenient):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    path = tmp_path / "half"
    draw_face(FACE, 64).save(path, kind)
    assert load_image(path).size == (64, 64)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=str(path)):
        load_image(path)
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES


def test_missing_empty_and_other_files_are_named_with_a_reason(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    for name, reason in (("absent.png", "No such file"), ("text.png", "identify"), ("empty.png", "identify")):
        with pytest.raises(ImageError, match=f"{name}.*{reason}"):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match="directory"):
        load_image(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC picture, which is not read: export it as JPEG or PNG"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
        (b"%PDF-1.7\n", "only a program can draw"),
        (b'<?xml version="1.0"?><svg/>', "a vector drawing"),
        (b"\n<!DOCTYPE html><html>", "a web page, not a picture"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "fetch it with git lfs pull"),
    ],
)
def test_what_is_no_picture_is_named_with_the_way_out(tmp_path, content, told):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match=f"{tmp_path}/a.png: .*{told}"):
        load_image(tmp_path / "a.png")


def test_a_picture_starts_no_program(tmp_path, monkeypatch):
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho 10 > {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", "EPS")
    with pytest.raises(ImageError, match=r"a\.png: PostScript or PDF, which only a program can draw"):
        load_image(tmp_path / "a.png")
    assert not started.exists()


def test_pipes_loops_and_names_that_cannot_be_are_refused_and_nothing_hangs(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name, told in (("pipe.png", "not a regular file"), ("loop.png", "symbolic links"), ("a\0.png", "null byte")):
        with pytest.raises(ImageError, match=told):
            load_image(tmp_path / name)
        with pytest.raises(ImageError, match=r"no regular file|there is no image a"):
            find_image(tmp_path, name)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [13_000, 14_000])  # Pillow warns of the first and refuses the second
def test_a_picture_of_many_pixels_is_refused_before_it_is_decoded(tmp_path, side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT")
    with pytest.raises(ImageError, match=r"a\.png: more than 67,108,864 pixels; save it smaller"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_a_fault_and_one_is_none(tmp_path, kind):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(tmp_path / "one", kind)
    assert load_image(tmp_path / "one").size == (8, 8)
    first.save(tmp_path / "two", kind, save_all=True, append_images=[second])
    with pytest.raises(ImageError, match="two: it has 2 frames"):
        load_image(tmp_path / "two")


def test_the_photograph_of_a_phone_that_adds_a_second_picture_is_read(tmp_path):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second], quality=100)
    assert load_image(tmp_path / "a.jpg").getpixel((4, 4)) == pytest.approx((254, 0, 0), abs=2)


def seen(face, size=64, variant=0):
    return numpy.asarray(draw_face(face, size, variant)).astype(int)


@pytest.mark.parametrize("attribute", list(VALUES))
def test_each_value_of_an_attribute_changes_the_picture(attribute):
    """On several faces, the ones with the least contrast among them; 16 pixels of 64 x 64 are a thin moustache."""
    dim = FACE | {"hair_color": "brown", "skin": "dark", "clothes_color": "black", "beard": "long", "clothes": "jacket"}
    for face in (FACE, dim, FACE | {"hair_color": "black", "skin": "dark", "hair_cut": "undercut"}):
        pictures = {value: seen(face | {attribute: value}) for value in VALUES[attribute]}
        for a, b in itertools.combinations(pictures, 2):
            changed = (numpy.abs(pictures[a] - pictures[b]).max(axis=2) > 24).sum()
            assert changed >= 16, (attribute, a, b, changed)


@pytest.mark.parametrize("attribute", ["hair_color", "skin", "clothes_color"])
def test_the_colours_of_an_attribute_are_far_apart(attribute):
    colours = [numpy.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in DRAWN[attribute].values()]
    assert min(numpy.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)) > 60


def test_a_face_is_drawn_the_same_each_time_at_the_size_asked_for():
    for size in (16, 64, 100):
        assert draw_face(FACE, size).size == (size, size)
        assert draw_face(FACE, size).mode == "RGB"
    assert (seen(FACE) == seen(dict(reversed(FACE.items())))).all()


def test_variants_change_expression_and_background_only():
    pictures = [seen(FACE, variant=variant) for variant in range(12)]
    assert all((a != b).any() for a, b in itertools.combinations(pictures, 2))
    assert tuple(pictures[0][0, 0]) == WHITE
    assert all(tuple(picture[0, 0]) != WHITE for picture in pictures[1:])
    hair_and_clothes = [picture[y, 32] for picture in pictures for y in (8, 62)]
    assert all((pixel == hair_and_clothes[i % 2]).all() for i, pixel in enumerate(hair_and_clothes))
    assert len({_look(variant) for variant in range(869)}) == 869
    for variant in (-1, 869):
        with pytest.raises(ValueError, match="0 to 868"):
            draw_face(FACE, 16, variant)


def test_wrong_attributes_are_errors():
    with pytest.raises(ValueError, match="hair_color = 'green'"):
        draw_face(FACE | {"hair_color": "green"}, 16)
    with pytest.raises(ValueError, match="'hat' is no attribute"):
        draw_face(FACE | {"hat": "red"}, 16)
    with pytest.raises(ValueError, match="skin = None"):
        draw_face({name: value for name, value in FACE.items() if name != "skin"}, 16)


def difference(a, b):
    return sum(a[name] != b[name] for name in VALUES)


@pytest.mark.parametrize(("count", "share", "least"), [(224, "experiment", 2), (60, "experiment", 3), (300, "pool", 1)])
def test_sampled_faces_differ_as_much_as_asked(count, share, least):
    faces = sample_faces(random.Random(5), count, share, least)
    assert len(faces) == count
    assert min(difference(a, b) for a, b in itertools.combinations(faces, 2)) >= least
    assert {share_of(face) for face in faces} == {share}
    assert faces == sample_faces(random.Random(5), count, share, least)
    assert faces != sample_faces(random.Random(6), count, share, least)


def test_no_face_is_in_two_shares():
    drawn = {
        share: {tuple(face.values()) for seed in range(3) for face in sample_faces(random.Random(seed), 2000, share, 1)}
        for share in SHARES
    }
    assert all(not drawn[a] & drawn[b] for a, b in itertools.combinations(drawn, 2))
    assert sum(SHARES.values()) == 100
    # Pinned: a face that moved to another share could meet a model that was pretrained on it.
    assert share_of(FACE) == share_of(dict(reversed(FACE.items()))) == "held_out"
    assert share_of(FACE | {"hair_color": "black"}) == "pretrain"


def test_asking_for_too_many_or_from_nowhere_is_an_error(monkeypatch):
    monkeypatch.setattr(faces, "PATIENCE", 300)
    with pytest.raises(ValueError, match="Ask for fewer"):
        sample_faces(random.Random(0), 100_000, "experiment", 5)
    with pytest.raises(ValueError, match="experiment, pool, held_out, pretrain"):
        sample_faces(random.Random(0), 1, "test")


def test_a_person_in_words():
    assert phrases(FACE) == {
        "hair_color": "ginger hair",
        "hair_cut": "hair in a bun",
        "back_hair": "long wavy hair at the back",
        "beard": "no facial hair",
        "skin": "tan skin",
        "clothes_color": "orange clothes",
        "clothes": "a T-shirt",
    }
    assert describe(FACE, ["hair_color"]) == "a person with ginger hair"
    assert describe(FACE, ["clothes", "hair_cut", "hair_color"]) == "a person with ginger hair in a bun, a T-shirt"
    assert describe(FACE, ["clothes", "clothes_color"]) == "a person with an orange T-shirt"
    assert describe(FACE, VALUES) == (
        "a person with ginger hair in a bun, long wavy hair at the back, no facial hair, tan skin, an orange T-shirt"
    )
    with pytest.raises(ValueError, match="at least one"):
        describe(FACE, [])
    with pytest.raises(ValueError, match="'hat' is no attribute"):
        describe(FACE, ["hat"])


def test_every_value_has_a_phrase_of_its_own():
    said = [phrases({name: value})[name] for name, values in VALUES.items() for value in values]
    assert len(set(said)) == len(said) == 5 + 4 + 4 + 4 + 4 + 10 + 5
    assert all(said)


def test_credits_come_from_the_style():
    found = credits()
    assert (found["style"], found["artist"], found["license"]) == ("ToonHead", "Johan Melin", "CC BY 4.0")
    definition = json.loads((resources.files("dicebear_styles") / "toon-head.json").read_text(encoding="utf-8"))
    assert found["source"] == definition["meta"]["source"]["url"]
    assert found["license_url"].startswith("https://creativecommons.org/licenses/by/4.0")
