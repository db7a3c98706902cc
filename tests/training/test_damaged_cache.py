"""A worker that a signal kills before its first update, as damaged kernels of a compiler do, is started once more."""

import os
import sys
from pathlib import Path

import pytest
import torch

from mmrev_kit.config.project import run_dir
from mmrev_kit.notebook import sweep_runs
from mmrev_kit.notebook.runs import LOG
from mmrev_kit.training import jobs as training_jobs
from mmrev_kit.training import rehearse
from mmrev_kit.training.history import read_history
from mmrev_kit.training.jobs import CACHES, run_job
from mmrev_kit.training.lock import held, read_holder
from mmrev_kit.training.processes import UNTRIED
from mmrev_kit.training.update import TrainingError

# Jobs that end by a signal right before an update, or that use a kernel which torch makes and keeps for a CPU.
JOBS = """
import multiprocessing, os, signal
from pathlib import Path
from mmrev_kit.training import loop

def dies(config, update, rank, sign):
    real, left = loop.update, [update]

    def killed(run, samples):
        left[0] -= 1
        if left[0] == 0 and run.state.process_index == rank and os.environ["TRITON_CACHE_DIR"] == "/damaged":
            os.kill(os.getpid(), getattr(signal, sign))
        return real(run, samples)

    loop.update = killed
    loop.worker(config)

def dies_at_once(config, rank, sign):
    if int(os.environ["RANK"]) == rank and os.environ["TRITON_CACHE_DIR"] == "/damaged":
        os.kill(os.getpid(), getattr(signal, sign))

if "UNSEEN" in os.environ:  # every worker ends before the process that forked it looks for its children
    multiprocessing.active_children = list

def rehearsal_dies(config, updates, folder):
    from mmrev_kit.training import rehearse

    real, left = rehearse.update, [2]

    def killed(run, samples):
        left[0] -= 1
        if left[0] == 0 and os.environ["TRITON_CACHE_DIR"] == "/damaged":
            os.kill(os.getpid(), signal.SIGSEGV)
        return real(run, samples)

    rehearse.update = killed
    rehearse.rehearse_worker(config, updates, folder)

def compiles(config, path):
    import torch

    def curve(x):
        return (x.sin() * 3 + x.exp()).sum(-1)

    torch.manual_seed(0)
    torch.save(torch.compile(curve)(torch.randn(256, 64)), path)
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """The module of the jobs, importable here and in a job."""
    (tmp_path / "killing_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.getenv("PYTHONPATH", "")]))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/damaged")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch sets it in a process that has asked where
    import killing_jobs

    yield killing_jobs
    del sys.modules["killing_jobs"]


def run(function, config, *arguments) -> tuple[Path, str]:
    folder = run_dir(config)
    try:
        with held(folder):
            run_job(function, config, folder, LOG, *arguments)
    finally:
        log = (folder / LOG).read_text()
    assert not list(folder.glob(".untried"))
    return folder, log


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.long)])
def test_killed_before_the_first_update_it_starts_once_more_with_an_empty_cache(jobs, small_config, number):
    config = small_config(f"training.num_epochs=1 training.batch_size=64 launch.num_processes={number}")
    folder, log = run(jobs.dies, config, 1, number - 1, "SIGBUS")
    [note] = [line for line in log.splitlines() if "NOTE: a process was killed by SIGBUS" in line]
    assert "delete /damaged and torchinductor_* in the temporary folder" in note
    history = read_history(folder / "training_history.json")
    assert history["status"] == "finished"
    assert [step["global_step"] for step in history["steps"]] == list(range(1, history["total_steps"] + 1))
    assert not list(folder.glob("error_rank*"))


@pytest.mark.parametrize("unseen", [False, True])
def test_a_worker_that_is_killed_as_soon_as_it_is_forked_is_told_from_the_others(
    jobs, small_config, monkeypatch, unseen
):
    if unseen:
        monkeypatch.setenv("UNSEEN", "1")
    _, log = run(jobs.dies_at_once, small_config("launch.num_processes=2"), 1, "SIGBUS")
    assert log.count("NOTE: a process was killed by SIGBUS") == 1


def test_one_worker_that_is_ended_from_outside_is_told_by_its_rank(jobs, small_config):
    with pytest.raises(TrainingError, match=r"^process 1: .*: the process was killed by SIGTERM\.$"):
        run(jobs.dies_at_once, small_config("launch.num_processes=2"), 1, "SIGTERM")


def test_between_its_two_starts_the_folder_is_held(jobs, small_config, monkeypatch):
    holders, start = [], training_jobs._run
    monkeypatch.setattr(
        training_jobs,
        "_run",
        lambda words, folder, *more: holders.append(read_holder(folder)) or start(words, folder, *more),
    )
    config = small_config("training.num_epochs=1 training.batch_size=64 launch.num_processes=1")
    run(jobs.dies, config, 1, 0, "SIGBUS")
    assert [holder and holder["pid"] for holder in holders] == [os.getpid()] * 2


def test_a_run_of_a_sweep_is_not_started_once_more_for_its_parts_are(jobs, small_config, tmp_path, monkeypatch):
    untried = tmp_path / UNTRIED
    untried.touch()
    monkeypatch.setattr(sweep_runs, "ensure_data", lambda config: [str(untried.exists())])
    monkeypatch.setattr(sweep_runs, "launch", lambda config: None)
    monkeypatch.setattr(sweep_runs, "evaluate", lambda config: None)
    sweep_runs.run_worker(small_config(), None, sorted(os.sched_getaffinity(0)), [], str(tmp_path))
    assert not untried.exists()


def test_a_rehearsal_that_is_killed_in_its_second_update_fails(jobs, small_config, monkeypatch):
    monkeypatch.setattr(rehearse, "rehearse_worker", jobs.rehearsal_dies)
    with pytest.raises(TrainingError, match=r"The rehearsal ended with an error: .*killed by SIGSEGV"):
        rehearse.rehearse(small_config("training.batch_size=4"), updates=2)


@pytest.mark.parametrize(("update", "sign"), [(2, "SIGBUS"), (1, "SIGKILL")])
def test_killed_later_or_from_outside_it_is_not(jobs, small_config, update, sign):
    config = small_config("training.num_epochs=1 training.batch_size=64 launch.num_processes=1")
    with pytest.raises(TrainingError, match=f"killed by {sign}"):
        run(jobs.dies, config, update, 0, sign)
    assert "NOTE: a process was killed" not in (run_dir(config) / LOG).read_text()


@pytest.mark.long
def test_kernels_that_are_cut_off(jobs, small_config, tmp_path, monkeypatch):
    """Where the second start met the same kernels, it would die as the first did."""
    cache, config = tmp_path / "kernels", small_config("launch.num_processes=1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    _, log = run(jobs.compiles, config, str(tmp_path / "first.pt"))
    assert "NOTE" not in log
    libraries = list(cache.rglob("*.so"))
    for library in libraries:
        os.truncate(library, library.stat().st_size // 4)
    _, log = run(jobs.compiles, config, str(tmp_path / "second.pt"))
    assert libraries and "killed by SIGBUS before it had computed anything" in log and str(cache) in log
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    for name in ("first.pt", "second.pt"):
        torch.testing.assert_close(torch.load(tmp_path / name), (x.sin() * 3 + x.exp()).sum(-1))


def test_the_variables_are_those_that_torch_heeds(monkeypatch):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert cache_dir() == "/elsewhere" and list(CACHES) == ["TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"]
