"""The same code on a GPU: `pytest tests/gpu` on a machine with one."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmrev_kit.config import run_dir
from mmrev_kit.launch import evaluate, launch
from mmrev_kit.loading import add_adapter, compute_dtype, load_base, trainable
from mmrev_kit.preflight import preflight
from mmrev_kit.results import read_records
from mmrev_kit.runs import read_history
from mmrev_kit.steps import accumulate, sample_losses, validate
from mmrev_kit.train import prepare, seed_for, start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: run it on a machine with one"),
]
ROOT = Path(__file__).parent.parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def losses_and_gradient(config, device):
    torch.manual_seed(seed_for(0, "adapter"))
    model = add_adapter(load_base(config, CPU if device == CPU else GPU), config).train()
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model):
        parameter.data = (0.05 * torch.randn(parameter.shape, generator=generator)).to(device)
    task = prepare(config)
    samples = [sample for rows in task.train.values() for sample in rows[:4]]
    losses = sample_losses(model, task.encoder.collate(samples), device, compute_dtype(config, device))
    losses.sum().backward()
    return losses.detach().cpu(), torch.cat([parameter.grad.flatten().cpu() for parameter in trainable(model)])


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 0.01), ("bf16", 0.05)])
def test_losses_and_gradients_equal_those_of_the_cpu(small_config, bits, dtype, tolerance):
    config = small_config(f"lora.dropout=0 quantization.bits={bits}")
    expected = losses_and_gradient(config, CPU)
    config.quantization.compute_dtype = dtype
    found = losses_and_gradient(config, GPU)
    assert (found[0] - expected[0]).abs().max() < tolerance * expected[0].abs().max()
    assert (found[1] - expected[1]).norm() < 4 * tolerance * expected[1].norm()


RUNS = (
    "quantization.compute_dtype=fp16",
    "quantization.compute_dtype=bf16 quantization.bits=16",
    "quantization.compute_dtype=fp16 memory.gradient_checkpointing=true training.optimizer=paged_adamw_8bit",
)


@pytest.mark.parametrize("more", RUNS)
def test_a_run_trains_on_the_gpu_and_the_kernel_stays_clean(small_config, more):
    config = small_config(more)
    before = torch.cuda.memory_allocated()
    history = launch(config)
    assert history["status"] == "finished"
    assert history["epochs"][-1]["val_loss"]["forward"] < 0.8 * history["steps"][0]["loss"]
    assert history["steps"][-1]["peak_memory_gib"] > 0.01
    assert 0 < history["steps"][-1]["matrix_share"] < 1 and history["steps"][-1]["tokens_per_second"] > 0
    assert torch.cuda.memory_allocated() == before
    assert "GPU 0: NVIDIA" in str(preflight(config)) and not preflight(config).problems
    assert read_history(run_dir(config) / "training_history.json") == history


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_packed_rows_have_the_losses_of_padded_ones_and_the_tower_leaves_the_card(small_config, dtype):
    more = f"lora.dropout=0 quantization.compute_dtype={dtype} memory.micro_tokens=700"
    config = small_config(more)
    state = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=GPU)
    found = {}
    for packing in ("none", "block", "shared_prefix"):
        config.training.packing = packing
        run = start(config, state)
        assert run.batcher.features is not None and run.model.get_base_model().model.visual is None
        generator = torch.Generator().manual_seed(1)
        for parameter in trainable(run.model):
            parameter.data = (0.05 * torch.randn(parameter.shape, generator=generator)).to(GPU)
        samples = [run.task.train[source][index] for source, index in run.task.plan.epoch_rows(0)[:30]]
        loss = accumulate(run, samples)
        gradient = torch.cat([parameter.grad.flatten() for parameter in trainable(run.model)])
        found[packing] = loss, gradient / run.scaler.get_scale() if run.scaler.is_enabled() else gradient
        assert validate(run)["forward"] > 0
    tolerance = {"fp16": 0.005, "bf16": 0.04}[dtype]
    for packing in ("block", "shared_prefix"):
        assert found[packing][0] == pytest.approx(found["none"][0], rel=tolerance)
        assert (found[packing][1] - found["none"][1]).norm() < 4 * tolerance * found["none"][1].norm()


def test_a_run_takes_no_more_than_it_is_told(small_config):
    config = small_config("quantization.compute_dtype=fp16 memory.gpu_gib=2 training.num_epochs=1")
    assert launch(config)["status"] == "finished"
    manifest = json.loads((run_dir(config) / "manifest.json").read_text())
    assert manifest["memory"]["card_gib"] == pytest.approx(2)


def test_looking_at_the_machine_does_not_touch_cuda():
    code = """
import torch
from mmrev_kit.config import load_config
from mmrev_kit.launch import count_processes, why_not_here
from mmrev_kit.preflight import preflight

config = load_config("configs/tiny_cpu.yaml", "launch.num_processes=null")
preflight(config)
assert count_processes(config) >= 1
assert why_not_here() is None, why_not_here()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs: run it on a machine with two")


@TWO
def test_mode_auto_spreads_a_model_over_two_gpus_and_answers_the_same(small_config, tmp_path):
    """Near ties may fall otherwise: a model with accelerate's hooks keeps the library's vision tower, whose 16-bit
    products are rounded otherwise than those of `vision`."""
    common = "quantization.bits=16 quantization.compute_dtype=fp16"
    spread = small_config(f"{common} launch.mode=auto launch.output_dir={tmp_path}/spread")
    places = {str(place) for place in load_base(spread, GPU).hf_device_map.values()}
    assert places == {"0", "1"}
    whole = small_config(f"{common} launch.num_processes=1 launch.output_dir={tmp_path}/whole")
    found, expected = (read_records(evaluate(config, None) / "predictions.jsonl") for config in (spread, whole))
    assert len(found) == len(expected) == 120
    pairs = list(zip(found, expected, strict=True))
    assert all(left["id"] == right["id"] for left, right in pairs)
    assert all(left["options"] == pytest.approx(right["options"], rel=0.02, abs=0.05) for left, right in pairs)
    assert sum(left["read_as"] == right["read_as"] for left, right in pairs) >= 0.95 * len(pairs)


@TWO
def test_two_gpus_train_as_one_does_at_the_same_effective_batch(small_config, tmp_path):
    """Two processes through NCCL against one. A small rate: 16-bit rounding grows with every step of Adam."""
    common = "lora.dropout=0 training.batch_size=4 training.num_epochs=2 quantization.compute_dtype=fp16 "
    common += "training.learning_rate=2e-4 training.min_lr=1e-5"
    one = launch(
        small_config(
            f"{common} launch.num_processes=1 training.gradient_accumulation_steps=2 launch.output_dir={tmp_path}/one"
        )
    )
    two = launch(small_config(f"{common} launch.num_processes=2 launch.output_dir={tmp_path}/two"))
    assert one["steps_per_epoch"] == two["steps_per_epoch"]
    skipped = [[step["global_step"] for step in run["steps"] if step.get("skipped")] for run in (one, two)]
    assert skipped[0] == skipped[1]
    for left, right in zip(one["epochs"], two["epochs"], strict=True):
        assert right["train_loss"] == pytest.approx(left["train_loss"], rel=1e-3)
        assert right["val_loss"] == pytest.approx(left["val_loss"], rel=1e-3)
