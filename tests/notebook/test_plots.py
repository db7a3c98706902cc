"""Figures: gaps stay gaps, decisions are marked, and no figure is left open."""

import io
import math

import matplotlib
import pytest
from PIL import Image

matplotlib.use("Agg")

from matplotlib import pyplot

from mmrev_kit.config.sections import TrainingConfig
from mmrev_kit.notebook import drawing, plots
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
    assert points(axis.lines[0]) == [(n, 1e-3) for n in (1, 2, 3, 4)]


def test_a_run_is_told_in_words():
    told = "validation loss of forward by epoch 2.5, 2.4; validation loss of face_cw by epoch not finite, 0.7"
    first = f"run: 4 updates, training loss from 4 to 1; {told}; improved after epoch 1."
    old = "old: 0 updates; validation loss of validation by epoch 2.5, 2, not finite."
    assert plots.history_figure({"run": history(), "old": old_history()}).alt == f"{first} {old}"


def test_losses_of_a_loop_of_ones_own_are_means_of_five():
    figure = plots.losses_figure([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert points(figure.axes[0].lines[0]) == [(1, 1.0), (2, 1.5), (3, 2.0), (4, 2.5), (5, 3.0), (6, 4.0)]
    assert figure.alt == "Training loss of 6 updates, from 1 to 6."


def test_the_shares_of_a_pretraining_stand_at_their_steps():
    """The second entry asked nothing; what was right at the last is told."""
    asked = [(100, 2e-3, {"cw": 0.5, "forward": 0.0}), (150, 1e-3, {}), (200, 5e-4, {"cw": 0.75, "forward": 0.125})]
    log = [{"step": step, "rate": rate, "loss": {}, "right": right} for step, rate, right in asked]
    figure = plots.pretraining_figure({"log": log})
    shares, rates = figure.axes
    assert {name: points(line) for name, line in lines(shares).items()} == {
        "cw": [(100, 0.5), (200, 0.75)], "forward": [(100, 0.0), (200, 0.125)],
    }  # fmt: skip
    assert points(rates.lines[0]) == [(100, 2e-3), (200, 5e-4)]
    assert figure.alt == "Right as a whole after step 200: cw 0.75, forward 0.13."
    assert plots.pretraining_figure({"log": []}).alt.endswith("after step 0: nothing was asked yet.")


def test_throughput():
    axis = plots.history_figure({"run": history()}).axes[2]
    assert points(axis.lines[0]) == [(1, 10.0), (2, 20.0), (3, 30.0), (4, 40.0)]


def test_several_runs_show_the_source_that_decides():
    figure = plots.history_figure({"a": history(), "b": history((8.0, 6.0)), "old": old_history()})
    found = lines(figure.axes[0])
    assert set(found) == {"a", "b", "old"}
    assert points(found["b"]) == [(1, 8.0), (2, 6.0)]
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]  # a run's validation
    assert [line.get_color() for line in dashed] == [line.get_color() for line in found.values()]
    assert len({line.get_color() for line in dashed}) == 3
    assert points(dashed[0]) == [(2, 2.5), (4, 2.4)] and points(dashed[2]) == [(1, 2.5), (2, 2.0), (3, None)]
    figure.canvas.draw()


def boxes(figure) -> list[tuple[str, object]]:
    """(text, rectangle in pixels) of every text that is seen, tick labels included."""
    figure.canvas.draw()
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip() and text.get_visible()]
    outside = set()  # matplotlib keeps labels of ticks beyond the limits, and does not draw them
    for axis in (one for axes in figure.axes for one in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks() + axis.get_minor_ticks():
            if not low <= tick.get_loc() <= high:
                outside |= {tick.label1, tick.label2}
    return [(text.get_text(), text.get_window_extent()) for text in texts if text not in outside]


def check_readable(figure) -> None:
    """Within its edges, no text over another, and no wider than a notebook."""
    found = boxes(figure)
    width, height = figure.bbox.width, figure.bbox.height
    for number, (text, box) in enumerate(found):
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, text
        for other, another in found[number + 1 :]:
            apart = box.x1 <= another.x0 or another.x1 <= box.x0 or box.y1 <= another.y0 or another.y1 <= box.y0
            assert apart, f"{text!r} lies over {other!r}"
    assert figure.get_size_inches()[0] <= 8


def test_eight_runs_in_one_figure_are_readable_and_told_apart():
    """As one figure over more than a decade: labels at the decades alone."""
    names = [f"faces20x13_seed{number}_one-order_forward" for number in range(8)]
    figure = plots.history_figure({name: history((40.0, 2.0, 0.3, 0.01)) for name in names})
    check_readable(figure)
    axis = figure.axes[0]
    assert len({line.get_color() for line in lines(axis).values()}) == 8
    labels = [text.get_text() for text in axis.get_yticklabels()]
    assert {"0.01", "0.1", "1", "10"} <= set(labels)
    assert all(math.log10(float(label)).is_integer() for label in labels if label)
    assert not [text for text in axis.get_yticklabels("minor") if text.get_text()]
    assert all(name in figure.alt for name in names)


def test_a_loss_that_stays_within_a_decade_still_has_numbers_beside_it():
    figure = plots.history_figure({"run": history((3.9, 3.5, 3.2, 3.0))})
    low, high = figure.axes[0].get_ylim()
    figure.canvas.draw()
    labels = [float(text.get_text()) for text in figure.axes[0].get_yticklabels() if text.get_text()]
    assert len([label for label in labels if low <= label <= high]) >= 2


def test_figures_say_their_numbers_and_stand_on_light_and_dark():
    """0.375 is 0.38 in the figure and in its text; every ink has 3 : 1 against white and against #111."""
    numbers = {"accuracy": 0.375, "cluster_interval": [0.125, 0.625], "wilson": None, "chance": 0.5}
    metrics = {"none": {"reverse": {"main": numbers, "control": numbers | {"accuracy": 1.0}}}}
    figure = plots.accuracy_figure({"run": metrics})
    check_readable(figure)
    assert "0.38" in [text for text, _ in boxes(figure)] and "main 0.38 (0.13 to 0.63)" in figure.alt
    data, facts = figure._repr_mimebundle_()
    assert facts["image/png"]["alt"] == figure.alt and facts["image/png"]["width"] == 800
    with Image.open(io.BytesIO(data["image/png"])) as picture:
        assert picture.mode == "RGBA" and picture.getpixel((0, 0))[3] == 0
    for color in (*drawing.COLORS, drawing.INK):
        light = luminance(color)
        assert 1.05 / (light + 0.05) >= 3 and (light + 0.05) / (luminance("#111111") + 0.05) >= 3, color


def luminance(color: str) -> float:
    """WCAG's relative luminance."""
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("bridge", [False, True])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_numbers_stand_clear_of_chance_and_of_each_other(number, bridge):
    """An interval that ends just below the line of chance would put its number onto it."""
    groups = {
        "main": {"accuracy": 0.3, "cluster_interval": [0.2, 0.44], "wilson": None, "chance": 0.5},
        "control": {"accuracy": 0.96, "cluster_interval": [0.8, 1.0], "wilson": None, "chance": 0.5},
    }
    if bridge:  # a third group, in the middle
        groups["bridge"] = {"accuracy": 0.94, "cluster_interval": [0.81, 0.99], "wilson": None, "chance": 0.5}
    figure = plots.accuracy_figure({f"run {n}": {"none": {"reverse": groups}} for n in range(number)})
    check_readable(figure)
    (axis,) = [axis for axis in figure.axes if axis.get_title().startswith("CW\n")]
    chance = axis.transData.transform((0, 0.5))[1]
    for text in axis.texts:
        box = text.get_window_extent()
        assert box.y1 < chance or box.y0 > chance


def test_epochs_are_whole_numbers():
    figure = plots.schedule_figure(simulate([2.0, 1.0, 0.9], TrainingConfig()), 6e-5, 0.2)
    check_readable(figure)
    old = plots.history_figure({"old": old_history()})
    for axis in (*figure.axes, old.axes[2]):
        assert all(float(tick).is_integer() for tick in axis.get_xticks())


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
    told = "1: loss 2, rate 0.0001; 2: loss 1, rate 0.0001; 3: loss 0.97, rate 0.0001; it ends after 3: "
    assert figure.alt.startswith(f"A simulated schedule, by epoch {told}")
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
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["forward", "face_cw"]
    assert figure.alt == "An epoch of 100 rows: forward 70 rows (70.0%), face_cw 30 rows (30.0%)."


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
