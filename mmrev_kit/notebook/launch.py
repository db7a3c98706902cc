"""From a notebook cell to a finished run: the run folder, the processes, live progress, and errors that arrive."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path

from mmrev_kit.config.project import resolve, run_dir
from mmrev_kit.config.reading import load_config, to_yaml
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.evaluation.predict import DROPS, evaluate_worker, evaluation_key, read_questions
from mmrev_kit.evaluation.results import write_results
from mmrev_kit.files import write_json, write_text
from mmrev_kit.model.bases import base_fingerprint, base_of, check_base
from mmrev_kit.notebook.progress import LogLines, Progress
from mmrev_kit.training import history
from mmrev_kit.training.jobs import Job, _run_forked, _run_fresh, count_processes, why_not_here
from mmrev_kit.training.loop import worker
from mmrev_kit.training.preflight import preflight
from mmrev_kit.training.processes import end_with
from mmrev_kit.training.update import TrainingError

REQUEST = "request.json"  # what an evaluation was asked for: adapter, drops, folder


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
    """Train: start the processes, show progress, and return the run's history when it has ended.

    Two processes or more are forked from this kernel by accelerate's `notebook_launcher`; a single one, or several
    from a kernel that cannot be forked, run in a fresh Python that does the same. An interrupted run goes on from its
    last save, a finished one is not trained again.

    Raises:
        ConfigError, DataError: nothing was started; the message says what to change.
        TrainingError: the run ended with an error; the message is the failing process's own.
    """
    config = deepcopy(config)
    config.launch.num_processes = count_processes(config)
    check_machine(config)
    finished = history.prepare_folder(config)
    folder = run_dir(config)
    if finished:
        print(f"{folder} is finished ({finished['reason']}). To train anew set launch.overwrite=true.")
        return finished
    number = config.launch.num_processes
    reason = "one process" if number == 1 else why_not_here()
    count = "1 process" if number == 1 else f"{number} processes"
    saved = folder / "last"
    how = (f", in a fresh Python ({reason})" if reason else "") + (f", going on from {saved}" if saved.exists() else "")
    print(f"training in {folder}: {count}{how}")
    progress, log = Progress(folder / "training_history.json"), LogLines(folder / "train.log")

    def show() -> None:
        log.show()
        progress.show()

    job = Job(config, folder, "train.log", worker, (config,), show)
    try:
        (_run_fresh if reason else _run_forked)(job)
    except (KeyboardInterrupt, TrainingError) as error:
        how = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        history.mark_ended(folder / "training_history.json", how)
        show()
        print(f"{how}; run the same cell again to " + (f"go on from {saved}" if saved.exists() else "start anew"))
        if how == "interrupted":
            raise KeyboardInterrupt from None  # without the fifty lines of the figure that it may have met
        raise
    log.show()
    progress.show(last=True)
    return history.read_history(folder / "training_history.json")


def evaluate(
    config: Config, adapter: str | None = "best", drops: tuple[str, ...] = ("none",), again: bool = False
) -> Path:
    """Ask all test questions; returns the folder with predictions.jsonl, metrics.json and, of a run, verdict.json.

    The same evaluation is not made twice: same adapter, base, questions, pictures and settings.

    Args:
        config: of the run; pixel limits, template and prompts are those of its training.
        adapter: "best" or "final" of the run, or None for the base model without an adapter.
        drops: from `evaluate.DROPS`; "none" is the whole prompt.
        again: make it even if it is there.

    Raises:
        ConfigError: the run has no such adapter, or it belongs to another base; an unknown drop.
        DataError: a fault in the experiment's test files.
        TrainingError: the evaluation ended with an error; the message is the failing process's own.
    """
    config = deepcopy(config)
    config.launch.num_processes = count_processes(config)
    check_machine(config)
    unknown = [drop for drop in drops if drop not in DROPS]
    if unknown or not drops:
        raise ConfigError(f"drop {' '.join(unknown) or '(none given)'}: must be of {', '.join(DROPS)}.")
    chosen = run_dir(config) / adapter if adapter else None
    base = base_fingerprint(**base_of(config))
    if chosen:
        check_base(chosen, base, config.model.name)
    owner = run_dir(config) if chosen else resolve(config.launch.output_dir) / f"base_{base}"
    folder = owner / "eval" / config.experiment.name
    questions = read_questions(config)  # a fault in the test files is told here, before any process starts
    key = evaluation_key(config, chosen, base, drops, questions)
    facts = folder / "facts.json"
    if not again and facts.is_file() and json.loads(facts.read_text(encoding="utf-8")).get("key") == key:
        print(f"{folder} holds this evaluation.")
        return folder
    facts.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    history.clear_errors(folder)
    write_text(folder / "config.yaml", to_yaml(config))
    request = [str(chosen) if chosen else None, list(drops), str(folder)]
    write_json(folder / REQUEST, request)
    number = config.launch.num_processes
    reason = "one process" if number == 1 else why_not_here()
    print(f"evaluating {chosen or config.model.name}" + (f", in a fresh Python ({reason})" if reason else ""))
    log = LogLines(folder / "evaluate.log")
    job = Job(config, folder, log.path.name, evaluate_worker, (config, *request), log.show)
    (_run_fresh if reason else _run_forked)(job)
    log.show()
    task = config.experiment.task if chosen else None
    write_results(folder, task)
    write_json(facts, json.loads(facts.read_text(encoding="utf-8")) | {"task": task, "key": key})
    return folder


def main() -> None:
    """`python -m mmrev_kit.notebook.launch FOLDER PARENT`: what a fresh Python runs for `launch` and `evaluate`."""
    folder = Path(sys.argv[1])
    end_with(int(sys.argv[2]))
    config = load_config(folder / "config.yaml")
    job = Job(config, folder, "train.log", worker, (config,), lambda: None)
    if (folder / REQUEST).is_file():
        adapter, drops, _ = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
        job = Job(config, folder, "evaluate.log", evaluate_worker, (config, adapter, drops, str(folder)), lambda: None)
    if config.launch.num_processes == 1:
        job.start()
    else:
        _run_forked(job)


if __name__ == "__main__":
    main()
