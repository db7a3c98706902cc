"""The check before a run: all faults at once, none repaired in silence."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from mmrev_kit.data import images
from mmrev_kit.data.checks import check_account, check_entities, check_statements, encode_all, read_images
from mmrev_kit.data.faults import DataError, Fault, raise_faults
from mmrev_kit.data.questions import read_questions
from mmrev_kit.data.rows import read_rows
from mmrev_kit.data.tasks import Row
from mmrev_kit.training.run import prepare


@pytest.fixture
def own(small_config, small_data, tmp_path):
    """A copy of the small data that a test may break, and a function to configurations over it."""
    shutil.copytree(small_data, tmp_path / "own")
    where = f"data.dir={tmp_path}/own retention.face_pool={tmp_path}/own/pool"
    return tmp_path / "own", lambda more="": small_config(f"{where} {more}")


def edit(path: Path, number: int, **fields) -> None:
    """Change fields of line `number` of a JSONL file."""
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | fields)
    path.write_text("\n".join(lines) + "\n")


def test_faults_of_every_kind_in_every_file_are_told_at_once(own):
    folder, config = own
    data = folder / "small"
    shown = json.loads((data / "forward_train.jsonl").read_text().splitlines()[0])
    picture = data / shown["image_path"]
    picture.write_bytes(picture.read_bytes()[: picture.stat().st_size // 2])
    edit(data / "forward_train.jsonl", 2, connector="")
    lines = (data / "forward_val.jsonl").read_text().splitlines()
    (data / "forward_val.jsonl").write_text("\n".join(["{broken", *lines]))
    edit(folder / "pool" / "cw_val.jsonl", 3, label="Maybe")
    edit(folder / "pool" / "mcq_d2i_train.jsonl", 4, image_choices=["images/none.png"] * 4)
    entities = json.loads((data / "entities.json").read_text())
    entities[1]["description"] = entities[0]["description"].upper() + "."
    entities[3]["id"] = entities[2]["id"]
    entities[4]["group"] = "both"
    (data / "entities.json").write_text(json.dumps(entities))
    with pytest.raises(DataError) as error:
        prepare(config())
    told = str(error.value.faults and "\n".join(map(str, error.value.faults)))
    for part in (
        f"forward_train.jsonl:1: {picture}",
        "forward_train.jsonl:2: connector is ''",
        "forward_val.jsonl:1: not JSON",
        "cw_val.jsonl:3: label is 'Maybe'",
        "mcq_d2i_train.jsonl:4: image_choices names the same option twice",
        "entities.json: entity 2: the description",
        "entities.json: entity 4: the id",
        "entities.json: entity 5: the group 'both'",
    ):
        assert part in told, part


def all_rows(task) -> list[Row]:
    return [sample.row for part in (task.train, task.val) for samples in part.values() for sample in samples]


def test_a_truncated_picture_stops_the_run_or_its_rows_are_dropped_and_counted(own, capsys):
    _, config = own
    before = all_rows(prepare(config()))
    broken = next(row.images[0] for row in before if row.source == "face_cw")
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    hit = [row for row in before if broken in row.images]
    with pytest.raises(DataError, match=f"{len(hit)} faults in the data") as error:
        prepare(config())
    assert [fault.where for fault in error.value.faults] == [row.where for row in hit]
    assert all(str(broken) in fault.reason for fault in error.value.faults)
    capsys.readouterr()
    task = prepare(config("data.drop_faulty=true"))
    assert all_rows(task) == [row for row in before if row not in hit]  # never another row in its place
    assert f"{len(hit)} rows dropped" in capsys.readouterr().out
    there = [row for row in before if row.source == "face_cw" and "train" in row.where]
    assert task.plan.sizes["face_cw"] == len(there) - len([row for row in there if row in hit]) < len(there)


def test_a_prompt_without_room_for_its_answer_is_refused_with_its_line(own):
    _, config = own
    with pytest.raises(DataError, match=r"forward_train.jsonl:1: .*training.max_length = 20") as error:
        prepare(config("training.max_length=20"))
    assert len(error.value.faults) > 120


def test_a_missing_pool_says_how_to_make_it_or_to_do_without(own):
    folder, config = own
    shutil.rmtree(folder / "pool")
    with pytest.raises(DataError, match=r"there is no face pool. .*notebooks/data.ipynb.*retention_ratio=0"):
        prepare(config())
    assert prepare(config("retention.retention_ratio=0")).plan.counts.keys() == {"forward", "cw_image", "reverse"}


def test_an_empty_file_is_told(own):
    folder, config = own
    (folder / "small" / "reverse_val.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"reverse_val.jsonl: the file has no rows"):
        prepare(config())


def cut(path: Path, keep) -> None:
    """Keep the lines whose record `keep` says yes to."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if keep(json.loads(line))))


def test_files_that_have_lost_rows_since_they_were_made_are_told(own):
    folder, config = own
    lines = (folder / "pool" / "cw_train.jsonl").read_text().splitlines(keepends=True)
    (folder / "pool" / "cw_train.jsonl").write_text("".join(lines[:5]))
    cut(folder / "small" / "reverse_train.jsonl", lambda record: record["group"] == "main")
    with pytest.raises(DataError) as error:
        prepare(config())
    told = [str(fault) for fault in error.value.faults]
    advice = "Restore the file, remove the folder to have it made anew, or correct the counts in its *_info.json."
    assert told == [  # 4 control people x 15 connectors x 2 labels are gone
        f"{folder}/small/reverse_train.jsonl: it has 120 rows, 240 were written when it was made. {advice}",
        f"{folder}/pool/cw_train.jsonl: it has 5 rows, 60 were written when it was made. {advice}",
    ]


def test_a_source_without_rows_is_refused(own):
    """In a folder of an earlier version, whose note has no counts."""
    folder, config = own
    note = json.loads((folder / "small" / "experiment_info.json").read_text())
    del note["counts"]
    (folder / "small" / "experiment_info.json").write_text(json.dumps(note))
    cut(folder / "small" / "reverse_train.jsonl", lambda record: record["group"] == "main")
    with pytest.raises(DataError, match=r"small: no row is left for reverse \(train\)"):
        prepare(config())


def test_groups_of_another_size_than_were_made_are_told(own):
    folder, config = own
    entities = json.loads((folder / "small" / "entities.json").read_text())
    gone = next(entity for entity in entities if entity["group"] == "control")
    (folder / "small" / "entities.json").write_text(json.dumps([entity for entity in entities if entity != gone]))
    with pytest.raises(DataError) as error:
        prepare(config())
    told = [str(fault) for fault in error.value.faults]
    assert any("entities.json: it has 3 control entities, 4 were written when it was made" in fault for fault in told)
    # the person's rows: 15 + 30 + 30 to train on, 2 + 4 + 4 to validate on
    assert sum(f"entity_id {gone['id']!r} is not in entities.json" in fault for fault in told) == 75 + 10


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("the keeper of <|a|> Hall", "the keeper of <|b|> Hall"),
        ("the keeper of Caf\u00e9", "the keeper of Cafe\u0301"),
        ("the keeper of Ro\u200bme", "The keeper of Rome."),
    ],
)
def test_two_people_whose_descriptions_are_judged_as_each_other(first, second):
    texts = [first, second, "the guard"]
    entities = [{"id": f"e{n}", "description": text} for n, text in enumerate(texts)]
    (fault,) = check_entities(entities, Path("entities.json"))
    assert f"entity 2: the description {second!r} of e1 is judged as that of e0." in str(fault)
    rows = [make("forward", text, "abc"[n], description=text, entity_id=f"e{n}") for n, text in enumerate(texts)]
    (fault,) = check_statements(rows * 2)
    assert fault.where == rows[1].where
    assert fault.reason == f"the description of e1 is judged as that of e0 in {rows[0].where}."


def test_a_description_of_which_nothing_can_be_judged():
    (fault,) = check_statements([make("forward", "<|x|>", "a")])
    assert "nothing of the description of e can be judged" in fault.reason


def test_a_wrong_that_is_right_in_another_unicode_form():
    rows = [make("forward", "d", "a", description="the keeper of Caf\u00e9")]
    rows.append(make("reverse", "Wrong", "a", description="the keeper of Cafe\u0301"))
    assert [fault.where for fault in check_statements(rows)] == [rows[1].where]


def test_every_line_comes_to_something_or_the_run_stops(own):
    _, config = own
    task = prepare(config())
    rows = all_rows(task)
    lines = sum(len(file.read_text().splitlines()) for file in task.data.files)
    # task forward: 240 reverse rows of train and 32 of val, of which those of main are left out
    assert lines == len(rows) + len(task.data.left_out)
    left = Counter(row.source for row in task.data.left_out if not row.source.startswith("face_"))
    assert left == {"reverse_train": 120, "reverse_val": 16, "cw_image_train": 120, "cw_image_val": 16}  # main's
    check_account(task.data.files, rows + task.data.left_out, [])
    with pytest.raises(RuntimeError, match=rf"^{rows[7].where} is lost"):
        check_account(task.data.files, rows[:7] + rows[8:] + task.data.left_out, [])
    check_account(task.data.files, rows[:7] + rows[8:] + task.data.left_out, [Fault(rows[7].where, "bad", "mend")])


def make(task: str, answer: str, images: str, **fields) -> Row:
    paths = tuple(Path(name) for name in images)
    base = {"entity_id": "e", "group": None, "description": "d", "connector": "is", "choices": ()} | fields
    return Row(task=task, source=task, where=f"{task}:{answer}:{images}", images=paths, answer=answer, **base)


def test_what_is_right_in_one_row_is_not_wrong_in_another():
    rows = [
        make("forward", "the keeper", "a", description="the keeper"),
        make("reverse", "Correct", "b", description="the guard"),
        make("reverse", "Wrong", "b", description="the keeper"),
        make("mcq_i2d", "B", "b", choices=("the keeper", "the guard", "x", "y")),
        make("mcq_d2i", "A", "abcd", description="the keeper"),
    ]
    assert check_statements(rows) == []
    bad = [
        make("reverse", "Wrong", "a", description="the keeper"),
        make("mcq_i2d", "C", "b", choices=("the keeper", "the guard", "x", "y")),
        make("mcq_d2i", "B", "cabd", description="the guard"),  # says that a is a guard, and that b is none
    ]
    assert {fault.where for fault in check_statements(rows + bad)} >= {row.where for row in bad[:2]}
    (fault,) = check_statements([rows[1], bad[2]])
    assert fault.where == bad[2].where and "as right in reverse:Correct:b" in fault.reason


def test_entities_that_differ_raise_nothing():
    entities = [{"id": "1", "description": "a b"}, {"id": "2", "description": "a c"}, {"id": "3"}, {"id": "4"}]
    assert check_entities(entities, Path("entities.json")) == []


def test_each_distinct_image_is_decoded_once(tmp_path, monkeypatch):
    from mmrev_kit.data import checks

    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not an image")
    calls = []
    real = checks.load_image
    monkeypatch.setattr(checks, "load_image", lambda path: calls.append(path) or real(path))
    sizes, looks, broken = read_images([tmp_path / "a.png", tmp_path / "b.png"] * 5)
    assert (
        list(looks) == list(sizes) and sizes == {tmp_path / "a.png": (40, 30)} and list(broken) == [tmp_path / "b.png"]
    )
    assert len(calls) == 2


def test_half_a_picture_passes_in_no_thread_although_another_library_lets_it(tmp_path, monkeypatch):
    """One thread is done while others still decode: until all are, Pillow must not be lenient again."""
    from mmrev_kit.data import checks

    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    seen, real = [], checks.load_image

    def load(path):
        image = real(path)
        seen.append(ImageFile.LOAD_TRUNCATED_IMAGES)
        return image

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(checks, "load_image", load)
    sizes, _, broken = read_images([tmp_path / "whole.png", tmp_path / "half.png"])
    assert (list(sizes), list(broken), seen) == ([tmp_path / "whole.png"], [tmp_path / "half.png"], [False])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_two_people_of_one_picture_saved_twice_are_told(own, small_config):
    """A file of other bytes, with the same pixels; told once, however many rows show it."""
    folder, config = own
    assert prepare(config())
    data = folder / "small"
    entities = json.loads((data / "entities.json").read_text())
    first, second = [entity["images"][0] for entity in entities if entity["group"] == "main"][:2]
    with Image.open(data / first) as picture:
        picture.save(data / second, compress_level=1)
    assert (data / first).read_bytes() != (data / second).read_bytes()
    with pytest.raises(DataError) as error:
        prepare(config())
    told = [fault for fault in error.value.faults if "looks like" in fault.reason]
    assert {fault.where.split("/")[-1].split(":")[0] for fault in told} == {"forward_train.jsonl"} and len(told) == 1
    assert Path(first).name in told[0].reason and Path(second).name in told[0].reason


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def people(data: Path, group: str) -> list[dict]:
    return [entity for entity in json.loads((data / "entities.json").read_text()) if entity["group"] == group]


def told_of(config, call=prepare) -> dict[str, str]:
    """{file:line: reason} of what a call refuses."""
    with pytest.raises(DataError) as error:
        call(config)
    return {Path(fault.where).name: fault.reason for fault in error.value.faults}


@pytest.mark.parametrize("field", ["image_path", "description"])
def test_a_main_face_or_description_in_a_direction_that_main_is_not_taught_is_refused(own, field):
    """One row of a control person, of task reverse, which main does not learn in task forward. It is a Wrong one, so
    that nothing but the leak is the matter."""
    folder, config = own
    data = folder / "small"
    secret = people(data, "main")[0]
    value = secret["images"][0] if field == "image_path" else secret["description"]
    file = data / "reverse_train.jsonl"
    found = [(n, row) for n, row in enumerate(lines(file), 1) if row["group"] == "control" and row["label"] == "Wrong"]
    number = found[0][0]
    edit(file, number, **{field: value})
    told = told_of(config())
    assert told[f"reverse_train.jsonl:{number}"] == "it shows or names somebody of main, who is not taught reverse."
    assert len(told) == 1
    edit(file, number, **{field: found[0][1][field]})
    assert prepare(config())


def test_rows_that_contradict_the_list_of_people_are_refused_in_training_and_evaluation(own):
    folder, config = own
    data = folder / "small"
    first, second = people(data, "main")[:2]
    mine = [n for n, row in enumerate(lines(data / "forward_train.jsonl"), 1) if row["entity_id"] == first["id"]]
    edit(data / "forward_train.jsonl", mine[0], description="the thief of Nowhere")
    edit(data / "forward_train.jsonl", mine[1], image_path=second["images"][0])
    told = told_of(config())
    assert "'the thief of Nowhere' counts as right of" in told[f"forward_train.jsonl:{mine[0]}"]
    assert "who has other images in entities.json" in told[f"forward_train.jsonl:{mine[1]}"]
    asked = [n for n, row in enumerate(lines(data / "forward_test.jsonl"), 1) if row["entity_id"] == first["id"]]
    edit(data / "forward_test.jsonl", asked[0], description="the thief of Nowhere")
    told = told_of(config(), read_questions)
    assert "counts as right of" in told[f"forward_test.jsonl:{asked[0]}"]


def change(path: Path, edit_record) -> None:
    """Let `edit_record` change the record of each line."""
    records = lines(path)
    for record in records:
        edit_record(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_test_that_asks_with_a_trained_connector_is_refused_where_the_kit_split_them_and_else_told(own):
    """One of the three forward connectors of the test becomes one of training: a third of the rows of the questions
    with texts as options, that of the other direction stays."""
    folder, config = own
    data, note = folder / "small", folder / "small" / "experiment_info.json"
    info = json.loads(note.read_text())
    split = info["connectors"]["forward"]
    old, new = (
        split["test"][0],
        next(word for word in split["train"] if word not in info["connectors"]["reverse"]["train"]),
    )
    asked = lines(data / "mcq_i2d_test.jsonl")
    assert sum(row["connector"] == old for row in asked) == len(asked) // 3 == 8
    change(
        data / "mcq_i2d_test.jsonl",
        lambda row: row.update(connector=new if row["connector"] == old else row["connector"]),
    )
    change(data / "mcq_d2i_test.jsonl", lambda row: row.update(connector=new))  # to the picture: trained in no such row
    told = f"8 of 24 mcq_i2d_test rows ask with a connector of the training rows: {new!r}"
    for call in (prepare, read_questions):
        assert told_of(config(), call) == {"mcq_i2d_test.jsonl": f"{told}."}
    note.write_text(json.dumps({name: value for name, value in info.items() if name != "connectors"}))  # somebody's own
    assert told in prepare(config()).describe() and len(read_questions(config())) > 24
    change(data / "mcq_i2d_test.jsonl", lambda row: row.update(connector=old))
    assert not any("connector of the training" in line for line in prepare(config()).describe())


def test_the_groups_of_the_list_hold_where_rows_name_none(own):
    """Main and control people change places in entities.json alone: the rows follow it."""
    folder, config = own
    data = folder / "small"
    for path in data.glob("*.jsonl"):
        change(path, lambda row: row.pop("group"))
    entities = json.loads((data / "entities.json").read_text())
    was = {one["id"]: one["group"] for one in entities}
    other = {"main": "control", "control": "main"}
    (data / "entities.json").write_text(json.dumps([one | {"group": other[one["group"]]} for one in entities]))
    train = prepare(config()).data.train
    assert {(row.entity_id, row.group) for row in train["reverse"]} == {
        (name, "control") for name, group in was.items() if group == "main"
    }
    for rows in (train["forward"], [question.row for question in read_questions(config())]):
        assert {(row.entity_id, row.group) for row in rows} == {(name, other[group]) for name, group in was.items()}


def test_a_picture_that_is_missing_is_not_looked_for_in_the_project(own, tmp_path, monkeypatch):
    """The project has another one of that name; a file whose pictures all lie in the project is read."""
    folder, config = own
    data, project = folder / "small", tmp_path / "project"
    name = people(data, "main")[0]["images"][0]
    (project / "images").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(project / name)
    monkeypatch.setattr(images, "project_root", lambda: project)
    assert prepare(config())
    (data / name).rename(tmp_path / "kept.png")
    told = told_of(config())
    assert told and all(f"there is no image {name}" in reason for reason in told.values())
    row = {"image_path": name, "description": "d", "connector": "is"}
    (folder / "far.jsonl").write_text(json.dumps(row) + "\n")
    (far,), faults = read_rows(folder / "far.jsonl", "forward", "forward", {})
    assert far.images == (project / name,) and not faults


def test_dropping_does_not_pass_over_what_is_no_single_rows_fault():
    row, file = Fault("r:1", "bad", "mend", of_row=True), Fault("f", "missing", "make")
    raise_faults([row], drop=True)
    with pytest.raises(DataError, match="f: missing"):
        raise_faults([row, file], drop=True)
    with pytest.raises(DataError, match="2 faults"):
        raise_faults([row, file], drop=False)


def test_rows_keep_their_place(own, small_config):
    _, config = own
    task = prepare(config())
    rows = [sample.row for sample in task.train["forward"]]
    samples, faults = encode_all(rows, task.encoder)
    assert not faults and [sample.row for sample in samples] == rows
