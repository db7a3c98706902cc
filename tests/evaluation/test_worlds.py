"""benchmarks/verdict_worlds.py: its simulated numbers are the verdict's own, and the shipped powers are its."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from mmrev_kit.data.design import claim_power
from mmrev_kit.data.tasks import CW
from mmrev_kit.evaluation import verdict

PATH = Path(__file__).parents[2] / "benchmarks" / "verdict_worlds.py"


@pytest.fixture(scope="module")
def worlds():
    spec = importlib.util.spec_from_file_location("verdict_worlds", PATH)
    module = sys.modules["verdict_worlds"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["verdict_worlds"]


def records(given: dict, test: str, group: str, number: int) -> list[dict]:
    """The answers of one simulated evaluation as an evaluation writes them."""
    yes, no = given["yes"][number], given["no"][number]
    odds, half = np.concatenate([yes, no], axis=1), yes.shape[1]
    found = []
    for entity, row in np.ndindex(odds.shape):
        expected, said = "Correct" if row < half else "Wrong", "Correct" if odds[entity, row] > 0 else "Wrong"
        read = said if given["read"][number, entity, row] else None
        found.append({
            "id": f"{test} {group} {entity} {row}", "test": test, "drop": "none", "order": None, "group": group,
            "entity_id": f"{group}{entity}", "prompt": f"{row}", "images": [], "expected": expected, "read_as": read,
            "right": read == expected, "options": {"Correct": odds[entity, row], "Wrong": 0.0},
        })  # fmt: skip
    return found


def test_simulated_numbers_are_those_of_the_same_answers_as_records(worlds):
    rng, people = np.random.default_rng(0), [worlds.People(0.6, bias=0.3, unparsed=0.1), worlds.People(0.9)]
    given = {
        (test, group): worlds.answers(one, rng, 8, 7, 12)
        for test in ("cw_image", "reverse")
        for group, one in zip(("main", "control"), people, strict=True)
    }
    fast = [
        list(worlds.evidence(test, 0.5, given[test, "main"], given[test, "control"], rng))
        for test in ("cw_image", "reverse")
    ]
    for number, simulated in enumerate(zip(*fast, strict=True)):
        rows = [row for (test, group), part in given.items() for row in records(part, test, group, number)]
        for found, expected in zip(
            verdict.adjust(list(simulated)), verdict.gather(rows, ["cw_image", "reverse"]), strict=True
        ):
            for group in ("main", "control"):
                ours, theirs = getattr(found, group), getattr(expected, group)
                assert (ours.n, ours.questions, ours.unparsed) == (theirs.n, theirs.questions, theirs.unparsed)
                for name in ("mean", "interval", "auroc", "auroc_bounds", "tpr", "fpr"):
                    assert getattr(ours, name) == pytest.approx(getattr(theirs, name)), name
                assert ours.p == pytest.approx(theirs.p, abs=0.08)  # drawn there, exact here
            assert found.difference == pytest.approx(expected.difference)
            assert found.p_difference == pytest.approx(expected.p_difference, abs=0.06)
            assert (found.midpoint, found.auroc_midpoint) == pytest.approx((expected.midpoint, expected.auroc_midpoint))


def test_rows_of_one_person_correlate_as_asked(worlds):
    right = worlds.answers(worlds.People(0.7, correlation=0.3), np.random.default_rng(0), 400, 20, 12)["right"]
    assert right.mean() == pytest.approx(0.7, abs=0.01)
    # Two rows of one kind: their covariance over a row's variance.
    pairs = (right[..., 0] * right[..., 1]).mean() - right[..., 0].mean() * right[..., 1].mean()
    assert pairs / (0.7 * 0.3) == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize(("questions", "people"), [(9, 12), (6, 16)])
def test_the_table_of_powers_is_what_the_simulation_gives(worlds, questions, people):
    found = worlds.power_of(CW, questions, people, 0.95, 1000)
    assert claim_power(CW, questions, people) == pytest.approx(found, abs=0.05)


def test_knowing_with_a_bias_is_never_a_curse_and_equal_knowledge_hardly_ever(worlds):
    by_name = {world.name: world for world in worlds.worlds()}
    for name in (
        "AUROC 1.0, says Wrong",
        "AUROC 1.0, says Correct",
        "equal knowledge 0.90",
        "knows .95, half unparsed",
    ):
        assert worlds.claims(by_name[name], 16, 200)[verdict.CURSE] == 0
