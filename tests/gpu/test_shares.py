"""Mode deepspeed on two GPUs: the 2B architecture with random 16-bit weights."""

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from sharded_runs import train_all

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(
    torch.cuda.device_count() < 2 or find_spec("deepspeed") is None,
    reason="needs two GPUs and deepspeed: pip install -e '.[deepspeed]'",
)
def test_the_2b_trains_with_shares_as_it_does_without(tmp_path):
    """bf16 and fp16; sums on a GPU come in any order, so that a run that goes on is near the whole one, not equal."""
    words = "model.name=configs/models/qwen3vl_2b.json model.min_pixels=1024 model.max_pixels=4096"
    found = train_all(tmp_path, f"{words} quantization.compute_dtype=bf16 training.learning_rate=1e-4")
    for name, other in (("shared", "plain"), ("cut", "plain"), ("shared16", "plain16")):
        steps, expected = found[name][1]["steps"], found[other][1]["steps"]
        assert len(steps) == len(expected) == (4 if name == "shared16" else 8)
        for step, one in zip(steps, expected, strict=True):
            assert step["loss"] == pytest.approx(one["loss"], rel=1e-3) and step["lr"] == one["lr"]
            assert step.get("skipped") == one.get("skipped")
            if not step.get("skipped"):
                assert step["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.02)
        a, b = (load_file(found[run][0] / "final" / "adapter_model.safetensors") for run in (name, other))
        assert a.keys() == b.keys()
        changes = [(a[key] - b[key]).norm() / b[key].norm() for key in b]
        assert sum(changes) / len(changes) < 0.05
