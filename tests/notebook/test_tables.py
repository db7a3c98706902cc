"""A run's tables and sentence: every number against one that was worked out by hand."""

import math

import pytest

from mmrev_kit.data.mixing import make_plan
from mmrev_kit.notebook.tables import epoch_table, mix_table, summary


def history() -> dict:
    """Three epochs of two updates each; the second validation is the lowest, the third is not finite."""
    steps = [
        {"global_step": n, "loss": 1.0, "seconds": 10.0 * n, "samples": 16, "peak_memory_gib": gib}
        for n, gib in enumerate((1.0, 2.125, 2.0, None, 1.5, 0.5), start=1)
    ]
    decisions = [(True, False, 1e-3), (True, False, 1e-3), (False, True, 5e-4)]
    losses = [(3.0, 2.5, 0.75), (2.0, 0.12345, None), (None, None, 0.5)]
    epochs = [
        {
            "epoch": n,
            "train_loss": train,
            "val_loss": {"forward": first, "face_cw": second},
            "lr": 1e-3,
            "seconds": 25.0,
        }
        | {"decision": {"improved": improved, "reduced": reduced, "lr": lr}}
        for n, ((train, first, second), (improved, reduced, lr)) in enumerate(zip(losses, decisions, strict=True), 1)
    ]
    return {"status": "finished", "reason": "last epoch", "steps": steps, "epochs": epochs}


def test_a_row_an_epoch_with_every_loss_the_rate_and_what_was_decided():
    table = epoch_table(history())
    assert list(table.columns) == ["training", "validation forward", "validation face_cw", "lr", "decision"]
    assert {epoch: table.loc[epoch].tolist() for epoch in table.index} == {
        1: ["3", "2.5", "0.75", "0.001", "improved"],
        2: ["2", "0.1235", "", "0.001", "improved"],
        3: ["", "", "0.5", "0.001", "no improvement, rate to 0.0005"],
    }
    begun = history() | {"epochs": [history()["epochs"][0] | {"lr": None, "decision": None}]}
    assert epoch_table(begun).loc[1].tolist() == ["3", "2.5", "0.75", "", ""]
    assert len(epoch_table(begun | {"epochs": []})) == 0


def test_the_sentence_names_the_lowest_loss_of_the_source_that_decides_and_what_the_run_took():
    """Epochs take 25 s each, 75 in all, more than the 60 of the last update; 96 samples are 1.28 a second."""
    told = "its lowest validation loss on forward rows is 0.1235, after epoch 2."
    effort = "It took 1 min 15 s, saw 96 samples (1.3 a second) and used at most 2.13 GiB of memory in a process."
    assert summary(history()) == f"The run ended after epoch 3 (last epoch); {told} {effort}"
    brief = history() | {"steps": [], "status": "interrupted", "reason": None}
    assert summary(brief) == f"The run was interrupted after epoch 3; {told} It took 1 min 15 s."
    kept = [record | {"decision": {"improved": record["epoch"] == 1}} for record in history()["epochs"]]
    little = "That is too little lower to count (training.improvement_threshold): best/ is of epoch 1."
    assert summary(brief | {"epochs": kept}).endswith(f"{told} {little} It took 1 min 15 s.")
    assert summary(brief | {"epochs": []}) == "The run has no validation loss yet (interrupted)."


@pytest.mark.parametrize(("epochs", "uses"), [(1, ["1.00", "0.40", "0.10"]), (5, ["5.00", "2.00", "0.50"])])
def test_the_mix_says_asked_and_actual_shares_rows_and_uses(epochs, uses):
    """70 rows of the task; of 30 retention rows two thirds and one third, of pools of 50 and 100."""
    plan = make_plan({"forward": 70}, {"a": 50, "b": 100}, {"a": 2.0, "b": 1.0}, 0.3, 0, epochs)
    table = mix_table(plan.table())
    assert {name: table[name].tolist() for name in table} == {
        "asked share": ["70.0%", "20.0%", "10.0%"],
        "actual share": ["70.0%", "20.0%", "10.0%"],
        "rows": [70, 50, 100],
        "rows per epoch": [70, 20, 10],
        "uses of each row": uses,
    }
    assert list(table.index) == ["forward", "a", "b"] and math.isclose(plan.retention_share, 0.3)
