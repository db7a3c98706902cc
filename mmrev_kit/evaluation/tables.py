"""Evaluations as tables."""

from mmrev_kit.data.tasks import TASK_TYPES
from mmrev_kit.evaluation.metrics import compare
from mmrev_kit.evaluation.results import Evaluation
from mmrev_kit.evaluation.verdict import Verdict


def _interval(low_high: list[float] | None) -> str:
    return f"{low_high[0]:.2f} to {low_high[1]:.2f}" if low_high else ""


def _table(rows: list[dict]):
    """Rows as a DataFrame by test, under its title, and group: to three digits, what does not apply left empty."""
    import pandas

    if not rows:
        return pandas.DataFrame()
    rows = [row | {"test": TASK_TYPES[row["test"]].title} for row in rows]
    return pandas.DataFrame(rows).set_index(["test", "group"]).round(3).astype(object).fillna("")


def accuracy_table(metrics: dict):
    """A pandas DataFrame of whole prompts, a row a test and group: accuracy with both intervals, chance and p.

    `p` is the permutation test over entities against chance, Holm-adjusted over the tests of the group.
    """
    return _table(
        [
            {
                "test": test,
                "group": group,
                "rows": numbers["n"],
                "entities": numbers["n_entities"],
                "right": numbers["correct"],
                "accuracy": numbers["accuracy"],
                "Wilson": _interval(numbers["wilson"]),
                "by entity": _interval(numbers["cluster_interval"] or numbers["wilson"]),
                "chance": numbers["chance"] or None,
                "p": numbers["p_permutation_holm"],
                "unparsed": numbers["unparsed"],
                "by likeliest": (numbers["likeliest"] or {}).get("accuracy"),
            }
            for test, groups in metrics["none"].items()
            for group, numbers in groups.items()
            if numbers["accuracy"] is not None
        ]
    )


def rates_table(metrics: dict):
    """A pandas DataFrame of CW (whole prompts), a row a group: TPR, FPR, separation, AUROC, answers' counts."""
    rows = []
    for test, groups in metrics["none"].items():
        for group, rates in ((group, numbers["rates"]) for group, numbers in groups.items() if numbers["rates"]):
            row = {"test": test, "group": group, "TPR": rates["tpr"], "FPR": rates["fpr"]}
            row |= {"separation": rates["separation"], "AUROC": rates["auroc"]}
            rows.append(row | {f"said {answer}": count for answer, count in rates["counts"].items()})
    return _table(rows)


def side_by_side(evaluations: dict[str, Evaluation]):
    """A pandas DataFrame, a row a test and group, a column an evaluation: accuracy and its interval over entities."""
    import pandas

    cells: dict[tuple[str, str], dict[str, str]] = {}
    for name, found in evaluations.items():
        for test, groups in found.metrics["none"].items():
            title = f"{TASK_TYPES[test].title}: {TASK_TYPES[test].direction}"
            for group, numbers in groups.items():
                if numbers["accuracy"] is not None:
                    interval = _interval(numbers["cluster_interval"] or numbers["wilson"])
                    cells.setdefault((title, group), {})[name] = f"{numbers['accuracy']:.2f} ({interval})"
    table = pandas.DataFrame.from_dict(cells, orient="index").reindex(columns=list(evaluations))
    table.index = pandas.MultiIndex.from_tuples(cells, names=["test", "group"])
    return table.fillna("")


def drop_table(metrics: dict):
    """A pandas DataFrame of the ablations: accuracy where the label keeps its meaning, else agreement.

    Agreement is how often the answer is that to the whole prompt.
    """
    rows = []
    for test, groups in metrics["none"].items():
        for group in groups:
            row = {"test": test, "group": group}
            for drop, tests in metrics.items():
                numbers = tests.get(test, {}).get(group)
                if numbers and numbers["accuracy"] is not None:
                    row[f"drop {drop}"] = f"{numbers['accuracy']:.2f} right"
                elif numbers and numbers["agreement"]:
                    row[f"drop {drop}"] = f"{numbers['agreement']['share']:.2f} same answer"
            rows.append(row)
    return _table(rows)


def comparison_table(first: Evaluation, second: Evaluation):
    """A pandas DataFrame: McNemar's exact test (rows) and the permutation test (entities) of two evaluations.

    Raises:
        ValueError: see `metrics.compare`.
    """
    import pandas

    rows = [
        {
            "test": TASK_TYPES[test].title,
            "rows": numbers["n"],
            first.name: numbers["accuracy_a"],
            second.name: numbers["accuracy_b"],
            f"only {first.name} right": numbers["b"],
            f"only {second.name} right": numbers["c"],
            "McNemar p (Holm)": numbers["p_mcnemar_holm"],
            "permutation p": numbers["p_permutation"],
        }
        for test, numbers in compare(first.records, second.records).items()
    ]
    return pandas.DataFrame(rows).set_index("test")


def gate_table(judged: Verdict):
    """A pandas DataFrame of a verdict's gates: whether each holds, and the numbers."""
    import pandas

    words = {True: "yes", False: "no", None: "unknown"}
    rows = [{"gate": gate.name, "holds": words[gate.passed], "numbers": gate.text} for gate in judged.gates]
    return pandas.DataFrame(rows).set_index("gate")


def verdict_lines(judged: Verdict) -> list[str]:
    """The verdict, then the same test in the other format, then the format itself: a line each."""
    parts = {"VERDICT": judged, "Beside it": judged.beside}
    lines = [f"{head} ({TASK_TYPES[v.test].title}): {v.claim}. {v.sentence}" for head, v in parts.items() if v]
    return [*lines, judged.format_sentence]
