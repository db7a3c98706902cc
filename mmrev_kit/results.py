"""Evaluations as files and tables: what one found, runs side by side, and the result files of the original scripts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mmrev_kit import runs, stats
from mmrev_kit.config import Config, ConfigError, resolve
from mmrev_kit.verdict import Verdict, verdict

TITLES = {"forward": "forward", "reverse": "CW", "mcq_i2d": "I2D", "mcq_d2i": "D2I"}
DIRECTIONS = {
    "forward": "image → description", "reverse": "description → image",
    "mcq_i2d": "image → description", "mcq_d2i": "description → image",
}  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, read back. `records` and `facts` are empty for a file of the original scripts."""

    name: str
    folder: Path
    metrics: dict  # as from `stats.metrics`
    records: list[dict]
    facts: dict
    task: str | None  # what the adapter was trained on; None for a base model


def read_records(path: Path) -> list[dict]:
    """The predictions of an evaluation, one record a question (see `evaluate.predict`).

    Raises:
        ConfigError: no such file, or a line that is no record; the line is named.
    """
    if not path.is_file():
        raise ConfigError(f"There is no evaluation: {path}. Run notebooks/evaluate.ipynb first.")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            record["test"], record["id"], record["right"]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}:{number}: no prediction of this kit ({error}). Evaluate again.") from None
        records.append(record)
    return records


def write_results(folder: Path, task: str | None) -> None:
    """Write metrics.json, and of a trained run verdict.json, beside predictions.jsonl.

    Args:
        task: what the adapter was trained on; None for a base model, on which there is no verdict.
    """
    records = read_records(folder / "predictions.jsonl")
    runs.write_json(folder / "metrics.json", stats.metrics(records))
    if task:
        runs.write_json(folder / "verdict.json", asdict(verdict(records, task)))


def read_evaluation(path: Path, name: str | None = None) -> Evaluation:
    """An evaluation's folder, or an `eval_results*.json` of the original scripts.

    Raises:
        ConfigError: it is neither.
    """
    if path.is_file():
        return Evaluation(name or path.stem, path, read_original(path), [], {}, None)
    records = read_records(path / "predictions.jsonl")
    facts = json.loads((path / "facts.json").read_text(encoding="utf-8"))
    return Evaluation(name or path.parent.parent.name, path, stats.metrics(records), records, facts, facts.get("task"))


def read_original(path: Path) -> dict:
    """The original scripts' results as metrics with what such a file can tell: {"none": {test: {"all": numbers}}}.

    Such a file holds `accuracy`, `correct`, `total` and `examples` for each test. Intervals are Wilson's: which rows
    belong to one entity is not said.

    Raises:
        ConfigError: not such a file, or counts that contradict each other.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        tests = {test: data[test] for test in TITLES if test in data}
        counts = {test: (int(part["correct"]), int(part["total"])) for test, part in tests.items()}
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: no results file of the original scripts ({error!r}).") from None
    if not counts:
        raise ConfigError(f"{path}: none of {', '.join(TITLES)} in it.")
    found = {}
    for test, (correct, total) in counts.items():
        stated = tests[test].get("accuracy")
        if not 0 <= correct <= total or (stated is not None and total and not _same_share(stated, correct / total)):
            raise ConfigError(f"{path}: {test} says {correct} of {total} and accuracy {stated}.")
        chance = stats.CHANCE[test]
        numbers = {"n": total, "n_entities": None, "unparsed": None, "correct": correct, "chance": chance}
        numbers |= {"accuracy": correct / total if total else None, "wilson": stats.wilson(correct, total)}
        numbers |= {"cluster_interval": None, "rates": None, "options": None, "agreement": None, "likeliest": None}
        numbers["p_exact"] = stats.exact_test(correct, total, chance) if chance else None
        found[test] = {"all": numbers | {"p_permutation_holm": None}}
    adjusted = stats.holm({test: groups["all"]["p_exact"] for test, groups in found.items()})
    for test, p in adjusted.items():
        found[test]["all"]["p_exact_holm"] = p
    return {"none": found}


def _same_share(stated: float, share: float) -> bool:
    """Whether a stated accuracy, a share or per cent and perhaps rounded, is this share."""
    return min(abs(stated - share), abs(stated - 100 * share) / 100) < 0.006


def find_evaluations(config: Config, base: Path | None, others: str | None) -> dict[str, Evaluation]:
    """What there is to set side by side: this experiment's forward and reverse run, its base, and files named.

    Args:
        base: the base model's evaluation, if there is one.
        others: evaluation folders or eval_results*.json files, separated by spaces, relative to the project root.

    Raises:
        ConfigError: a named path holds no evaluation.
    """
    experiment, found = config.experiment.name, {}
    for task in ("forward", "reverse"):
        name = f"{experiment}_{task}"
        folder = resolve(config.launch.output_dir) / name / "eval" / experiment
        if (folder / "facts.json").is_file():  # written last: a broken evaluation has none
            found[name] = read_evaluation(folder, name)
    if base:
        found["base"] = read_evaluation(base, "base")
    for path in map(resolve, (others or "").split()):
        found[path.stem] = read_evaluation(path, path.stem)
    return found


# ---- tables


def _interval(numbers: dict) -> str:
    low_high = numbers["cluster_interval"] or numbers["wilson"]
    return f"{low_high[0]:.2f} to {low_high[1]:.2f}" if low_high else ""


def accuracy_table(metrics: dict, drop: str = "none"):
    """A pandas DataFrame, a row a test and group: accuracy with both intervals, chance and p.

    `p` is the permutation test over entities against chance, Holm-adjusted over the tests of the group.
    """
    rows = []
    for test, groups in metrics[drop].items():
        for group, numbers in groups.items():
            if numbers["accuracy"] is None:
                continue
            wilson, likeliest = numbers["wilson"], numbers["likeliest"] or {}
            row = {"test": TITLES[test], "group": group, "rows": numbers["n"], "entities": numbers["n_entities"]}
            row |= {"right": numbers["correct"], "accuracy": numbers["accuracy"]}
            row |= {"Wilson": f"{wilson[0]:.2f} to {wilson[1]:.2f}" if wilson else "", "by entity": _interval(numbers)}
            row |= {"chance": numbers["chance"] or None, "p": numbers["p_permutation_holm"]}
            row |= {"unparsed": numbers["unparsed"], "by likeliest": likeliest.get("accuracy")}
            rows.append(row)
    return _table(rows)


def rates_table(metrics: dict, drop: str = "none"):
    """A pandas DataFrame of CW, a row a group: TPR and FPR of Correct, separation, AUROC, answers' counts."""
    rows = []
    for group, numbers in metrics[drop].get("reverse", {}).items():
        if numbers["rates"]:
            names = {"TPR": "tpr", "FPR": "fpr", "separation": "separation", "AUROC": "auroc"}
            row = {"test": TITLES["reverse"], "group": group} | {n: numbers["rates"][key] for n, key in names.items()}
            rows.append(row | {f"said {answer}": count for answer, count in numbers["rates"]["counts"].items()})
    return _table(rows)


def _table(rows: list[dict]):
    """Rows as a DataFrame by test and group, to three digits, what does not apply left empty."""
    import pandas

    if not rows:
        return pandas.DataFrame()
    return pandas.DataFrame(rows).set_index(["test", "group"]).round(3).astype(object).fillna("")


def side_by_side(evaluations: dict[str, Evaluation]):
    """A pandas DataFrame, a row a test and group, a column an evaluation: accuracy and its interval over entities."""
    import pandas

    cells: dict[tuple[str, str], dict[str, str]] = {}
    for name, found in evaluations.items():
        for test, groups in found.metrics["none"].items():
            for group, numbers in groups.items():
                if numbers["accuracy"] is not None:
                    text = f"{numbers['accuracy']:.2f} ({_interval(numbers)})"
                    cells.setdefault((f"{TITLES[test]}: {DIRECTIONS[test]}", group), {})[name] = text
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
            row = {"test": TITLES[test], "group": group}
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
        ValueError: see `stats.compare`.
    """
    import pandas

    rows = []
    for test, numbers in stats.compare(first.records, second.records).items():
        rows.append(
            {
                "test": TITLES[test],
                "rows": numbers["n"],
                first.name: numbers["accuracy_a"],
                second.name: numbers["accuracy_b"],
                f"only {first.name} right": numbers["b"],
                f"only {second.name} right": numbers["c"],
                "McNemar p (Holm)": numbers["p_mcnemar_holm"],
                "permutation p": numbers["p_permutation"],
            }
        )
    return pandas.DataFrame(rows).set_index("test")


def gate_table(found: Verdict):
    """A pandas DataFrame of a verdict's gates: whether each holds, and the numbers."""
    import pandas

    words = {True: "yes", False: "no", None: "unknown"}
    rows = [{"gate": gate.name, "holds": words[gate.passed], "numbers": gate.text} for gate in found.gates]
    return pandas.DataFrame(rows).set_index("gate")


def verdict_lines(found: Verdict) -> list[str]:
    """The verdict, then the same test in the other format, then the format itself: a line each."""
    lines = [f"VERDICT ({TITLES[found.test]}): {found.claim}. {found.sentence}"]
    if found.beside:
        lines.append(f"Beside it ({TITLES[found.beside.test]}): {found.beside.claim}. {found.beside.sentence}")
    return [*lines, found.format_sentence]
