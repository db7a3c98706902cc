"""A run's history as tables and a sentence."""

from collections import Counter

from mmrev_kit.config.project import resolve
from mmrev_kit.config.reading import split_paths
from mmrev_kit.config.reporting import decimal, duration, loss_text
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.training.history import read_history


def epoch_table(history: dict):
    """A pandas DataFrame with one row an epoch: training loss, validation loss by source, rate, decision."""
    import pandas

    rows = []
    for record in history["epochs"]:
        decision = record["decision"] or {}
        verdict = "improved" if decision.get("improved") else "no improvement" if decision else ""
        if decision.get("reduced"):
            verdict += f", rate to {decision['lr']:g}"
        losses = {f"validation {source}": loss for source, loss in record["val_loss"].items()}
        losses = {"training": record["train_loss"]} | losses
        losses = {name: "" if loss is None else loss_text(loss) for name, loss in losses.items()}
        lr = "" if record["lr"] is None else f"{record['lr']:g}"
        rows.append({"epoch": record["epoch"]} | losses | {"lr": lr, "decision": verdict})
    return pandas.DataFrame(rows).set_index("epoch").fillna("") if rows else pandas.DataFrame()


def mix_table(table: list[dict]):
    """A pandas DataFrame of `MixingPlan.table`, a row a source."""
    import pandas

    found = pandas.DataFrame(table).set_index("source")
    shares = {name: found[name].map("{:.1%}".format) for name in ("asked share", "actual share")}
    return found.assign(**shares, **{"uses of each row": found["uses of each row"].map(decimal)})


def summary(history: dict) -> str:
    """The result of a run in a sentence, and in another what it took."""
    losses = [(next(iter(record["val_loss"].values())), record["epoch"]) for record in history["epochs"]]
    finite = [pair for pair in losses if pair[0] is not None]
    if not finite:
        return f"The run has no validation loss yet ({history['status']})."
    source = next(iter(history["epochs"][0]["val_loss"]))
    loss, epoch = min(finite)
    best = max((r["epoch"] for r in history["epochs"] if (r["decision"] or {}).get("improved")), default=epoch)
    little = "That is too little lower to count (training.improvement_threshold)"
    kept = "" if best == epoch else f" {little}: best/ is of epoch {best}."
    how = {"finished": "ended", "failed": "failed", "interrupted": "was interrupted"}.get(history["status"], "is")
    reason = f" ({history['reason']})" if history["reason"] else ""
    return (
        f"The run {how} after epoch {history['epochs'][-1]['epoch']}{reason}; "
        f"its lowest validation loss on {source} rows is {loss_text(loss)}, after epoch {epoch}."
        f"{kept}{_effort(history)}"
    )


def _effort(history: dict) -> str:
    """Duration, samples and peak memory, as far as the history knows them."""
    steps = history["steps"]
    seconds = steps[-1].get("seconds") if steps else None
    seconds = max(seconds or 0.0, sum(record.get("seconds", 0.0) for record in history["epochs"]))
    samples = sum(step.get("samples", 0) for step in steps)
    peak = max((step.get("peak_memory_gib") or 0.0 for step in steps), default=0.0)
    parts = [f"took {duration(seconds)}"] if seconds else []
    parts += [f"saw {samples:,} samples ({decimal(samples / seconds, 1)} a second)"] if samples and seconds else []
    parts += [f"used at most {decimal(peak)} GiB of memory in a process"] if peak else []
    return f" It {', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}." if parts else ""


def find_histories(paths: str | None, output_dir: str) -> dict[str, dict]:
    """{run name: history} of the given run folders or history files, or of every run in `output_dir`.

    Args:
        paths: as `split_paths` reads them, relative to the project root; None for all.

    Raises:
        ConfigError: a path without a history, or no run at all.
    """
    if paths:
        files = [resolve(path) for path in split_paths(paths, "histories")]
        files = [file / "training_history.json" if file.is_dir() else file for file in files]
    else:
        files = sorted(resolve(output_dir).glob("*/training_history.json"))
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        where = ", ".join(missing) if missing else f"No run in {resolve(output_dir)}."
        raise ConfigError(f"There is no training history: {where} Train first with notebooks/train.ipynb.")
    files = list(dict.fromkeys(files))
    alike = Counter(file.parent.name for file in files)  # runs of one name in several folders are told by their paths
    named = {str(file) if alike[file.parent.name] > 1 else file.parent.name: file for file in files}
    return {name: read_history(file) for name, file in named.items()}
