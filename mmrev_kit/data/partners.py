"""How wrong partners are drawn: who stands beside whom in an experiment's rows, and with which connector.

The members of a group (main, bridge or control) are put on a circle in random order. Asked about a member, a Wrong
row shows the one who sits a certain number of seats further on, the shift; the wrong options of a question sit at three
shifts.
`partner_shifts` deals the shifts out to train, val and test: a pair that training calls wrong, in either order of CW,
is not asked about in test, and in groups of 10 and more it is no wrong option either. `experiment_rows` makes all rows
in this way.
"""

import random

from mmrev_kit.config.seeds import rng_for
from mmrev_kit.data.tasks import CHOICE, CONNECTORS, CW, EXPERIMENT_FILES, GENERATION, GROUPS, IMAGE_TO_TEXT, TaskType

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
        for direction, words in CONNECTORS.items():
            order = rng.sample(words, len(words))
            split[direction] = {name: order[start:end] for name, (start, end) in SPLIT_ENDS.items()}
            home[direction] = {word: name for name, part in split[direction].items() for word in part}
        shared = home["forward"].keys() & home["reverse"].keys()
        if all(home["forward"][word] == home["reverse"][word] for word in shared):
            return split


def partner_shifts(size: int, rng: random.Random) -> dict[str, list[int]]:
    """Which cyclic shifts of a group of `size` give the wrong partners of each split; all shifts are dealt out.

    Shift s pairs the member at seat i with the one at seat i + s, so every member is asked about, and shown, once. The
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
    """`count` answer positions 0..3, dealt in rounds: in any stretch each is a quarter of them, to within one."""
    order = rng.sample(range(4), 4)
    return [order[i % 4] for i in range(count)]


def place_answer(options: list, correct: int, rng: random.Random) -> list:
    """The options with the first, the right one, moved to position `correct` and the others in random order."""
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


def _taught_rows(
    task: TaskType, circle: list[dict], connectors: list[str], split: str, shifts: list[int]
) -> list[dict]:
    """For each member and connector one row, or in CW one Correct and one Wrong row, in test two of each.

    The first thing that a prompt says is the member's: a Wrong row shows the member with a partner's description
    where the image comes first, the member's description with a partner's image where the description does.
    """
    rows = []
    repeats = 2 if (task.format, split) == (CW, "test") else 1  # the more a person is asked, the surer the verdict
    for seat, entity in enumerate(circle):
        for i, word in enumerate(word for word in connectors for _ in range(repeats)):
            partner = circle[(seat + shifts[i % len(shifts)]) % len(circle)]
            shown, named = (entity, partner) if task.direction == IMAGE_TO_TEXT else (partner, entity)
            wrong = (shown, {"label": "Wrong", "description": named["description"]})
            labelled = [(entity, {"label": "Correct"}), wrong]
            for person, fields in [(entity, {})] if task.format == GENERATION else labelled:
                images = _pictures(person, split)  # both show the same view of whom they show
                rows.append(_row(entity, images[i // repeats % len(images)], word, **fields))
    return rows


def _choice_rows(
    task: TaskType, circle: list[dict], connectors: list[str], shifts: list[int], letters: list[int], rng: random.Random
) -> list[dict]:
    """One question for each member and connector; within a connector each member is a wrong option three times."""
    rows = []
    letters = iter(rng.sample(letters, len(letters)))
    for seat, entity in enumerate(circle):
        for i, word in enumerate(connectors):
            steps = [shifts[(3 * i + k) % len(shifts)] for k in range(3)]
            people = [entity, *(circle[(seat + step) % len(circle)] for step in steps)]
            views = [_pictures(person, "test")[0] for person in people]
            options = views if task.options == "image_choices" else [person["description"] for person in people]
            correct = next(letters)
            fields = {task.options: place_answer(options, correct, rng), "correct_index": correct}
            rows.append(_row(entity, views[0], word, **fields))
    return rows


def experiment_rows(entities: list[dict], connectors: Connectors, seed: int) -> Rows:
    """All rows of an experiment, by file name without ending: 15N/2N/3N forward, 30N/4N/12N CW in each order, 3N each
    MCQ.

    Wrong partners and options come from the entity's own group, in every split: no row of another group shows a
    main face or names a main description.
    """
    rows: Rows = {name: [] for name in EXPERIMENT_FILES}
    letters = {
        name: balanced_letters(3 * len(entities), rng_for(seed, name, "letters"))
        for name, task in EXPERIMENT_FILES.items()
        if task.format == CHOICE
    }
    for group in GROUPS:
        members = [entity for entity in entities if entity["group"] == group]
        if not members:
            continue
        rng = rng_for(seed, "partners", group)
        circle = rng.sample(members, len(members))
        shifts = partner_shifts(len(members), rng)
        for name, task in EXPERIMENT_FILES.items():
            split = name.removeprefix(f"{task.name}_")
            words = connectors[task.connectors][split]
            if task.format != CHOICE:
                rows[name] += _taught_rows(task, circle, words, split, shifts[split])
                continue
            # Wrong options, too, are pairs that training did not call wrong, in groups large enough for it: from 10 on.
            near = shifts["test"] if len(shifts["test"]) >= 3 else shifts["test"] + shifts["val"] + shifts["train"]
            start = len(rows[name])
            own, rng = letters[name][start : start + 3 * len(members)], rng_for(seed, name, group)
            rows[name] += _choice_rows(task, circle, words, rng.sample(near, len(near)), own, rng)
    order = {entity["id"]: i for i, entity in enumerate(entities)}
    return {name: sorted(part, key=lambda row: order[row["entity_id"]]) for name, part in rows.items()}
