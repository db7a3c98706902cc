"""What a sweep found: a table, a figure over the levels, and sweep.csv."""

from pathlib import Path

from mmrev_kit.config.reporting import decimal, duration
from mmrev_kit.data.tasks import GROUPS, TASK_TYPES
from mmrev_kit.evaluation.metrics import of_epoch
from mmrev_kit.evaluation.results import Evaluation, pool
from mmrev_kit.files import write_text
from mmrev_kit.notebook import curves
from mmrev_kit.notebook.sweep_runs import Result
from mmrev_kit.notebook.sweeps import Point, Sweep

FILE = "sweep.csv"
# Of sweep.csv, after the point and its settings; docs in configs/README.md.
COLUMNS = (
    "seed", "epoch", "test", "direction", "format", "group", "n", "people", "accuracy", "low", "high", "auroc", "rate",
    "claim", "error",
)  # fmt: skip


def by_point(results: list[Result]) -> dict[Point, dict[int, Evaluation]]:
    """{point: {seed: evaluation}} of the runs that have one."""
    found: dict[Point, dict[int, Evaluation]] = {result.point: {} for result in results}
    for result in results:
        if result.evaluation:
            found[result.point][result.seed] = result.evaluation
    return found


def pooled(results: list[Result]) -> dict[str, Evaluation]:
    """{point: one evaluation over the people of all its seeds}; a point whose runs all failed has none."""
    return {point.name: pool(point.name, seeds) for point, seeds in by_point(results).items() if seeds}


def settings_of(point: Point) -> dict:
    """What sets a point apart: its level of each axis, and the settings that this means."""
    return point.levels | point.settings


def rows_by_test(start: dict, tests: dict[str, dict[str, dict]]) -> list[dict]:
    """Rows of sweep.csv: a test and group each.

    Args:
        tests: {test: {group: numbers}} of `metrics.metrics`, or of `metrics.of_epoch`.
    """
    rows = []
    for test, groups in tests.items():
        task = TASK_TYPES[test]
        for group, numbers in groups.items():
            low, high = numbers["cluster_interval"] or (None, None)
            rates = numbers["rates"] or {}
            said = rates["counts"]["Correct"] / numbers["n"] if "counts" in rates else rates.get("said_correct")
            rows.append(
                start
                | {"test": test, "direction": task.direction, "format": task.format, "group": group}
                | {"n": numbers["n"], "people": numbers["n_entities"], "accuracy": numbers["accuracy"]}
                | {"low": low, "high": high, "auroc": rates.get("auroc"), "rate": said}
            )
    return rows


def sweep_table(results: list[Result]):
    """A pandas DataFrame, tidy: a row a point, seed, epoch, test and group.

    `epoch` is empty where the written answers of `best/` are judged, and else the epoch after which the likeliest
    options were counted. `seed` is empty for the people of all seeds together. `low` and `high` are the ends of the
    accuracy's 95 % interval over people, `auroc` and `rate`, the share of answers that are Correct, those of CW. A run
    that failed is one row with its `error`.
    """
    import pandas

    rows, names = [], list(dict.fromkeys(name for result in results for name in settings_of(result.point)))
    for result in results:
        start = {"point": result.point.name} | settings_of(result.point) | {"seed": result.seed}
        if result.error:
            rows.append(start | {"error": result.error})
            continue
        rows += rows_by_test(start | {"claim": result.evaluation.verdict().claim}, result.evaluation.metrics["none"])
        for record in result.history["epochs"]:
            rows += rows_by_test(start | {"epoch": record["epoch"]}, of_epoch(record.get("tests", {})))
    for point, seeds in by_point(results).items():
        if seeds:
            one = pool(point.name, seeds)
            start = {"point": point.name} | settings_of(point) | {"claim": one.verdict().claim}
            rows += rows_by_test(start, one.metrics["none"])
    table = pandas.DataFrame(rows, columns=["point", *names, *COLUMNS])
    return table.astype({name: "Int64" for name in ("seed", "epoch", "n", "people")})


def write_csv(sweep: Sweep, results: list[Result]) -> Path:
    """Write `sweep_table` to sweep.csv in the sweep's folder; `pandas.read_csv` reads it."""
    return write_text(sweep.folder / FILE, sweep_table(results).to_csv(index=False))


def claim_table(sweep: Sweep, results: list[Result]):
    """A pandas DataFrame, a row a point over all seeds, and one a seed: the claim, where the file says so the expected
    one, or why a run failed; each group's accuracy by test, in the order of `GROUPS`; how long training took."""
    import pandas

    rows = []
    for point in sweep.points:
        mine = [result for result in results if result.point == point]
        if seeds := by_point(mine).get(point):
            rows.append(_claim_row(sweep, point, "all", pool(point.name, seeds)))
        rows += [_claim_row(sweep, point, one.seed, one.evaluation, one.history, one.error) for one in mine]
    return pandas.DataFrame(rows).set_index(["point", "seed"]).fillna("")


def _claim_row(
    sweep: Sweep, point: Point, seed, one: Evaluation | None, history: dict | None = None, error: str | None = None
) -> dict:
    row: dict = {"point": point.name, "seed": seed}
    row |= {"claim": one.verdict().claim} if one else {"error": error}
    if sweep.file.expected:
        row["expected"] = sweep.file.expected.get(point.name)
    for test, groups in one.metrics["none"].items() if one else ():
        levels = [decimal(groups[group]["accuracy"]) for group in GROUPS if group in groups]
        row[TASK_TYPES[test].title] = " / ".join(levels or [decimal(groups["all"]["accuracy"])])
    if history:
        row["training"] = duration(sum(record["seconds"] for record in history["epochs"]))
    return row


def levels_figure(sweep: Sweep, results: list[Result]):
    """See `curves.levels_figure`: the last axis along x, the levels of the others as lines."""
    *others, axis = sweep.axes or {"": []}
    lines: dict[str, dict] = {}
    for point, seeds in by_point(results).items():
        line = lines.setdefault(", ".join(str(point.levels[name]) for name in others), {})
        if seeds:
            parts = [one.metrics["none"] for one in seeds.values()]
            line[point.levels.get(axis)] = (pool(point.name, seeds).metrics["none"], parts)
    return curves.levels_figure(axis, sweep.axes.get(axis, [None]), lines)
