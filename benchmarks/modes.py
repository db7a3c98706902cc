"""The modes side by side on the GPUs of this machine, with random weights: samples or prompts a second, and the peak.

`python benchmarks/modes.py` takes two GPUs and less than ten minutes, and prints a table in Markdown. `qlora` (NF4) and
`deepspeed` (a 16-bit base, ZeRO-2) train an epoch of 16 people in updates of 64 rows, through the launcher and as
planned for the card; the rate is the median over the updates after the first `WARM_UP`. `auto` (one 16-bit model spread
over the cards) answers 20 prompts of each test, of at most 32 tokens, which random weights fill; its weights lie in a
folder while it does. Peaks are what PyTorch allocated on the fullest card.

`--models embedded` runs the whole program on two CPU processes, where nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import shutil
import statistics
import tempfile
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mmrev_kit.config.errors import Told
from mmrev_kit.config.project import ASSETS
from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import Config
from mmrev_kit.data.make import ensure_data
from mmrev_kit.memory.shapes import architecture_file
from mmrev_kit.notebook.launch import evaluate, launch
from mmrev_kit.training.preflight import read_cards

WARM_UP = 3  # updates that are not counted: they make kernels
TRAINED = {"qlora": "quantization.bits=4", "deepspeed": "launch.mode=deepspeed quantization.bits=16"}
HEAD = "| mode | model | cards | does | a second | peak GiB of a card | whole, s |"


def configure(model: str, folder: str, processes: int, more: str) -> Config:
    """A configuration for one model and mode; pictures are the embedded model's or the published recipe's."""
    tiny = model.startswith(str(ASSETS))
    side, rows = (64, 8) if tiny else (448, 64)
    config = load_config(
        None,
        f"model.name={model} model.min_pixels={min(65536, side**2)} model.max_pixels={side**2} "
        f"experiment.name=people{side} data.dir={folder} data.image_size={side} data.num_main={4 if tiny else 16} "
        f"retention.retention_ratio=0 training.num_epochs=1 training.max_length=1024 "
        f"training.batch_size={rows // processes} training.gradient_accumulation_steps=1 "
        f"quantization.compute_dtype=auto launch.num_processes={processes} {more}",
    )
    ensure_data(config)
    return config


def train(model: str, mode: str, folder: str, processes: int) -> tuple[str, float, float]:
    """What an epoch does, its samples a second, and its peak in GiB."""
    out = f"launch.output_dir={folder}/{mode}"
    history = launch(configure(model, folder, processes, f"{TRAINED[mode]} {out} launch.overwrite=true"))
    *steps, _ = history["steps"][WARM_UP:]  # the last update has fewer rows
    rate = statistics.median(step["samples_per_second"] for step in steps)
    return "training, samples", rate, max(step["peak_memory_gib"] for step in history["steps"])


def save_random(model: str, folder: Path) -> None:
    """A model with random 16-bit weights as a folder; the embedded tokenizer stands in for its own."""
    import torch

    from mmrev_kit.model.loading import existing_device, random_model
    from mmrev_kit.model.processor import load_processor
    from mmrev_kit.model.qwen3vl import read_architecture

    device = existing_device(None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random_model(read_architecture(model), dtype, device, 0, None).save_pretrained(folder)
    load_processor(model).save_pretrained(folder)


def ask(model: str, mode: str, folder: str, processes: int) -> tuple[str, float, float]:
    """What an evaluation does, its prompts a second, and its peak in GiB, of a model that all cards hold together."""
    weights = Path(folder) / "weights"
    maker = multiprocessing.get_context("spawn").Process(target=save_random, args=(model, weights))
    maker.start()  # a process of its own, so that nothing stays on a card
    maker.join()
    more = f"launch.mode={mode} quantization.bits=16 evaluation.max_samples=20 launch.output_dir={folder}/{mode}"
    config = configure(model, folder, 1, more)
    config.model.name = str(weights)
    try:
        facts = json.loads((evaluate(config, None) / "facts.json").read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(weights)
    return "evaluation, prompts", facts["prompts_per_second"], facts["peak_memory_gib"]


def line(name: str, mode: str, cards: int, measure) -> str:
    """One row of the table; a mode that cannot be run says why."""
    began = time.perf_counter()
    try:
        does, rate, peak = measure()
        cells = [does, f"{rate:.2f}", f"{peak:.2f}"]
    except Told as error:
        cells = [str(error).splitlines()[0], "", ""]
    text = f"| {' | '.join([mode, name, str(cards), *cells, f'{time.perf_counter() - began:.0f}'])} |"
    print(text, flush=True)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="2b,8b", help="sizes, architecture files or embedded, separated by commas")
    parser.add_argument("--modes", default="qlora,deepspeed,auto")
    parser.add_argument("--seconds", type=float, default=560.0, help="rows that would start later are left out")
    parser.add_argument("--out", help="a file for the table")
    given = parser.parse_args()
    cards, deadline = read_cards(), time.perf_counter() + given.seconds
    lines = []
    for name in given.models.split(","):
        model = name if name.endswith(".json") else architecture_file(name)
        model = str(ASSETS / name / "config.json") if name == "embedded" else model
        for mode in given.modes.split(","):
            if time.perf_counter() > deadline:
                print(f"no time left for {mode}, {name}", flush=True)
                continue
            with tempfile.TemporaryDirectory() as folder:
                measure = partial(ask if mode == "auto" else train, model, mode, folder, len(cards) or 2)
                lines.append(line(name, mode, len(cards), measure))
    versions = []
    for package in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    where = f"{len(cards)} x {cards[0].name}" if cards else f"{platform.machine()} CPU, where nothing is measured"
    table = "\n".join([f"{where}. {', '.join(versions)}.", "", HEAD, "|" + "---|" * HEAD.count(" |"), *lines])
    print(f"\n{table}")
    if given.out:
        Path(given.out).write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
