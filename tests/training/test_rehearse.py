"""A rehearsal on a CPU with the tiny architecture: the real worker's code, in a process of its own."""

import sys

import pytest

from mmrev_kit.config.project import EMBEDDED_MODEL
from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.training.preflight import architecture_of
from mmrev_kit.training.rehearse import rehearse
from mmrev_kit.training.update import TrainingError


def test_a_rehearsal_runs_real_updates_and_says_that_a_cpu_measures_no_card(small_config):
    import torch

    found = rehearse(small_config("memory.cache_features=false evaluation.by_epoch=true"), updates=1)
    assert found.updates == 1 and found.samples_per_second > 0 and found.device == "CPU"
    assert found.allocated_gib is None and "measures nothing of a card" in str(found)
    assert 0 < found.estimate["allocated"] < found.estimate["reserved"] < found.estimate["device"]
    assert found.tests_share > 0 and "; the tests after an epoch take " in str(found)
    assert list(found.table().index) == ["allocated", "reserved", "device"]
    assert not torch.cuda.is_initialized() and "mmrev_kit.training.rehearse" in sys.modules


def test_its_error_arrives(small_config):
    with pytest.raises(TrainingError, match="language model has no wrong_proj"):
        rehearse(small_config("lora.target_modules=[wrong_proj]"))
    with pytest.raises(ConfigError, match="updates = 0"):
        rehearse(small_config(), updates=0)


def test_the_architecture_of_a_name():
    for name, file in (
        ("Qwen/Qwen3-VL-32B-Instruct", "configs/models/qwen3vl_32b.json"),
        ("Qwen/Qwen3-VL-2B-Thinking", "configs/models/qwen3vl_2b.json"),
        ("embedded", str(EMBEDDED_MODEL / "config.json")),
        ("configs/models/qwen3vl_4b.json", "configs/models/qwen3vl_4b.json"),
    ):
        assert architecture_of(load_config(None, f"model.name={name}")) == file
    with pytest.raises(ConfigError, match="no architecture file"):
        architecture_of(load_config(None, "model.name=someone/other"))
