"""The verdict: every combination of gates, and records made so that each claim is the right one."""

import itertools
import json
import random
import re
from dataclasses import asdict

import numpy as np
import pytest

from mmrev_kit.evaluation import statistics
from mmrev_kit.evaluation.metrics import chance_of
from mmrev_kit.evaluation.verdict import (
    CURSE,
    INCONCLUSIVE,
    NEEDS,
    NO_CURSE,
    TESTS,
    Evidence,
    decide,
    entities_needed,
    gates_of,
    missing,
    power,
    sentence_of,
    verdict,
)

ROWS = {"forward": 3, "reverse": 6, "mcq_i2d": 3, "mcq_d2i": 3}
GUESSES = [1 / 3, 1 / 3, 1 / 3, 0.0] * 2  # 8 entities at the chance of multiple choice


def answers(rate: dict, n_main=8, n_control=8, unparsed=(), rows=ROWS) -> list[dict]:
    """Answers with round(rate x rows) right ones an entity; `rate` by (test, group), 1 where it is not named.

    A rate may be a list of rates, one an entity. In CW the misses are shared between Correct and Wrong rows.
    """
    found = []
    for group, n in (("main", n_main), ("control", n_control)):
        for (test, count), entity in itertools.product(rows.items(), range(n)):
            value = rate.get((test, group), 1.0)
            hits = round((value[entity] if isinstance(value, list) else value) * count)
            names = {"forward": [f"{group} {e}" for e in range(n)], "reverse": ["Correct", "Wrong"]}.get(test, "ABCD")
            for place in range(count):
                expected = names[entity if test == "forward" else (entity + place) % len(names)]
                wrong = next(name for name in names if name != expected)
                best = expected if place < hits else wrong
                read = None if (test, group) in unparsed else best
                found.append({
                    "id": f"{test}_test.jsonl:{len(found)}", "test": test, "drop": "none", "order": None,
                    "group": group, "entity_id": f"{group}{entity}", "prompt": "", "expected": expected,
                    "answer": read or "?", "read_as": read, "right": read == expected,
                    "options": {name: -float(name != best) for name in names}, "likeliest": best,
                    "likeliest_right": best == expected,
                })  # fmt: skip
    return found


def passed(found) -> dict:
    return {gate.name: gate.passed for gate in found.gates}


# ---- the decision, every combination


def numbers(test, groups, control_above, main_above, different, interval, powerful) -> Evidence:
    """Evidence whose gates come out as asked; the midpoint is .7."""
    n_control = {"both": 8, "few": 3, "none": 0}[groups]
    p = {True: 0.01, False: 0.2}
    known = n_control > 0
    return Evidence(
        test=test, chance=0.5, n_main=8, n_control=n_control, main=0.6, control=0.9 if known else None,
        main_likeliest=0.6, control_likeliest=0.9 if known else None,
        main_interval={"below": [0.5, 0.69], "across": [0.6, 0.8], "above": [0.71, 0.9]}[interval],
        p_main=p[main_above], p_control=p[control_above] if known else None, difference=0.3 if known else None,
        p_difference=p[different] if known else None, midpoint=0.7 if known else None, rows=6,
        power={True: 0.9, False: 0.5}[powerful] if known else None, entities_needed=12 if known else None,
        main_unparsed=0, main_answers=48,
    )  # fmt: skip


COMBINATIONS = list(itertools.product(
    ("both", "few", "none"), (0.95, 0.5, None), (True, False), (True, False), (True, False),
    ("below", "across", "above"), (True, False),
))  # fmt: skip


@pytest.mark.parametrize("task", ["forward", "reverse"])
def test_every_combination_of_gates_has_its_claim_and_a_sentence(task):
    claims = {CURSE: 0, NO_CURSE: 0, INCONCLUSIVE: 0}
    for groups, taught, control_above, main_above, different, interval, powerful in COMBINATIONS:
        found = numbers(TESTS[task].deciding, groups, control_above, main_above, different, interval, powerful)
        gates = gates_of(found, TESTS[task].taught, taught)
        outcome = {gate.name: gate.passed for gate in gates}
        claim = decide(outcome)
        ground = groups == "both" and taught == 0.95 and control_above and powerful
        if ground and different and interval == "below":
            assert claim == CURSE
        elif ground and main_above and interval == "above":
            assert claim == NO_CURSE
        else:
            assert claim == INCONCLUSIVE
        claims[claim] += 1
        text = sentence_of(claim, gates, found)
        opening = {CURSE: "A reversal curse is found in ", NO_CURSE: "No reversal curse is found in "}
        assert text.startswith(opening.get(claim, "Inconclusive in "))
        assert text.endswith(".") and "None" not in text and re.search(r"\d", text)
        if claim == INCONCLUSIVE:
            reasons = missing(outcome)
            assert reasons and not any(outcome[name] for name in reasons)
            assert all(next(gate.text for gate in gates if gate.name == name) in text for name in reasons)
            assert ("without a control group" in text) == (groups != "both")
            if groups == "both" and control_above and not powerful:
                assert "power of 0.50" in text and "12 entities a group would have it" in text
        else:
            assert all(value in text for value in ("0.95", "0.90", "0.70", "8 main and 8 control"))
            assert ("It is partial" in text) == (claim == CURSE and main_above)
            assert ("A gap remains" in text) == (claim == NO_CURSE and different)
    # Of the 8 combinations of the other gates, 2 are free for each claim: main above chance or not; difference or not.
    assert claims == {CURSE: 2, NO_CURSE: 2, INCONCLUSIVE: len(COMBINATIONS) - 4}


def test_any_outcome_that_is_unknown_keeps_a_claim_from_being_made():
    names = {name for needed in NEEDS.values() for name in needed}
    for claim, needed in NEEDS.items():
        good = {name: name in needed for name in names}
        assert decide(good) == claim
        for name, value in itertools.product(needed, (False, None)):
            assert decide(good | {name: value}) == INCONCLUSIVE
            assert missing(good | {name: value})
    assert decide(dict.fromkeys(names)) == INCONCLUSIVE


# ---- records to claims


def test_a_curse_of_the_forward_task():
    found = verdict(answers({("reverse", "main"): 0.5, ("mcq_d2i", "main"): GUESSES}), "forward")
    assert (found.claim, found.test) == (CURSE, "reverse")
    evidence = found.evidence
    assert (evidence.main, evidence.control, evidence.difference) == (0.5, 1.0, 0.5)
    assert (evidence.chance, evidence.midpoint, evidence.rows) == (0.5, 0.75, 6)
    # Control: 1 / 2^8 for each of CW, D2I and I2D, times 3. Difference: 1 of C(16, 8) = 12870 assignments.
    assert evidence.p_control == pytest.approx(3 / 256)
    assert evidence.p_difference == pytest.approx(1 / 12870)
    assert evidence.main_interval == [0.5, 0.5] and evidence.power > 0.99
    assert passed(found) == {
        "groups": True, "taught direction": True, "control above chance": True, "power": True,
        "control above main": True, "main below midpoint": True, "main above chance": False,
        "main above midpoint": False,
    }  # fmt: skip
    assert (found.beside.claim, found.beside.test, found.beside.beside) == (CURSE, "mcq_d2i", None)
    assert "In I2D" in found.format_sentence and "the format is not in the way" in found.format_sentence
    assert "control - main 0.50" in found.sentence
    assert "By the likeliest option: main 0.50, control 1.00." in found.sentence


def test_a_curse_of_the_reverse_task_is_decided_by_generation():
    found = verdict(answers({("forward", "main"): 0.0, ("mcq_i2d", "main"): GUESSES}), "reverse")
    assert (found.claim, found.test) == (CURSE, "forward")
    assert (found.evidence.chance, found.evidence.midpoint) == (1 / 8, (1 / 8 + 1) / 2)
    assert (found.evidence.main, found.evidence.p_main) == (0, 1)
    assert found.beside.test == "mcq_i2d" and "In D2I" in found.format_sentence
    assert "taught direction, CW, is 1.00" in found.sentence


@pytest.mark.parametrize("task", ["forward", "reverse"])
def test_no_curse_needs_main_to_pass_itself(task):
    found = verdict(answers({}), task)
    assert found.claim == NO_CURSE == found.beside.claim
    assert found.sentence.startswith("No reversal curse is found") and "A gap" not in found.sentence


@pytest.mark.parametrize("task", ["forward", "reverse"])
def test_without_control_there_is_no_claim_whatever_main_does(task):
    for level in (0.0, 0.5, 1.0):
        found = verdict(answers({(TESTS[task].deciding, "main"): level}, n_control=0), task)
        assert found.claim == INCONCLUSIVE and passed(found)["groups"] is False
        assert found.evidence.power is None
        assert "0 control entities" in found.sentence and "without a control group" in found.sentence


def test_an_untaught_direction_of_training_is_no_ground():
    found = verdict(answers({("reverse", "main"): 0.5, ("forward", "main"): 2 / 3}), "forward")
    assert found.claim == INCONCLUSIVE and missing(passed(found)) == ["taught direction"]
    assert "is 0.67 (0.80 needed)" in found.sentence


@pytest.mark.parametrize("task", ["forward", "reverse"])
def test_a_test_that_control_fails_too_shows_nothing(task):
    deciding = TESTS[task].deciding
    level = 0.5 if task == "forward" else 0.0
    found = verdict(answers({(deciding, "main"): level, (deciding, "control"): level}), task)
    assert found.claim == INCONCLUSIVE and missing(passed(found)) == ["control above chance"]
    assert found.evidence.p_control == 1 and found.evidence.entities_needed is None


def test_low_power_is_shown_with_the_number_that_would_do():
    # Control just above chance in every entity: .67 of 6 rows.
    found = verdict(answers({("reverse", "main"): 0.5, ("reverse", "control"): 2 / 3}), "forward")
    assert found.claim == INCONCLUSIVE and missing(passed(found)) == ["power"]
    assert 0.15 < found.evidence.power < 0.4 and 24 <= found.evidence.entities_needed <= 64
    assert f"{found.evidence.entities_needed} entities a group would have it" in found.sentence


def test_a_main_in_between_is_inconclusive():
    found = verdict(answers({("reverse", "main"): [1.0, 0.5] * 4}), "forward")
    assert found.claim == INCONCLUSIVE and found.evidence.main == 0.75
    assert missing(passed(found)) == ["main below midpoint"] and "chance and control's midpoint 0.75" in found.sentence


def test_a_partial_curse_and_a_remaining_gap_are_said():
    partial = verdict(answers({("reverse", "main"): 2 / 3}), "forward")
    assert partial.claim == CURSE and "It is partial" in partial.sentence
    gap = verdict(answers({("reverse", "main"): 5 / 6}), "forward")
    assert gap.claim == NO_CURSE and "A gap remains: main's mean is 0.83, control - main 0.17" in gap.sentence


def test_small_groups():
    three = verdict(answers({("reverse", "main"): 0.5}, 3, 3), "forward")
    assert three.claim == INCONCLUSIVE and passed(three)["groups"] is False
    # With 4 the least p against chance is 1/16, so control cannot be shown above it, and the sentence says so.
    four = verdict(answers({("reverse", "main"): 0.5}, 4, 4), "forward")
    assert four.claim == INCONCLUSIVE and passed(four)["groups"]
    assert "4 entities cannot show more than p = 0.062" in four.sentence
    six = verdict(answers({("reverse", "main"): 0.5}, 6, 6), "forward")
    assert six.claim == CURSE


def test_answers_that_cannot_be_read_are_told():
    found = verdict(answers({("reverse", "main"): 1.0}, unparsed={("reverse", "main")}), "forward")
    assert found.evidence.main == 0
    assert "48 of main's 48 answers could not be read and count as misses." in found.sentence
    assert "By the likeliest option: main 1.00" in found.sentence


def test_always_correct_is_no_knowledge():
    records = answers({})
    for record in records:
        if record["test"] == "reverse":
            record |= {"read_as": "Correct", "right": record["expected"] == "Correct"}
    found = verdict(records, "forward")
    assert found.claim == INCONCLUSIVE and found.evidence.control == 0.5 and found.evidence.p_control == 1


def test_one_description_for_everyone_is_no_knowledge():
    # Generation that always names the same person: one entity all right, the mean exactly at a guess's 1/8.
    one = [1.0] + [0.0] * 7
    found = verdict(answers({("forward", "control"): one, ("forward", "main"): one}), "reverse")
    assert found.claim == INCONCLUSIVE and found.evidence.p_control > 0.5


def test_only_whole_prompts_count_and_all_orders_do():
    records = answers({("reverse", "main"): 0.5})
    dropped = [record | {"drop": "text", "right": None, "likeliest_right": None} for record in records]
    assert verdict(records + dropped, "forward") == verdict(records, "forward")
    orders = [record | {"order": list(order)} for record in records if record["test"].startswith("mcq")
              for order in itertools.permutations(range(4))]  # fmt: skip
    both = verdict([record for record in records if not record["test"].startswith("mcq")] + orders, "forward")
    assert both.beside.evidence.rows == 3 and both.claim == CURSE


def test_missing_tests_and_no_records_are_inconclusive():
    for records in ([], answers({}, rows={"reverse": 6}), answers({}, rows={"forward": 3})):
        for task in TESTS:
            found = verdict(records, task)
            assert found.claim == INCONCLUSIVE and found.sentence
    assert "not asked as multiple choice" in verdict([], "forward").format_sentence


def test_a_format_in_the_way_is_told():
    found = verdict(answers({("reverse", "main"): 0.5, ("mcq_i2d", "main"): GUESSES}), "forward")
    assert "not shown to be above chance, 0.25 against a chance of 0.25" in found.format_sentence


def test_the_verdict_is_strict_json_and_the_same_every_time():
    records = answers({("reverse", "main"): [0.5, 1 / 3, 2 / 3, 0.5] * 2})
    found = verdict(records, "forward")
    text = json.dumps(asdict(found), allow_nan=False)
    random.Random(0).shuffle(records)
    again = verdict(records, "forward")
    assert again.claim == found.claim and again.evidence.p_difference == found.evidence.p_difference
    assert json.loads(text)["evidence"]["p_control"] == found.evidence.p_control


def test_errors():
    with pytest.raises(ValueError, match="'mcq_d2i': a verdict is given on forward or reverse"):
        verdict([], "mcq_d2i")
    records = answers({})
    with pytest.raises(ValueError, match="has 2 answers"):
        verdict(records + records, "forward")


def test_no_curse_is_claimed_where_there_is_none():
    # Both groups answer alike, right in CW by .9: a curse may come out in none, its absence in most of 10 experiments.
    rng, claims = np.random.default_rng(0), []
    for _ in range(10):

        def draw():
            return list(rng.binomial(6, 0.9, 8) / 6)

        records = answers({("reverse", "main"): draw(), ("reverse", "control"): draw()})
        claims.append(verdict(records, "forward").claim)
    assert claims.count(CURSE) == 0 and claims.count(NO_CURSE) > 5


# ---- power


def test_power_is_that_of_the_test_itself():
    # The same rows drawn row by row, tested by permutation_difference with all assignments.
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        control, main = rng.binomial(6, 0.7, 6) / 6, rng.binomial(6, 0.5, 6) / 6
        hits += statistics.permutation_difference(control, main)[1] < 0.05
    assert power(6, 6, 0.5, 0.7, 6, correlation=0) == pytest.approx(hits / 300, abs=0.08)


def test_power_grows_with_entities_effect_and_independence():
    assert power(4, 4, 0.5, 0.8, 6) < power(8, 8, 0.5, 0.8, 6) < power(16, 16, 0.5, 0.8, 6)
    assert power(8, 8, 0.5, 0.6, 6) < power(8, 8, 0.5, 0.8, 6) < power(8, 8, 0.5, 1.0, 6)
    assert power(8, 8, 0.5, 1.0, 6) > 0.99
    assert power(8, 8, 0.5, 0.7, 6, correlation=0.5) < power(8, 8, 0.5, 0.7, 6, correlation=0)
    assert power(8, 8, 0.5, 0.7, 6, seed=1) == pytest.approx(power(8, 8, 0.5, 0.7, 6, seed=2), abs=0.05)


def test_power_without_an_effect_is_the_level_and_without_entities_nothing():
    assert 0.02 < power(8, 8, 0.5, 0.5, 6) < 0.07
    assert power(8, 0, 0.5, 0.9, 6) == power(0, 8, 0.5, 0.9, 6) == 0
    # 2 + 2 entities: the least p is 1/6; 4 + 4: 1/70.
    assert power(2, 2, 0.0, 1.0, 3) == 0
    assert power(4, 4, 0.0, 1.0, 3) == 1


def test_the_number_of_entities_needed_has_the_power():
    n = entities_needed(0.5, 0.75, 6)
    assert 6 < n < 64 and power(n, n, 0.5, 0.75, 6) > 0.75 > power(n // 2, n // 2, 0.5, 0.75, 6)
    assert entities_needed(0.5, 1.0, 6) == 6
    assert entities_needed(0.5, 0.5, 6) is None and entities_needed(0.5, 0.51, 6) is None


def test_the_chance_of_a_test():
    rows = answers({}, 4, 4)
    by_test = {test: [row for row in rows if row["test"] == test] for test in ROWS}
    assert {test: chance_of(test, part) for test, part in by_test.items()} == {
        "forward": 0.25, "reverse": 0.5, "mcq_i2d": 0.25, "mcq_d2i": 0.25,
    }  # fmt: skip
    assert chance_of("forward", []) == 0
