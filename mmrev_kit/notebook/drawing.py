"""Figures that are readable on light and dark alike: a transparent background, inks of middle lightness, and an
alternative text that says what the data say."""

import math
from functools import cache, wraps

from mmrev_kit.data.tasks import TASK_TYPES

WIDTH = 8.0  # inches: 800 pixels
INK = "#7a7a7a"  # 4.3 : 1 on white as on near black
# 3 : 1 at least on both
COLORS = (
    "#3b82c4",
    "#d2701a",
    "#2f9a5f",
    "#cf4a4a",
    "#9168c8",
    "#a2773f",
    "#c9529f",
    "#2a9aa8",
)
LIMIT = COLORS[3]  # of lines that are no data: chance, limits
SMALL = {"fontsize": 8, "textcoords": "offset points"}


def style() -> dict:
    """Of matplotlib, for what is readable on both."""
    from cycler import cycler

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    boxes = [f"boxplot.{part}props.color" for part in ("box", "whisker", "cap")]
    plain = dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)
    clear = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none")
    sizes = {"font.size": 9.5, "legend.fontsize": 9, "axes.titlesize": 10, "axes.prop_cycle": cycler(color=COLORS)}
    return dict.fromkeys([*inked, *boxes], INK) | plain | clear | sizes


def drawn(function):
    """A function that draws, in the kit's style."""

    @wraps(function)
    def styled(*arguments, **named):
        from matplotlib import rc_context

        with rc_context(style()):
            return function(*arguments, **named)

    return styled


@cache
def drawing_class():
    """A matplotlib Figure that a notebook shows with its alternative text, `alt`, and at twice the screen's pixels."""
    from matplotlib.figure import Figure

    class Drawing(Figure):
        alt = "a figure without data"

        @drawn
        def draw(self, renderer):  # ticks are made here
            super().draw(renderer)

        def _repr_mimebundle_(self, include=None, exclude=None):
            from io import BytesIO

            file, dpi = BytesIO(), 100
            self.savefig(file, format="png", dpi=2 * dpi, metadata={"Software": None})
            width, height = (round(inches * dpi) for inches in self.get_size_inches())
            facts = {"alt": self.alt, "width": width, "height": height}
            return {"image/png": file.getvalue(), "text/plain": self.alt}, {"image/png": facts}

    return Drawing


def grid(rows: int, columns: int, height: float, **more):
    """A Figure of WIDTH x `height` inches, and its (rows, columns) array of axes; no other figure knows of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = drawing_class()(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def axes_by_test(height: float):
    """A Figure with a row a direction and a column a format, {test: its axis}, and the axis that is left, empty."""
    cells = {(task.direction, task.format): task.name for task in TASK_TYPES.values()}
    directions, formats = (list(dict.fromkeys(key[side] for key in cells)) for side in (0, 1))
    figure, axes = grid(len(directions), len(formats), height)
    places = {
        (a, b): axis for a, line in zip(directions, axes, strict=True) for b, axis in zip(formats, line, strict=True)
    }
    (left,) = (axis for place, axis in places.items() if place not in cells)
    left.axis("off")
    axes[0, 0].set_ylabel("accuracy")
    return figure, {name: places[place] for place, name in cells.items()}, left


def subplots(rows: int, height: float):
    """A Figure of `rows` axes, one below the other, with light lines at the values; and the axes."""
    figure, axes = grid(rows, 1, height)
    for axis in axes[:, 0]:
        axis.grid(axis="y", alpha=0.25)
    return figure, axes[:, 0]


def whole_numbers(axis) -> None:
    """Ticks of an x axis at whole numbers: there is no epoch 1.5."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def log_scale(axis) -> None:
    """A logarithmic y axis: labels at the decades alone, or at round numbers where there is less than one of them."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

    values = [y for line in axis.lines for y in line.get_ydata() if 0 < y < math.inf]
    axis.set_yscale("log")
    wide = bool(values) and max(values) > 10 * min(values)
    axis.yaxis.set_major_locator(LogLocator(numticks=8) if wide else MaxNLocator(5))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    if not wide:
        axis.yaxis.set_minor_locator(NullLocator())
