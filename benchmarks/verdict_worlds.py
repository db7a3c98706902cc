"""How often the verdict claims what: simulated evaluations whose truth is known. `python benchmarks/verdict_worlds.py`

Prints the tables of benchmarks/README.md: coverage of the intervals and claims by world, in a minute and a half. With
`--powers` it writes mmrev_kit/assets/powers.json, the powers that the verdict and the design lines read.

A person answers from a level of their own, beta-distributed about the group's such that rows of one person correlate.
In CW that level is a distance d between the log-odds of right and wrong pairs, in units of the noise of a row: a
Correct row's log-odds are d + noise + bias, a Wrong row's -d + noise + bias, and Correct is said above 0.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import beta

from mmrev_kit.config.seeds import seed_for
from mmrev_kit.data.tasks import CHOICE, CW, GENERATION
from mmrev_kit.evaluation import statistics, verdict
from mmrev_kit.evaluation.metrics import AUROC_CONFIDENCE

POWERS = Path("mmrev_kit/assets/powers.json")
SIZES, LEVELS = (4, 6, 8, 10, 11, 12, 13, 14, 15, 16, 18, 20, 24, 32), (0.7, 0.8, 0.9, 0.95, 1.0)
CHANCES = {CW: 0.5, CHOICE: 0.25, GENERATION: 0.1}
DRAWS = 999  # sign flips or assignments of a permutation test
CERTAIN = 50.0  # a bias that no row's log-odds outweigh


@dataclass(frozen=True)
class People:
    """How one group answers one test."""

    level: float  # mean share of right answers without a bias
    bias: float = 0.0  # added to the log-odds of Correct
    correlation: float = 0.2  # of two rows of one person
    unparsed: float = 0.0  # share of answers that cannot be read
    partners: float = 0.0  # correlation of the noise of two people's rows that show each other
    repeated: bool = False  # the two Correct rows of a connector are one question, asked twice


@dataclass(frozen=True)
class World:
    """One kind of evaluation, in the taught order and in the other one, which decides; control is one in both."""

    name: str
    kind: str  # "curse", "midpoint" (none, at a midpoint) or "none"
    main: People  # in the deciding test
    order: People = field(default=People(0.95))
    control: People = field(default=People(0.95))
    taught: tuple[str, ...] = ("forward", "cw_image")


def levels(people: People, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Each person's own share of right answers."""
    if people.correlation == 0 or people.level in (0, 1):
        return np.full(shape, float(people.level))
    spread = (1 - people.correlation) / people.correlation
    return rng.beta(people.level * spread, (1 - people.level) * spread, shape)


@cache
def auroc_of(level: float, correlation: float = 0.2) -> float:
    """The mean AUROC within a person at a level: d + noise against -d + noise."""
    spread = (1 - correlation) / correlation
    grid = beta.ppf((np.arange(4000) + 0.5) / 4000, level * spread, (1 - level) * spread)
    return float(ndtr(np.sqrt(2) * ndtri(np.clip(grid, 1e-12, 1 - 1e-12))).mean())


def level_of(auroc: float) -> float:
    """The level whose AUROC is this one."""
    return 1.0 if auroc == 1 else brentq(lambda level: auroc_of(level) - auroc, 0.5, 0.999, xtol=1e-4)


def margins(people: People, rng: np.random.Generator, simulations: int, n: int, rows: int) -> tuple[np.ndarray, ...]:
    """The log-odds of Correct in the Correct and in the Wrong rows, each of shape (simulations, n, rows / 2)."""
    shape = (simulations, n, rows // 2)
    distance = ndtri(np.clip(levels(people, rng, shape[:2]), 1e-9, 1 - 1e-9))[..., None]
    noise, wrong = rng.normal(size=shape), rng.normal(size=shape)
    if people.repeated:
        noise = np.repeat(noise[..., ::2], 2, axis=-1)[..., : shape[2]]
    if people.partners:  # the first half of the rows shows the next person, the second half the one before
        half = shape[2] // 2
        pair = rng.normal(size=(simulations, n, half))
        both = np.concatenate([pair, np.roll(pair, 1, axis=1)], axis=-1)
        wrong[..., : 2 * half] *= np.sqrt(1 - people.partners)
        wrong[..., : 2 * half] += np.sqrt(people.partners) * both
    return distance + noise + people.bias, -distance + wrong + people.bias


def above_chance(means: np.ndarray, chance: float, rng: np.random.Generator) -> np.ndarray:
    """`statistics.permutation_above_chance` for each simulation, by drawn sign flips."""
    signs = rng.choice([-1.0, 1.0], size=(means.shape[1], DRAWS))
    deviations = means - chance
    observed = deviations.sum(axis=1, keepdims=True) - statistics.TOLERANCE
    return (1 + (deviations @ signs >= observed).sum(axis=1)) / (1 + DRAWS)


def differences(control: np.ndarray, main: np.ndarray, rng: np.random.Generator) -> list[tuple[float, float]]:
    """`statistics.permutation_difference` for each simulation, by drawn assignments."""
    pooled, n = np.concatenate([control, main], axis=1), control.shape[1]
    order = rng.permuted(np.tile(np.arange(pooled.shape[1]), (DRAWS, 1)), axis=1)
    observed = control.sum(axis=1, keepdims=True) - statistics.TOLERANCE
    p = (1 + (pooled @ (order < n).T.astype(float) >= observed).sum(axis=1)) / (1 + DRAWS)
    return list(zip((control.mean(axis=1) - main.mean(axis=1)).tolist(), p.tolist(), strict=True))


def answers(
    people: People, rng: np.random.Generator, simulations: int, n: int, rows: int, form: str = CW
) -> dict[str, np.ndarray]:
    """What a group's answers to one test come to: right (simulations, n, rows), and in CW margins by kind of row."""
    if form != CW:
        return {"right": rng.random((simulations, n, rows)) < levels(people, rng, (simulations, n))[..., None]}
    yes, no = margins(people, rng, simulations, n, rows)
    right = np.concatenate([yes > 0, no <= 0], axis=-1)
    read = rng.random(right.shape) >= people.unparsed
    return {"right": right & read, "read": read, "yes": yes, "no": no}


def groups(given: dict[str, np.ndarray], chance: float, rng: np.random.Generator) -> list[verdict.Group]:
    """The numbers of `verdict.group_numbers` for each simulation; p not adjusted."""
    right = given["right"]
    n, rows = right.shape[1:]
    means = right.mean(axis=2)
    low, high = statistics.mean_interval(means, rows)
    columns = [means.mean(axis=1), np.stack([low, high], axis=1), above_chance(means, chance, rng)]
    if "yes" in given:
        yes, no, half = given["yes"], given["no"], rows // 2
        aurocs = (yes[..., :, None] > no[..., None, :]).mean(axis=(2, 3))
        ends = statistics.mean_interval(aurocs, 3 * half * half / (2 * half + 1), AUROC_CONFIDENCE)
        said = given["read"] & np.concatenate([yes > 0, no > 0], axis=-1)
        columns += [aurocs.mean(axis=1), np.stack(ends, axis=1)]
        columns += [said[..., :half].mean(axis=(1, 2)), said[..., half:].mean(axis=(1, 2))]
        columns.append((~given["read"]).sum(axis=(1, 2)))
    return [verdict.Group(n, rows, *one) for one in zip(*(column.tolist() for column in columns), strict=True)]


def evidence(
    test: str, chance: float, main: dict[str, np.ndarray], control: dict[str, np.ndarray], rng: np.random.Generator
) -> Iterator[verdict.Evidence]:
    """The evidence of one test for each simulation."""
    shift = differences(*(part["right"].mean(axis=2) for part in (control, main)), rng)
    pairs = zip(groups(main, chance, rng), groups(control, chance, rng), shift, strict=True)
    return (verdict.compare_groups(test, chance, *three) for three in pairs)


def claims(world: World, n: int, simulations: int, rows: int = 12, form: str = CW, seed: int = 0) -> Counter:
    """{claim, or what an inconclusive verdict failed on: evaluations}, with n + n people."""
    rng = np.random.default_rng(seed_for(seed, "worlds", f"{world.name} {n} {rows} {form} {world.control.level}"))
    chance, tests = CHANCES[form], {CW: ("cw_image", "reverse"), CHOICE: ("mcq_i2d", "mcq_d2i")}.get(form, ("forward",))
    sides = [(world.order, tests[0]), (world.main, tests[-1])][-len(tests) :]
    found, parts = Counter(), []
    for main, test in sides:
        drawn = [answers(people, rng, simulations, n, rows, form) for people in (main, world.control)]
        parts.append(evidence(test, chance, *drawn, rng))
    for one in zip(*parts, strict=True):
        tests = verdict.adjust(list(one))
        learned = {"forward": 1.0, "cw_image": tests[0].main.mean}  # what main was taught to write it knows
        learned = {test: learned[test] for test in world.taught}
        judged = verdict.judge("forward", world.taught, learned, tests[-2] if len(tests) > 1 else None, tests[-1])
        found[judged.reason or judged.claim] += 1
    return found


WRITER = ("forward",)  # what main is taught by generation
CURSES = [
    World("curse: control .95, main .50", "curse", People(0.5)),
    World("curse: control .95, main .60", "curse", People(0.6)),
    World("curse: control .85, main .50", "curse", People(0.5), People(0.85), People(0.85)),
    World("curse, main always says Wrong", "curse", People(0.5, bias=-CERTAIN)),
    World("curse, Correct rows asked twice", "curse", *[People(x, repeated=True) for x in (0.5, 0.95, 0.95)]),
]


def worlds() -> list[World]:
    """Every world of the table."""
    middle = (0.5 + auroc_of(0.95)) / 2
    found = [World("no knowledge: both groups .50", "none", *[People(0.5)] * 3)]
    found += [World(f"equal knowledge {x:.2f}", "none", *[People(x)] * 3) for x in (0.6, 0.7, 0.8, 0.9, 0.95)]
    found.append(World("accuracy at the midpoint", "midpoint", People(0.725)))
    found.append(World("AUROC at the midpoint, no bias", "midpoint", People(level_of(middle))))
    for word, bias in (("Wrong", -CERTAIN), ("Correct", CERTAIN)):
        found.append(World(f"AUROC at the midpoint, says {word}", "midpoint", People(level_of(middle), bias)))
        for auroc in (0.6, 0.7, 0.8, 0.9, 1.0):
            kind = "none" if auroc > middle else "curse"
            found.append(World(f"AUROC {auroc:.1f}, says {word}", kind, People(level_of(auroc), bias)))
    found += [
        World("bound to the format", "none", People(0.5), People(0.5), taught=WRITER),
        World("half learned: .65 in the taught order", "none", People(0.5), People(0.65)),
        World("half learned, taught by generation", "none", People(0.5), People(0.65), taught=WRITER),
        World("weak control .65, main .65", "none", *[People(0.65)] * 3),
        World("weak control .65, main .50", "curse", People(0.5), People(0.95), People(0.65)),
        World("knows .95, half unparsed", "none", People(0.95, unparsed=0.5)),
        World("partners correlated .8, equal .80", "none", *[People(0.8, partners=0.8)] * 3),
        World("partners correlated .8, midpoint", "midpoint", *[People(x, partners=0.8) for x in (0.725, 0.95, 0.95)]),
        World("rows correlated .4, midpoint", "midpoint", *[People(x, correlation=0.4) for x in (0.725, 0.95, 0.95)]),
    ]
    return found + CURSES


def coverage(simulations: int = 20_000) -> None:
    """The share of 95 % intervals that hold the true mean, and their mean width."""
    rng = np.random.default_rng(seed_for(0, "worlds", "coverage"))
    print("| correlation | people | lowest coverage, means .5 to .95 | width at .50 | at .95 |\n|---|---|---|---|---|")
    for correlation in (0.0, 0.2, 0.4):
        for n in (8, 12, 16, 24):
            held, widths = {}, {}
            for mean in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
                own = levels(People(mean, correlation=correlation), rng, (simulations, n))
                low, high = statistics.mean_interval(rng.binomial(12, own) / 12, 12)
                held[mean], widths[mean] = ((low <= mean) & (mean <= high)).mean(), (high - low).mean()
            worst = min(held, key=held.get)
            print(f"| {correlation} | {n} | {held[worst]:.3f} (at {worst}) | {widths[0.5]:.2f} | {widths[0.95]:.2f} |")


def auroc_coverage(simulations: int = 20_000) -> None:
    """The share of one-sided 95 % bounds on the right side of the true AUROC, for levels of main."""
    rng = np.random.default_rng(seed_for(0, "worlds", "AUROC"))
    print("| people | AUROC | below the upper bound | above the lower bound |\n" + "|---" * 4 + "|")
    for n in (8, 12, 16, 24):
        for level in (0.5, 0.7, 0.9):
            found = groups(answers(People(level), rng, simulations, n, 12), 0.5, rng)
            true, ends = auroc_of(level), np.array([one.auroc_bounds for one in found])
            print(f"| {n} | {true:.2f} | {(true <= ends[:, 1]).mean():.3f} | {(true >= ends[:, 0]).mean():.3f} |")


def table(simulations: int) -> None:
    """Claims by world and number of people, with the power gate left open, so that small groups show theirs, too."""
    kept, verdict.claim_power = verdict.claim_power, lambda *_: 1.0
    sizes = (8, 12, 16, 24)
    columns = f"reversal curse (%), {' / '.join(map(str, sizes))} a group | no curse | bound | else, at 12"
    print(f"| world | truth | {columns} |\n" + "|---" * 6 + "|")
    for world in worlds():
        found = {n: claims(world, n, simulations) for n in sizes}
        cells = []
        for claim in (verdict.CURSE, verdict.NO_CURSE, verdict.BOUND):
            shares = [100 * counts.pop(claim, 0) / simulations for counts in found.values()]
            cells.append(" / ".join(f"{share:.1f}" for share in shares) if any(shares) else "none")
        other = ", ".join(f"{name} {100 * count / simulations:.0f}" for name, count in found[12].most_common(1))
        print(f"| {world.name} | {world.kind} | {' | '.join(cells)} | {other} |", flush=True)
    verdict.claim_power = kept


def power_of(form: str, questions: int, n: int, control: float, simulations: int) -> float:
    """The share of evaluations that find main's failure: main at chance, control and the taught order at `control`.

    9 different questions a person in CW are three Correct ones, each asked twice, and six Wrong ones.
    """
    repeated, rows = (form, questions) == (CW, 9), {9: 12}.get(questions, questions)
    main, other = (People(level, repeated=repeated) for level in (CHANCES[form], control))
    world = World("power", "curse", main, other, other, ("forward", "cw_image") if form == CW else WRITER)
    kept, verdict.claim_power = verdict.claim_power, lambda *_: 1.0
    found = claims(world, n, simulations, rows, form)
    verdict.claim_power = kept
    return (found[verdict.CURSE] + found[verdict.UNWRITTEN]) / simulations


def write_powers(simulations: int) -> None:
    """Write the table of powers: {"levels": [...], format: {questions: {people a group: [power at each level]}}}."""
    content: dict = {"levels": list(LEVELS)}
    for form, questions in ((CW, 6), (CW, 9), (CW, 12), (CHOICE, 3), (GENERATION, 3)):
        sizes = {n: [round(power_of(form, questions, n, level, simulations), 3) for level in LEVELS] for n in SIZES}
        content.setdefault(form, {})[str(questions)] = sizes
        print(form, questions, sizes, flush=True)
    POWERS.write_text(json.dumps(content) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--powers", action="store_true")
    asked = parser.parse_args()
    if asked.powers:
        write_powers(asked.simulations)
    else:
        coverage()
        auroc_coverage()
        table(asked.simulations)


if __name__ == "__main__":
    main()
