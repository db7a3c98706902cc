"""The schedule, by hand. A bad epoch is one whose loss is not below best x (1 - improvement_threshold)."""

import json
import math
import subprocess
import sys

import numpy
import pytest

from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import TrainingConfig
from mmrev_kit.training.scheduler import Schedule

GUIDE = dict(
    learning_rate=1e-4,
    min_lr=6e-5,
    lr_reduction_factor=0.5,
    lr_patience=1,
    improvement_threshold=0.05,
    min_val_loss=0.2,
    num_epochs=10,
    warmup_ratio=0.02,
)


def make(steps_per_epoch=1, **changes):
    return Schedule.from_config(TrainingConfig(**GUIDE | changes), steps_per_epoch)


def observed(schedule, losses):
    """(improved, reduced, bad epochs, lr, why it stops in one word) after each loss."""
    words = {"min_val_loss": "target", "min_lr": "rate", "last epoch": "last"}
    rows = []
    for loss in losses:
        found = schedule.observe(loss)
        why = [short for word, short in words.items() if word in (found.stop or "")]
        assert len(why) == (found.stop is not None)
        rows.append((found.improved, found.reduced, found.bad_epochs, found.lr, *(why or [None])))
    return rows


def test_the_guides_numbers_end_at_the_first_plateau():
    assert observed(make(), [2.0, 1.0, 0.97]) == [
        (True, False, 0, 1e-4, None),  # the first validation always improves
        (True, False, 0, 1e-4, None),  # 1.0 < 2.0 x .95 = 1.9
        (False, True, 0, 5e-5, "rate"),  # 0.97 >= .95: bad, 1 of 1; 1e-4 x .5 = 5e-5 < 6e-5
    ]


def test_the_shipped_guide_is_the_guide():
    schedule = Schedule.from_config(load_config("configs/config_qwen3vl32_fp16.yaml").training, 1)
    assert schedule == make()


def test_patience_2_is_reset_by_an_improvement_and_by_a_reduction():
    schedule = make(learning_rate=8e-4, min_lr=1e-5, lr_patience=2)
    assert observed(schedule, [1.0, 0.99, 0.9, 0.89, 0.88, 0.87, 0.8, 0.79, 0.85]) == [
        (True, False, 0, 8e-4, None),
        (False, False, 1, 8e-4, None),  # >= .95
        (True, False, 0, 8e-4, None),  # .9 < .95; the count is back at 0
        (False, False, 1, 8e-4, None),  # >= .9 x .95 = .855
        (False, True, 0, 4e-4, None),  # the second in a row; the count starts again
        (False, False, 1, 4e-4, None),
        (True, False, 0, 4e-4, None),  # .8 < .855
        (False, False, 1, 4e-4, None),  # >= .8 x .95 = .76
        (False, True, 0, 2e-4, None),
    ]


def test_a_slow_descent_is_measured_against_the_last_improvement():
    """3 % an epoch: the second step is 5.91 % below the best that was saved, and so an improvement."""
    schedule = make(min_lr=0.0, lr_patience=5)
    losses = [1.0, 0.97, 0.9409]  # 1 x .97, x .97
    assert [row[0] for row in observed(schedule, losses)] == [True, False, True]
    assert schedule.best == 0.9409


@pytest.mark.parametrize("best", [1.0, 2.0, 0.25])  # powers of two: the products are exact
def test_exactly_5_percent_is_no_improvement(best):
    boundary = 0.95 * best
    for loss, improved in ((boundary, False), (math.nextafter(boundary, 0), True)):
        schedule = make(min_lr=0.0, min_val_loss=0.0)
        assert [row[0] for row in observed(schedule, [best, loss])] == [True, improved]


def test_an_equal_loss_is_no_improvement_even_without_a_threshold():
    assert [row[0] for row in observed(make(improvement_threshold=0.0, min_lr=0.0), [1.0, 1.0, 0.99])] == [
        True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_the_first_validation_is_an_improvement_whatever_the_threshold(threshold):
    """There is nothing to compare with, and a run without best/ would be of no use."""
    assert make(improvement_threshold=threshold).observe(3.0).improved


def test_the_target_ends_the_run():
    rows = observed(make(), [1.0, 0.2, 0.18])
    # .2 is not below .2; .18 < .2 x .95 = .19 and below .2
    assert rows == [
        (True, False, 0, 1e-4, None),
        (True, False, 0, 1e-4, None),
        (True, False, 0, 1e-4, "target"),
    ]


def test_the_target_may_be_reached_without_an_improvement():
    rows = observed(make(lr_patience=3), [0.201, 0.199])
    # .199 >= .201 x .95 = .19095
    assert rows[1] == (False, False, 1, 1e-4, "target")


def test_the_last_epoch_ends_the_run():
    rows = observed(make(num_epochs=3), [4.0, 3.0, 2.0])
    assert [row[-1] for row in rows] == [None, None, "last"]


@pytest.mark.parametrize(
    "rate, factor, min_lr, ends",
    [
        (2e-4, 0.5, 1e-4, None),  # 1e-4 is not below 1e-4
        (2e-4, 0.5, 1.01e-4, "rate"),
        (3e-4, 0.1, 3e-5, None),  # 3e-5 is not below 3e-5, though 3e-4 * 0.1 is 2.9999999999999997e-05 in binary
    ],
)
def test_a_rate_of_min_lr_goes_on(rate, factor, min_lr, ends):
    rows = observed(make(learning_rate=rate, lr_reduction_factor=factor, min_lr=min_lr), [1.0, 1.0])
    assert rows[1][1] is True
    assert rows[1][-1] == ends


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup_steps": -5}, {"learning_rate": -1.0}, {"lr_reduction_factor": 2.0}, {"lr_reduction_factor": -1.0},
        {"min_lr": math.nan}, {"num_epochs": 0}, {"improvement_threshold": 1.5}, {"lr_patience": 0},
    ],
)  # fmt: skip
def test_numbers_that_no_configuration_takes_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        Schedule(**wrong)


def test_a_state_with_other_names_is_refused():
    state = Schedule().state_dict()
    for wrong, name in ((state | {"bset": 3}, "bset"), ({k: v for k, v in state.items() if k != "best"}, "best")):
        with pytest.raises(ValueError, match=f": {name} missing or unknown"):
            Schedule().load_state_dict(wrong)


def test_a_loss_may_be_any_number():
    schedule = make()
    schedule.observe(numpy.float32(0.75))
    assert json.loads(json.dumps(schedule.state_dict()))["best"] == 0.75


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, -0.96])
def test_a_loss_that_cannot_be_is_refused_and_changes_nothing(loss):
    schedule = make()
    schedule.observe(1.0)
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=str(loss)):
        schedule.observe(loss)
    assert schedule.state_dict() == before


# The warm-up


@pytest.mark.parametrize(
    "ratio, steps, epochs, warmup",
    [
        (0.02, 50, 10, 10),  # .02 x 500
        (0.02, 7, 10, 2),  # 1.4: a part of a step is a step
        (0.02, 35, 10, 7),  # .02 x 350 = 7; in binary a hair more
        (0.07, 100, 1, 7),
        (0.5, 3, 1, 2),
        (1.0, 4, 2, 8),
        (0.02, 1, 1, 1),
        (0.0, 50, 10, 0),
    ],
)
def test_number_of_warm_up_steps(ratio, steps, epochs, warmup):
    assert make(steps, warmup_ratio=ratio, num_epochs=epochs).warmup_steps == warmup


def test_warm_up_rises_in_equal_parts_to_the_full_rate():
    schedule = make(20, warmup_ratio=0.02, num_epochs=10, learning_rate=8e-4)  # .02 x 200 = 4 steps
    rates = [schedule.lr_at(step) for step in range(6)]
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 8e-4, 8e-4], rel=1e-12)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert make(20, warmup_ratio=0.0).lr_at(0) == 1e-4


def test_after_a_reduction_every_step_has_the_reduced_rate():
    schedule = make(20, min_lr=0.0)
    observed(schedule, [1.0, 1.0])
    assert [schedule.lr_at(step) for step in (40, 41, 199)] == [5e-5] * 3


# Resuming


LOSSES = [1.0, 0.99, 0.9, 0.89, 0.88, 0.87, 0.8, 0.79, 0.78, 0.77]


@pytest.mark.parametrize("cut", range(len(LOSSES)))
def test_a_resumed_schedule_decides_the_same(cut):
    changes = {"learning_rate": 8e-4, "min_lr": 1e-5, "lr_patience": 2, "warmup_ratio": 0.5}
    schedule = make(3, **changes)
    rows = observed(schedule, LOSSES[:cut])
    state = json.loads(json.dumps(schedule.state_dict(), allow_nan=False))
    resumed = make(3, **changes)
    resumed.load_state_dict(state)
    assert resumed == schedule
    rows += observed(resumed, LOSSES[cut:])
    # reductions after the two bad epochs 4 and 5 and after the two bad epochs 8 and 9; 10 epochs in all
    assert [row[3] for row in rows] == [8e-4] * 4 + [4e-4] * 4 + [2e-4] * 2
    assert [row[2] for row in rows] == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    assert [row[4] for row in rows] == [None] * 9 + ["last"]
    # 10 epochs x 3 steps x .5 = 15 warm-up steps; 2e-4 x 3/15
    assert resumed.lr_at(2) == pytest.approx(4e-5)


def test_an_ended_schedule_stays_ended_when_it_is_resumed():
    schedule = make(num_epochs=1)
    schedule.observe(1.0)
    resumed = make(num_epochs=1)
    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert resumed.stop is not None
    assert resumed.stop == schedule.stop


# G5


G5 = dict(
    learning_rate=0.1, lr_reduction_factor=0.1, improvement_threshold=0.0, min_lr=1e-6, min_val_loss=0.0, num_epochs=9
)


def test_one_validation_is_one_step_of_the_schedule():
    """G5. 1.0 improves; 1.1 and 1.2 are one bad epoch each, and each takes a tenth: 0.1, 0.01, 0.001."""
    schedule = make(**G5)
    assert [schedule.observe(loss).lr for loss in (1.0, 1.1, 1.2)] == pytest.approx([0.1, 0.01, 0.001])
    assert schedule.epoch == 3


def test_ranks_that_see_equal_losses_decide_alike_and_apart():
    """G5. Two ranks have a schedule each; one's step is not the other's."""
    ranks = [make(**G5), make(**G5)]
    for loss, rate in ((1.0, 0.1), (1.1, 0.01), (1.2, 0.001)):
        assert [rank.observe(loss).lr for rank in ranks] == pytest.approx([rate, rate])


# Alone


def test_a_schedule_of_defaults_is_the_recipes():
    assert Schedule() == Schedule.from_config(TrainingConfig(warmup_ratio=0.0), 1)


def test_a_plain_loop_ends_by_itself():
    """8e-3, halved by each of the epochs that do not improve: below 1e-3 after the fourth of them."""
    schedule, rates, step = Schedule(learning_rate=8e-3, min_lr=1e-3, warmup_steps=2), [], 0
    while not schedule.stop:
        rates.append(schedule.lr_at(step))
        step += 1
        schedule.observe(3.0)
    assert rates == [4e-3, 8e-3, 4e-3, 2e-3, 1e-3]
    assert "min_lr" in schedule.stop


def test_the_schedule_needs_neither_torch_nor_a_reader_of_configurations():
    code = "import sys, mmrev_kit.training.scheduler\nassert not {'torch', 'numpy', 'omegaconf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
