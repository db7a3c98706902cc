"""A look at the machine before any weight is read, without touching CUDA."""

import math
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from mmrev_kit.config.project import experiment_dir, model_path, run_dir
from mmrev_kit.config.sections import INVENTED, Config, ConfigError
from mmrev_kit.data.design import design_of
from mmrev_kit.data.people import check_groups
from mmrev_kit.data.run_data import pool_folders, uses_retention
from mmrev_kit.memory.estimate import estimate, lora_tensors, optimizer_bytes
from mmrev_kit.memory.shapes import ModelShapes, architecture_file, read_shapes, size_in_name
from mmrev_kit.model.base_files import FAMILY, family_in
from mmrev_kit.model.bases import bytes_to_download, known_config, model_folder
from mmrev_kit.model.features import bytes_expected
from mmrev_kit.model.plain import describe_path

PACKAGES = ("torch", "torchvision", "transformers", "peft", "accelerate", "bitsandbytes")
# The oldest driver that runs a CUDA major version (NVIDIA's CUDA release notes, minor-version compatibility).
OLDEST_DRIVERS = {12: "525.60.13", 13: "580.65.06"}
PROCESSES_A_CORE = 4  # more than one is slower, and of use only to try out what several processes do
SHARED = Path("/dev/shm")
# NCCL's shared segments: one a process at the very least, of nearly 10 MB; NVIDIA advises 1 GiB for a container.
SEGMENT_GIB, SHARED_GIB = 10 / 1024, 1.0


@dataclass
class Card:
    """One GPU as the driver reports it; memory in GiB. None: nvidia-smi does not know it."""

    name: str
    capability: tuple[int, int] | None
    total_gib: float | None
    free_gib: float | None
    driver: str
    holders: list[str] = field(default_factory=list)  # "pid 123 (python)", and "this kernel"

    def __str__(self) -> str:
        held = f", held by {', '.join(self.holders)}" if self.holders else ""
        memory = "memory unknown" if self.held_gib is None else f"{self.free_gib:.1f} of {self.total_gib:.1f} GiB free"
        return f"{self.name}, {memory}{held}, driver {self.driver}"

    @property
    def held_gib(self) -> float | None:
        return None if None in (self.total_gib, self.free_gib) else self.total_gib - self.free_gib


def ask_driver(*query: str) -> subprocess.CompletedProcess:
    """What nvidia-smi answers: it never touches CUDA.

    Raises:
        ConfigError: it does not answer.
    """
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise ConfigError("nvidia-smi has not answered for 60 s: the driver hangs. Restart the machine.") from None


def read_cards() -> list[Card]:
    """The GPUs that this process may use, asked of the driver's own tool."""
    if shutil.which("nvidia-smi") is None:
        return []

    def ask(query: str) -> list[list[str]]:
        lines = ask_driver(query).stdout.splitlines()
        return [[cell.strip() for cell in line.split(",")] for line in lines if "," in line]

    holders: dict[str, list[str]] = {}
    for uuid, pid, *name in ask("--query-compute-apps=gpu_uuid,pid,process_name"):
        holder = "this kernel" if pid == str(os.getpid()) else f"pid {pid} ({Path(','.join(name)).name})"
        holders.setdefault(uuid, []).append(holder)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards, driver = [], ""
    for row in ask("--query-gpu=index,uuid,name,compute_cap,memory.total,memory.free,driver_version"):
        index, uuid, *name, capability, total, free, driver = row
        if visible is not None and not any(
            word == index or (word and uuid.startswith(word)) for word in map(str.strip, visible.split(","))
        ):
            continue
        gib = [float(mib) / 1024 if mib.isdigit() else None for mib in (total, free)]  # else [N/A] or the like
        capability = _numbers(capability) or None
        cards.append(Card(", ".join(name), capability, *gib, driver, holders.get(uuid, [])))
    if (visible or "").strip().startswith("MIG-"):  # the first slice of a card, and no more, is what CUDA then shows
        cards.append(Card("a MIG slice", None, None, None, driver))
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


def architecture_of(config: Config) -> str:
    """The architecture file that stands for the configured model.

    Raises:
        ConfigError: no file of a model of that name is known.
    """
    name = config.model.name
    if name.endswith(".json"):
        return name
    if known := known_config(config):
        return str(known)
    size = size_in_name(name)
    if size is None:
        raise ConfigError(f"model.name = {name!r}: no architecture file is known for it; give one (configs/models).")
    return architecture_file(size)


def memory_needed_gib(config: Config) -> float | None:
    """What stays on a card during the whole run, the least that must be free; None for a model that is not here yet, or
    of a family that the estimate does not know."""
    known = known_config(config)
    if known is None or family_in(known) != FAMILY:
        return None
    found = estimate(config, known)
    return found.static_gib + found.context_gib


@dataclass
class Preflight:
    """What was found before any weight is read. `problems` are reasons not to start, `warnings` are none."""

    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        warnings = [f"WARNING: {warning}" for warning in self.warnings]
        return "\n".join(self.facts + warnings + [f"PROBLEM: {problem}" for problem in self.problems])


def bytes_to_save(config: Config, shapes: ModelShapes | None = None) -> int | None:
    """The most that a run's saves take at one time: best/, final/ and last/, and the copy that takes last/'s place.

    Adapters are fp32, last/ also holds the optimizer's states. None where the model's shapes are not known yet.

    Args:
        shapes: the model's; None: those of the architecture file that its name stands for.
    """
    try:
        shapes = shapes or read_shapes(architecture_of(config))
    except ConfigError:
        return None
    tensors = lora_tensors(shapes, config.lora.r, config.lora.target_modules)
    adapter, states = 4 * sum(tensors), optimizer_bytes(tensors, config.training.optimizer, paged_too=True)
    texts = 2**20 + 2048 * len(tensors)  # headers, tables of 8-bit codes, history, manifest, log
    return int(4 * adapter + 2 * states + texts)


def disk_problems(
    config: Config, free: int, shapes: ModelShapes | None = None, history: int = 0, features: int = 0
) -> list[str]:
    """A disk with too few free bytes for what the run will write; what an earlier try left is replaced, and counts.

    Args:
        shapes: see `bytes_to_save`.
        history: bytes of training_history.json and the copy that takes its place.
        features: bytes of the vision features, see `features.bytes_to_write`.
    """
    saves = bytes_to_save(config, shapes)
    own = [path for name in ("best", "final", "last") for path in (run_dir(config) / name).glob("*")]
    there = sum(path.stat().st_size for path in own)
    if saves is None or saves + history + features <= free + there:
        return []
    more = f", {history:,} for the history" if history else ""
    if features:
        more += f", {features:,} for the vision features (none with memory.cache_features=false, which is slower)"
    replaced = f", and {there:,} are in what will be replaced" if there else ""
    return [
        f"{run_dir(config)} needs {saves + history + features:,} bytes: {saves:,} for best/, final/, last/ and the "
        f"copy that takes its place{more}. {free:,} are free there{replaced}. Free some space, choose another "
        "launch.output_dir, or lower lora.r."
    ]


def free_bytes(config: Config) -> int:
    """Bytes free for the run folder, which need not be there yet."""
    folders = (run_dir(config), *run_dir(config).parents)
    return shutil.disk_usage(next(folder for folder in folders if folder.exists())).free


def preflight(config: Config) -> Preflight:
    """Cards, kernels, driver, memory, the base's files, disk, versions and the power of the design, without CUDA."""
    report, cards = Preflight(), read_cards()
    path = check_model(report, config)
    for index, card in enumerate(cards):
        report.facts.append(f"GPU {index}: {card}")
        check_build(report, f"GPU {index} ({card.name}", card)
    if cards:
        check_memory(report, config, cards)
        check_cards_together(report, config, cards)
    else:
        report.facts.append("no GPU: the run uses the CPU (is there one? See nvidia-smi and CUDA_VISIBLE_DEVICES)")
        check_cores(report, config)
        if shutil.which("nvidia-smi") and (asked := ask_driver("--query-gpu=name")).returncode:
            report.warnings.append(f"the run uses the CPU: nvidia-smi fails ({' '.join(asked.stdout.split())})")
    check_room(report, config)
    report.facts += path
    report.facts.append("versions: " + ", ".join(f"{name} {version(name)}" for name in PACKAGES))
    report.facts += [f"design: {line}" for line in design_of(config)]
    if config.data.source in INVENTED and not experiment_dir(config).exists():
        try:
            check_groups(config.data)
        except ConfigError as error:
            report.problems.append(str(error))
    return report


def check_room(report: Preflight, config: Config) -> None:
    """Whether the disk has room for the run's saves, and for what is counted exactly only when rows are read."""
    free, known = free_bytes(config), known_config(config)
    report.facts.append(f"disk: {free / 2**30:.1f} GiB free for {run_dir(config)}")
    report.problems += disk_problems(config, free)
    if known is None or report.problems or family_in(known) != FAMILY:
        return
    shapes, load = read_shapes(known), 0 if model_path(config.model.name).exists() else bytes_to_download(known.parent)
    folders = [experiment_dir(config), *(pool_folders(config).values() if uses_retention(config) else ())]
    features = bytes_expected(config, shapes, folders) if config.memory.cache_features else 0
    if load > free or disk_problems(config, free - load, shapes, features=features):
        more = f"about {features:,} bytes of vision features (none with memory.cache_features=false)"
        report.warnings.append(f"the disk may fill up: {more}, {load:,} of the base to be downloaded, and the saves")


def check_model(report: Preflight, config: Config) -> list[str]:
    """Whether the base's files, as far as they are here, are those of a model that the kit can use; and the path that
    it takes, see `describe_path`."""
    known, name = known_config(config), config.model.name
    try:
        if known and model_path(name).is_dir():
            model_folder(name)
        return describe_path(known, config.lora.target_modules) if known else []
    except ConfigError as error:
        report.problems.append(str(error))
        return []


def torch_build() -> tuple[list[str], str | None]:
    """The targets that this torch is built for (see `has_kernels`) and its CUDA version, such as 12.8."""
    return getattr(torch._C, "_cuda_getArchFlags", str)().split(), torch.version.cuda


def check_build(report: Preflight, name: str, card: Card) -> None:
    """Whether this torch runs on a card: machine code for it, and a driver that is new enough."""
    build, cuda = torch_build()
    if card.capability and not has_kernels(card.capability, build):
        capability = ".".join(str(number) for number in card.capability)
        report.problems.append(
            f"{name}, compute capability {capability}): this torch {torch.__version__} has no "
            f"kernels for it (built for {', '.join(build) or 'no GPU'}). For a V100 install torch 2.10.0 with "
            "torchvision 0.25.0 (environment.yml)."
        )
    oldest = OLDEST_DRIVERS.get(_numbers(cuda)[0]) if cuda else None
    if oldest and () < _numbers(card.driver) < _numbers(oldest):
        report.problems.append(
            f"{name}): driver {card.driver} is too old for this torch, which is built for CUDA {cuda} and needs "
            f"{oldest} or newer. Update the driver, or install a torch built for an older CUDA."
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def check_cores(report: Preflight, config: Config) -> None:
    """Whether a machine without a GPU has cores for the processes: each is a whole model, and waits for the others."""
    cores, processes = len(os.sched_getaffinity(0)), config.launch.num_processes or 1
    if processes > PROCESSES_A_CORE * cores:
        report.problems.append(
            f"launch.num_processes = {processes}, but this machine has no GPU and {cores} cores. "
            f"Set launch.num_processes={cores} or less."
        )


def check_memory(report: Preflight, config: Config, cards: list[Card]) -> None:
    """Whether what others hold leaves room; a card that is too small even when empty is the memory plan's to refuse."""
    needed = memory_needed_gib(config) if config.launch.mode != "auto" and not report.problems else None
    used = list(enumerate(cards[: config.launch.num_processes]))
    unknown = [str(index) for index, card in used if card.held_gib is None]
    if unknown and config.memory.gpu_gib is None:
        report.warnings.append(
            f"nvidia-smi does not tell the memory of GPU {', '.join(unknown)}: what is free is not checked before the "
            "start. Set memory.gpu_gib to the GiB that the run may take."
        )
    for index, card in used:
        if card.held_gib is None:
            continue
        by = ", ".join(card.holders) or "a process that the driver does not name"
        held = f"GPU {index}: {card.held_gib:.1f} of {card.total_gib:.1f} GiB are held by {by}"
        if needed and card.free_gib < needed <= card.total_gib and not config.memory.force:
            report.problems.append(
                f"{held}; the {card.free_gib:.1f} GiB left cannot hold the {needed:.1f} GiB that the run needs at "
                "least. End that process (a kernel: restart it), or choose other cards with CUDA_VISIBLE_DEVICES. To "
                "try all the same: memory.force=true."
            )
        elif card.holders:
            report.warnings.append(f"{held}: the run shares the card, is slower and may run out of memory")


def free_shared_gib() -> float:
    """GiB free in shared memory; infinite on a machine without /dev/shm, where NCCL takes another way."""
    return shutil.disk_usage(SHARED).free / 2**30 if SHARED.is_dir() else math.inf


def check_cards_together(report: Preflight, config: Config, cards: list[Card]) -> None:
    """Whether the processes of one run can work side by side on these cards."""
    processes = config.launch.num_processes or len(cards)
    used = cards[:processes]
    sizes = [(card.total_gib, index) for index, card in enumerate(used) if card.total_gib is not None]
    if sizes and max(sizes)[0] - min(sizes)[0] > 0.5:
        least, index = min(sizes)
        report.warnings.append(f"the cards differ: the smallest, GPU {index} with {least:.1f} GiB, decides")
    if config.launch.mode == "auto":
        return
    if processes > len(cards):
        report.problems.append(
            f"launch.num_processes = {processes}, but this machine has {len(cards)} GPUs. Set "
            f"launch.num_processes={len(cards)}, or leave it out for one process a GPU."
        )
    have_bf16 = {card.capability >= (8, 0) for card in used if card.capability}
    if config.quantization.compute_dtype == "auto" and len(have_bf16) > 1:
        report.problems.append("some of the cards have no bf16: set quantization.compute_dtype=fp16 for all of them.")
    shared_gib = free_shared_gib()
    if processes > 1 and shared_gib < SHARED_GIB:
        short = f"{SHARED} has {1024 * shared_gib:.0f} MiB free for {processes} processes, which NCCL connects there"
        advice = "In a container: docker run --shm-size=1g (or --ipc=host)."
        severity = report.problems if shared_gib < processes * SEGMENT_GIB else report.warnings
        severity.append(f"{short}. {advice}")
