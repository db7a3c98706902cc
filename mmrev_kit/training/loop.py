"""The training loop: one function that every process runs, whatever their number."""

import math
import time
from contextlib import ExitStack
from dataclasses import asdict

import torch

from mmrev_kit.config.project import run_dir
from mmrev_kit.config.reporting import MARK
from mmrev_kit.config.sections import Config
from mmrev_kit.files import tidy
from mmrev_kit.training.by_epoch import ask
from mmrev_kit.training.checkpoints import save_adapter, save_last, write_manifest
from mmrev_kit.training.diagnose import check_finite, check_learning, explain
from mmrev_kit.training.history import begin_run, overwrite_status
from mmrev_kit.training.processes import UNTRIED, begin, on_interrupt, worker_state
from mmrev_kit.training.run import EPOCH_START, Run, ordered_rows, start
from mmrev_kit.training.scheduler import warnings_for
from mmrev_kit.training.tracking import refuse_missing, start_tracker
from mmrev_kit.training.update import TrainingError, chunks, update, validate
from mmrev_kit.training.zero import refuse_mode


def stop_if_interrupted(run: Run) -> None:
    """Save where the run stands and stop, once every process knows of an interrupt.

    Raises:
        KeyboardInterrupt: the run goes on from here when it is started again.
    """
    if run.stops:
        save_last(run)
        raise KeyboardInterrupt("interrupted by the user")


def train_epoch(run: Run) -> float:
    """The rest of the current epoch.

    Returns:
        The mean loss over the epoch's samples; those of skipped updates, which have none, are left out.

    Raises:
        KeyboardInterrupt: see `stop_if_interrupted`.
    """
    updates = chunks(ordered_rows(run.config, run.task, run.progress["epoch"]), run.batch)
    run.model.train()
    for rows in updates[run.progress["step_in_epoch"] :]:
        samples = [run.task.train[source][index] for source, index in rows]
        record = update(run, samples)
        run.progress["step_in_epoch"] += 1
        if math.isfinite(record["loss"]):
            run.progress["loss_sum"] += record["loss"] * len(rows)
            run.progress["rows"] += len(rows)
        if run.state.is_main_process:
            run.history.add_step(record)
            (run.folder / UNTRIED).unlink(missing_ok=True)
        check_finite(run, record, samples)
        check_learning(run, record)
        if run.progress["global_step"] % run.config.training.save_steps == 0:
            save_last(run)
        stop_if_interrupted(run)
    return run.progress["loss_sum"] / run.progress["rows"] if run.progress["rows"] else math.nan


def finish_epoch(run: Run, train_loss: float, began: float) -> str | None:
    """Validate, decide, save. Returns the reason to end, or None."""
    losses = validate(run)
    rate = run.schedule.lr
    for source, loss in losses.items():
        if not math.isfinite(loss):
            raise TrainingError(f"The validation loss of {source} is {loss}. {explain(run, run.task.val[source])}")
    taught = run.config.experiment.main_is_taught
    decision = run.schedule.observe(sum(losses[task] for task in taught) / len(taught))
    tests, asking = {}, time.perf_counter()
    if run.task.asked:
        tests = {"tests": ask(run), "tests_seconds": time.perf_counter() - asking}
    run.progress |= {"epoch": run.progress["epoch"] + 1} | EPOCH_START
    if run.state.is_main_process:
        record = {"epoch": run.progress["epoch"], "train_loss": train_loss, "val_loss": losses, "lr": rate}
        record |= {"decision": asdict(decision), "seconds": time.perf_counter() - began} | tests
        if decision.improved:
            save_adapter(run, run.folder / "best", losses)
        run.history.add_epoch(record)
    save_last(run)
    stop_if_interrupted(run)
    return decision.stop


def train(config: Config, state) -> None:
    """The whole run in this process, from data to `final/`."""
    if state.is_main_process:
        tidy(run_dir(config))
    if state.num_processes > 1:
        state.wait_for_everyone()  # before any of them looks for a state to go on from
    run = start(config, state)

    def note_interrupt(number, frame) -> None:
        """The loop then stops between two updates, all processes after the same one: no file is half written."""
        run.interrupted = True

    if run.state.is_main_process:
        for warning in warnings_for(config):
            print(f"{MARK}NOTE: {warning}", flush=True)
        begin_run(config)
        write_manifest(run)
        run.history.tracker = start_tracker(run)
        run.history.begin()
    try:
        with on_interrupt(note_interrupt):
            stop = run.schedule.stop
            while not stop:
                began = time.perf_counter()
                stop = finish_epoch(run, train_epoch(run), began)
        if run.state.is_main_process:
            save_adapter(run, run.folder / "final", run.history.data["epochs"][-1]["val_loss"])
            run.history.end("finished", stop)
    except BaseException as error:
        if run.state.is_main_process:
            status = "failed" if isinstance(error, Exception) else "interrupted"
            try:
                run.history.end(status, str(error) or type(error).__name__)
            except OSError:  # a full disk must not hide the error
                overwrite_status(run.history.path)
        if run.stops and run.state.num_processes > 1:
            torch.distributed.barrier()  # the launcher ends all processes when one has ended: the first writes first
        raise


def worker(config: Config) -> None:
    """What each worker of a job runs. An error is left in the run folder as error_rank<r>.txt for who started it."""
    with worker_state(run_dir(config)) as state:
        train(config, state)


def launched_worker(config: Config) -> None:
    """What each worker runs that `torchrun` or `accelerate launch` started: nobody has prepared the folder for it."""
    refuse_missing(config)
    with worker_state(run_dir(config)) as state, ExitStack() as stack:
        refuse_mode(config, state.num_processes)
        if begin(config, state, stack):
            train(config, state)
