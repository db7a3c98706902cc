"""The whole study: the default experiment on both embedded bases, in both directions, and taught as the guide does."""

from copy import deepcopy
from dataclasses import dataclass, replace

from mmrev_kit.config.project import run_dir
from mmrev_kit.config.reporting import Pace, decimal, duration
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.data.make import ensure_data
from mmrev_kit.data.tasks import GROUPS, TASK_TYPES
from mmrev_kit.evaluation.metrics import metrics
from mmrev_kit.evaluation.results import Evaluation, read_evaluation
from mmrev_kit.evaluation.verdict import BOUND, CURSE, NO_CURSE
from mmrev_kit.notebook.launch import evaluate, launch
from mmrev_kit.training.history import read_history


@dataclass(frozen=True)
class Condition:
    """A base, a task, what main is taught, and the claim that this is a reference for."""

    base: str
    task: str
    taught: str | None
    expected: str

    @property
    def title(self) -> str:
        return f"{self.base}, {self.task}" + (f", taught by {self.taught}" if self.taught else "")

    def config(self, config: Config, seed: int) -> Config:
        """Of one run: a seed has people of its own, which all conditions share."""
        own, name = deepcopy(config), f"{config.experiment.name}_seed{seed}"
        words = [name, self.base.removeprefix("embedded").lstrip("-"), self.taught]
        own.experiment = replace(
            config.experiment, name="_".join(filter(None, words)), task=self.task, taught=self.taught, seed=seed
        )
        own.model = replace(config.model, name=self.base)
        own.data = replace(config.data, folder=f"{config.data.dir}/{name}")
        return own


CONDITIONS = (
    Condition("embedded", "forward", None, CURSE),
    Condition("embedded", "reverse", None, CURSE),
    Condition("embedded-one-order", "forward", None, NO_CURSE),
    Condition("embedded-one-order", "reverse", None, NO_CURSE),
    Condition("embedded", "forward", "generation", BOUND),
)


def run_all(config: Config, seeds: str) -> dict[Condition, dict[int, Evaluation]]:
    """Make data, train and evaluate for each seed and condition; what is there already is read.

    Args:
        seeds: numbers separated by spaces.

    Raises:
        ConfigError: seeds is none or no such text; and what the parts raise.
    """
    words = str(seeds).split()
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"seeds = {seeds!r}: must be numbers separated by spaces, such as '0 1 2'.")
    found: dict[Condition, dict[int, Evaluation]] = {condition: {} for condition in CONDITIONS}
    runs = [(seed, condition) for seed in dict.fromkeys(map(int, words)) for condition in CONDITIONS]
    pace = Pace(len(runs), "runs")
    for number, (seed, condition) in enumerate(runs):
        own = condition.config(config, seed)
        print(f"-- run {number + 1} of {len(runs)}: seed {seed}, {condition.title}; {pace.timing(number)}", flush=True)
        print("\n".join(ensure_data(own)), flush=True)
        pace.start += (run_dir(own) / "final").exists()  # takes no time, and says nothing of the others
        launch(own)
        found[condition][seed] = read_evaluation(evaluate(own), run_dir(own).name)
    return found


def pooled(found: dict[Condition, dict[int, Evaluation]]) -> dict[Condition, Evaluation]:
    """Each condition as one evaluation over its seeds, whose people are people of their own."""
    evaluations = {}
    for condition, by_seed in found.items():
        records = [
            record | {"id": f"seed{seed}/{record['id']}", "entity_id": f"seed{seed}/{record['entity_id']}"}
            for seed, one in by_seed.items()
            for record in one.records
        ]
        first = next(iter(by_seed.values()))
        evaluations[condition] = replace(first, name=condition.title, metrics=metrics(records), records=records)
    return evaluations


def seed_table(config: Config, found: dict[Condition, dict[int, Evaluation]]):
    """A pandas DataFrame, a row a condition and seed, and one over all seeds: accuracy by test (main / control), the
    claim beside the expected one, and how long training took."""
    import pandas

    rows = []
    for condition, by_seed in found.items():
        for seed, one in [*by_seed.items(), ("all", pooled({condition: by_seed})[condition])]:
            row: dict = {"condition": condition.title, "seed": seed}
            for test, groups in one.metrics["none"].items():
                levels = [decimal(groups[group]["accuracy"]) for group in GROUPS if group in groups]
                row[TASK_TYPES[test].title] = " / ".join(levels)
            row |= {"expected": condition.expected, "claim": one.verdict().claim}
            if seed != "all":
                history = read_history(run_dir(condition.config(config, seed)) / "training_history.json")
                row["training"] = duration(sum(record["seconds"] for record in history["epochs"]))
            rows.append(row)
    return pandas.DataFrame(rows).set_index(["condition", "seed"]).fillna("")
