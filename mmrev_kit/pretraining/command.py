"""Make or measure an embedded model: `python -m mmrev_kit pretrain --orders both --seed 0 --out DIR`."""

import argparse
import sys
from dataclasses import fields

from mmrev_kit.config.sections import ConfigError
from mmrev_kit.pretraining.recipe import Recipe


def read_arguments(words: list[str]) -> argparse.Namespace:
    """The command line: an option for each field of `Recipe`, where to write, or what to measure."""
    parser = argparse.ArgumentParser(prog="python -m mmrev_kit pretrain", description=__doc__.splitlines()[0])
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", help="a folder: its state to go on from, if there is one; model and state are written")
    target.add_argument("--measure", metavar="FOLDER", help="print the held-out accuracies of a tiny base's folder")
    kinds = {int: int, float: float, int | None: int, str: str}
    for field in fields(Recipe):
        name = "--" + field.name.replace("_", "-")
        kind = {"type": kinds[field.type]} if field.type in kinds else {"action": argparse.BooleanOptionalAction}
        parser.add_argument(name, default=field.default, **kind)
    return parser.parse_args(words)


def main(words: list[str]) -> int | None:
    """`python -m mmrev_kit pretrain`; returns the exit status."""
    given = read_arguments(words)
    from mmrev_kit.pretraining import accuracy, run

    try:
        recipe = Recipe(**{field.name: getattr(given, field.name) for field in fields(Recipe)})
        if given.out:
            run.pretrain(recipe, given.out)
        else:
            print("\n".join(accuracy.table(accuracy.measure(given.measure, recipe))))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
