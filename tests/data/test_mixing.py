"""The retention plan: shares exact to the row, no row twice before its time, nothing but (seed, epoch) in it."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest

from mmrev_kit.config.sections import RetentionConfig, RetentionWeights
from mmrev_kit.data import mixing
from mmrev_kit.data.mixing import apportion
from mmrev_kit.data.run_data import source_weights

SOURCES = ("face_cw", "face_mcq_i2d", "face_mcq_d2i")
OBJECTS = ("object_cw", "object_mcq_i2d", "object_mcq_d2i")
POOL = dict.fromkeys(SOURCES, 1000)


def retention(ratio, weights=(1.0, 1.0, 1.0), **more):
    return RetentionConfig(retention_ratio=ratio, weights=RetentionWeights(*weights), **more)


def make_plan(tasks, pools, given, seed, epochs):
    """The plan that a run with this retention section has; None: not mixed."""
    weights, ratio = (source_weights(given), given.retention_ratio) if given else ({}, 0.0)
    return mixing.make_plan(tasks, pools, weights, ratio, seed, epochs)


def retention_rows(plan):
    return sum(count for source, count in plan.counts.items() if source in SOURCES)


# Largest remainder


@pytest.mark.parametrize(
    "total, weights, shares",
    [
        (30, (1, 1, 1), (10, 10, 10)),
        (100, (1, 1, 1), (34, 33, 33)),  # 33.3 each; the row left goes to the first named
        (11, (1, 1, 1), (4, 4, 3)),  # 3.67 each; two rows left
        (7, (5, 3, 2), (4, 2, 1)),  # 3.5, 2.1, 1.4 -> 3, 2, 1; the row left to .5
        (7, (2, 3, 5), (1, 2, 4)),  # the same, named in the other order
        (3, (2, 2, 3), (1, 1, 1)),  # .857, .857, 1.286 -> 0, 0, 1; the rows left to .857 and .857
        (5, (1, 1, 8), (1, 0, 4)),  # .5, .5, 4; a tie, to the first
        (4, (0.5, 0.25, 0.25), (2, 1, 1)),
        (1, (0, 1, 1), (0, 1, 0)),  # no weight, no row
        (9, (0, 0, 2), (0, 0, 9)),
        (0, (1, 1, 1), (0, 0, 0)),
        (0, (0, 0, 0), (0, 0, 0)),
        (10**18, (1, 2, 0), (333_333_333_333_333_333, 666_666_666_666_666_667, 0)),  # .33, .67; beyond a float's digits
    ],
)
def test_apportion(total, weights, shares):
    found = apportion(total, dict(zip("abc", weights, strict=True)))
    assert found == dict(zip("abc", shares, strict=True))
    assert list(found) == ["a", "b", "c"]


def test_nothing_to_share_out_to_is_an_error():
    with pytest.raises(ValueError, match="weight"):
        apportion(1, {"a": 0.0, "b": 0.0})


def test_source_weights():
    assert source_weights(retention(0.3, (3.0, 2.0, 1.0))) == dict(zip(SOURCES, (3.0, 2.0, 1.0), strict=True))
    halves = source_weights(retention(0.3, (4.0, 2.0, 1.0), face_share=0.75))
    assert halves == dict(zip(SOURCES, (3.0, 1.5, 0.75), strict=True)) | dict(
        zip(OBJECTS, (1.0, 0.5, 0.25), strict=True)
    )


@pytest.mark.parametrize(
    "names, expected",
    [
        (("a_x", "a_y", "b_x", "b_y"), (1, 0, 0, 1)),  # a table: after a_x, b_y is the furthest below its two shares
        (("a_x", "a_y", "b_x", "b_z"), (1, 1, 0, 0)),  # no table: to the first named
        (("wiki", "my_news", "my_web", "c"), (1, 1, 0, 0)),
    ],
)
def test_a_tie_goes_to_the_first_named_unless_the_names_are_a_table(names, expected):
    assert tuple(apportion(2, dict.fromkeys(names, 1)).values()) == expected


# How many rows


def test_30_percent_of_1_1_1_is_70_10_10_10():
    plan = make_plan({"forward": 70}, POOL, retention(0.3), seed=0, epochs=1)
    assert plan.counts == {"forward": 70, "face_cw": 10, "face_mcq_i2d": 10, "face_mcq_d2i": 10}
    assert plan.rows_per_epoch == 100
    for column in ("asked share", "actual share"):
        assert [row[column] for row in plan.table()] == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=1e-12)


@pytest.mark.parametrize(
    "n_task, ratio, n_retention",
    [
        (300, 0.3, 129),  # 300 x 3/7 = 128.57
        (10, 0.3, 4),  # 4.29
        (100, 0.5, 100),
        (9, 0.1, 1),
        (13, 0.1, 1),  # 1.44
        (14, 0.1, 2),  # 1.56
        (10, 0.9, 90),
        (7, 0.99, 693),  # 7 x 99
        (1, 0.25, 0),  # 1/3
        # exact halves go to the even number, as Python's round has them
        (2, 0.2, 0),  # 2 x 1/4 = .5
        (6, 0.2, 2),  # 1.5
        (10, 0.2, 2),  # 2.5
        (14, 0.2, 4),  # 3.5
        (1, 0.6, 2),  # 1.5; in floating point .6 / (1 - .6) = 1.4999999999999998
        (3, 0.6, 4),  # 4.5
        (5, 0.6, 8),  # 7.5
        (100, 0.0, 0),
    ],
)
def test_number_of_retention_rows(n_task, ratio, n_retention):
    plan = make_plan({"forward": n_task}, POOL, retention(ratio), seed=0, epochs=1)
    assert retention_rows(plan) == n_retention
    assert plan.rows_per_epoch == n_task + n_retention


def test_all_task_sources_count_towards_the_share():
    # (40 + 30) x 3/7 = 30
    plan = make_plan({"forward": 40, "reverse": 30}, POOL, retention(0.3), seed=0, epochs=1)
    assert plan.counts == {"forward": 40, "reverse": 30} | dict.fromkeys(SOURCES, 10)
    # .7 x 4/7, .7 x 3/7
    assert [row["asked share"] for row in plan.table()] == pytest.approx([0.4, 0.3, 0.1, 0.1, 0.1])


def test_weights_share_the_retention_rows():
    # 70 x 3/7 = 30 rows at 3:2:1
    plan = make_plan({"forward": 70}, POOL, retention(0.3, (3.0, 2.0, 1.0)), seed=0, epochs=1)
    assert plan.counts == {"forward": 70, "face_cw": 15, "face_mcq_i2d": 10, "face_mcq_d2i": 5}
    assert [row["asked share"] for row in plan.table()] == pytest.approx([0.7, 0.15, 0.1, 0.05])


def test_a_weight_of_zero_needs_no_rows():
    pool = {"face_cw": 5, "face_mcq_i2d": 0, "face_mcq_d2i": 5}
    plan = make_plan({"forward": 70}, pool, retention(0.3, (1.0, 0.0, 2.0)), seed=0, epochs=1)
    assert (plan.counts["face_cw"], plan.counts["face_mcq_d2i"]) == (10, 20)
    assert plan.counts.get("face_mcq_i2d", 0) == 0
    assert "face_mcq_i2d" not in {source for source, _ in plan.epoch_rows(0)}


@pytest.mark.parametrize(
    ("n_task", "face_share", "faces", "tasks"),
    [
        (300, 1.0, 129, (43, 43, 43)),  # 300 x 3/7 = 128.6
        (300, 0.0, 0, (43, 43, 43)),
        (350, 0.6, 90, (50, 50, 50)),  # 150 rows: 90 and 60, and no rounding anywhere
        (60, 0.5, 13, (9, 9, 8)),  # 26 rows: 4 1/3 a source
        (5, 0.5, 1, (1, 1, 0)),  # 2 rows: one of each pool, two tasks
    ],
)
def test_pools_and_tasks_both_keep_their_shares(n_task, face_share, faces, tasks):
    pool = POOL | dict.fromkeys(OBJECTS, 1000)
    plan = make_plan({"forward": n_task}, pool, retention(0.3, face_share=face_share), seed=0, epochs=1)
    counts = {source: plan.counts.get(source, 0) for source in (*SOURCES, *OBJECTS)}
    assert sum(counts[source] for source in SOURCES) == faces
    shared = [counts[face] + counts[thing] for face, thing in zip(SOURCES, OBJECTS, strict=True)]
    assert sorted(shared, reverse=True) == list(tasks)
    assert sum(counts.values()) == sum(tasks)


@pytest.mark.parametrize("given", [retention(0.0), None])
@pytest.mark.parametrize("pool", [POOL, {}])
def test_no_retention(given, pool):
    plan = make_plan({"reverse": 5}, pool, given, seed=0, epochs=2)
    assert plan.counts == {"reverse": 5}
    (row,) = plan.table()
    assert (row["asked share"], row["actual share"], row["uses of each row"]) == (1.0, 1.0, 2.0)
    assert sorted(plan.epoch_rows(1)) == [("reverse", index) for index in range(5)]


@pytest.mark.parametrize("pool", [{}, POOL | {"face_mcq_d2i": 0}, {"face_cw": 9, "face_mcq_i2d": 9}])
def test_an_empty_pool_is_an_error_that_names_it(pool):
    with pytest.raises(ValueError, match=r"retention_ratio.*(face_cw|face_mcq_d2i)"):
        make_plan({"forward": 70}, pool, retention(0.3), seed=0, epochs=1)


@pytest.mark.parametrize("tasks", [{}, {"forward": 0}])
def test_no_task_rows_is_an_error(tasks):
    with pytest.raises(ValueError, match="no task rows"):
        make_plan(tasks, POOL, retention(0.3), seed=0, epochs=1)


def test_a_source_too_small_for_a_row_is_still_in_the_plan():
    """2 x 3/7 = .86: one retention row, for one source of three. The plan says that the others were asked for."""
    table = make_plan({"forward": 2}, POOL, retention(0.3), seed=0, epochs=1).table()
    assert {row["source"]: row["rows per epoch"] for row in table} == {
        "forward": 2, "face_cw": 1, "face_mcq_i2d": 0, "face_mcq_d2i": 0,
    }  # fmt: skip
    assert [row["asked share"] for row in table] == pytest.approx([0.7, 0.1, 0.1, 0.1])
    assert [row["actual share"] for row in table] == pytest.approx([2 / 3, 1 / 3, 0, 0])


# Which rows


def test_g4_few_rows_are_repeated_and_the_plan_says_so():
    """100 task rows at ratio .5: 100 retention rows from 3 rows a source, 34 + 33 + 33."""
    epochs = 3
    plan = make_plan({"forward": 100}, dict.fromkeys(SOURCES, 3), retention(0.5), seed=0, epochs=epochs)
    columns = ("source", "rows", "rows per epoch", "asked share", "actual share", "uses of each row")
    table = [tuple(row[column] for column in columns) for row in plan.table()]
    expected = [
        ("forward", 100, 100, 0.5, 0.5, 3.0),
        ("face_cw", 3, 34, 1 / 6, 34 / 200, 34.0),  # 34 x 3 / 3
        ("face_mcq_i2d", 3, 33, 1 / 6, 33 / 200, 33.0),
        ("face_mcq_d2i", 3, 33, 1 / 6, 33 / 200, 33.0),
    ]
    for found, wanted in zip(table, expected, strict=True):
        assert found[0] == wanted[0]
        assert found[1:] == pytest.approx(wanted[1:])
    uses = Counter(row for epoch in range(epochs) for row in plan.epoch_rows(epoch))
    assert uses == Counter(
        {(source, index): int(times) for source, rows, *_, times in expected for index in range(rows)}
    )
    for epoch in range(epochs):
        actual = Counter(source for source, _ in plan.epoch_rows(epoch))
        assert actual == {"forward": 100, "face_cw": 34, "face_mcq_i2d": 33, "face_mcq_d2i": 33}


def test_uses_of_each_row_may_be_a_fraction():
    # 30 rows at ratio .5, one source, 40 rows in the pool, 2 epochs: 60 / 40
    plan = make_plan({"forward": 30}, {"face_cw": 40}, retention(0.5, (1.0, 0.0, 0.0)), seed=0, epochs=2)
    assert plan.table()[1]["uses of each row"] == 1.5


@pytest.mark.parametrize("seed", [0, 1])
def test_no_row_comes_again_before_its_source_is_used_up(seed):
    """7 rows an epoch from a pool of 17: over 12 epochs 84 draws, 4 whole passes and 16 rows of the fifth."""
    plan = make_plan({"forward": 7}, {"face_cw": 17}, retention(0.5, (1.0, 0.0, 0.0)), seed, epochs=12)
    uses = Counter()
    for epoch in range(12):
        rows = plan.epoch_rows(epoch)
        assert sorted(index for source, index in rows if source == "forward") == list(range(7))
        drawn = [index for source, index in rows if source == "face_cw"]
        assert len(drawn) == 7
        uses.update(drawn)
        # so far 7 (epoch + 1) draws over 17 rows: no row is a whole pass ahead of another
        low, rest = divmod(7 * (epoch + 1), 17)
        assert Counter(uses[index] for index in range(17)) == Counter({low: 17 - rest, low + 1: rest})
    assert sorted(uses.values()) == [4] + [5] * 16


def test_a_used_up_source_comes_back_in_another_order():
    """Epochs are passes here: 20 rows an epoch of 20. Equal orders by chance: 1 in 20!."""
    plan = make_plan({"forward": 20}, {"face_cw": 20}, retention(0.5, (1.0, 0.0, 0.0)), seed=0, epochs=3)
    for source in ("forward", "face_cw"):
        orders = [tuple(index for name, index in plan.epoch_rows(e) if name == source) for e in range(3)]
        assert len(set(orders)) == 3
        assert {tuple(sorted(order)) for order in orders} == {tuple(range(20))}


def test_the_sources_are_mixed_through_the_epoch():
    """50 + 50 rows: a fair shuffle has 50 changes of source on average, with a standard deviation of 5."""
    plan = make_plan({"forward": 50}, {"face_cw": 99}, retention(0.5, (1.0, 0.0, 0.0)), seed=0, epochs=1)
    names = [source for source, _ in plan.epoch_rows(0)]
    assert sum(a != b for a, b in pairwise(names)) > 25


# Nothing but (seed, epoch)


def small_plan(seed=5, epochs=3):
    return make_plan({"forward": 3}, {"face_cw": 2}, retention(0.5, (1.0, 0.0, 0.0)), seed, epochs)


# Made apart from the kit: random.Random(int(sha256(text)[:16 hex digits]) // 2).shuffle, with the texts
# 5/mix/<source>/<pass> for the passes over a source and 5/order/<epoch> for the order of an epoch.
PINNED = [
    [("face_cw", 1), ("forward", 0), ("forward", 1), ("face_cw", 0), ("face_cw", 0), ("forward", 2)],
    [("forward", 2), ("forward", 1), ("face_cw", 1), ("forward", 0), ("face_cw", 1), ("face_cw", 0)],
    [("forward", 1), ("face_cw", 0), ("forward", 2), ("face_cw", 1), ("forward", 0), ("face_cw", 1)],
]


@pytest.mark.parametrize("calls", [(0, 1, 2), (2, 1, 0), (1, 1, 1), (2,)])
def test_an_epoch_is_the_same_whenever_it_is_asked_for(calls):
    plan = small_plan()
    for epoch in calls:
        assert plan.epoch_rows(epoch) == PINNED[epoch]


def test_an_epoch_does_not_depend_on_how_many_are_planned():
    assert small_plan(epochs=1).epoch_rows(2) == PINNED[2]


def test_another_seed_is_another_order():
    plan = make_plan({"forward": 20}, POOL, retention(0.3), seed=0, epochs=1)
    other = make_plan({"forward": 20}, POOL, retention(0.3), seed=1, epochs=1)
    assert plan.counts == other.counts
    assert plan.epoch_rows(0) != other.epoch_rows(0)


FIRST_VERSION = {
    # tasks, rows of the face and object pools, ratio, weights, face_share, seed: SHA-256
    "recipe": ({"forward": 300}, {"face": 900}, 0.3, (1, 1, 1), 1.0, 0, "dd3efbd6d8266cba"),
    "halves": ({"reverse": 240, "forward": 60}, {"face": 70, "object": 50}, 0.3, (1, 1, 1), 0.5, 0, "c1f2c39280e2d976"),
    "weights": ({"forward": 97}, {"face": 23, "object": 31}, 0.42, (3, 2, 1), 0.75, 7, "3b7008f1a84fa7f2"),
    "no cw": (
        {"forward": 50, "reverse": 41},
        {"face": 11, "object": 99},
        0.6,
        (0, 1, 2.5),
        0.35,
        1,
        "dfa8beb78f72a0e8",
    ),
    "objects": ({"reverse": 33}, {"face": 5, "object": 8}, 0.2, (0.5, 0.25, 0.25), 0.0, 1, "40ebd1706bc56c5f"),
    "a tie": ({"forward": 5}, {"face": 40, "object": 40}, 0.3, (1, 1, 1), 0.5, 2, "0660116da7c33b78"),
    "repeated": ({"forward": 20}, {"face": 3, "object": 2}, 0.9, (1, 1, 1), 0.2, 5, "a7f407823f4fe38d"),
    "not mixed": ({"forward": 30}, {}, 0.0, (1, 1, 1), 1.0, 3, "1ad034667a9a9e8c"),
}


@pytest.mark.parametrize("name", FIRST_VERSION)
def test_rows_and_tables_are_those_of_the_first_version(name):
    """The digests were made by the first version of this package, from the same configurations."""
    tasks, kinds, ratio, weights, face_share, seed, expected = FIRST_VERSION[name]
    names = ("cw", "mcq_i2d", "mcq_d2i")
    pools = {f"{kind}_{task}": rows + i for kind, rows in kinds.items() for i, task in enumerate(names)}
    plan = make_plan(tasks, pools, retention(ratio, weights, face_share=face_share), seed, epochs=4)
    epochs = [plan.epoch_rows(epoch) for epoch in range(4)]
    text = json.dumps([list(plan.counts.items()), epochs, plan.table(), plan.retention_share])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == expected


# Alone


def test_tasks_and_pools_of_any_names():
    """40 task rows at ratio .2: 10 retention rows, 2 to 1 to 0: 6.67 and 3.33."""
    pools = {"wiki": 4, "my_news_2024": 100, "unused": 3}
    plan = mixing.make_plan({"sums": 40}, pools, {"wiki": 2, "my_news_2024": 1, "unused": 0}, 0.2, seed=3, epochs=2)
    assert plan.counts == {"sums": 40, "wiki": 7, "my_news_2024": 3} and plan.tasks == ("sums",)
    assert plan.retention_share == pytest.approx(0.2)
    assert Counter(source for source, _ in plan.epoch_rows(1)) == plan.counts


def test_a_tasks_rows_are_repeated_up_to_a_count():
    """6 rows as often as 15: 2 whole cycles and 3 rows an epoch; over two epochs 30 draws, each row 5 times."""
    plan = mixing.make_plan({"long": 15, "short": 6}, {"p": 9}, {"p": 1}, 0.5, seed=0, epochs=2, counts={"short": 15})
    assert plan.counts == {"long": 15, "short": 15, "p": 30}
    assert [row["asked share"] for row in plan.table()] == pytest.approx([0.25, 0.25, 0.5])
    assert plan.retention_share == 0.5
    first, second = (Counter(i for name, i in plan.epoch_rows(epoch) if name == "short") for epoch in (0, 1))
    assert sorted(first.values()) == [2, 2, 2, 3, 3, 3]
    assert first + second == Counter(dict.fromkeys(range(6), 5))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"counts": {"short": 5}}, "5 rows of short an epoch, of 6"),  # nothing is thinned
        ({"counts": {"p": 20}}, "20 rows of p"),
        ({"counts": {"none": 20}}, "20 rows of none an epoch, of None"),
        ({"tasks": {"short": 6, "empty": 0}, "counts": {"empty": 3}}, "3 rows of empty"),
        ({"pools": {"short": 9}}, "no pool"),
        ({"ratio": 1.0}, "ratio of 1.0"),
        ({"ratio": -0.1}, "ratio of -0.1"),
        ({"weights": {"p": 1, "q": -1}}, "0 <= weight"),
        ({"weights": {"p": 0}}, "every weight is 0"),
        ({"weights": {"p": float("nan")}}, "0 <= weight"),
        ({"tasks": {"short": 6, "other": -5}}, "whole numbers"),
        ({"tasks": {"short": 5.5}}, "whole numbers"),
        ({"tasks": {"short": [1, 2]}}, "whole numbers"),
        ({"pools": {"p": -3}}, "whole numbers"),
        ({"epochs": 0}, "at least one epoch"),
        ({"weights": {"q": 1}}, "6 q rows an epoch, but the pool has none"),
    ],
)
def test_what_cannot_be_is_refused(changes, told):
    given = {"tasks": {"short": 6}, "pools": {"p": 9}, "weights": {"p": 1}, "ratio": 0.5, "seed": 0, "epochs": 1}
    with pytest.raises(ValueError, match=told):
        mixing.make_plan(**given | changes)


def test_the_mix_needs_nothing_of_the_package_but_its_seeds():
    code = (
        "import sys, mmrev_kit.data.mixing\n"
        "print(*sorted(name for name in sys.modules if name.startswith('mmrev_kit')))\n"
        "assert not {'torch', 'omegaconf', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    needed = ("", ".config", ".config.seeds", ".data", ".data.mixing")
    assert done.stdout.split() == [f"mmrev_kit{name}" for name in needed]
