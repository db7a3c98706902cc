"""What a user sees of a run that is stopped, goes on, is left, and found again, and of notebooks that need no run."""

import pytest
from lab import APART, RUN, give

from mmrev_kit.training.history import read_history

THEMES = {"JupyterLab Dark": "false", "JupyterLab Light": "true"}
# The contrast of an element's text with what lies behind it, as WCAG 2 defines it.
CONTRAST = """element => {
    const parse = text => text.match(/[\\d.]+/g).map(Number);
    const light = rgb => rgb.slice(0, 3).map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    let behind = element, color;
    do { color = parse(getComputedStyle(behind).backgroundColor); behind = behind.parentElement; }
    while (behind && color[3] === 0);
    const [dark, bright] = [light(parse(getComputedStyle(element).color)), light(color)].sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05); }"""


def test_a_run_is_stopped_goes_on_is_left_and_found_again(open_tab, project):
    words = f"{RUN['overrides']} data.folder=data/small training.save_steps=5"
    text = (project / "notebooks" / "train.ipynb").read_text()
    for copy in ("longer", "second"):
        (project / "notebooks" / f"{copy}.ipynb").write_text(text)
        give(project / "notebooks" / f"{copy}.ipynb", {"name": "longer", "num_epochs": 3, "overrides": words})
    cell, file = "launch.launch", project / "outputs" / "longer_forward" / "training_history.json"
    tab, other, history = open_tab("longer"), open_tab("second"), open_tab("history")
    above = {tab: cell, other: cell, history: "runs.follow"}
    for one, source in above.items():
        one.start_above(source)
    for one, source in above.items():
        one.wait_above(source)

    tab.run(cell)
    tab.until(lambda: tab.pictures(cell))
    tab.command("notebook:interrupt-kernel")
    tab.until(tab.has_run)
    assert tab.errors()[0].startswith("KeyboardInterrupt") and "interrupted; start it again" in tab.text(cell)
    stopped = len(read_history(file)["steps"])
    tab.run(cell)
    tab.until(lambda: tab.pictures(cell) and len(read_history(file)["steps"]) >= stopped)
    assert "going on from" in tab.text(cell)
    tab.page.close()

    other.run(cell, "notebook:run-all-below")
    history.run("runs.follow", "notebook:run-all-below")
    other.until(lambda: "It is shown here" in other.text(cell) and other.pictures(cell))
    before = other.pictures(cell)
    other.until(lambda: other.pictures(cell) != before)  # live
    history.until(lambda: history.pictures("runs.follow"))
    history.command("notebook:interrupt-kernel")  # ends the showing, not the run
    history.until(history.has_run)
    assert not history.errors() and "no longer shown" in history.text("runs.follow")
    assert read_history(file)["status"] == "running"

    back = open_tab("longer", wait=False)
    back.command("notebook:run-all-cells")
    other.until(other.has_run)
    back.until(back.has_run)
    for one in (other, back):
        assert not one.errors() and len(one.pictures("plots.history_figure")) == 1
    assert "is finished" in back.text(cell) and read_history(file)["status"] == "finished"
    back.run_all(restart=True)
    assert "is finished" in back.text(cell) and len(back.pictures("plots.history_figure")) == 1


def check_data(tab) -> None:
    cell = tab.show("knobs.browse")
    page = cell.locator(".widget-html").last
    assert page.inner_text().startswith("row 1 of ")
    first = page.inner_text()
    cell.locator(".noUi-handle").focus()
    tab.page.keyboard.press("ArrowRight")
    tab.until(lambda: page.inner_text().startswith("row 2 of "), 30)
    second = page.inner_text()
    assert second != first and ".jsonl:2," in second
    cell.locator("button.jupyter-button").first.click()
    tab.until(lambda: page.inner_text() == first, 30)
    assert cell.locator(".widget-slider").bounding_box()["width"] > 500
    cell.locator("select").select_option(index=1)
    tab.until(lambda: page.inner_text().startswith("row 1 of ") and page.inner_text() != first, 30)
    for theme, light in THEMES.items():
        tab.page.evaluate(f"() => {{ jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}}); }}")
        tab.until(lambda light=light: tab.page.evaluate("() => document.body.dataset.jpThemeLight") == light, 30)
        tab.page.wait_for_timeout(500)
        for part in ("span[style*=background]", "b"):
            assert page.locator(part).first.evaluate(CONTRAST) >= 4.5, (theme, part)


@pytest.mark.parametrize("name", APART)
def test_a_notebook_runs_whole(open_tab, name):
    tab = open_tab(name)
    tab.run_whole()
    if name == "data":
        check_data(tab)
