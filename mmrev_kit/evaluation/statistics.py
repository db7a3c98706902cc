"""Intervals and tests over the records of an evaluation.

The unit of every claim is the entity: rows about one entity share its face and its description, so they are averaged
first (`entity_means`) and entities are resampled or permuted. Wilson intervals and exact tests treat rows as
independent; they describe one evaluation, are comparable with published tables, and no verdict rests on them.
"""

import itertools
import math
from collections.abc import Iterable, Mapping

import numpy as np

from mmrev_kit.config.seeds import seed_for

EXACT_LIMIT = 2**16  # up to so many sign flips or assignments all are gone through; beyond, some are drawn
DRAWS = 20_000  # sign flips or assignments drawn then
TOLERANCE = 1e-9  # equal sums added in another order may differ by rounding; they count as equal


def _array(values: Mapping | Iterable[float]) -> np.ndarray:
    return np.array(list(values.values() if isinstance(values, Mapping) else values), dtype=float)


def _rng(purpose: str, seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed_for(seed, "stats", purpose))


def wilson(correct: int, n: int, confidence: float = 0.95) -> list[float] | None:
    """Wilson's score interval [low, high] of a share (Wilson 1927); None for n = 0."""
    from scipy.stats import binomtest

    if n == 0:
        return None
    low, high = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return [float(low), float(high)]


def exact_test(correct: int, n: int, chance: float, alternative: str = "greater") -> float | None:
    """p of the exact binomial test of `correct` right answers of n against `chance`; None for n = 0.

    Args:
        alternative: `greater` asks whether the model knows more than chance. `two-sided` also finds a model that is
            systematically wrong, which knows the fact and answers in reverse.
    """
    from scipy.stats import binomtest

    return float(binomtest(correct, n, chance, alternative).pvalue) if n else None


def mcnemar(b: int, c: int) -> float:
    """Two-sided exact p of McNemar's (1947) test: b rows only the first got right, c only the second; 1 without any."""
    return exact_test(b, b + c, 0.5, "two-sided") if b + c else 1.0


def holm(p_values: dict) -> dict:
    """Holm's (1979) step-down adjustment, monotone and at most 1; a p of None belongs to no family and stays None."""
    known = sorted((name for name, p in p_values.items() if p is not None), key=p_values.get)
    adjusted, running = dict.fromkeys(p_values), 0.0
    for rank, name in enumerate(known):
        running = max(running, min(1.0, (len(known) - rank) * p_values[name]))
        adjusted[name] = running
    return adjusted


def entity_means(records: Iterable[dict], field: str = "right") -> dict[object, float]:
    """{entity_id: mean of `field` over its rows}; rows whose field is None are left out."""
    found: dict[object, list[float]] = {}
    for record in records:
        if record[field] is not None:
            found.setdefault(record["entity_id"], []).append(float(record[field]))
    return {entity: sum(values) / len(values) for entity, values in found.items()}


def bootstrap_interval(
    means: Mapping | Iterable[float], confidence: float = 0.95, draws: int = 10_000, seed: int = 0
) -> list[float] | None:
    """Percentile bootstrap interval [low, high] of the mean over entities (Efron 1979), entities drawn whole.

    Two things to know with few entities: the interval is somewhat too narrow (about 90 % instead of 95 % at 8), and
    where all means are equal it is a point, which says that nothing varied and not that nothing is unknown. None for
    fewer than 2 entities, which show no variation at all.
    """
    values = _array(means)
    if len(values) < 2:
        return None
    picks = _rng("bootstrap", seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return [float(low), float(high)]


def permutation_above_chance(means: Mapping | Iterable[float], chance: float) -> float | None:
    """One-sided p that the mean over entities is above `chance`: sign-flip test on the deviations (Fisher 1935).

    Exact over all 2^n flips up to 16 entities; beyond, drawn flips with the observed one added (Phipson and Smyth
    2010). The null is symmetry about chance. Means of a few rows at a low chance, such as 1/4, are skewed to the
    right, which makes the test cautious. p is at least 2^-n: below 5 entities it cannot get under .05. None for none.
    """
    deviations = _array(means) - chance
    if len(deviations) == 0:
        return None
    observed = deviations.sum() - TOLERANCE
    if 2 ** len(deviations) <= EXACT_LIMIT:
        sums = np.zeros(1)
        for deviation in deviations:
            sums = np.concatenate([sums + deviation, sums - deviation])
        return float((sums >= observed).mean())
    signs = _rng("sign flips").choice([-1.0, 1.0], size=(DRAWS, len(deviations)))
    return float((1 + (signs @ deviations >= observed).sum()) / (1 + DRAWS))


def permutation_difference(
    control: Mapping | Iterable[float], main: Mapping | Iterable[float]
) -> tuple[float, float] | tuple[None, None]:
    """(mean of control - mean of main, one-sided p that it is above 0), the entities' group labels permuted.

    Exact over all assignments up to `EXACT_LIMIT` of them (9 + 9 entities); beyond, drawn ones with the observed one
    added. (None, None) where a group is empty.
    """
    first, second = _array(control), _array(main)
    if not len(first) or not len(second):
        return None, None
    pooled, size = np.concatenate([first, second]), len(first)
    observed = first.sum() - TOLERANCE  # for fixed sizes the difference grows with control's sum
    difference = float(first.mean() - second.mean())
    if math.comb(len(pooled), size) <= EXACT_LIMIT:
        chosen = np.array(list(itertools.combinations(range(len(pooled)), size)))
        return difference, float((pooled[chosen].sum(axis=1) >= observed).mean())
    shuffled = _rng("assignments").permuted(np.tile(pooled, (DRAWS, 1)), axis=1)
    return difference, float((1 + (shuffled[:, :size].sum(axis=1) >= observed).sum()) / (1 + DRAWS))


def auroc(positive: Iterable[float], negative: Iterable[float]) -> float | None:
    """The chance that a positive scores above a negative, ties half (Mann-Whitney U / pairs); None if one is empty."""
    from scipy.stats import mannwhitneyu

    first, second = _array(positive), _array(negative)
    if not len(first) or not len(second):
        return None
    return float(mannwhitneyu(first, second, method="asymptotic").statistic / (len(first) * len(second)))
