"""The retention plan: which rows an epoch holds, exact to the row, the same for any number of processes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from mmrev_kit.config.sections import TASKS, RetentionConfig
from mmrev_kit.config.seeds import rng_for


def apportion(total: int, weights: dict[str, float]) -> dict[str, int]:
    """Split `total` in proportion to `weights`, exactly, by largest remainder (Hamilton's method).

    Keys such as face_cw name two things; a tie goes to the key whose two parts are furthest below their own shares,
    so that pools and tasks both keep theirs, and then to the key named first. Weights of 0 get nothing.

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

    def below(part: str) -> Fraction:
        """How much all keys with this part lack."""
        return sum((quota[key] - counts[key] for key in quota if part in key.split("_", 1)), Fraction(0))

    left = [key for key in quota if quota[key] > counts[key]]
    for _ in range(total - sum(counts.values())):
        best = max(left, key=lambda key: (quota[key] - counts[key], sum(below(part) for part in key.split("_", 1))))
        left.remove(best)
        counts[best] += 1
    return counts


def source_weights(retention: RetentionConfig) -> dict[str, float]:
    """The share of each retention source, such as face_cw, before it is turned into rows."""
    weights = retention.weights
    tasks = {"cw": weights.cw, "mcq_i2d": weights.mcq_i2d, "mcq_d2i": weights.mcq_d2i}
    kinds = {"face": retention.face_share, "object": float(1 - Fraction(str(retention.face_share)))}
    kinds = {kind: share for kind, share in kinds.items() if share}
    return {f"{kind}_{task}": share * weight for kind, share in kinds.items() for task, weight in tasks.items()}


@dataclass(frozen=True)
class Plan:
    """What every epoch of a run holds.

    Attributes:
        sizes: rows there are, by source.
        counts: rows an epoch takes, by source; task sources are taken whole.
        asked: the share of an epoch that the configuration asks for, by source.
        epochs: number of epochs planned.
    """

    sizes: dict[str, int]
    counts: dict[str, int]
    asked: dict[str, float]
    seed: int
    epochs: int

    @property
    def rows_per_epoch(self) -> int:
        return sum(self.counts.values())

    @property
    def retention_share(self) -> float:
        """The actual share of retention rows in an epoch."""
        return sum(count for source, count in self.counts.items() if source not in TASKS) / self.rows_per_epoch

    def epoch_rows(self, epoch: int) -> list[tuple[str, int]]:
        """(source, row index) of epoch `epoch` (from 0) in training order; depends on (seed, epoch) alone.

        A source is walked through in shuffled passes, each a fresh order, so that no row comes twice before every
        row of its source has come once, over epochs too.
        """
        rows = []
        for source, count in self.counts.items():
            size = self.sizes[source]
            orders: dict[int, list[int]] = {}
            for position in range(epoch * count, (epoch + 1) * count):
                turn, place = divmod(position, size)
                if turn not in orders:
                    orders[turn] = list(range(size))
                    rng_for(self.seed, "mix", source, turn).shuffle(orders[turn])
                rows.append((source, orders[turn][place]))
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
    task_sizes: dict[str, int], pool_sizes: dict[str, int], retention: RetentionConfig | None, seed: int, epochs: int
) -> Plan:
    """The plan of a run: all task rows, and round(n_task * r / (1 - r)) retention rows.

    Args:
        task_sizes: rows of each task source.
        pool_sizes: rows of each retention source, e.g. face_cw.
        retention: None when the run is not mixed.

    Raises:
        ValueError: there are no task rows, or a retention source that should give rows has none.
    """
    n_task = sum(task_sizes.values())
    if n_task == 0:
        raise ValueError("There are no task rows to train on. Make the experiment's data again.")
    ratio = retention.retention_ratio if retention else 0.0
    exact_ratio = Fraction(str(ratio))  # as written: 0.3 is three tenths, whatever its nearest binary fraction
    n_retention = round(n_task * exact_ratio / (1 - exact_ratio))
    weights = source_weights(retention) if retention else {}
    if n_retention and not any(weights.values()):
        raise ValueError(f"retention.retention_ratio = {ratio}, but no pool has a share: set retention.face_share.")
    taken = apportion(n_retention, weights)
    for source, count in taken.items():
        if count and not pool_sizes.get(source):
            raise ValueError(
                f"retention.retention_ratio = {ratio} asks for {count} {source} rows an epoch, but the pool has none. "
                "Make the pool, set the weight to 0, or set retention.retention_ratio=0."
            )
    taken = {source: count for source, count in taken.items() if n_retention and weights[source]}
    asked = {source: (1 - ratio) * size / n_task for source, size in task_sizes.items()}
    whole = sum(weights.values()) or 1.0
    asked |= {source: ratio * weights[source] / whole for source in taken}
    sizes = task_sizes | {source: pool_sizes.get(source, 0) for source in taken}
    return Plan(sizes=sizes, counts=task_sizes | taken, asked=asked, seed=seed, epochs=epochs)
