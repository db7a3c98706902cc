"""What `mmrev` runs: each command does what the notebook of that name does, by the same code."""

import os
import re
import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

from mmrev_kit.config.errors import Told
from mmrev_kit.config.flags import FLAGS
from mmrev_kit.config.project import EMBEDDED, resolve, run_dir
from mmrev_kit.config.reading import differences, load_config
from mmrev_kit.config.sections import TESTS, Config, ConfigError, DataConfig
from mmrev_kit.data.make import ensure_data, ensure_pool
from mmrev_kit.data.records import read_info
from mmrev_kit.evaluation import tables
from mmrev_kit.evaluation.results import read_evaluation
from mmrev_kit.notebook import budget, launch, sweep_results, sweep_runs
from mmrev_kit.notebook.render import execute
from mmrev_kit.notebook.sweeps import override_words, read_sweep
from mmrev_kit.training.loop import launched_worker
from mmrev_kit.training.preflight import preflight, torch_build
from mmrev_kit.training.sharing import merge_adapter
from mmrev_kit.training.tracking import refuse_missing

LAPTOP, RECIPE, FACES = (f"configs/{name}.yaml" for name in ("tiny_cpu", "config_qwen3vl32_fp16", "face_config"))


def read_flags(given: Namespace, default: str, more: dict | None = None) -> Config:
    """The configuration of a command line: --config, then --overrides, then the flags of `config.flags.FLAGS`.

    A training takes data and a pool that its flags name as they were made, whatever --config would make.

    Args:
        default: what is read without --config.
        more: {"section.key": value}, as if by flags.

    Raises:
        ConfigError: see `load_config`; DataError: a note in a data folder that is no JSON.
    """
    named = {flag: value for flag in FLAGS[given.command] if (value := getattr(given, flag)) is not None}
    values = {FLAGS[given.command][flag]: value for flag, value in named.items()} | (more or {})
    file, made = given.config or default, as_made(named) if given.command == "train" else ""
    asked = load_config(file, given.overrides, values)
    config = load_config(file, f"{made} {given.overrides}", values) if made else asked
    for key, (other, own) in differences(asked, config).items() if is_first() else ():
        print(f"NOTE: {key} = {own!r}, as what is there was made with, and not {other!r}")
    return config


def as_made(named: dict) -> str:
    """Overrides: how the kit made the data and the pool that flags name; none for what is not there, or of others."""
    data, pool = (
        read_info(resolve(named[flag])) if flag in named else {} for flag in ("data_dir", "face_retention_pool")
    )
    own = {field.name for field in fields(DataConfig)} & data.keys() if data.get("source") != "folder" else set()
    settings = {f"data.{name}": data[name] for name in sorted(own)}
    settings |= {"experiment.seed": data["seed"]} if "seed" in data else {}
    settings |= {"retention.num_faces": pool["num_faces"]} if "num_faces" in pool else {}
    return override_words(settings)


def is_first() -> bool:
    """Whether this process speaks for all that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def train(given: Namespace) -> None:
    """Train in new processes; under torchrun or accelerate launch, as one of their workers."""
    base = given.base_model or EMBEDDED[0]
    check_data_dir(given)
    config = read_flags(given, LAPTOP if base in EMBEDDED else RECIPE)
    if os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR"} or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return train_as_worker(config)  # of torchrun, of accelerate
    refuse_missing(config)
    print("\n".join(ensure_data(config)))
    launch.launch(config)


def train_as_worker(config: Config) -> None:
    """This process's part of a run that `torchrun` or `accelerate launch` started; the process ends here."""
    check_started(config, started := int(os.environ.get("WORLD_SIZE", "1")))
    config.launch.num_processes = started
    try:
        launched_worker(config)
    except Told as error:
        rank = os.environ.get("RANK", "0")
        told = error if os.environ.get("LOCAL_RANK", "0") == "0" else f"see {run_dir(config)}/error_rank{rank}.txt"
        sys.exit(f"process {rank}: {told}")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # a thread of torch may abort an interpreter that ends, and a finished run would count as failed


def check_started(config: Config, started: int) -> None:
    """Raises ConfigError where another number of processes was started than was asked for: of accelerate, which starts
    one on a machine without GPUs unless it is told `--multi_gpu`, or by launch.num_processes."""
    asked, wanted = None if "RANK" in os.environ else asked_of_accelerate(), config.launch.num_processes
    if asked in (None, started) and wanted in (None, started):
        return
    if not is_first():
        sys.exit(2)
    if asked not in (None, started):
        raise ConfigError(
            f"accelerate launch was asked for {asked} processes and has started {started}: without GPUs it needs "
            f"--multi_gpu to start several. `mmrev train --num_processes {asked}` needs no launcher."
        )
    raise ConfigError(
        f"launch.num_processes = {wanted}, but the launcher has started {started}. If so many are meant, give `train` "
        f"--num_processes {started}; without GPUs accelerate launch starts 1 unless it is told --multi_gpu."
    )


def asked_of_accelerate() -> int | None:
    """The number of processes on the command line of the `accelerate launch` that started this one."""
    import psutil

    words = psutil.Process(os.getppid()).cmdline()
    own = " ".join(words[: words.index("mmrev_kit")] if "mmrev_kit" in words else [])
    asked = re.search(r"--num[_-]processes[= ](\d+)", own)
    return int(asked[1]) if asked else None


def evaluate(given: Namespace) -> None:
    """Ask the tests of an adapter, or without --model_path of the base, and print what the notebook shows of it."""
    base, adapter, more = given.base_model or EMBEDDED[0], None, {}
    default = LAPTOP if base in EMBEDDED else RECIPE
    if given.model_path:
        adapter = find_adapter(given.model_path)
        saved = adapter.parent / "config.yaml"
        if saved.is_file():  # of a run
            default = str(saved)
    check_data_dir(given)
    if given.task:
        more["evaluation.tests"] = list(TESTS) if given.task == "all" else given.task.split(",")
    if given.device_map:
        more |= {"quantization.bits": 16, "launch.num_processes": 1}  # one 16-bit model over all cards
    config = read_flags(given, default, more)
    folder = launch.evaluate(config, adapter and str(adapter), tuple(given.drops.split()))
    found = read_evaluation(folder)
    for line in tables.notes({found.name: found}):
        print(f"NOTE: {line}")
    for (_, direction, group), row in tables.direction_table({found.name: found}).iterrows():
        print("".join(f"{direction}, {form}: {group} {cell}\n" for form, cell in row.items() if cell), end="")
    if found.task:
        print(*tables.verdict_lines(found.verdict()), sep="\n")
    print(f"results: {folder}")


def check_data_dir(given: Namespace) -> None:
    """Raises ConfigError where --data_dir names no folder, with those in data/: nothing is made in its place."""
    if given.data_dir and not resolve(given.data_dir).is_dir():
        there = ", ".join(sorted(str(found.parent) for found in resolve("data").glob("*/entities.json")))
        raise ConfigError(f"{resolve(given.data_dir)}: there is no such folder. In data there are {there or 'none'}.")


def find_adapter(path: str) -> Path:
    """The folder of an adapter, or of a run's best one; ConfigError where none is there, with those in outputs/."""
    for folder in (resolve(path), resolve(path) / "best"):
        if (folder / "adapter_config.json").is_file():
            return folder
    there = ", ".join(sorted(str(found.parent) for found in resolve("outputs").glob("*/*/adapter_config.json")))
    raise ConfigError(f"{resolve(path)}: no adapter is there. In outputs there are {there or 'none'}.")


def generate_data(given: Namespace) -> None:
    """Make the experiment, and the pools that its configuration mixes in."""
    print("\n".join(ensure_data(read_flags(given, FACES))))


def generate_face_retention_pool(given: Namespace) -> None:
    """Make the face pool."""
    print(ensure_pool(read_flags(given, FACES), "face"))


def memory(given: Namespace) -> None:
    """The estimate for a card, component by component, the modes, and the guide's table."""
    config = read_flags(given, RECIPE)
    model = budget.shown_model(config, given.model)
    if model is None:
        return
    found, plan = budget.budget(config, model, given.card, given.micro_batch, processes=config.launch.num_processes)
    print(*(f"{name}: {one.device_gib:.2f} GiB on the card" for name, one in found.items()), *plan.lines(), sep="\n")
    shown = {"float_format": "{:.2f}".format}
    print(f"\nas planned\n{found['as planned'].table().to_string(**shown)}")
    print(f"\nseveral cards\n{budget.mode_table(config, given.card, model).to_string(**shown)}")
    print(f"\nthe guide's budget of the 32B on 32 GB\n{budget.guide_table(config).to_string(**shown)}")


def doctor(given: Namespace) -> int:
    """The preflight; returns 1 where something stands in the way of a run, else 0."""
    from accelerate.commands.config.config_args import default_config_file

    found = preflight(read_flags(given, LAPTOP))
    print(found)
    targets, cuda = torch_build()
    print(f"torch build: {f'CUDA {cuda}, for {chr(32).join(targets)}' if cuda else 'for CPUs only'}")
    kept = Path(default_config_file)
    known = f"{kept}, which only accelerate launch reads" if kept.is_file() else "there is none"
    print(f"accelerate config: {known}; mmrev needs none")
    return 1 if found.problems else 0


def sweep(given: Namespace) -> int:
    """Run a sweep, and write its table; returns 1 where a run failed."""
    study = read_sweep(given.sweep, seeds=given.seeds, overrides=given.overrides)
    print(study, flush=True)
    results = sweep_runs.run_sweep(study, given.parallel)
    for name, one in sweep_results.pooled(results).items():
        print(f"{name}: {one.verdict().claim}")
    print(sweep_results.write_csv(study, results))
    return int(any(result.error for result in results))


def notebook(given: Namespace) -> int:
    """Execute and render a notebook; see `render.execute`."""
    return execute(given.name, given.parameters)


def share(given: Namespace) -> int | None:
    """Write pages that stand alone; see `share.share`."""
    from mmrev_kit.notebook.share import share

    return share(given.notebooks, given.to)


def merge(given: Namespace) -> None:
    """Merge a run's adapter, or one from elsewhere, into its 16-bit base; `hf upload` takes the folder to the hub."""
    made = merge_adapter(given.source, given.out, given.overrides)
    print(f"made {made}. To share it: hf upload YOU/NAME {given.out}")
