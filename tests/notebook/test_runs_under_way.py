"""How the runs of a folder stand, and those under way."""

import json

import pytest

from mmrev_kit.files import write_json
from mmrev_kit.notebook import runs
from mmrev_kit.training import lock


def history(status: str, losses: list, task: str = "forward") -> dict:
    epochs = [
        {"epoch": number, "train_loss": 1.0, "val_loss": {"forward": loss, "reverse": 9.0}, "lr": 1e-3}
        for number, loss in enumerate(losses, start=1)
    ]
    start = {"status": status, "reason": None, "task": task, "total_steps": 40, "steps_per_epoch": 10, "steps": []}
    return start | {"epochs": epochs}


@pytest.fixture
def outputs(tmp_path):
    """A finished run with its verdict, one that was killed, and one that this process has under way."""
    for name, status, losses in (
        ("done", "finished", [2.0, 0.5, None, 0.7]), ("killed", "running", []), ("live", "running", [1.5]),
    ):  # fmt: skip
        write_json(tmp_path / name / runs.HISTORY, history(status, losses))
    write_json(tmp_path / "done" / "eval" / "people" / "verdict.json", {"claim": "no reversal curse"})
    with lock.held(tmp_path / "live"):
        yield tmp_path


def test_every_run_has_a_line_that_says_how_it_stands(outputs):
    table = runs.run_table(str(outputs))
    assert table.loc["done"].tolist() == ["forward", "finished", "4 of 4", 0.5, "no reversal curse"]
    assert table.loc["killed", ["state", "epochs", "verdict"]].tolist() == [
        "killed; run it again to go on", "0 of 4", "not evaluated",
    ]  # fmt: skip
    assert table.loc["live", ["state", "epochs"]].tolist() == ["under way", "1 of 4"]
    assert len(runs.run_table(str(outputs / "nowhere"))) == 0


def test_headless_a_run_under_way_is_named_and_not_waited_for(outputs, capsys):
    holder = lock.describe(json.loads((outputs / "live" / lock.NAME).read_text()))
    runs.follow(None, str(outputs))
    assert capsys.readouterr().out == f"live is under way: {holder}\n"
    runs.follow(f"{outputs}/live/{runs.HISTORY} {outputs}/done", "unused")
    assert capsys.readouterr().out == f"live is under way: {holder}\n"
    runs.follow(f"{outputs}/done", "unused")
    assert capsys.readouterr().out == "No run is under way.\n"


def test_an_interrupt_ends_the_following_and_not_the_notebook(outputs, capsys, monkeypatch, open_in_jupyterlab):
    open_in_jupyterlab()

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.time, "sleep", interrupt)
    runs.follow(None, str(outputs))
    assert capsys.readouterr().out.endswith("no longer shown; the run goes on\n")
