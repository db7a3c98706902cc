"""`python -m mmrev_kit`: a run or a sweep without a notebook, a notebook without JupyterLab, a new embedded model.

`train` does what notebooks/train.ipynb does. Started by `torchrun` or `accelerate launch` it is one of their workers.
"""

import argparse
import os
import sys

from mmrev_kit.config.errors import Told
from mmrev_kit.config.project import run_dir
from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import Config


def train(config: Config) -> None:
    """Train in new processes; under torchrun or accelerate launch, as one of their workers."""
    from mmrev_kit.data.make import ensure_data
    from mmrev_kit.notebook.launch import launch
    from mmrev_kit.training.tracking import refuse_missing

    if os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR"} or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return train_as_worker(config)  # of torchrun, of accelerate
    refuse_missing(config)
    for line in ensure_data(config):
        print(line)
    launch(config)


def train_as_worker(config: Config) -> None:
    """This process's part of a run that `torchrun` or `accelerate launch` started."""
    from mmrev_kit.training.loop import launched_worker

    config.launch.num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        launched_worker(config)
    except Told as error:
        rank = os.environ.get("RANK", "0")
        told = error if os.environ.get("LOCAL_RANK", "0") == "0" else f"see {run_dir(config)}/error_rank{rank}.txt"
        sys.exit(f"process {rank}: {told}")


def read_words(words: list[str]) -> argparse.Namespace:
    """The command line; exits with 2 and a usage line where it cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m mmrev_kit", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="train | sweep | notebook | share | pretrain"
    )
    one = commands.add_parser("train", help="train a run; under torchrun or accelerate launch, one of its workers")
    one.add_argument("--config", required=True, help="a YAML file, such as a run folder's config.yaml")
    one.add_argument("--overrides", default="", help="section.key=value words")
    one = commands.add_parser("sweep", help="train and evaluate every run of a sweep, as notebooks/sweep.ipynb does")
    one.add_argument("sweep", help="a file such as configs/sweeps/taught.yaml")
    one.add_argument("--seeds", help="numbers in one word, such as '0 1'; those of the file")
    one.add_argument("--parallel", type=int, help="runs at once; as many as the cores or cards make sense for")
    one.add_argument("--overrides", default="", help="section.key=value words that hold in every run")
    one = commands.add_parser("notebook", help="execute a notebook with papermill and render it, into the run folder")
    one.add_argument("name", help="a notebook in notebooks/, without .ipynb")
    one.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters")
    one = commands.add_parser(
        "share", help="write pages that stand alone: of executed notebooks, or of the default run"
    )
    one.add_argument("notebooks", nargs="*", help="executed notebooks; none: the default experiment's, executed first")
    one.add_argument("--to", help="the folder; outputs/shared, or outputs/gallery for the default experiment")
    commands.add_parser("pretrain", help="make or measure an embedded model; pretrain --help lists its options")
    return parser.parse_args(words)


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


def run(words: list[str]) -> int | None:
    """Run a command that a person typed; returns the exit status."""
    if words[:1] == ["pretrain"]:
        from mmrev_kit.pretraining import command

        return command.main(words[1:])
    given = read_words(words)
    if given.command == "notebook":
        from mmrev_kit.notebook.render import execute

        return execute(given.name, [tuple(pair) for pair in given.parameters])
    if given.command == "share":
        from mmrev_kit.notebook.share import share

        return share(given.notebooks, given.to)
    if given.command == "sweep":
        return sweep(given)
    return train(load_config(given.config, given.overrides))


def sweep(given: argparse.Namespace) -> int:
    """Run a sweep, and write its table; returns 1 where a run failed."""
    from mmrev_kit.notebook import sweep_results, sweep_runs
    from mmrev_kit.notebook.sweeps import read_sweep

    study = read_sweep(given.sweep, seeds=given.seeds, overrides=given.overrides)
    print(study, flush=True)
    results = sweep_runs.run_sweep(study, given.parallel)
    for name, one in sweep_results.pooled(results).items():
        print(f"{name}: {one.verdict().claim}")
    print(sweep_results.write_csv(study, results))
    return int(any(result.error for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
