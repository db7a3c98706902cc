"""Mode deepspeed: the runs of the plain way, with the optimizer in shares; and what the mode does not do."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sharded_runs import train_all

from mmrev_kit.config.sections import ConfigError
from mmrev_kit.notebook.launch import launch
from mmrev_kit.training import zero
from mmrev_kit.training.rehearse import rehearse

SHARED = "launch.mode=deepspeed quantization.bits=16"


def largest_difference(left: Path, right: Path) -> float:
    """Between the numbers of two files of tensors with the same names."""
    a, b = load_file(left), load_file(right)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.long
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: pip install -e '.[deepspeed]'")
def test_runs_with_shares_equal_those_without_and_go_on_after_a_cut(tmp_path):
    """Passes of 200 tokens are not as many in one process as in the other. `last/` is that of the plain way, too: a
    state does not depend on who holds it."""
    found = train_all(tmp_path, "memory.micro_tokens=200")
    folders, runs = ({name: pair[index] for name, pair in found.items()} for index in (0, 1))
    for name, other, close in (("shared", "plain", 1e-5), ("cut", "shared", 0), ("shared16", "plain16", 1e-3)):
        assert len(runs[name]["steps"]) == len(runs[other]["steps"]) == (4 if close == 1e-3 else 8)
        for key in ("loss", "lr", "grad_norm"):
            pairs = [(a[key], b[key]) for a, b in zip(runs[name]["steps"], runs[other]["steps"], strict=True)]
            assert all(a == b or a == pytest.approx(b, abs=close, rel=close) for a, b in pairs), (name, key, pairs)
        assert runs[name]["epochs"][-1]["val_loss"]["forward"] == pytest.approx(
            runs[other]["epochs"][-1]["val_loss"]["forward"], abs=close
        )
        if "16" in name:  # in fp16 Adam makes steps of gradients that are rounding
            continue
        for file in ("final/adapter_model.safetensors", "last/adapter.safetensors", "last/optimizer.safetensors"):
            assert largest_difference(folders[name] / file, folders[other] / file) <= close
    clipped = [step["grad_norm"] > 0.5 for step in runs["shared"]["steps"]]
    assert any(clipped) and runs["shared"]["epochs"][-1]["train_loss"] < runs["shared"]["steps"][0]["loss"] - 0.1
    skipped = [[step.get("skipped", False) for step in runs[name]["steps"]] for name in ("plain16", "shared16")]
    assert skipped[0] == skipped[1] and True in skipped[0] and not skipped[0][-1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("launch.mode=deepspeed", r"quantization.bits = 4: launch.mode=deepspeed trains a 16-bit base"),
        (f"{SHARED} training.optimizer=adamw_8bit", "training.optimizer = 'adamw_8bit': launch.mode=deepspeed"),
    ],
)
def test_settings_that_the_mode_does_not_have_are_refused(small_config, words, told):
    with pytest.raises(ConfigError, match=told):
        small_config(words)


def test_a_training_that_the_mode_does_not_do_is_not_started(small_config, monkeypatch):
    def refused(words: str) -> str:
        with pytest.raises(ConfigError) as found:
            launch(small_config(words))
        return str(found.value)

    auto = small_config("launch.mode=auto quantization.bits=16")
    assert "does not train. Set launch.mode=data" in refused("launch.mode=auto quantization.bits=16")
    with pytest.raises(ConfigError, match="does not train"):
        rehearse(auto)
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    assert "deepspeed is not installed. Run pip install -e '.[deepspeed]'" in refused(
        f"{SHARED} launch.num_processes=2"
    )
    monkeypatch.setattr(zero, "find_spec", lambda name: True)
    assert "this run has one. Set launch.num_processes=2" in refused(f"{SHARED} launch.num_processes=1")
