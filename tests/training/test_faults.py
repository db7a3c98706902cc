"""Numbers that are not finite are found and named; a fault in one process ends all of them soon, with its reason."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmrev_kit.config.project import run_dir
from mmrev_kit.notebook.launch import launch
from mmrev_kit.training import diagnose, loop
from mmrev_kit.training.diagnose import explain, find_fault
from mmrev_kit.training.history import read_history
from mmrev_kit.training.loop import train
from mmrev_kit.training.run import prepare, start
from mmrev_kit.training.update import TrainingError, update

ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")
FP16 = "quantization.compute_dtype=fp16 quantization.bits=16 retention.retention_ratio=0 training.num_epochs=1"
UP = "model.language_model.layers.3.mlp.up_proj"


@pytest.fixture
def state():
    return SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=CPU)


def layer(run, number: int = 3):
    return run.model.get_base_model().model.language_model.layers[number]


def before_update(monkeypatch, act) -> None:
    """`act(run)` before every update of `train`."""
    real = loop.update

    def patched(run, samples):
        act(run)
        return real(run, samples)

    monkeypatch.setattr(loop, "update", patched)


@pytest.mark.long
def test_an_fp16_overflow_stops_the_run_names_its_layer_and_leaves_last_whole(small_config, state, monkeypatch):
    """From the 5th update on, what one product gives is multiplied by 60,000: all of its values above 1.1 overflow."""
    config = small_config(f"{FP16} training.save_steps=4")

    def overflow(run):
        if run.progress["global_step"] == 4:
            layer(run).mlp.up_proj.weight.mul_(60_000)

    with monkeypatch.context() as patch:
        before_update(patch, overflow)
        with pytest.raises(TrainingError) as caught:
            train(config, state)
    text = str(caught.value)
    assert text.startswith("Step 12: 8 fp16 updates in a row had no finite gradient and were skipped; loss scale 256.")
    assert f"first output that is not finite is that of {UP} (fp16 ends at 65,504)" in text
    assert re.search(r"in \S*_train\.jsonl:\d+", text)
    assert "The base model alone has it too: use quantization.compute_dtype=bf16" in text
    history = read_history(run_dir(config) / "training_history.json")
    assert history["status"] == "failed" and history["reason"] == text
    assert [step.get("skipped", False) for step in history["steps"]] == [False] * 4 + [True] * 8
    run = start(config, state)  # goes on from last/, with a sound model
    assert run.progress["global_step"] == 8 and run.progress["step_in_epoch"] == 8
    record = update(run, run.task.train["forward"][:8])
    assert "skipped" not in record and math.isfinite(record["loss"])
    assert find_fault(run, run.task.train["forward"][:8]) is None


@pytest.mark.long
def test_an_update_that_is_skipped_within_the_warm_up_does_not_raise_the_rate(small_config, state, monkeypatch):
    """Warm-up: .2 of 45 updates, 9 steps; the second update overflows, and is made up for by the third."""
    stops = [5, 11]

    def overflow(run):
        step = run.progress["global_step"]
        if step in (1, 2):
            layer(run).mlp.up_proj.weight.mul_(60_000.0 if step == 1 else 1 / 60_000.0)
        if step == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt

    config = small_config(f"{FP16} training.warmup_ratio=0.2 training.learning_rate=9e-4 training.save_steps=4")
    before_update(monkeypatch, overflow)
    with pytest.raises(KeyboardInterrupt):
        train(config, state)
    steps = read_history(run_dir(config) / "training_history.json")["steps"]
    assert [step.get("skipped", False) for step in steps] == [False, True, False, False, False]
    assert [step["lr"] for step in steps] == pytest.approx([1e-4, 2e-4, 2e-4, 3e-4, 4e-4])
    with pytest.raises(KeyboardInterrupt):
        train(config, state)  # goes on from the fourth update
    steps = read_history(run_dir(config) / "training_history.json")["steps"]
    assert [step["lr"] for step in steps[3:]] == pytest.approx([k * 1e-4 for k in (3, 4, 5, 6, 7, 8, 9, 9)])


@pytest.mark.parametrize("words", ["training.max_grad_norm=1e-30", "training.learning_rate=1e-30 training.min_lr=0"])
def test_a_run_that_would_learn_nothing_ends_at_its_first_update(small_config, state, words):
    with pytest.raises(TrainingError, match="Step 1: the first update changed no weight by more than"):
        train(small_config(f"retention.retention_ratio=0 {words}"), state)
    assert not (run_dir(small_config()) / "best").exists()


def test_an_overflow_that_only_the_adapter_has_is_told_apart(small_config, state):
    run = start(small_config(FP16), state)
    layer(run).self_attn.o_proj.lora_B.default.weight.data.fill_(1e5)
    text = explain(run, run.task.train["forward"][:4])
    assert "model.language_model.layers.3.self_attn.o_proj.lora_B.default (fp16" in text
    assert "The base model alone does not have it: lower training.learning_rate or lora.alpha" in text


def test_an_overflow_in_the_backward_pass_names_the_first_gradient_met(small_config, state):
    """A loss scale of 2^40 cannot overflow the forward pass, nor the logits' gradient, which is in fp32; the first in
    fp16 is that of what the head is given, the last norm's output."""
    run = start(small_config(FP16), state)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    samples = run.task.train["forward"][:8]
    for count in range(8):
        assert update(run, samples)["skipped"] and run.skipped == count + 1
    first = r"output of model\.language_model\.norm, in \S+"
    with pytest.raises(TrainingError, match=rf"8 fp16 updates .* loss scale 4\.29497e\+09\. .*{first}"):
        diagnose.check_finite(run, {"global_step": 8, "skipped": True, "loss": 1.0, "grad_norm": float("inf")}, samples)


@pytest.mark.long
def test_a_loss_scale_that_only_shrinks_ends_the_run_though_never_two_updates_in_a_row_are_skipped(
    small_config, state, monkeypatch
):
    """Every second update overflows: the scale goes 8, 4, 2, 1, 0.5 at the 2nd, 4th, 6th and 8th."""

    def overflow(run):
        step = run.progress["global_step"]
        if step == 0:
            run.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        else:
            layer(run).mlp.up_proj.weight.mul_(60_000.0 if step % 2 else 1 / 60_000.0)

    before_update(monkeypatch, overflow)
    with pytest.raises(TrainingError, match=rf"Step 8: 1 fp16 updates in a row .* loss scale 0\.5\. .*{re.escape(UP)}"):
        train(small_config(FP16), state)


def test_a_broken_weight_is_told_at_once_where_nothing_is_scaled(small_config, state, monkeypatch):
    def spoil(run):
        layer(run, 1).post_attention_layernorm.weight.data[5] = float("nan")

    before_update(monkeypatch, spoil)
    with pytest.raises(TrainingError) as caught:
        train(small_config("quantization.bits=16"), state)
    assert "Step 1: loss nan" in str(caught.value)
    assert "layers.1.post_attention_layernorm, whose own weights are not finite" in str(caught.value)
    assert "The base model alone has it too: look for a broken model file" in str(caught.value)


def test_a_nan_in_an_images_features_is_told_as_the_datas_with_image_row_and_file(small_config, state, monkeypatch):
    """Training and validation alike; the row that is named is looked up in the data."""
    spoiled = {}

    def spoil(run):
        sample = run.task.train["forward"][5]
        image = sample.row.images[0], sample.max_pixels
        features = run.batcher.features
        spoiled.update(path=image[0], file=features.file(features.key(image)))
        features._held[features.key(image)] = features.get(image).clone().fill_(float("nan"))

    before_update(monkeypatch, spoil)
    config = small_config()
    with pytest.raises(TrainingError, match=r"Step \d+: loss nan") as caught:
        train(config, state)
    text = str(caught.value)
    assert f"The data has a value that is not finite: image {spoiled['path']} of " in text
    assert f"vision features are in {spoiled['file']}" in text
    where = re.search(r" of (\S+:\d+)\. Its", text)[1]
    task = prepare(config)
    (row,) = [sample.row for rows in task.train.values() for sample in rows if sample.row.where == where]
    assert spoiled["path"] in row.images
    run = start(config, state)
    spoil(run)
    run.model.eval()
    assert str(spoiled["path"]) in explain(run, run.task.val["forward"])


def test_a_process_without_rows_in_its_first_fp16_update_takes_the_step_of_the_others(small_config, state, monkeypatch):
    """One row is the first process's; this one is the second. It gets gradients of 1e-3 each, at fp16's first loss
    scale, 2^16: their norm is 1e-3 x sqrt(how many are trained)."""
    run = start(small_config(FP16), state)
    run.state = SimpleNamespace(num_processes=2, process_index=1, is_main_process=False, device=CPU)

    def all_reduce(tensor):
        if tensor.dtype == torch.float32:
            assert not tensor.any()
            tensor.fill_(2**16 * 1e-3)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    record = update(run, run.task.train["forward"][:1])
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert record["grad_norm"] == pytest.approx(1e-3 * trained**0.5, rel=1e-4)
    assert run.taken == 1 and "skipped" not in record


def test_a_nan_in_the_pixels_is_told_as_the_datas(small_config, state, monkeypatch):
    run = start(small_config("memory.cache_features=false"), state)
    samples = run.task.train["forward"][:8]
    assert find_fault(run, samples) is None
    broken = samples[3].row.images[0]
    real = run.batcher.encoder.pixels

    def pixels(path, limit):
        values, grid = real(path, limit)
        return (values * float("nan") if path == broken else values), grid

    monkeypatch.setattr(run.batcher.encoder, "pixels", pixels)
    first = next(sample for sample in samples if broken in sample.row.images)
    assert f"image {broken} of " in find_fault(run, samples)
    assert f"image {broken} of {first.row.where}. Replace the image." in find_fault(run, [first])


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from forking import fork_jobs
from mmrev_kit.training import loop, run
from mmrev_kit.config.reading import load_config
from mmrev_kit.config.project import run_dir
from mmrev_kit.notebook.launch import launch
real_update, real_load = loop.update, run.load_base

def update(run, samples):
    if run.state.process_index == 1 and run.progress["global_step"] == 3 and fault != "memory":
        when.write_text(str(time.time()))
        if fault == "raise":
            raise RuntimeError("planted fault")
        if fault == "exit":
            os._exit(3)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        norm = run.model.get_base_model().model.language_model.layers[2].input_layernorm
        norm.weight.data.fill_(float("nan"))
    return real_update(run, samples)

def load_base(**arguments):
    if fault == "memory" and os.environ["RANK"] == "1":
        when.write_text(str(time.time()))
        raise MemoryError("planted fault")
    return real_load(**arguments)

loop.update, run.load_base = update, load_base
fork_jobs()
for fault in sys.argv[2:]:
    config = load_config("configs/tiny_cpu.yaml", f"{sys.argv[1]}/{fault}")
    when = Path(f"{config.launch.output_dir}.when")
    try:
        launch(config)
    except Exception as error:
        seconds = time.time() - float(when.read_text())
        print(f"<{fault}>{type(error).__name__} {seconds:.1f} {error}</{fault}>")
"""
FAULTS = ("raise", "exit", "kill", "memory", "nan")
TWO = "launch.num_processes=2 retention.retention_ratio=0 training.num_epochs=20 training.batch_size=4"


@pytest.fixture(scope="module")
def faults(small_data, tmp_path_factory):
    """What the caller saw of each fault in process 1 of 2: (seconds, message); and all
    that was printed. The rendezvous port that accelerate and torchrun take by default is in use meanwhile."""
    from conftest import SMALL

    folder = tmp_path_factory.mktemp("faults")
    words = f"{SMALL} data.dir={small_data} retention.face_pool={small_data}/pool {TWO} launch.output_dir={folder}"
    with socket.socket() as taken:
        with suppress(OSError):  # in use already: just as well
            taken.bind(("", 29500))
        taken.listen()
        environment = os.environ | {"MASTER_PORT": str(taken.getsockname()[1]), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        command = [sys.executable, "-c", SCRIPT, words, *FAULTS]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for fault, kind, seconds, text in re.findall(r"<(\w+)>(\w+) ([\d.]+) (.*?)</\1>", done.stdout, re.DOTALL):
        assert kind == "TrainingError"
        found[fault] = float(seconds), text
    assert set(found) == set(FAULTS), done.stdout + done.stderr
    return folder, found, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("raise", r"process 1: Traceback .*RuntimeError: planted fault"),
        ("exit", r"process 1: TrainingError: the process ended with exit code 3\."),
        ("kill", r"process 1: .*SIGKILL.*memory.*"),
        ("memory", r"process 1: Traceback .*MemoryError: planted fault"),
    ],
)
@pytest.mark.long
def test_a_fault_in_one_process_ends_all_within_30_s_with_its_own_reason(faults, fault, expected):
    _, found, _ = faults
    seconds, text = found[fault]
    assert seconds < 30
    assert re.fullmatch(expected, text, re.DOTALL), text


@pytest.mark.long
def test_a_workers_traceback_is_shown_once(faults):
    """Once each for the raised error and the failed allocation; no other traceback of a lost connection beside them."""
    _, _, printed = faults
    assert printed.count("RuntimeError: planted fault") == printed.count("MemoryError: planted fault") == 1
    assert printed.count("Traceback (most recent call last)") == 2


@pytest.mark.long
def test_a_nan_in_one_process_stops_all_with_one_reason_that_names_it(faults):
    folder, found, _ = faults
    seconds, text = found["nan"]
    assert seconds < 30
    reason = text.partition("TrainingError: ")[2]
    first = r"model\.language_model\.layers\.2\.input_layernorm, whose own weights are not finite"
    assert re.match(
        rf"Step 4: loss nan, gradient norm nan\. In process 1 of 0 to 1: The first output .* of {first}", reason
    )
    run = folder / "nan" / "small_forward"
    assert read_history(run / "training_history.json")["reason"] == reason
    for file in run.glob("error_rank*.txt"):  # one may have been ended before it could write its own
        assert file.read_text() == f"TrainingError: {reason}\n"


@pytest.mark.long
def test_no_process_is_left(faults):
    folder, *_ = faults
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(folder).encode() in (process / "cmdline").read_bytes():
                left.append(process.name)
    assert not left


@pytest.mark.long
def test_a_killed_worker_of_a_fresh_python_is_named(small_config):
    """As from a kernel that has imported peft: the workers are the children of another process."""
    config, killed = small_config(f"{TWO} launch.overwrite=true"), []
    history = run_dir(config) / "training_history.json"

    def children(pid: int) -> list[int]:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def kill_one() -> None:
        end = time.monotonic() + 600
        while time.monotonic() < end and not (history.is_file() and len(read_history(history)["steps"]) > 3):
            time.sleep(0.1)
        (fresh,) = [
            pid for pid in children(os.getpid()) if str(run_dir(config)) in Path(f"/proc/{pid}/cmdline").read_text()
        ]
        workers = [pid for task in Path(f"/proc/{fresh}/task").iterdir()
                   for pid in map(int, (task / "children").read_text().split())]  # fmt: skip
        killed.append((workers, time.monotonic()))
        os.kill(workers[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(TrainingError, match=r"process \d: .*SIGKILL.*memory"):
        launch(config)
    killer.join()
    workers, moment = killed[0]
    assert len(workers) == 2 and time.monotonic() - moment < 30
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
