"""An optimizer is one entry of a table, which training and the memory estimate read."""

from types import SimpleNamespace

import pytest
import torch

from mmrev_kit.config.optimizers import OPTIMIZERS, OptimizerKind
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.memory.estimate import estimate, optimizer_bytes
from mmrev_kit.training.optimizer import make_optimizer
from mmrev_kit.training.run import start
from mmrev_kit.training.update import update

CPU = torch.device("cpu")
OTHERS = {
    "sgd": OptimizerKind("torch.optim.SGD", states=0),
    "adamax": OptimizerKind("torch.optim.Adamax", states=2),
    "lion_8bit": OptimizerKind("bitsandbytes.optim.Lion8bit", states=1, bits=8),
}


def state_bytes(optimizer) -> int:
    kept = {}
    for state in optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value) and value.numel() > 1:
                kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(kept.values())


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizer_is_one_entry(small_config, monkeypatch, name):
    with pytest.raises(ConfigError, match="must be one of adamw, adamw_8bit, paged_adamw_8bit"):
        small_config(f"training.optimizer={name}")
    monkeypatch.setitem(OPTIMIZERS, name, OTHERS[name])
    config = small_config(f"training.optimizer={name}")
    run = start(config, SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=CPU))
    assert type(run.optimizer).__name__ == OTHERS[name].path.rpartition(".")[2]
    before = [parameter.detach().clone() for parameter in run.parameters]
    for _ in range(2):  # in the first one the rate may still be that of the warm-up's start
        update(run, run.task.train["forward"][: run.batch])
    assert any(not torch.equal(old, new) for old, new in zip(before, run.parameters, strict=True))
    counted = optimizer_bytes([parameter.numel() for parameter in run.parameters], name)
    assert counted == pytest.approx(state_bytes(run.optimizer), rel=0.01)
    sizes = {component.name: component.size for component in estimate(config).components}
    assert sizes.get("optimizer states", 0) == counted


def test_an_optimizer_that_the_estimate_does_not_know_is_refused(small_config):
    config = small_config()
    config.training.optimizer = "adagrad"
    with pytest.raises(ConfigError, match="'adagrad': the estimate knows adamw, adamw_8bit"):
        estimate(config)


def test_paged_states_are_not_on_the_card_and_are_saved_all_the_same():
    tensors = [99_999, 100_000, 4_000]
    assert optimizer_bytes(tensors, "paged_adamw_8bit") == optimizer_bytes([99_999, 4_000], "adamw_8bit")
    assert optimizer_bytes(tensors, "paged_adamw_8bit", paged_too=True) == optimizer_bytes(tensors, "adamw_8bit")


def test_on_a_cpu_paged_means_adamw_8bit_and_adamw_is_fused(small_config, capsys):
    parameters = [torch.nn.Parameter(torch.zeros(8))]
    made = make_optimizer(small_config("training.optimizer=paged_adamw_8bit"), parameters, CPU)
    assert (
        type(made).__name__ == "AdamW8bit"
        and capsys.readouterr().out == "paged_adamw_8bit: on CPU this is adamw_8bit\n"
    )
    assert make_optimizer(small_config(), parameters, CPU).defaults["fused"] and not capsys.readouterr().out
