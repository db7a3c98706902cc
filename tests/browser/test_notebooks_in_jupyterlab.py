"""What a user sees of the notebooks: each run whole, its knobs moved."""

from pathlib import Path

import pytest
from lab import APART, GIVEN, ROOT

ALL = [*GIVEN, *sorted({path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - set(GIVEN))]


def in_view(tab, locator) -> bool:
    """Whether all of an element lies in the window."""
    box = locator.bounding_box()
    return 0 <= box["x"] and box["x"] + box["width"] <= 1400 and 0 <= box["y"] and box["y"] + box["height"] <= 900


def move_each_knob(tab, source: str, keys: list[str]) -> None:
    """Every knob of a panel changes its one picture, which stands beside the knobs, in view.

    Args:
        keys: what takes each slider to an end of its range where the picture must differ, in the order of the sliders.
    """
    cell = tab.show(source)
    picture = cell.locator("img")
    tab.until(lambda: picture.count() == 1)
    tab.page.wait_for_timeout(500)  # the scrolling
    assert in_view(tab, picture) and picture.get_attribute("alt")
    assert cell.locator(".widget-vbox").first.bounding_box()["x"] < picture.bounding_box()["x"]

    def changes(move, knob: str) -> None:
        before = picture.get_attribute("src")
        move()
        tab.until(lambda: picture.get_attribute("src") != before, 30, f"{knob} changes nothing")

    handles = cell.locator(".noUi-handle").all()
    for number, (handle, key) in enumerate(zip(handles, keys, strict=True)):
        changes(lambda handle=handle, key=key: handle.press(key), f"slider {number + 1}")
    for number, select in enumerate(cell.locator("select").all()):
        values = select.evaluate("element => [...element.options].map(option => option.value)")
        other = next(value for value in values if value != select.input_value())
        changes(lambda select=select, other=other: select.select_option(other), f"choice {number + 1}")
    for box in cell.locator("input[type=checkbox]").all():
        changes(box.click, "box")


def check_train(tab) -> None:
    assert len(tab.pictures("plots.history_figure")) == 1
    tab.type("num_epochs = 1", "num_epochs = 12")
    tab.start_above("launch.launch")
    tab.wait_above("launch.launch")
    # first and lowest loss, epochs to halve, rate, lowest rate, factor, patience, threshold: a plateau after two epochs
    move_each_knob(tab, "schedule_simulator", ["End", "End", "Home", "End", "Home", "End", "End", "End"])


def check_memory(tab) -> None:
    # r, length, pixels, rows, processes: long rows have room for larger pictures, a large adapter shows its optimizer
    move_each_knob(tab, "budget.controls", ["End", "End", "End", "Home", "Home"])


def check_evaluate(tab) -> None:
    cell = tab.show("knobs.ask_form")
    picture, button = cell.locator("img"), cell.locator("button.jupyter-button")
    before, path = picture.get_attribute("src"), cell.locator("input[type=text]").input_value()
    options = cell.locator("select option").count()
    assert options == 1 + 8 and Path(path).is_file()
    cell.locator("select").select_option(index=3)
    tab.until(lambda: picture.get_attribute("src") != before, 30)
    assert cell.locator("input[type=text]").input_value() != path
    seen = button.evaluate(
        """button => new Promise(done => { const seen = [];
        new MutationObserver(() => { seen.push([button.innerText, button.disabled]);
            if (seen.length > 1 && !button.disabled && button.innerText === 'Ask') done(seen); })
            .observe(button, {attributes: true, childList: true, characterData: true, subtree: true});
        button.click(); })"""
    )
    assert ["answering …", True] in seen
    tab.until(lambda: cell.locator(".widget-html b").count() == 1, 30)
    assert cell.locator(".widget-html b").inner_text()


def check_sweep(tab) -> None:
    assert "1 of 1" in tab.text("run_sweep") and "failed" not in tab.text("run_sweep")


CHECKS = {"train": check_train, "memory": check_memory, "evaluate": check_evaluate}
CHECKS |= {"reproduce": check_sweep, "sweep": check_sweep}


@pytest.mark.parametrize("name", [name for name in ALL if name not in APART])
def test_a_notebook_runs_whole_and_its_knobs_change_what_is_seen(open_tab, name):
    """In the order of reading: `evaluate` and `history` look at the run that `train` leaves."""
    tab = open_tab(name)
    tab.run_whole()
    CHECKS.get(name, lambda tab: None)(tab)
