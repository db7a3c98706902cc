"""What a run saves: states that are refused when they are not its own, and disks that get full at any write."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmrev_kit.config.project import run_dir
from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.files import DiskFull
from mmrev_kit.model.features import bytes_to_write
from mmrev_kit.model.processor import make_encoder
from mmrev_kit.notebook.launch import launch
from mmrev_kit.training import preflight
from mmrev_kit.training import run as run_module
from mmrev_kit.training.checkpoints import load_last, save_adapter, save_last, write_manifest
from mmrev_kit.training.history import read_history
from mmrev_kit.training.preflight import bytes_to_save, disk_problems
from mmrev_kit.training.run import start
from mmrev_kit.training.update import TrainingError, update

CPU = torch.device("cpu")
STATE = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=CPU)


def step(run, number: int) -> None:
    """One update as the loop makes it; number counts from 0."""
    rows = run.task.train["forward"][8 * number : 8 * number + 8]
    run.history.data["steps"].append(update(run, rows))
    run.progress["step_in_epoch"] += 1


def save_all(run) -> None:
    save_adapter(run, run.folder / "best", {"forward": 1.0})
    save_last(run)


@pytest.fixture(scope="module")
def run(small_data, tmp_path_factory):
    """A run after two updates. A test gives it a folder of its own."""
    words = f"data.dir={small_data} retention.retention_ratio=0 training.batch_size=8 quantization.bits=16"
    sizes = "experiment.name=small data.num_main=4 data.num_control=4 data.image_size=32"
    words += " lora.r=8 lora.alpha=16 lora.target_modules=[q_proj,k_proj,v_proj,o_proj]"
    folder = tmp_path_factory.mktemp("run")
    run = start(load_config("configs/tiny_cpu.yaml", f"{sizes} {words} launch.output_dir={folder}"), STATE)
    step(run, 0)
    step(run, 1)
    return run


@contextmanager
def placed(run, folder: Path):
    """The run with its folder below `folder`, and everything saved once."""
    before = run.config.launch.output_dir, run.history.path
    run.config.launch.output_dir = str(folder)
    run.history.path = run.folder / "training_history.json"
    write_manifest(run)
    save_all(run)
    try:
        yield run.folder
    finally:
        run.config.launch.output_dir, run.history.path = before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# A state that is not ours


def write(name: str, content: bytes):
    return lambda folder: (folder / "last" / name).write_bytes(content)


def cut(name: str):
    return lambda folder: os.truncate(folder / "last" / name, (folder / "last" / name).stat().st_size // 2)


def edit(path: str, change):
    def apply(folder: Path) -> None:
        record = json.loads((folder / path).read_text())
        change(record)
        (folder / path).write_text(json.dumps(record))

    return apply


def other_tensors(name: str, change):
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "last" / name)
        change(tensors)
        save_file(tensors, folder / "last" / name)

    return apply


FAULTS = {
    "no state.json": (lambda folder: (folder / "last/state.json").unlink(), "FileNotFoundError"),
    "empty": (write("state.json", b""), "JSONDecodeError"),
    "half of it": (cut("state.json"), "JSONDecodeError"),
    "no text": (write("state.json", b"\xff\xfe\x00"), "UnicodeDecodeError"),
    "a list": (write("state.json", b"[]"), "TypeError"),
    "another format": (edit("last/state.json", lambda record: record.update(format=99)), "format 99"),
    "no progress": (edit("last/state.json", lambda record: record.pop("progress")), "KeyError: 'progress'"),
    "no step": (edit("last/state.json", lambda record: record["progress"].pop("global_step")), "'global_step'"),
    "no groups": (edit("last/state.json", lambda record: record.update(param_groups=[])), "parameter group"),
    "a pickle": (write("adapter.safetensors", b"\x80\x04K\x01." * 9), "SafetensorError"),
    "half an adapter": (cut("adapter.safetensors"), "SafetensorError"),
    "half an optimizer": (cut("optimizer.safetensors"), "SafetensorError"),
    "no optimizer": (lambda folder: (folder / "last/optimizer.safetensors").unlink(), "FileNotFoundError"),
    "another rank": (
        other_tensors("adapter.safetensors", lambda t: t.update({name: v[:1].clone() for name, v in t.items()})),
        "the adapter has other tensors",
    ),
    "fewer moments": (
        other_tensors("optimizer.safetensors", lambda t: [t.pop(name) for name in list(t) if name.startswith("3/")]),
        "the optimizer has other tensors",
    ),
    "a shorter history": (
        edit("training_history.json", lambda record: record["steps"].pop()),
        "training_history.json ends before step 2",
    ),
    "no history": (lambda folder: (folder / "training_history.json").unlink(), "FileNotFoundError"),
    "other data": (
        edit("manifest.json", lambda record: record["data"].update({next(iter(record["data"])): "0"})),
        "it did not begin with the same data",
    ),
    "other people": (
        edit("manifest.json", lambda record: record.update(people="0")),
        "it did not begin with the same people",
    ),
    "another base": (
        edit("manifest.json", lambda record: record["base"].update(fingerprint="0")),
        "it did not begin with the same base",
    ),
}


def test_a_state_of_this_run_is_taken(run, tmp_path):
    with placed(run, tmp_path):
        saved = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
        progress, moments = dict(run.progress), run.optimizer.state_dict()["state"][0]["exp_avg"].clone()
        step(run, 2)
        assert run.progress["global_step"] == 3 and len(run.history.data["steps"]) == 3
        assert load_last(run)
        assert run.progress == progress and progress["global_step"] == 2 == len(run.history.data["steps"])
        assert all(torch.equal(p, saved[name]) for name, p in run.model.named_parameters() if p.requires_grad)
        assert torch.equal(run.optimizer.state_dict()["state"][0]["exp_avg"], moments)


@pytest.mark.parametrize("name", FAULTS)
def test_a_state_that_is_not_of_this_run_is_refused(run, tmp_path, name):
    spoil, reason = FAULTS[name]
    with placed(run, tmp_path) as folder:
        spoil(folder)
        with pytest.raises(ConfigError) as refused:
            load_last(run)
    told = str(refused.value)
    assert told.startswith(f"{folder}/last: not a state of this run (") and reason in told
    assert told.endswith("Set launch.overwrite=true to start anew.") and len(told.splitlines()) <= 3


def test_a_run_does_not_go_on_with_another_picture_in_its_pool(small_data, small_config, tmp_path):
    shutil.copytree(small_data / "pool", tmp_path / "pool")
    config = small_config(f"retention.face_pool={tmp_path}/pool quantization.bits=16")
    run = start(config, STATE)
    step(run, 0)
    write_manifest(run)
    save_all(run)
    assert start(config, STATE).progress["step_in_epoch"] == 1
    picture = run.task.data.pools["face_cw"][0].image
    kept = picture.read_bytes()
    with Image.open(picture) as image:
        image.convert("RGB").save(picture, compress_level=1)
    assert picture.read_bytes() != kept and start(config, STATE).progress["step_in_epoch"] == 1  # the same to look at
    Image.new("RGB", (32, 32), "teal").save(picture)
    with pytest.raises(ConfigError, match=r"it did not begin with the same pictures, see manifest\.json"):
        start(config, STATE)
    picture.write_bytes(kept)
    assert start(config, STATE).progress["step_in_epoch"] == 1


# A full disk


def check_whole(folder: Path, before: dict[str, bytes]) -> None:
    """Everything that was saved is there as it was, loads, and nothing lies beside it; the history may be newer."""
    after = contents(folder)
    history = "training_history.json"
    assert {n: c for n, c in after.items() if n != history} == {n: c for n, c in before.items() if n != history}
    assert len(read_history(folder / history)["steps"]) >= 2
    assert set(load_file(folder / "last" / "adapter.safetensors")) and json.loads(after["last/state.json"])
    assert not list(folder.glob(".*"))


SAVES = {
    "best": lambda run: save_adapter(run, run.folder / "best", {"forward": 0.5}),
    "final": lambda run: save_adapter(run, run.folder / "final", {"forward": 0.5}),
    "last": save_last,
    "training_history.json": lambda run: run.history.write(),
}
WRITING = {"open", "os.mkdir", "os.rename", "os.chmod"}
failing = {"after": None, "folder": ""}  # an audit hook cannot be taken off again: this switches it


def fail_at_write(event: str, arguments: tuple) -> None:
    """Raises what a full disk does at the call after so many that write below a folder."""
    if failing["after"] is None or event not in WRITING:
        return
    path = next((str(a) for a in arguments if isinstance(a, str | Path)), "")
    reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if reads or not path.startswith(failing["folder"]) or (event == "os.mkdir" and os.path.isdir(path)):
        return
    failing["after"] -= 1
    if failing["after"] < 0:
        failing["after"] = None
        raise OSError(errno.ENOSPC, "No space left on device", path)


@pytest.fixture(scope="module", autouse=True)
def hook():
    sys.addaudithook(fail_at_write)


@pytest.fixture
def failing_library(monkeypatch):
    """fsync and safetensors, which no audit event tells of, take part in the count."""

    def wrap(owner, name, error):
        real = getattr(owner, name)

        def call(*arguments, **named):
            if failing["after"] is not None:
                failing["after"] -= 1
                if failing["after"] < 0:
                    failing["after"] = None
                    raise error
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    wrap(os, "fsync", OSError(errno.EDQUOT, "Disk quota exceeded"))
    text = "Error while serializing: I/O error: No space left on device (os error 28)"  # as a full tmpfs gives it
    wrap(safetensors.torch, "serialize_file", SafetensorError(text))


@pytest.mark.parametrize("name", SAVES)
def test_a_disk_that_is_full_at_any_write_leaves_what_was_saved_and_is_named(run, tmp_path, failing_library, name):
    with placed(run, tmp_path) as folder:
        before, failing["folder"], writes = contents(folder), str(folder), 0
        while True:
            failing["after"] = writes
            try:
                SAVES[name](run)
                break
            except DiskFull as error:
                told = str(error)
            finally:
                failing["after"] = None
            check_whole(folder, before)
            owner = "training_history.json" if "training_history" in told else name  # it is written before last/
            assert told.startswith(f"No space left for {folder / owner}: it needs more than ") and "quota" in told
            writes += 1
    assert writes >= {"training_history.json": 4, "last": 14}.get(name, 10)


@contextmanager
def mounted(disk: Path, size: str):
    """A real file system of this size."""
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mounting a tmpfs needs root with CAP_SYS_ADMIN (mount: {made.stderr.strip()})")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def tiny_disk(tmp_path):
    with mounted(tmp_path / "disk", "4m") as disk:
        yield disk


def fill(disk: Path, left: int) -> None:
    """Take all but `left` bytes of a disk."""
    (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - left))


@pytest.mark.parametrize("name", SAVES)
def test_a_real_full_disk_leaves_what_was_saved_and_is_named(run, tiny_disk, name):
    """Adapter: 86,016 numbers, 344,064 bytes in fp32; last/ has three times as many and 48 steps of 4 bytes."""
    with placed(run, tiny_disk) as folder:
        before, refused = contents(folder), []
        size = {"best": 344_064, "final": 344_064, "last": 3 * 344_064 + 48 * 4}.get(name)
        for left in (0, 4096, 8192, 100_000, 200_000, 340_000, 600_000, 1_000_000, 1_200_000):
            fill(tiny_disk, left)
            try:
                SAVES[name](run)
            except DiskFull as error:
                refused.append(left)
                told = str(error)
                check_whole(folder, before)
                free = left // 4096 * 4096
                if "training_history" not in told:
                    assert told.startswith(
                        f"No space left for {folder / name}: it needs at least {size:,} bytes; {free:,} "
                    )
            (tiny_disk / "filler").unlink()
            if left not in refused:
                break
        assert len(refused) == {"training_history.json": 1, "last": 8}.get(name, 6)
        SAVES[name](run)
        assert load_last(run)


# Before launch


def test_the_bytes_to_save_are_those_of_the_files(run, tmp_path):
    with placed(run, tmp_path) as folder:
        sizes = {name: sum(p.stat().st_size for p in (folder / name).iterdir()) for name in ("best", "last")}
        texts = 2**20 + 2048 * 48
        most = 2 * sizes["best"] + 2 * sizes["last"]  # best/, final/, last/ and its next version
        assert most <= bytes_to_save(run.config) <= most + texts
        free = bytes_to_save(run.config) - sizes["best"] - sizes["last"]  # what is there will be replaced
        assert disk_problems(run.config, free) == []
        assert len(disk_problems(run.config, free - 1)) == 1


def test_the_bytes_of_the_32b():
    """19,922,944 numbers; AdamW has two fp32 moments of each: best, final 80 MB each, last/ 239 MB, twice."""
    config = load_config("configs/config_qwen3vl32_fp16.yaml", "training.optimizer=adamw")
    numbers = 19_922_944
    exact = 4 * numbers * (1 + 1 + 3 + 3)
    assert exact < bytes_to_save(config) < exact + 4 * 2**20
    eight = load_config("configs/config_qwen3vl32_fp16.yaml", "training.optimizer=paged_adamw_8bit")
    exact = 4 * numbers * 4 + 2 * 2 * numbers
    assert exact < bytes_to_save(eight) < 1.03 * exact + 4 * 2**20
    assert bytes_to_save(load_config("configs/tiny_cpu.yaml", "model.name=someone/else")) is None


def test_a_disk_that_cannot_hold_the_run_is_refused_before_launch(small_config, monkeypatch):
    config = small_config()
    needed = bytes_to_save(config)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(ConfigError, match=rf"needs {needed:,} bytes: {needed:,} for best/.* {needed - 1:,} are free"):
        launch(config)
    assert not run_dir(config).exists()


def test_the_bytes_of_the_features_are_counted_and_a_disk_without_room_for_them_is_refused(
    small_config, tmp_path, monkeypatch
):
    """Before the weights are read. What is counted is what is then written, in blocks of 4 KiB, once."""
    config, counted = small_config("training.num_epochs=1"), []
    real, saves = run_module.disk_problems, bytes_to_save(small_config())

    class Reached(Exception):
        """The weights would be read now."""

    def load(**arguments):
        raise Reached

    def count(config, free, shapes, history, features):
        counted.append((history, features))
        return real(config, free, shapes, history, features)

    def begin(free: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "disk_problems", count)
            patch.setattr(run_module, "load_base", load)
            patch.setattr(run_module, "free_bytes", lambda config: free)
            start(config, STATE)

    with pytest.raises(Reached):
        begin(10**12)
    ((history, features),) = counted
    with pytest.raises(Reached):
        begin(saves + history + features)
    with pytest.raises(ConfigError, match=rf"needs {saves + history + features:,} bytes.*{features:,} for the vision"):
        begin(saves + history + features - 1)
    start(config, STATE)
    sizes = [path.stat().st_size for path in (tmp_path / "outputs" / "features").rglob("*.safetensors")]
    assert len(sizes) > 8 and sum(sizes) <= features <= sum(sizes) + 4096 * len(sizes)
    with pytest.raises(Reached):
        begin(saves + history)  # they are there
    assert counted[-1] == (history, 0)


def test_the_preflight_warns_of_the_features_that_the_data_will_need(small_config, tmp_path, monkeypatch):
    """48 pictures of 32 x 32, scaled to 1,024 pixels: 4 visual tokens of 16 x 16, 1 + 2 outputs of 256 fp32 numbers."""
    config = small_config()
    pictures = [path for name in ("small", "pool") for path in (Path(config.data.dir) / name).rglob("*.png")]
    features = len(pictures) * 4 * 3 * 256 * 4
    needed = bytes_to_save(config) + features
    for free, warned in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(preflight, "free_bytes", lambda config, free=free: free)
        found = preflight.preflight(config)
        assert not found.problems
        assert any(f"about {features:,} bytes of vision features" in line for line in found.warnings) == warned
    config.memory.cache_features = False
    assert not any("the disk" in line for line in preflight.preflight(config).warnings)


def test_the_features_of_the_32b():
    """A 448 x 448 picture: 196 visual tokens, 1 + 3 outputs of 5,120 numbers in fp16 = 8,028,160 bytes; 400 faces and
    20 people are 3.4 GB."""
    config = load_config("configs/config_qwen3vl32_fp16.yaml", "model.name=configs/models/qwen3vl_32b.json")
    encoder = make_encoder(config)
    pictures = [Path(f"{number}.png") for number in range(3)]
    encoder.sizes.update(dict.fromkeys(pictures, (448, 448)))
    samples = [SimpleNamespace(max_pixels=200_704, row=SimpleNamespace(images=(path,))) for path in pictures]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: str(path).encode())
        found = bytes_to_write(config, encoder, [*samples, samples[0]], (4, 5120), torch.float16, CPU)
    assert 3 * 8_028_160 < found < 3 * (8_028_160 + 8192)


@pytest.mark.long
def test_a_disk_that_fills_up_under_way_is_told_by_the_worker_and_the_run_has_failed(small_config, tmp_path):
    """The disk is filled to the last byte once the run has begun: its next write fails, and the parent's own, too."""
    with mounted(tmp_path / "disk", "64m") as disk:
        config = small_config(f"launch.output_dir={disk}/outputs training.num_epochs=3 training.min_val_loss=0")
        history = run_dir(config) / "training_history.json"

        def fill_it() -> None:
            while not (history.is_file() and read_history(history)["steps"]):
                time.sleep(0.05)
            with suppress(OSError), open(disk / "filler", "wb") as file:
                while True:
                    file.write(bytes(2**16))

        filler = threading.Thread(target=fill_it, daemon=True)
        filler.start()
        with pytest.raises(TrainingError, match=rf"DiskFull: No space left for {run_dir(config)}.*start again"):
            launch(config)
        filler.join()
        assert read_history(history)["status"] == "failed"
        (disk / "filler").unlink()
        assert launch(config)["status"] == "finished"
