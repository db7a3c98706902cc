"""Figures of tests over something: the epochs of a run, the levels of a sweep."""

from mmrev_kit.config.reporting import decimal
from mmrev_kit.data.tasks import TASK_TYPES
from mmrev_kit.evaluation.metrics import of_epoch
from mmrev_kit.notebook.drawing import INK, LIMIT, axes_by_test, drawn, whole_numbers
from mmrev_kit.notebook.plots import GROUP_STYLES, MARKERS

LINES = ("-", "--", ":", "-.")


def _finish(figure, axes: dict, groups: list[str], more: dict[str, tuple[str, str]]) -> None:
    """Scales, and a legend of the groups, of chance and of `more`: {label: (marker, line)}."""
    from matplotlib.lines import Line2D

    for test, axis in axes.items():
        task = TASK_TYPES[test]
        axis.set(ylim=(-0.05, 1.05), title=f"{task.title}\n{task.direction}")
        axis.grid(axis="y", alpha=0.25)
        axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.50", "0.75", "1"])
    handles = []
    for group in groups:
        marker, color = GROUP_STYLES[group]
        handles.append(Line2D([], [], color=color, marker="" if more else marker, label=group))
    for label, (marker, line) in more.items():
        handles.append(Line2D([], [], color=INK, marker=marker, linestyle=line, label=label))
    handles.append(Line2D([], [], color=LIMIT, linestyle="--", linewidth=1, label="chance"))
    for text in figure.legend(handles=handles, loc="outside lower left", ncols=4).get_texts():
        text.set_parse_math(False)


@drawn
def tests_figure(history: dict):
    """The tests after each epoch (`evaluation.by_epoch`): accuracy by the likeliest option, with its 95 % interval
    over people as a band; a row a direction, a column a format. None where no epoch has them.

    Args:
        history: as from `history.read_history`.
    """
    epochs = {record["epoch"]: of_epoch(record["tests"]) for record in history["epochs"] if "tests" in record}
    if not epochs:
        return None
    figure, axes, _ = axes_by_test(5.2)
    shown, told = set(), []
    for test, axis in axes.items():
        curves: dict[str, list[tuple]] = {}
        for epoch, tests in epochs.items():
            for group, numbers in tests.get(test, {}).items():
                ends = numbers["cluster_interval"] or [numbers["accuracy"]] * 2
                curves.setdefault(group, []).append((epoch, numbers["accuracy"], *ends))
                axis.axhline(numbers["chance"], color=LIMIT, linestyle="--", linewidth=0.5)
        for group, points in curves.items():
            marker, color = GROUP_STYLES[group]
            x, y, low, high = zip(*points, strict=True)
            axis.plot(x, y, color=color, marker=marker, markersize=4, linewidth=1.2)
            axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            told.append(f"{TASK_TYPES[test].title}, {group}, by epoch {', '.join(map(decimal, y))}")
        shown |= curves.keys()
        axis.set_xlabel("epoch")
        whole_numbers(axis)
    _finish(figure, axes, [group for group in GROUP_STYLES if group in shown], {})
    figure.alt = f"Accuracy after each epoch. {'; '.join(told)}."
    return figure


def places(levels: list) -> list[float]:
    """Where levels stand along x: at their values where all are numbers, else side by side."""
    numbers = all(isinstance(level, int | float) and not isinstance(level, bool) for level in levels)
    return list(map(float, levels)) if numbers else list(map(float, range(len(levels))))


@drawn
def levels_figure(name: str, levels: list, lines: dict[str, dict]):
    """Accuracy over the levels of an axis, a row a direction and a column a format: of the people of all seeds with the
    95 % interval over them, and small each seed's own.

    Args:
        name, levels: of the axis along x.
        lines: {line: {level: (tests, [tests of each seed])}}, tests as {test: {group: numbers}} of `metrics.metrics`.
    """
    figure, axes, _ = axes_by_test(6.0)
    x = dict(zip(levels, places(levels), strict=True))
    width = min((b - a for a, b in zip(sorted(x.values()), sorted(x.values())[1:], strict=False)), default=1.0)
    shown = {
        group: None
        for line in lines.values()
        for tests, _ in line.values()
        for groups in tests.values()
        for group in groups
        if group != "all" or len(groups) == 1
    }
    series = [(label, group) for label in lines for group in GROUP_STYLES if group in shown]
    styles = {label: (MARKERS[i % len(MARKERS)], LINES[i % len(LINES)]) for i, label in enumerate(lines)}
    told = []
    for test, axis in axes.items():
        for number, (label, group) in enumerate(series):
            shift = 0.5 * width * ((number + 0.5) / len(series) - 0.5)
            style = styles[label] if len(lines) > 1 else (GROUP_STYLES[group][0], "-")
            told += _draw_series(axis, test, group, label, lines[label], x, shift, style)
        axis.set_xticks(list(x.values()), [str(level) for level in levels], fontsize=8)
        axis.set_xlabel(name)
        for text in [axis.xaxis.label, *axis.get_xticklabels()]:
            text.set_parse_math(False)
        if max(map(len, map(str, levels)), default=0) > 5:
            for text in axis.get_xticklabels():
                text.set(rotation=30, ha="right", rotation_mode="anchor")
    _finish(figure, axes, [g for g in GROUP_STYLES if g in shown], styles if len(styles) > 1 else {})
    figure.alt = f"Accuracy over {name}. {'; '.join(told)}."
    return figure


def _draw_series(axis, test: str, group: str, label: str, line: dict, x: dict, shift: float, style) -> list[str]:
    """One group of one line in one test; returns what it shows in words."""
    color, found = GROUP_STYLES[group][1], []
    for level, (tests, seeds) in line.items():
        numbers = tests.get(test, {}).get(group)
        if numbers and numbers["accuracy"] is not None:
            found.append(
                (x[level] + shift, numbers["accuracy"], *(numbers["cluster_interval"] or [numbers["accuracy"]] * 2))
            )
            own = [one[test][group]["accuracy"] for one in seeds if group in one.get(test, {})]
            axis.plot([x[level] + shift] * len(own), own, ".", color=color, markersize=3, alpha=0.6)
            axis.axhline(numbers["chance"], color=LIMIT, linestyle="--", linewidth=0.5)
    if not found:
        return []
    found.sort()
    places, y, low, high = zip(*found, strict=True)
    bars = [[a - b for a, b in zip(y, low, strict=True)], [a - b for a, b in zip(high, y, strict=True)]]
    bars = [[max(0.0, value) for value in side] for side in bars]
    axis.errorbar(
        places, y, bars, color=color, marker=style[0], linestyle=style[1], markersize=4, linewidth=1, capsize=2
    )
    of = f"{label}, " if label else ""
    return [f"{TASK_TYPES[test].title}, {of}{group}: {', '.join(map(decimal, y))}"]
