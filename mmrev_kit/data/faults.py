"""What can be wrong with data: one fault, and the error that tells all of them."""

from collections import Counter
from dataclasses import dataclass

from mmrev_kit.config.errors import Told

SHOWN = 20  # faults that a message names


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with the data: where (file:line), what, and what to do about it."""

    where: str
    reason: str
    advice: str
    of_row: bool = False  # of one row, which may be dropped when asked to

    def __str__(self) -> str:
        return f"{self.where}: {self.reason} {self.advice}"


class DataError(Told, ValueError):
    """The data cannot be used; `faults` holds every fault that was found, and the message names the first of them."""

    def __init__(self, faults: list[Fault], what: str = "the data"):
        self.faults = list(dict.fromkeys(faults))  # a file that is read twice has its faults twice
        lines = [str(fault) for fault in self.faults[:SHOWN]]
        if len(self.faults) > SHOWN:
            lines.append(f"... and {len(self.faults) - SHOWN} more.")
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{count} in {what}:\n" + "\n".join(lines))


def raise_faults(faults: list[Fault], drop: bool) -> None:
    """Stop on faults; with `drop`, go on without the rows that have one, and say how many and why.

    Raises:
        DataError: with every fault, or, with `drop`, with those that are no single row's.
    """
    fatal = [fault for fault in faults if not (drop and fault.of_row)]
    if fatal:
        raise DataError(fatal)
    if faults:
        reasons = Counter(fault.reason.split(":")[-1].strip() for fault in faults)
        print(f"{len({fault.where for fault in faults})} rows dropped (data.drop_faulty): ", end="")
        print("; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5)))
        print("\n".join(f"  {fault.where}" for fault in faults[:SHOWN]))
