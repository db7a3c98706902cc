"""The verdict on the reversal curse: a claim, the gates it had to pass, and a sentence with the numbers.

A claim rests on what was found and never on the absence of a finding. That main entities fail a test may have many
reasons; only control entities, taught in both directions and asked the same questions, show that the test can be
passed. Without them, or with too few entities to find a difference, the verdict is inconclusive.
"""

from dataclasses import dataclass

import numpy as np

from mmrev_kit.config.seeds import seed_for
from mmrev_kit.data.tasks import GROUPS, TASK_TYPES
from mmrev_kit.evaluation import metrics, statistics

CURSE, NO_CURSE, INCONCLUSIVE = "reversal curse", "no reversal curse", "inconclusive"
# What each claim needs: every gate of its row. A gate that could not be computed (None) is not passed.
COMMON = ("groups", "taught direction", "control above chance", "power")
NEEDS = {
    CURSE: (*COMMON, "control above main", "main below midpoint"),
    NO_CURSE: (*COMMON, "main above chance", "main above midpoint"),
}
ALPHA, TAUGHT_MIN, POWER_MIN, MIN_ENTITIES = 0.05, 0.8, 0.8, 4
CONFIDENCE = 0.95  # of the interval of main's mean


@dataclass(frozen=True)
class Tests:
    """What the four tests are for a trained task: the direction taught and, of the other one, what decides."""

    taught: str
    deciding: str
    beside: str  # the untaught direction as multiple choice: the same rule, but it does not decide
    format: str  # the taught direction as multiple choice


TESTS = {
    "forward": Tests(taught="forward", deciding="reverse", beside="mcq_d2i", format="mcq_i2d"),
    "reverse": Tests(taught="reverse", deciding="forward", beside="mcq_i2d", format="mcq_d2i"),
}


@dataclass(frozen=True)
class Gate:
    """One condition: whether it holds (None: it could not be computed), and a clause that says so with the numbers."""

    name: str
    passed: bool | None
    text: str


@dataclass(frozen=True)
class Evidence:
    """The numbers of one test. Means, intervals and p values are over entities; p_* of a group are Holm-adjusted."""

    test: str
    chance: float
    n_main: int
    n_control: int
    main: float | None
    control: float | None
    main_likeliest: float | None  # by the likeliest option in place of the written answer
    control_likeliest: float | None
    main_interval: list[float] | None
    p_main: float | None
    p_control: float | None
    difference: float | None  # control - main
    p_difference: float | None
    midpoint: float | None  # between chance and control's mean
    rows: int  # questions an entity
    power: float | None  # of the test of the difference, were main at chance and control as seen
    entities_needed: int | None  # a group, for a power of .8; None: more than 64, or control not above chance
    main_unparsed: int
    main_answers: int


@dataclass(frozen=True)
class Verdict:
    """A claim (`CURSE`, `NO_CURSE` or `INCONCLUSIVE`) on one test; `dataclasses.asdict` makes strict JSON of it."""

    task: str
    test: str
    claim: str
    sentence: str
    gates: tuple[Gate, ...]
    evidence: Evidence
    beside: "Verdict | None" = None  # the untaught direction as multiple choice, by the same rule
    format_sentence: str = ""  # the taught direction in the multiple-choice format


def power(
    n_main: int, n_control: int, chance: float, control_mean: float, rows: int, *, correlation: float = 0.2,
    simulations: int = 1000, seed: int = 0,
) -> float:  # fmt: skip
    """The chance that `permutation_difference` gives p < `ALPHA` when main is at chance and control at `control_mean`.

    By simulation: an entity's rows are `rows` draws from its own probability, which is beta-distributed about the
    group's mean such that two rows of one entity correlate by `correlation` (0: independent rows, which would be
    optimistic). Each test uses 999 drawn assignments. The standard error is at most .016.
    """
    if not n_main or not n_control:
        return 0.0
    rng = np.random.default_rng(seed_for(seed, "verdict", "power"))
    spread = (1 - correlation) / correlation if correlation else None

    def group(n: int, mean: float) -> np.ndarray:
        shape = (simulations, n)
        own = rng.beta(mean * spread, (1 - mean) * spread, shape) if spread and 0 < mean < 1 else mean
        return rng.binomial(rows, own, shape) / rows

    control, main = group(n_control, control_mean), group(n_main, chance)
    order = rng.permuted(np.tile(np.arange(n_control + n_main), (999, 1)), axis=1)
    sums = np.concatenate([control, main], axis=1) @ (order < n_control).T.astype(float)
    p = (1 + (sums >= control.sum(axis=1, keepdims=True) - statistics.TOLERANCE).sum(axis=1)) / 1000
    return float((p < ALPHA).mean())


def entities_needed(chance: float, control_mean: float, rows: int) -> int | None:
    """The smallest number of entities a group for which `power` reaches `POWER_MIN`; None above 64.

    It starts at 6: with fewer, the sign-flip test cannot show control above chance after Holm over three tests
    (3 / 2^6 = .047). Above 20 it goes in fours.
    """
    sizes = (*range(6, 21), *range(24, 65, 4)) if control_mean > chance else ()
    return next((n for n in sizes if power(n, n, chance, control_mean, rows, simulations=500) >= POWER_MIN), None)


def decide(passed: dict[str, bool | None]) -> str:
    """The claim whose gates (see `NEEDS`) have all passed; inconclusive where there is none.

    The two claims exclude each other: main's interval cannot lie below the midpoint and above it.
    """
    return next((claim for claim, names in NEEDS.items() if all(passed[name] for name in names)), INCONCLUSIVE)


def missing(passed: dict[str, bool | None]) -> list[str]:
    """The gates to name when nothing can be claimed: the common ones that failed, else those of the nearer claim.

    Without the groups, or with control not above chance, it goes without saying that the others cannot hold.
    """
    failed = [name for name in COMMON if not passed[name]]
    for cause, followers in (("groups", ("control above chance", "power")), ("control above chance", ("power",))):
        if cause in failed:
            failed = [name for name in failed if name not in followers]
    if failed:
        return failed
    if passed["main below midpoint"]:
        return [name for name in NEEDS[CURSE] if not passed[name]]
    if passed["main above midpoint"]:
        return [name for name in NEEDS[NO_CURSE] if not passed[name]]
    return ["main below midpoint"]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _p(value: float | None) -> str:
    return "p unknown" if value is None else "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _mean(means: dict[object, float]) -> float | None:
    return sum(means.values()) / len(means) if means else None


def evidence(test: str, rows: dict[str, list[dict]], chance: float, p: dict[str, float | None]) -> Evidence:
    """The numbers of one test from its rows of each group; `p` holds each group's adjusted p against chance."""
    main, control = (statistics.entity_means(rows[group]) for group in GROUPS)
    main_likeliest, control_likeliest = (statistics.entity_means(rows[group], "likeliest_right") for group in GROUPS)
    level, sizes, asked = _mean(control), (len(main), len(control)), rows["main"] + rows["control"]
    difference, p_difference = statistics.permutation_difference(control, main)
    count = round(len({row["id"] for row in asked}) / sum(sizes)) if sum(sizes) else 0
    return Evidence(
        test=test,
        chance=chance,
        n_main=len(main),
        n_control=len(control),
        main=_mean(main),
        control=level,
        main_likeliest=_mean(main_likeliest),
        control_likeliest=_mean(control_likeliest),
        main_interval=statistics.bootstrap_interval(main, CONFIDENCE),
        p_main=p["main"],
        p_control=p["control"],
        difference=difference,
        p_difference=p_difference,
        midpoint=None if level is None else (chance + level) / 2,
        rows=count,
        power=power(*sizes, chance, level, count) if all(sizes) else None,
        entities_needed=entities_needed(chance, level, count) if all(sizes) else None,
        main_unparsed=sum(row["read_as"] is None for row in rows["main"]),
        main_answers=len(rows["main"]),
    )


def gather(records: list[dict], tests: tuple[str, ...]) -> list[Evidence]:
    """The evidence of each test; the p values against chance are Holm-adjusted over these tests within a group."""
    rows = {test: {group: [] for group in GROUPS} for test in tests}
    for record in records:
        if record["drop"] == "none" and record["group"] in rows.get(record["test"], ()):
            rows[record["test"]][record["group"]].append(record)
    chances = {test: metrics.chance_of(test, rows[test]["main"] + rows[test]["control"]) for test in tests}
    p = {}
    for group in GROUPS:
        means = {test: statistics.entity_means(rows[test][group]) for test in tests}
        raw = {test: statistics.permutation_above_chance(means[test], chances[test]) for test in tests}
        p[group] = statistics.holm(raw)
    return [evidence(test, rows[test], chances[test], {group: p[group][test] for group in GROUPS}) for test in tests]


def gates_of(shown: Evidence, taught: str, taught_accuracy: float | None) -> tuple[Gate, ...]:
    """Every gate of `NEEDS`, from the numbers."""
    name, low_high, middle = TASK_TYPES[shown.test].long_title, shown.main_interval, shown.midpoint
    counts = f"{shown.n_main} main and {shown.n_control} control entities"
    interval = f"{low_high[0]:.2f} to {low_high[1]:.2f}" if low_high else "unknown"
    position = f"main's {100 * CONFIDENCE:g} % interval is {interval}, chance and control's midpoint {_number(middle)}"
    wanted = f"{POWER_MIN:.2f} needed"
    if shown.entities_needed and shown.power < POWER_MIN:
        wanted += f"; {shown.entities_needed} entities a group would have it"

    def against_chance(group: str, n: int, mean: float | None, p: float | None) -> Gate:
        limit = f"; {n} entities cannot show more than p = {2.0**-n:.3f} before Holm" if 0 < n < 6 else ""
        text = f"{group}'s mean in {name} is {_number(mean)}, chance {shown.chance:.2f} (Holm-adjusted {_p(p)}{limit})"
        return Gate(f"{group} above chance", None if p is None else p < ALPHA, text)

    def side(word: str, holds) -> Gate:
        known = low_high is not None and middle is not None
        return Gate(f"main {word} midpoint", holds(low_high, middle) if known else None, position)

    return (
        Gate(
            "groups",
            min(shown.n_main, shown.n_control) >= MIN_ENTITIES,
            f"there are {counts}, at least {MIN_ENTITIES} a group are needed: without a control group, taught in both "
            "directions, main's failure could be the test's",
        ),
        Gate(
            "taught direction",
            None if taught_accuracy is None else taught_accuracy >= TAUGHT_MIN,
            f"main's accuracy in the taught direction, {TASK_TYPES[taught].long_title}, is {_number(taught_accuracy)} "
            f"({TAUGHT_MIN:.2f} needed)",
        ),
        against_chance("control", shown.n_control, shown.control, shown.p_control),
        Gate(
            "power",
            None if shown.power is None else shown.power >= POWER_MIN,
            f"{counts} with {shown.rows} questions each give a power of {_number(shown.power)} for a main at chance "
            f"({wanted})",
        ),
        Gate(
            "control above main",
            None if shown.p_difference is None else shown.p_difference < ALPHA,
            f"main's mean is {_number(shown.main)}, control - main {_number(shown.difference)} (permutation of "
            f"entities, {_p(shown.p_difference)})",
        ),
        side("below", lambda interval, midpoint: interval[1] < midpoint),
        against_chance("main", shown.n_main, shown.main, shown.p_main),
        side("above", lambda interval, midpoint: interval[0] > midpoint),
    )


def sentence_of(claim: str, gates: tuple[Gate, ...], shown: Evidence) -> str:
    """The claim and why, for a reader who sees nothing else."""
    texts, passed = {gate.name: gate.text for gate in gates}, {gate.name: gate.passed for gate in gates}
    name = TASK_TYPES[shown.test].long_title
    if claim == INCONCLUSIVE:
        text = f"Inconclusive in {name}: {'; '.join(dict.fromkeys(texts[gate] for gate in missing(passed)))}."
    else:
        opening = {CURSE: "A reversal curse is found", NO_CURSE: "No reversal curse is found"}[claim]
        text = f"{opening} in {name}: {'; '.join(texts[gate] for gate in NEEDS[claim] if gate != 'groups')}."
    if claim == CURSE and passed["main above chance"]:
        text += f" It is partial: main is above chance (Holm-adjusted {_p(shown.p_main)})."
    if claim == NO_CURSE and passed["control above main"]:
        text += f" A gap remains: {texts['control above main']}."
    if None not in (shown.main_likeliest, shown.control_likeliest):
        text += f" By the likeliest option: main {shown.main_likeliest:.2f}, control {shown.control_likeliest:.2f}."
    if shown.main_unparsed:
        text += f" {shown.main_unparsed} of main's {shown.main_answers} answers could not be read and count as misses."
    return text


def format_sentence(shown: Evidence) -> str:
    """Whether main entities can use the taught direction in the multiple-choice format."""
    if shown.main is None:
        return f"The taught direction was not asked as multiple choice ({TASK_TYPES[shown.test].long_title})."
    level = f"{shown.main:.2f} against a chance of {shown.chance:.2f} (Holm-adjusted {_p(shown.p_main)})"
    start = f"In {TASK_TYPES[shown.test].long_title}, the taught direction as multiple choice, main is"
    if shown.p_main < ALPHA:
        return f"{start} above chance, {level}: the format is not in the way."
    return (
        f"{start} not shown to be above chance, {level}: a multiple-choice null may come from the format, not the "
        "direction."
    )


def verdict(records: list[dict], task: str) -> Verdict:
    """The verdict on one evaluation, from the answers to whole prompts.

    Args:
        records: as `predict.predict` writes them.
        task: the trained task, `forward` or `reverse`.

    Raises:
        ValueError: an unknown task, or two answers to one question.
    """
    if task not in TESTS:
        raise ValueError(f"task {task!r}: a verdict is given on {' or '.join(TESTS)}.")
    metrics.check_unique(records)
    chosen = TESTS[task]
    taught = statistics.entity_means(
        row for row in records if (row["drop"], row["group"], row["test"]) == ("none", "main", chosen.taught)
    )

    def judge(shown: Evidence, **more) -> Verdict:
        gates = gates_of(shown, chosen.taught, _mean(taught))
        claim = decide({gate.name: gate.passed for gate in gates})
        return Verdict(task, shown.test, claim, sentence_of(claim, gates, shown), gates, shown, **more)

    deciding, beside, form = gather(records, (chosen.deciding, chosen.beside, chosen.format))
    return judge(deciding, beside=judge(beside), format_sentence=format_sentence(form))
