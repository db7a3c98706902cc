"""What a user sees of a run that is stopped, goes on, is left, and found again."""

from lab import RUN, give

from mmrev_kit.training.history import read_history


def test_a_run_is_stopped_goes_on_is_left_and_found_again(open_tab, project):
    words = f"{RUN['overrides']} data.folder=data/small training.save_steps=5"
    text = (project / "notebooks" / "train.ipynb").read_text()
    for copy in ("longer", "second"):
        (project / "notebooks" / f"{copy}.ipynb").write_text(text)
        give(project / "notebooks" / f"{copy}.ipynb", {"name": "longer", "num_epochs": 3, "overrides": words})
    cell, file = "launch.launch", project / "outputs" / "longer_forward" / "training_history.json"
    tab, other, history = open_tab("longer"), open_tab("second"), open_tab("history")
    tab.run_above(cell)
    other.run_above(cell)
    history.run_above("runs.follow")

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
