"""What carries over: the group bridge, the bridge of formats and identity rows, and what each row may show."""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import Config, ConfigError, DataConfig, ExperimentConfig, MitigationConfig
from mmrev_kit.data.checks import check_people
from mmrev_kit.data.design import design_of
from mmrev_kit.data.faults import DataError
from mmrev_kit.data.make import ensure_data
from mmrev_kit.data.mixing import make_plan
from mmrev_kit.data.partners import connector_split, experiment_rows
from mmrev_kit.data.people import make_entities, make_experiment
from mmrev_kit.data.run_data import read_run_data
from mmrev_kit.data.tasks import Row, build_prompt
from mmrev_kit.training.run import prepare

FORWARD, BOTH, ALL = {"forward"}, {"forward", "cw_image"}, {"forward", "cw_image", "reverse"}


def with_share(share: float, main: int = 16, control: int = 6, seed: int = 0) -> list[dict]:
    return make_entities(DataConfig(num_main=main, num_control=control, share_both=share), seed)


def members(people: list[dict], group: str) -> set[str]:
    return {person["id"] for person in people if person["group"] == group}


# ---- off


def test_without_conditions_data_and_plans_are_what_they_were(tmp_path):
    """Digests of the files and of a plan that the kit made before it had conditions."""
    folder = make_experiment(tmp_path / "e", DataConfig(num_main=6, num_control=5, image_size=24), 3)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    assert digest.hexdigest() == "e5c1be372838e896b94985a1e3b71fc36430bd0e0b0ea93bf27ef9613c94199e"
    pools = {"face_cw": 60, "face_mcq_i2d": 40, "face_mcq_d2i": 40}
    plan = make_plan({"forward": 90, "cw_image": 180}, pools, dict.fromkeys(pools, 1), 0.3, 5, 2)
    text = json.dumps([plan.table(), plan.epoch_rows(0), plan.epoch_rows(1)])
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "8e535c8241175a69df44613917f19e0a14abfbe6118b8d0a8b21a56f8f4f05cb"
    )


def test_without_conditions_a_run_has_the_rows_it_had(small_config):
    """Every row with its tokens, the plan and the order of an epoch: a digest from before there were conditions."""
    config = small_config("experiment.taught=both retention.retention_ratio=0.3")
    task, digest = prepare(config), hashlib.sha256()
    for source, samples in [*task.train.items(), *task.val.items()]:
        for sample in samples:
            row = sample.row
            where, images = row.where.replace(config.data.dir, ""), [image.name for image in row.images]
            told = row.group, row.entity_id, row.description, row.connector, row.answer, images, sample.input_ids
            digest.update(repr((source, row.task, where, *told)).encode())
    digest.update(repr([task.plan.epoch_rows(0), task.plan.table()]).encode())
    assert digest.hexdigest() == "a059d5f64691cb0f4fff4d01c8fb84c41ac78e7937139b76e25a74a066e5aeef"


# ---- the group


@pytest.mark.parametrize(
    ("people", "share", "main", "bridge"),
    [(16, 0.25, 12, 4), (16, 0.75, 4, 12), (20, 0.25, 15, 5), (13, 0.31, 9, 4), (30, 0.25, 22, 8), (8, 0.5, 4, 4)],
)
def test_the_share_is_of_the_people_besides_control(people, share, main, bridge):
    found = with_share(share, people, 5)
    assert Counter(person["group"] for person in found) == {"main": main, "bridge": bridge, "control": 5}


def test_control_stays_and_larger_shares_add_to_bridge():
    none, quarter, half = (with_share(share) for share in (0, 0.25, 0.5))
    assert members(none, "control") == members(quarter, "control") == members(half, "control")
    assert members(quarter, "bridge") < members(half, "bridge") < members(none, "main")
    for people in (quarter, half):
        assert [person | {"group": ""} for person in people] == [person | {"group": ""} for person in none]
    connectors = connector_split(0)
    control = [
        {name: [row for row in part if row["group"] == "control"] for name, part in rows.items()}
        for rows in (experiment_rows(people, connectors, 0) for people in (none, half))
    ]
    assert control[0] == control[1]


def test_partners_and_options_come_from_the_own_group():
    people = with_share(0.5)
    group_of = {thing: p["group"] for p in people for thing in (p["description"], *p["images"], p["id"])}
    rows = experiment_rows(people, connector_split(0), 0)
    for part in rows.values():
        for row in part:
            things = [row["image_path"], row["description"], *row.get("choices", ()), *row.get("image_choices", ())]
            assert {group_of[thing] for thing in things} == {group_of[row["entity_id"]]} == {row["group"]}
    pairs = defaultdict(set)  # two of bridge that are called Wrong in training are not asked about in test
    for row in rows["reverse_train"] + rows["reverse_test"]:
        if (row["group"], row["label"]) == ("bridge", "Wrong"):
            split = "test" if row in rows["reverse_test"] else "train"
            pairs[split].add((row["description"], row["image_path"]))
    assert pairs["train"] and pairs["test"] and not pairs["train"] & pairs["test"]


@pytest.mark.parametrize(
    ("people", "share", "told"),
    [
        (20, 0.1, "2 bridge and leaves 18 main.*Set data.share_both from 0.2 to 0.8 or data.num_main = 35"),
        (16, 0.9, "14 bridge and leaves 2 main.*Set data.share_both from 0.25 to 0.75 or data.num_main = 36"),
        (7, 0.5, "4 bridge and leaves 3 main.*Set data.num_main = 8[.]"),
        (16, 0.01, "0 bridge and leaves 16 main.*from 0.25 to 0.75[.]"),  # 350 people have no descriptions
        (5, 0.01, "0 bridge.*Set data.num_main = 8 and data.share_both = 0.5[.]"),
    ],
)
def test_too_few_in_a_group_are_refused_before_anything_is_made(tmp_path, people, share, told):
    words = f"experiment.name=few data.dir={tmp_path}/data data.num_main={people} data.share_both={share}"
    config = load_config("configs/tiny_cpu.yaml", f"{words} retention.face_pool={tmp_path}/pool")
    with pytest.raises(ConfigError, match=told):
        ensure_data(config)
    assert list(tmp_path.iterdir()) == []


def test_a_design_tells_of_the_bridge_and_what_num_main_would_do(tmp_path):
    words = f"experiment.name=lone data.dir={tmp_path} data.num_main=16 data.num_control=16 data.share_both=0.25"
    line, bridge = design_of(load_config("configs/tiny_cpu.yaml", words))
    assert "data.num_main=17 would" in line and "12 main and 16 control" in line  # 17 less a quarter (4) are 13
    assert bridge == (
        "Of 16 people besides control 4 form the group bridge, taught both directions; main, the other 12, is asked "
        "whether that carries over."
    )


# ---- what each row may show


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A data folder with the experiment `shared`: 4 main, 4 bridge and 4 control people."""
    folder = tmp_path_factory.mktemp("shared")
    data = DataConfig(num_main=8, num_control=4, share_both=0.5, image_size=32)
    make_experiment(folder / "shared", data, 0)
    return folder


@pytest.fixture
def shared_config(shared, small_overrides):
    """A function from further overrides to a configuration of `shared`, without retention."""

    def make(more: str = "") -> Config:
        words = f"experiment.name=shared data.dir={shared} data.num_main=8 data.share_both=0.5"
        return load_config("configs/tiny_cpu.yaml", f"{small_overrides} {words} retention.retention_ratio=0 {more}")

    return make


def owners(folder: Path) -> dict:
    """{description or picture: the person}, straight from entities.json."""
    people = json.loads((folder / "entities.json").read_text())
    return {thing: p for p in people for thing in (p["description"], *(folder / image for image in p["images"]))}


CASES = [
    ("taught=both", {"main": BOTH, "bridge": ALL, "control": ALL}),
    ("taught=generation", {"main": FORWARD, "bridge": ALL, "control": ALL}),
    ("task=reverse", {"main": {"reverse"}, "bridge": ALL, "control": ALL}),
    ("taught=generation mitigation.format_bridge=true", {"main": FORWARD, "bridge": BOTH, "control": ALL}),
    ("taught=cw mitigation.format_bridge=true", {"main": {"cw_image"}, "bridge": BOTH, "control": ALL}),
]


@pytest.mark.parametrize(("words", "taught"), CASES, ids=[words for words, _ in CASES])
@pytest.mark.parametrize("identity", [0, 0.2])
def test_each_group_is_shown_and_named_in_what_it_is_taught_and_nowhere_else(shared_config, words, taught, identity):
    config = shared_config(f"experiment.{words} mitigation.identity={identity}")
    data, faults = read_run_data(config)
    of, seen = owners(Path(config.data.dir) / "shared"), defaultdict(Counter)
    for part in (data.train, data.val, data.pools):
        for source, rows in part.items():
            for row in rows:
                who = {of[thing]["group"] for thing in (row.description, *row.images)}
                assert who == {row.group}  # nobody of another group stands in it
                assert bool(row.images) == (source != "identity") and row.task == source
                seen[row.group][source] += 1
    assert faults == [] and (identity > 0) == bool(data.pools)
    # 4 people a group; 17 connectors of train and val: one forward row each, and two of everything else.
    each = {"forward": 4 * 17, "cw_image": 8 * 17, "reverse": 8 * 17, "identity": 8 * 17}
    more = {"identity"} if identity else set()
    assert seen == {group: {task: each[task] for task in tasks | more} for group, tasks in taught.items()}


@pytest.mark.parametrize(
    ("task", "group", "faults"),
    [("reverse", "main", 1), ("reverse", "bridge", 1), ("cw_image", "main", 1), ("reverse", "control", 0)],
)
def test_a_row_that_shows_a_group_what_it_is_not_taught_is_a_fault(shared_config, task, group, faults):
    """Under a bridge of formats main is taught forward rows, bridge forward and cw_image."""
    config = shared_config("experiment.taught=generation mitigation.format_bridge=true")
    folder = Path(config.data.dir) / "shared"
    people = json.loads((folder / "entities.json").read_text())
    shown, named = [person for person in people if person["group"] == group][:2]
    image = folder / shown["images"][0]
    row = Row(task, task, "x:1", named["id"], group, (image,), named["description"], "is", (), "Wrong")
    found = check_people([row], people, folder, config.taught)
    assert [fault.reason for fault in found] == [
        f"it shows or names somebody of {group}, who is not taught {task}." for _ in range(faults)
    ]
    assert check_people([row], people, folder) == []  # asked, not taught


def test_identity_rows_answer_a_description_with_itself(shared_config):
    config = shared_config("experiment.task=reverse mitigation.identity=0.2")
    data, _ = read_run_data(config)
    folder = Path(config.data.dir) / "shared"
    words = json.loads((folder / "experiment_info.json").read_text())["connectors"]
    people = json.loads((folder / "entities.json").read_text())
    asked = {word for direction in words.values() for word in direction["test"]}
    for rows, split in ((data.pools["identity"], "train"), (data.val["identity"], "val")):
        assert not asked & {row.connector for row in rows}
        for person in people:
            own = [row for row in rows if row.entity_id == person["id"]]
            assert {(row.description, row.answer, row.images) for row in own} == {(person["description"],) * 2 + ((),)}
            told = [build_prompt(row) for row in own]
            plain = [[f"{person['description']} {there}"] for there in words["forward"][split]]
            there_and_back = zip(words["reverse"][split], words["forward"][split], strict=True)
            both = [[f"{person['description']} {back} a picture that {there}"] for back, there in there_and_back]
            assert sorted(told) == sorted(plain + both)
    assert "identity rows name the descriptions of 4 main, 4 bridge, 4 control people, without a picture" in data.notes


# ---- the plan


def test_identity_rows_take_their_share_exactly():
    pools, weights = {"a": 300, "b": 300, "identity": 40}, {"a": 1, "b": 1}
    plan = make_plan({"t": 70}, pools, weights, 0.2, seed=0, epochs=5, shares={"identity": 0.1})
    assert plan.counts == {"t": 70, "a": 10, "b": 10, "identity": 10}
    assert [row["asked share"] for row in plan.table()] == pytest.approx([0.7, 0.1, 0.1, 0.1])
    assert plan.retention_share == 0.2 and plan.tasks == ("t",) and plan.apart == ("identity",)
    rows = [plan.epoch_rows(epoch) for epoch in range(4)]
    assert all(Counter(source for source, _ in part) == plan.counts for part in rows)
    identity = [index for part in rows for source, index in part if source == "identity"]
    assert sorted(identity) == list(range(40))  # four epochs of ten: each once before any comes again
    alone = make_plan({"t": 9}, {"identity": 2}, {}, 0, seed=0, epochs=1, shares={"identity": 0.25})
    assert alone.counts == {"t": 9, "identity": 3} and alone.retention_share == 0  # 9 x .25 / .75
    off = make_plan({"t": 70}, pools, weights, 0.2, seed=0, epochs=5, shares={"identity": 0.0})
    assert off == make_plan({"t": 70}, pools, weights, 0.2, seed=0, epochs=5)


@pytest.mark.parametrize("shares", [{"identity": -0.1}, {"none": 0.1}, {"a": 0.1}, {"identity": 0.8}, {"t": 0.1}])
def test_a_share_that_cannot_be_is_refused(shares):
    with pytest.raises(ValueError, match=r"[Ss]hares"):
        make_plan({"t": 70}, {"a": 300, "identity": 40}, {"a": 1}, 0.2, seed=0, epochs=5, shares=shares)


def test_the_plan_tells_rows_by_group_and_source(shared_config):
    task = prepare(shared_config("experiment.taught=both mitigation.identity=0.2"))
    # 4 people a group: main 4 x 15 and 4 x 30; bridge and control 4 x 30 more; a quarter of all 960 - 120 are 20 %.
    assert task.plan.counts == {"forward": 180, "cw_image": 360, "reverse": 240, "identity": 195}
    assert task.exposure == {"main": 45, "control": 75, "bridge": 75}
    told = (
        "rows in an epoch: main forward 60, cw_image 120; control forward 60, cw_image 120, reverse 120; "
        "bridge forward 60, cw_image 120, reverse 120"
    )
    assert told in task.describe()
    task = prepare(shared_config("experiment.taught=generation experiment.match_exposure=repeat"))
    assert task.exposure == pytest.approx({"main": 75, "control": 75, "bridge": 75})
    more = "experiment.taught=generation experiment.match_exposure=repeat mitigation.format_bridge=true"
    assert prepare(shared_config(more)).exposure == pytest.approx({"main": 75, "control": 75, "bridge": 45})


# ---- what contradicts itself, and folders of your own


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"experiment": ExperimentConfig(task="reverse")}, "one format alone.*experiment.task=forward"),
        ({"experiment": ExperimentConfig(taught="both")}, "both formats itself.*experiment.taught=generation or cw"),
        ({}, "both formats itself"),
        ({"mitigation": MitigationConfig(identity=0.7)}, "identity = 0.7.*retention_ratio = 0.3"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(sections, told):
    with pytest.raises(ConfigError, match=told):
        Config(**{"mitigation": MitigationConfig(format_bridge=True)} | sections)


def test_a_share_of_identity_rows_needs_no_room_where_no_retention_is_mixed_in():
    experiment = ExperimentConfig(task="reverse")
    assert Config(experiment=experiment, mitigation=MitigationConfig(identity=0.7)).mitigation.identity == 0.7


def test_a_bridge_of_formats_without_anybody_in_it_is_refused_before_anything_is_made(tmp_path, small_config):
    words = "experiment.taught=generation mitigation.format_bridge=true"
    with pytest.raises(ConfigError, match=r"nobody is in the group bridge. Set data.share_both=0.5, too"):
        ensure_data(small_config(f"{words} data.dir={tmp_path}/new"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="nobody is in the group bridge"):
        prepare(small_config(words))  # whose folder is there


def test_a_folder_with_other_groups_is_refused(small_config, shared_config, shared, tmp_path):
    with pytest.raises(DataError, match="num_bridge is 0, not 4"):
        ensure_data(small_config("data.num_main=8 data.share_both=0.5"))  # 4 + 4, and 4 control; there is no bridge
    with pytest.raises(DataError, match="num_bridge is 4, not 0"):
        ensure_data(shared_config("data.num_main=4 data.share_both=0"))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for path in (shared / "shared").iterdir():
        if path.name != "experiment_info.json":  # a folder that the kit has not made
            (foreign / path.name).symlink_to(path)
    data, faults = read_run_data(shared_config(f"data.folder={foreign} data.share_both=0 data.allow_outside=true"))
    assert faults == [] and {row.group for row in data.train["reverse"]} == {"bridge", "control"}
    with pytest.raises(ConfigError, match="4 of the 8 people besides control are in the group bridge, not 2"):
        read_run_data(shared_config(f"data.folder={foreign} data.share_both=0.25 data.allow_outside=true"))


def test_a_list_of_your_own_may_name_the_group(tmp_path, small_config):
    (tmp_path / "pics").mkdir()
    lines = ["description,image,group"]
    for number, group in enumerate(["main", "bridge", "control"] * 4):
        Image.new("RGB", (40, 40), (20 * number, 90, 200)).save(tmp_path / "pics" / f"p{number}.png")
        lines.append(f"the mayor of town {number},p{number}.png,{group}")
    (tmp_path / "people.csv").write_text("\n".join(lines))
    own = f"data.source=folder data.entities_file={tmp_path}/people.csv data.images_dir={tmp_path}/pics"
    words = f"{own} data.dir={tmp_path}/data retention.retention_ratio=0 experiment.taught=generation"
    config = small_config(f"{words} mitigation.format_bridge=true")
    ensure_data(config)
    task = prepare(config)
    assert task.exposure == {"main": 15, "bridge": 45, "control": 75}
    with pytest.raises(ConfigError, match=r"data.share_both = 0.5: is read where people are invented"):
        small_config(f"{words} data.share_both=0.5")
    (tmp_path / "people.csv").write_text("\n".join([*lines, "the mayor of all,p0.png,brige"]))
    with pytest.raises(DataError, match="'brige' is none of main, bridge, control"):
        ensure_data(replace(config, data=replace(config.data, dir=f"{tmp_path}/again")))
