"""Reading rows: every fault with file and line, nothing replaced, older folders as they are."""

import json

import pytest
from PIL import Image

from mmrev_kit.data.faults import DataError
from mmrev_kit.data.make import ensure_data
from mmrev_kit.data.rows import read_jsonl, read_rows, read_run_data
from mmrev_kit.training.run import prepare


@pytest.fixture
def folder(tmp_path):
    for name in "abcd":
        Image.new("RGB", (32, 32), "navy").save(tmp_path / f"{name}.png")
    return tmp_path


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


FORWARD = {"entity_id": "e1", "image_path": "a.png", "description": "the keeper of Jade Temple", "connector": "is"}


def test_lines_are_read_whatever_their_ends_and_separators(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "x\xe2\x80\xa8y"}\r\n\n   \n{"a": 2}')
    rows, faults = read_jsonl(path)
    assert rows == [(1, {"a": "x\u2028y"}), (4, {"a": 2})] and faults == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "r.jsonl:2: not JSON"),
        (b'{"a": 1}\n[1]\n', "r.jsonl:2: a list, not an object"),
        (b"\n\n", "r.jsonl: the file has no rows"),
        (b'{"a": "\xff"}', "r.jsonl: byte 7 is not UTF-8"),
    ],
)
def test_broken_files_say_where(tmp_path, content, message):
    (tmp_path / "r.jsonl").write_bytes(content)
    assert message in str(read_jsonl(tmp_path / "r.jsonl")[1][0])


@pytest.mark.parametrize(
    ("task", "change", "reason"),
    [
        ("forward", {"description": None}, "the field description is missing"),
        ("forward", {"description": " "}, "description is ' ', not a text"),
        ("forward", {"connector": 3}, "connector is 3, not a text"),
        ("forward", {"image_path": "z.png"}, "there is no image z.png"),
        ("reverse", {"label": "correct"}, "label is 'correct', not Correct or Wrong"),
        ("mcq_i2d", {"choices": ["p", "q", "r"], "correct_index": 0}, "choices is not a list of four texts"),
        ("mcq_i2d", {"choices": ["p", "q", "r", "p"], "correct_index": 0}, "choices names the same option twice"),
        ("mcq_i2d", {"choices": ["p", "q", "r", "s"], "correct_index": 4}, "correct_index is 4, not 0, 1, 2 or 3"),
        ("mcq_i2d", {"choices": ["p", "q", "r", "s"], "correct_index": True}, "correct_index is True"),
    ],
)
def test_a_wrong_row_is_told_with_its_line_and_the_others_are_kept(folder, task, change, reason):
    good = FORWARD | {"label": "Correct", "choices": ["p", "q", "r", "s"], "correct_index": 1}
    rows, faults = read_rows(write(folder / "r.jsonl", good, good | change, good), task, task, {})
    assert [row.where for row in rows] == [f"{folder}/r.jsonl:1", f"{folder}/r.jsonl:3"]
    assert len(faults) == 1 and faults[0].where == f"{folder}/r.jsonl:2" and reason in faults[0].reason


def test_all_faults_of_all_files_come_at_once(small_config, small_data, tmp_path):
    config = small_config("experiment.name=broken")
    target = small_data / "broken"
    target.mkdir()
    (target / "entities.json").write_text('[{"id": "e1", "group": "control"}]')
    write(target / "forward_train.jsonl", FORWARD)
    with pytest.raises(DataError) as error:
        prepare(config)
    told = str(error.value)
    assert "forward_train.jsonl:1: there is no image a.png" in told
    for name in ("forward_val", "reverse_train", "reverse_val"):
        assert f"{name}.jsonl: there is no such file" in told


def test_rows_of_the_original_scripts_are_read_as_they_are(folder):
    options = {"A": "p", "B": "q", "C": "r", "D": "s"}
    old = {"entity_id": 3, "image": "a.png", "object_name": "the keeper of Jade Temple", "connector": "is"}
    (row,), faults = read_rows(write(folder / "f.jsonl", old), "forward", "forward", {})
    assert not faults and row.entity_id == "3" and row.answer == "the keeper of Jade Temple"
    i2d = old | {"options": options, "answer": "C"}
    (row,), _ = read_rows(write(folder / "i.jsonl", i2d), "mcq_i2d", "mcq_i2d", {})
    assert row.choices == ("p", "q", "r", "s") and row.answer == "C"
    d2i = old | {"options": {letter: f"{letter.lower()}.png" for letter in "ABCD"}, "answer": "B"}
    (row,), _ = read_rows(write(folder / "d.jsonl", d2i), "mcq_d2i", "mcq_d2i", {})
    assert [path.name for path in row.images] == ["a.png", "b.png", "c.png", "d.png"] and row.answer == "B"


def test_paths_may_be_absolute_or_start_from_the_projects_folder(folder, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("configs", "notebooks"):  # what makes it a project's folder
        (folder / name).mkdir()
    monkeypatch.chdir(folder / "notebooks")
    records = [FORWARD, FORWARD | {"image_path": str(folder / "b.png")}]
    rows, faults = read_rows(write(elsewhere / "r.jsonl", *records), "forward", "forward", {})
    assert not faults and [row.images[0] for row in rows] == [folder / "a.png", folder / "b.png"]


@pytest.mark.parametrize(("task", "other"), [("forward", "reverse"), ("reverse", "forward")])
def test_main_entities_are_taught_in_the_runs_direction_only(small_config, task, other):
    data, faults = read_run_data(small_config(f"experiment.task={task} retention.tasks=[forward,reverse]"))
    assert not faults
    per_entity = {"forward": 15, "reverse": 30}
    assert len(data.train[task]) == 8 * per_entity[task]
    assert len(data.train[other]) == 4 * per_entity[other]
    assert {row.group for row in data.train[other]} == {"control"}
    assert {row.group for row in data.val[other]} == {"control"}
    main_images = {image for row in data.train[task] if row.group == "main" for image in row.images}
    shown = {image for rows in (data.train[other], data.val[other]) for row in rows for image in row.images}
    assert main_images and not main_images & shown


def test_retention_joins_only_the_tasks_named(small_config):
    assert read_run_data(small_config("experiment.task=reverse"))[0].pools == {}
    assert set(read_run_data(small_config())[0].pools) == {"face_cw", "face_mcq_i2d", "face_mcq_d2i"}


def test_an_existing_experiment_is_never_changed_and_a_mismatch_is_told(small_config, small_data):
    before = {path: path.read_bytes() for path in (small_data / "small").rglob("*") if path.is_file()}
    assert ensure_data(small_config())[1].startswith("found ")
    with pytest.raises(DataError, match="num_main is 4, not 5"):
        ensure_data(small_config("data.num_main=5"))
    assert {path: path.read_bytes() for path in (small_data / "small").rglob("*") if path.is_file()} == before


def test_a_missing_experiment_is_told(small_config):
    with pytest.raises(DataError, match=r"nothing/entities.json: there is no such file"):
        prepare(small_config("experiment.name=nothing"))


@pytest.fixture
def original(tmp_path):
    """A folder as the original scripts leave it: integer ids, their field names, no groups, their retention folder."""
    folder, pool = tmp_path / "faces4", tmp_path / "faces4" / "retention_images"
    pool.mkdir(parents=True)
    names = [f"p{number}.png" for number in range(4)]
    for place in (folder, pool):
        for number, name in enumerate(names):
            Image.new("RGB", (32, 32), (60 * number, 10, 200)).save(place / name)
    facts = [f"the keeper of tower {number}" for number in range(4)]
    people = [{"id": number, "name": f"N{number}", "description": fact} for number, fact in enumerate(facts)]
    (folder / "entities.json").write_text(json.dumps(people))
    for split, connector in (("train", "is"), ("val", "shows")):
        rows = [{"entity_id": n, "image": names[n], "object_name": facts[n], "connector": connector} for n in range(4)]
        write(folder / f"forward_{split}.jsonl", *rows)
        common = [{"entity_id": n, "image": names[n], "object_name": f"a hat {n}", "connector": "is"} for n in range(4)]
        write(pool / f"retention_cw_{split}.jsonl", *(row | {"label": "Correct"} for row in common))
        texts = {letter: f"a hat {n}" for n, letter in enumerate("ABCD")}
        images = dict(zip("ABCD", names, strict=True))
        for task, options in (("mcq_i2d", texts), ("mcq_d2i", images)):
            asked = [row | {"options": options, "answer": "ABCD"[n]} for n, row in enumerate(common)]
            write(pool / f"retention_{task}_{split}.jsonl", *asked)
    return tmp_path


def test_a_whole_folder_of_the_original_scripts_becomes_a_run(small_config, original):
    config = small_config(
        f"experiment.name=faces4 data.dir={original} retention.face_pool={original}/faces4/retention_images "
        "retention.retention_ratio=0.6"
    )
    assert all(line.startswith("found ") for line in ensure_data(config))
    task = prepare(config)
    assert task.plan.counts == {"forward": 4, "face_cw": 2, "face_mcq_i2d": 2, "face_mcq_d2i": 2}
    assert {sample.row.group for sample in task.train["forward"]} == {"main"}
    assert task.train["forward"][3].row.answer == "the keeper of tower 3"
    question = task.train["face_mcq_d2i"][2].row
    assert question.answer == "C" and question.images[2].name == "p2.png" and question.description == "a hat 2"
