"""The verdict on the reversal curse: a claim, the gates it had to pass, and a sentence with the numbers.

A claim about direction compares two tests of one format: CW in the order that was taught, and in the other one, which
decides. Main must pass the first and fail the second; control, taught in both orders, must pass both, or main's failure
could be the test's. To fail is to lie below the midpoint of chance and control in accuracy and in AUROC: who tells
right from wrong and always says Wrong knows. A claim rests on what was found, never on the absence of a finding.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from mmrev_kit.config.reporting import decimal, probability
from mmrev_kit.config.sections import TASKS, ExperimentConfig
from mmrev_kit.data.design import DECIDING, PLANNED, POWER_MIN, claim_power, people_needed
from mmrev_kit.data.tasks import CW, MIN_GROUP, TASK_TYPES
from mmrev_kit.evaluation import metrics, statistics

CURSE, NO_CURSE, BOUND, INCONCLUSIVE = "reversal curse", "no reversal curse", "bound to its format", "inconclusive"
UNWRITTEN, WRITTEN = "cannot be written", "can be written"  # of generation: claims of their own, not of direction
BIAS, HALF, BETWEEN = "tells them apart, answers with a bias", "half learned", "between the midpoints"
JUDGED = ("main", "control")  # a third group, bridge, is shown beside them and decides nothing
ALPHA, LEARNED_MIN, CONTROL_MIN = 0.05, 0.8, 0.7
TAUGHT_ORDER = {"reverse": "cw_image", "cw_image": "reverse", "mcq_d2i": "mcq_i2d", "mcq_i2d": "mcq_d2i"}
CHOICES = {"forward": "mcq_d2i", "reverse": "mcq_i2d"}  # by trained task: the untaught direction as multiple choice


@dataclass(frozen=True)
class Gate:
    """One condition: whether it holds (None: it could not be computed), and a clause that says so with the numbers."""

    name: str
    passed: bool | None
    text: str


@dataclass(frozen=True)
class Group:
    """One group's numbers in one test; means, intervals and p values are over entities."""

    n: int
    questions: float  # different ones an entity
    mean: float | None = None
    interval: list[float] | None = None
    p: float | None = None  # against chance, Holm-adjusted over the tests that the claim names
    auroc: float | None = None  # in CW
    auroc_bounds: list[float] | None = None  # one-sided, 95 % each
    tpr: float | None = None
    fpr: float | None = None
    unparsed: int = 0


@dataclass(frozen=True)
class Evidence:
    """Both groups' numbers in one test. A midpoint lies between a guess and control: of accuracy, and of AUROC."""

    test: str
    chance: float
    main: Group
    control: Group
    midpoint: float | None
    auroc_midpoint: float | None
    difference: float | None  # control - main
    p_difference: float | None

    @property
    def title(self) -> str:
        return TASK_TYPES[self.test].long_title

    @property
    def biased(self) -> bool:
        """Whether main tells right from wrong although it answers as if it could not."""
        return None not in (self.main.auroc, self.auroc_midpoint) and (
            self.main.auroc >= self.auroc_midpoint and self.main.mean < self.midpoint
        )


@dataclass(frozen=True)
class Verdict:
    """A claim on one test; `dataclasses.asdict` makes strict JSON of it.

    `reason` names what an inconclusive verdict failed on: a gate, `BIAS`, `HALF` or `BETWEEN`. `gates` are those up to
    the first that failed, or all with those of the nearer claim.
    """

    task: str
    taught: tuple[str, ...]  # the tests of what main was taught
    test: str
    claim: str
    reason: str | None
    sentence: str
    gates: tuple[Gate, ...]
    evidence: Evidence
    order: Evidence | None  # the same format in the taught order; None for generation
    beside: "tuple[Verdict, ...]" = ()  # other formats, by the same rules


def _number(value: float | None) -> str:
    return decimal(value) or "unknown"


def _p(value: float | None) -> str:
    said = probability(value)
    return f"p {said}" if said.startswith("<") else f"p = {said}" if said else "p unknown"


def group_numbers(test: str, rows: list[dict], chance: float) -> Group:
    """A group's numbers from its rows of one test; p is not adjusted yet."""
    means = statistics.entity_means(rows)
    if not means:
        return Group(0, 0.0)
    score, rates = metrics.score(rows, "right", chance), metrics.rates(rows) if TASK_TYPES[test].format == CW else {}
    return Group(
        len(means),
        statistics.questions_each(rows),
        sum(means.values()) / len(means),
        score["cluster_interval"],
        score["p_permutation"],
        *(rates.get(name) for name in ("auroc", "auroc_bounds", "tpr", "fpr")),
        unparsed=sum(row["read_as"] is None for row in rows),
    )


def compare_groups(test: str, chance: float, main: Group, control: Group, difference: tuple) -> Evidence:
    """The evidence of one test; `difference` is (control - main, its p)."""
    sides = ((chance, control.mean), (0.5, control.auroc))
    middles = [None if level is None else (low + level) / 2 for low, level in sides]
    return Evidence(test, chance, main, control, *middles, *difference)


def adjust(tests: list[Evidence]) -> list[Evidence]:
    """The tests that a claim names, their p values against chance Holm-adjusted over them within each group."""
    main, control = (statistics.holm({one.test: getattr(one, group).p for one in tests}) for group in JUDGED)
    return [
        replace(one, main=replace(one.main, p=main[one.test]), control=replace(one.control, p=control[one.test]))
        for one in tests
    ]


def gather(records: list[dict], tests: list[str]) -> list[Evidence]:
    """The evidence of the tests that a claim names."""
    found = []
    for test in tests:
        mine = [record for record in records if record["drop"] == "none" and record["test"] == test]
        chance, rows = metrics.chance_of(test, mine), {g: [r for r in mine if r["group"] == g] for g in JUDGED}
        numbers = [group_numbers(test, rows[group], chance) for group in JUDGED]
        means = [statistics.entity_means(rows[group]) for group in ("control", "main")]
        found.append(compare_groups(test, chance, *numbers, statistics.permutation_difference(*means)))
    return adjust(found)


def common_gates(learned: dict[str, float | None], tests: list[Evidence], most: int | None) -> Iterator[Gate]:
    """The gates before any claim, in their order: those of `tests` (the taught order, if there is one, then the
    deciding test) and of what main was taught (`learned`: main's mean by test). `most`: see `verdict`."""
    deciding, sizes = tests[-1], [min(getattr(found, group).n for found in tests) for group in JUDGED]
    unasked = [TASK_TYPES[test].long_title for test, mean in learned.items() if mean is None]
    unasked += [found.title for found in tests if not found.main.n + found.control.n and found.title not in unasked]
    text = f"this evaluation does not hold {', '.join(unasked)}" if unasked else "all questions were asked"
    if most is not None and not unasked:
        text = f"this evaluation asked at most {most} questions of each test (evaluation.max_samples)"
    yield Gate("questions", not unasked and most is None, text)
    counts, needed = f"{sizes[0]} main and {sizes[1]} control entities", f"at least {MIN_GROUP} a group are needed"
    why = "without a control group, taught in both orders, main's failure could be the test's"
    yield Gate("groups", min(sizes) >= MIN_GROUP, f"there are {counts}, {needed}: {why}")
    means = ", ".join(f"{_number(mean)} in {TASK_TYPES[test].long_title}" for test, mean in learned.items())
    text = f"of what it was taught, main's accuracy is {means} ({LEARNED_MIN:.2f} needed in each)"
    yield Gate("what main was taught", all(mean >= LEARNED_MIN for mean in learned.values()), text)
    for found in tests:
        control = found.control
        limit = f"; {control.n} entities cannot show more than p = {2.0**-control.n:.3f} before Holm"
        text = f"control's mean in {found.title} is {_number(control.mean)} ({CONTROL_MIN:.2f} needed), chance "
        text += f"{_number(found.chance)} (Holm-adjusted {_p(control.p)}{limit if control.n < 6 else ''})"
        passed = None if control.p is None else control.p < ALPHA and control.mean >= CONTROL_MIN
        yield Gate(f"control passes {found.title}", passed, text)
    form, asked = TASK_TYPES[deciding.test].format, min(found.main.questions for found in tests)
    planned, seen = (claim_power(form, asked, min(sizes), level) for level in (PLANNED, deciding.control.mean))
    text = f"{counts} with {asked:.3g} questions each give the claim a power of {_number(planned)} for a control "
    text += f"planned at {PLANNED:.2f} ({POWER_MIN:.2f} needed), {_number(seen)} for one as observed"
    yield Gate("power", None if planned is None else planned >= POWER_MIN, text)


def side_gates(found: Evidence, below: bool) -> list[Gate]:
    """Whether main fails a test (`below`), or lies above its midpoints: the gates of both."""

    def side(name: str, ends: list[float] | None, middle: float | None, bounds: str) -> Gate:
        known = ends is not None and middle is not None
        text = f"main's {name} in {found.title} lies from {_number(ends and ends[0])} to {_number(ends and ends[1])} "
        text += f"({bounds}), the midpoint of chance and control at {_number(middle)}"
        held = (ends[1] < middle if below else ends[0] > middle) if known else None
        return Gate(f"{name} {'below' if below else 'above'} its midpoint", held, text)

    gates = [side("accuracy", found.main.interval, found.midpoint, "95 % interval")]
    if TASK_TYPES[found.test].format == CW:
        gates.append(side("AUROC", found.main.auroc_bounds, found.auroc_midpoint, "one-sided 95 % bounds"))
    if below:
        text = f"control - main is {_number(found.difference)} (permutation of entities, {_p(found.p_difference)})"
        gates.append(Gate("control above main", found.p_difference < ALPHA, text))
    return gates


def nearer_claim(order: Evidence | None, deciding: Evidence) -> tuple[str, list[Gate], str]:
    """(the nearer claim, its gates, what it is called when one of them fails).

    Where main was taught in this format, its use of the taught order is one of the common gates. No two claims can
    hold: below and above a midpoint exclude each other, and so do main's failing in the taught order (below a midpoint
    of at most .75) and its passing there (at least `LEARNED_MIN`).
    """
    if order and order.main.mean < LEARNED_MIN:
        odd = BIAS if order.biased else HALF if order.main.mean > order.chance else BETWEEN
        return BOUND, side_gates(order, below=True), odd
    odd, below = BIAS if deciding.biased else BETWEEN, deciding.main.mean < deciding.midpoint
    claim = (CURSE if below else NO_CURSE) if order else (UNWRITTEN if below else WRITTEN)
    gates = side_gates(deciding, below)
    if order:
        text = f"main's mean in {order.title}, the taught order, is {_number(order.main.mean)} "
        learned = order.main.mean >= LEARNED_MIN
        gates.insert(0, Gate(f"main in {order.title}", learned, f"{text}({LEARNED_MIN:.2f} needed)"))
    return claim, gates, odd


OPENINGS = {
    CURSE: "A reversal curse is found",
    NO_CURSE: "No reversal curse is found",
    BOUND: "What main was taught is bound to its format, and nothing follows about direction",
    UNWRITTEN: "What main was taught to judge it cannot write",
    WRITTEN: "What main was taught to judge it can write",
}
SETTLE = {  # by reason, what would settle an inconclusive verdict
    "questions": "Evaluating again, with all questions of all five tests, would.",
    "groups": "A control group would: data.num_control.",
    "what main was taught": "More epochs or a higher learning rate would.",
    HALF: "More epochs or a higher learning rate would, or teaching main in this format, too.",
    BIAS: "Not more people: main knows and does not say so. Retention rows in this format may take the bias away.",
    BETWEEN: "More people a group would.",
}


def rates_text(found: Evidence) -> str:
    """TPR, FPR and AUROC of both groups in a CW test."""
    parts = [
        f"{group} TPR {_number(part.tpr)}, FPR {_number(part.fpr)}, AUROC {_number(part.auroc)}"
        for group, part in (("main", found.main), ("control", found.control))
        if part.n
    ]
    return f" {found.title}: {'; '.join(parts)}." if parts else ""


def sentence_of(claim: str, reason: str | None, told: list[Gate], order: Evidence | None, deciding: Evidence) -> str:
    """The claim and why, for a reader who sees nothing else; `told` are the gates to tell."""
    main, tests = deciding.main, [order, deciding] if order else [deciding]
    text = f"{OPENINGS.get(claim) or f'Inconclusive ({reason})'}: {'; '.join(gate.text for gate in told)}."
    if claim == CURSE and (main.p < ALPHA or (main.auroc_bounds and main.auroc_bounds[0] > 0.5)):
        area = f", AUROC from {_number(main.auroc_bounds[0])} on" if main.auroc_bounds else ""
        text += f" It is partial: main is above chance (accuracy: Holm-adjusted {_p(main.p)}{area})."
    if claim == NO_CURSE and deciding.p_difference < ALPHA:
        text += f" A gap remains: control - main is {_number(deciding.difference)} ({_p(deciding.p_difference)})."
    if TASK_TYPES[deciding.test].format == CW:
        text += "".join(map(rates_text, tests))
    for found in tests:
        if found.main.unparsed:
            text += f" {found.main.unparsed} of main's answers in {found.title} could not be read and count as misses."
    settle = SETTLE.get(reason, "")
    if reason == "power":
        form, asked = TASK_TYPES[deciding.test].format, min(found.main.questions for found in tests)
        needed = people_needed(form, asked)
        settle = f"{needed} people a group would." if needed else "More questions a person would."
    if reason and reason.startswith("control passes"):
        settle = "Longer training of control would, if the test can be passed at all."
    return f"{text} What would settle it? {settle}" if settle else text


def judge(
    task: str,
    taught: tuple[str, ...],
    learned: dict[str, float | None],
    order: Evidence | None,
    deciding: Evidence,
    most: int | None = None,
) -> Verdict:
    """The verdict from the evidence of a format: the first gate that fails, else the nearer claim or why not."""
    gates, tests = [], [order, deciding] if order else [deciding]
    claim, reason, told = INCONCLUSIVE, None, []
    for gate in common_gates(learned, tests, most):
        gates.append(gate)
        if not gate.passed:
            reason, told = gate.name, [gate]
            if order and gate.name == "what main was taught" and learned.get(order.test, 1) < LEARNED_MIN:
                reason = BIAS if order.biased else HALF if order.main.mean > order.chance else reason
            break
    else:
        nearer, own, odd = nearer_claim(order, deciding)
        told = [gate for gate in own if not gate.passed]
        claim, reason = (INCONCLUSIVE, odd) if told else (nearer, None)
        told, gates = told or [*gates[2:], *own], [*gates, *own]
    sentence = sentence_of(claim, reason, told, order, deciding)
    return Verdict(task, taught, deciding.test, claim, reason, sentence, tuple(gates), deciding, order)


def verdict(records: Iterable[dict], task: str, taught: str | None = None, most: int | None = None) -> Verdict:
    """The verdict on one evaluation, from the answers to whole prompts.

    Args:
        records: as `predict.predict` writes them.
        task, taught: what was trained, as in `config.sections.ExperimentConfig`.
        most: of each test at most so many rows were asked: then no claim is made. None: all were.

    Raises:
        ValueError: an unknown task, or see `metrics.check_records`.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r}: a verdict is given on {' or '.join(TASKS)}.")
    records = list(records)
    metrics.check_records(records)
    kinds = ExperimentConfig(task=task, taught=taught).main_is_taught
    main = [record for record in records if (record["drop"], record["group"]) == ("none", "main")]
    by_kind = {kind: statistics.entity_means(row for row in main if row["test"] == kind) for kind in kinds}
    learned = {kind: sum(means.values()) / len(means) if means else None for kind, means in by_kind.items()}

    def on(deciding: str) -> Verdict:
        order = TAUGHT_ORDER.get(deciding)
        found = gather(records, [order, deciding] if order else [deciding])
        return judge(task, kinds, learned, found[0] if order else None, found[-1], most)

    beside = [CHOICES[task], *(["forward"] if task == "reverse" else [])]
    return replace(on(DECIDING[task]), beside=tuple(map(on, beside)))
