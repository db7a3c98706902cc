"""The whole study: both directions over several seeds, each trained and evaluated, and what they say together."""

from copy import deepcopy
from dataclasses import replace

from mmrev_kit.config.project import run_dir
from mmrev_kit.config.sections import TASKS, Config, ConfigError
from mmrev_kit.data.design import DECIDING
from mmrev_kit.data.make import ensure_data
from mmrev_kit.data.tasks import GROUPS, TASK_TYPES
from mmrev_kit.evaluation import metrics
from mmrev_kit.evaluation.results import Evaluation, read_evaluation
from mmrev_kit.evaluation.verdict import Verdict, verdict
from mmrev_kit.notebook.launch import evaluate, launch
from mmrev_kit.training.history import read_history


def seed_config(config: Config, task: str, seed: int) -> Config:
    """The configuration of one run: other people, other draws, an experiment of its own."""
    own = deepcopy(config)
    own.experiment = replace(config.experiment, name=f"{config.experiment.name}_seed{seed}", task=task, seed=seed)
    return own


def run_all(config: Config, seeds: str, tasks: tuple[str, ...] = TASKS) -> dict[str, dict[int, Evaluation]]:
    """Make data, train and evaluate for each task and seed; what is there already is read.

    Args:
        seeds: numbers separated by spaces.

    Returns:
        {task: {seed: evaluation}}.

    Raises:
        ConfigError: seeds is none or no such text; and what the parts raise.
    """
    words = str(seeds).split()
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"seeds = {seeds!r}: must be numbers separated by spaces, such as '0 1 2'.")
    evaluations: dict[str, dict[int, Evaluation]] = {task: {} for task in tasks}
    for seed in dict.fromkeys(map(int, words)):
        for task in tasks:
            own = seed_config(config, task, seed)
            print("\n".join([f"-- seed {seed}, {task}", *ensure_data(own)]), flush=True)
            launch(own)
            evaluations[task][seed] = read_evaluation(evaluate(own), run_dir(own).name)
    return evaluations


def pool(by_seed: dict[int, Evaluation]) -> list[dict]:
    """The records of several seeds as those of one evaluation: each seed's people are people of their own."""
    return [
        record | {"id": f"seed{seed}/{record['id']}", "entity_id": f"seed{seed}/{record['entity_id']}"}
        for seed, one in by_seed.items()
        for record in one.records
    ]


def pooled_metrics(evaluations: dict[str, dict[int, Evaluation]]) -> dict[str, dict]:
    """{"task <task>, <n> seeds": metrics over the people of all seeds}, for `plots.accuracy_figure`."""
    return {f"task {task}, {len(seeds)} seeds": metrics.metrics(pool(seeds)) for task, seeds in evaluations.items()}


def pooled_verdicts(evaluations: dict[str, dict[int, Evaluation]]) -> dict[str, Verdict]:
    """{task: verdict over the people of all seeds}."""
    return {task: verdict(pool(seeds), task, next(iter(seeds.values())).taught) for task, seeds in evaluations.items()}


def seed_table(config: Config, evaluations: dict[str, dict[int, Evaluation]]):
    """A pandas DataFrame, a row a task and seed: accuracy by test and group, the claim, and seconds of training."""
    import pandas

    rows = []
    for task, seeds in evaluations.items():
        for seed, one in seeds.items():
            row: dict = {"task": task, "seed": seed}
            for test, groups in one.metrics["none"].items():
                title = TASK_TYPES[test].title
                row |= {f"{title} {group}": groups[group]["accuracy"] for group in GROUPS if group in groups}
            row[f"claim ({TASK_TYPES[DECIDING[task]].long_title})"] = one.verdict().claim
            history = read_history(run_dir(seed_config(config, task, seed)) / "training_history.json")
            row["training (s)"] = round(sum(record["seconds"] for record in history["epochs"]))
            rows.append(row)
    return pandas.DataFrame(rows).set_index(["task", "seed"]).round(2).astype(object).fillna("")
