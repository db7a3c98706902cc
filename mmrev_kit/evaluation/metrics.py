"""Counts and accuracies over the records of an evaluation."""

from collections import Counter
from collections.abc import Iterable

from mmrev_kit.data.tasks import CHOICE, CW, GENERATION, GROUPS, LETTERS, TASK_TYPES
from mmrev_kit.evaluation import statistics
from mmrev_kit.evaluation.statistics import entity_means, permutation_above_chance

AUROC_CONFIDENCE = 0.9  # of a two-sided interval, each end of which is a one-sided 95 % bound


def _share(hits: float, n: int) -> float | None:
    return hits / n if n else None


def _counts(records: list[dict], names: Iterable[str]) -> dict[str, int]:
    reads = [record["read_as"] for record in records]
    return {name: reads.count(name) for name in names} | {"unparsed": reads.count(None)}


def _auroc(by_entity: dict[object, float], rows: float) -> dict:
    bounds = statistics.mean_interval(by_entity, rows, AUROC_CONFIDENCE)
    return {"auroc": _share(sum(by_entity.values()), len(by_entity)), "auroc_bounds": bounds}


def rates(records: list[dict]) -> dict:
    """CW rows: accuracy, TPR and FPR of the answer Correct, separation TPR - FPR, AUROC, and the answers' counts.

    An unparsed answer is neither Correct nor Wrong, and stays in every denominator. `auroc` is the mean over entities
    (`statistics.entity_aurocs`), `auroc_bounds` its one-sided 95 % bounds. Rows whose label lost its meaning (right is
    None) are only counted.
    """
    scored = [record for record in records if record["right"] is not None]
    sides = {side: [row for row in scored if row["expected"] == side] for side in ("Correct", "Wrong")}
    said = {side: sum(row["read_as"] == "Correct" for row in rows) for side, rows in sides.items()}
    tpr, fpr = (_share(said[side], len(sides[side])) for side in sides)
    return {
        "accuracy": _share(sum(row["right"] for row in scored), len(scored)),
        "tpr": tpr,
        "fpr": fpr,
        "separation": None if tpr is None or fpr is None else tpr - fpr,
        **_auroc(*statistics.entity_aurocs(scored)),
        "counts": _counts(records, ("Correct", "Wrong")),
        "confusion": {side: _counts(rows, sides) for side, rows in sides.items()},
    }


def option_counts(records: list[dict]) -> dict:
    """Multiple-choice rows: answers by letter; of scored rows, right letters and {right letter: {answer: rows}}."""
    scored = [record for record in records if record["right"] is not None]
    return {
        "predicted": _counts(records, LETTERS),
        "expected": {letter: sum(row["expected"] == letter for row in scored) for letter in LETTERS},
        "confusion": {side: _counts([row for row in scored if row["expected"] == side], LETTERS) for side in LETTERS},
    }


def _key(record: dict) -> tuple:
    return record["test"], record["id"], tuple(record.get("order") or ())


def check_records(records: list[dict]) -> None:
    """Make sure that every record counts, and counts once.

    Raises:
        ValueError: a group that does not exist, an entity in two, a whole prompt's answer that is neither right nor
            wrong, or one question with two answers under one drop: two evaluations were mixed.
    """
    groups: dict[object, str] = {}
    for record in records:
        name, group = f"{record['test']} {record['id']}", record["group"]
        if group not in GROUPS or groups.setdefault(record["entity_id"], group) != group:
            raise ValueError(f"{name}: {record['entity_id']} is in the group {group!r}: one of {', '.join(GROUPS)}.")
        if not isinstance(record["right"], bool) and not (record["right"] is None and record["drop"] != "none"):
            raise ValueError(f"{name}: right is {record['right']!r}: true or false; null only where a part is dropped.")
    for (drop, test, question, _), n in Counter((record["drop"], *_key(record)) for record in records).items():
        if n > 1:
            raise ValueError(
                f"{test} {question} (drop {drop}) has {n} answers: these are records of more than one evaluation. "
                "Give one at a time, or two to `compare`."
            )


def score(records: list[dict], field: str, chance: float) -> dict:
    """Accuracy by `field` with its intervals and its p against chance; all None where no row is scored.

    `wilson` and `p_exact` count rows, and are None where one question is asked in several option orders, which are
    no independent observations. `cluster_interval` and `p_permutation` take the entity as the unit. At chance 0 there
    is no test: a single right answer would refute it.
    """
    rows = [record for record in records if record[field] is not None]
    means, correct = entity_means(rows, field), sum(bool(row[field]) for row in rows)
    single, tested = len({row["id"] for row in rows}) == len(rows), 0 < chance < 1
    return {
        "correct": correct if rows else None,
        "accuracy": _share(correct, len(rows)),
        "wilson": statistics.wilson(correct, len(rows)) if single else None,
        "cluster_interval": statistics.mean_interval(means, statistics.rows_each(rows, field)),
        "chance": chance if rows else None,
        "p_exact": statistics.exact_test(correct, len(rows), chance) if single and tested else None,
        "p_permutation": permutation_above_chance(means, chance) if tested else None,
    }


def chance_of(test: str, records: list[dict]) -> float:
    """The accuracy of a guess; of forward generation a guess among each row's options, the descriptions of its group.

    That is stricter than 0: a model that learned the descriptions but not whose they are would reach it, and against
    0 the sign-flip test would take a few lucky hits for knowledge.
    """
    task = TASK_TYPES[test]
    sizes = [len(record["options"]) for record in records]
    if task.format != GENERATION or not sizes:
        return task.chance
    return sum(1 / size for size in sizes if size) / len(sizes)


def adjust(tests: dict[str, dict], name: str) -> None:
    """Put the Holm adjustment of the p values under `name` beside them, as <name>_holm; the family is all tests."""
    for test, p in statistics.holm({test: numbers[name] for test, numbers in tests.items()}).items():
        tests[test][f"{name}_holm"] = p


def agreement(records: list[dict], whole: dict[tuple, str | None]) -> dict | None:
    """How often the answer is that to the whole prompt (`whole`, by `_key`); two unparsed ones count as the same.

    n, same, share, wilson and cluster_interval as in `score`; None where no row was asked whole.
    """
    rows = [row | {"same": row["read_as"] == whole[_key(row)]} for row in records if _key(row) in whole]
    if not rows:
        return None
    found = score(rows, "same", 0.0)
    intervals = {name: found[name] for name in ("wilson", "cluster_interval")}
    return {"n": len(rows), "same": found["correct"], "share": found["accuracy"], **intervals}


def _cell(records: list[dict], whole: dict[tuple, str | None]) -> dict:
    task, dropped = TASK_TYPES[records[0]["test"]], records[0]["drop"] != "none"
    return {
        "n": len(records),
        "n_questions": len({record["id"] for record in records}),
        "n_entities": len({record["entity_id"] for record in records}),
        "unparsed": sum(record["read_as"] is None for record in records),
        **score(records, "right", task.chance),
        "likeliest": score(records, "likeliest_right", chance_of(task.name, records)),
        "rates": rates(records) if task.format == CW else None,
        "options": option_counts(records) if task.format == CHOICE else None,
        "agreement": agreement(records, whole) if dropped else None,
    }


def metrics(records: Iterable[dict]) -> dict:
    """All numbers of one evaluation as strict JSON: {drop: {test: {group: numbers}}}.

    Groups are `all` and those present. The numbers: n (rows), n_questions, n_entities, unparsed, those of `score` by
    the written answer and, under `likeliest`, by the likeliest option (forward: among its group's descriptions),
    `rates` for CW, `options` for multiple choice, `agreement` under a drop. Each p comes with its Holm adjustment
    over the tests of the same drop and group, `p_exact_holm` and `p_permutation_holm`. What does not apply is None;
    so are accuracies under a drop that takes the label's meaning.

    Raises:
        ValueError: see `check_records`.
    """
    records = list(records)
    check_records(records)
    whole = {_key(record): record["read_as"] for record in records if record["drop"] == "none"}
    cells: dict[tuple[str, str, str], list[dict]] = {}
    for record in records:
        for group in ("all", record["group"]):
            cells.setdefault((record["drop"], record["test"], group), []).append(record)
    result: dict = {}
    for (drop, test, group), rows in cells.items():
        result.setdefault(drop, {}).setdefault(test, {})[group] = _cell(rows, whole)
    for tests in result.values():
        for group in {group for groups in tests.values() for group in groups}:
            found = {test: groups[group] for test, groups in tests.items() if group in groups}
            for part in (found, {test: numbers["likeliest"] for test, numbers in found.items()}):
                for name in ("p_exact", "p_permutation"):
                    adjust(part, name)
    return result


def compare(a_records: Iterable[dict], b_records: Iterable[dict]) -> dict:
    """Two evaluations of the same questions, whole prompts only: {test: numbers}.

    The numbers: n (rows in both), only_a, only_b (rows in one), accuracy_a, accuracy_b, b (only a right), c (only b
    right), p_mcnemar (rows; None with several option orders) with p_mcnemar_holm over the tests, and p_permutation:
    two-sided sign-flip test of the entities' mean differences.

    Raises:
        ValueError: no row in common, one row with two questions, or `check_records`.
    """
    sides = []
    for records in map(list, (a_records, b_records)):
        check_records(records)
        sides.append({_key(record): record for record in records if record["drop"] == "none"})
    a, b = sides
    common = [key for key in a if key in b]
    if not common:
        raise ValueError(f"The evaluations share no question ({len(a)} and {len(b)} rows): not the same experiment.")
    for key in common:
        if any(a[key].get(name) != b[key].get(name) for name in ("entity_id", "expected", "prompt")):
            raise ValueError(f"{key[0]} {key[1]} asks another question in each evaluation: not the same experiment.")
    found = {}
    for test in dict.fromkeys(key[0] for key in [*a, *b]):
        keys = [key for key in common if key[0] == test]
        pairs = [(bool(a[key]["right"]), bool(b[key]["right"])) for key in keys]
        only = [sum(key[0] == test and key not in other for key in side) for side, other in ((a, b), (b, a))]
        first, second = pairs.count((True, False)), pairs.count((False, True))
        single = len({key[1] for key in keys}) == len(keys)
        rows = [a[key] | {"gain": x - y} for key, (x, y) in zip(keys, pairs, strict=True)]
        gains = entity_means(rows, "gain").values()
        tails = [permutation_above_chance(signed, 0.0) for signed in (gains, [-gain for gain in gains])]
        found[test] = {
            "n": len(keys), "only_a": only[0], "only_b": only[1],
            "accuracy_a": _share(sum(x for x, _ in pairs), len(pairs)),
            "accuracy_b": _share(sum(y for _, y in pairs), len(pairs)),
            "b": first, "c": second,
            "p_mcnemar": statistics.mcnemar(first, second) if keys and single else None,
            "p_permutation": min(1.0, 2 * min(tails)) if keys else None,
        }  # fmt: skip
    adjust(found, "p_mcnemar")
    return found


def of_epoch(tests: dict[str, dict[str, dict]]) -> dict[str, dict[str, dict]]:
    """One epoch's tests of a training history (see `training.by_epoch.count`) as {test: {group: numbers}}.

    The numbers, by the likeliest option: n (rows), n_entities, accuracy, cluster_interval and chance as `score` has
    them, and for CW `rates` with auroc and auroc_bounds as in `rates` and `said_correct`, the share of Correct.
    """
    found: dict[str, dict[str, dict]] = {}
    for test, people in tests.items():
        for group in sorted({person["group"] for person in people.values()}, key=GROUPS.index):
            mine = {name: person for name, person in people.items() if person["group"] == group}
            asked, right = ([person[key] for person in mine.values()] for key in ("asked", "right"))
            means = {name: person["right"] / person["asked"] for name, person in mine.items()}
            task = TASK_TYPES[test]
            found.setdefault(test, {})[group] = {
                "n": sum(asked),
                "n_entities": len(mine),
                "accuracy": sum(right) / sum(asked),
                "cluster_interval": statistics.mean_interval(means, statistics.harmonic_mean(asked)),
                "chance": task.chance or 1 / len(mine),  # a guess among the descriptions of the group
                "rates": _epoch_rates(mine) if task.format == CW else None,
            }
    return found


def _epoch_rates(people: dict[str, dict]) -> dict:
    margins = {name: person["margins"] for name, person in people.items()}
    said = [margin >= 0 for sides in margins.values() for rows in sides.values() for margin in rows]
    return _auroc(*statistics.aurocs_of(margins)) | {"said_correct": sum(said) / len(said)}
