"""Records in, figures out. Nothing here reads a file or knows a model."""

import math

from mmrev_kit.data.tasks import GENERATION, TASK_TYPES

MARKERS = "osD^vP*X"
SMALL = {"fontsize": 7, "textcoords": "offset points"}


def subplots(rows: int, width: float, height: float):
    """A closed matplotlib Figure of `rows` plain axes, one below the other, and the axes; inches."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, 1, figsize=(width, height), squeeze=False, layout="constrained")
    pyplot.close(figure)  # a notebook shows the figure once, as the value of its cell
    for axis in axes[:, 0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    return figure, axes[:, 0]


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
        own = "0.45" if alone else f"C{number % 10}"  # several runs: a colour each
        ends = _epoch_ends(history)
        steps = history["steps"]
        prefix = "" if alone else f"{name}: "
        if steps:
            losses = _gaps([step["loss"] for step in steps])
            x = [step["global_step"] for step in steps]
            axis.plot(x, losses, color=own, alpha=0.25, linewidth=0.8)
            axis.plot(x, _smooth(losses, max(1, len(x) // 40)), color=own, linewidth=1.2, label=f"{prefix}training")
        elif history["epochs"]:
            train = _gaps([record["train_loss"] for record in history["epochs"]])
            axis.plot(ends, train, color=own, label=f"{prefix}training")
        sources = list(history["epochs"][0]["val_loss"]) if history["epochs"] else []
        shown = sources if alone else sources[:1]  # several runs: the source that decided
        for index, source in enumerate(shown):
            values = _gaps([record["val_loss"].get(source) for record in history["epochs"]])
            style = {"marker": MARKERS[index % len(MARKERS)], "markersize": 4, "linestyle": "-" if alone else "--"}
            axis.plot(ends, values, color=f"C{index % 10}" if alone else own, label=f"{prefix}{source}", **style)
    axis.set(ylabel="loss (nats a token)", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="y", which="minor", labelsize=8)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)


def _draw_rates(axis, histories: dict[str, dict]) -> None:
    for number, (name, history) in enumerate(histories.items()):
        color = f"C{number % 10}"
        steps = [step for step in history["steps"] if step.get("lr") is not None]
        axis.step([s["global_step"] for s in steps], [s["lr"] for s in steps], where="post", color=color, label=name)
        for end, record in zip(_epoch_ends(history), history["epochs"], strict=True):
            decision = record["decision"]
            if decision is None or record["lr"] is None:
                continue
            marker, size, own = ("o", 5, color) if decision["improved"] else ("x", 6, "C3")
            axis.plot(end, record["lr"], marker, color=own, markersize=size)
            if decision["reduced"]:
                axis.annotate(f"{decision['lr']:g}", (end, record["lr"]), xytext=(3, 4), **SMALL)
    axis.set(ylabel="learning rate", ylim=(0, None))
    axis.plot([], [], "o", color="0.3", label="improved, saved as best")
    axis.plot([], [], "x", color="C3", label="no improvement")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)


def _draw_throughput(axis, histories: dict[str, dict]) -> None:
    for number, history in enumerate(histories.values()):
        steps = [step for step in history["steps"] if step.get("samples_per_second")]
        speeds = [step["samples_per_second"] for step in steps]
        x = [step["global_step"] for step in steps]
        axis.plot(x, _smooth(speeds, max(1, len(speeds) // 40)), color=f"C{number % 10}")
    axis.set(ylabel="samples/s", ylim=(0, None), xlabel="optimizer step")


def history_figure(histories: dict[str, dict]):
    """Loss by source, learning rate with the decisions, and throughput over the steps of one or several runs.

    Args:
        histories: {name: history as from `history.read_history`}; of several runs only the deciding source is drawn.

    Returns:
        A matplotlib Figure. A loss that was not finite is a gap.
    """
    figure, axes = subplots(3, 9, 8)
    axes[0].set_title(", ".join(histories), loc="left", fontsize=10)
    _draw_losses(axes[0], histories)
    _draw_rates(axes[1], histories)
    _draw_throughput(axes[2], histories)
    for axis in axes[:2]:
        axis.sharex(axes[2])
    if not any(history["steps"] for history in histories.values()):
        axes[2].set_xlabel("epoch")
        axes[2].text(0.5, 0.5, "the file has no steps", transform=axes[2].transAxes, ha="center", color="0.5")
    return figure


def schedule_figure(records: list[dict], min_lr: float, min_val_loss: float):
    """A simulated schedule: the losses put in, the rate each epoch trains with, and where it ends.

    Args:
        records: from `knobs.simulate`.
    """
    figure, axes = subplots(2, 7, 4)
    epochs = [record["epoch"] for record in records]
    axes[0].plot(epochs, [record["loss"] for record in records], color="0.45")
    for record in records:
        marker, color = ("o", "C0") if record["improved"] else ("x", "C3")
        axes[0].plot(record["epoch"], record["loss"], marker, color=color)
    axes[0].set_ylabel("assumed\nvalidation loss")
    axes[0].set_title("o improved, saved as best      x no improvement", loc="left", fontsize=8)
    axes[1].step([*epochs, epochs[-1] + 1], [r["lr"] for r in records] + [records[-1]["next_lr"]], where="post")
    axes[1].set(ylabel="learning rate", ylim=(0, None))
    axes[1].set_xlabel(f"epoch; ends after {epochs[-1]}: {records[-1]['stop'] or 'the losses given'}")
    limits = (("min_val_loss", min_val_loss, "C2"), ("min_lr", min_lr, "C3"))
    for axis, (name, value, color) in zip(axes, limits, strict=True):
        axis.axhline(value, color=color, linewidth=0.8, linestyle="--")
        axis.annotate(name, (epochs[0], value), fontsize=7, color=color, va="bottom")
    return figure


def mix_figure(table: list[dict]):
    """The rows of an epoch by source, as one bar.

    Args:
        table: from `Plan.table`.
    """
    figure, (axis,) = subplots(1, 9, 1.6)
    left = 0
    for number, row in enumerate(table):
        axis.barh([0], [row["rows per epoch"]], left=left, color=f"C{number}", height=0.6, label=row["source"])
        text = f"{row['actual share']:.1%}"
        axis.text(left + row["rows per epoch"] / 2, 0, text, ha="center", va="center", fontsize=8, color="white")
        left += row["rows per epoch"]
    axis.set(yticks=[], ylim=(-0.4, 0.4), xlabel="rows an epoch")
    axis.grid(False)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), frameon=False, fontsize=8)
    return figure


GROUP_STYLES = {"main": ("o", "C0"), "control": ("s", "C1"), "all": ("D", "0.35")}


def accuracy_figure(metrics: dict[str, dict]):
    """Accuracy in whole prompts as a table of figures: a row a direction, a column a format.

    Each evaluation stands at its own place with its groups, the intervals over entities and the line of chance.

    Args:
        metrics: {name: as from `metrics.metrics`}. Where entities are unknown the interval is Wilson's.
    """
    from matplotlib import pyplot

    cells = {(task.direction, task.format): task for task in TASK_TYPES.values()}
    directions, formats = (list(dict.fromkeys(key[side] for key in cells)) for side in (0, 1))
    size = (3 + (1.6 + 0.6 * len(metrics)) * len(formats), 5.5)
    names = list(metrics) if len(metrics) == 1 else [str(number) for number in range(1, len(metrics) + 1)]
    figure, axes = pyplot.subplots(len(directions), len(formats), figsize=size, squeeze=False, layout="constrained")
    pyplot.close(figure)
    for line, direction in zip(axes, directions, strict=True):
        for axis, form in zip(line, formats, strict=True):
            if (direction, form) not in cells:
                axis.axis("off")
                key = [f"{number}  {name}" for number, name in zip(names, metrics, strict=True)]
                axis.text(0, 1, "\n".join(key if len(key) > 1 else []), va="top", fontsize=9, parse_math=False)
                continue
            task = cells[direction, form]
            for x, found in enumerate(metrics.values()):
                _draw_groups(axis, x, found["none"].get(task.name, {}))
            axis.set(xlim=(-0.5, len(metrics) - 0.5), ylim=(-0.04, 1.04), title=f"{task.title}: {direction}")
            axis.set_xticks(range(len(metrics)), names, fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", alpha=0.25)
            for label in axis.get_xticklabels():
                label.set_parse_math(False)  # a name with dollar signs is text
    axes[0, 0].set_ylabel("accuracy")
    tests = [set(groups) for found in metrics.values() for groups in found["none"].values()]
    drawn = set().union(*(groups - {"all"} or groups for groups in tests))
    for group, (marker, color) in GROUP_STYLES.items():
        if group in drawn:
            axes[0, 0].plot([], [], marker, color=color, label=group)
    axes[0, 0].plot([], [], "--", color="C3", label="chance")
    figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    return figure


def _draw_groups(axis, place: int, groups: dict[str, dict]) -> None:
    """The groups of one test of one evaluation beside each other."""
    shown = {group: numbers for group, numbers in groups.items() if numbers["accuracy"] is not None}
    if len(shown) > 1:
        shown.pop("all", None)  # it is the two groups together
    for number, (group, numbers) in enumerate(sorted(shown.items(), reverse=True)):
        x = place + 0.3 * (number - (len(shown) - 1) / 2)
        marker, color = GROUP_STYLES.get(group, GROUP_STYLES["all"])
        low, high = numbers["cluster_interval"] or numbers["wilson"] or [numbers["accuracy"]] * 2
        axis.vlines(x, low, high, color=color, linewidth=2, alpha=0.6)
        axis.plot(x, numbers["accuracy"], marker, color=color, markersize=6)
        side = -1 if number < len(shown) - 1 else 1  # the groups' numbers stand outside of the pair
        place_of_text = {"xytext": (6 * side, -2), "ha": "right" if side < 0 else "left"}
        axis.annotate(f"{numbers['accuracy']:.2f}", (x, numbers["accuracy"]), **place_of_text, **SMALL)
        axis.hlines(numbers["chance"], place - 0.4, place + 0.4, color="C3", linestyle="--", linewidth=1)


def answers_figure(tests: dict):
    """What was answered against what is right: CW and both multiple-choice tests, a column a test, a row a group.

    Args:
        tests: of one drop, as from `metrics.metrics`.
    """
    from matplotlib import pyplot

    tables = {
        test: {group: (n["rates"] or n["options"] or {}).get("confusion") for group, n in groups.items()}
        for test, groups in tests.items()
        if TASK_TYPES[test].format != GENERATION
    }
    groups = [group for group in GROUP_STYLES if any(table.get(group) for table in tables.values())]
    groups = [group for group in groups if group != "all"] or groups
    figure, axes = pyplot.subplots(
        len(groups), len(tables), figsize=(3.1 * len(tables), 2.6 * len(groups)), squeeze=False, layout="constrained"
    )
    pyplot.close(figure)
    for line, group in zip(axes, groups, strict=True):
        for axis, (test, table) in zip(line, tables.items(), strict=True):
            _draw_confusion(axis, f"{TASK_TYPES[test].title}, {group}", table.get(group))
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
            axis.text(
                x, y, str(value), ha="center", va="center", fontsize=8, color="w" if value > sum(row) / 2 else "k"
            )
    axis.set_xticks(range(len(answers)), answers, fontsize=8)
    axis.set_yticks(range(len(table)), table, fontsize=8)
    axis.set_xlabel("answered", fontsize=8)
    axis.set_ylabel("right answer", fontsize=8)


def pretraining_figure(record: dict):
    """The share of whole answers that were right while the embedded model was pretrained, by kind of prompt.

    Args:
        record: with `log`, entries of step, rate, and loss and right by kind of prompt.
    """
    figure, (shares, rates) = subplots(2, 7.0, 5.0)
    entries = [entry for entry in record["log"] if entry["right"]]
    steps = [entry["step"] for entry in entries]
    for name in entries[-1]["right"] if entries else []:
        shares.plot(steps, [entry["right"][name] for entry in entries], label=name, linewidth=1.2)
    shares.set(ylabel="right as a whole", ylim=(0, 1.02))
    if entries:
        shares.legend(frameon=False, fontsize=8, title="task, attributes named", title_fontsize=8)
    rates.plot(steps, [entry["rate"] for entry in entries], color="0.3")
    rates.set(ylabel="learning rate", xlabel="step")
    return figure
