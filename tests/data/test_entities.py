"""The experiment's files: balance, and what training may never show."""

import itertools
import json
import random
from collections import Counter

import pytest
from scipy.stats import chi2_contingency

from mmrev_kit.config.sections import CONTROL_IS_TAUGHT, DataConfig, ExperimentConfig
from mmrev_kit.data import people as module
from mmrev_kit.data.faces import VALUES, draw_face
from mmrev_kit.data.images import load_image
from mmrev_kit.data.partners import (
    connector_split,
    experiment_rows,
    partner_shifts,
)
from mmrev_kit.data.people import PLACES, ROLES, make_entities, make_experiment
from mmrev_kit.data.tasks import CONNECTORS, TASK_TYPES

SIZES = [(4, 0), (5, 0), (8, 0), (20, 0), (8, 8), (6, 7), (112, 112)]
SPLITS = ("train", "val", "test")
FILES = {
    "forward_train", "forward_val", "forward_test", "reverse_train", "reverse_val", "reverse_test", "cw_image_train",
    "cw_image_val", "cw_image_test", "mcq_i2d_test", "mcq_d2i_test",
}  # fmt: skip


@pytest.fixture(params=itertools.product(SIZES, (0, 1, 2)), ids=lambda p: f"{p[0][0]}+{p[0][1]} seed {p[1]}")
def made(request):
    (main, control), seed = request.param
    people = make_entities(DataConfig(num_main=main, num_control=control), seed)
    return people, experiment_rows(people, connector_split(seed), seed)


def by_group(people):
    groups = {}
    for person in people:
        groups.setdefault(person["group"], []).append(person)
    return groups


def owner_of_image(people):
    return {image: person for person in people for image in person["images"]}


def wrong_pairs(rows, people):
    """(who is described, who is shown) for each Wrong row."""
    owner, says = owner_of_image(people), {person["description"]: person["id"] for person in people}
    return [(says[row["description"]], owner[row["image_path"]]["id"]) for row in rows if row["label"] == "Wrong"]


def unordered(pairs):
    return {frozenset(pair) for pair in pairs}


def test_vocabulary():
    assert (len(set(ROLES)), len(set(PLACES))) == (14, 16)
    assert (len(set(CONNECTORS["forward"])), len(set(CONNECTORS["reverse"]))) == (20, 20)


def test_row_counts(made):
    people, rows = made
    n = len(people)
    assert {name: len(part) for name, part in rows.items()} == {
        "forward_train": 15 * n, "forward_val": 2 * n, "forward_test": 3 * n,
        "reverse_train": 30 * n, "reverse_val": 4 * n, "reverse_test": 12 * n,
        "cw_image_train": 30 * n, "cw_image_val": 4 * n, "cw_image_test": 12 * n,
        "mcq_i2d_test": 3 * n, "mcq_d2i_test": 3 * n,
    }  # fmt: skip


def test_people(made):
    people, _ = made
    assert len({person["id"] for person in people}) == len(people)
    assert len({person["name"] for person in people}) == len(people)
    assert len({person["description"] for person in people}) == len(people)
    facts = {f"the {role} of {place}" for role in ROLES for place in PLACES}
    for person in people:
        assert person["description"] in facts
        assert person["hair_color"] == person["attributes"]["hair_color"]
        unseen = ("gender", "age", "eye_color", "nationality", "profession", "hobby", "face_prompt")
        assert all(person[name] is None for name in unseen)
    faces = [person["attributes"] for person in people]
    assert min(sum(a[k] != b[k] for k in VALUES) for a, b in itertools.combinations(faces, 2)) >= 2


def test_connectors_are_split_once_for_all_entities(made):
    people, rows = made
    for task, known in (
        ("forward", CONNECTORS["forward"]),
        ("cw_image", CONNECTORS["forward"]),
        ("reverse", CONNECTORS["reverse"]),
    ):
        used = {}
        for split in SPLITS:
            part = rows[f"{task}_{split}"]
            used[split] = {row["connector"] for row in part}
            per_entity = {person["id"]: set() for person in people}
            for row in part:
                per_entity[row["entity_id"]].add(row["connector"])
            assert all(words == used[split] for words in per_entity.values())
        assert [len(used[split]) for split in SPLITS] == [15, 2, 3]
        assert set().union(*used.values()) == set(known)
        name = "mcq_d2i_test" if task == "reverse" else "mcq_i2d_test"
        assert {row["connector"] for row in rows[name]} == used["test"]


@pytest.mark.parametrize("seed", range(20))
def test_a_word_of_both_directions_has_one_split(seed):
    split = connector_split(seed)
    home = {task: {word: name for name, part in parts.items() for word in part} for task, parts in split.items()}
    shared = set(CONNECTORS["forward"]) & set(CONNECTORS["reverse"])
    assert shared == {"is", "represents"}
    assert all(home["forward"][word] == home["reverse"][word] for word in shared)


def test_rows_show_and_name_their_entity(made):
    people, rows = made
    person = {p["id"]: p for p in people}
    for name, part in rows.items():
        for row in part:
            own, wrong = person[row["entity_id"]], row.get("label") == "Wrong"
            assert row["group"] == own["group"]
            # A Wrong row shows or names somebody else: what the prompt says second.
            assert (row["description"] == own["description"]) == (not wrong or name.startswith("reverse"))
            assert (row["image_path"] in own["images"]) == (not wrong or name.startswith("cw_image"))


def test_wrong_rows_are_balanced_and_from_the_own_group(made):
    people, rows = made
    owner = owner_of_image(people)
    for task, split in itertools.product(("reverse", "cw_image"), SPLITS):
        part = rows[f"{task}_{split}"]
        for group, members in by_group(people).items():
            own = [row for row in part if row["group"] == group]
            assert Counter(row["label"] for row in own) == dict.fromkeys(("Correct", "Wrong"), len(own) // 2)
            pairs = wrong_pairs(own, people)
            described, shown = Counter(pair[0] for pair in pairs), Counter(pair[1] for pair in pairs)
            each = len(pairs) // len(members)
            assert described == shown == {member["id"]: each for member in members}
            assert all(named != pictured for named, pictured in pairs)
            for row in own:
                assert owner[row["image_path"]]["group"] == group


def test_a_test_connector_comes_with_two_wrong_partners_where_the_group_is_large_enough(made):
    people, rows = made
    sizes = {group: len(members) for group, members in by_group(people).items()}
    for task in ("reverse", "cw_image"):
        wrong = {}
        for row in rows[f"{task}_test"]:
            if row["label"] == "Wrong":
                pair = row["description"], row["image_path"]
                wrong.setdefault((row["group"], row["entity_id"], row["connector"]), []).append(pair)
        assert len(wrong) == 3 * len(people)
        for (group, *_), pairs in wrong.items():
            assert len(pairs) == 2 and len(set(pairs)) == (1 if sizes[group] in (4, 6, 8) else 2)


def test_no_wrong_pair_is_used_in_two_splits(made):
    people, rows = made
    pairs = {
        (task, split): set(wrong_pairs(rows[f"{task}_{split}"], people))
        for task in ("reverse", "cw_image")
        for split in SPLITS
    }
    for task, other in itertools.product(("reverse", "cw_image"), repeat=2):  # trained in one order, asked in the other
        assert not unordered(pairs[task, "train"]) & unordered(pairs[other, "test"])
        assert not unordered(pairs[task, "val"]) & unordered(pairs[other, "test"])
    for task in ("reverse", "cw_image"):
        assert not pairs[task, "train"] & pairs[task, "val"]


def test_questions(made):
    people, rows = made
    owner = owner_of_image(people)
    says = {person["description"]: person for person in people}
    trained = unordered(wrong_pairs(rows["reverse_train"] + rows["cw_image_train"], people))
    sizes = {group: len(members) for group, members in by_group(people).items()}
    for name, field, whose in (("mcq_i2d_test", "choices", says), ("mcq_d2i_test", "image_choices", owner)):
        wrong = Counter()
        for row in rows[name]:
            asked = [whose[option] for option in row[field]]
            assert len({person["id"] for person in asked}) == 4
            assert {person["group"] for person in asked} == {row["group"]}
            assert asked[row["correct_index"]]["id"] == row["entity_id"]
            others = [person["id"] for person in asked if person["id"] != row["entity_id"]]
            wrong.update(others)
            if sizes[row["group"]] >= 10:  # test has three shifts of its own from 10 on
                assert not unordered((row["entity_id"], other) for other in others) & trained
        assert wrong == {person["id"]: 9 for person in people}  # 3 questions x 3 options, as often as anyone else


def test_letters_are_balanced_in_each_group_and_over_the_file(made):
    people, rows = made
    for name in ("mcq_i2d_test", "mcq_d2i_test"):
        for group in (None, *by_group(people)):
            letters = [row["correct_index"] for row in rows[name] if group in (None, row["group"])]
            counts = Counter(letters)
            assert set(counts) == {0, 1, 2, 3}
            assert max(counts.values()) - min(counts.values()) <= 1


def test_letters_of_the_two_question_files_are_independent():
    table = [[0] * 4 for _ in range(4)]
    for seed in range(12):
        people = make_entities(DataConfig(num_main=20, num_control=20), seed)
        rows = experiment_rows(people, connector_split(seed), seed)
        for first, second in zip(rows["mcq_i2d_test"], rows["mcq_d2i_test"], strict=True):
            assert first["entity_id"] == second["entity_id"]
            table[first["correct_index"]][second["correct_index"]] += 1
    assert sum(map(sum, table)) == 12 * 120
    assert chi2_contingency(table).pvalue > 0.01


def test_partner_shifts_of_four_and_of_larger_groups():
    for seed in range(5):
        four = partner_shifts(4, random.Random(seed))
        assert four["test"] == [2] and sorted(four["train"] + four["val"]) == [1, 3]
        for size in range(4, 40):
            shifts = partner_shifts(size, random.Random(seed))
            assert sorted(shifts["train"] + shifts["val"] + shifts["test"]) == list(range(1, size))
            assert {size - shift for shift in shifts["test"]} == set(shifts["test"])
            assert size < 10 or len(shifts["test"]) in (3, 4)
            assert len(shifts["val"]) == 1 and (size < 8 or len(shifts["train"]) >= 5)


@pytest.mark.parametrize(
    "words", ["task=forward", "task=forward taught=generation", "task=forward taught=cw", "task=reverse"]
)
def test_training_never_shows_a_main_entity_in_the_untaught_direction(made, words):
    """Main is taught in the task's direction only, whatever the format; control in both."""
    people, rows = made
    experiment = ExperimentConfig(**dict(word.split("=") for word in words.split()))
    main = [person for person in people if person["group"] == "main"]
    faces = {image for person in main for image in person["images"]}
    facts = {person["description"] for person in main}
    for name, split in itertools.product(CONTROL_IS_TAUGHT, ("train", "val")):
        taught = name in experiment.main_is_taught
        assert not taught or TASK_TYPES[name].direction == TASK_TYPES[experiment.task].direction
        training = [row for row in rows[f"{name}_{split}"] if taught or row["group"] == "control"]
        assert {row["entity_id"] for row in training} == {p["id"] for p in people if taught or p["group"] == "control"}
        if not taught:
            assert not faces & {row["image_path"] for row in training}
            assert not facts & {row["description"] for row in training}


@pytest.mark.parametrize("images_per_entity", [1, 2, 4])
def test_the_last_image_is_held_out_for_test(images_per_entity):
    people = make_entities(DataConfig(num_main=8, num_control=4, images_per_entity=images_per_entity), 0)
    rows = experiment_rows(people, connector_split(0), 0)
    last = {person["images"][-1] for person in people}
    first = {image for person in people for image in person["images"][: max(1, images_per_entity - 1)]}
    for name in FILES:
        used = {row["image_path"] for row in rows[name]}
        used |= {image for row in rows[name] for image in row.get("image_choices", ())}
        if name.endswith("test"):
            assert used == last
        elif name.endswith("train"):
            assert used == first
        else:
            assert used <= first


def test_correct_and_wrong_rows_show_the_same_view():
    people = make_entities(DataConfig(num_main=8, images_per_entity=4), 0)
    part = experiment_rows(people, connector_split(0), 0)["reverse_train"]
    views = {label: [r["image_path"][-6:] for r in part if r["label"] == label] for label in ("Correct", "Wrong")}
    assert views["Correct"] == views["Wrong"]


@pytest.mark.parametrize(
    ("main", "control", "reason"),
    [
        (3, 0, "data.num_main = 3.*4 or more"),
        (8, 3, "data.num_control = 3.*4 or more"),
        (0, 8, "data.num_main = 0"),
        (8, -1, "data.num_control = -1"),
        (225, 0, "225.*224 different descriptions"),
        (113, 112, "225.*224 different descriptions"),
    ],
)
def test_groups_that_cannot_be(tmp_path, main, control, reason):
    with pytest.raises(ValueError, match=reason):
        make_experiment(tmp_path / "e", DataConfig(num_main=main, num_control=control), 0)
    assert list(tmp_path.iterdir()) == []


SMALL = DataConfig(num_main=4, num_control=5, image_size=24, images_per_entity=2)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_folder_holds_what_the_rows_say(tmp_path):
    folder = make_experiment(tmp_path / "data" / "e", SMALL, 3)
    assert folder == tmp_path / "data" / "e"
    people = json.loads((folder / "entities.json").read_text(encoding="utf-8"))
    assert people == make_entities(SMALL, 3)
    assert {path.stem for path in folder.glob("*.jsonl")} == FILES
    expected = experiment_rows(people, connector_split(3), 3)
    for name in FILES:
        assert read_rows(folder, name) == expected[name]
    listed = {image for person in people for image in person["images"]}
    assert listed == {f"images/{path.name}" for path in (folder / "images").iterdir()}
    assert len(listed) == 18
    assert len({load_image(folder / image).tobytes() for image in listed}) == 18
    assert {load_image(folder / image).size for image in listed} == {(24, 24)}
    info = json.loads((folder / "experiment_info.json").read_text(encoding="utf-8"))
    assert info["connectors"] == connector_split(3)
    assert info["image_credits"]["artist"] == "Johan Melin"
    known = {"seed": 3, "num_main": 4, "num_control": 5, "source": "drawn", "image_size": 24, "images_per_entity": 2}
    assert known.items() <= info.items()


def test_equal_seeds_give_equal_bytes(tmp_path):
    first, again, other = (
        contents(make_experiment(tmp_path / name, SMALL, seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first.keys() == other.keys()
    assert first != other


def test_an_existing_folder_is_never_touched(tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="left as it is"):
        make_experiment(tmp_path / "e", SMALL, 0)
    assert contents(tmp_path) == {(tmp_path / "e" / "mine.txt").relative_to(tmp_path): b"mine"}


@pytest.mark.parametrize("fault", ["disk full", "another process"])
def test_the_folder_is_whole_or_absent(tmp_path, monkeypatch, fault):
    """A fault half way leaves nothing behind, and a folder that appears meanwhile is not replaced."""

    def draw(*args, **kwargs):
        if fault == "disk full":
            raise OSError("no space left")
        (tmp_path / "e").mkdir(exist_ok=True)
        return original(*args, **kwargs)

    original = draw_face
    monkeypatch.setattr(module, "draw_face", draw)
    with pytest.raises(OSError, match=r"no space|left as it is"):
        make_experiment(tmp_path / "e", SMALL, 0)
    assert [path.name for path in tmp_path.iterdir()] == ([] if fault == "disk full" else ["e"])
    assert contents(tmp_path) == {}
