"""How numbers and durations are said."""

import math

import pytest

from mmrev_kit.config.reporting import decimal, duration, paced, probability


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.375, "0.38"), (0.125, "0.13"), (0.285, "0.29"), (1.0, "1.00"), (-0.001, "0.00"), (None, ""), (math.nan, "")],
)
def test_shares_are_rounded_half_up_as_they_are_written(value, said):
    assert decimal(value) == said


def test_p_values():
    assert [probability(p) for p in (0.0004, 0.0125, 1.0, None)] == ["< 0.001", "0.013", "1.000", ""]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(8, "8 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (7500, "2 h 5 min"), (90000, "1 d 1 h")],
)
def test_durations_are_said_in_their_two_largest_units(seconds, said):
    assert duration(seconds) == said


def test_a_long_list_tells_how_far_it_is(monkeypatch, capsys):
    """Ten items of 2 s each: after 6 s and after 12 s a line; what remains is as fast as what was."""
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr("mmrev_kit.config.reporting.time.monotonic", lambda: float(now[0]))
    now = [0]
    for _ in paced(list("abcdefghij"), "pictures"):
        now[0] = next(clock) + 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "30%, 3 of 10 pictures, 0.5 pictures/s, 6 s elapsed, about 14 s remaining"
    assert len(lines) == 3
