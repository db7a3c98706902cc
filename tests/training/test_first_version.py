"""What the first version wrote: its run folders load, and its interrupted run goes on as if nothing had changed.

fixtures/first_version was written by it: the same small run once to its end, and once interrupted in its second epoch.
"""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.make import ensure_data
from mmrev_kit.evaluation.results import read_evaluation
from mmrev_kit.model.bases import base_fingerprint, base_of, check_base
from mmrev_kit.notebook.launch import launch
from mmrev_kit.notebook.tables import epoch_table, find_histories, summary
from mmrev_kit.training.history import read_history

ROOT = Path(__file__).parents[2]
WRITTEN = ROOT / "tests" / "fixtures" / "first_version"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder of its own, in which the interrupted run lies where its manifest says."""
    (tmp_path / "notebooks").mkdir()
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(WRITTEN / "interrupted", tmp_path / "outputs" / "first_forward")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_finished_runs_history_and_evaluation_are_read():
    histories = find_histories(str(WRITTEN / "finished"), "outputs")
    assert list(histories) == ["finished"]
    history = histories["finished"]
    assert history["status"] == "finished" and len(history["steps"]) == 30 and len(epoch_table(history)) == 2
    assert "lowest validation loss on forward rows is" in summary(history)
    evaluation = read_evaluation(WRITTEN / "finished" / "eval" / "first")
    assert {record["test"] for record in evaluation.records} == {"forward", "reverse", "mcq_i2d", "mcq_d2i"}
    assert len(evaluation.records) == 8 * (3 + 6 + 3 + 3)


def test_an_interrupted_run_goes_on_to_the_same_end(project):
    """Same data (by the manifest's hashes), base, rows, updates and decisions; losses to what another CPU may round."""
    config = load_config("outputs/first_forward/config.yaml")
    assert ensure_data(config) == [f"made {project}/data/first"]
    expected, before = (read_history(WRITTEN / name / "training_history.json") for name in ("finished", "interrupted"))
    history = launch(config)
    assert history["status"] == "finished"
    assert history["steps"][: len(before["steps"]) - 1] == before["steps"][:-1]  # not trained again
    assert [step["loss"] for step in history["steps"]] == pytest.approx(
        [s["loss"] for s in expected["steps"]], rel=1e-3
    )
    assert [step["lr"] for step in history["steps"]] == [step["lr"] for step in expected["steps"]]
    for epoch, other in zip(history["epochs"], expected["epochs"], strict=True):
        assert epoch["val_loss"] == pytest.approx(other["val_loss"], rel=1e-3)
        assert epoch["decision"] == other["decision"]
    for name in ("best", "final"):
        found, wanted = (
            load_file(folder / name / "adapter_model.safetensors")
            for folder in (project / "outputs" / "first_forward", WRITTEN / "finished")
        )
        assert (
            all(torch.allclose(found[key], wanted[key], atol=1e-3) for key in wanted) and found.keys() == wanted.keys()
        )
    check_base(WRITTEN / "finished" / "best", partial(base_fingerprint, **base_of(config)), "embedded")


def test_its_finished_run_is_not_trained_again_and_another_one_is_refused(project, capsys):
    folder = project / "outputs" / "first_forward"
    shutil.rmtree(folder)
    shutil.copytree(WRITTEN / "finished", folder)
    config = load_config("outputs/first_forward/config.yaml")
    config.launch.output_dir = "outputs"
    history = launch(config)
    assert history == read_history(WRITTEN / "finished" / "training_history.json")
    assert all(0 < step["tokens_per_second"] and step["mfu"] is None for step in history["steps"])
    assert "is finished (last epoch)" in capsys.readouterr().out
    config.lora.r = 2
    with pytest.raises(ConfigError, match=r"another configuration: lora.r \(1 there, 2 now\)"):
        launch(config)
