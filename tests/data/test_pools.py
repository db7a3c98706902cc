"""The face pool: no false Wrong, nothing to be guessed from the options alone, train and val apart."""

import itertools
import json
import random
import subprocess
import sys
from collections import Counter

import pytest
from PIL import Image

from mmrev_kit.data import pools
from mmrev_kit.data.faces import VALUES, describe, phrases, share_of
from mmrev_kit.data.images import load_image
from mmrev_kit.data.pools import FaceSampler, Subject, is_true_of, make_face_pool, pool_rows
from mmrev_kit.data.tasks import CONNECTORS

TASKS = ("cw", "mcq_i2d", "mcq_d2i")
SPLITS = ("train", "val")


def spoken_parts():
    """Every part that a description may have -> the attributes that it names."""
    parts = {phrases({name: value})[name]: {name: value} for name in VALUES for value in VALUES[name]}
    for pair in (("hair_color", "hair_cut"), ("clothes_color", "clothes")):
        for values in itertools.product(*(VALUES[name] for name in pair)):
            named = dict(zip(pair, values, strict=True))
            parts[describe(named, pair).removeprefix("a person with ")] = named
    return parts


PARTS = spoken_parts()


def parse(text):
    """The attributes that a description names; the way back from `describe`."""
    assert text.startswith("a person with ")
    named = {}
    for part in text.removeprefix("a person with ").split(", "):
        assert not named.keys() & PARTS[part].keys()
        named |= PARTS[part]
    assert describe(named, named) == text
    return named


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """The default pool, in pictures too small to look at."""
    folder = make_face_pool(tmp_path_factory.mktemp("data") / "pool", 400, 16, 0)
    rows = {
        (task, split): [json.loads(line) for line in (folder / f"{task}_{split}.jsonl").read_text().splitlines()]
        for task in TASKS
        for split in SPLITS
    }
    faces = json.loads((folder / "faces.json").read_text())
    return folder, rows, {face["image_path"]: face for face in faces}


def test_is_true_of():
    face = {"beard": "none", "skin": "tan"}
    assert is_true_of({}, face) and is_true_of({"skin": "tan"}, face) and is_true_of(dict(face), face)
    assert not is_true_of({"skin": "tan", "beard": "long"}, face)


def test_the_files(pool):
    folder, rows, faces = pool
    assert {(key, len(part)) for key, part in rows.items()} == {
        ((task, split), count) for task in TASKS for split, count in (("train", 1200), ("val", 60))
    }
    info = json.loads((folder / "pool_info.json").read_text())
    assert (info["kind"], info["seed"], info["image_size"], info["num_faces"]) == ("face", 0, 16, 400)
    assert info["counts"] == {task: {"train": 1200, "val": 60} for task in TASKS}
    assert info["image_credits"]["license"] == "CC BY 4.0"
    assert {f"images/{path.name}" for path in (folder / "images").iterdir()} == set(faces)
    assert all(load_image(folder / path).size == (16, 16) for path in faces)


def test_no_face_is_shared_with_val_or_with_an_experiment(pool):
    _, rows, faces = pool
    assert Counter(face["split"] for face in faces.values()) == {"train": 360, "val": 40}
    assert {share_of(face["attributes"]) for face in faces.values()} == {"pool"}
    assert len({tuple(face["attributes"].values()) for face in faces.values()}) == 400
    for (_, split), part in rows.items():
        for row in part:
            for path in (row["image_path"], *row.get("image_choices", ())):
                assert faces[path]["split"] == split


def test_cw_rows_are_true_exactly_if_labelled_correct(pool):
    _, rows, faces = pool
    for split in SPLITS:
        part = rows["cw", split]
        assert Counter(row["label"] for row in part) == {"Correct": len(part) // 2, "Wrong": len(part) // 2}
        for row in part:
            face = faces[row["image_path"]]
            assert row["entity_id"] == face["id"]
            assert is_true_of(parse(row["description"]), face["attributes"]) == (row["label"] == "Correct")
            assert row["connector"] in CONNECTORS["reverse"]
        labels = Counter((row["image_path"], row["label"]) for row in part)
        assert all(labels[path, "Correct"] == labels[path, "Wrong"] for path, _ in labels)


def test_text_alone_does_not_tell_the_label(pool):
    """Lengths and named attributes of Correct and Wrong rows come out alike: 600 each, 3 standard errors or so."""
    _, rows, _ = pool
    named = {label: [] for label in ("Correct", "Wrong")}
    for row in rows["cw", "train"]:
        named[row["label"]].append(parse(row["description"]))
    mean = {label: sum(map(len, part)) / len(part) for label, part in named.items()}
    assert abs(mean["Correct"] - mean["Wrong"]) < 0.2
    for name in VALUES:
        counts = [sum(name in n for n in part) for part in named.values()]
        assert abs(counts[0] - counts[1]) < 85


def test_options_are_true_only_at_the_answer(pool):
    _, rows, faces = pool
    for split in SPLITS:
        for row in rows["mcq_i2d", split]:
            face = faces[row["image_path"]]["attributes"]
            truth = [is_true_of(parse(text), face) for text in row["choices"]]
            assert truth == [i == row["correct_index"] for i in range(4)]
            assert len(set(row["choices"])) == 4
            assert row["choices"][row["correct_index"]] == row["description"]
            assert row["connector"] in CONNECTORS["forward"]
        for row in rows["mcq_d2i", split]:
            named = parse(row["description"])
            truth = [is_true_of(named, faces[path]["attributes"]) for path in row["image_choices"]]
            assert truth == [i == row["correct_index"] for i in range(4)]
            assert len(set(row["image_choices"])) == 4
            assert row["image_choices"][row["correct_index"]] == row["image_path"]
            assert row["connector"] in CONNECTORS["reverse"]


def test_letters_are_balanced(pool):
    _, rows, _ = pool
    for task, split in itertools.product(("mcq_i2d", "mcq_d2i"), SPLITS):
        counts = Counter(row["correct_index"] for row in rows[task, split])
        assert set(counts) == {0, 1, 2, 3}
        assert max(counts.values()) - min(counts.values()) <= 1


def overlap_guess(options, rng):
    """The option that shares most with the other three; a guess that looks at nothing but the options."""
    shared = [sum(len(a.items() & b.items()) for b in options) - len(a) for a in options]
    return rng.choice([i for i, value in enumerate(shared) if value == max(shared)])


def test_the_answer_is_not_the_option_nearest_to_the_others(pool):
    """Chance is .25 and 1,200 rows have a standard error of .0125."""
    _, rows, faces = pool
    rng = random.Random(0)
    i2d, d2i = rows["mcq_i2d", "train"], rows["mcq_d2i", "train"]
    hits = sum(overlap_guess([parse(text) for text in r["choices"]], rng) == r["correct_index"] for r in i2d)
    assert 0.2 < hits / len(i2d) < 0.3
    hits = sum(
        overlap_guess([faces[path]["attributes"] for path in r["image_choices"]], rng) == r["correct_index"]
        for r in d2i
    )
    assert 0.2 < hits / len(d2i) < 0.3


def test_one_to_four_attributes_are_named_and_many_wrongs_are_near_misses(pool):
    _, rows, faces = pool
    for task in TASKS:
        sizes = Counter(len(parse(row["description"])) for row in rows[task, "train"])
        assert set(sizes) == {1, 2, 3, 4}
        assert min(sizes.values()) > 150
    near = []
    for row in rows["cw", "train"]:
        named = parse(row["description"])
        if row["label"] == "Wrong" and len(named) > 1:
            face = faces[row["image_path"]]["attributes"]
            near.append(sum(face[name] != value for name, value in named.items()) == 1)
    assert sum(near) / len(near) > 0.4
    near = []
    for row in rows["mcq_d2i", "train"]:
        named = parse(row["description"])
        if len(named) > 1:
            people = [faces[path]["attributes"] for path in row["image_choices"] if path != row["image_path"]]
            near += [sum(face[name] != value for name, value in named.items()) == 1 for face in people]
    assert sum(near) / len(near) > 0.4


def test_rows_are_all_different(pool):
    _, rows, _ = pool
    for part in rows.values():
        assert len({json.dumps(row) for row in part}) == len(part)


def test_rows_have_the_fields_of_an_experiment_and_no_group(pool):
    _, rows, _ = pool
    common = ["entity_id", "image_path", "description", "connector"]
    extra = {"cw": ["label"], "mcq_i2d": ["choices", "correct_index"], "mcq_d2i": ["image_choices", "correct_index"]}
    for (task, _), part in rows.items():
        assert all(list(row) == common + extra[task] for row in part)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_equal_seeds_give_equal_bytes_and_an_existing_folder_stays(tmp_path):
    first, again, other = (
        contents(make_face_pool(tmp_path / name, 20, 16, seed, (40, 20)))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again != other
    with pytest.raises(FileExistsError, match="left as it is"):
        make_face_pool(tmp_path / "a", 20, 16, 1, (40, 20))
    assert contents(tmp_path / "a") == first


def test_the_folder_is_whole_or_absent(tmp_path, monkeypatch):
    def draw(*_):
        raise OSError("no space left")

    monkeypatch.setattr(pools, "draw_face", draw)
    with pytest.raises(OSError, match="no space"):
        make_face_pool(tmp_path / "p", 20, 16, 0, (4, 4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("num_faces", "split"), [(4, (4, 8)), (19, (19, 8)), (40, (32, 8))])
@pytest.mark.parametrize("seed", range(4))
def test_small_pools_work(tmp_path, monkeypatch, seed, num_faces, split):
    """Of fewer than 20 people all are trained on, and others are held out: no face is in both."""
    monkeypatch.setattr(pools, "draw_face", lambda *_: Image.new("RGB", (16, 16)))
    folder = make_face_pool(tmp_path / "p", num_faces, 16, seed)
    faces = {face["image_path"]: face for face in json.loads((folder / "faces.json").read_text())}
    assert Counter(face["split"] for face in faces.values()) == dict(zip(("train", "val"), split, strict=True))
    assert json.loads((folder / "pool_info.json").read_text())["num_faces"] == num_faces
    assert len((folder / "mcq_d2i_train.jsonl").read_text().splitlines()) == 1200
    for line in (folder / "mcq_d2i_val.jsonl").read_text().splitlines():
        row = json.loads(line)
        truth = [is_true_of(parse(row["description"]), faces[p]["attributes"]) for p in row["image_choices"]]
        assert truth == [i == row["correct_index"] for i in range(4)]


def test_impossible_pools_are_errors(tmp_path):
    with pytest.raises(ValueError, match="num_faces = 3: a question shows 4 faces"):
        make_face_pool(tmp_path / "p", 3, 16, 0)
    with pytest.raises(ValueError, match="even number"):
        make_face_pool(tmp_path / "p", 20, 16, 0, (3, 2))
    face = {name: values[0] for name, values in VALUES.items()}
    same = [Subject(f"face_{i:04d}", face) for i in range(8)]
    with pytest.raises(ValueError, match="too small"):
        pool_rows(same, FaceSampler(same), 4, 0, "train")
    assert list(tmp_path.iterdir()) == []


def test_importing_needs_no_torch_and_no_drawing_library():
    heavy = ("torch", "transformers", "dicebear", "resvg_py")
    code = f"import sys, mmrev_kit.data.pools; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
