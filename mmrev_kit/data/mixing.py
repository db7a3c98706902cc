"""The mix of an epoch: which rows of which sources it holds, exact to the row, the same for any number of processes.

Usable alone. An epoch holds every row of the tasks and, so that the model does not forget what it could do before, a
share of retention rows from pools of other material:

    plan = make_plan({"task": 700}, {"news": 5000, "web": 90}, {"news": 2, "web": 1}, ratio=0.3, seed=0, epochs=10)
    for source, index in plan.epoch_rows(0):  # 700 of task, 200 of news, 100 of web, shuffled
        train_on(rows[source][index])
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from mmrev_kit.config.seeds import rng_for


def apportion(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Split `total` in proportion to `weights`, exactly, by largest remainder (Hamilton's method).

    A tie goes to the key named first. Where the keys are a whole table of two parts, such as face_cw, face_mcq,
    object_cw and object_mcq, it goes before that to the key whose row and column of the table are furthest below their
    own shares, so that both keep theirs. Weights of 0 get nothing.

    Raises:
        ValueError: no weight is above 0 while there is something to share out.
    """
    exact = {key: Fraction(str(weight)) for key, weight in weights.items()}
    whole = sum(exact.values())
    if whole == 0:
        if total:
            raise ValueError("Nothing to share out to: every weight is 0.")
        return dict.fromkeys(weights, 0)
    quota = {key: total * weight / whole for key, weight in exact.items()}
    counts = {key: int(value) for key, value in quota.items()}
    parts = {key: key.partition("_")[::2] for key in quota}
    kinds, columns = map(set, zip(*parts.values(), strict=True))
    is_table = len(kinds) * len(columns) == len(quota)

    def lacking(key: str) -> tuple[Fraction, Fraction]:
        """How much this key lacks; and the sum of how much its row and its column lack."""
        lack = {other: quota[other] - counts[other] for other in quota}
        lines = [[other for other in quota if parts[other][axis] == parts[key][axis]] for axis in (0, 1)]
        return lack[key], sum((lack[other] for line in lines for other in line), Fraction(0)) if is_table else 0

    left = [key for key in quota if quota[key] > counts[key]]
    for _ in range(total - sum(counts.values())):
        best = max(left, key=lacking)
        left.remove(best)
        counts[best] += 1
    return counts


@dataclass(frozen=True)
class MixingPlan:
    """What every epoch of a run holds.

    Attributes:
        tasks: the sources that are tasks; the others are retention pools, but for those in `apart`.
        sizes, counts, asked: rows there are, rows an epoch takes, and the share of an epoch asked for, by source.
        epochs: number of epochs planned.
        apart: the sources that take a share of their own, neither tasks nor retention.
    """

    tasks: tuple[str, ...]
    sizes: dict[str, int]
    counts: dict[str, int]
    asked: dict[str, float]
    seed: int
    epochs: int
    apart: tuple[str, ...] = ()

    @property
    def rows_per_epoch(self) -> int:
        return sum(self.counts.values())

    @property
    def retention_share(self) -> float:
        """The actual share of retention rows in an epoch."""
        others = self.tasks + self.apart
        return sum(count for source, count in self.counts.items() if source not in others) / self.rows_per_epoch

    def epoch_rows(self, epoch: int) -> list[tuple[str, int]]:
        """(source, row index) of epoch `epoch` (from 0) in training order; depends on (seed, epoch) alone.

        A source is walked through in shuffled cycles, each a fresh order, so that no row comes twice before every row
        of its source has come once, over epochs too.
        """
        rows = []
        for source, count in self.counts.items():
            size = self.sizes[source]
            orders: dict[int, list[int]] = {}
            for drawn in range(epoch * count, (epoch + 1) * count):
                cycle, position = divmod(drawn, size)
                if cycle not in orders:
                    orders[cycle] = list(range(size))
                    rng_for(self.seed, "mix", source, cycle).shuffle(orders[cycle])
                rows.append((source, orders[cycle][position]))
        rng_for(self.seed, "order", epoch).shuffle(rows)
        return rows

    def table(self) -> list[dict]:
        """One record a source: asked and actual share, rows there are, rows an epoch, uses of each row in the run."""
        total = self.rows_per_epoch
        return [
            {
                "source": source,
                "asked share": self.asked[source],
                "actual share": count / total,
                "rows": self.sizes[source],
                "rows per epoch": count,
                "uses of each row": count * self.epochs / self.sizes[source] if self.sizes[source] else 0.0,
            }
            for source, count in self.counts.items()
        ]


def make_plan(
    tasks: Mapping[str, int], pools: Mapping[str, int], weights: Mapping[str, float], ratio: float, seed: int,
    epochs: int, counts: Mapping[str, int] | None = None, shares: Mapping[str, float] | None = None,
) -> MixingPlan:  # fmt: skip
    """The plan of a run: n task rows, and round(n * ratio / (1 - ratio)) retention rows, an epoch.

    With `shares` the share that is left to the tasks is smaller, 1 - ratio - their sum, and takes the place of
    1 - ratio; a pool with a share of s gives round(n * s / that).

    Args:
        tasks: rows there are of each task source.
        pools: rows there are of each retention source; its names are free, but none of the tasks'.
        weights: how the retention rows are shared among the pools: 2 and 1 are two thirds and one third. A pool
            without a weight gives nothing.
        ratio: the share of an epoch's rows that are retention rows, from 0 up to but not including 1.
        epochs: number of epochs planned; `epoch_rows` gives others too.
        counts: rows an epoch of task sources that are to be repeated, e.g. as often as another's; the others give
            each of their rows once.
        shares: {pool: its share of an epoch's rows} of pools that take one of their own, beside the retention pools.

    Raises:
        ValueError: there are no task rows, a pool that should give rows has none, or a number cannot be.
    """
    taken, numbers = dict(tasks) | dict(counts or {}), [*tasks.values(), *pools.values(), *(counts or {}).values()]
    if epochs < 1 or not all(isinstance(number, int) and number >= 0 for number in (epochs, *numbers)):
        raise ValueError(f"{epochs} epochs, rows {dict(tasks)} and {dict(pools)}: whole numbers, at least one epoch.")
    for source, count in taken.items():
        there = tasks.get(source)
        if there is None or source in pools or count < there or (count and not there):
            rule = "it must be a task, no pool, and give each row once or more"
            raise ValueError(f"{count} rows of {source} an epoch, of {there}: {rule}.")
    own = {source: share for source, share in (shares or {}).items() if share}
    if not all(share > 0 and pools.get(source) and not weights.get(source) for source, share in own.items()):
        raise ValueError(f"Shares {own} of pools {dict(pools)}: of pools that have rows and no weight, above 0.")
    if not 0 <= ratio < 1 or not all(0 <= weight < math.inf for weight in weights.values()):
        raise ValueError(f"A retention ratio of {ratio} with weights {dict(weights)}: 0 <= ratio < 1, 0 <= weight.")
    if ratio + sum(own.values()) >= 1:
        raise ValueError(f"A retention ratio of {ratio} and shares {own}: something must be left to the tasks.")
    n_task = sum(taken.values())
    if n_task == 0:
        raise ValueError("There are no task rows.")
    # As written: 0.3 is three tenths, whatever its nearest binary fraction.
    exact_ratio, exact = Fraction(str(ratio)), {source: Fraction(str(share)) for source, share in own.items()}
    left = 1 - exact_ratio - sum(exact.values())
    n_retention = round(n_task * exact_ratio / left)
    used = {source: weight for source, weight in weights.items() if weight and n_retention}
    drawn = apportion(n_retention, used)
    for source, count in drawn.items():
        if count and not pools.get(source):
            raise ValueError(
                f"retention_ratio = {ratio} asks for {count} {source} rows an epoch, but the pool has none. "
                "Make the pool, set its weight to 0, or set retention_ratio to 0."
            )
    drawn |= {source: round(n_task * share / left) for source, share in exact.items()}
    asked = {source: (1 - ratio - sum(own.values())) * count / n_task for source, count in taken.items()}
    asked |= {source: ratio * weight / sum(used.values()) for source, weight in used.items()} | own
    sizes = dict(tasks) | {source: pools.get(source, 0) for source in (*used, *own)}
    return MixingPlan(tuple(tasks), sizes, taken | drawn, asked, seed, epochs, tuple(own))
