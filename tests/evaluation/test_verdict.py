"""The verdict: every combination of gates and claims, and records made so that each claim is the right one."""

import itertools
import json
import random
from collections import Counter
from dataclasses import asdict

import pytest

from mmrev_kit.data.tasks import TASK_TYPES
from mmrev_kit.evaluation import verdict
from mmrev_kit.evaluation.metrics import chance_of, metrics
from mmrev_kit.evaluation.verdict import (
    BETWEEN,
    BIAS,
    BOUND,
    CURSE,
    HALF,
    INCONCLUSIVE,
    NO_CURSE,
    UNWRITTEN,
    WRITTEN,
    Group,
)

ROWS = {"forward": 3, "reverse": 12, "cw_image": 12, "mcq_i2d": 3, "mcq_d2i": 3}
LEARNED = "what main was taught"


# ---- the decision, every combination of what the gates ask

# Where main may stand in a test whose midpoints are .725 (accuracy) and .74 (AUROC): (mean, interval or bounds).
ACCURACY = {
    "below": (0.55, [0.45, 0.65]),
    "low": (0.70, [0.60, 0.80]),
    "high": (0.75, [0.65, 0.85]),
    "above": (0.90, [0.80, 0.97]),
}
AUROC = {
    "below": (0.55, [0.40, 0.65]),
    "low": (0.70, [0.60, 0.80]),
    "high": (0.80, [0.70, 0.90]),
    "above": (0.95, [0.90, 0.99]),
}
SIZES = {"both": (8, 8), "few control": (8, 3), "no control": (8, 0)}
TAUGHT = {
    ("forward", "generation"): ("forward",),
    ("forward", "cw"): ("cw_image",),
    ("forward", None): ("forward", "cw_image"),
    ("reverse", None): ("reverse",),
}


def stand(test: str, sizes: tuple[int, int], accuracy: str, auroc: str, control_passes: bool, different: bool):
    """Evidence of a CW test."""
    (mean, interval), (area, bounds) = ACCURACY[accuracy], AUROC[auroc]
    main = Group(sizes[0], 12, mean, interval, 0.2, area, bounds, 0.6, 0.4)
    control = Group(sizes[1], 12, 0.95, [0.9, 1], 0.01 if control_passes else 0.2, 0.98, [0.9, 1], 0.95, 0.05)
    if not sizes[1]:
        return verdict.Evidence(test, 0.5, main, Group(0, 0.0), None, None, None, None)
    return verdict.compare_groups(test, 0.5, main, control, (0.95 - mean, 0.01 if different else 0.2))


def rules(c: dict) -> list[tuple[str, str | None, bool]]:
    """(claim, reason, its whole condition): exactly one of them must hold."""
    order, deciding = ("CW", "CW image first") if c["task"] == "reverse" else ("CW image first", "CW")
    in_format, stands = c["kinds"] != ("forward",), c["order"] == "above"
    wrote = c["wrote"] or "forward" not in c["kinds"]
    enough = c["sizes"] == "both"
    learned = enough and wrote and (stands or not in_format)
    passes = learned and c["control order"]
    both = passes and c["control deciding"]
    ready = both and c["power"]
    usable = ready and stands
    tells = BIAS if c["order"] == "biased" else HALF  # .55 and .70 lie above chance
    fails = c["accuracy"] == c["auroc"] == "below" and c["different"]
    wins = c["accuracy"] == c["auroc"] == "above"
    bias = c["accuracy"] in ("below", "low") and c["auroc"] in ("high", "above")
    return [
        (INCONCLUSIVE, "groups", not enough),
        (INCONCLUSIVE, LEARNED, enough and not wrote and (stands or not in_format)),
        (INCONCLUSIVE, tells, enough and in_format and not stands),
        (INCONCLUSIVE, f"control passes {order}", learned and not c["control order"]),
        (INCONCLUSIVE, f"control passes {deciding}", passes and not c["control deciding"]),
        (INCONCLUSIVE, "power", both and not c["power"]),
        (BOUND, None, ready and c["order"] == "below"),
        (INCONCLUSIVE, tells, ready and c["order"] in ("half", "biased")),
        (CURSE, None, usable and fails),
        (NO_CURSE, None, usable and wins),
        (INCONCLUSIVE, BIAS, usable and bias),
        (INCONCLUSIVE, BETWEEN, usable and not fails and not wins and not bias),
    ]


KEYS = ("sizes", "wrote", "order", "control order", "control deciding", "power", "accuracy", "auroc", "different")
ORDERS = {
    "below": ("below", "below"),
    "half": ("low", "low"),
    "biased": ("below", "above"),
    "above": ("above", "above"),
}


@pytest.mark.parametrize(("task", "taught"), TAUGHT)
def test_every_combination_has_exactly_one_claim(task, taught, monkeypatch):
    kinds, seen = TAUGHT[task, taught], Counter()
    order_test, test = ("cw_image", "reverse") if task == "forward" else ("reverse", "cw_image")
    yes = (True, False)
    for values in itertools.product(SIZES, yes, ORDERS, yes, yes, yes, ACCURACY, AUROC, yes):
        c = dict(zip(KEYS, values, strict=True)) | {"task": task, "kinds": kinds}
        monkeypatch.setattr(verdict, "claim_power", lambda *_, high=c["power"]: 0.9 if high else 0.5)
        order = stand(order_test, SIZES[c["sizes"]], *ORDERS[c["order"]], c["control order"], True)
        deciding = stand(test, SIZES[c["sizes"]], c["accuracy"], c["auroc"], c["control deciding"], c["different"])
        means = {"forward": 0.9 if c["wrote"] else 0.6, order_test: order.main.mean}
        found = verdict.judge(task, kinds, {kind: means[kind] for kind in kinds}, order, deciding)
        holding = [(claim, reason) for claim, reason, holds in rules(c) if holds]
        assert [(found.claim, found.reason)] == holding, c
        seen[found.claim, found.reason] += 1
        assert found.sentence.endswith(".") and "None" not in found.sentence
        assert (found.claim == INCONCLUSIVE) == (not all(gate.passed for gate in found.gates))
        if found.claim == INCONCLUSIVE:
            first = next(gate for gate in found.gates if not gate.passed)
            assert first.text in found.sentence and "What would settle it?" in found.sentence
    claims = {claim for claim, _ in seen}
    assert claims == {CURSE, NO_CURSE, INCONCLUSIVE} | ({BOUND} if taught == "generation" else set())


# ---- records to claims


def answers(rate: dict, n: int = 16, n_control: int | None = None, says: dict | None = None, rows: dict = ROWS) -> list:
    """Answers of n main and n_control control entities with round(rate x rows) right ones an entity in each test.

    Args:
        rate: by (test, group), 1 where it is not named; a list holds a rate an entity. In CW, a right answer is one
            whose log-odds of Correct are 1 or -1 as they should be; misses alternate between Correct and Wrong rows.
        says: by (test, group), what is written whatever the log-odds: Correct, Wrong, or None, which cannot be read.
    """
    found, says = [], says or {}
    for group, size in (("main", n), ("control", n if n_control is None else n_control)):
        for (test, count), entity in itertools.product(rows.items(), range(size)):
            value = rate.get((test, group), 1.0)
            hits = round((value[entity] if isinstance(value, list) else value) * count)
            names = {"forward": [f"{group} {e}" for e in range(size)]}.get(test, TASK_TYPES[test].answers)
            for place in range(count):
                expected = names[entity if test == "forward" else (entity + place) % len(names)]
                likeliest = expected if place < hits else next(name for name in names if name != expected)
                read = says.get((test, group), likeliest)
                found.append({
                    "id": f"{test}_test.jsonl:{len(found)}", "test": test, "drop": "none", "order": None,
                    "group": group, "entity_id": f"{group}{entity}", "prompt": f"question {place}", "images": [],
                    "expected": expected, "answer": read or "?", "read_as": read, "right": read == expected,
                    "options": {name: 0.5 - float(name != likeliest) for name in names}, "likeliest": likeliest,
                    "likeliest_right": likeliest == expected,
                })  # fmt: skip
    return found


def judged(rate: dict, task: str = "forward", taught: str | None = None, **more):
    return verdict.verdict(answers(rate, **more), task, taught)


# What each test comes to where main was taught one order only, at 16 + 16.
FAILED = {("reverse", "main"): 0.5, ("mcq_i2d", "main"): 0.34, ("mcq_d2i", "main"): 0.34}
KNOWS = {("reverse", "main"): 1.0}
WRONG, CORRECT = ({("reverse", "main"): word} for word in ("Wrong", "Correct"))


@pytest.mark.parametrize(
    ("rate", "more", "claim", "reason"),
    [
        (FAILED, {}, CURSE, None),
        (FAILED, {"taught": "cw"}, CURSE, None),
        (FAILED, {"taught": "generation"}, CURSE, None),
        ({}, {}, NO_CURSE, None),
        (FAILED | {("cw_image", "main"): 0.5}, {"taught": "generation"}, BOUND, None),
        (FAILED | {("cw_image", "main"): 0.5}, {}, INCONCLUSIVE, LEARNED),  # .50: not even half learned
        (FAILED | {("cw_image", "main"): 2 / 3}, {}, INCONCLUSIVE, HALF),
        (FAILED | {("cw_image", "main"): 0.75}, {"taught": "generation"}, INCONCLUSIVE, HALF),
        (FAILED | {("forward", "main"): 2 / 3}, {}, INCONCLUSIVE, LEARNED),
        (KNOWS, {"says": WRONG}, INCONCLUSIVE, BIAS),
        (KNOWS, {"says": CORRECT}, INCONCLUSIVE, BIAS),
        ({}, {"says": {("reverse", "main"): None}}, INCONCLUSIVE, BIAS),
        ({}, {"says": {("cw_image", "main"): "Wrong"}}, INCONCLUSIVE, BIAS),
        ({}, {"says": {("cw_image", "main"): "Wrong"}, "taught": "generation"}, INCONCLUSIVE, BIAS),
        ({("reverse", "main"): 0.75}, {}, INCONCLUSIVE, BETWEEN),
        ({("reverse", "control"): 0.5, ("reverse", "main"): 0.5}, {}, INCONCLUSIVE, "control passes CW"),
        ({("reverse", "control"): 2 / 3}, {}, INCONCLUSIVE, "control passes CW"),  # above chance, but under .7
        ({("cw_image", "control"): 0.5}, {}, INCONCLUSIVE, "control passes CW image first"),
        (FAILED, {"n_control": 0}, INCONCLUSIVE, "groups"),
        ({}, {"n_control": 0}, INCONCLUSIVE, "groups"),
        (FAILED, {"n": 3}, INCONCLUSIVE, "groups"),
        (FAILED, {"n": 8}, INCONCLUSIVE, "power"),
        (FAILED, {"n_control": 8}, INCONCLUSIVE, "power"),
        (FAILED, {"n": 4}, INCONCLUSIVE, "control passes CW image first"),  # 4 cannot show more than p = 1/16
        (FAILED, {"rows": {k: v for k, v in ROWS.items() if k != "cw_image"}}, INCONCLUSIVE, "questions"),
        ({("cw_image", "main"): 0.5}, {"task": "reverse"}, CURSE, None),
        ({}, {"task": "reverse"}, NO_CURSE, None),
        ({("reverse", "main"): 0.75}, {"task": "reverse"}, INCONCLUSIVE, HALF),
    ],
)
def test_each_claim_and_each_odd_case(rate, more, claim, reason):
    found = judged(rate, **more)
    assert (found.claim, found.reason) == (claim, reason), found.sentence


def test_the_numbers_of_a_curse():
    found = judged(FAILED)
    shown, order = found.evidence, found.order
    assert (found.test, shown.test, order.test, found.taught) == ("reverse",) * 2 + (
        "cw_image",
        ("forward", "cw_image"),
    )
    assert (shown.main.mean, shown.control.mean, shown.difference, shown.midpoint) == (0.5, 1.0, 0.5, 0.75)
    assert (shown.main.auroc, shown.control.auroc, shown.auroc_midpoint) == (0.5, 1.0, 0.75)
    assert (shown.main.tpr, shown.main.fpr, order.main.tpr, order.main.fpr) == (0.5, 0.5, 1, 0)
    assert shown.main.questions == 12 and shown.main.n == shown.control.n == 16
    # Control: 1 / 2^16 in each of the two tests that the claim names, so twice that.
    assert shown.control.p == order.control.p == pytest.approx(2 / 2**16)
    assert shown.main.p == pytest.approx(1.0)
    # The interval: no spread, so one twelfth of the rows of correlation .1: 16 x 12 / (1 + .1 x 11) = 91.4 rows, and
    # Wilson at a half with Student's t of 15 (2.131): 1/2 +- t / 2 / sqrt(91.4 + t^2).
    half = 2.131450 / 2 / (16 * 12 / 2.1 + 2.131450**2) ** 0.5
    assert shown.main.interval == pytest.approx([0.5 - half, 0.5 + half], abs=1e-6)
    assert [gate.name for gate in found.gates] == [
        "questions", "groups", LEARNED, "control passes CW image first", "control passes CW", "power",
        "main in CW image first", "accuracy below its midpoint", "AUROC below its midpoint", "control above main",
    ]  # fmt: skip
    assert all(gate.passed for gate in found.gates)
    assert "CW: main TPR 0.50, FPR 0.50, AUROC 0.50; control TPR 1.00, FPR 0.00, AUROC 1.00." in found.sentence


def test_of_a_draw_of_the_questions_nothing_is_claimed():
    whole, some = (verdict.verdict(answers(FAILED), "forward", None, most) for most in (None, 12))
    assert (whole.claim, some.claim, some.reason) == (CURSE, INCONCLUSIVE, "questions")
    assert "asked at most 12 questions of each test (evaluation.max_samples)" in some.sentence
    assert {one.claim for one in some.beside} == {INCONCLUSIVE} and some.evidence == whole.evidence


def test_only_the_gates_of_the_nearer_claim_are_shown():
    assert [gate.name for gate in judged({}).gates[-2:]] == ["accuracy above its midpoint", "AUROC above its midpoint"]
    early = judged({}, n_control=0)
    assert [gate.name for gate in early.gates] == ["questions", "groups"] and early.evidence.midpoint is None
    assert "0 control entities" in early.sentence and "data.num_control" in early.sentence


def test_knowing_with_a_bias_is_told_with_its_numbers():
    found = judged(KNOWS, says=WRONG)
    assert found.evidence.main.mean == 0.5 and found.evidence.main.auroc == 1.0
    assert "CW: main TPR 0.00, FPR 0.00, AUROC 1.00; control TPR 1.00" in found.sentence
    assert found.sentence.startswith(f"Inconclusive ({BIAS}): main's AUROC in CW lies from ")


def test_a_partial_curse_and_a_remaining_gap_are_said():
    partial = judged(FAILED | {("reverse", "main"): 7 / 12})
    assert partial.claim == CURSE and "It is partial" in partial.sentence
    assert "It is partial" not in judged(FAILED).sentence
    gap = judged({("reverse", "main"): 11 / 12})
    assert gap.claim == NO_CURSE and "A gap remains: control - main is 0.08" in gap.sentence
    assert "A gap" not in judged({}).sentence


def test_what_a_reverse_run_cannot_write_is_a_claim_of_its_own():
    choice, written = judged({("forward", "main"): 0.0}, "reverse").beside
    assert (choice.test, choice.order.test, choice.claim) == ("mcq_i2d", "mcq_d2i", NO_CURSE)
    assert (written.test, written.order, written.claim) == ("forward", None, UNWRITTEN)
    assert (written.evidence.chance, written.evidence.midpoint) == (1 / 16, (1 / 16 + 1) / 2)
    assert judged({}, "reverse").beside[1].claim == WRITTEN
    assert judged({("forward", "control"): 0.0}, "reverse").beside[1].reason == "control passes forward generation"
    (choice,) = judged({}).beside
    assert (choice.test, choice.order.test) == ("mcq_d2i", "mcq_i2d")


def test_choice_is_bound_to_its_format_where_main_fails_the_taught_direction_there_too():
    (choice,) = judged(FAILED).beside
    assert choice.claim == BOUND and "AUROC" not in choice.sentence
    (choice,) = judged(FAILED | {("mcq_i2d", "main"): 1.0}).beside
    assert choice.claim == CURSE


def test_low_power_is_told_with_the_number_that_would_do():
    found = judged(FAILED, n=8)
    gate = found.gates[-1]
    assert gate.name == "power" and "8 main and 8 control entities with 12 questions each" in gate.text
    assert "people a group would." in found.sentence and "of 0." in gate.text


def test_answers_that_cannot_be_read_are_told():
    found = judged({}, says={("reverse", "main"): None})
    assert found.evidence.main.mean == 0 and found.evidence.main.auroc == 1.0
    assert "192 of main's answers in CW could not be read and count as misses." in found.sentence


def test_a_question_asked_twice_counts_once_for_the_power():
    records = answers(FAILED)
    for record in records:
        if record["test"] in ("reverse", "cw_image"):
            record["prompt"] = f"question {int(record['prompt'].split()[1]) % 6}"
    found = verdict.verdict(records, "forward")
    assert found.evidence.main.questions == 6 and "with 6 questions each" in found.gates[5].text


@pytest.mark.parametrize("rate", [FAILED, {}, FAILED | {("cw_image", "main"): 0.5}])
def test_a_third_group_is_counted_and_shown_and_changes_no_verdict(rate):
    """Bridge knows nothing at all, in every test."""
    records = answers(rate)
    bridge = [
        record | {"id": f"b{record['id']}", "group": "bridge", "entity_id": f"b{record['entity_id']}"}
        for record in answers({(test, "main"): 0.0 for test in ROWS}, n=5, n_control=0)
    ]
    found = metrics(records + bridge)["none"]
    assert verdict.verdict(records + bridge, "forward") == verdict.verdict(records, "forward")
    for test in ROWS:
        assert list(found[test]) == ["all", "main", "control", "bridge"]
        assert (found[test]["bridge"]["accuracy"], found[test]["bridge"]["n_entities"]) == (0, 5)
        assert found[test]["main"] == metrics(records)["none"][test]["main"]
    with pytest.raises(ValueError, match="in the group 'bridge'"):  # one entity in two groups
        metrics([*records, records[0] | {"id": "again", "group": "bridge"}])


def test_only_whole_prompts_count_and_all_orders_do():
    records = answers(FAILED)
    dropped = [record | {"drop": "text", "right": None, "likeliest_right": None} for record in records]
    assert verdict.verdict(records + dropped, "forward") == verdict.verdict(records, "forward")
    orders = [record | {"order": list(order), "prompt": f"{record['prompt']} {order}"} for record in records
              if record["test"].startswith("mcq") for order in itertools.permutations(range(4))]  # fmt: skip
    both = verdict.verdict([record for record in records if not record["test"].startswith("mcq")] + orders, "forward")
    assert both.beside[0].evidence.main.questions == 3 and both.claim == CURSE


@pytest.mark.parametrize("task", ["forward", "reverse"])
def test_missing_tests_and_no_records_are_told(task):
    for rows in ({}, {"reverse": 12}, {"forward": 3}):
        found = verdict.verdict(answers({}, rows=rows), task)
        assert (found.claim, found.reason) == (INCONCLUSIVE, "questions") and "does not hold" in found.sentence


def test_option_probabilities_that_are_missing_leave_the_claim_open():
    records = answers(FAILED)
    for record in records:
        if (record["test"], record["group"]) == ("reverse", "main"):
            record["options"] = {"Correct": None, "Wrong": None}
    found = verdict.verdict(records, "forward")
    assert (found.claim, found.reason) == (INCONCLUSIVE, BETWEEN) and "from unknown to unknown" in found.sentence


def test_the_verdict_is_strict_json_and_the_same_every_time():
    records = answers({("reverse", "main"): [0.5, 1 / 3, 2 / 3, 0.5] * 4})
    found = verdict.verdict(records, "forward")
    text = json.dumps(asdict(found), allow_nan=False)
    random.Random(0).shuffle(records)
    again = verdict.verdict(records, "forward")
    assert again.claim == found.claim and again.evidence.p_difference == found.evidence.p_difference
    assert json.loads(text)["evidence"]["control"]["p"] == found.evidence.control.p


def test_errors():
    with pytest.raises(ValueError, match="'mcq_d2i': a verdict is given on forward or reverse"):
        verdict.verdict([], "mcq_d2i")
    records = answers({})
    with pytest.raises(ValueError, match="has 2 answers"):
        verdict.verdict(records + records, "forward")


def test_the_chance_of_a_test():
    rows = answers({}, 4)
    by_test = {test: [row for row in rows if row["test"] == test] for test in ROWS}
    assert {test: chance_of(test, part) for test, part in by_test.items()} == {
        "forward": 0.25, "reverse": 0.5, "cw_image": 0.5, "mcq_i2d": 0.25, "mcq_d2i": 0.25,
    }  # fmt: skip
    assert chance_of("forward", []) == 0
