"""`python -m mmrev_kit.training`."""

from __future__ import annotations

import argparse
import os
import sys

from mmrev_kit.config.project import run_dir
from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.faults import DataError
from mmrev_kit.training.loop import train
from mmrev_kit.training.processes import begin, place
from mmrev_kit.training.update import TrainingError


def main() -> None:
    """`accelerate launch -m mmrev_kit.training --config FILE`: the same worker under any launcher."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, such as a run folder's config.yaml")
    parser.add_argument("--overrides", default="", help="section.key=value words")
    given = parser.parse_args()
    config = load_config(given.config, given.overrides)
    config.launch.num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        with place(run_dir(config)) as state:
            if begin(config, state):
                train(config, state)
    except (ConfigError, DataError, TrainingError) as error:
        rank = os.environ.get("RANK", "0")
        told = error if os.environ.get("LOCAL_RANK", "0") == "0" else f"see {run_dir(config)}/error_rank{rank}.txt"
        sys.exit(f"process {rank}: {told}")


if __name__ == "__main__":
    main()
