"""What a design can show, known before anything is made: the power of the verdict's whole claim.

The powers are a table, assets/powers.json, which benchmarks/verdict_worlds.py simulates with the verdict's own rules:
control at a given level in every test, main at that level in the taught order and at chance in the deciding test, and
rows of one person that correlate by .2.
"""

import json
import random
from collections import Counter, defaultdict

from mmrev_kit.config.project import experiment_dir
from mmrev_kit.config.sections import Config, DataConfig
from mmrev_kit.data.assets import read_asset
from mmrev_kit.data.faults import DataError
from mmrev_kit.data.partners import partner_shifts
from mmrev_kit.data.people import MAX_ENTITIES
from mmrev_kit.data.records import read_jsonl
from mmrev_kit.data.rows import read_entities
from mmrev_kit.data.tasks import CW, MIN_GROUP, TASK_TYPES

DECIDING = {"forward": "reverse", "reverse": "cw_image"}  # CW in the order that main is not taught, by trained task
QUESTIONS = 9  # different ones a person in a CW test of drawn data: on 3 connectors a Correct and two Wrong ones
POWER_MIN, PLANNED = 0.8, 0.95  # the power that a claim needs, and the level of control that is planned with


def claim_power(form: str, questions: float, people: int, control: float = PLANNED) -> float | None:
    """The chance that main's failure is found, were main at chance.

    Args:
        form: a format, such as `tasks.CW`.
        questions: different ones a person in each test; the table's next smaller number counts.
        people: in the smaller of the two groups; between two sizes of the table the smaller one counts.
        control: the level of control; interpolated.

    Returns:
        None for fewer questions than any in the table, 0 for fewer people.
    """
    import numpy as np

    table = read_asset("powers")
    fitting = [int(number) for number in table[form] if int(number) <= questions]
    if not fitting:
        return None
    sizes = table[form][str(max(fitting))]
    known = [int(size) for size in sizes if int(size) <= people]
    return float(np.interp(control, table["levels"], sizes[str(max(known))])) if known else 0.0


def people_needed(form: str, questions: float, control: float = PLANNED) -> int | None:
    """The smallest number of people a group in the table whose power is `POWER_MIN`; None where none has it."""
    sizes = sorted({int(size) for part in read_asset("powers")[form].values() for size in part})
    return next((size for size in sizes if (claim_power(form, questions, size, control) or 0) >= POWER_MIN), None)


def drawn_questions(size: int) -> int:
    """Different questions a person in a CW test of a group of `size`: with one wrong partner each comes twice."""
    partners = len(partner_shifts(size, random.Random(0))["test"]) if size >= MIN_GROUP else 2
    return QUESTIONS if partners > 1 else 6


def design_lines(
    num_main: int, num_control: int, questions: int, task: str, taught: str | None, share_both: float = 0.0,
    in_larger: int | None = None,
) -> list[str]:  # fmt: skip
    """What a design can show, in lines for a reader: no claim and what would allow one, or the power of the claim.

    Args:
        questions: different ones a person in the deciding test.
        in_larger: as many in groups of the size that is needed; None: as in these.
        task, taught: as in `config.sections.ExperimentConfig`.
        share_both: as in `config.sections.DataConfig`.
    """
    title, needed = TASK_TYPES[DECIDING[task]].title, people_needed(CW, in_larger or questions)
    counts = f"{num_main} main and {num_control} control people with {questions} questions each in {title}"
    if needed is None:
        return [f"This design can reach no claim: {counts}, too few questions for any number of people."]
    power = claim_power(CW, questions, min(num_main, num_control))
    if power < POWER_MIN:
        shared = (DataConfig(num_main=people, share_both=share_both) for people in range(needed, MAX_ENTITIES + 1))
        besides = next((data.num_main for data in shared if data.group_sizes["main"] >= needed), None)
        more = f"data.num_main={besides}" if besides else "a smaller data.share_both"
        sizes = {more: num_main, f"data.num_control={needed}": num_control}
        change = " ".join(name for name, size in sizes.items() if size < needed)
        cause = f"{counts} have a power of {power:.2f}, {POWER_MIN:.2f} is needed"
        return [f"This design can reach no claim; {change} would. ({cause}.)"]
    lines = [
        f"The claim's power is {power:.2f}: {counts}, were control right in {PLANNED:.2f} and main in 0.50 of them. "
        f"{needed} people a group have {POWER_MIN:.2f}."
    ]
    if (task, taught) == ("forward", "generation"):
        lines.append(
            "Main is taught by generation only: where it fails CW image first as well, what it was taught is bound to "
            "its format, and the verdict says nothing about direction."
        )
    return lines


def design_of(config: Config) -> list[str]:
    """`design_lines` of a configuration: of its experiment if that exists, else of the people that would be drawn.

    No lines where that cannot be known: your own people before they are read, the format check, and data with faults,
    which the check tells.
    """
    folder, own = experiment_dir(config), config.experiment
    if config.data.source == "shapes" or (config.data.source == "folder" and not folder.exists()):
        return []
    sizes, asked = Counter(config.data.group_sizes), defaultdict(set)
    if folder.exists():
        try:
            sizes = Counter(entity.get("group", "main") for entity in read_entities(folder))
        except DataError:
            return []
        for _, record in read_jsonl(folder / "reverse_test.jsonl")[0]:  # cw_image asks as many
            asked[str(record.get("entity_id"))].add(json.dumps(record, sort_keys=True))
        if not asked:
            return []
    drawn = min((drawn_questions(size) for size in (sizes["main"], sizes["control"]) if size), default=QUESTIONS)
    questions = min(map(len, asked.values())) if asked else drawn
    larger = QUESTIONS if questions == drawn else None  # as the kit asks; other files may ask as often in any group
    counts = sizes["main"], sizes["control"], questions
    lines = design_lines(*counts, own.task, own.taught, config.data.share_both, larger)
    if sizes["bridge"]:
        lesson = "both formats of the taught direction" if config.mitigation.format_bridge else "both directions"
        people, bridge = sizes["main"] + sizes["bridge"], sizes["bridge"]
        asked = f"main, the other {sizes['main']}, is asked whether that carries over"
        lines.append(f"Of {people} people besides control {bridge} form the group bridge, taught {lesson}; {asked}.")
    return lines
