"""Intervals, tests and counts against scipy's own results, and against values worked out by hand in the comments."""

import json
import random

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test

from mmrev_kit.data.tasks import TASK_TYPES
from mmrev_kit.evaluation import metrics, statistics
from mmrev_kit.evaluation.verdict import verdict


def row(test="reverse", place=0, entity="a", read="Correct", expected="Correct", **more):
    right = read == expected
    return {
        "id": f"{test}_test.jsonl:{place}", "test": test, "drop": "none", "order": None, "group": "main",
        "entity_id": entity, "prompt": f"question {place}", "images": [], "expected": expected, "answer": read or "?",
        "read_as": read, "right": right, "options": {"Correct": -1.0, "Wrong": -2.0}, "likeliest": "Correct",
        "likeliest_right": expected == "Correct",
    } | more  # fmt: skip


# ---- rows


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (3, 8), (24, 48), (57, 60), (60, 60)])
def test_wilson_is_the_textbook_formula(correct, n):
    z, share = 1.959963984540054, correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    assert statistics.wilson(correct, n) == pytest.approx([centre - half, centre + half], abs=1e-12)


def test_wilson_knows_its_confidence_and_no_rows():
    assert statistics.wilson(0, 0) is None
    narrow, wide = statistics.wilson(30, 60, 0.5), statistics.wilson(30, 60, 0.99)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]


def test_exact_test():
    assert statistics.exact_test(3, 3, 0.5) == pytest.approx(1 / 8)
    assert statistics.exact_test(0, 3, 0.5) == 1
    assert statistics.exact_test(0, 4, 0.5, "two-sided") == pytest.approx(2 / 16)
    # One of two right at chance 1/4 or better: 1 - (3/4)^2 = 7/16.
    assert statistics.exact_test(1, 2, 0.25) == pytest.approx(7 / 16)
    assert statistics.exact_test(61, 120, 0.5) == pytest.approx(binomtest(61, 120, 0.5, "greater").pvalue)
    assert statistics.exact_test(0, 0, 0.5) is None


def test_mcnemar():
    assert statistics.mcnemar(0, 0) == 1
    assert statistics.mcnemar(0, 5) == statistics.mcnemar(5, 0) == pytest.approx(2 / 32)
    # 1 of 9: two-sided 2 * (1 + 9) / 512.
    assert statistics.mcnemar(1, 8) == pytest.approx(20 / 512)
    assert statistics.mcnemar(4, 4) == 1


def test_holm_by_hand():
    # Sorted: .01 x 4 = .04; .02 x 3 = .06; .03 x 2 = .06; .5 x 1 = .5.
    found = statistics.holm({"a": 0.03, "b": 0.01, "c": 0.5, "d": 0.02})
    assert found == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.5, "d": 0.06})
    # Monotone: .02 x 2 = .04, and .03 x 1 may not be smaller. At most 1. None belongs to no family.
    assert statistics.holm({"a": 0.02, "b": 0.03}) == pytest.approx({"a": 0.04, "b": 0.04})
    assert statistics.holm({"a": 0.7, "b": 0.9}) == {"a": 1, "b": 1}
    assert statistics.holm({"a": 0.04, "b": None}) == {"a": 0.04, "b": None}
    assert statistics.holm({}) == {}


def test_holm_properties():
    rng = random.Random(0)
    for _ in range(200):
        raw = {name: rng.random() ** 3 for name in range(rng.randint(1, 6))}
        found = statistics.holm(raw)
        assert all(raw[name] <= found[name] <= min(1, len(raw) * raw[name]) + 1e-15 for name in raw)
        by_raw = sorted(raw, key=raw.get)
        assert [found[name] for name in by_raw] == sorted(found.values())


# ---- entities


def test_rows_are_averaged_within_the_entity_and_none_is_left_out():
    rows = [row(place=i, entity=e, right=right) for i, (e, right) in enumerate(
        [("a", True), ("a", False), ("a", None), ("b", True), ("c", None)])]  # fmt: skip
    assert statistics.entity_means(rows) == {"a": 0.5, "b": 1.0}
    assert statistics.entity_means(rows, "likeliest_right") == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert statistics.entity_means([]) == {}


def test_the_interval_over_entities_is_wilsons_on_fewer_rows():
    # Eight entities of 6 rows, no spread about a half: correlation .1, so 48 / (1 + 5 x .1) = 32 rows; Student's t of 7
    # at 97.5 % is 2.364624, and Wilson's interval at a half is 1/2 +- t / 2 / sqrt(n + t^2).
    half = 2.364624 / 2 / (32 + 2.364624**2) ** 0.5
    assert statistics.mean_interval([0.5] * 8, 6) == pytest.approx([0.5 - half, 0.5 + half], abs=1e-6)
    # All or nothing: rows of one entity say the same, so 8 of them count, whatever the number of rows.
    low, high = statistics.mean_interval([1.0, 0.0] * 4, 6)
    half = 2.364624 / 2 / (8 + 2.364624**2) ** 0.5
    assert [low, high] == pytest.approx([0.5 - half, 0.5 + half], abs=1e-6)
    assert statistics.mean_interval([1.0, 0.0] * 4, 600) == pytest.approx([low, high])
    # One row each: plain Wilson with t for z.
    narrow = statistics.mean_interval([1.0] * 12 + [0.0] * 4, 1, 0.9)
    t, n = 1.753050, 16
    centre, spread = (12 + t * t / 2) / (n + t * t), t / (n + t * t) * (n * 0.75 * 0.25 + t * t / 4) ** 0.5
    assert narrow == pytest.approx([centre - spread, centre + spread], abs=1e-6)


def test_equal_means_leave_an_interval_and_one_entity_none():
    low, high = statistics.mean_interval([1.0] * 8, 12)
    assert high == 1 and 0.5 < low < 0.95
    assert statistics.mean_interval([0.0] * 8, 12) == pytest.approx([0, 1 - low])
    assert statistics.mean_interval([0.5], 12) is None and statistics.mean_interval({}, 12) is None
    assert statistics.mean_interval({"a": 1.0, "b": 0.5}, 12) == statistics.mean_interval([1.0, 0.5], 12)


def test_many_intervals_at_once_are_those_one_by_one():
    means = np.random.default_rng(0).integers(0, 13, (5, 8)) / 12
    low, high = statistics.mean_interval(means, 12)
    assert [[*pair] for pair in zip(low, high, strict=True)] == [statistics.mean_interval(one, 12) for one in means]


@pytest.mark.parametrize(("correlation", "wanted"), [(0.0, 0.93), (0.2, 0.93), (0.4, 0.92)])
def test_the_interval_holds_the_true_mean_as_often_as_it_should(correlation, wanted):
    rng = np.random.default_rng(0)
    for n, mean in [(8, 0.5), (8, 0.95), (16, 0.9), (24, 0.725), (24, 0.95)]:
        spread = (1 - correlation) / correlation if correlation else None
        own = rng.beta(mean * spread, (1 - mean) * spread, (4000, n)) if spread else np.full((4000, n), mean)
        low, high = statistics.mean_interval(rng.binomial(12, own) / 12, 12)
        assert ((low <= mean) & (mean <= high)).mean() > wanted - 0.01  # 2.5 standard errors


def test_rows_and_different_questions_an_entity():
    rows = [row(place=i, entity=e, prompt=p) for i, (e, p) in enumerate(["aq", "aq", "ar", "bq"])]
    # 3 rows and 1: harmonic mean 1.5. 2 different questions and 1: 4/3.
    assert statistics.rows_each(rows) == 1.5 and statistics.questions_each(rows) == pytest.approx(4 / 3)
    assert statistics.rows_each([one | {"right": None} for one in rows]) == 0 == statistics.questions_each([])
    orders = [row(place=0, order=[k, 1 - k], prompt=f"order {k}") for k in range(2)]
    assert statistics.rows_each(orders) == 2 and statistics.questions_each(orders) == 1


def test_sign_flips_by_hand():
    assert statistics.permutation_above_chance([1.0] * 5, 0.5) == 1 / 32
    assert statistics.permutation_above_chance([0.0] * 5, 0.5) == 1
    assert statistics.permutation_above_chance([0.5] * 5, 0.5) == 1
    # Deviations .5, .5, -.5: of the 8 sums those of at least .5: one at 1.5, three at .5.
    assert statistics.permutation_above_chance([1, 1, 0], 0.5) == 4 / 8
    # Against 0 entities without a hit say nothing: two of four have hits.
    assert statistics.permutation_above_chance([0, 0.5, 0, 1], 0.0) == 1 / 4
    assert statistics.permutation_above_chance([0] * 6, 0.0) == 1
    assert statistics.permutation_above_chance([1.0], 0.5) == 0.5
    assert statistics.permutation_above_chance([], 0.5) is None


@pytest.mark.parametrize("chance", [0.25, 0.5])
def test_sign_flips_are_scipys(chance):
    means = np.array([2, 4, 3, 6, 5, 3, 1, 6, 4]) / 6
    theirs = permutation_test((means - chance,), np.mean, permutation_type="samples", alternative="greater")
    assert statistics.permutation_above_chance(means, chance) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_many_entities_are_drawn_close_to_exact_and_never_give_zero():
    # 20 deviations of +-.5, 15 of them up: P(at least 15 of 20 up), a binomial tail.
    means = [1.0] * 15 + [0.0] * 5
    assert statistics.permutation_above_chance(means, 0.5) == pytest.approx(
        binomtest(15, 20, 0.5, "greater").pvalue, abs=0.004
    )
    assert statistics.permutation_above_chance([1.0] * 30, 0.5) == 1 / 20_001


def test_sign_flips_hold_their_level_for_skewed_means():
    # Three guesses at chance 1/4, 8 entities: the test may be cautious, but must not reject too often.
    rng = np.random.default_rng(0)
    p = [statistics.permutation_above_chance(rng.binomial(3, 0.25, 8) / 3, 0.25) for _ in range(1500)]
    assert 0 < np.mean(np.array(p) < 0.05) < 0.06


def test_differences_by_hand():
    # Of C(4, 2) = 6 assignments only the observed one puts both ones in control.
    assert statistics.permutation_difference([1, 1], [0, 0]) == (1.0, pytest.approx(1 / 6))
    assert statistics.permutation_difference([0, 0], [1, 1]) == (-1.0, 1.0)
    assert statistics.permutation_difference([0.5] * 4, [0.5] * 4) == (0, 1)
    assert statistics.permutation_difference([], [1.0]) == statistics.permutation_difference([1.0], {}) == (None, None)


@pytest.mark.parametrize("sizes", [(8, 8), (4, 7), (7, 4)])
def test_differences_are_scipys(sizes):
    rng = np.random.default_rng(3)
    control, main = rng.integers(2, 7, sizes[0]) / 6, rng.integers(0, 6, sizes[1]) / 6

    def gap(x, y, axis):
        return x.mean(axis=axis) - y.mean(axis=axis)

    theirs = permutation_test((control, main), gap, vectorized=True, alternative="greater", n_resamples=np.inf)
    difference, p = statistics.permutation_difference(control, main)
    assert difference == pytest.approx(theirs.statistic)
    assert p == pytest.approx(theirs.pvalue, abs=1e-12)


def test_large_groups_are_drawn():
    # 12 + 12 entities, ones in 9 and 4: hypergeometric tail P(X >= 9), X of 13 ones into 12 of 24 places.
    from scipy.stats import hypergeom

    difference, p = statistics.permutation_difference([1.0] * 9 + [0.0] * 3, [1.0] * 4 + [0.0] * 8)
    assert difference == pytest.approx(5 / 12)
    assert p == pytest.approx(hypergeom.sf(8, 24, 13, 12), abs=0.005)
    assert statistics.permutation_difference([1.0] * 30, [0.0] * 30)[1] == 1 / 20_001


# ---- counts


def test_auroc():
    rng = np.random.default_rng(0)
    for _ in range(20):
        positive, negative = rng.integers(0, 6, 9).astype(float), rng.integers(0, 5, 13).astype(float)
        by_pairs = [(p > n) + (p == n) / 2 for p in positive for n in negative]
        theirs = sum(by_pairs) / (9 * 13)
        assert statistics.auroc(positive, negative) == pytest.approx(theirs)
        assert statistics.auroc(negative, positive) == pytest.approx(1 - theirs)
    # Pairs (2 > 1), (2 = 2) and half for the tie: 1.5 of 2.
    assert statistics.auroc([2.0], [1.0, 2.0]) == 0.75
    assert statistics.auroc([], [1.0]) is None


def cw(place, entity, expected, read, margin):
    """A CW row whose log-odds of Correct are `margin`; None: no log-probability of Correct."""
    options = {"Correct": None if margin is None else margin - 2.0, "Wrong": -2.0}
    return row(place=place, entity=entity, read=read, expected=expected, options=options)


def test_rates_by_hand():
    rows = [
        cw(0, "a", "Correct", "Correct", 2.0),
        cw(1, "a", "Correct", "Wrong", 0.0),
        cw(2, "a", "Correct", None, None),
        cw(3, "a", "Wrong", "Correct", 1.0),
        cw(4, "a", "Wrong", None, float("-inf")),
        cw(5, "b", "Correct", "Wrong", -5.0),
        cw(6, "b", "Wrong", "Wrong", -6.0),
        cw(7, "b", "Wrong", "Wrong", -5.0),
        cw(8, "c", "Wrong", "Wrong", -9.0),
    ]
    found = metrics.rates(rows)
    assert (found["tpr"], found["fpr"]) == (1 / 4, 1 / 5)
    assert found["separation"] == pytest.approx(1 / 20) and found["accuracy"] == pytest.approx(4 / 9)
    # Within a: 2 > 1, 0 < 1: .5. Within b: -5 > -6, -5 = -5: .75, although its log-odds lie far below a's. c has no
    # Correct row. a has 2 + 1 rows, worth 3 x 2 / 4 = 1.5 independent ones, and so has b.
    assert found["auroc"] == (0.5 + 0.75) / 2
    assert statistics.entity_aurocs(rows) == ({"a": 0.5, "b": 0.75}, 1.5)
    assert found["auroc_bounds"] == statistics.mean_interval([0.5, 0.75], 1.5, 0.9)
    assert found["counts"] == {"Correct": 2, "Wrong": 5, "unparsed": 2}


def test_without_knowledge_an_auroc_varies_as_the_rows_that_it_is_worth():
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4000, 8))
    found = mannwhitneyu(scores[:, :3], scores[:, 3:], axis=1).statistic / 15
    rows = [cw(i, "a", "Correct" if i < 3 else "Wrong", "Wrong", float(i)) for i in range(8)]
    assert found.var() == pytest.approx(0.25 / statistics.entity_aurocs(rows)[1], rel=0.06)


def test_rates_of_nothing_and_of_one_side():
    empty = metrics.rates([])
    assert empty["counts"] == {"Correct": 0, "Wrong": 0, "unparsed": 0}
    assert {empty[name] for name in ("accuracy", "tpr", "fpr", "separation", "auroc", "auroc_bounds")} == {None}
    one = metrics.rates([row()])
    assert (one["tpr"], one["fpr"], one["separation"], one["auroc"]) == (1, None, None, None)
    lost = metrics.rates([row(right=None), row(right=None, read=None)])
    assert lost["counts"] == {"Correct": 1, "Wrong": 0, "unparsed": 1}
    assert lost["accuracy"] is None and lost["tpr"] is None


def test_option_counts():
    reads = [("A", "A"), ("A", "B"), (None, "B"), ("D", "C"), ("A", "A")]
    rows = [row("mcq_d2i", i, read=read, expected=expected) for i, (read, expected) in enumerate(reads)]
    found = metrics.option_counts(rows)
    assert found["predicted"] == {"A": 3, "B": 0, "C": 0, "D": 1, "unparsed": 1}
    assert found["expected"] == {"A": 2, "B": 2, "C": 1, "D": 0}
    assert found["confusion"]["B"] == {"A": 1, "B": 0, "C": 0, "D": 0, "unparsed": 1}
    lost = metrics.option_counts([one | {"right": None} for one in rows])
    assert lost["predicted"] == found["predicted"] and sum(lost["expected"].values()) == 0


# ---- an evaluation


def evaluation(seed=0, drops=("none",), orders=(None,), n=4):
    """Random answers, a sixth of them unparsed: n main and n control entities, 2 rows a test (4 for CW)."""
    rng, rows = random.Random(seed), []
    cw = ("reverse", "cw_image")
    choices = {"forward": [f"d{i}" for i in range(n)]} | dict.fromkeys(cw, ("Correct", "Wrong"))
    for drop in drops:
        for test in TASK_TYPES:
            names = choices.get(test, list("ABCD"))
            for place in range(2 * n * (4 if test in cw else 2)):
                for order in orders if test.startswith("mcq") else (None,):
                    entity = place % (2 * n)
                    expected = names[(place // (2 * n) + (entity if test not in cw else 0)) % len(names)]
                    known = drop == "none" or (drop == "text" and test in ("forward", "mcq_i2d"))
                    read = rng.choice([*names * 5, *[None] * len(names)])
                    likeliest = rng.choice(names)
                    rows.append(row(
                        test, place, f"e{entity}", read, expected, drop=drop, order=order,
                        group="main" if entity < n else "control", options=dict.fromkeys(names, -1.0),
                        right=(read == expected) if known else None,
                        likeliest_right=(likeliest == expected) if known else None,
                    ))  # fmt: skip
    return rows


def strict(value):
    return json.loads(json.dumps(value, allow_nan=False))


def test_metrics_agree_with_the_single_functions():
    rows = evaluation()
    found = metrics.metrics(rows)
    assert strict(found) == found
    assert list(found) == ["none"] and list(found["none"]) == list(TASK_TYPES)
    for test, groups in found["none"].items():
        assert set(groups) == {"all", "main", "control"}
        for group, numbers in groups.items():
            part = [r for r in rows if r["test"] == test and group in ("all", r["group"])]
            correct = sum(r["right"] for r in part)
            assert (numbers["n"], numbers["correct"]) == (len(part), correct)
            assert numbers["n_entities"] == (8 if group == "all" else 4)
            assert numbers["accuracy"] == correct / len(part)
            assert numbers["wilson"] == statistics.wilson(correct, len(part))
            assert numbers["unparsed"] == sum(r["read_as"] is None for r in part)
            means = statistics.entity_means(part)
            assert numbers["cluster_interval"] == statistics.mean_interval(means, statistics.rows_each(part))
            if test != "forward":
                chance = 0.25 if test.startswith("mcq") else 0.5
                assert numbers["p_exact"] == pytest.approx(binomtest(correct, len(part), chance, "greater").pvalue)
                assert numbers["p_permutation"] == statistics.permutation_above_chance(means, chance)
            assert numbers["agreement"] is None
    assert sum(found["none"]["reverse"]["main"]["rates"]["counts"].values()) == 16
    assert sum(found["none"]["mcq_d2i"]["control"]["options"]["predicted"].values()) == 8


def test_forward_has_no_chance_for_writing_and_one_for_the_likeliest_option():
    numbers = metrics.metrics(evaluation())["none"]["forward"]["main"]
    assert (numbers["chance"], numbers["p_exact"], numbers["p_permutation"], numbers["p_exact_holm"]) == (
        0,
        *[None] * 3,
    )
    correct = sum(r["likeliest_right"] for r in evaluation() if r["test"] == "forward" and r["group"] == "main")
    assert numbers["likeliest"]["correct"] == correct
    assert numbers["likeliest"]["chance"] == 0.25
    assert numbers["likeliest"]["p_exact"] == pytest.approx(binomtest(correct, 8, 0.25, "greater").pvalue)


def test_holm_runs_over_the_tests_of_one_drop_and_group():
    found = metrics.metrics(evaluation(seed=2, drops=("none", "text")))
    for drop, tests in (("none", ("reverse", "cw_image", "mcq_i2d", "mcq_d2i")), ("text", ("mcq_i2d",))):
        for group in ("all", "main", "control"):
            for name in ("p_exact", "p_permutation"):
                raw = {test: found[drop][test][group][name] for test in tests}
                adjusted = {test: found[drop][test][group][f"{name}_holm"] for test in tests}
                assert adjusted == pytest.approx(statistics.holm(raw))
            likeliest = {test: found[drop][test][group]["likeliest"] for test in found[drop]}
            raw = {test: part["p_exact"] for test, part in likeliest.items()}
            assert {test: part["p_exact_holm"] for test, part in likeliest.items()} == statistics.holm(raw)


def test_a_drop_that_takes_the_meaning_leaves_agreement_only():
    whole = [row(place=i, entity=i, read=read) for i, read in enumerate(["Correct", "Wrong", None, "Correct"])]
    dropped = [
        row(place=i, entity=i, read=read, drop="image", right=None, likeliest_right=None)
        for i, read in enumerate(["Correct", "Correct", None, "Wrong"])
    ]
    numbers = metrics.metrics(whole + dropped)["image"]["reverse"]["all"]
    names = ("correct", "accuracy", "wilson", "cluster_interval", "chance", "p_exact", "p_permutation")
    assert {numbers[name] for name in names} | {numbers["likeliest"][name] for name in names} == {None}
    # The same: the first and the third, unparsed both times.
    agreement = numbers["agreement"]
    assert (agreement["n"], agreement["same"], agreement["share"]) == (4, 2, 0.5)
    assert agreement["wilson"] == statistics.wilson(2, 4)
    assert metrics.metrics(dropped)["image"]["reverse"]["all"]["agreement"] is None


def test_a_drop_that_keeps_the_meaning_is_scored_as_well():
    numbers = metrics.metrics(evaluation(drops=("none", "text", "image")))
    assert strict(numbers) == numbers
    assert numbers["text"]["mcq_i2d"]["main"]["p_exact"] is not None
    assert numbers["text"]["mcq_i2d"]["main"]["agreement"]["n"] == 8
    assert numbers["text"]["mcq_d2i"]["main"]["accuracy"] is None
    assert numbers["image"]["forward"]["main"]["accuracy"] is None


def test_orders_of_one_question_are_no_independent_observations():
    orders = [(0, 1, 2, 3), (1, 0, 2, 3), (2, 1, 0, 3)]
    rows = evaluation(orders=orders, drops=("none", "text"))
    found = metrics.metrics(rows)
    numbers = found["none"]["mcq_d2i"]["main"]
    assert (numbers["n"], numbers["n_questions"]) == (24, 8)
    assert (numbers["wilson"], numbers["p_exact"], numbers["p_exact_holm"]) == (None, None, None)
    part = [r for r in rows if (r["test"], r["group"], r["drop"]) == ("mcq_d2i", "main", "none")]
    assert numbers["p_permutation"] == statistics.permutation_above_chance(statistics.entity_means(part), 0.25)
    assert found["none"]["reverse"]["main"]["p_exact"] is not None
    agreement = found["text"]["mcq_d2i"]["main"]["agreement"]
    assert agreement["n"] == 24 and agreement["wilson"] is None and agreement["cluster_interval"]
    # Read back from JSON an order is a list.
    assert metrics.metrics(strict(rows)) == found


@pytest.mark.parametrize(("read", "accuracy"), [("Correct", 1.0), ("Wrong", 0.0), (None, 0.0)])
def test_all_right_all_wrong_all_unparsed(read, accuracy):
    rows = [row(place=i, entity=i // 2, read=read) for i in range(8)]
    numbers = metrics.metrics(rows)["none"]["reverse"]["main"]
    assert strict(numbers) == numbers
    assert numbers["accuracy"] == accuracy and accuracy in numbers["cluster_interval"]
    assert numbers["unparsed"] == (8 if read is None else 0)
    assert numbers["p_exact"] == pytest.approx(1 / 256 if accuracy else 1)
    assert numbers["p_permutation"] == (1 / 16 if accuracy else 1)


def test_one_entity_and_none():
    assert metrics.metrics([]) == {}
    numbers = metrics.metrics([row()])["none"]["reverse"]["main"]
    assert (numbers["n"], numbers["cluster_interval"], numbers["p_permutation"]) == (1, None, 0.5)


def test_two_evaluations_at_once_are_refused():
    with pytest.raises(ValueError, match=r"reverse reverse_test.jsonl:0 \(drop none\) has 2 answers"):
        metrics.metrics([row(), row()])
    metrics.check_records([row(), row(drop="image"), row(order=[0, 1, 2, 3]), row(order=[1, 0, 2, 3])])


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"group": "Main"}, "is in the group 'Main'"),
        ({"right": None}, "right is None"),
        ({"right": 5}, "right is 5"),
        ({"right": "True"}, "right is 'True'"),
    ],
)
def test_a_record_that_would_count_for_nobody_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        metrics.metrics([row(), row(place=1) | wrong])
    with pytest.raises(ValueError, match=told):
        verdict([row(), row(place=1) | wrong], "forward")


def test_an_entity_in_both_groups_is_refused():
    with pytest.raises(ValueError, match="is in the group 'control'"):
        metrics.metrics([row(), row(place=1) | {"group": "control"}])


def test_records_may_come_from_an_iterator():
    records = [row(place=i, entity=i // 2) for i in range(6)]
    assert metrics.metrics(iter(records)) == metrics.metrics(records) != {}
    assert metrics.compare(iter(records), iter(records)) == metrics.compare(records, records)
    assert verdict(iter(records), "forward") == verdict(records, "forward")


# ---- two evaluations


def test_compare_by_hand():
    # First: 6 rows right, second: only the first of them; one row more in each.
    a = [row(place=i, entity=i // 2) for i in range(7)] + [row(drop="image")]
    b = [row(place=i, entity=i // 2, read="Correct" if i < 1 else "Wrong") for i in range(6)] + [row(place=9)]
    found = metrics.compare(a, b)
    assert strict(found) == found
    numbers = found["reverse"]
    assert (numbers["n"], numbers["only_a"], numbers["only_b"]) == (6, 1, 1)
    assert (numbers["accuracy_a"], numbers["accuracy_b"]) == (1, pytest.approx(1 / 6))
    assert (numbers["b"], numbers["c"]) == (5, 0)
    assert numbers["p_mcnemar"] == numbers["p_mcnemar_holm"] == pytest.approx(2 / 32)
    # Entities' differences .5, 1, 1: only the observed flips reach 2.5, 1 of 8, two-sided 2 of 8.
    assert numbers["p_permutation"] == 2 / 8


def test_compare_is_symmetric_and_adjusts_over_the_tests():
    a, b = evaluation(seed=0), evaluation(seed=1)
    ab, ba = metrics.compare(a, b), metrics.compare(b, a)
    assert statistics.holm({t: n["p_mcnemar"] for t, n in ab.items()}) == {
        t: n["p_mcnemar_holm"] for t, n in ab.items()
    }
    for test, numbers in ab.items():
        assert (numbers["b"], numbers["c"]) == (ba[test]["c"], ba[test]["b"])
        assert numbers["p_mcnemar"] == ba[test]["p_mcnemar"]
        assert numbers["p_permutation"] == ba[test]["p_permutation"]
    same = metrics.compare(a, a)
    assert all((n["b"], n["c"], n["p_mcnemar"], n["p_permutation"]) == (0, 0, 1, 1) for n in same.values())


def test_compare_with_orders_leaves_the_test_of_rows_out():
    orders = [(0, 1, 2, 3), (1, 0, 2, 3)]
    found = metrics.compare(evaluation(0, orders=orders), evaluation(1, orders=orders))
    assert found["mcq_d2i"]["p_mcnemar"] is None and found["mcq_d2i"]["p_permutation"] is not None
    assert found["reverse"]["p_mcnemar"] is not None


def test_compare_reports_a_test_that_only_one_has():
    a = [row(), row("mcq_d2i", read="A", expected="B")]
    assert metrics.compare(a, [row()])["mcq_d2i"] == {
        "n": 0, "only_a": 1, "only_b": 0, "accuracy_a": None, "accuracy_b": None, "b": 0, "c": 0, "p_mcnemar": None,
        "p_permutation": None, "p_mcnemar_holm": None,
    }  # fmt: skip


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match="share no question"):
        metrics.compare([row(place=0)], [row(place=1)])
    with pytest.raises(ValueError, match="share no question"):
        metrics.compare([], [])
    for change in ({"expected": "Wrong"}, {"entity_id": "b"}, {"prompt": "another"}):
        with pytest.raises(ValueError, match="another question"):
            metrics.compare([row()], [row() | change])
