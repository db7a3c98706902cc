"""Figures over epochs and levels: what they show is in their words, at whole epochs, and in light and dark."""

import matplotlib
import pytest

matplotlib.use("Agg")

from mmrev_kit.evaluation.metrics import of_epoch
from mmrev_kit.notebook import curves
from mmrev_kit.notebook.drawing import INK
from mmrev_kit.notebook.plots import GROUP_STYLES


def people(main: int, control: int) -> dict:
    """Four of each group with so many of 4 questions right."""
    groups = {"main": main, "control": control}
    return {f"{g}{i}": {"group": g, "asked": 4, "right": n} for g, n in groups.items() for i in range(4)}


def lines_of(axis, group: str) -> list:
    return [line for line in axis.lines if line.get_color() == GROUP_STYLES[group][1] and line.get_marker() != "."]


def main_rgb() -> tuple:
    return matplotlib.colors.to_rgb(GROUP_STYLES["main"][1])


def test_tests_by_epoch_stand_at_whole_epochs_with_their_intervals():
    epochs = [{"epoch": n, "tests": {"forward": people(n, 4)}} for n in (1, 2)] + [{"epoch": 3}]
    figure = curves.tests_figure({"epochs": epochs})
    (axis,) = [axis for axis in figure.axes if axis.get_title().startswith("forward")]
    (main,) = lines_of(axis, "main")
    assert list(main.get_xdata()) == [1, 2] and list(main.get_ydata()) == [0.25, 0.5]
    ends = of_epoch(epochs[1]["tests"])["forward"]["main"]["cluster_interval"]
    band = next(one for one in axis.collections if one.get_facecolor()[0][:3] == pytest.approx(main_rgb()))
    drawn = band.get_paths()[0].vertices
    assert {float(y) for x, y in drawn if x == 2} == set(ends) and 0 < ends[0] < 0.5 < ends[1] < 1
    assert "forward, main, by epoch 0.25, 0.50; forward, control, by epoch 1.00, 1.00" in figure.alt
    assert all(float(tick).is_integer() for tick in axis.get_xticks())
    assert any(line.get_ydata()[0] == 0.25 and line.get_linestyle() == "--" for line in axis.lines)  # a guess among 4
    assert axis.xaxis.label.get_color() == INK and figure.get_facecolor()[3] == 0  # on light and dark
    assert curves.tests_figure({"epochs": [{"epoch": 1}]}) is None


def numbers(accuracy: float, low: float, high: float) -> dict:
    return {"accuracy": accuracy, "cluster_interval": [low, high], "chance": 0.5}


def found_of(main: float) -> dict:
    groups = {"main": numbers(main, main - 0.1, main + 0.05), "control": numbers(0.9, 0.8, 1.0)}
    return {"reverse": {"all": numbers(0.7, 0.6, 0.8)} | groups}


def test_levels_that_are_numbers_stand_at_their_values_and_words_side_by_side():
    assert curves.places([0, 0.25, 0.75]) == [0, 0.25, 0.75]
    assert curves.places(["generation", "cw"]) == [0, 1] and curves.places([False, True]) == [0, 1]


@pytest.mark.parametrize("lines", [("",), ("a", "b")])
def test_every_point_of_a_sweep_is_drawn_with_its_interval_and_its_seeds(lines):
    found = {
        line: {0: (found_of(0.5), [found_of(0.4), found_of(0.6)]), 0.5: (found_of(0.75), [found_of(0.75)])}
        for line in lines
    }
    figure = curves.levels_figure("data.share_both", [0, 0.5], found)
    (axis,) = [axis for axis in figure.axes if axis.get_title().startswith("CW\n")]
    drawn = [bar for bar in axis.containers if bar.lines[0].get_color() == GROUP_STYLES["main"][1]]
    assert [list(bar.lines[0].get_ydata()) for bar in drawn] == [[0.5, 0.75]] * len(lines)
    assert not any(line.get_color() == GROUP_STYLES["all"][1] for line in axis.lines)
    (ends,) = drawn[0].lines[2]
    assert [tuple(segment[:, 1]) for segment in ends.get_segments()] == [
        pytest.approx((0.4, 0.55)), pytest.approx((0.65, 0.8)),
    ]  # fmt: skip
    dots = [line.get_ydata() for line in axis.lines if line.get_marker() == "."]
    assert [0.4, 0.6] in [list(values) for values in dots]
    of = "a, " if len(lines) > 1 else ""
    assert f"CW, {of}main: 0.50, 0.75" in figure.alt
