"""Reading rows: every fault with file and line, nothing replaced, older folders as they are."""

import json
import shutil
from collections import Counter

import pytest
from PIL import Image

from mmrev_kit.data.faults import DataError
from mmrev_kit.data.make import ensure_data
from mmrev_kit.data.records import read_jsonl
from mmrev_kit.data.rows import read_entities, read_rows
from mmrev_kit.data.run_data import read_experiment, read_run_data
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
        (b'{"a": "\xff"}', "r.jsonl:1: not JSON (a byte is not UTF-8)"),
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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"imgae_path": "a.png", "image_path": None}, "the field 'imgae_path' is not known; image_path is"),
        ({"Description": "the cook", "description": None}, "the field 'Description' is not known; description is"),
        ({"Description": "the cook"}, "the field 'Description' is not known; description is"),  # which of the two?
        ({"gruop": "control"}, "the field 'gruop' is not known; group is"),
        ({"desciption": "the cook"}, None),  # the description is there
        ({"source": "mine", "image_id": 3, "notes": ""}, None),
    ],
)
def test_a_field_that_is_nearly_called_like_one_that_is_missing_is_a_fault(folder, change, reason):
    row = {name: value for name, value in (FORWARD | change).items() if value is not None}
    rows, faults = read_rows(write(folder / "r.jsonl", FORWARD, row), "forward", "forward", {})
    assert len(rows) == (1 if reason else 2)
    assert [fault.reason.removesuffix(".") for fault in faults] == ([reason] if reason else [])


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


def test_rows_about_nobody_or_of_another_group_are_faults_line_by_line(folder):
    changes = [
        {},
        {"entity_id": "e1 "},
        {"entity_id": None},
        {"group": "Main"},
        {"group": "control"},
        {"group": "main"},
    ]
    path = write(folder / "r.jsonl", *(FORWARD | change for change in changes))
    rows, faults = read_rows(path, "forward", "forward", {"e1": "main", "e2": "control"})
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:6"] and {row.group for row in rows} == {"main"}
    assert [str(fault).removesuffix(" Correct the line or remove it.") for fault in faults] == [
        f"{path}:2: entity_id 'e1 ' is not in entities.json, which has 'e1'.",
        f"{path}:3: entity_id 'None' is not in entities.json.",
        f"{path}:4: the group 'Main' is not that of e1 in entities.json, main.",
        f"{path}:5: the group 'control' is not that of e1 in entities.json, main.",
    ]


@pytest.mark.parametrize(
    ("entities", "told"),
    [
        ("[]", "entities.json: not a list of entities"),
        ('{"id": 1}', "entities.json: not a list of entities"),
        ('[{"id": 1}, {"name": "x"}]', "entity 2: its id is neither text nor a whole number"),
        ('[{"id": true}]', "entity 1: its id is neither"),
        ('[{"id": 1, "images": 3}]', "entity 1: images is neither a path nor a list of paths"),
        ('[{"id": 1, "images": [3]}]', "entity 1: images is neither a path nor a list of paths"),
        ('[{"id": 1, "group": ["main"]}]', "entity 1: its group is not a text"),
        ('[{"id": 1, "description": ["a", "b"]}]', "entity 1: its description is not a text"),
        ('[{"id": 1, "Group": "control"}]', "entity 1: the field 'Group' is not read"),
        ('[{"id": 1, "id": 2}]', "the key 'id' is given twice"),
        ('[\n{"id": 1]', "entities.json:2: not JSON"),
    ],
)
def test_entities_of_a_wrong_type_are_told(folder, entities, told):
    (folder / "entities.json").write_text(entities)
    with pytest.raises(DataError) as error:
        read_entities(folder)
    assert told in str(error.value)


def test_one_image_may_be_named_without_a_list(folder):
    (folder / "entities.json").write_text('[{"id": 7, "images": "a.png"}, {"id": "8"}]')
    assert read_entities(folder) == [{"id": "7", "images": ["a.png"]}, {"id": "8", "images": []}]


def test_missing_images_are_told_with_what_is_nearly_called_so(folder):
    (folder / "images").mkdir()
    (folder / "images" / "caf\u00e9.PNG").write_bytes((folder / "a.png").read_bytes())
    names = ["A.png", "images/cafe\u0301.png", "images\\caf\u00e9.PNG", "a.jpg", "x.png"]
    path = write(folder / "r.jsonl", *(FORWARD | {"image_path": name} for name in names))
    told = [fault.reason for fault in read_rows(path, "forward", "forward", {})[1]]
    near = [", but a.png", ", but images/caf\u00e9.PNG", ", but images/caf\u00e9.PNG", ", but a.png", ""]
    assert told == [
        f"there is no image {name}{n}. Paths start from {folder}." for name, n in zip(names, near, strict=True)
    ]


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


@pytest.mark.parametrize(
    ("words", "taught"),
    [
        ("experiment.task=forward experiment.taught=null", {"forward": 15, "cw_image": 30}),
        ("experiment.task=forward experiment.taught=both", {"forward": 15, "cw_image": 30}),
        ("experiment.task=forward experiment.taught=generation", {"forward": 15}),
        ("experiment.task=forward experiment.taught=cw", {"cw_image": 30}),
        ("experiment.task=reverse experiment.taught=null", {"reverse": 30}),
        ("experiment.task=reverse experiment.taught=generation", {"reverse": 30}),
    ],
)
def test_what_main_and_control_are_taught(small_config, words, taught):
    """4 + 4 people: main by what `taught` says, control by forward, cw_image and reverse rows in every case."""
    data, faults = read_run_data(small_config(f"{words} retention.tasks=[forward,reverse]"))
    assert not faults
    for part, each in (
        (data.train, {"forward": 15, "cw_image": 30, "reverse": 30}),
        (data.val, dict.fromkeys(data.train, 0)),
    ):
        for name in ("forward", "cw_image", "reverse"):
            groups = Counter(row.group for row in part[name])
            assert set(groups) == ({"main", "control"} if name in taught else {"control"})
            assert not each[name] or groups == {group: 4 * each[name] for group in groups}
    assert next(iter(data.train)) == next(iter(taught))


def test_a_folder_without_image_first_rows_gets_them_in_memory(small_config, small_data, tmp_path):
    """As the original scripts' folders: each forward row once as Correct, and once with a description that a reverse
    row of the same split calls wrong of its image."""
    shutil.copytree(small_data / "small", tmp_path / "small")
    for path in (tmp_path / "small").glob("cw_image_*"):
        path.unlink()
    config = small_config(f"data.dir={tmp_path} experiment.taught=both")
    data, faults = read_run_data(config)
    assert not faults
    assert "240 cw_image rows of train are made in memory: the folder has none" in data.notes
    wrong = {}
    for line in (tmp_path / "small" / "reverse_train.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["label"] == "Wrong":
            wrong.setdefault(row["image_path"], set()).add(row["description"])
    forward = [json.loads(line) for line in (tmp_path / "small" / "forward_train.jsonl").read_text().splitlines()]
    rows = data.train["cw_image"]
    for number, record in enumerate(forward):
        correct, other = rows[2 * number : 2 * number + 2]
        name = record["image_path"]
        assert (correct.answer, correct.description, correct.connector) == (
            "Correct",
            record["description"],
            record["connector"],
        )
        assert (other.answer, other.connector) == ("Wrong", record["connector"]) and other.description in wrong[name]
        assert correct.images == other.images == (tmp_path / "small" / name,)
        assert correct.group == other.group == record["group"] and correct.where != other.where
    assert read_experiment(tmp_path / "small")[0]["cw_image_test"]


def test_retention_rows_do_not_use_the_tests_connectors(small_config, small_data):
    """Rows of the kit's own pools are left out where the experiment asks with their connector, and counted."""
    data, _ = read_run_data(small_config())
    asked = {
        json.loads(line)["connector"]
        for path in (small_data / "small").glob("*_test.jsonl")
        for line in path.read_text().splitlines()
    }
    assert len(asked) >= 5
    for source, rows in data.pools.items():
        task = source.removeprefix("face_")
        lines = [json.loads(line) for line in (small_data / "pool" / f"{task}_train.jsonl").read_text().splitlines()]
        left = sum(line["connector"] in asked for line in lines)
        assert len(lines) == 60 and len(rows) == 60 - left and not {row.connector for row in rows} & asked
        told = f"{left} of 60 {source} rows of train are left out: they ask with a test's connector"
        assert told in data.notes or not left


def test_retention_joins_only_the_tasks_named(small_config):
    assert read_run_data(small_config("experiment.task=reverse"))[0].pools == {}
    assert set(read_run_data(small_config())[0].pools) == {"face_cw", "face_mcq_i2d", "face_mcq_d2i"}


def test_an_existing_experiment_is_never_changed_and_a_mismatch_is_told(small_config, small_data):
    before = {path: path.read_bytes() for path in (small_data / "small").rglob("*") if path.is_file()}
    assert ensure_data(small_config())[1].startswith("found ")
    with pytest.raises(DataError, match="num_main is 4, not 5"):
        ensure_data(small_config("data.num_main=5"))
    own = f"data.source=folder data.entities_file={small_data}/people.csv data.images_dir={small_data}/small/images"
    with pytest.raises(DataError, match="source is drawn, not folder"):
        ensure_data(small_config(own))
    assert {path: path.read_bytes() for path in (small_data / "small").rglob("*") if path.is_file()} == before


def test_a_list_of_people_that_has_changed_is_another_experiment(small_config, folder, tmp_path):
    for number, name in enumerate("abcd"):
        Image.new("RGB", (32, 32), (60 * number, 10, 200)).save(folder / f"{name}.png")
    people = tmp_path / "people.csv"
    people.write_text("image,description\n" + "".join(f"{name}.png,the keeper of {name}\n" for name in "abcd"))
    more = f"data.source=folder data.entities_file={people} data.images_dir={folder} data.dir={tmp_path}/data "
    config = small_config(more + "retention.retention_ratio=0")
    assert [ensure_data(config)[-1].split()[0] for _ in range(2)] == ["made", "found"]
    people.write_text(people.read_text().replace("keeper of d", "guard of d"))
    with pytest.raises(DataError, match="made with other settings: entities_file_sha256"):
        ensure_data(config)
    people.unlink()  # what is made does not need it any more
    assert ensure_data(config)[-1].startswith("found ")


@pytest.mark.parametrize("setting", ["data.image_size=40", "retention.num_faces=41"])
def test_a_pool_made_with_other_settings_is_not_the_one_asked_for(small_config, tmp_path, setting):
    name, told = setting.split(".")[1].split("=")[0], {"data.image_size=40": "32, not 40"}.get(setting, "40, not 41")
    with pytest.raises(DataError, match=rf"pool: made with other settings: {name} is {told}\."):
        ensure_data(small_config(f"data.dir={tmp_path} {setting}"))


def test_a_pool_of_another_seed_is_used_and_that_is_said(small_config, small_data, tmp_path):
    config = small_config(f"experiment.seed=7 data.dir={tmp_path}")
    assert ensure_data(config)[2] == f"found {small_data}/pool, made with seed 0"


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
        "retention.retention_ratio=0.6 experiment.taught=null"
    )
    assert all(line.startswith("found ") for line in ensure_data(config))
    with pytest.raises(
        DataError, match=r"cw_image_train.jsonl: there is no such file, nor forward_train and reverse_t"
    ):
        prepare(config)
    config.experiment.taught = "generation"
    task = prepare(config)
    assert task.plan.counts == {"forward": 4, "face_cw": 2, "face_mcq_i2d": 2, "face_mcq_d2i": 2}
    assert {sample.row.group for sample in task.train["forward"]} == {"main"}
    assert task.train["forward"][3].row.answer == "the keeper of tower 3"
    question = task.train["face_mcq_d2i"][2].row
    assert question.answer == "C" and question.images[2].name == "p2.png" and question.description == "a hat 2"


def test_exposure_is_told_and_can_be_matched_by_repeating(small_config, tmp_path):
    """Control: 15 forward, 30 cw_image and 30 reverse rows a person. Main by generation 15, by both 45."""
    assert prepare(small_config()).exposure == pytest.approx({"main": 15, "control": 75})
    assert prepare(small_config("experiment.taught=both")).exposure == pytest.approx({"main": 45, "control": 75})
    task = prepare(small_config("experiment.taught=both experiment.match_exposure=repeat"))
    assert task.exposure == pytest.approx({"main": 75, "control": 75})
    assert "rows of one person in an epoch: main 75, control 75" in task.describe()
    # four people's 60 forward and 120 cw_image rows, 75 / 45 times; nothing of control is thinned
    counts = {name: count for name, count in task.plan.counts.items() if not name.startswith("face_")}
    assert counts == {"forward_main": 100, "cw_image_main": 200, "forward": 60, "cw_image": 120, "reverse": 120}
    drawn = Counter(task.plan.epoch_rows(0))
    assert all(1 <= drawn["forward_main", index] <= 2 for index in range(60))
    words = f"data.dir={tmp_path} data.num_control=0 experiment.match_exposure=repeat retention.retention_ratio=0"
    ensure_data(small_config(words))
    task = prepare(small_config(words))  # nobody to match: main's 15 forward rows stay, and that is said
    assert task.exposure == pytest.approx({"main": 15}) and task.plan.counts == {"forward": 60}
    assert any("no control group" in line for line in task.describe())
