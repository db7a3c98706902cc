"""The object pool: names that are right, wrongs that are wrong, and things that one split alone has seen."""

import json

import pytest

from mmrev_kit.data.images import load_image
from mmrev_kit.data.objects import FAMILIES, credits, make_object_pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make_object_pool(tmp_path_factory.mktemp("pool") / "objects", 24, 0, (240, 40))


def read(pool, name):
    return [json.loads(line) for line in (pool / f"{name}.jsonl").read_text().splitlines()]


def things(pool):
    return {record["image_path"]: record for record in json.loads((pool / "objects.json").read_text())}


def test_a_name_stands_in_one_family_only_and_an_icon_once():
    names = [name for family in FAMILIES for name in family]
    icons = [icon for family in FAMILIES for group in family.values() for icon in group]
    assert len(names) == len(set(names)) > 90 and len(icons) == len(set(icons))


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_said_to_be_wrong_is_of_another_family(pool, split):
    known = things(pool)
    family_of = {name: number for number, family in enumerate(FAMILIES) for name in family}
    for row in read(pool, f"cw_{split}"):
        shown = known[row["image_path"]]["attributes"]
        if row["label"] == "Correct":
            assert row["description"] == shown["name"]
        else:
            assert family_of[row["description"]] != int(shown["family"])
    for row in read(pool, f"mcq_i2d_{split}"):
        shown = known[row["image_path"]]["attributes"]
        families = [family_of[choice] for choice in row["choices"]]
        assert row["choices"][row["correct_index"]] == shown["name"] and len(set(families)) == 4
    for row in read(pool, f"mcq_d2i_{split}"):
        shown = [known[path]["attributes"] for path in row["image_choices"]]
        assert shown[row["correct_index"]]["name"] == row["description"]
        assert len({attributes["family"] for attributes in shown}) == 4


def test_splits_share_no_family_and_answers_are_balanced(pool):
    families = {split: {t["attributes"]["family"] for t in things(pool).values() if t["split"] == split} for split in ("train", "val")}  # fmt: skip  # noqa: E501
    assert not families["train"] & families["val"] and len(families["val"]) >= 8
    for split, count in (("train", 240), ("val", 40)):
        assert sum(row["label"] == "Correct" for row in read(pool, f"cw_{split}")) == count / 2
        for task in ("mcq_i2d", "mcq_d2i"):
            letters = [row["correct_index"] for row in read(pool, f"{task}_{split}")]
            assert [letters.count(place) for place in range(4)] == [count / 4] * 4


def test_pictures_show_something_and_the_licence_is_noted(pool):
    for record in list(things(pool).values())[::37]:
        assert len(load_image(pool / record["image_path"]).getcolors(maxcolors=10_000)) > 2
    noted = json.loads((pool / "pool_info.json").read_text())["image_credits"]
    assert noted == credits() and noted["license"] == "MIT" and "Bootstrap" in noted["creator"]


def test_equal_seeds_give_equal_bytes_and_an_existing_folder_is_left_alone(pool, tmp_path):
    make_object_pool(tmp_path / "again", 24, 0, (240, 40))
    for path in pool.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(pool)).read_bytes()
    with pytest.raises(FileExistsError):
        make_object_pool(pool, 24, 0)
