"""Records in, figures out. Nothing here reads a file or knows a model."""

import math

from mmrev_kit.config.reporting import decimal, loss_text
from mmrev_kit.data.tasks import GENERATION, TASK_TYPES
from mmrev_kit.notebook.drawing import (
    COLORS,
    INK,
    LIMIT,
    SMALL,
    axes_by_test,
    drawn,
    grid,
    log_scale,
    subplots,
    whole_numbers,
)

MARKERS = "osD^vP*X"


def _gaps(values: list) -> list[float]:
    """None becomes NaN, which matplotlib leaves out of a line."""
    return [math.nan if value is None else value for value in values]


def _smooth(values: list[float], window: int) -> list[float]:
    """Mean of each value and those before it within `window`; gaps stay gaps."""
    smooth = []
    for index, value in enumerate(values):
        near = [v for v in values[max(0, index - window + 1) : index + 1] if not math.isnan(v)]
        smooth.append(math.nan if math.isnan(value) else sum(near) / len(near))
    return smooth


def _epoch_ends(history: dict) -> list[float]:
    """The step after which each epoch was validated; the epoch's number where the file has no steps."""
    steps, per_epoch = history["steps"], history.get("steps_per_epoch")
    if not steps:
        return [record["epoch"] for record in history["epochs"]]
    per_epoch = per_epoch or max(1, steps[-1]["global_step"] // max(1, len(history["epochs"])))
    return [record["epoch"] * per_epoch for record in history["epochs"]]


def _draw_losses(axis, histories: dict[str, dict]) -> None:
    alone = len(histories) == 1
    for number, (name, history) in enumerate(histories.items()):
        own = INK if alone else COLORS[number % len(COLORS)]  # several runs: a colour each
        ends = _epoch_ends(history)
        steps = history["steps"]
        label = "training" if alone else name
        if steps:
            losses = _gaps([step["loss"] for step in steps])
            x = [step["global_step"] for step in steps]
            if alone:
                axis.plot(x, losses, color=own, alpha=0.25, linewidth=0.8)
            axis.plot(x, _smooth(losses, max(1, len(x) // 40)), color=own, linewidth=1.2, label=label)
        elif history["epochs"]:
            train = _gaps([record["train_loss"] for record in history["epochs"]])
            axis.plot(ends, train, color=own, label=label)
        sources = list(history["epochs"][0]["val_loss"]) if history["epochs"] else []
        shown = sources if alone else sources[:1]  # several runs: the source that decided
        for index, source in enumerate(shown):
            values = _gaps([record["val_loss"].get(source) for record in history["epochs"]])
            style = {"marker": MARKERS[(index if alone else number) % len(MARKERS)], "markersize": 4}
            style |= {"linestyle": "-", "label": source} if alone else {"linestyle": "--"}
            axis.plot(ends, values, color=COLORS[index % len(COLORS)] if alone else own, **style)
    axis.set_ylabel("loss (nats a token)")
    title = next(iter(histories)) if alone else "line: training; dashed: validation, of the source that decides"
    axis.set_title(title, loc="left", parse_math=False)
    log_scale(axis)


def _draw_rates(axis, histories: dict[str, dict]) -> None:
    told = None
    for number, history in enumerate(histories.values()):
        color = COLORS[number % len(COLORS)]
        steps = [step for step in history["steps"] if step.get("lr") is not None]
        axis.step([s["global_step"] for s in steps], [s["lr"] for s in steps], where="post", color=color)
        for end, record in zip(_epoch_ends(history), history["epochs"], strict=True):
            decision = record["decision"]
            if decision is None or record["lr"] is None:
                continue
            marker, size, own = ("o", 5, color) if decision["improved"] else ("x", 6, LIMIT)
            axis.plot(end, record["lr"], marker, color=own, markersize=size)
            if decision["reduced"] and (end, decision["lr"]) != told:
                told = end, decision["lr"]
                axis.annotate(f"{decision['lr']:g}", (end, record["lr"]), xytext=(4, 5), **SMALL)
    axis.set(ylabel="learning rate", ylim=(0, None))
    axis.margins(y=0.15)
    axis.plot([], [], "o", color=INK, label="improved, saved as best")
    axis.plot([], [], "x", color=LIMIT, label="no improvement")


def _draw_throughput(axis, histories: dict[str, dict]) -> None:
    for number, history in enumerate(histories.values()):
        steps = [step for step in history["steps"] if step.get("samples_per_second")]
        speeds = [step["samples_per_second"] for step in steps]
        x = [step["global_step"] for step in steps]
        axis.plot(x, _smooth(speeds, max(1, len(speeds) // 40)), color=COLORS[number % len(COLORS)])
    axis.set(ylabel="samples/s", ylim=(0, None), xlabel="optimizer step")


def _history_text(name: str, history: dict) -> str:
    """What the figure shows of a run."""
    losses = [step["loss"] for step in history["steps"] if step["loss"] is not None]
    text = f"{name}: {len(history['steps'])} updates"
    text += f", training loss from {loss_text(losses[0])} to {loss_text(losses[-1])}" if losses else ""
    for source in history["epochs"][0]["val_loss"] if history["epochs"] else []:
        values = [record["val_loss"].get(source) for record in history["epochs"]]
        text += f"; validation loss of {source} by epoch {', '.join(map(loss_text, values))}"
    best = [str(one["epoch"]) for one in history["epochs"] if one["decision"] and one["decision"]["improved"]]
    return text + (f"; improved after epoch {', '.join(best)}" if best else "") + "."


@drawn
def history_figure(histories: dict[str, dict]):
    """Loss by source, learning rate with the decisions, and throughput over the steps of one or several runs.

    Args:
        histories: {name: history as from `history.read_history`}; of several runs only the deciding source is drawn.

    Returns:
        A matplotlib Figure. A loss that was not finite is a gap.
    """
    figure, axes = subplots(3, 8.0)
    _draw_losses(axes[0], histories)
    _draw_rates(axes[1], histories)
    _draw_throughput(axes[2], histories)
    for axis in axes[:2]:
        axis.sharex(axes[2])
    if not any(history["steps"] for history in histories.values()):
        axes[2].set_xlabel("epoch")
        axes[2].text(0.5, 0.5, "the file has no steps", transform=axes[2].transAxes, ha="center")
        whole_numbers(axes[2])
    handles = [handle for axis in axes for handle in axis.get_legend_handles_labels()[0]]
    columns = max(1, min(4, 100 // max([len(handle.get_label()) + 8 for handle in handles], default=100)))
    legend = figure.legend(handles=handles, loc="outside lower left", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.alt = " ".join(_history_text(name, history) for name, history in histories.items())
    return figure


@drawn
def losses_figure(losses: list[float]):
    """The training losses of a loop of one's own, each as the mean of it and the four before."""
    figure, (axis,) = subplots(1, 2.8)
    axis.plot(range(1, len(losses) + 1), _smooth(losses, 5), color=COLORS[0])
    axis.set(xlabel="update", ylabel="loss (nats a token)")
    figure.alt = f"Training loss of {len(losses)} updates, from {loss_text(losses[0])} to {loss_text(losses[-1])}."
    return figure


@drawn
def schedule_figure(records: list[dict], min_lr: float, min_val_loss: float):
    """A simulated schedule: the losses put in, the rate each epoch trains with, and where it ends.

    Args:
        records: from `knobs.simulate`.
    """
    figure, axes = subplots(2, 4.2)
    epochs = [record["epoch"] for record in records]
    axes[0].plot(epochs, [record["loss"] for record in records], color=INK)
    for record in records:
        marker, color = ("o", COLORS[0]) if record["improved"] else ("x", LIMIT)
        axes[0].plot(record["epoch"], record["loss"], marker, color=color)
    axes[0].set_ylabel("assumed\nvalidation loss")
    axes[0].set_title("o improved, saved as best      x no improvement", loc="left", fontsize=9)
    axes[1].step([*epochs, epochs[-1] + 1], [r["lr"] for r in records] + [records[-1]["next_lr"]], where="post")
    axes[1].set(ylabel="learning rate", ylim=(0, None))
    end = f"ends after {epochs[-1]}: {records[-1]['stop'] or 'the losses given'}"
    axes[1].set_xlabel(f"epoch; {end}")
    for axis, (name, value) in zip(axes, (("min_val_loss", min_val_loss), ("min_lr", min_lr)), strict=True):
        axis.axhline(value, color=LIMIT, linewidth=0.8, linestyle="--")
        axis.annotate(name, (1, value), (4, 0), xycoords=("axes fraction", "data"), color=LIMIT, va="center", **SMALL)
        axis.set_xlim(epochs[0] - 0.1, epochs[-1] + 1.1)
        whole_numbers(axis)
    told = [f"{r['epoch']}: loss {loss_text(r['loss'])}, rate {r['lr']:g}" for r in records]
    figure.alt = f"A simulated schedule, by epoch {'; '.join(told)}; it {end}."
    return figure


@drawn
def mix_figure(table: list[dict]):
    """The rows of an epoch by source, as one bar.

    Args:
        table: from `Plan.table`.
    """
    figure, (axis,) = subplots(1, 1.9)
    left, total = 0, sum(row["rows per epoch"] for row in table)
    for number, row in enumerate(table):
        rows, color = row["rows per epoch"], COLORS[number % len(COLORS)]
        axis.barh([0], [rows], left=left, color=color, height=0.6, label=row["source"])
        if rows > 0.06 * total:  # else the number is wider than its bar
            text = f"{row['actual share']:.1%}"
            axis.text(left + rows / 2, 0, text, ha="center", va="center", fontsize=8.5, color="white", weight="bold")
        left += rows
    axis.set(yticks=[], ylim=(-0.4, 0.4), xlim=(0, total), xlabel="rows an epoch")
    axis.grid(False)
    figure.legend(loc="outside lower left", ncols=4)
    shares = [f"{row['source']} {row['rows per epoch']:,} rows ({row['actual share']:.1%})" for row in table]
    figure.alt = f"An epoch of {total:,} rows: {', '.join(shares)}."
    return figure


GROUP_STYLES = {"main": ("o", COLORS[0]), "bridge": ("^", COLORS[2]), "control": ("s", COLORS[1]), "all": ("D", INK)}


@drawn
def accuracy_figure(metrics: dict[str, dict]):
    """Accuracy in whole prompts as a table of figures: a row a direction, a column a format.

    Each evaluation stands at its own place with its groups, the intervals over entities and the line of chance.

    Args:
        metrics: {name: as from `metrics.metrics`}. Where entities are unknown the interval is Wilson's.
    """
    names = list(metrics) if len(metrics) == 1 else [str(number) for number in range(1, len(metrics) + 1)]
    figure, axes, left = axes_by_test(6.4)
    key = [f"{number}  {name}" for number, name in zip(names, metrics, strict=True)]
    words = "\n".join(key) if len(key) > 1 else ""
    left.text(-0.15, 1, words, va="top", fontsize=9, parse_math=False, transform=left.transAxes)
    for test, axis in axes.items():
        for x, found in enumerate(metrics.values()):
            _draw_groups(axis, x, found["none"].get(test, {}), crowded=len(metrics) > 2)
        title = f"{TASK_TYPES[test].title}\n{TASK_TYPES[test].direction}"
        axis.set(xlim=(-0.5, max(1, len(metrics)) - 0.5), ylim=(-0.14, 1.19), title=title)
        axis.set_xticks(range(len(metrics)), names)
        axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.50", "0.75", "1"])
        for label in axis.get_xticklabels():
            label.set_parse_math(False)  # a name with dollar signs is text
    tests = [set(groups) for found in metrics.values() for groups in found["none"].values()]
    shown = set().union(*(groups - {"all"} or groups for groups in tests))
    for group, (marker, color) in GROUP_STYLES.items():
        if group in shown:
            left.plot([], [], marker, color=color, label=group)
    left.plot([], [], "--", color=LIMIT, label="chance")
    figure.legend(loc="outside lower left", ncols=4)
    figure.alt = " ".join(_accuracy_text(name, found["none"]) for name, found in metrics.items())
    return figure


def _shown(groups: dict[str, dict]) -> dict[str, dict]:
    """The groups of a test that have an accuracy; `all` only where it is not two groups together."""
    known = {group: numbers for group, numbers in groups.items() if numbers["accuracy"] is not None}
    return {group: numbers for group, numbers in known.items() if group != "all" or len(known) == 1}


def _ends(numbers: dict) -> list[float]:
    return numbers["cluster_interval"] or numbers["wilson"] or [numbers["accuracy"]] * 2


def _accuracy_text(name: str, tests: dict) -> str:
    parts = []
    for test, groups in tests.items():
        told = [
            f"{g} {decimal(n['accuracy'])} ({' to '.join(map(decimal, _ends(n)))})" for g, n in _shown(groups).items()
        ]
        parts += [f"{TASK_TYPES[test].title} {', '.join(told)}"] if told else []
    return f"Accuracy of {name}: {'; '.join(parts)}."


def _draw_groups(axis, place: int, groups: dict[str, dict], crowded: bool) -> None:
    """The groups of one test of one evaluation beside each other; numbers stand clear of intervals and of chance."""
    shown = _shown(groups)
    for number, (group, numbers) in enumerate((group, shown[group]) for group in GROUP_STYLES if group in shown):
        x = place + 0.88 / max(2, len(shown)) * (number - (len(shown) - 1) / 2)
        marker, color = GROUP_STYLES[group]
        low, high = _ends(numbers)
        axis.vlines(x, low, high, color=color, linewidth=2, alpha=0.6)
        axis.plot(x, numbers["accuracy"], marker, color=color, markersize=6)
        height = 0.2 if crowded else 0.12  # of the text, in accuracy
        above = not high - 0.02 < numbers["chance"] < high + height
        aligned = {"xytext": (0, 5 if above else -5), "ha": "center", "va": "bottom" if above else "top"}
        y = max(high, numbers["accuracy"]) if above else min(low, numbers["accuracy"])
        axis.annotate(decimal(numbers["accuracy"]), (x, y), rotation=90 if crowded else 0, **aligned, **SMALL)
        axis.hlines(numbers["chance"], place - 0.45, place + 0.45, color=LIMIT, linestyle="--", linewidth=1)


@drawn
def answers_figure(tests: dict):
    """What was answered against what is right: CW and both multiple-choice tests, a column a test, a row a group.

    Args:
        tests: of one drop, as from `metrics.metrics`.
    """
    tables = {
        test: {group: (n["rates"] or n["options"] or {}).get("confusion") for group, n in groups.items()}
        for test, groups in tests.items()
        if TASK_TYPES[test].format != GENERATION
    }
    groups = [group for group in GROUP_STYLES if any(table.get(group) for table in tables.values())]
    groups = [group for group in groups if group != "all"] or groups
    figure, axes = grid(len(groups), len(tables), 2.4 * len(groups))
    told = []
    for line, group in zip(axes, groups, strict=True):
        for axis, (test, table) in zip(line, tables.items(), strict=True):
            title = f"{TASK_TYPES[test].title}, {group}"
            _draw_confusion(axis, title, table.get(group))
            rows = (table.get(group) or {}).items()
            counts = [f"{right}: {', '.join(f'{a} {n}' for a, n in row.items() if n)}" for right, row in rows]
            told += [f"{title}, right answer: answered. {'; '.join(counts)}."] if counts else []
    figure.alt = " ".join(told)
    return figure


def _draw_confusion(axis, title: str, table: dict[str, dict[str, int]] | None) -> None:
    axis.set_title(title, fontsize=9, loc="left")
    if not table:
        axis.axis("off")
        return
    answers = list(next(iter(table.values())))
    values = [[row[answer] for answer in answers] for row in table.values()]
    axis.imshow(values, cmap="Blues", vmin=0, vmax=max(1, max(map(sum, values))), aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            color = "white" if value > max(map(sum, values)) / 2 else "black"
            axis.text(x, y, str(value), ha="center", va="center", fontsize=9, color=color)
    axis.set_xticks(range(len(answers)), ["?" if answer == "unparsed" else answer for answer in answers], fontsize=8)
    axis.set_yticks(range(len(table)), table, fontsize=8)
    axis.set_xlabel("answered (?: unparsed)", fontsize=8)
    axis.set_ylabel("right answer", fontsize=8)


@drawn
def pretraining_figure(record: dict):
    """The share of whole answers that were right while the embedded model was pretrained, by kind of prompt.

    Args:
        record: with `log`, entries of step, rate, and loss and right by kind of prompt.
    """
    figure, (shares, rates) = subplots(2, 5.4)
    entries = [entry for entry in record["log"] if entry["right"]]
    steps = [entry["step"] for entry in entries]
    names = entries[-1]["right"] if entries else {}
    for number, name in enumerate(names):
        line = "-" if number < len(COLORS) else "--"
        shares.plot(steps, [entry["right"][name] for entry in entries], line, label=name, linewidth=1.2)
    shares.set(ylabel="right as a whole", ylim=(0, 1.02))
    if entries:
        figure.legend(loc="outside lower left", ncols=4, title="task, attributes named")
    rates.plot(steps, [entry["rate"] for entry in entries], color=INK)
    rates.set(ylabel="learning rate", xlabel="step")
    last = ", ".join(f"{name} {decimal(value)}" for name, value in names.items())
    figure.alt = f"Right as a whole after step {steps[-1] if steps else 0}: {last or 'nothing was asked yet'}."
    return figure
