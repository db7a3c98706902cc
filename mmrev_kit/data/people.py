"""Experiments: invented people, each with one invented fact, and the rows that teach and test it.

Every person is drawn, named and given a description, "the {role} of {place}". Who stands beside whom in the rows is
`partners.experiment_rows`'s to say; `make_experiment` draws the pictures and writes the folder.
"""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mmrev_kit.config.reporting import paced
from mmrev_kit.config.sections import ConfigError, DataConfig
from mmrev_kit.config.seeds import rng_for
from mmrev_kit.data.assets import read_asset
from mmrev_kit.data.faces import credits, draw_face, sample_faces
from mmrev_kit.data.partners import Rows, connector_split, experiment_rows
from mmrev_kit.data.tasks import GROUPS, MIN_GROUP
from mmrev_kit.files import fresh_folder, write_json, write_jsonl

ROLES, PLACES = read_asset("people")["roles"], read_asset("people")["places"]
FACTS = [f"the {role} of {place}" for role in ROLES for place in PLACES]
MAX_ENTITIES = len(FACTS)
ENTITY_FIELDS = (
    "id", "name", "gender", "age", "hair_color", "eye_color", "nationality", "profession", "hobby", "description",
    "face_prompt", "group", "images",
)  # fmt: skip


def check_groups(data: DataConfig) -> None:
    """Raise ConfigError, with what to do, if the configured groups cannot make an experiment."""
    if data.num_main < 1:
        raise ConfigError(f"data.num_main = {data.num_main}: an experiment needs main entities. Set 4 or more.")
    if data.num_control < 0:
        raise ConfigError(f"data.num_control = {data.num_control}: set 0 for no control group, or 4 or more.")
    for group, size in (("main", data.num_main), ("control", data.num_control)):
        if 0 < size < MIN_GROUP:
            raise ConfigError(
                f"data.num_{group} = {size}: wrong partners and the four options of a question come from the "
                f"entity's own group. Set data.num_{group} to {MIN_GROUP} or more."
            )
    if data.share_both:
        _check_share(data)
    total = data.num_main + data.num_control
    if total > MAX_ENTITIES:
        raise ConfigError(
            f"data.num_main + data.num_control = {total}: there are {MAX_ENTITIES} different descriptions "
            f"({len(ROLES)} roles x {len(PLACES)} places). Ask for {MAX_ENTITIES} entities or fewer."
        )


def _check_share(data: DataConfig) -> None:
    """Raise ConfigError, with what would do, if `data.share_both` leaves too few people in main or bridge."""

    def fits(people: int) -> bool:
        sizes = DataConfig(num_main=people, share_both=data.share_both).group_sizes
        return min(sizes["main"], sizes["bridge"]) >= MIN_GROUP

    if fits(data.num_main):
        return
    sizes, most = data.group_sizes, MAX_ENTITIES - data.num_control
    ends = [round(share / data.num_main, 3) for share in (MIN_GROUP, data.num_main - MIN_GROUP)]
    ways = [f"data.share_both from {ends[0]:g} to {ends[1]:g}"] if ends[0] <= ends[1] else []
    enough = next(filter(fits, range(data.num_main, most + 1)), None)
    ways += [f"data.num_main = {enough}"] if enough else []
    raise ConfigError(
        f"data.share_both = {data.share_both:g}: of the {data.num_main} people besides control (data.num_main) it "
        f"makes {sizes['bridge']} bridge and leaves {sizes['main']} main, and wrong partners and the four options of a "
        f"question come from the entity's own group: {MIN_GROUP} of each are needed. Set "
        f"{' or '.join(ways or [f'data.num_main = {2 * MIN_GROUP} and data.share_both = 0.5'])}."
    )


def entity_record(**known) -> dict:
    """An entity as it stands in `entities.json`: every field, None where nothing is known, then any further ones."""
    return dict.fromkeys(ENTITY_FIELDS) | known


def make_entities(data: DataConfig, seed: int) -> list[dict]:
    """The people of an experiment, with the fields of an `entities.json`; group membership is drawn at random.

    Fields that a drawing cannot show are None. `images` are paths relative to the experiment folder.

    Raises:
        ConfigError: groups too small or too large (see `check_groups`).
    """
    check_groups(data)
    total = data.num_main + data.num_control
    faces = sample_faces(rng_for(seed, "faces"), total, "experiment")
    facts = rng_for(seed, "descriptions").sample(FACTS, total)
    names = _invent_names(rng_for(seed, "names"), total)
    groups = ["main"] * data.num_main + ["control"] * data.num_control
    rng_for(seed, "groups").shuffle(groups)
    main = [number for number, group in enumerate(groups) if group == "main"]
    rng_for(seed, "bridge").shuffle(main)  # a larger share adds people to bridge, and changes nobody of control
    for number in main[: data.group_sizes["bridge"]]:
        groups[number] = "bridge"
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
    words = [a + b for a in read_asset("people")["first_syllables"] for b in read_asset("people")["last_syllables"]]
    return [f"{words[i % len(words)]} {words[i // len(words)]}" for i in rng.sample(range(len(words) ** 2), count)]


def write_experiment(
    folder: str | Path, entities: list[dict], rows: Rows, draw: Callable[[Path], None], **info
) -> Path:
    """Write an experiment: entities.json, images/, the row files and experiment_info.json, whole or not at all.

    Args:
        folder: where to make it, data/<name>.
        draw: writes the entities' pictures into the folder that it is given, in which images/ is there.
        info: what experiment_info.json says besides who made it and the sizes of the groups.

    Raises:
        FileExistsError: the folder exists; it is not touched.
    """
    with fresh_folder(folder) as building:
        (building / "images").mkdir()
        draw(building)
        write_json(building / "entities.json", entities)
        counts: dict[str, dict[str, int]] = {}
        for name, part in rows.items():
            write_jsonl(building / f"{name}.jsonl", part)
            task, _, split = name.rpartition("_")
            counts.setdefault(task, {})[split] = len(part)
        found = Counter(entity["group"] for entity in entities)
        sizes = {f"num_{group}": found[group] for group in GROUPS if found[group] or group != "bridge"}
        write_json(building / "experiment_info.json", {"made_by": "mmrev_kit", **sizes, "counts": counts, **info})
    return Path(folder)


def make_experiment(folder: str | Path, data: DataConfig, seed: int) -> Path:
    """Make a drawn experiment, see `write_experiment`. Equal arguments give equal bytes.

    Raises:
        ConfigError: groups too small or too large (see `check_groups`).
    """
    entities, connectors = make_entities(data, seed), connector_split(seed)

    def draw(building: Path) -> None:
        views = [(entity, view, path) for entity in entities for view, path in enumerate(entity["images"])]
        for entity, view, path in paced(views, "pictures"):
            draw_face(entity["attributes"], data.image_size, view).save(building / path)

    info = {"source": "drawn", "seed": seed, "image_size": data.image_size, "images_per_entity": data.images_per_entity}
    info |= {"connectors": connectors, "image_credits": credits()}
    return write_experiment(folder, entities, experiment_rows(entities, connectors, seed), draw, **info)
