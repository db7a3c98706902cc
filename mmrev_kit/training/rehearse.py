"""A few real updates of a run with random weights, measured beside the estimate, before any weight is downloaded.

The rehearsal is a job of its own (`jobs.run_job`), so that the kernel that asks for it never touches CUDA.
"""

import json
import math
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mmrev_kit import files
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.data.make import ensure_data
from mmrev_kit.memory.estimate import GIB
from mmrev_kit.memory.plan import (
    candidate,
    configured_shapes,
    free_settings,
    heaviest_updates,
    split_updates,
    with_memory,
)
from mmrev_kit.memory.shapes import UNKNOWN, size_in_name
from mmrev_kit.model.bases import known_config, model_folder
from mmrev_kit.model.kernels import can_compile
from mmrev_kit.training.by_epoch import ask, computed_tokens
from mmrev_kit.training.diagnose import explain
from mmrev_kit.training.jobs import run_job
from mmrev_kit.training.lock import held
from mmrev_kit.training.preflight import architecture_of
from mmrev_kit.training.processes import UNTRIED, worker_state
from mmrev_kit.training.run import epoch_updates, planned_updates, start
from mmrev_kit.training.throughput import peak_memory_gib
from mmrev_kit.training.update import TrainingError, update
from mmrev_kit.training.zero import refuse_mode


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
    estimate: dict  # empty for a family that the estimate does not know
    memory: dict
    updates: int
    tests_share: float | None = None  # of the tests after an epoch, in the time that its training takes

    def table(self):
        """A pandas DataFrame: estimated and measured GiB side by side."""
        import pandas

        measured = {"allocated": self.allocated_gib, "reserved": self.reserved_gib, "device": self.device_gib}
        lines = []
        for name, found in measured.items():
            wanted = self.estimate.get(name)
            lines.append((name, wanted, found, wanted / found - 1 if found and wanted else None))
        return pandas.DataFrame(lines, columns=["GiB", "estimated", "measured", "error"]).set_index("GiB")

    def __str__(self) -> str:
        text = (
            f"{self.device}: built in {self.seconds_to_build:.0f} s, {self.updates} updates, "
            f"{self.samples_per_second:.2f} samples/s"
        )
        if self.tests_share is not None:
            text += f"; the tests after an epoch take {self.tests_share:.1%} of the time that its training takes"
        if self.allocated_gib is None:
            return f"{text}; a CPU run's resident memory ({self.resident_gib:.2f} GiB) measures nothing of a card"
        estimated = f", {self.estimate['allocated']:.2f} estimated" if self.estimate else f"; {UNKNOWN}"
        return f"{text}; {self.allocated_gib:.2f} GiB allocated{estimated}"


def rehearse(config: Config, updates: int = 3) -> Rehearsal:
    """Build the configured architecture with random weights and run its heaviest updates on one card.

    Raises:
        ConfigError, TrainingError: the rehearsal's own error, out of memory included.
    """
    if updates < 1:
        raise ConfigError(f"updates = {updates}: must be a number from 1.")
    config = deepcopy(config)
    refuse_mode(config)
    config.launch.mode = "data"  # one card has nothing to share out
    ensure_data(config)
    if known_config(config) is None and size_in_name(config.model.name) is None:
        model_folder(config.model.name, config.model.revision, weights=False)  # the small files tell the architecture
    config.model.name, config.launch.num_processes = architecture_of(config), 1
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        config.launch.output_dir = str(folder / "outputs")
        try:
            with held(folder):
                run_job(rehearse_worker, config, folder, "rehearse.log", updates, str(folder))
        except TrainingError as error:
            raise TrainingError(f"The rehearsal ended with an error: {error}") from None
        return Rehearsal(**json.loads((folder / "rehearsal.json").read_text(encoding="utf-8")))


def measure(config: Config, updates: int, state, folder: Path) -> Rehearsal:
    """The rehearsal in this process, whose job works in `folder`."""
    cuda, began = state.device.type == "cuda", time.perf_counter()
    run = start(config, state)
    built = time.perf_counter() - began
    heaviest = heaviest_updates(planned_updates(run.config, run.task, run.batch), updates)
    heaviest = (heaviest * (updates + 1))[: updates + 1]
    run.model.train()
    for samples in heaviest:  # warms up: a size that comes for the first time makes kernels
        update(run, samples)
        (folder / UNTRIED).unlink(missing_ok=True)
    began = time.perf_counter()  # an update reads its loss, so that nothing is left running
    for samples in heaviest[1:]:
        record = update(run, samples)
    seconds = time.perf_counter() - began
    if not math.isfinite(record["loss"]):
        raise TrainingError(f"The loss is {record['loss']}. {explain(run, samples)}")
    shapes, found = configured_shapes(config), {}
    if run.memory:
        found = run.memory.chosen.estimate.sizes()
    elif shapes:
        configured = with_memory(run.config, micro_tokens=run.batcher.layout.micro_tokens)
        split = partial(split_updates, heaviest, config, shapes, run.task.encoder.image_id, 1)
        found = candidate(configured, shapes, split, 1, not can_compile(state.device)).estimate.sizes()
    free, total = torch.cuda.mem_get_info(state.device) if cuda else (0, 0)
    measured = Rehearsal(
        device=torch.cuda.get_device_name(state.device) if cuda else "CPU",
        seconds_to_build=built,
        samples_per_second=sum(map(len, heaviest[1:])) / seconds,
        allocated_gib=peak_memory_gib(state.device) if cuda else None,
        reserved_gib=torch.cuda.max_memory_reserved(state.device) / GIB if cuda else None,
        device_gib=(total - free) / GIB if cuda else None,
        resident_gib=None if cuda else peak_memory_gib(state.device),
        estimate=found,
        memory=free_settings(run.config.memory),
        updates=updates,
    )
    if run.task.asked:  # after the memory of training was read
        began = time.perf_counter()
        ask(run)
        asked = time.perf_counter() - began
        packing = config.training.packing if shapes else "none"

        def tokens(part: list) -> int:  # these updates are the heaviest, and a token takes about as long in any
            return sum(computed_tokens(samples, packing, run.task.encoder.image_id) for samples in part)

        epoch = epoch_updates(run.config, run.task, 0, run.batch)
        measured.tests_share = asked / (seconds * tokens(epoch) / tokens(heaviest[1:]))
    return measured


def rehearse_worker(config: Config, updates: int, folder: str) -> None:
    """What the rehearsal's process runs."""
    with worker_state(Path(folder)) as state:
        files.write_json(Path(folder) / "rehearsal.json", vars(measure(config, updates, state, Path(folder))))
