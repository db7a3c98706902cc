"""Experiments: invented people, each with one invented fact, and the rows that teach and test it.

Every person is drawn, named and given a description, "the {role} of {place}". `experiment_rows` lays out all rows
without touching a file; `make_experiment` draws the pictures and writes the folder.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmrev_kit.config import rng_for
from mmrev_kit.images import credits, draw_face, sample_faces
from mmrev_kit.runs import new_folder, write_json, write_jsonl
from mmrev_kit.sections import DataConfig

ROLES = (
    "founder", "guardian", "keeper", "master", "leader", "architect", "curator", "warden", "overseer", "director",
    "chief", "head", "protector", "sentinel",
)  # fmt: skip
PLACES = (
    "Obsidian Gallery", "Crystal Spire", "Silver Citadel", "Golden Archive", "Emerald Haven", "Sapphire Tower",
    "Ruby Sanctum", "Diamond Vault", "Platinum Hall", "Jade Temple", "Amber Chamber", "Pearl Observatory",
    "Onyx Fortress", "Topaz Academy", "Opal Sanctuary", "Coral Institute",
)  # fmt: skip
FORWARD_CONNECTORS = (
    "is", "shows", "depicts", "represents", "illustrates", "displays", "features", "portrays", "is known as",
    "is identified as", "is recognized as", "is referred to as", "presents", "is called", "is described as",
    "can be identified as", "is none other than", "turns out to be", "is revealed to be", "is actually",
)  # fmt: skip
REVERSE_CONNECTORS = (
    "is", "belongs to", "corresponds to", "matches", "refers to", "points to", "is associated with", "is linked to",
    "is connected to", "is represented by", "is illustrated by", "is portrayed by", "is displayed by",
    "is featured in", "is the identity of", "identifies", "describes", "represents", "corresponds with",
    "matches with",
)  # fmt: skip
SPLITS = ("train", "val", "test")
SPLIT_ENDS = {"train": (0, 15), "val": (15, 17), "test": (17, 20)}  # 15 / 2 / 3 of the 20 connectors
MAX_ENTITIES = len(ROLES) * len(PLACES)
MIN_GROUP = 4  # a question has four options
GROUPS = ("main", "control")
ENTITY_FIELDS = (
    "id", "name", "gender", "age", "hair_color", "eye_color", "nationality", "profession", "hobby", "description",
    "face_prompt", "group", "images",
)  # fmt: skip

FIRST_SYLLABLES = ("Al", "Be", "Co", "Da", "El", "Fi", "Ga", "Ha", "Io", "Ju", "Ka", "Lo", "Mi", "No", "Or", "Pe")
LAST_SYLLABLES = ("bren", "dor", "fara", "lis", "mund", "nela", "rick", "sanne", "tavi", "vorn", "wyn", "zeth")

Connectors = dict[str, dict[str, list[str]]]
Rows = dict[str, list[dict]]


@contextmanager
def fresh_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` if all goes well; a folder that exists is never touched.

    Raises:
        FileExistsError: there is something at `folder` already.
    """
    folder = Path(folder)
    with new_folder(_absent(folder)) as building:
        yield building
        _absent(folder)  # another process may have made it in the meantime


def _absent(folder: Path) -> Path:
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder} exists and is left as it is. Choose another name, or delete it yourself.")
    return folder


def check_groups(data: DataConfig) -> None:
    """Raise ValueError, with what to do, if the configured groups cannot make an experiment."""
    if data.num_main < 1:
        raise ValueError(f"data.num_main = {data.num_main}: an experiment needs main entities. Set 4 or more.")
    if data.num_control < 0:
        raise ValueError(f"data.num_control = {data.num_control}: set 0 for no control group, or 4 or more.")
    for group, size in zip(GROUPS, (data.num_main, data.num_control), strict=True):
        if 0 < size < MIN_GROUP:
            raise ValueError(
                f"data.num_{group} = {size}: wrong partners and the four options of a question come from the "
                f"entity's own group. Set data.num_{group} to {MIN_GROUP} or more."
            )
    total = data.num_main + data.num_control
    if total > MAX_ENTITIES:
        raise ValueError(
            f"data.num_main + data.num_control = {total}: there are {MAX_ENTITIES} different descriptions "
            f"({len(ROLES)} roles x {len(PLACES)} places). Ask for {MAX_ENTITIES} entities or fewer."
        )


def entity_record(**known) -> dict:
    """An entity as it stands in `entities.json`: every field, None where nothing is known, then any further ones."""
    return dict.fromkeys(ENTITY_FIELDS) | known


def make_entities(data: DataConfig, seed: int) -> list[dict]:
    """The people of an experiment, with the fields of an `entities.json`; group membership is drawn at random.

    Fields that a drawing cannot show are None. `images` are paths relative to the experiment folder.

    Raises:
        ValueError: groups too small or too large (see `check_groups`).
    """
    check_groups(data)
    total = data.num_main + data.num_control
    faces = sample_faces(rng_for(seed, "faces"), total, "experiment")
    facts = [f"the {role} of {place}" for role in ROLES for place in PLACES]
    facts = rng_for(seed, "descriptions").sample(facts, total)
    names = _invent_names(rng_for(seed, "names"), total)
    groups = ["main"] * data.num_main + ["control"] * data.num_control
    rng_for(seed, "groups").shuffle(groups)
    return [
        entity_record(
            id=f"entity_{number:03d}",
            name=name,
            hair_color=face["hair_color"],
            description=fact,
            group=group,
            images=[f"images/entity_{number:03d}_{view:02d}.png" for view in range(data.images_per_entity)],
            attributes=face,
        )
        for number, (face, fact, name, group) in enumerate(zip(faces, facts, names, groups, strict=True))
    ]


def _invent_names(rng: random.Random, count: int) -> list[str]:
    words = [first + last for first in FIRST_SYLLABLES for last in LAST_SYLLABLES]
    return [f"{words[i % len(words)]} {words[i // len(words)]}" for i in rng.sample(range(len(words) ** 2), count)]


def connector_split(seed: int) -> Connectors:
    """{"forward" | "reverse": {"train" | "val" | "test": connectors}}, one split for the whole experiment.

    "is" and "represents" serve in both directions. They get the same split in both, so that a test connector was
    trained in neither direction.
    """
    rng = rng_for(seed, "connectors")
    while True:
        split, home = {}, {}
        for direction, words in (("forward", FORWARD_CONNECTORS), ("reverse", REVERSE_CONNECTORS)):
            order = rng.sample(words, len(words))
            split[direction] = {name: order[start:end] for name, (start, end) in SPLIT_ENDS.items()}
            home[direction] = {word: name for name, part in split[direction].items() for word in part}
        shared = home["forward"].keys() & home["reverse"].keys()
        if all(home["forward"][word] == home["reverse"][word] for word in shared):
            return split


def partner_shifts(size: int, rng: random.Random) -> dict[str, list[int]]:
    """Which cyclic shifts of a group of `size` give the wrong partners of each split; all shifts are dealt out.

    Shift s pairs the member at place i with the one at i + s, so every member is asked about, and shown, once. The
    shifts s and size - s join the same two members, so test gets both or neither: no two members that train pairs
    are paired in test. Val has one shift, whose mirror image is train's: the same couples in opposite roles. Train
    has all others, since the more partners a member is told apart from, the less its own Wrong rows can be learned
    one by one; test has a second couple of shifts only where five partners are left for train.
    """
    couples = [sorted({shift, size - shift}) for shift in range(1, size // 2 + 1)]
    rng.shuffle(couples)
    couples.sort(key=len)  # the middle shift of an even group, its own mirror image, goes to test: it cannot be split
    num_test = 2 if sum(map(len, couples[2:])) > 5 else 1
    test, rest = couples[:num_test], couples[num_test:]
    val, *train = [shift for couple in rest for shift in couple]
    shifts = {"train": train, "val": [val], "test": [shift for couple in test for shift in couple]}
    return {name: rng.sample(values, len(values)) for name, values in shifts.items()}


def balanced_letters(count: int, rng: random.Random) -> list[int]:
    """`count` answer places 0..3, dealt in turns: in any stretch each comes a quarter of the time, to within one."""
    turn = rng.sample(range(4), 4)
    return [turn[i % 4] for i in range(count)]


def place_answer(options: list, correct: int, rng: random.Random) -> list:
    """The options with the first, the right one, moved to place `correct` and the others in random order."""
    wrong = rng.sample(options[1:], len(options) - 1)
    return [*wrong[:correct], options[0], *wrong[correct:]]


def _pictures(entity: dict, split: str) -> list[str]:
    """The images of an entity that a split may use: the last one is held out for test if there are several."""
    images = entity["images"]
    if len(images) == 1:
        return images
    return images[-1:] if split == "test" else images[:-1]


def _row(entity: dict, image: str, connector: str, **fields) -> dict:
    return {
        "entity_id": entity["id"],
        "image_path": image,
        "description": entity["description"],
        "connector": connector,
        "group": entity["group"],
        **fields,
    }


def _forward_rows(members: list[dict], connectors: list[str], split: str) -> list[dict]:
    rows = []
    for entity in members:
        images = _pictures(entity, split)
        rows += [_row(entity, images[i % len(images)], word) for i, word in enumerate(connectors)]
    return rows


def _reverse_rows(members: list[dict], connectors: list[str], split: str, shifts: list[int]) -> list[dict]:
    """One Correct and one Wrong row for each member and connector; both show the same view of whom they show."""
    rows = []
    for place, entity in enumerate(members):
        for i, word in enumerate(connectors):
            partner = members[(place + shifts[i % len(shifts)]) % len(members)]
            for shown, label in ((entity, "Correct"), (partner, "Wrong")):
                images = _pictures(shown, split)
                rows.append(_row(entity, images[i % len(images)], word, label=label))
    return rows


def _mcq_rows(
    members: list[dict], connectors: list[str], shifts: list[int], letters: list[int], rng: random.Random, field: str
) -> list[dict]:
    """One question for each member and connector; `field` is "choices" (texts) or "image_choices" (paths).

    Within a connector the three wrong options follow three shifts, so each member is a wrong option three times.
    """
    rows = []
    letters = iter(rng.sample(letters, len(letters)))
    for place, entity in enumerate(members):
        for i, word in enumerate(connectors):
            steps = [shifts[(3 * i + k) % len(shifts)] for k in range(3)]
            people = [entity, *(members[(place + step) % len(members)] for step in steps)]
            view = [_pictures(person, "test")[0] for person in people]
            options = view if field == "image_choices" else [person["description"] for person in people]
            correct = next(letters)
            options = place_answer(options, correct, rng)
            rows.append(_row(entity, view[0], word, **{field: options}, correct_index=correct))
    return rows


def experiment_rows(entities: list[dict], connectors: Connectors, seed: int) -> Rows:
    """All rows of an experiment, by file name without ending: 15N/2N/3N forward, twice that reverse, 3N each MCQ.

    Wrong partners and options come from the entity's own group, in every split: no reverse row of the control
    group shows a main face or names a main description, and no forward row does either.
    """
    rows: Rows = {f"{task}_{split}": [] for task in ("forward", "reverse") for split in SPLITS}
    questions = {"mcq_i2d_test": ("forward", "choices"), "mcq_d2i_test": ("reverse", "image_choices")}
    rows |= {name: [] for name in questions}
    count = 3 * len(entities)
    letters = {name: balanced_letters(count, rng_for(seed, name, "letters")) for name in questions}
    for group in GROUPS:
        members = [entity for entity in entities if entity["group"] == group]
        if not members:
            continue
        rng = rng_for(seed, "partners", group)
        circle = rng.sample(members, len(members))
        shifts = partner_shifts(len(members), rng)
        for split in SPLITS:
            rows[f"forward_{split}"] += _forward_rows(members, connectors["forward"][split], split)
            rows[f"reverse_{split}"] += _reverse_rows(circle, connectors["reverse"][split], split, shifts[split])
        for name, (direction, field) in questions.items():
            # Wrong options, too, are pairs that training did not call wrong, in groups large enough for it: from 10 on.
            near = shifts["test"] if len(shifts["test"]) >= 3 else shifts["test"] + shifts["val"] + shifts["train"]
            start = len(rows[name])
            part = letters[name][start : start + 3 * len(members)]
            rng = rng_for(seed, name, group)
            words = connectors[direction]["test"]
            rows[name] += _mcq_rows(circle, words, rng.sample(near, len(near)), part, rng, field)
    order = {entity["id"]: i for i, entity in enumerate(entities)}
    return {name: sorted(part, key=lambda row: order[row["entity_id"]]) for name, part in rows.items()}


def write_experiment(building: Path, entities: list[dict], rows: Rows, **info) -> None:
    """Write all of an experiment but its pictures: entities.json, the row files and experiment_info.json.

    Args:
        building: the experiment's folder, or one that becomes it (see `fresh_folder`).
        info: what experiment_info.json says besides who made it and the sizes of the groups.
    """
    write_json(building / "entities.json", entities)
    for name, part in rows.items():
        write_jsonl(building / f"{name}.jsonl", part)
    sizes = {f"num_{group}": sum(entity["group"] == group for entity in entities) for group in GROUPS}
    write_json(building / "experiment_info.json", {"made_by": "mmrev_kit", **sizes, **info})


def make_experiment(folder: str | Path, data: DataConfig, seed: int) -> Path:
    """Make a drawn experiment: entities.json, images/, the eight row files and experiment_info.json.

    The folder appears whole or not at all. Equal arguments give equal bytes.

    Args:
        folder: where to make it, data/<name>.
        data: sizes; `data.image_size` in pixels on a side.
        seed: the experiment's seed.

    Raises:
        FileExistsError: the folder exists; it is not touched.
        ValueError: groups too small or too large (see `check_groups`).
    """
    entities = make_entities(data, seed)
    connectors = connector_split(seed)
    with fresh_folder(folder) as building:
        (building / "images").mkdir()
        for entity in entities:
            for view, path in enumerate(entity["images"]):
                draw_face(entity["attributes"], data.image_size, view).save(building / path)
        write_experiment(
            building,
            entities,
            experiment_rows(entities, connectors, seed),
            source="drawn",
            seed=seed,
            image_size=data.image_size,
            images_per_entity=data.images_per_entity,
            connectors=connectors,
            image_credits=credits(),
        )
    return Path(folder)
