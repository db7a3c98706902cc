"""Evaluations as files: what one found, runs side by side, and the results of the original scripts."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from operator import ne
from pathlib import Path

from mmrev_kit import files
from mmrev_kit.config.project import experiment_dir, resolve
from mmrev_kit.config.reading import split_paths
from mmrev_kit.config.sections import TASKS, TAUGHT, Config, ConfigError
from mmrev_kit.data.assets import read_asset
from mmrev_kit.data.records import parse_json
from mmrev_kit.data.tasks import CW, TASK_TYPES
from mmrev_kit.evaluation import statistics
from mmrev_kit.evaluation.answers import judge_answer
from mmrev_kit.evaluation.metrics import adjust, metrics
from mmrev_kit.evaluation.verdict import Verdict, verdict

NEEDED = ("id", "entity_id", "group", "drop", "right", "read_as", "answer", "expected", "likeliest_right")
UNKNOWN = (  # numbers of `metrics.metrics` that a file of the original scripts cannot tell
    "n_entities", "unparsed", "cluster_interval", "p_permutation_holm", "rates", "options", "agreement", "likeliest",
)  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, read back. `records` and `facts` are empty for a file of the original scripts."""

    name: str
    folder: Path
    metrics: dict  # as from `metrics.metrics`
    records: list[dict]
    facts: dict  # see `complete`

    @property
    def task(self) -> str | None:
        """What the adapter was trained on; None for a base model."""
        return self.facts.get("task")

    def verdict(self) -> Verdict:
        """The verdict on a trained run, made anew from its records."""
        return _verdict(self.records, self.facts)


def evaluation_dir(config: Config, owner: Path) -> Path:
    """Where an evaluation of `owner`, a run or a base, lies; one of some questions only has a name that says which."""
    part = config.evaluation.partial
    return owner / "eval" / (experiment_dir(config).name + (f",{part}" if part else ""))


def read_records(path: Path) -> list[dict]:
    """The predictions of an evaluation, one record a question (see `predict.predict`).

    Raises:
        ConfigError: no such file, no record in it, or a line that is none; the line is named.
    """
    if not path.is_file():
        raise ConfigError(f"There is no evaluation: {path}. Run notebooks/evaluate.ipynb first.")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            TASK_TYPES[record["test"]], [record[name] for name in NEEDED], list(record["options"])
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}:{number}: no prediction of this kit ({error}). Evaluate again.") from None
        records.append(record)
    if not records:
        raise ConfigError(f"{path}: there is no prediction in it. Evaluate again.")
    return records


def complete(folder: Path, facts: dict) -> None:
    """Write what follows from predictions.jsonl: metrics.json, of a trained run verdict.json, and facts.json last, so
    that a broken evaluation has none.

    Args:
        facts: with `task`, what the adapter was trained on, None for a base model, and `taught`, as in
            `config.sections.ExperimentConfig`; with `unbound`, see `bases.check_base`; with `part` where not all
            questions were asked, and `max_samples` where that left some out.
    """
    records = read_records(folder / "predictions.jsonl")
    said = {name: facts[name] for name in ("unbound", "part") if facts.get(name)}
    files.write_json(folder / "metrics.json", metrics(records) | said)
    if facts.get("task"):
        files.write_json(folder / "verdict.json", asdict(_verdict(records, facts)) | said)
    files.write_json(folder / "facts.json", facts | {"predictions": counted(folder)})


def _verdict(records: list[dict], facts: dict) -> Verdict:
    """The verdict, which says so where only adapter.unbound=true ties the adapter to its base."""
    task = facts.get("task")
    taught = facts.get("taught", "generation" if task == "forward" else None)  # the first version did not say so
    judged = verdict(records, task, taught, facts.get("max_samples"))
    if not facts.get("unbound"):
        return judged
    more = " The adapter is from elsewhere: only adapter.unbound=true ties it to this base."
    first, *beside = (replace(one, sentence=one.sentence + more) for one in (judged, *judged.beside))
    return replace(first, beside=tuple(beside))


def counted(folder: Path) -> dict:
    """How many predictions an evaluation has, and their SHA-256: what facts.json keeps of them."""
    content = (folder / "predictions.jsonl").read_bytes()
    return {"rows": content.count(b"\n"), "sha256": hashlib.sha256(content).hexdigest()}


def read_facts(folder: Path) -> dict:
    """facts.json of an evaluation that is whole; one that was made before facts were counted is taken as it is.

    Raises:
        ConfigError: there is none, it cannot be read, or the predictions are not those that it counts.
    """
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        kept, found = facts.get("predictions"), counted(folder)
        if facts.get("task") not in (None, *TASKS) or facts.get("taught") not in (None, *TAUGHT["forward"]):
            raise ValueError(f"task {facts.get('task')!r}, taught {facts.get('taught')!r}")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder}: no whole evaluation ({error}). Evaluate again.") from None
    if kept and kept != found:
        rows = f"{found['rows']} rows, not the {kept['rows']} that were written, or others"
        raise ConfigError(f"{folder / 'predictions.jsonl'}: {rows}. Evaluate again.")
    return facts


def judge_anew(folder: Path) -> None:
    """Judge the kept answers of a whole evaluation by today's rules; its files change only where that changes one, or
    where one is missing."""
    facts, path = read_facts(folder), folder / "predictions.jsonl"
    records = read_records(path)
    judged = [record | _judged(record) for record in records]
    there = all((folder / name).is_file() for name in ["metrics.json", "verdict.json"][: 2 if facts.get("task") else 1])
    if judged != records or not there:
        (folder / "facts.json").unlink()
        files.write_jsonl(path, judged)
        complete(folder, facts)


def _judged(record: dict) -> dict:
    form, options = TASK_TYPES[record["test"]].format, list(record["options"])
    read, right = judge_answer(form, record["answer"], record["expected"], options)
    return {"read_as": read, "right": None if record["right"] is None else right}


def read_evaluation(path: Path, name: str | None = None) -> Evaluation:
    """An evaluation's folder, its kept answers judged by today's rules, or an `eval_results*.json` of the original
    scripts. The files stay as they are.

    Raises:
        ConfigError: it is neither, or not whole.
    """
    if path.is_file():
        return Evaluation(name or path.stem, path, read_original(path), [], {})
    kept, facts = read_records(path / "predictions.jsonl"), read_facts(path)
    records = [record | _judged(record) for record in kept]
    if changed := sum(map(ne, kept, records)):
        print(f"{path}: {changed:,} of {len(kept):,} kept answers are judged otherwise by today's rules, and so here.")
    name = (name or path.parent.parent.name) + (" (unbound)" if facts.get("unbound") else "")
    return Evaluation(name, path, metrics(records), records, facts)


def pool(name: str, by_seed: dict[int, Evaluation]) -> Evaluation:
    """The evaluations of one condition with several seeds as one, over the people of all seeds, who are people of
    their own in each."""
    records = [
        record | {"id": f"seed{seed}/{record['id']}", "entity_id": f"seed{seed}/{record['entity_id']}"}
        for seed, one in by_seed.items()
        for record in one.records
    ]
    return replace(next(iter(by_seed.values())), name=name, metrics=metrics(records), records=records)


def read_original(path: Path) -> dict:
    """The original scripts' results as metrics with what such a file can tell: {"none": {test: {"all": numbers}}}.

    Such a file holds `accuracy`, `correct`, `total` and `examples` for each test. What it calls reverse was asked with
    the image first, and is read as `cw_image`. Intervals are Wilson's: which rows belong to one entity is not said.

    Raises:
        ConfigError: not such a file, or counts that contradict each other.
    """
    try:
        data = parse_json(path.read_text(encoding="utf-8-sig"))
        tests = {test: part for test, part in data.items() if isinstance(part, dict) and "total" in part}
        counts = {test: (part["correct"], part["total"]) for test, part in tests.items()}
    except (ValueError, AttributeError, KeyError) as error:
        raise ConfigError(f"{path}: no results file of the original scripts ({error!r}).") from None
    if not counts:
        raise ConfigError(f"{path}: none of {', '.join(TASK_TYPES)} in it.")
    if unknown := [test for test in counts if test not in TASK_TYPES]:
        raise ConfigError(f"{path}: {', '.join(unknown)}: no such test; there are {', '.join(TASK_TYPES)}.")
    if {"reverse", "cw_image"} <= counts.keys():
        raise ConfigError(f"{path}: both reverse and cw_image, which is what such files call reverse. Keep one.")
    for test, (correct, total) in counts.items():
        stated, right = tests[test].get("accuracy"), type(correct) is type(total) is int and 0 <= correct <= total
        if right and stated is not None:
            right = type(stated) in (int, float) and (not total or _same_share(stated, correct / total))
        if not right:
            raise ConfigError(f"{path}: {test} says {correct!r} of {total!r} and accuracy {stated!r}.")
    return {"none": _counted({{"reverse": "cw_image"}.get(test, test): pair for test, pair in counts.items()})}


def _counted(counts: dict[str, tuple[int, int]], rates: dict | None = None) -> dict:
    """Metrics of one drop from (right, asked) by test, and TPR and FPR of the CW test where they are known."""
    found = {}
    for test, (correct, total) in counts.items():
        chance = TASK_TYPES[test].chance
        numbers = dict.fromkeys(UNKNOWN) | {"n": total, "correct": correct, "chance": chance}
        numbers |= {"accuracy": correct / total if total else None, "wilson": statistics.wilson(correct, total)}
        numbers["p_exact"] = statistics.exact_test(correct, total, chance) if chance else None
        found[test] = {"all": numbers | ({"rates": rates} if rates and TASK_TYPES[test].format == CW else {})}
    adjust({test: groups["all"] for test, groups in found.items()}, "p_exact")
    return found


def published() -> dict[str, Evaluation]:
    """The published results of the original scripts, by run; `facts` holds what they can and cannot show."""
    asset, found = read_asset("published"), {}
    for run in asset["runs"]:
        rates = {"none": run.get("rates")}  # known of whole prompts
        numbers = {drop: _counted(counts, rates.get(drop)) for drop, counts in run["drops"].items()}
        found[run["name"]] = Evaluation(run["name"], Path("published"), numbers, [], {"note": asset["note"]})
    return found


def _same_share(stated: float, share: float) -> bool:
    """Whether a stated accuracy, a share or per cent and perhaps rounded, is this share."""
    return min(abs(stated - share), abs(stated - 100 * share) / 100) < 0.006


def find_evaluations(
    config: Config, base: Path | None, others: str | None, own: Path | None = None
) -> dict[str, Evaluation]:
    """What there is to set side by side: this experiment's forward and reverse run, its base, and files named.

    Args:
        own: the evaluation that the others stand beside, where it is none of these: of an adapter from elsewhere.
        base: the base model's evaluation, if there is one.
        others: evaluation folders or eval_results*.json files, separated by spaces and quoted where they hold some,
            relative to the project root; the word `published` stands for `published`.

    Raises:
        ConfigError: a named path holds no evaluation, or is named twice.
    """
    found = {}
    for task in TASKS:
        name = f"{config.experiment.name}_{task}"
        folder = evaluation_dir(config, resolve(config.launch.output_dir) / name)
        if (folder / "facts.json").is_file():  # written last: a broken evaluation has none
            found[name] = read_evaluation(folder, name)
    if own and all(one.folder != own for one in found.values()):
        mine = read_evaluation(own)
        found = {mine.name: mine} | found
    if base:
        found["base"] = read_evaluation(base, "base")
    for word in split_paths(others, "compare"):
        more = published().values() if word == "published" else [read_evaluation(resolve(word))]
        for one in more:
            place = one.folder.parent.name if one.folder.is_file() else one.folder.name
            names = one.name, f"{one.name} ({place})", str(one.folder)  # the last is its own alone
            name = next((name for name in names if name not in found), None)
            if name is None:
                raise ConfigError(f"compare names {one.folder} twice.")
            found[name] = replace(one, name=name)
    return found
