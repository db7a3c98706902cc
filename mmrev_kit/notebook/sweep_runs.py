"""The runs of a sweep, several at once: each is a job of its own with its share of the cores or cards.

A run that is finished and evaluated is read; one that was cut goes on; one that fails is told, and the others go on.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

from mmrev_kit.config.errors import Told
from mmrev_kit.config.project import run_dir
from mmrev_kit.config.reading import load_config
from mmrev_kit.config.reporting import Pace
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.data.make import ensure_data
from mmrev_kit.evaluation.results import Evaluation, evaluation_dir, read_evaluation, read_facts
from mmrev_kit.notebook.launch import evaluate, launch
from mmrev_kit.notebook.runs import HISTORY
from mmrev_kit.notebook.sweeps import Point, Sweep
from mmrev_kit.training.history import changed_settings, clear_errors, read_history
from mmrev_kit.training.jobs import run_job
from mmrev_kit.training.lock import held
from mmrev_kit.training.preflight import read_cards
from mmrev_kit.training.processes import UNTRIED, leave_error
from mmrev_kit.training.tracking import refuse_missing

LOG = "run.log"


@dataclass(frozen=True)
class Result:
    """What came of one run: its evaluation and training history, or why there are none."""

    point: Point
    seed: int
    evaluation: Evaluation | None = None
    history: dict | None = None
    error: str | None = None


@dataclass(frozen=True)
class Share:
    """What one of several runs at once may use: cores by number, and cards as CUDA_VISIBLE_DEVICES names them."""

    cores: list[int]
    cards: list[str]


def deal(parallel: int | None, processes: int | None) -> list[Share]:
    """The shares of the runs that go on at once.

    Without a GPU a run gets two cores where nothing else is said: its own process and the data check, which decodes
    pictures beside it, keep two busy, and with more each core does less. With GPUs it gets a card a process.

    Args:
        parallel: how many runs at once; None: as many as so fit.
        processes: of one run, `launch.num_processes`.

    Raises:
        ConfigError: more at once than there are cores or cards for.
    """
    cores, count = sorted(os.sched_getaffinity(0)), len(read_cards())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = [word.strip() for word in visible.split(",")] if visible and count else list(map(str, range(count)))
    each = processes or 1
    most = max(1, count // each if count else len(cores) // each)
    wanted = parallel if parallel is not None else most if count else max(1, len(cores) // max(2, each))
    if type(wanted) is not int or not 1 <= wanted <= most:
        have = f"{count} GPUs" if count else f"{len(cores)} cores"
        raise ConfigError(f"parallel = {wanted!r}: this machine has {have}, for at most {most} runs at once.")
    size = count // wanted if processes is None else each
    return [
        Share(cores[number::wanted] or cores, cards[number * size : (number + 1) * size] if count else [])
        for number in range(wanted)
    ]


def finished(config: Config) -> Path | None:
    """The evaluation of a run that is finished and was evaluated as configured; None where something is to be done."""
    folder = run_dir(config)
    evaluated = evaluation_dir(config, folder)
    try:
        done = read_history(folder / HISTORY)["status"] == "finished" and read_facts(evaluated)
        asked = replace(load_config(evaluated / "config.yaml").evaluation, by_epoch=config.evaluation.by_epoch)
    except (ConfigError, FileNotFoundError):
        return None
    same = asked == config.evaluation and not changed_settings(config, folder / "config.yaml")
    return evaluated if done and same else None


def run_worker(config: Config, processes: int | None, cores: list[int], cards: list[str], folder: str) -> None:
    """What the process of one run does: data, training and evaluation, with its share of the machine.

    Args:
        processes: `launch.num_processes` of the run; the job's own is 1.
    """
    (Path(folder) / UNTRIED).unlink(missing_ok=True)  # its training and its evaluation are tried by themselves
    try:
        os.sched_setaffinity(0, cores)
        if cards:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(cards)
        config.launch.num_processes = processes
        print("\n".join(ensure_data(config)), flush=True)
        launch(config)
        evaluate(config)
    except (Exception, KeyboardInterrupt) as error:
        leave_error(Path(folder), 0, error)
        raise


def run_one(sweep: Sweep, point: Point, seed: int, shares: SimpleQueue, stop: threading.Event) -> Result:
    """One run, as soon as a share of the machine is free; an error that explains itself becomes the result's.

    Raises:
        KeyboardInterrupt: `stop` was set; no process of the run is left.
    """

    def heed() -> None:
        if stop.is_set():
            raise KeyboardInterrupt

    config = sweep.config(point, seed)
    folder = sweep.folder / "runs" / run_dir(config).name
    job = replace(config, launch=replace(config.launch, num_processes=1))
    share = shares.get()
    try:
        heed()
        with held(folder):
            clear_errors(folder)
            arguments = config.launch.num_processes, share.cores, share.cards, str(folder)
            run_job(run_worker, job, folder, LOG, *arguments, show=heed)
        return read_result(config, point, seed)
    except Told as error:
        return Result(point, seed, error=str(error).removeprefix("TrainingError: "))
    finally:
        shares.put(share)


def read_result(config: Config, point: Point, seed: int) -> Result:
    """Of a run that is finished."""
    folder = run_dir(config)
    evaluation = read_evaluation(evaluation_dir(config, folder), folder.name)
    return Result(point, seed, evaluation, read_history(folder / HISTORY))


def run_sweep(sweep: Sweep, parallel: int | None = None) -> list[Result]:
    """Train and evaluate every run of a sweep; what is finished is read. Progress is a line a run.

    Returns:
        A result a run, in the order of `Sweep.runs`.

    Raises:
        ConfigError: the sweep is under way elsewhere, its tracker is missing, or see `deal`.
        KeyboardInterrupt: after all processes have ended; the same call goes on with what is left.
    """
    refuse_missing(sweep.base)
    shares, stop, found = SimpleQueue(), threading.Event(), {}
    dealt = deal(parallel, sweep.base.launch.num_processes)
    for share in dealt:
        shares.put(share)
    with held(sweep.folder), ThreadPoolExecutor(len(dealt)) as pool:
        runs = sweep.runs()
        for point, seed in runs:
            config = sweep.config(point, seed)
            if finished(config):
                found[point, seed] = read_result(config, point, seed)
        left = [run for run in runs if run not in found]
        print(f"{len(found)} of {len(runs)} runs are there; {len(left)} to do, {len(dealt)} at once", flush=True)
        waiting = {pool.submit(run_one, sweep, *run, shares, stop) for run in left}
        try:
            for result in told(waiting, len(found), len(runs)):
                found[result.point, result.seed] = result
        except KeyboardInterrupt:
            stop.set()
            pool.shutdown(cancel_futures=True)
            print("interrupted; the same again goes on with what is left", flush=True)
            raise KeyboardInterrupt from None
    return [found[run] for run in runs]


def told(waiting: set[Future], done: int, total: int) -> Iterator[Result]:
    """The results as they come, each with a line: which, what was found, how far the sweep is."""
    pace = Pace(total, done=done)
    while waiting:
        ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in ready:
            result, done = future.result(), done + 1
            claim = f"failed: {result.error}" if result.error else result.evaluation.verdict().claim
            name = f"seed {result.seed}, {result.point.name}"
            print(f"-- run {done} of {total}: {name}: {claim}; {pace.timing(done)}", flush=True)
            yield result
