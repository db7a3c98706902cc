"""Figures: gaps stay gaps, decisions are marked, and no figure is left open."""

import math

import matplotlib
import pytest

matplotlib.use("Agg")

from matplotlib import pyplot

from mmrev_kit.config.sections import TrainingConfig
from mmrev_kit.notebook import plots
from mmrev_kit.notebook.knobs import simulate


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    assert pyplot.get_fignums() == []


def decision(improved, reduced=False, lr=1e-3):
    return {"improved": improved, "reduced": reduced, "bad_epochs": 0, "lr": lr, "stop": None}


def history(losses=(4.0, 2.0, None, 1.0), steps_per_epoch=2):
    """Two epochs of two steps: the first improves, the second halves the rate."""
    steps = [
        {"global_step": n, "epoch": 1, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "samples_per_second": 10.0 * n}
        for n, loss in enumerate(losses, start=1)
    ]
    epochs = [
        {
            "epoch": 1,
            "train_loss": 3.0,
            "val_loss": {"forward": 2.5, "face_cw": None},
            "lr": 1e-3,
            "decision": decision(True),
        },
        {
            "epoch": 2,
            "train_loss": 1.5,
            "val_loss": {"forward": 2.4, "face_cw": 0.7},
            "lr": 1e-3,
            "decision": decision(False, True, 5e-4),
        },
    ]
    return {"status": "finished", "steps": steps, "epochs": epochs, "steps_per_epoch": steps_per_epoch}


def old_history(steps=()):
    """What `read_history` makes of a file of the original scripts."""
    steps = [{"global_step": n, "epoch": None, "loss": 2.0, "lr": 1e-4, "grad_norm": None} for n in steps]
    epochs = [
        {"epoch": n, "train_loss": train, "val_loss": {"validation": val}, "lr": None, "decision": None}
        for n, train, val in ((1, 3.0, 2.5), (2, None, 2.0), (3, 1.0, None))
    ]
    return {"status": "finished", "reason": None, "task": None, "steps": steps, "epochs": epochs}


def lines(axis):
    """{label: line} of the lines that the legend names."""
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


def points(line):
    """[(x, y)] with None for a gap."""
    return [
        (float(x), None if math.isnan(y) else float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


def test_a_loss_that_is_not_finite_is_a_gap():
    """In the training loss (the smoothed line and the raw one) and in a validation loss."""
    figure = plots.history_figure({"run": history()})
    found = lines(figure.axes[0])
    raw = [(1, 4.0), (2, 2.0), (3, None), (4, 1.0)]
    assert [points(line) for line in figure.axes[0].lines[:2]] == [raw, raw]  # a window of one step smooths nothing
    assert set(found) == {"training", "forward", "face_cw"}
    assert points(found["forward"]) == [(2, 2.5), (4, 2.4)]  # at the last step of each epoch
    assert points(found["face_cw"]) == [(2, None), (4, 0.7)]
    figure.canvas.draw()


def test_a_nan_is_a_gap_too():
    figure = plots.history_figure({"run": history((4.0, math.nan, 2.0, 1.0))})
    assert points(lines(figure.axes[0])["training"]) == [(1, 4.0), (2, None), (3, 2.0), (4, 1.0)]


def test_a_long_run_is_smoothed_over_a_fortieth_and_a_gap_does_not_spread():
    losses = [float(n) for n in range(1, 81)]
    losses[9] = None
    training = points(lines(plots.history_figure({"run": history(losses, 40)}).axes[0])["training"])
    # 80 steps: the mean of 2; step 10 is a gap and step 11 has no neighbour
    assert training[:2] == [(1, 1.0), (2, 1.5)]
    assert training[8:12] == [(9, 8.5), (10, None), (11, 11.0), (12, 11.5)]


def test_decisions_are_marked_where_they_fell():
    axis = plots.history_figure({"run": history()}).axes[1]
    marks = [(line.get_marker(), points(line)) for line in axis.lines if len(line.get_xdata()) == 1]
    assert marks == [("o", [(2, 1e-3)]), ("x", [(4, 1e-3)])]
    assert [text.get_text() for text in axis.texts] == ["0.0005"]
    assert points(lines(axis)["run"]) == [(n, 1e-3) for n in (1, 2, 3, 4)]


def test_throughput():
    axis = plots.history_figure({"run": history()}).axes[2]
    assert points(axis.lines[0]) == [(1, 10.0), (2, 20.0), (3, 30.0), (4, 40.0)]


def test_several_runs_show_the_source_that_decides():
    figure = plots.history_figure({"a": history(), "b": history((8.0, 6.0)), "old": old_history()})
    found = lines(figure.axes[0])
    assert set(found) == {
        "a: training", "a: forward", "b: training", "b: forward", "old: training", "old: validation",
    }  # fmt: skip
    assert points(found["b: training"]) == [(1, 8.0), (2, 6.0)]
    for run in ("a", "b", "old"):  # a run is one colour, its validation dashed
        training, validation = (line for name, line in found.items() if name.startswith(f"{run}:"))
        assert training.get_color() == validation.get_color()
        assert (training.get_linestyle(), validation.get_linestyle()) == ("-", "--")
    assert len({line.get_color() for line in found.values()}) == 3
    assert figure.axes[0].get_title(loc="left") == "a, b, old"
    figure.canvas.draw()


def test_a_history_without_steps_is_drawn_over_epochs():
    figure = plots.history_figure({"old": old_history()})
    found = lines(figure.axes[0])
    assert points(found["training"]) == [(1, 3.0), (2, None), (3, 1.0)]
    assert points(found["validation"]) == [(1, 2.5), (2, 2.0), (3, None)]
    assert figure.axes[2].get_xlabel() == "epoch"
    assert "no steps" in figure.axes[2].texts[0].get_text()
    figure.canvas.draw()
    low, high = figure.axes[0].get_xlim()
    assert low < 1 < 3 < high


def test_validations_of_an_old_run_with_few_logged_steps_stand_at_their_steps():
    """Every tenth of 90 steps is logged, three epochs: they end after steps 30, 60 and 90."""
    figure = plots.history_figure({"old": old_history(range(10, 91, 10))})
    assert points(lines(figure.axes[0])["validation"]) == [(30, 2.5), (60, 2.0), (90, None)]


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.filterwarnings("ignore:No artists with labels:UserWarning")
def test_a_run_that_has_hardly_begun_can_be_drawn(steps):
    begun = {"status": "running", "steps": history()["steps"][:steps], "epochs": [], "steps_per_epoch": 2}
    figure = plots.history_figure({"run": begun})
    figure.canvas.draw()
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [1] * (2 * steps)


def test_schedule_figure():
    training = TrainingConfig(learning_rate=1e-4, min_lr=6e-5, improvement_threshold=0.05, min_val_loss=0.2)
    records = simulate([2.0, 1.0, 0.97, 0.5], training)  # 0.97 is a plateau: 5e-5 < 6e-5
    figure = plots.schedule_figure(records, training.min_lr, training.min_val_loss)
    losses, rates = figure.axes
    assert points(losses.lines[0]) == [(1, 2.0), (2, 1.0), (3, 0.97)]
    marks = [(line.get_marker(), points(line)) for line in losses.lines if line.get_marker() in ("o", "x")]
    assert marks == [("o", [(1, 2.0)]), ("o", [(2, 1.0)]), ("x", [(3, 0.97)])]
    assert points(rates.lines[0]) == [(1, 1e-4), (2, 1e-4), (3, 1e-4), (4, 5e-5)]
    # the limits are where they were given
    assert [line.get_ydata()[0] for axis in figure.axes for line in axis.lines if line.get_linestyle() == "--"] == [
        0.2, 6e-5,
    ]  # fmt: skip
    assert "ends after 3" in rates.get_xlabel()
    assert "min_lr" in rates.get_xlabel()
    figure.canvas.draw()


def test_mix_figure():
    table = [
        {"source": "forward", "rows per epoch": 70, "actual share": 0.7},
        {"source": "face_cw", "rows per epoch": 30, "actual share": 0.3},
    ]
    figure = plots.mix_figure(table)
    bars = [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches]
    assert bars == [(0, 70), (70, 30)]
    assert [text.get_text() for text in figure.axes[0].texts] == ["70.0%", "30.0%"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["forward", "face_cw"]


def test_simulate_tells_each_epoch_up_to_the_end():
    records = simulate([2.0, 1.0, 0.97, 0.5, 0.1], TrainingConfig())
    stop = records[-1]["stop"]
    assert "min_lr" in stop
    assert "5e-05" in stop
    assert records == [
        dict(epoch=1, loss=2.0, lr=1e-4, next_lr=1e-4, improved=True, reduced=False, bad_epochs=0, stop=None),
        dict(epoch=2, loss=1.0, lr=1e-4, next_lr=1e-4, improved=True, reduced=False, bad_epochs=0, stop=None),
        dict(epoch=3, loss=0.97, lr=1e-4, next_lr=5e-5, improved=False, reduced=True, bad_epochs=0, stop=stop),
    ]


def test_simulate_ends_where_the_losses_end():
    records = simulate([1.0, 1.0], TrainingConfig(min_lr=0.0, learning_rate=4e-4))
    assert [(record["lr"], record["next_lr"], record["stop"]) for record in records] == [
        (4e-4, 4e-4, None),
        (4e-4, 2e-4, None),
    ]
    assert simulate([], TrainingConfig()) == []
