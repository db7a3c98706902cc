"""Pretraining of the embedded model: `python -m mmrev_kit pretrain --minutes 9 --state DIR --out DIR`."""

import argparse
from dataclasses import fields

from mmrev_kit.pretraining.run import pretrain
from mmrev_kit.pretraining.steps import Recipe


def read_arguments(words: list[str]) -> tuple[Recipe, argparse.Namespace]:
    """The command line: an option for each field of `Recipe`, and where to read and write."""
    parser = argparse.ArgumentParser(prog="python -m mmrev_kit pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="the folder of the model to write")
    parser.add_argument("--state", help="the folder to go on from and to keep the state in")
    kinds = {int: int, float: float, int | None: int}
    for field in fields(Recipe):
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(name, type=kinds[field.type], default=field.default)
    given = parser.parse_args(words)
    return Recipe(**{field.name: getattr(given, field.name) for field in fields(Recipe)}), given


def main(words: list[str]) -> None:
    """`python -m mmrev_kit pretrain`."""
    recipe, given = read_arguments(words)
    pretrain(recipe, given.out, given.state)
