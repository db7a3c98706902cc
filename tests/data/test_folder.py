"""Your own people: every fault told with its line, and nothing of yours changed."""

import json
import os
from dataclasses import replace

import pytest
from PIL import Image

from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import ConfigError, DataConfig
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
        ("name,picture", ["a,b"], "csv:1: no column description, image; there are name, picture."),
        ("name,description,image", [], "the file names nobody"),
        ("name,description,image", GOOD[:3], "group main has 3"),
        ("name,description,image", [*GOOD, "X,the cook,p0.png"], "a picture is also that of"),
    ],
)
def test_files_that_cannot_be_used(mine, head, lines, message):
    folder, data = mine
    write(folder, *lines, head=head)
    assert message in faults(data)


def test_one_picture_saved_twice_is_one_picture(mine):
    folder, data = mine
    with Image.open(folder / "pics" / "p0.png") as picture:
        picture.save(folder / "pics" / "again.png", compress_level=0)
        picture.save(folder / "pics" / "again.bmp")
    assert (folder / "pics" / "again.png").read_bytes() != (folder / "pics" / "p0.png").read_bytes()
    write(folder, *GOOD, "X,the cook,again.png")
    assert "csv:6: a picture is also that of" in faults(data)
    write(folder, *GOOD[1:], "X,the cook,p0.png; again.bmp")
    assert "csv:5: it names a picture twice. Name each once: the last one is held out" in faults(data)


def test_pictures_that_changed_after_the_data_was_made_are_told(mine, small_config):
    folder, _ = mine
    write(folder, *GOOD)
    own = f"data.entities_file={folder}/people.csv data.source=folder data.dir={folder}/data"

    def make(pictures: str) -> list[str]:
        return ensure_data(small_config(f"{own} data.images_dir={folder}/{pictures} retention.retention_ratio=0"))

    assert make("pics")[-1].startswith("made") and make("pics")[-1].startswith("found")
    (folder / "moved").mkdir()
    for number in range(4):
        (folder / "moved" / f"p{number}.png").write_bytes((folder / "pics" / f"p{number}.png").read_bytes())
    assert make("moved")[-1].startswith("found")
    Image.new("RGB", (40, 40), "red").save(folder / "moved" / "p2.png")
    with pytest.raises(DataError, match=rf"{folder}/moved/p2\.png has another content now\. Choose another"):
        make("moved")
    assert make("pics")[-1].startswith("found")


def test_entities_that_were_edited_after_the_data_was_made_are_read_or_told(mine, small_config):
    folder, _ = mine
    write(folder, *GOOD)
    own = f"data.entities_file={folder}/people.csv data.source=folder data.dir={folder}/data"
    config = small_config(f"{own} data.images_dir={folder}/pics retention.retention_ratio=0")
    ensure_data(config)
    file = next((folder / "data").rglob("entities.json"))
    entities = json.loads(file.read_text())
    for change in (
        {"images": []},
        {"images": entities[0]["images"] * 2},
        {"source_image": None},
        {"source_image": [5]},
    ):
        file.write_text(json.dumps([entities[0] | change, *entities[1:]]))
        with pytest.raises(DataError, match=r"entities\.json: .*: source_image does not name a picture for each"):
            ensure_data(config)
    for first, told in ((3, "a int, not an object"), (entities[0] | {"group": []}, "its group is not a text")):
        file.write_text(json.dumps([first, *entities[1:]]))
        with pytest.raises(DataError, match=f"entities.json: entity 1: {told}"):
            ensure_data(config)


def test_a_list_of_people_that_would_not_be_read_is_refused():
    with pytest.raises(ConfigError, match=r"data\.entities_file = 'mine\.csv': is read where data\.source is folder"):
        load_config("configs/tiny_cpu.yaml", "data.entities_file=mine.csv data.images_dir=pics")


def test_more_people_than_images_and_an_empty_images_folder(mine):
    folder, data = mine
    write(folder, *GOOD, "X,the cook,p4.png", "Y,the smith,p4.png")
    assert "6 people but 5 images" in faults(data)
    (folder / "empty").mkdir()
    assert "the images folder is missing or empty" in faults(replace(data, images_dir=str(folder / "empty")))
    assert "there is no such file" in faults(replace(data, entities_file=str(folder / "none.csv")))


def people_json(mine, *changes: dict) -> tuple[str, DataConfig]:
    """Five people as JSON, the first ones changed."""
    folder, data = mine
    people = [{"id": f"e{n}", "description": f"the mayor of {n}", "image": f"p{n}.png"} for n in range(5)]
    people[: len(changes)] = [person | change for person, change in zip(people, changes, strict=False)]
    (folder / "people.json").write_text(json.dumps(people))
    return folder, replace(data, entities_file=str(folder / "people.json"))


def test_the_types_of_every_field_are_checked(mine):
    changes = [
        {"description": ["a", "b"]},
        {"image": 1},
        {"image": {"bytes": "iVBO", "path": None}},
        {"group": ["main"]},
        {"id": 1.5, "name": ["N"]},
    ]
    folder, data = people_json(mine, *changes)
    told = faults(data)
    parts = (
        "entry 1: the description is ['a', 'b'], not a text",
        "entry 2: the image is 1, no file name",
        "entry 3: the image is {'bytes': 'iVBO', 'path': None}, no file name",
        "entry 4: the group ['main'] is none of main, bridge, control",
        "entry 5: the id is 1.5",
        "entry 5: the name is ['N']",
    )
    for part in parts:
        assert f"{folder}/people.json: {part}" in told, part
    assert len(told.splitlines()) == 6


def test_objects_with_a_path_and_the_id_0_are_read(mine):
    folder, data = people_json(mine, {"id": 0, "age": 0}, {"image": {"bytes": None, "path": "p1.png"}})
    people = read_people(data)
    assert [person["id"] for person in people] == ["0", "e1", "e2", "e3", "e4"] and people[0]["age"] == 0
    assert people[1]["source_images"] == [folder / "pics" / "p1.png"]


HUB = {
    "metadata.csv": "file_name,text\n" + "".join(f"p{n}.png,the mayor of {n}\n" for n in range(5)),
    "metadata.jsonl": "".join(f'{{"file_name": "p{n}.png", "text": "the mayor of {n}"}}\n' for n in range(5)),
}


@pytest.mark.parametrize("name", HUB)
def test_the_metadata_of_an_image_folder_is_read_and_that_is_said(mine, name, capsys):
    folder, data = mine
    (folder / "pics" / name).write_text(HUB[name])
    people = read_people(replace(data, entities_file=str(folder / "pics" / name)))
    assert [person["description"] for person in people] == [f"the mayor of {n}" for n in range(5)]
    assert [person["source_images"] for person in people] == [[folder / "pics" / f"p{n}.png"] for n in range(5)]
    assert "text is read as the description; file_name is read as the image" in capsys.readouterr().out


def test_columns_that_are_not_read_are_said_and_nearly_known_ones_refused(mine, capsys):
    folder, data = mine
    write(folder, *(f"{line},x,y" for line in GOOD), head="name,description,image,notes,")
    assert len(read_people(data)) == 4
    assert "people.csv: notes, column 5: not read." in capsys.readouterr().out
    write(folder, *(f"{line},control" for line in GOOD), head="name,description,image,grup")
    assert "csv:1: the column grup is not known; group is." in faults(data)


ASKED = "<image>Who is this?"
CHATS = {
    "conversations": lambda text: [{"from": "human", "value": ASKED}, {"from": "gpt", "value": text}],
    "messages": lambda text: [{"role": "user", "content": ASKED}, {"role": "assistant", "content": text}],
    "output": lambda text: text,
}


@pytest.mark.parametrize("by_line", [False, True])
@pytest.mark.parametrize(
    ("field", "image", "layout"),
    [
        ("conversations", "image", "LLaVA or ShareGPT"),
        ("messages", "images", "ShareGPT or LLaMA-Factory"),
        ("output", "images", "Alpaca"),
    ],
)
def test_a_chat_layout_is_named_and_the_lines_that_turn_it_into_a_list_work(mine, field, image, layout, by_line):
    folder, data = mine
    pictures = [[f"p{n}.png"] if image == "images" else f"p{n}.png" for n in range(5)]
    rows = [{field: CHATS[field](f"the mayor of {n}"), image: picture} for n, picture in enumerate(pictures)]
    path = folder / ("chat.jsonl" if by_line else "chat.json")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if by_line else json.dumps(rows))
    told = faults(replace(data, entities_file=str(path)))
    assert f"the chat layout of {layout} (fields {field}, {image})" in told
    exec(told[told.index("import json") :], {})
    people = read_people(replace(data, entities_file=str(folder / "chat_people.json")))
    assert [person["description"] for person in people] == [f"the mayor of {n}" for n in range(5)]
    assert [person["source_images"][0].name for person in people] == [f"p{n}.png" for n in range(5)]


def test_file_names_that_are_nearly_right_are_named(mine):
    folder, data = mine
    (folder / "pics" / "p9.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    os.mkfifo(folder / "pics" / "pipe.png")
    (folder / "pics" / "loop.png").symlink_to("loop.png")
    names = ["P0.PNG", "pics\\p1.png", "p2.JPG", "p9.jpg", "pipe.png", "loop.png", "p4.png;p4.png"]
    write(folder, *(f"N{n},the mayor of {n},{name}" for n, name in enumerate(names)))
    told = faults(data)
    for part in ("csv:2: there is no image P0.PNG, but p0.png.", "csv:3: there is no image pics\\p1.png, but p1.png.",
                 "csv:4: there is no image p2.JPG, but p2.png.", "a HEIC picture, which is not read: export it",
                 "csv:6: the image pipe.png is no regular file", "csv:7: the image loop.png is no regular file",
                 "csv:8: it names a picture twice."):  # fmt: skip
        assert part in told, part


SAME = ["the keeper of <|a|> Hall", "the keeper of <|b|> Hall", "the keeper of Caf\u00e9", "the keeper of Cafe\u0301",
        "the keeper of Ro\u200bme", "the keeper of Rome"]  # fmt: skip


def test_descriptions_that_are_judged_as_each_other_are_refused(mine):
    folder, data = mine
    for n in range(5, 8):
        Image.new("RGB", (40, 40), (10, 30 * n, 0)).save(folder / "pics" / f"p{n}.png")
    write(folder, *(f"N{n},{text},p{n}.png" for n, text in enumerate([*SAME, "<|x|>", "NaN"])))
    told = faults(data).splitlines()
    same = "the description, as answers are judged, is also that of"
    expected = [f"{folder}/people.csv:{line}: {same} {folder}/people.csv:{line - 1}." for line in (3, 5, 7)]
    assert [line.removesuffix(" Each person needs their own.") for line in told if same in line] == expected
    for number in (8, 9):
        assert any(f"csv:{number}: no description." in line for line in told)


def test_a_run_over_your_own_people(mine, tmp_path):
    folder, _ = mine
    write(folder, *GOOD)
    config = load_config(
        "configs/tiny_cpu.yaml",
        f"experiment.name=own data.dir={tmp_path}/data data.source=folder data.entities_file={folder}/people.csv "
        f"data.images_dir={folder}/pics retention.face_share=0.5 retention.num_faces=40 data.image_size=32 "
        f"retention.retention_ratio=0.3 retention.face_pool={tmp_path}/faces retention.object_pool={tmp_path}/objects "
        "experiment.taught=generation",
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
