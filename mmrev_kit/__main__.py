"""`mmrev`, which is `python -m mmrev_kit`: what the notebooks do, from a terminal.

`train` does what notebooks/train.ipynb does. Started by `torchrun` or `accelerate launch` it is one of their workers.
"""

import argparse
import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass

from mmrev_kit.config.errors import Told
from mmrev_kit.config.flags import FLAGS


class Parser(argparse.ArgumentParser):
    """Whose errors are one line, with what there is."""

    def parse_known_args(self, args=None, namespace=None):
        """Also of a command's own parser, whose errors then name the command and its flags."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1, cutoff=0.7)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(flags)}"
            self.error(f"there is no {unknown[0]}; {hint}")
        return found, unknown

    def error(self, message: str):
        if message.endswith("required: COMMAND"):
            message += f" (choose from {', '.join(COMMANDS)})"
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        help: what it does, in a line.
        function: of `notebook.commands`; it takes the parsed command line and returns an exit status, None for 0.
        add: adds the arguments that it has besides those of `FLAGS`.
    """

    help: str
    function: str
    add: Callable[[argparse.ArgumentParser], object] = lambda parser: None


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_path", help="the folder of an adapter, such as a run's best/; none: the base model")
    parser.add_argument("--drops", default="none image text both", help="ablations beside the whole prompt (none)")


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="2b, 4b, 8b, 32b, embedded, or a model's config.json (as configured)")
    parser.add_argument("--card", default="V100 32", help="such as 'H100 80'")
    parser.add_argument("--micro_batch", type=int, default=8, help="rows that go through the model at once")


def _add_notebook(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="a notebook in notebooks/, without .ipynb")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters")


def _add_share(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("notebooks", nargs="*", help="executed ones, or names of the gallery's pages, executed first")
    parser.add_argument("--to", help="the folder; outputs/shared, or outputs/gallery for its own pages")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a run folder (its best/), or a folder with an adapter")
    parser.add_argument("out", help="the folder to make, such as outputs/merged")
    parser.add_argument("--overrides", default="", help="section.key=value words, such as adapter.unbound=true")


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", help="a file such as configs/sweeps/taught.yaml")
    parser.add_argument("--seeds", help="numbers in one word, such as '0 1'; those of the file")
    parser.add_argument("--parallel", type=int, help="runs at once; as many as the cores or cards make sense for")
    parser.add_argument("--overrides", default="", help="section.key=value words that hold in every run")


COMMANDS = {
    "train": Command("train a run; under torchrun or accelerate launch, one of its workers", "train"),
    "evaluate": Command("ask the tests of an adapter, or of a base model", "evaluate", _add_evaluate),
    "generate-data": Command("make the people, their pictures and rows", "generate_data"),
    "generate-face-retention-pool": Command("make the pool of other people", "generate_face_retention_pool"),
    "memory": Command("what fits on a card, and the modes", "memory", _add_memory),
    "doctor": Command("look at the machine before a run", "doctor"),
    "sweep": Command("train and evaluate every run of a sweep, and write its table", "sweep", _add_sweep),
    "notebook": Command("execute a notebook and render it, into the run folder", "notebook", _add_notebook),
    "share": Command("write pages that stand alone, of executed notebooks or the default run", "share", _add_share),
    "merge": Command("write a 16-bit model with an adapter merged, checked against the unmerged", "merge", _add_merge),
    "pretrain": Command("make or measure an embedded model; pretrain --help lists its options", ""),
}


def make_parser() -> Parser:
    """The parser of all commands, made of `COMMANDS` and `FLAGS`."""
    parser = Parser(prog="mmrev", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        if name in FLAGS:
            one.add_argument("--config", help="a YAML file, such as a run folder's config.yaml")
            one.add_argument("--overrides", default="", help="any other settings, as section.key=value words")
        for flag, setting in FLAGS.get(name, {}).items():
            alone = {"nargs": "?", "const": "true"} if flag in ("overwrite", "unbound") else {}
            known = {"choices": ["auto"]} if flag == "device_map" else {"metavar": "VALUE"}
            one.add_argument(f"--{flag}", help=f"the setting {setting}", **alone, **known)
        command.add(one)
    return parser


def main(words: list[str]) -> int | None:
    """Run a command; returns the exit status, which is 2 where the message is all that the user needs."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 shows an é in another way
    if words[:1] == ["job"]:  # what `training.jobs.run_job` starts
        from mmrev_kit.training import jobs

        return jobs.main(words[1:])
    try:
        return run(words)
    except Told as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # what it left and how to go on has been said
        return 130


def run(words: list[str]) -> int | None:
    """Run a command that a person typed; returns the exit status."""
    if words[:1] == ["pretrain"]:
        from mmrev_kit.pretraining.run import main as pretrain

        return pretrain(words[1:])
    given = make_parser().parse_args(words)
    from mmrev_kit.notebook import commands

    return getattr(commands, COMMANDS[given.command].function)(given)


def start() -> int | None:
    """What the program `mmrev` calls."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(start())
