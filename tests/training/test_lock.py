"""One job a folder: who holds its lock, when a lock is stale, and a second notebook that attaches to a run."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mmrev_kit.config.project import run_dir
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.notebook.launch import launch
from mmrev_kit.training import lock
from mmrev_kit.training.history import read_history

ROOT = Path(__file__).parents[2]


def write_lock(folder: Path, **changes) -> Path:
    """A lock that this process holds, but for `changes`."""
    folder.mkdir(exist_ok=True)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    holder = {"host": socket.gethostname(), "boot": boot, "pid": os.getpid(), "since": "then"}
    holder |= {"started": psutil.Process().create_time()} | changes
    (folder / lock.NAME).write_text(json.dumps(holder))
    return folder / lock.NAME


def test_within_it_nobody_else_takes_the_folder_and_afterwards_nothing_is_left(tmp_path):
    folder = tmp_path / "run"
    with lock.held(folder):
        holder = lock.read_holder(folder)
        assert holder["pid"] == os.getpid() and holder["host"] == socket.gethostname()
        with pytest.raises(lock.FolderInUse, match=rf"in use by process {os.getpid()} on .*, since 2\d\d\d-"):
            lock.take(folder)
    assert list(folder.iterdir()) == [] and lock.read_holder(folder) is None


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, True),
        ({"started": 1.0}, False),  # another process has the number now
        ({"boot": "another"}, False),
        ({"pid": 2**22 + 1}, False),  # there is no such process
        ({"host": "elsewhere"}, True),  # refreshed just now
    ],
)
def test_a_lock_is_held_as_long_as_its_process_lives(tmp_path, changes, held):
    write_lock(tmp_path, **changes)
    assert (lock.read_holder(tmp_path) is not None) == held
    if not held:
        lock.take(tmp_path)
        assert lock.read_holder(tmp_path)["pid"] == os.getpid()


def test_a_dead_holder_that_nobody_has_waited_for_holds_nothing(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    write_lock(tmp_path, pid=child.pid, started=psutil.Process(child.pid).create_time())
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert lock.read_holder(tmp_path) is None
    child.wait()


@pytest.mark.parametrize(("age", "held"), [(590, True), (610, False)])
def test_another_hosts_lock_is_stale_after_ten_minutes(tmp_path, age, held):
    path = write_lock(tmp_path, host="elsewhere", pid=2**22 + 1)
    os.utime(path, (time.time() - age, time.time() - age))
    assert (lock.read_holder(tmp_path) is not None) == held
    assert [file.name for file in tmp_path.iterdir()] == [lock.NAME]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_lock_that_cannot_be_read_holds_nothing(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    assert lock.read_holder(tmp_path) is None
    lock.take(tmp_path)
    assert lock.read_holder(tmp_path)["pid"] == os.getpid()


def test_it_is_refreshed_while_the_job_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.05)
    path = write_lock(tmp_path)
    os.utime(path, (1, 1))
    lock.keep_fresh(tmp_path)
    end = time.monotonic() + 10
    while path.stat().st_mtime < 10 and time.monotonic() < end:
        time.sleep(0.01)
    assert path.stat().st_mtime > time.time() - 60
    path.unlink()


def _try_to_take(folder: Path, start, taken) -> None:
    start.wait()
    try:
        with lock.held(folder):
            taken.put(True)
            time.sleep(1)
    except lock.FolderInUse:
        taken.put(False)


def test_of_many_that_start_at_once_one_gets_it(tmp_path):
    context = multiprocessing.get_context("fork")
    start, taken = context.Event(), context.Queue()
    write_lock(tmp_path, boot="another")  # left by a machine that went down
    tries = [context.Process(target=_try_to_take, args=(tmp_path, start, taken)) for _ in range(8)]
    for one in tries:
        one.start()
    start.set()
    assert sorted(taken.get(timeout=20) for _ in tries) == [False] * 7 + [True]
    for one in tries:
        one.join()


RUN = """
import sys
from mmrev_kit import launch, load_config
history = launch(load_config("configs/tiny_cpu.yaml", sys.argv[1]))
print("ended:", history["status"], len(history["steps"]))
"""


def start_run(words: str) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


@pytest.mark.long
def test_a_second_notebook_attaches_to_a_run_and_another_configuration_is_refused(
    small_config, small_overrides, tmp_path, monkeypatch
):
    more = "training.num_epochs=2 training.batch_size=4"
    folder, words = run_dir(small_config(more)), f"{small_overrides} {more}"
    first = start_run(words)
    wait_for(lambda: (folder / "training_history.json").is_file() or first.poll() is not None)
    (job,) = psutil.Process(first.pid).children()
    assert lock.read_holder(folder)["pid"] == job.pid

    steps = len(read_history(folder / "training_history.json")["steps"])
    for refused, reason in (
        (small_config(f"{more} launch.overwrite=true"), "It is not replaced"),
        (small_config(f"{more} lora.r=2"), r"with another configuration: lora.r \(8 there, 2 now\)"),
    ):
        with pytest.raises(ConfigError, match=reason) as raised:
            launch(refused)
        holder = rf"process {job.pid} on {socket.gethostname()}, since 2"
        assert f"{folder} is under way: {holder}" in str(raised.value)

    watcher = start_run(f"{words} evaluation.batch_size=3")  # what is asked afterwards does not matter
    watched = []
    while "It is shown here" not in "".join(watched):
        watched.append(watcher.stdout.readline())
    time.sleep(2)
    watcher.send_signal(signal.SIGINT)
    assert "no longer shown; the run goes on" in watcher.communicate(timeout=20)[0] and watcher.returncode != 0
    assert first.poll() is None and job.is_running()

    third = start_run(words)
    output, shown = first.communicate(timeout=200)[0], third.communicate(timeout=200)[0]
    assert first.returncode == third.returncode == 0, output + shown
    history = read_history(folder / "training_history.json")
    assert [step["global_step"] for step in history["steps"]] == list(range(1, history["total_steps"] + 1))
    assert history["total_steps"] > steps
    assert (
        f"ended: finished {history['total_steps']}" in output and f"ended: finished {history['total_steps']}" in shown
    )
    assert shown.count("epoch 1/2: train") == shown.count("epoch 2/2: train") == 1
    assert not (folder / lock.NAME).exists()


def test_what_does_not_change_the_training_does_not_make_another_run(small_config, tmp_path, monkeypatch):
    from mmrev_kit.training.history import begin_run, prepare_folder

    begin_run(small_config())
    data = small_config().data.dir
    for same in (
        "evaluation.batch_size=3", "memory.micro_tokens=99", "training.save_steps=3", "launch.overwrite=false",
        f"data.folder={data}/small", f"data.folder={data}/small data.dir=elsewhere",
    ):  # fmt: skip
        prepare_folder(small_config(same))
    for other in (
        "training.weight_decay=0.5",
        "quantization.bits=16",
        "data.folder=elsewhere",
        "lora.r=2",
    ):
        with pytest.raises(ConfigError, match=rf"another configuration: .*{other.split('=')[0]} "):
            prepare_folder(small_config(other))
