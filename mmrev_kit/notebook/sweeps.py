"""Sweeps: a file of settings and seeds, read strictly, and the configuration of each of its runs.

A file says `grid`: by axis what it takes. An axis with a setting's name, such as `data.share_both`, has a list of
levels; one with a name of its own has named levels, each of which sets several settings together. A point is one level
of every axis; each point is run with every seed.
"""

import itertools
import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmrev_kit.config.project import resolve
from mmrev_kit.config.reading import NONE_WORDS, differences, load_config, read_yaml
from mmrev_kit.config.sections import INVENTED, Config, ConfigError
from mmrev_kit.notebook.parameters import PARAMETERS

OWN = ("experiment.name", "experiment.seed")  # a sweep sets them itself


@dataclass
class SweepFile:
    """What a sweep's file may hold.

    Attributes:
        question: what the sweep is to answer.
        config: the configuration that every run starts from.
        settings: set in every run, by name.
        grid: see the module.
        seeds: each a run of every point, with people of its own.
        expected: {point: claim} to be shown beside what is found.
        conclusion: what its runs, with these seeds, showed and what they cannot show; written after them.
    """

    question: str = ""
    config: str = "configs/tiny_cpu.yaml"
    settings: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    expected: dict[str, str] = field(default_factory=dict)
    conclusion: str = ""


@dataclass(frozen=True)
class Point:
    """One level of each axis, by axis as it is called, and the settings that this means. Equal names, equal points."""

    levels: dict[str, Any] = field(compare=False)
    settings: dict[str, Any] = field(compare=False)
    name: str = ""

    @property
    def slug(self) -> str:
        """The name as a part of a file's name."""
        return plain(self.name)


def plain(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")


@dataclass
class Sweep:
    """A sweep that was read: its points, and the configuration of each of its runs.

    Attributes:
        name: what its runs and folders begin with.
        words: overrides that hold in every run, those of the file first.
        axes: {axis: its levels as they are called}.
    """

    name: str
    file: SweepFile
    words: str
    axes: dict[str, list]
    points: list[Point]
    seeds: list[int]

    def __post_init__(self):
        self.base = load_config(self.file.config, self.words)

    @property
    def folder(self) -> Path:
        """Where sweep.csv, the page and what each point printed go."""
        return resolve(self.base.launch.output_dir) / f"{self.name}_sweep"

    def config(self, point: Point, seed: int) -> Config:
        """Of one run. A seed has people of its own, which the points share whose data settings are equal."""
        own = load_config(self.file.config, f"{self.words} {override_words(point.settings)}")
        own.experiment = replace(own.experiment, name=f"{self.name}_seed{seed}_{point.slug}", seed=seed)
        if own.data.folder is None:
            changed = {key: new for key, (_, new) in differences(self.base, own).items() if key.startswith("data.")}
            parts = [f"{key.removeprefix('data.')}-{new}" for key, new in changed.items() if key != "data.dir"]
            folder = "_".join([f"{self.name}_seed{seed}", *map(plain, parts)])
            own.data = replace(own.data, folder=str(Path(own.data.dir) / folder))
        return own

    def runs(self) -> list[tuple[Point, int]]:
        """All of them, seed by seed: a sweep that is cut short has every point for the first seeds."""
        return [(point, seed) for seed in self.seeds for point in self.points]

    def __str__(self) -> str:
        axes = [f"{name}: {'; '.join(map(str, levels))}" for name, levels in self.axes.items()]
        seeds = f"seeds {' '.join(map(str, self.seeds))}"
        count = f"{len(self.points)} points x {len(self.seeds)} seeds = {len(self.runs())} runs"
        return "\n".join([self.file.question, *axes, seeds, f"{count}, in {self.folder}"])


def override_words(settings: dict) -> str:
    """Settings as `load_config` takes them in text."""

    def value_text(value) -> str:
        if isinstance(value, list | dict):
            return json.dumps(value)
        return "null" if value is None else str(value)

    return shlex.join(f"{key}={value_text(value)}" for key, value in settings.items())


def read_levels(axis: str, levels) -> dict[Any, dict]:
    """{level as it is called: its settings} of one axis.

    Raises:
        ConfigError: neither a list of a setting's values nor named levels, or one of them twice.
    """
    if isinstance(levels, list) and levels and "." in axis:
        named = [("-".join(map(str, level)) if isinstance(level, list) else level, level) for level in levels]
        found = {"null" if name is None else name: {axis: level} for name, level in named}
    elif isinstance(levels, dict) and levels and all(isinstance(one, dict) for one in levels.values()):
        found, named = levels, list(levels)
    else:
        rule = "give a setting (section.key) a list of levels, or an axis of another name levels with their settings"
        raise ConfigError(f"grid: {axis} = {levels!r}: {rule}.")
    if len(found) < len(named):
        raise ConfigError(f"grid: {axis} = {levels!r}: a level comes twice.")
    return found


def make_points(grid: dict) -> tuple[dict[str, list], list[Point]]:
    """(axes, points) of a grid: every combination of the levels, the last axis fastest.

    Raises:
        ConfigError: see `read_levels`; a setting that two axes set, or that a sweep sets itself.
    """
    axes = {axis: read_levels(axis, levels) for axis, levels in grid.items()}
    keys = [(axis, {key for level in levels.values() for key in level}) for axis, levels in axes.items()]
    for (axis, mine), (other, theirs) in itertools.combinations(keys, 2):
        if mine & theirs:
            raise ConfigError(f"grid: {axis} and {other} both set {', '.join(sorted(mine & theirs))}.")
    points = []
    for levels in itertools.product(*axes.values()):
        chosen = dict(zip(axes, levels, strict=True))
        settings = {key: value for axis, level in chosen.items() for key, value in axes[axis][level].items()}
        words = [
            level if isinstance(level, str) and level != "null" else f"{axis.rpartition('.')[2]} {level}"
            for axis, level in chosen.items()
        ]
        points.append(Point(chosen, settings, ", ".join(words) or "base"))
    return {axis: list(levels) for axis, levels in axes.items()}, points


def read_seeds(seeds: str | int | Iterable[int]) -> list[int]:
    """The seeds of a text, such as "0 1 2", or of a list.

    Raises:
        ConfigError: none, one twice, or what is no number from 0.
    """
    words = str(seeds).split() if isinstance(seeds, str | int) else list(map(str, seeds))
    if not words or not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise ConfigError(f"seeds = {seeds!r}: must be different numbers, such as '0 1 2'.")
    return list(map(int, words))


def read_sweep(
    sweep: str, name: str | None = None, config: str | None = None, seeds: str | None = None, overrides: str = "",
    num_epochs: int | None = None, output_dir: str | None = None,
) -> Sweep:  # fmt: skip
    """Read a sweep's file, and the configuration of each of its runs with it.

    Args:
        sweep: the file, relative to the project's root.
        name: what runs and folders begin with; None: as the file is called.
        config, seeds: in the place of the file's.
        overrides, num_epochs, output_dir: as a notebook's parameters; they hold in every run.

    Raises:
        ConfigError: before anything is made: a key that a sweep's file does not have, a configuration that cannot be
            used, runs of one name, points that would be one training, settings given that the grid sets, or seeds
            whose people would be the same.
    """
    given = {"name": name, "config": config, "seeds": seeds, "num_epochs": num_epochs, "output_dir": output_dir}
    given = {key: value for key, value in given.items() if value is not None and str(value).lower() not in NONE_WORDS}
    file = SweepFile(**read_yaml(sweep, SweepFile))
    file.config = given.pop("config", file.config)
    name, seeds = given.pop("name", resolve(sweep).stem), given.pop("seeds", file.seeds)
    own = override_words({PARAMETERS[key]: value for key, value in given.items()})
    words = f"{override_words(file.settings)} {overrides or ''} {own}"
    try:
        axes, points = make_points(file.grid)
        found = Sweep(name, file, words, axes, points, read_seeds(seeds))
        check_sweep(found)
    except ConfigError as error:
        raise ConfigError(f"{sweep}: {error}") from None
    return found


def check_sweep(sweep: Sweep) -> None:
    """See `read_sweep`."""
    varied = {key for point in sweep.points for key in point.settings}
    set_before = {word.partition("=")[0] for word in shlex.split(sweep.words)}
    if twice := sorted(varied & set_before):
        raise ConfigError(f"{', '.join(twice)}: the grid sets it, and so do the settings or overrides. Take one out.")
    if own := sorted((varied | set_before) & set(OWN)):
        raise ConfigError(f"{', '.join(own)}: a sweep names its runs itself, and takes `seeds`.")
    names = [point.slug.casefold() for point in sweep.points]
    if twice := [point.name for point in sweep.points if names.count(point.slug.casefold()) > 1]:
        raise ConfigError(f"grid: {' and '.join(map(repr, twice))} would have one folder. Name the levels apart.")
    if unknown := [name for name in sweep.file.expected if name not in {point.name for point in sweep.points}]:
        there = "; ".join(point.name for point in sweep.points)
        raise ConfigError(f"expected: there is no point {unknown[0]!r}. There are {there}.")
    trained: dict[tuple, Point] = {}
    for point in sweep.points:
        config = sweep.config(point, sweep.seeds[0])
        own, rest = config.experiment, asdict(config)
        del rest["experiment"]["name"], rest["experiment"]["taught"]
        lesson = own.main_is_taught, json.dumps(rest)
        if (other := trained.setdefault(lesson, point)) is not point:
            raise ConfigError(
                f"grid: {other.name!r} and {point.name!r} would be one training: in task {own.task} main is taught "
                f"{' and '.join(own.main_is_taught)} in both."
            )
        fixed = config.data.source not in INVENTED or sweep.base.data.folder or "data.folder" in point.settings
        if fixed and len(sweep.seeds) > 1:
            raise ConfigError(
                "several seeds need invented people (data.source=drawn or diffusers) without a data.folder: the same "
                "people would count as others in each seed. Give one seed."
            )
