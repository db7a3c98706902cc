"""A look at the machine before any weight is read, without touching CUDA."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from mmrev_kit.config import Config, ConfigError, run_dir
from mmrev_kit.memory import lora_tensors, optimizer_bytes
from mmrev_kit.sizes import PUBLISHED, as_shapes

PACKAGES = ("torch", "torchvision", "transformers", "peft", "accelerate", "bitsandbytes")


@dataclass
class Card:
    """One GPU as the driver reports it; memory in GiB."""

    name: str
    capability: tuple[int, int]
    total_gib: float
    free_gib: float
    driver: str
    holders: list[str] = field(default_factory=list)  # "pid 123 (python)"


def read_cards() -> list[Card]:
    """The GPUs of this machine, asked of the driver's own tool so that this process never touches CUDA."""
    if shutil.which("nvidia-smi") is None:
        return []

    def ask(*query: str) -> list[list[str]]:
        command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return [[cell.strip() for cell in line.split(",")] for line in out.stdout.splitlines() if "," in line]

    holders: dict[str, list[str]] = {}
    for uuid, pid, name in ask("--query-compute-apps=gpu_uuid,pid,process_name"):
        holders.setdefault(uuid, []).append(f"pid {pid} ({Path(name).name})")
    cards = []
    for row in ask("--query-gpu=uuid,name,compute_cap,memory.total,memory.free,driver_version"):
        uuid, name, capability, total, free, driver = row
        major, minor = capability.split(".")
        gib = float(total) / 1024, float(free) / 1024
        cards.append(Card(name, (int(major), int(minor)), *gib, driver, holders.get(uuid, [])))
    return cards


def has_kernels(capability: tuple[int, int], build: list[str]) -> bool:
    """Whether a torch build with these targets (`sm_80`, `compute_90`) runs on a card of this compute capability.

    Machine code for sm_XY runs on X.Z with Z >= Y; compute_XY is compiled at load time for any later card.
    """
    for target in build:
        kind, _, digits = target.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False


@dataclass
class Preflight:
    """What was found before any weight is read. `problems` are reasons not to start."""

    facts: list[str]
    problems: list[str]

    def __str__(self) -> str:
        return "\n".join(self.facts + [f"PROBLEM: {problem}" for problem in self.problems])


def bytes_to_save(config: Config) -> int | None:
    """The most that a run's saves take at one time: best/, final/ and last/, and the copy that takes last/'s place.

    Adapters are fp32, last/ also holds the optimizer's states. None where the model's shapes are not known yet.
    """
    name = config.model.name
    try:
        shapes = as_shapes(name)
    except ConfigError:  # a name on the hub
        known = next((size for size in PUBLISHED if f"-{size}" in name.lower()), None)
        if known is None:
            return None
        shapes = as_shapes(known)
    tensors = lora_tensors(shapes, config.lora.r, config.lora.target_modules)
    paged = config.training.optimizer.removeprefix("paged_")  # a paged state is saved like any other
    adapter, states = 4 * sum(tensors), optimizer_bytes(tensors, paged)
    texts = 2**20 + 2048 * len(tensors)  # headers, tables of 8-bit codes, history, manifest, log
    return int(4 * adapter + 2 * states + texts)


def disk_problems(config: Config, free: int) -> list[str]:
    """A disk with too few free bytes for what the run will save; what an earlier try left is replaced, and counts."""
    needed = bytes_to_save(config)
    own = [path for name in ("best", "final", "last") for path in (run_dir(config) / name).glob("*")]
    if needed is None or needed <= free + sum(path.stat().st_size for path in own):
        return []
    return [
        f"{run_dir(config)} needs {needed:,} bytes for best/, final/, last/ and the copy that takes its place, and "
        f"{free:,} are free. Free some space, choose another launch.output_dir, or lower lora.r."
    ]


def preflight(config: Config, cards: list[Card] | None = None, build: list[str] | None = None) -> Preflight:
    """Cards, kernels, disk and versions, without touching CUDA.

    Args:
        cards, build: given by tests; otherwise read from this machine and this torch.
    """
    import torch

    if cards is None:
        cards = read_cards()
    if build is None:
        build = torch._C._cuda_getArchFlags().split() if hasattr(torch._C, "_cuda_getArchFlags") else []
    facts, problems = [], []
    for index, card in enumerate(cards):
        held = f", held by {', '.join(card.holders)}" if card.holders else ""
        memory = f"{card.free_gib:.1f} of {card.total_gib:.1f} GiB free{held}"
        facts.append(f"GPU {index}: {card.name}, {memory}, driver {card.driver}")
        if not has_kernels(card.capability, build):
            capability = ".".join(str(number) for number in card.capability)
            problems.append(
                f"GPU {index} ({card.name}, compute capability {capability}): this torch {torch.__version__} has no "
                f"kernels for it (built for {', '.join(build) or 'no GPU'}). For a V100 install torch 2.10.0 with "
                "torchvision 0.25.0 (environment.yml)."
            )
    if not cards:
        facts.append("no GPU: the run uses the CPU")
    parent = next(folder for folder in (run_dir(config), *run_dir(config).parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    facts.append(f"disk: {free / 2**30:.1f} GiB free for {run_dir(config)}")
    problems += disk_problems(config, free)
    facts.append("versions: " + ", ".join(f"{name} {version(name)}" for name in PACKAGES))
    return Preflight(facts, problems)
