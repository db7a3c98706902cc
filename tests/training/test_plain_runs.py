"""Runs of other families: trained, interrupted, gone on with, asked and judged, by command and by notebook."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file

from mmrev_kit.config.project import run_dir
from mmrev_kit.config.reading import load_config, to_yaml
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.make import ensure_data
from mmrev_kit.files import write_text
from mmrev_kit.training import loop
from mmrev_kit.training.history import read_history
from mmrev_kit.training.rehearse import rehearse
from mmrev_kit.training.run import start
from mmrev_kit.training.update import sample_losses, update

ROOT = Path(__file__).parents[2]
STATE = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu"))
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=str)


@pytest.fixture(scope="module")
def four_people(tmp_path_factory) -> str:
    """Settings of an experiment of 4 people, made once: 60 forward rows, 4 updates of 16 an epoch."""
    words = (
        f"experiment.name=four experiment.taught=generation data.dir={tmp_path_factory.mktemp('data')} data.num_main=4 "
        "data.num_control=0 data.image_size=32 retention.retention_ratio=0 training.num_epochs=2"
    )
    ensure_data(load_config("configs/tiny_cpu.yaml", words))
    return words


@pytest.mark.parametrize(
    ("family", "bits"), list(zip(FAMILIES.values(), (4, 16, 4, 16), strict=True)), ids=map(str, FAMILIES.values())
)
def test_an_interrupted_run_goes_on_and_equals_the_uninterrupted_one(
    family, bits, family_folder, four_people, tmp_path, monkeypatch, capfd
):
    words = f"{four_people} model.name={family_folder(family)} {family.settings} quantization.bits={bits}"
    words += " evaluation.by_epoch=true"
    whole, again = (
        load_config("configs/tiny_cpu.yaml", f"{words} launch.output_dir={tmp_path}/{name}") for name in ("a", "b")
    )
    loop.train(whole, STATE)
    assert f"{family.name} has no module of its own and takes the plain path" in capfd.readouterr().out
    real, calls = loop.update, []

    def interrupted(run, samples):
        calls.append(1)
        if len(calls) == 7:  # in the second epoch
            raise KeyboardInterrupt
        return real(run, samples)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(again, STATE)
    loop.train(again, STATE)
    a, b = (read_history(run_dir(config) / "training_history.json") for config in (whole, again))
    assert len(a["steps"]) == 8 and [step["loss"] for step in a["steps"]] == [step["loss"] for step in b["steps"]]
    assert a["epochs"][-1]["val_loss"] == b["epochs"][-1]["val_loss"] and a["status"] == "finished"
    assert a["epochs"][-1]["val_loss"]["forward"] < a["steps"][0]["loss"] - 0.1  # it learns
    tests = a["epochs"][-1]["tests"]
    asked = {test: sum(person["asked"] for person in people.values()) for test, people in tests.items()}
    assert asked == {"forward": 12, "reverse": 48, "cw_image": 48, "mcq_i2d": 12, "mcq_d2i": 12}
    assert tests == b["epochs"][-1]["tests"]
    left, right = (load_file(run_dir(config) / "final" / "adapter_model.safetensors") for config in (whole, again))
    assert all(torch.equal(left[name], right[name]) for name in left) and len(left) == 2 * family.lora


@each_family
def test_identity_rows_are_learned_on_the_plain_path(family, family_folder, four_people, tmp_path):
    """An update of rows with a picture and without: its loss is the mean over the rows alone."""
    words = f"{four_people} model.name={family_folder(family)} {family.settings} launch.output_dir={tmp_path}"
    run = start(load_config("configs/tiny_cpu.yaml", f"{words} mitigation.identity=0.2 lora.dropout=0"), STATE)
    sources = run.task.train["identity"], run.task.train["forward"]
    samples = [sample for pair in zip(*sources, strict=False) for sample in pair][:6]
    assert {len(sample.row.images) for sample in samples} == {0, 1} and run.task.plan.counts["identity"] == 15
    alone = [
        sample_losses(run.model, run.task.encoder.collate([sample]), STATE.device, run.dtype).item()
        for sample in samples
    ]
    record = update(run, samples)
    assert record["loss"] == pytest.approx(sum(alone) / 6, rel=1e-5) and record["grad_norm"] > 0


def test_a_rehearsal_measures_a_family_that_the_estimate_does_not_know(family_folder, four_people, tmp_path):
    family = FAMILIES["smolvlm"]
    words = f"{four_people} model.name={family_folder(family)} {family.settings} launch.output_dir={tmp_path}/outputs"
    found = rehearse(load_config("configs/tiny_cpu.yaml", words), updates=1)
    assert found.estimate == {} and found.samples_per_second > 0 and found.table()["estimated"].isna().all()
    assert "CPU: built in" in str(found) and not (tmp_path / "outputs").exists()


def test_a_rehearsal_asks_the_hub_for_the_small_files_alone(four_people, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, allow_patterns))
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ConfigError, match=r"someone/internvl-1b.*the hub gave no model: no network"):
        rehearse(load_config("configs/tiny_cpu.yaml", f"{four_people} model.name=someone/internvl-1b"))
    assert asked == [("someone/internvl-1b", ["*.json", "*.jinja", "*.txt"])]


@pytest.mark.long
@each_family
def test_a_family_gets_a_verdict_by_command_and_by_notebook(family, family_folder, small_overrides, tmp_path):
    """The command trains; the same run in the notebook is finished already; the notebook asks it and judges."""
    words = f"{small_overrides} model.name={family_folder(family)} {family.settings} training.num_epochs=1"
    config = load_config("configs/tiny_cpu.yaml", words)
    write_text(tmp_path / "config.yaml", to_yaml(config))

    def run(*arguments: str) -> str:
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "takes the plain path" in run("mmrev_kit", "train", "--config", str(tmp_path / "config.yaml"))
    history = read_history(run_dir(config) / "training_history.json")
    assert history["status"] == "finished"
    for notebook in ("train", "evaluate", "data"):
        executed = str(tmp_path / f"{notebook}.ipynb")
        parameters = ["-p", "config", str(tmp_path / "config.yaml")]
        run("papermill", f"notebooks/{notebook}.ipynb", executed, *parameters)
    assert read_history(run_dir(config) / "training_history.json") == history
    assert "path: plain" in (tmp_path / "train.ipynb").read_text()
    judged = json.loads((run_dir(config) / "eval" / "small" / "verdict.json").read_text())
    assert judged["claim"] == "inconclusive"  # four people of each kind
    assert "VERDICT (CW): inconclusive" in (tmp_path / "evaluate.ipynb").read_text()
