"""The check before a run: all faults at once, none repaired in silence."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mmrev_kit.data.checks import check_entities, check_statements, encode_all, image_sizes
from mmrev_kit.data.faults import DataError, Fault, raise_faults
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
    sizes, broken = image_sizes([tmp_path / "a.png", tmp_path / "b.png"] * 5)
    assert sizes == {tmp_path / "a.png": (40, 30)} and list(broken) == [tmp_path / "b.png"] and len(calls) == 2


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
