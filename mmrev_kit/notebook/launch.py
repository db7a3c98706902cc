"""From a notebook cell to a finished run or evaluation: the folder, the job, live progress, and errors that arrive."""

import json
from copy import deepcopy
from functools import partial
from pathlib import Path

from mmrev_kit.config.project import experiment_dir, resolve, run_dir
from mmrev_kit.config.reading import load_config, to_yaml
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.data.questions import read_questions
from mmrev_kit.data.run_data import people_digest
from mmrev_kit.data.tasks import TASK_TYPES
from mmrev_kit.evaluation.predict import (
    DROPS,
    MEASURED,
    check_answer_lengths,
    evaluate_worker,
    evaluation_key,
)
from mmrev_kit.evaluation.results import complete, judge_anew, read_facts
from mmrev_kit.files import write_text
from mmrev_kit.model.bases import base_fingerprint, base_of, check_base
from mmrev_kit.notebook.progress import LogLines
from mmrev_kit.notebook.runs import HISTORY, LOG, Watch, watch
from mmrev_kit.training.history import JOB, changed_settings, clear_errors, mark_ended, prepare_folder, read_history
from mmrev_kit.training.jobs import count_processes, error_text, run_job
from mmrev_kit.training.lock import describe, held, read_holder
from mmrev_kit.training.loop import worker
from mmrev_kit.training.preflight import preflight
from mmrev_kit.training.tracking import refuse_missing
from mmrev_kit.training.update import TrainingError


def check_machine(config: Config) -> None:
    """See `preflight`; warnings are printed.

    Raises:
        ConfigError: what stands in the way of a start.
    """
    found = preflight(config)
    for warning in found.warnings:
        print(f"note: {warning}")
    if found.problems:
        raise ConfigError("\n".join(found.problems))


def launch(config: Config) -> dict:
    """Train: start the workers, show progress, and return the run's history when it has ended.

    An interrupted run goes on from its last save, and a finished one is not trained again. A run that is under way,
    started elsewhere with the same configuration, is shown until its end. The data must be there: see `ensure_data`.

    Raises:
        ConfigError: nothing was started; the message says what to change.
        TrainingError: the run ended with an error; the message is the failing worker's own.
    """
    refuse_missing(config)
    config = deepcopy(config)
    config.launch.num_processes = count_processes(config)
    folder = run_dir(config)
    if holder := read_holder(folder):
        return attach(config, folder, holder)
    check_machine(config)
    with held(folder):
        finished = prepare_folder(config)
        if finished:
            LogLines(folder / LOG, from_start=True).show()
            print(f"{folder} is finished ({finished['reason']}). To train anew set launch.overwrite=true.")
            if config.evaluation.by_epoch and not any("tests" in record for record in finished["epochs"]):
                print("NOTE: it was trained without evaluation.by_epoch, and has no tests by epoch.")
            return finished
        return _train(config, folder)


def _train(config: Config, folder: Path) -> dict:
    number, saved, show = config.launch.num_processes, folder / "last", Watch(folder)
    count = "1 process" if number == 1 else f"{number} processes"
    going_on = saved.exists() and not config.launch.overwrite
    print(f"training in {folder}: {count}" + (f", going on from {saved}" if going_on else ""))
    try:
        run_job(worker, config, folder, LOG, show=show)
    except (KeyboardInterrupt, TrainingError) as error:
        how = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        mark_ended(folder / HISTORY, how)
        show()
        own = saved.exists() and not changed_settings(config, folder / "config.yaml")
        again = "run the same cell again" + (" with overwrite=False" if own and config.launch.overwrite else "")
        print(f"{how}; {again} to " + (f"go on from {saved}" if own else "start anew"))
        if how == "interrupted":
            raise KeyboardInterrupt from None  # without the fifty lines of the figure that it may have met
        raise
    show(last=True)
    return read_history(folder / HISTORY)


def attach(config: Config, folder: Path, holder: dict) -> dict:
    """Show a run that somebody else started, until its end; returns its history then.

    Raises:
        ConfigError: it has another configuration, or is to be replaced.
        TrainingError: it ended with an error.
        KeyboardInterrupt: the watching was ended; the run goes on.
    """
    under_way = f"{folder} is under way: {describe(holder)}"
    if config.launch.overwrite:
        raise ConfigError(f"{under_way}. It is not replaced: wait for its end, or interrupt it where it was started.")
    given = folder / JOB if (folder / JOB).is_file() else folder / "config.yaml"  # what it has begun with: what it is
    if changed := changed_settings(config, given):
        raise ConfigError(
            f"{under_way}, with another configuration: {changed}. Choose another experiment.name; to watch that run, "
            f"launch it with {given}."
        )
    print(f"{under_way}. It is shown here; an interrupt ends the showing, not the run.", flush=True)
    watch([folder])
    history = read_history(folder / HISTORY)
    if history["status"] != "finished":
        failed = error_text(folder, LOG, config.launch.num_processes) if history["status"] == "failed" else None
        raise TrainingError(f"The run that was shown did not finish: {failed or history['reason'] or 'it was killed'}")
    return history


def evaluate(
    config: Config, adapter: str | None = "best", drops: tuple[str, ...] = ("none",), again: bool = False
) -> Path:
    """Ask all test questions; returns the folder with predictions.jsonl, metrics.json and, of a run, verdict.json.

    The same evaluation is not made twice: same adapter, base, questions, pictures and settings.

    Args:
        config: the one that the run was trained with: pixel limits and prompts come from it.
        adapter: "best" or "final" of the run, or None for the base model without an adapter.
        drops: from `predict.DROPS`; "none" is the whole prompt.
        again: make it even if it is there.

    Raises:
        ConfigError: the run has no such adapter, or it belongs to another base; an unknown drop; the folder is in use.
        DataError: a fault in the experiment's test files.
        TrainingError: the evaluation ended with an error; the message is the failing worker's own.
    """
    config = deepcopy(config)
    config.launch.num_processes = count_processes(config)
    check_machine(config)
    unknown = [drop for drop in drops if drop not in DROPS]
    if unknown or "none" not in drops:
        raise ConfigError(
            f"drops = {' '.join(drops)!r}: must be of {', '.join(DROPS)}, none (the whole prompt) included."
        )
    chosen = run_dir(config) / str(adapter) if adapter else None
    base = base_fingerprint(**base_of(config))
    if chosen:
        check_base(chosen, partial(base_fingerprint, **base_of(config)), config.model.name)
        refuse_other_inputs(config, chosen.parent)
    owner = run_dir(config) if chosen else resolve(config.launch.output_dir) / f"base_{base}"
    folder = owner / "eval" / experiment_dir(config).name
    questions = read_questions(config)  # a fault in the test files is told here, before any process starts
    asked = {question.row.task for question in questions}
    if left_out := [f"{test}_test.jsonl" for test in TASK_TYPES if test not in asked]:
        print(f"not asked, for there are no rows: {', '.join(left_out)}")
    check_answer_lengths(config, questions)
    key = evaluation_key(config, chosen, base, drops, questions)
    with held(folder):
        if not again and _holds(folder, key):
            judge_anew(folder)
            print(f"{folder} holds this evaluation.")
            return folder
        clear_errors(folder)
        print(f"evaluating {chosen or config.model.name}")
        log = LogLines(folder / "evaluate.log")
        arguments = str(chosen) if chosen else None, list(drops), str(folder)
        run_job(evaluate_worker, config, folder, log.path.name, *arguments, show=log.show)
        log.show()
        write_text(folder / "config.yaml", to_yaml(config))
        measured = folder / MEASURED
        facts = json.loads(measured.read_text(encoding="utf-8")) | {"task": None, "key": key}
        if chosen:
            run = run_dir(config) / "config.yaml"  # says what main was taught, whatever is configured now
            trained = (load_config(run) if run.is_file() else config).experiment
            facts |= {"task": trained.task, "taught": trained.taught}
        complete(folder, facts)
        measured.unlink()
    return folder


def refuse_other_inputs(config: Config, folder: Path) -> None:
    """Raises ConfigError where a run, as far as its folder says, had pictures or prompts of another size, or another
    experiment under this one's name: the adapter would be asked what it was never shown."""
    if not (folder / "config.yaml").is_file():
        return
    run, manifest = load_config(folder / "config.yaml"), folder / "manifest.json"
    people = json.loads(manifest.read_text(encoding="utf-8")).get("people") if manifest.is_file() else None
    if people and people != people_digest(config):
        told = f"{folder} was not trained on these people and pictures of {experiment_dir(config)}"
        if experiment_dir(run) == experiment_dir(config):
            raise ConfigError(f"{told}: they were changed since. Restore them, or train again.")
        print(f"NOTE: {told}.")
    for section, name in (("model", "min_pixels"), ("model", "max_pixels"), ("training", "max_length")):
        was, now = (getattr(getattr(one, section), name) for one in (run, config))
        if was != now:
            key = f"{section}.{name}"
            raise ConfigError(f"{folder} was trained with {key} = {was}, not {now}. Set {key}={was} to ask it.")


def _holds(folder: Path, key: str) -> bool:
    try:
        return read_facts(folder).get("key") == key
    except ConfigError:
        return False
