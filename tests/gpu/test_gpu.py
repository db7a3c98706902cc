"""The same code on a GPU: `pytest tests/gpu` on a machine with one."""

import json
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmrev_kit.config.project import run_dir
from mmrev_kit.config.reading import load_config
from mmrev_kit.config.seeds import seed_for
from mmrev_kit.data.make import ensure_data
from mmrev_kit.evaluation.results import read_records
from mmrev_kit.model import fused, kernels
from mmrev_kit.model.kernels import FusedHead
from mmrev_kit.model.loading import adapter_arguments, add_adapter, base_arguments, load_base, torch_dtype, trainable
from mmrev_kit.notebook.launch import evaluate, launch
from mmrev_kit.training.history import read_history
from mmrev_kit.training.preflight import preflight
from mmrev_kit.training.run import prepare, start
from mmrev_kit.training.update import accumulate, sample_losses, validate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: run it on a machine with one"),
]
ROOT = Path(__file__).parent.parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


SCALE = 1024.0  # of the losses, as a gradient scaler's: small gradients would be lost in fp16
DRAWS = 24  # of rows and of an adapter: the rounding of one alone is half a time larger or smaller by chance


def losses_and_gradients(config, device, change=fused.fuse):
    """Of eight rows and an adapter, `DRAWS` times.

    The base is quantized on the CPU in either case: a GPU rounds some of NF4's constants otherwise, which makes other
    weights.
    """
    torch.manual_seed(seed_for(0, "adapter"))
    model = add_adapter(load_base(**base_arguments(config, CPU)).to(device), **adapter_arguments(config)).train()
    change(model.get_base_model())
    task = prepare(config)
    every, losses, gradients = [sample for rows in task.train.values() for sample in rows], [], []
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        for parameter in trainable(model):
            parameter.data = (0.05 * torch.randn(parameter.shape, generator=generator)).to(device)
            parameter.grad = None
        batch = task.encoder.collate(random.Random(seed).sample(every, 8))
        losses.append(sample_losses(model, batch, device, torch_dtype(config.quantization.compute_dtype, device)))
        (SCALE * losses[-1].sum()).backward()
        gradients += [parameter.grad.flatten().cpu() / SCALE for parameter in trainable(model)]
    return torch.cat(losses).detach().cpu(), torch.cat(gradients)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 0.01), ("bf16", 0.05)])
def test_losses_and_gradients_equal_those_of_the_cpu(small_config, bits, dtype, tolerance):
    """The gradient in 16 bit is as far from fp32 as the libraries' own modules bring it, and no further."""
    config = small_config(f"lora.dropout=0 quantization.bits={bits}")
    expected = losses_and_gradients(config, CPU)
    config.quantization.compute_dtype = dtype
    found, stock = (losses_and_gradients(config, GPU, change) for change in (fused.fuse, fused.unfuse))
    assert (found[0] - expected[0]).abs().max() < tolerance * expected[0].abs().max()
    error, own = ((gradient - expected[1]).norm() / expected[1].norm() for _, gradient in (found, stock))
    assert error < 4 * tolerance
    assert error < max(1.25 * own, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_compute_what_the_lines_say(dtype):
    """Enough rows that kernels are made, and other numbers of rows afterwards."""
    for count in (300, 1000, 4097):
        queries, keys = (torch.randn(count, heads, 128, device=GPU, dtype=dtype) for heads in (8, 2))
        weights = [1 + 0.2 * torch.randn(128, device=GPU, dtype=dtype) for _ in range(2)]
        angles = 6 * torch.rand(count, 64, device=GPU).repeat(1, 2)
        forward = queries, keys, *weights, 1e-6, angles.cos(), angles.sin()
        *_, query_scale, key_scale = kernels.rotated_forward(*forward)
        backward = (torch.randn_like(queries), torch.randn_like(keys), queries, keys, query_scale, key_scale, *weights)
        wide = [torch.randn(count, 960, device=GPU, dtype=dtype) for _ in range(3)]
        rows = torch.randn(count, 640, device=GPU)
        weight = torch.ones(640, device=GPU, dtype=dtype)
        scale = kernels.norm_forward(rows, weight, 1e-6, dtype)[1]
        for function, arguments in (
            (kernels.rotated_forward, forward),
            (kernels.rotated_backward, (*backward, *forward[-2:])),
            (kernels.norm_forward, (rows, weight, 1e-6, dtype)),
            (kernels.norm_backward, (torch.randn_like(rows).to(dtype), rows, scale, weight)),
            (kernels.gated_forward, wide[:2]),
            (kernels.gated_backward, wide),
        ):
            expected, found = (as_list(call(*arguments)) for call in (function, partial(kernels.run, function)))
            for left, right in zip(expected, found, strict=True):
                assert left.dtype == right.dtype
                close = 1e-5 if left.dtype == torch.float32 else 0.01 if dtype == torch.float16 else 0.04
                assert (right.float() - left.float()).abs().max() <= close * left.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_are_summed_and_kept_in_fp32(dtype):
    head = FusedHead(640, 4000, bias=False).requires_grad_(False).to(GPU, dtype)
    rows = torch.randn(300, 640, device=GPU, dtype=dtype, requires_grad=True)
    with torch.autocast("cuda", dtype):
        logits = head(rows)
    exact = rows.detach().double() @ head.weight.double().t()
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-5 * exact.abs().max()
    gradient = torch.randn_like(logits)
    logits.backward(gradient)
    expected = gradient.to(dtype).double() @ head.weight.double()
    assert (rows.grad - expected).abs().max() < 0.01 * expected.abs().max()


def as_list(found) -> list:
    return [found] if isinstance(found, torch.Tensor) else list(found)


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
    assert 0 < history["steps"][-1]["mfu"] < 1 and history["steps"][-1]["tokens_per_second"] > 0
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
from mmrev_kit.config.reading import load_config
from mmrev_kit.training.jobs import count_processes
from mmrev_kit.training.preflight import preflight

config = load_config("configs/tiny_cpu.yaml", "launch.num_processes=null")
preflight(config)
assert count_processes(config) >= 1
assert not torch.cuda.is_initialized()
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
    places = {str(place) for place in load_base(**base_arguments(spread, GPU)).hf_device_map.values()}
    assert places == {"0", "1"}
    whole = small_config(f"{common} launch.num_processes=1 launch.output_dir={tmp_path}/whole")
    found, expected = (read_records(evaluate(config, None) / "predictions.jsonl") for config in (spread, whole))
    assert len(found) == len(expected) == 120
    pairs = list(zip(found, expected, strict=True))
    assert all(left["id"] == right["id"] for left, right in pairs)
    assert all(left["options"] == pytest.approx(right["options"], rel=0.02, abs=0.05) for left, right in pairs)
    assert sum(left["read_as"] == right["read_as"] for left, right in pairs) >= 0.95 * len(pairs)


@TWO
@pytest.mark.parametrize(("dtype", "close"), [("fp32", 1e-5), ("fp16", 1e-3), ("bf16", 1e-3)])
def test_two_gpus_train_as_one_does_at_the_same_effective_batch(tmp_path, dtype, close):
    """Two processes through NCCL against one: the embedded model's default experiment, with the effective batch and
    the rates of the published recipe.

    16-bit rounding differs with what a pass holds, and grows with every step of Adam. Known to fall short: retention
    in bf16, whose losses of 1e-5 nats differed by 4e-3 of their size (8e-8 nats).
    """
    common = f"quantization.compute_dtype={dtype} lora.dropout=0 training.batch_size=1 training.num_epochs=2 "
    common += f"training.learning_rate=1e-4 training.min_lr=6e-5 data.dir={tmp_path}/data "
    common += f"retention.face_pool={tmp_path}/faces retention.object_pool={tmp_path}/objects "
    one = f"launch.num_processes=1 training.gradient_accumulation_steps=64 launch.output_dir={tmp_path}/one"
    two = f"launch.num_processes=2 training.gradient_accumulation_steps=32 launch.output_dir={tmp_path}/two"
    ensure_data(load_config("configs/tiny_cpu.yaml", common))
    one, two = (launch(load_config("configs/tiny_cpu.yaml", common + own)) for own in (one, two))
    assert one["steps_per_epoch"] == two["steps_per_epoch"]
    skipped = [[step["global_step"] for step in run["steps"] if step.get("skipped")] for run in (one, two)]
    assert skipped[0] == skipped[1]
    taught, missed = ("forward", "reverse"), []
    for left, right in zip(one["epochs"], two["epochs"], strict=True):
        print([f"{name} {loss - right['val_loss'][name]:.1e} of {loss:.1e}" for name, loss in left["val_loss"].items()])
        assert right["train_loss"] == pytest.approx(left["train_loss"], rel=close)
        equal = {
            name: right["val_loss"][name] == pytest.approx(loss, rel=close) for name, loss in left["val_loss"].items()
        }
        assert all(equal[name] for name in taught)
        missed += [name for name, same in equal.items() if not same]
    if missed and dtype == "bf16":
        pytest.xfail(f"bf16: {', '.join(missed)} of retention")
    assert not missed
