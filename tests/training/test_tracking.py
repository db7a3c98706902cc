"""Trackers: TensorBoard's own reader finds the history's numbers, and a run that goes on goes on there."""

import sys
from types import SimpleNamespace

import pytest
import torch

from mmrev_kit.__main__ import main
from mmrev_kit.config.project import run_dir
from mmrev_kit.config.reading import to_yaml
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.notebook.launch import launch
from mmrev_kit.training import loop, tracking
from mmrev_kit.training.history import changed_settings, read_history
from mmrev_kit.training.loop import train

CPU = torch.device("cpu")
QUICK = "training.num_epochs=2 training.batch_size=64 retention.retention_ratio=0 quantization.bits=16"


@pytest.fixture
def state():
    return SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=CPU)


def scalars(folder) -> dict[str, dict[int, float]]:
    """{name: {step: value}}, as TensorBoard shows them: what was logged again replaces what it was."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: {event.step: event.value for event in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}


@pytest.mark.long
def test_tensorboard_shows_the_history_and_a_run_that_goes_on_goes_on_there(small_config, state, monkeypatch):
    config = small_config(f"{QUICK} launch.tracking=tensorboard evaluation.by_epoch=true training.save_steps=2")
    real, calls = loop.update, []

    def interrupted(run, samples):
        calls.append(1)
        if len(calls) == 4:  # after the third update, of which two are saved
            raise KeyboardInterrupt
        return real(run, samples)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, state)
    folder = run_dir(config) / "tensorboard"
    before = read_history(run_dir(config) / "training_history.json")["tracking"]
    assert set(scalars(folder)["training/loss"]) == {1, 2, 3}
    train(config, state)
    history, found = read_history(run_dir(config) / "training_history.json"), scalars(folder)
    assert history["tracking"] == before and len(history["epochs"]) == 2
    steps = {step["global_step"]: step for step in history["steps"]}
    for name in ("loss", "lr", "grad_norm"):
        assert found[f"training/{name}"] == pytest.approx({n: step[name] for n, step in steps.items()}, rel=1e-6)
    ends = [history["steps_per_epoch"], 2 * history["steps_per_epoch"]]
    for end, record in zip(ends, history["epochs"], strict=True):
        assert found["epoch/validation loss/forward"][end] == pytest.approx(record["val_loss"]["forward"], rel=1e-6)
        main = [one for one in record["tests"]["reverse"].values() if one["group"] == "main"]
        share = sum(one["right"] for one in main) / sum(one["asked"] for one in main)
        assert found["tests/reverse/main"][end] == pytest.approx(share, rel=1e-6)


def test_without_a_tracker_the_history_says_nothing_of_one(small_config, state):
    config = small_config(f"{QUICK} training.num_epochs=1")
    train(config, state)
    assert "tracking" not in read_history(run_dir(config) / "training_history.json")
    assert not (run_dir(config) / "tensorboard").exists()


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(
    small_config, small_overrides, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(tracking, "find_spec", lambda wanted: None)
    more = f"launch.tracking={name} data.dir={tmp_path}/data"
    with pytest.raises(ConfigError, match=rf"{name} is not installed\. Run pip install {name}"):
        launch(small_config(more))
    assert main(["train", "--config", "configs/tiny_cpu.yaml", "--overrides", f"{small_overrides} {more}"]) == 2
    assert f"pip install {name}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_tracker_is_the_same_run_and_an_unknown_one_none(small_config, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(small_config()))
    assert changed_settings(small_config("launch.tracking=wandb"), tmp_path / "config.yaml") == ""
    with pytest.raises(ConfigError, match=r"launch\.tracking = 'mlflow': must be one of tensorboard, trackio, wandb"):
        small_config("launch.tracking=mlflow")


def test_weights_and_biases_is_offline_where_nobody_is_logged_in(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not tracking.has_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password nobody\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert tracking.has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not tracking.has_key()
    monkeypatch.setenv("WANDB_API_KEY", "nobody's")
    assert tracking.has_key()
