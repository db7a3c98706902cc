"""Evaluations as tables."""

from mmrev_kit.config.reporting import decimal, probability
from mmrev_kit.data.tasks import CHOICE, CW, GENERATION, GROUPS, IMAGE_TO_TEXT, TASK_TYPES, TEXT_TO_IMAGE
from mmrev_kit.evaluation.metrics import compare
from mmrev_kit.evaluation.results import Evaluation
from mmrev_kit.evaluation.verdict import INCONCLUSIVE, Verdict


def _interval(low_high: list[float] | None) -> str:
    return " to ".join(map(decimal, low_high)) if low_high else ""


def _said(row: dict) -> dict:
    """The row's numbers as they are said: p values in three digits, other fractions in two, what is unknown empty."""

    def word(name: str, value):
        if isinstance(value, float) or value is None:
            return probability(value) if "p" in name.split() else decimal(value)
        return value

    return {name: word(name, value) for name, value in row.items()}


def _table(rows: list[dict]):
    """Rows as a DataFrame by test, under its title, and group; what does not apply is left empty."""
    import pandas

    if not rows:
        return pandas.DataFrame()
    rows = [_said(row | {"test": TASK_TYPES[row["test"]].title}) for row in rows]
    return pandas.DataFrame(rows).set_index(["test", "group"]).astype(object).fillna("")


def _cell(numbers: dict) -> str:
    """A group's accuracy and interval in one test, in CW with TPR, FPR and AUROC as far as they are known."""
    if numbers["accuracy"] is None:
        return ""
    rates = {name: (numbers["rates"] or {}).get(name.lower()) for name in ("TPR", "FPR", "AUROC")}
    more = "".join(f", {name} {decimal(value)}" for name, value in rates.items() if value is not None)
    return f"{decimal(numbers['accuracy'])} ({_interval(numbers['cluster_interval'] or numbers['wilson'])}){more}"


def direction_table(evaluations: dict[str, Evaluation]):
    """A pandas DataFrame of whole prompts: a row an evaluation, direction and group, a column a format; see `_cell`.

    The group `all` stands where no entity's group is known.
    """
    import pandas

    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for name, found in evaluations.items():
        tests = found.metrics["none"]
        known = {group for groups in tests.values() for group in (groups if len(groups) == 1 else {*groups} - {"all"})}
        shown = sorted(known, key=[*GROUPS, "all"].index)
        for direction in (IMAGE_TO_TEXT, TEXT_TO_IMAGE):
            for group in shown:
                row = cells[name, direction, group] = dict.fromkeys((GENERATION, CW, CHOICE), "")
                for test, groups in tests.items():
                    if TASK_TYPES[test].direction == direction and group in groups:
                        row[TASK_TYPES[test].format] = _cell(groups[group])
    table = pandas.DataFrame.from_dict(cells, orient="index")
    table.index = pandas.MultiIndex.from_tuples(cells, names=["evaluation", "direction", "group"])
    return table


def notes(evaluations: dict[str, Evaluation]) -> list[str]:
    """What is to be known about evaluations that were made elsewhere, or in part."""
    said = (one.facts.get(name) for one in evaluations.values() for name in ("note", "part"))
    return list(dict.fromkeys(filter(None, said)))


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
            row["AUROC, one-sided bounds"] = _interval(rates["auroc_bounds"])
            rows.append(row | {f"said {answer}": count for answer, count in rates["counts"].items()})
    return _table(rows)


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
                    row[f"drop {drop}"] = f"{decimal(numbers['accuracy'])} right"
                elif numbers and numbers["agreement"]:
                    row[f"drop {drop}"] = f"{decimal(numbers['agreement']['share'])} same answer"
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
    return pandas.DataFrame(map(_said, rows)).set_index("test")


def gate_table(judged: Verdict):
    """A pandas DataFrame of a verdict's gates: whether each holds, and the numbers."""
    import pandas

    words = {True: "yes", False: "no", None: "unknown"}
    rows = [{"gate": gate.name, "holds": words[gate.passed], "numbers": gate.text} for gate in judged.gates]
    return pandas.DataFrame(rows).set_index("gate")


def verdict_lines(judged: Verdict) -> list[str]:
    """The verdict, then those on other formats: a line each."""
    lines = []
    for head, one in [("VERDICT", judged), *(("Beside it", other) for other in judged.beside)]:
        # the sentence of an inconclusive one says that itself, with the reason
        words = one.sentence if one.claim != INCONCLUSIVE else one.sentence[0].lower() + one.sentence[1:]
        lines.append(f"{head} ({TASK_TYPES[one.test].title}): {f'{one.claim}. ' * (one.claim != INCONCLUSIVE)}{words}")
    return lines
