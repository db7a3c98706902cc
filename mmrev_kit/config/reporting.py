"""How numbers, durations and progress are said, everywhere in the same way."""

import math
import time
from decimal import ROUND_HALF_UP, Decimal

LINES = 10  # of progress in a job, one a tenth of it; more where a tenth takes longer than SECONDS
SECONDS = 600.0
MARK = "progress: "  # what a line of a log begins with that a notebook shows too


def decimal(value: float | None, digits: int = 2) -> str:
    """A share, a log-probability or GiB, rounded half up as by hand (0.375 is 0.38); nothing for None and NaN.

    `round` and format strings round what the binary number is: 0.285 to 0.28, and 0.125 to 0.12.
    """
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value):
        return str(value)
    return str(Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP) + 0)


def probability(p: float | None) -> str:
    """A p value: three digits, or < 0.001."""
    return "< 0.001" if p is not None and p < 0.001 else decimal(p, 3)


def loss_text(loss: float | None) -> str:
    """A loss in four significant digits; None, which stands for NaN in a history, in words."""
    return "not finite" if loss is None else f"{loss:.4g}"


def duration(seconds: float) -> str:
    """A span of time in its two largest units: 8 s, 3 min 20 s, 2 h 5 min, 1 d 4 h."""
    whole = round(seconds)
    for size, unit, part, rest in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            left = whole % size // part
            return f"{whole // size} {unit}" + (f" {left} {rest}" if left else "")
    return f"{whole} s"


def timing(elapsed: float, left: float) -> str:
    """Seconds gone and to come, in words."""
    return f"{duration(elapsed)} elapsed" + (f", about {duration(left)} remaining" if left else "")


class Pace:
    """How far a job of known length is, and when another line about it is due: at each tenth, after the first twenty
    seconds, and every ten minutes.

    Args:
        total: of the job, in `unit`.
        done: what an earlier part of the job has done.
        spent: the seconds that it took.
    """

    def __init__(self, total: int, unit: str = "", done: int = 0, spent: float = 0.0):
        self.total, self.unit, self.start, self.spent = max(1, total), unit, done, spent
        self.began = self._told = time.monotonic()
        self._part, self._wait = LINES * done // self.total, 20.0

    @property
    def elapsed(self) -> float:
        """Seconds of work so far, earlier parts included."""
        return self.spent + time.monotonic() - self.began

    def due(self, done: int) -> bool:
        part, now = LINES * done // self.total, time.monotonic()
        if part <= self._part and now - self._told < self._wait:
            return False
        self._part, self._told, self._wait = max(part, self._part), now, SECONDS
        return True

    def timing(self, done: int) -> str:
        """`<elapsed> elapsed, about <remaining> remaining`, from the rate of this part of the job."""
        here = time.monotonic() - self.began
        return timing(self.elapsed, (self.total - done) * here / (done - self.start) if done > self.start else 0.0)

    def line(self, done: int, detail: str = "") -> str:
        """Share, count, rate, elapsed and remaining time."""
        rate = (done - self.start) / max(time.monotonic() - self.began, 1e-9)
        count = f"{done / self.total:.0%}, {done:,} of {self.total:,} {self.unit}{detail}"
        return f"{count}, {decimal(rate, 1)} {self.unit}/s, {self.timing(done)}"


def paced(items: list, unit: str):
    """The items one by one, with a printed line every few seconds about how far this is."""
    pace, told = Pace(len(items), unit), time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - told > 5:
            told = time.monotonic()
            print(pace.line(done), flush=True)
        yield item
