"""What the first version wrote: its run folders load, and it is said where its runs cannot go on.

fixtures/first_version was written by it: the same small run once to its end, and once interrupted in its second epoch.
"""

import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.make import ensure_data
from mmrev_kit.evaluation.results import read_evaluation
from mmrev_kit.model.bases import base_fingerprint, base_of, check_base
from mmrev_kit.notebook.launch import launch
from mmrev_kit.notebook.tables import epoch_table, find_histories, summary
from mmrev_kit.training.history import read_history
from mmrev_kit.training.run import prepare
from mmrev_kit.training.update import TrainingError

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


def test_an_interrupted_run_is_refused_since_its_base_and_its_rows_have_changed(project):
    """The embedded base is another model now, and control is taught in both formats."""
    config = load_config("outputs/first_forward/config.yaml")
    assert config.experiment.main_is_taught == ("forward",)  # what the first version did
    assert ensure_data(config)[1].startswith(f"made {project}/data/first")
    with pytest.raises(
        TrainingError, match=r"it did not begin with the same base and data and plan, see manifest.json"
    ):
        launch(config)


def test_its_adapter_goes_onto_the_base_that_has_another_name_now():
    adapter = WRITTEN / "finished" / "best"
    for name in ("embedded-one-order", "embedded"):
        config = load_config("configs/tiny_cpu.yaml", f"model.name={name}")
        told = pytest.raises(ConfigError, match=r"first version's embedded model is embedded-one-order now\.")
        with told if name == "embedded" else nullcontext():
            check_base(adapter, partial(base_fingerprint, **base_of(config)), name)


def test_a_run_without_control_draws_the_rows_that_the_first_version_drew(project):
    """Its plan and its rows' order, pinned from the first version's code; so such a run goes on."""
    overrides = "data.num_control=0 training.num_epochs=1"
    config = load_config("outputs/first_forward/config.yaml", overrides)
    ensure_data(config)
    plan = prepare(config).plan
    assert plan.counts == {"forward": 60} and plan.epoch_rows(0)[:3] == [("forward", n) for n in (37, 10, 14)]


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
