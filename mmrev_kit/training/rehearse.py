"""A few real updates of a run with random weights, measured beside the estimate, before any weight is downloaded.

The rehearsal is a job of its own (`jobs.run_job`), so that the kernel that asks for it never touches CUDA.
"""

from __future__ import annotations

import json
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from mmrev_kit import files
from mmrev_kit.config.project import resolve
from mmrev_kit.config.reading import to_yaml
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.data.make import ensure_data
from mmrev_kit.memory.plan import FREE_SETTINGS, heaviest_windows, option, passes_of, read_sizes
from mmrev_kit.memory.shapes import size_in_name
from mmrev_kit.training.jobs import run_job
from mmrev_kit.training.lock import held
from mmrev_kit.training.processes import worker_state
from mmrev_kit.training.run import planned_windows, start
from mmrev_kit.training.throughput import peak_memory_gib
from mmrev_kit.training.update import TrainingError, update

GIB = 2**30


@dataclass
class Rehearsal:
    """What a rehearsal found; GiB, None where a CPU has no such number."""

    device: str
    seconds_to_build: float
    samples_per_second: float
    allocated_gib: float | None
    reserved_gib: float | None
    device_gib: float | None
    resident_gib: float | None
    estimate: dict
    memory: dict
    updates: int

    def table(self):
        """A pandas DataFrame: estimated and measured GiB side by side."""
        import pandas

        measured = {"allocated": self.allocated_gib, "reserved": self.reserved_gib, "device": self.device_gib}
        lines = []
        for name, found in measured.items():
            wanted = self.estimate[name]
            lines.append((name, wanted, found, wanted / found - 1 if found else None))
        return pandas.DataFrame(lines, columns=["GiB", "estimated", "measured", "error"]).set_index("GiB")

    def __str__(self) -> str:
        text = (
            f"{self.device}: built in {self.seconds_to_build:.0f} s, {self.updates} updates, "
            f"{self.samples_per_second:.2f} samples/s"
        )
        if self.allocated_gib is None:
            return f"{text}; a CPU run's resident memory ({self.resident_gib:.2f} GiB) measures nothing of a card"
        return f"{text}; {self.allocated_gib:.2f} GiB allocated, {self.estimate['allocated']:.2f} estimated"


def architecture_of(config: Config) -> str:
    """The architecture file that stands for the configured model.

    Raises:
        ConfigError: no file of a model of that name is known.
    """
    name = config.model.name
    if name.endswith(".json"):
        return name
    if name == "embedded":
        return "mmrev_kit/assets/tiny/config.json"
    if (resolve(name) / "config.json").is_file():
        return str(resolve(name) / "config.json")
    size = size_in_name(name)
    if size is None:
        raise ConfigError(f"model.name = {name!r}: no architecture file is known for it; give one (configs/models).")
    return f"configs/models/qwen3vl_{size}.json"


def rehearse(config: Config, updates: int = 3, folder: str | Path | None = None) -> Rehearsal:
    """Build the configured architecture with random weights and run its heaviest updates on one card.

    Raises:
        ConfigError, TrainingError: the rehearsal's own error, out of memory included.
    """
    if updates < 1:
        raise ConfigError(f"updates = {updates}: must be a number from 1.")
    config = deepcopy(config)
    ensure_data(config)
    config.model.name, config.launch.num_processes = architecture_of(config), 1
    with tempfile.TemporaryDirectory() as made:
        folder = Path(folder or made)
        folder.mkdir(parents=True, exist_ok=True)
        config.launch.output_dir = str(folder / "outputs")
        files.write_text(folder / "config.yaml", to_yaml(config))
        try:
            with held(folder):
                run_job(rehearse_worker, folder, "rehearse.log", 1, updates, str(folder))
        except TrainingError as error:
            raise TrainingError(f"The rehearsal ended with an error: {error}") from None
        return Rehearsal(**json.loads((folder / "rehearsal.json").read_text(encoding="utf-8")))


def measure(config: Config, updates: int, state) -> Rehearsal:
    """The rehearsal in this process."""
    import torch

    cuda, began = state.device.type == "cuda", time.perf_counter()
    run = start(config, state)
    built = time.perf_counter() - began
    windows = heaviest_windows(planned_windows(run.config, run.task, run.batch), updates)[: updates + 1]
    windows = (windows * (updates + 1))[: updates + 1]
    run.model.train()
    rows, began = 0, 0.0
    for number, window in enumerate(windows):
        if number == 1:  # the first one warms up
            began = time.perf_counter()
        update(run, window)  # reads its loss: nothing is left running
        rows += len(window) if number else 0
    seconds = time.perf_counter() - began
    if run.memory:
        found = run.memory.chosen.estimate
    else:
        memory, shapes = run.config.memory, read_sizes(config)
        limit = run.batcher.layout.micro_tokens
        work = passes_of(windows, config, shapes, run.task.encoder.image_id, 1, limit)
        settings = limit, memory.gradient_checkpointing, memory.cache_features, memory.kept_layers
        found = option(config, shapes, lambda _: work, 1, *settings).estimate
    free, total = torch.cuda.mem_get_info(state.device) if cuda else (0, 0)
    return Rehearsal(
        device=torch.cuda.get_device_name(state.device) if cuda else "CPU",
        seconds_to_build=built,
        samples_per_second=rows / seconds,
        allocated_gib=peak_memory_gib(state.device) if cuda else None,
        reserved_gib=torch.cuda.max_memory_reserved(state.device) / GIB if cuda else None,
        device_gib=(total - free) / GIB if cuda else None,
        resident_gib=None if cuda else peak_memory_gib(state.device),
        estimate={"allocated": found.allocated_gib, "reserved": found.reserved_gib, "device": found.device_gib},
        memory={name: getattr(run.config.memory, name) for name in FREE_SETTINGS},
        updates=updates,
    )


def rehearse_worker(config: Config, updates: int, folder: str) -> None:
    """What the rehearsal's process runs."""
    with worker_state(Path(folder)) as state:
        files.write_json(Path(folder) / "rehearsal.json", vars(measure(config, updates, state)))
