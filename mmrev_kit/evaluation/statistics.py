"""Intervals and tests over the records of an evaluation.

The unit of every claim is the entity: rows about one entity share its face and its description, so they are averaged
first (`entity_means`); intervals and permutations are over entities. `wilson` and the exact tests treat rows as
independent; they describe one evaluation, are comparable with published tables, and no verdict rests on them.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import harmonic_mean

import numpy as np

from mmrev_kit.config.seeds import seed_for

EXACT_LIMIT = 2**16  # up to so many sign flips or assignments all are gone through; beyond, some are drawn
DRAWS = 20_000  # sign flips or assignments drawn then
MIN_CORRELATION = 0.1  # of the rows of one entity, whatever a few entities seem to show
TOLERANCE = 1e-9  # equal sums added in another order may differ by rounding; they count as equal


def _array(values: Mapping | Iterable[float]) -> np.ndarray:
    return np.array(list(values.values()) if isinstance(values, Mapping) else list(values), dtype=float)


def _rng(purpose: str) -> np.random.Generator:
    return np.random.default_rng(seed_for(0, "stats", purpose))


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


def rows_each(records: Iterable[dict], field: str = "right") -> float:
    """Rows an entity whose `field` is not None: the harmonic mean, which is what the spread of entity means knows."""
    counts = Counter(record["entity_id"] for record in records if record[field] is not None)
    return float(harmonic_mean(list(counts.values()))) if counts else 0.0


def questions_each(records: Iterable[dict]) -> float:
    """Different questions an entity, the harmonic mean: one asked twice, or in several option orders, counts once."""
    asked: dict[object, dict[str, tuple]] = {}
    for record in records:
        own = asked.setdefault(record["entity_id"], {})
        own.setdefault(record["id"], (record["prompt"], *record["images"]))
    return float(harmonic_mean([len(set(own.values())) for own in asked.values()])) if asked else 0.0


def mean_interval(means: Mapping | Iterable[float], rows: float, confidence: float = 0.95) -> list | None:
    """Wilson's interval [low, high] of the mean over entities of `rows` rows each; None for fewer than 2 entities.

    Rows of one entity tell less than as many of different ones. The design effect 1 + (rows - 1) x correlation (Kish
    1965) is estimated from the spread of the entity means, with a correlation of at least `MIN_CORRELATION`; so many
    times fewer rows enter Wilson's formula, with Student's t of the entities in place of z. One more entity, half
    right, takes part in the estimate of the spread: near 0 and 1 a few entities show too little of it.

    Args:
        means: of shape (..., entities): an array with leading axes gives arrays of intervals.
    """
    from scipy.stats import t

    values = _array(means)
    count = values.shape[-1]
    if count < 2:
        return None
    more = np.concatenate([values, np.full((*values.shape[:-1], 1), 0.5)], axis=-1)
    centre = more.mean(axis=-1)
    effect = rows * more.var(axis=-1, ddof=1) / (centre * (1 - centre))
    n = count * rows / np.clip(effect, 1 + MIN_CORRELATION * (rows - 1), rows)
    share, q = values.mean(axis=-1), t.ppf((1 + confidence) / 2, count - 1)
    middle = (share + q * q / (2 * n)) / (1 + q * q / n)
    half = q / (1 + q * q / n) * np.sqrt(share * (1 - share) / n + q * q / (4 * n * n))
    # Wilson's ends lie within [0, 1] and touch them at shares of 0 and 1; rounding may not.
    low, high = np.where(share == 0, 0, middle - half), np.where(share == 1, 1, middle + half)
    return [low, high] if values.ndim > 1 else [float(low), float(high)]


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


def entity_aurocs(records: Iterable[dict]) -> tuple[dict[object, float], float]:
    """({entity_id: AUROC of logit(Correct) - logit(Wrong) within its CW rows}, how many rows each is worth).

    Within an entity, so that an entity of whom everything is called wrong does not hide what is known of the others.
    Left out are rows without both logits, or with an infinite difference, and entities without both kinds of rows. An
    AUROC of a Correct and b Wrong rows varies, without knowledge, by (a + b + 1) / 12ab (Mann and Whitney 1947), as
    the share of 3ab / (a + b + 1) independent rows does: the `rows` of `mean_interval`.
    """
    margins: dict[object, dict[str, list[float]]] = {}
    for record in records:
        yes, no = record["options"].get("Correct"), record["options"].get("Wrong")
        if record["right"] is not None and None not in (yes, no) and math.isfinite(yes - no):
            sides = margins.setdefault(record["entity_id"], {"Correct": [], "Wrong": []})
            sides[record["expected"]].append(yes - no)
    return aurocs_of(margins)


def aurocs_of(margins: Mapping[object, dict[str, list[float]]]) -> tuple[dict[object, float], float]:
    """`entity_aurocs` from {entity_id: {right answer: its rows' logit(Correct) - logit(Wrong)}}."""
    whole = {entity: sides for entity, sides in margins.items() if all(sides.values())}
    sizes = [(len(sides["Correct"]), len(sides["Wrong"])) for sides in whole.values()]
    worth = float(harmonic_mean([3 * a * b / (a + b + 1) for a, b in sizes])) if sizes else 0.0
    return {entity: auroc(sides["Correct"], sides["Wrong"]) for entity, sides in whole.items()}, worth
