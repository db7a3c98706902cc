"""Your own people: every fault told with its line, and nothing of yours changed."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import DataConfig
from mmrev_kit.data.faults import DataError
from mmrev_kit.data.folder import make_folder_experiment, read_people
from mmrev_kit.data.make import ensure_data
from mmrev_kit.data.rows import read_entities
from mmrev_kit.training.run import prepare


@pytest.fixture
def mine(tmp_path):
    """Five pictures, a CSV of their people, and the settings for them."""
    (tmp_path / "pics").mkdir()
    for number in range(5):
        Image.new("RGB", (40, 40), (40 * number, 90, 200)).save(tmp_path / "pics" / f"p{number}.png")
    return tmp_path, DataConfig(
        source="folder", entities_file=str(tmp_path / "people.csv"), images_dir=str(tmp_path / "pics"), num_main=4
    )


def write(folder, *lines: str, head: str = "name,description,image", end: str = "\n", bom: str = "") -> None:
    (folder / "people.csv").write_text(bom + end.join([head, *lines]) + end, encoding="utf-8", newline="")


GOOD = [f"N{n},the mayor of town {n},p{n}.png" for n in range(4)]


def faults(data) -> str:
    with pytest.raises(DataError) as error:
        read_people(data)
    return "\n".join(map(str, error.value.faults))


@pytest.mark.parametrize(("end", "bom"), [("\n", ""), ("\r\n", "\ufeff")])
def test_a_csv_becomes_an_experiment_by_the_same_rows(mine, end, bom):
    folder, data = mine
    write(folder, *GOOD, end=end, bom=bom)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    made = make_folder_experiment(folder / "made", data, 0)
    people = read_entities(made)
    assert [person["description"] for person in people] == [f"the mayor of town {n}" for n in range(4)]
    assert people[2]["source_image"] == ["p2.png"] and people[2]["name"] == "N2" and people[2]["age"] is None
    assert (made / people[2]["images"][0]).read_bytes() == (folder / "pics" / "p2.png").read_bytes()
    assert len((made / "forward_train.jsonl").read_text().splitlines()) == 4 * 15
    assert {path: path.read_bytes() for path in before} == before


def test_pictures_can_be_linked(mine):
    folder, data = mine
    write(folder, *GOOD)
    made = make_folder_experiment(folder / "made", replace(data, link_images=True), 0)
    image = made / read_entities(made)[0]["images"][0]
    assert image.is_symlink() and image.resolve() == folder / "pics" / "p0.png"


def test_json_with_several_images_a_person(mine):
    folder, data = mine
    for number in range(5, 8):
        Image.new("RGB", (40, 40), (10, 30 * number, 0)).save(folder / "pics" / f"p{number}.png")
    people = [{"id": n, "description": f"d{n}", "image": [f"p{n}.png", f"p{n + 4}.png"], "age": 30} for n in range(4)]
    (folder / "people.json").write_text(json.dumps(people))
    data = replace(data, entities_file=str(folder / "people.json"), images_per_entity=2)
    made = make_folder_experiment(folder / "made", data, 0)
    assert read_entities(made)[1]["age"] == 30
    shown = {name: {json.loads(line)["image_path"] for line in (made / f"forward_{name}.jsonl").read_text().splitlines()} for name in ("train", "test")}  # fmt: skip  # noqa: E501
    assert not shown["train"] & shown["test"]  # the last picture of a person is held out


def test_all_faults_come_at_once_with_their_lines(mine):
    folder, data = mine
    (folder / "pics" / "p3.png").write_bytes((folder / "pics" / "p3.png").read_bytes()[:60])
    (folder / "secret.png").write_bytes((folder / "pics" / "p0.png").read_bytes())
    (folder / "pics" / "copy.png").write_bytes((folder / "pics" / "p0.png").read_bytes())
    lines = [
        "A,the mayor,p0.png,",
        "B,The  Mayor.,p1.png,",  # line 3: the same description, written otherwise
        "C,,p2.png,",
        "D,the guard,p3.png,",  # line 5: truncated
        "E,the cook,none.png,",
        "F,the smith,../secret.png,",
        "G,the baker,copy.png,both",  # line 8: the picture of line 2, and no group
        "A,the tailor,p4.png,",  # line 9: the name of line 2
    ]
    write(folder, *lines, head="name,description,image,group")
    told = faults(data)
    for part in ("csv:3: the description", "csv:4: no description", "csv:5: ", "csv:6: ", "csv:7: the image ../secret",
                 "csv:8: a picture is also that of", "csv:8: the group 'both'", "csv:9: the name"):  # fmt: skip
        assert part in told, part
    assert "p3.png" in told and "none.png" in told


@pytest.mark.parametrize(
    ("head", "lines", "message"),
    [
        ("name,picture", ["a,b"], "csv:1: no column description, image"),
        ("name,description,image", [], "the file names nobody"),
        ("name,description,image", GOOD[:3], "group main has 3"),
        ("name,description,image", [*GOOD, "X,the cook,p0.png"], "a picture is also that of"),
    ],
)
def test_files_that_cannot_be_used(mine, head, lines, message):
    folder, data = mine
    write(folder, *lines, head=head)
    assert message in faults(data)


def test_more_people_than_images_and_an_empty_images_folder(mine):
    folder, data = mine
    write(folder, *GOOD, "X,the cook,p4.png", "Y,the smith,p4.png")
    assert "6 people but 5 images" in faults(data)
    (folder / "empty").mkdir()
    assert "the images folder is missing or empty" in faults(replace(data, images_dir=str(folder / "empty")))
    assert "there is no such file" in faults(replace(data, entities_file=str(folder / "none.csv")))


def test_a_run_over_your_own_people(mine, tmp_path):
    folder, _ = mine
    write(folder, *GOOD)
    config = load_config(
        "configs/tiny_cpu.yaml",
        f"experiment.name=own data.dir={tmp_path}/data data.source=folder data.entities_file={folder}/people.csv "
        f"data.images_dir={folder}/pics retention.face_share=0.5 retention.num_faces=40 data.image_size=32 "
        f"retention.face_pool={tmp_path}/faces retention.object_pool={tmp_path}/objects",
    )
    assert [line.split()[0] for line in ensure_data(config)[1:]] == ["made"] * 3
    assert [line.split()[0] for line in ensure_data(config)[1:]] == ["found"] * 3
    task = prepare(config)
    # 60 task rows, 26 retention rows (60 x 3/7 = 25.7): 13 from each pool; a third from each task is 8 2/3
    counts = task.plan.counts
    assert sum(counts.values()) == 60 + 26
    assert sum(count for source, count in counts.items() if source.startswith("object_")) == 13
    tasks = [counts[f"face_{name}"] + counts[f"object_{name}"] for name in ("cw", "mcq_i2d", "mcq_d2i")]
    assert sorted(tasks) == [8, 9, 9]
