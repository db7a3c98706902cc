"""Updates a second by the way a run is started: from a notebook, and by `torchrun`.

`python benchmarks/launchers.py --processes 4` trains the recipe's architecture with random NF4 weights in turns: from a
notebook that papermill executes, and by torchrun with each OMP_NUM_THREADS that is named. It prints, in Markdown, the
median rate of each run's updates after the first ten, which compile kernels and fill caches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import torch

from mmrev_kit.config.project import run_dir
from mmrev_kit.config.reading import load_config, to_yaml
from mmrev_kit.data.make import ensure_data
from mmrev_kit.training.history import read_history

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 10  # updates that are not counted
CELL = "from mmrev_kit import launch, load_config\nhistory = launch(load_config({path!r}))"


def from_notebook(config: Path, folder: Path) -> list[str]:
    """The command that executes a notebook whose cell launches the run."""
    cell = nbformat.v4.new_code_cell(CELL.format(path=str(config)))
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": {"name": "python3", "display_name": ""}})
    nbformat.write(notebook, folder / "run.ipynb")
    return [sys.executable, "-m", "papermill", str(folder / "run.ipynb"), str(folder / "done.ipynb")]


def by_torchrun(config: Path, processes: int) -> list[str]:
    """The command that starts the run's workers with torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *launcher, "-m", "mmrev_kit", "train", "--config", str(config)]


def measure(way: str, words: str, home: Path, processes: int) -> dict:
    """Train once; samples a second (median and quartiles of the updates) and the seconds to the first update."""
    folder = Path(tempfile.mkdtemp(dir=home))
    config = load_config("configs/config_qwen3vl32_fp16.yaml", f"{words} launch.output_dir={folder}/outputs")
    (folder / "config.yaml").write_text(to_yaml(config))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if way == "notebook":
        command = from_notebook(folder / "config.yaml", folder)
    else:
        command = by_torchrun(folder / "config.yaml", processes)
        environment["OMP_NUM_THREADS"] = way
    began = time.time()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        log = run_dir(config) / "train.log"
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:] + (log.read_text()[-3000:] if log.is_file() else ""))
    seconds = time.time() - began
    steps = read_history(run_dir(config) / "training_history.json")["steps"]
    rates = [step["samples_per_second"] for step in steps[WARM_UP:]]
    shutil.rmtree(folder)
    low, middle, high = statistics.quantiles(rates, n=4)
    return {"updates": len(rates), "median": middle, "low": low, "high": high, "seconds": seconds}


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    given.add_argument("--threads", default="1", help="OMP_NUM_THREADS of torchrun's runs, separated by commas")
    given.add_argument("--rounds", type=int, default=3)
    given.add_argument("--people", type=int, default=100)
    given.add_argument("--overrides", default="")
    given = given.parse_args()
    home = Path(tempfile.mkdtemp())
    accumulation = 64 // given.processes  # rows of a process in an update: 64 in all
    words = (
        f"model.name=configs/models/qwen3vl_32b.json experiment.name=launchers data.num_main={given.people} "
        f"data.dir={home}/data retention.retention_ratio=0 training.num_epochs=1 training.warmup_ratio=0 "
        f"training.gradient_accumulation_steps={accumulation} launch.num_processes={given.processes} "
        f"{given.overrides}"
    )
    ensure_data(load_config("configs/config_qwen3vl32_fp16.yaml", words))
    ways = ["notebook", *given.threads.split(",")]
    found: dict[str, list[dict]] = {way: [] for way in ways}
    for turn in range(given.rounds):
        for way in ways if turn % 2 == 0 else ways[::-1]:
            found[way].append(measure(way, words, home, given.processes))
            print(turn, way, json.dumps(found[way][-1]), flush=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(f"\n{given.processes} x {card}, {os.cpu_count()} cores, torch {torch.__version__}; 64 rows an update\n")
    print("| started | samples/s, median of each run | updates counted | whole run, s |\n|---|---|---|---|")
    for way, runs in found.items():
        name = "notebook" if way == "notebook" else f"torchrun, OMP_NUM_THREADS={way}"
        rates = ", ".join(f"{run['median']:.2f}" for run in runs)
        print(f"| {name} | {rates} | {runs[0]['updates']} | {statistics.median(run['seconds'] for run in runs):.0f} |")
    best = max(statistics.median(run["median"] for run in found[way]) for way in ways[1:])
    print(f"\nnotebook / best of torchrun: {statistics.median(run['median'] for run in found['notebook']) / best:.3f}")


if __name__ == "__main__":
    main()
