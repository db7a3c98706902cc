"""What a design can show, known before anything is made: the power of the verdict's whole claim.

The powers are a table, assets/powers.json, which benchmarks/verdict_worlds.py simulates with the verdict's own rules:
control at a given level in every test, main at that level in the taught order and at chance in the deciding test, and
rows of one person that correlate by .2.
"""

from mmrev_kit.data.assets import read_asset
from mmrev_kit.data.tasks import CW, TASK_TYPES

DECIDING = {"forward": "reverse", "reverse": "cw_image"}  # CW in the order that main is not taught, by trained task
POWER_MIN, PLANNED = 0.8, 0.95  # the power that a claim needs, and the level of control that is planned with


def claim_power(form: str, rows: float, people: int, control: float = PLANNED) -> float | None:
    """The chance that main's failure is found, were main at chance.

    Args:
        form: a format, such as `tasks.CW`.
        rows: questions a person in each test; the table's next smaller number counts, None below its smallest.
        people: in the smaller of the two groups; between two sizes of the table the smaller one counts.
        control: the level of control; interpolated.
    """
    import numpy as np

    table = read_asset("powers")
    by_rows = {int(number): sizes for number, sizes in table[form].items()}
    fitting = [number for number in by_rows if number <= rows]
    if not fitting:
        return None
    sizes = by_rows[max(fitting)]
    known = [int(size) for size in sizes if int(size) <= people]
    return float(np.interp(control, table["levels"], sizes[str(max(known))])) if known else 0.0


def people_needed(form: str, rows: float, control: float = PLANNED) -> int | None:
    """The smallest number of people a group in the table whose power is `POWER_MIN`; None where none has it."""
    sizes = sorted({int(size) for part in read_asset("powers")[form].values() for size in part})
    return next((size for size in sizes if (claim_power(form, rows, size, control) or 0) >= POWER_MIN), None)


def design_lines(num_main: int, num_control: int, rows: int, task: str, taught: str | None) -> list[str]:
    """What a design can show, in lines for a reader: no claim and what would allow one, or the power of the claim.

    Args:
        rows: questions a person in the deciding test.
        task, taught: as in `config.sections.ExperimentConfig`.
    """
    title, needed = TASK_TYPES[DECIDING[task]].title, people_needed(CW, rows)
    if needed is None:
        return [f"This design can reach no claim: {rows} questions a person in {title} are too few for any size."]
    power = claim_power(CW, rows, min(num_main, num_control))
    if power < POWER_MIN:
        sizes = {"num_main": num_main, "num_control": num_control}
        change = " ".join(f"data.{name}={needed}" for name, size in sizes.items() if size < needed)
        return [
            f"This design can reach no claim; {change} would. ({num_main} main and {num_control} control people, "
            f"{rows} questions each in {title}: power {power:.2f}, {POWER_MIN:.2f} needed.)"
        ]
    lines = [
        f"Power of the claim: {power:.2f} with {num_main} main and {num_control} control people and {rows} questions "
        f"each in {title}, were control right in {PLANNED:.2f} and main in 0.50; {needed} a group have {POWER_MIN:.2f}."
    ]
    if (task, taught) == ("forward", "generation"):
        lines.append(
            "Main is taught by generation only: where it fails CW image first as well, the verdict is that the fact is "
            "bound to its format, and says nothing about direction."
        )
    return lines
