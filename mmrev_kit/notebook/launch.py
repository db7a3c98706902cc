"""From a notebook cell to a finished run or evaluation: the folder, the job, live progress, and errors that arrive."""

import json
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

from mmrev_kit.config.project import experiment_dir, resolve, run_dir
from mmrev_kit.config.reading import load_config, to_yaml
from mmrev_kit.config.sections import Config, ConfigError, ExperimentConfig
from mmrev_kit.data.questions import Question, choose_questions, read_questions
from mmrev_kit.data.run_data import people_digest, trained_connectors
from mmrev_kit.data.tasks import TASK_TYPES
from mmrev_kit.evaluation.predict import DROPS, MEASURED, check_answer_lengths, evaluate_worker, evaluation_key
from mmrev_kit.evaluation.results import complete, evaluation_dir, judge_anew, read_facts, read_records
from mmrev_kit.files import write_text
from mmrev_kit.model.adapters import adapter_folder
from mmrev_kit.model.bases import adapter_digest, base_fingerprint, base_of, check_base
from mmrev_kit.notebook.gallery import answers_html
from mmrev_kit.notebook.progress import LogLines
from mmrev_kit.notebook.runs import HISTORY, LOG, Watch, watch
from mmrev_kit.training.history import JOB, changed_settings, clear_errors, mark_ended, prepare_folder, read_history
from mmrev_kit.training.jobs import count_processes, error_text, run_job
from mmrev_kit.training.lock import describe, held, read_holder
from mmrev_kit.training.loop import worker
from mmrev_kit.training.preflight import preflight
from mmrev_kit.training.tracking import refuse_missing
from mmrev_kit.training.update import TrainingError
from mmrev_kit.training.zero import refuse_mode


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
    refuse_mode(config, config.launch.num_processes)
    folder = run_dir(config)
    if holder := read_holder(folder):
        return attach(config, folder, holder)
    check_machine(config)
    with held(folder):
        if finished := prepare_folder(config):
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
        again = "start it again" + (" with overwrite=False" if own and config.launch.overwrite else "")
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
        adapter: "best" or "final" of the run, a folder with an adapter, or None for the base model without one. The
            results on an adapter that is no run's go to <output_dir>/adapter_<its name>_<digest>, never beside it.
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
    base = base_fingerprint(**base_of(config))
    chosen, owner, trained = None, resolve(config.launch.output_dir) / f"base_{base}", {"task": None}
    if adapter:
        chosen = adapter_folder(config, adapter)
        owner, trained = adapter_facts(config, chosen, own=adapter in ("best", "final"))
    folder = evaluation_dir(config, owner)
    questions, left_out = what_to_ask(config)
    for note in trained_connectors(experiment_dir(config))[0]:
        print(f"NOTE: {note}.")
        trained["note"] = " ".join([*filter(None, [trained.get("note")]), f"{note}."])
    key = evaluation_key(config, chosen, base, drops, questions, tuple(trained.values()) if "note" in trained else ())
    with held(folder):
        if not again and _holds(folder, key):
            judge_anew(folder)
            print(f"{folder} holds this evaluation.")
            save_examples(config, folder)
            return folder
        clear_errors(folder)
        print(f"evaluating {chosen or config.model.name}")
        log = LogLines(folder / "evaluate.log")
        arguments = str(chosen) if chosen else None, list(drops), str(folder)
        run_job(evaluate_worker, config, folder, log.path.name, *arguments, show=log.show)
        log.show()
        write_text(folder / "config.yaml", to_yaml(config))
        measured = folder / MEASURED
        complete(folder, json.loads(measured.read_text(encoding="utf-8")) | trained | left_out | {"key": key})
        measured.unlink()
        save_examples(config, folder)
    return folder


def what_to_ask(config: Config) -> tuple[list[Question], dict]:
    """The questions of an evaluation, and what its facts.json says where they are not all that there are.

    Raises:
        DataError, ConfigError: a fault in the test files, or an answer that cannot be given, before any process starts.
    """
    everything = read_questions(config)
    there = {question.row.task for question in everything}
    if missing := [f"{test}_test.jsonl" for test in config.evaluation.tests if test not in there]:
        print(f"not asked, for there are no rows: {', '.join(missing)}")
    asked = choose_questions(config, everything)
    check_answer_lengths(config, asked)
    if len(asked) == len(everything):
        return asked, {}
    of_tests = [question for question in everything if question.row.task in config.evaluation.tests]
    told = f"{len(asked):,} of {len(everything):,} questions were asked ({config.evaluation.partial})"
    most = config.evaluation.max_samples if len(asked) < len(of_tests) else None
    return asked, {"part": f"A part of an evaluation: {told}.", "max_samples": most}


def save_examples(config: Config, folder: Path) -> None:
    """Of an evaluation, examples.html with `evaluation.save_examples` right and wrong answers of each test and group;
    none where that is 0, so that the page is always of these answers."""
    page, each = folder / "examples.html", config.evaluation.save_examples
    page.unlink(missing_ok=True)
    if each:
        answers = answers_html(read_records(folder / "predictions.jsonl"), each)
        write_text(
            page, f"<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>{folder.name}</title>{answers}</html>"
        )
        print(f"examples: {page}")


def adapter_facts(config: Config, adapter: Path, own: bool) -> tuple[Path, dict]:
    """Where the evaluations of an adapter go, and what is to be said of it: the task that it was trained on, what main
    was taught, and, where no run tells these, a `note`; `unbound` where nothing ties it to its base.

    Args:
        own: whether it is the configured run's.

    Raises:
        ConfigError: see `check_base` and `refuse_other_inputs`.
    """
    unbound = check_base(
        adapter, partial(base_fingerprint, **base_of(config)), config.model.name, config.adapter.unbound
    )
    run = adapter.parent / "config.yaml"  # says what main was taught, whatever is configured now
    if not unbound and (own or (adapter.name in ("best", "final") and run.is_file())):
        refuse_other_inputs(config, adapter.parent)
        trained = (load_config(run) if run.is_file() else config).experiment
        return adapter.parent, {"task": trained.task, "taught": trained.taught}
    lesson = original_lesson(config, adapter.parent)
    kinds = " and ".join(TASK_TYPES[kind].title for kind in lesson.main_is_taught)
    note = f"No run tells what main was taught: {kinds}, by experiment.task and experiment.taught."
    facts = {"task": lesson.task, "taught": lesson.taught, "note": f"{adapter}: {note}"}
    if unbound:
        facts |= {"unbound": unbound, "note": f"{unbound} It was asked by adapter.unbound=true. {note}"}
    name = adapter.parent.name if adapter.name in ("best", "final") else adapter.name
    print(f"NOTE: {facts['note']}")
    return resolve(config.launch.output_dir) / f"adapter_{name}_{adapter_digest(adapter)[:8]}", facts


def original_lesson(config: Config, folder: Path) -> ExperimentConfig:
    """What main was taught by an adapter that no run of the kit speaks for: as configured, and where its folder is one
    of the original scripts, whose task forward is generation, by generation.

    Raises:
        ConfigError: task reverse of the original scripts, which put the image first.
    """
    given, original = config.experiment, False
    with suppress(ConfigError, OSError):
        original = "total_steps" not in read_history(folder / HISTORY)
    if original and given.task == "reverse":
        raise ConfigError(
            f"{folder} is of the original scripts, whose task reverse puts the image first: that is another test here. "
            "Set experiment.task=forward experiment.taught=cw."
        )
    return replace(given, taught=given.taught or "generation") if original else given


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
