"""The shapes set: what is said is what is drawn."""

import re

import pytest
from PIL import ImageColor

from mmrev_kit.config.sections import DataConfig
from mmrev_kit.data.checks import check_statements
from mmrev_kit.data.images import load_image
from mmrev_kit.data.run_data import read_experiment
from mmrev_kit.data.shapes import COLORS, make_shapes

TEXT = re.compile(r"a (\w+) (\w+) (to the left of|to the right of|above|below) a (\w+) (\w+)")


@pytest.fixture(scope="module", params=[0, 1])
def rows(request, tmp_path_factory):
    found, faults = read_experiment(
        make_shapes(tmp_path_factory.mktemp("s") / "shapes", DataConfig(image_size=64), request.param)
    )
    assert not faults
    return found


def places(path) -> dict[str, tuple[float, float, float]]:
    """color -> (mean x, mean y, share of its bounding box that it fills), read from the pixels."""
    image = load_image(path)
    found = {}
    for name, code in COLORS.items():
        points = [(x, y) for x in range(64) for y in range(64) if image.getpixel((x, y)) == ImageColor.getrgb(code)]
        if points:
            xs, ys = zip(*points, strict=True)
            box = (max(xs) - min(xs) + 1) * (max(ys) - min(ys) + 1)
            found[name] = sum(xs) / len(xs), sum(ys) / len(ys), len(points) / box
    return found


def true_of(text: str, path) -> bool:
    """Whether a description is true of a picture, judged from its pixels alone."""
    color, shape, relation, other, other_shape = TEXT.fullmatch(text).groups()
    seen = places(path)
    if set(seen) != {color, other}:
        return False
    (x, y, fill), (other_x, other_y, other_fill) = seen[color], seen[other]
    forms = {"square": (0.95, 1.01), "circle": (0.7, 0.9), "triangle": (0.4, 0.65)}
    drawn = forms[shape][0] < fill < forms[shape][1] and forms[other_shape][0] < other_fill < forms[other_shape][1]
    stands = {"to the left of": x < other_x - 5, "to the right of": x > other_x + 5,
              "above": y < other_y - 5, "below": y > other_y + 5}[relation]  # fmt: skip
    return drawn and stands


def test_every_claim_holds_in_the_pixels(rows):
    assert {name: len(part) for name, part in rows.items()} == {
        "forward_test": 12, "reverse_test": 24, "cw_image_test": 24, "mcq_i2d_test": 12, "mcq_d2i_test": 12,
    }  # fmt: skip
    assert all(true_of(row.answer, row.images[0]) for row in rows["forward_test"])
    for row in rows["reverse_test"] + rows["cw_image_test"]:
        assert true_of(row.description, row.images[0]) == (row.answer == "Correct")
    for row in rows["mcq_i2d_test"]:
        assert [true_of(text, row.images[0]) for text in row.choices] == [letter == row.answer for letter in "ABCD"]
    for row in rows["mcq_d2i_test"]:
        assert [true_of(row.description, path) for path in row.images] == [letter == row.answer for letter in "ABCD"]
    assert not check_statements([row for part in rows.values() for row in part])


def test_answers_are_balanced(rows):
    for name in ("mcq_i2d_test", "mcq_d2i_test"):
        letters = [row.answer for row in rows[name]]
        assert [letters.count(letter) for letter in "ABCD"] == [3] * 4
    assert sum(row.answer == "Correct" for row in rows["reverse_test"]) == 12
