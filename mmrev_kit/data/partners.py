"""Who stands beside whom: connectors, wrong partners, options, and the rows that come of them."""

from __future__ import annotations

import random

from mmrev_kit.config.seeds import rng_for
from mmrev_kit.data.tasks import GROUPS

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
Connectors = dict[str, dict[str, list[str]]]
Rows = dict[str, list[dict]]


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
