"""Make or measure an embedded model: `python -m mmrev_kit pretrain --orders both --seed 0 --out DIR`."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from mmrev_kit.config.sections import ConfigError
from mmrev_kit.pretraining.recipe import Recipe, read_recipe


def main(words: list[str]) -> int | None:
    """`python -m mmrev_kit pretrain`, with an option for each field of `Recipe`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mmrev_kit pretrain", description=__doc__.splitlines()[0])
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", help="a folder: its state to go on from, if there is one; model and state are written")
    target.add_argument("--measure", metavar="FOLDER", help="print the held-out accuracies of a tiny base's folder")
    for field in fields(Recipe):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {}
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **kind)
    given = vars(parser.parse_args(words))
    out, folder = given.pop("out"), given.pop("measure")
    from mmrev_kit.pretraining import accuracy, run

    try:
        recipe = read_recipe(given)
        if folder and not (Path(folder) / "config.json").is_file():
            raise ConfigError(f"{folder}: there is no model. One that was pretrained lies in model/ of its folder.")
        if out:
            run.pretrain(recipe, out)
        else:
            print("\n".join(accuracy.table(accuracy.measure(folder, recipe))))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
