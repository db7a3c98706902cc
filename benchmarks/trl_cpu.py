"""Training on a CPU: the kit beside TRL's SFTTrainer, on the same rows of the embedded model.

`python benchmarks/trl_cpu.py` makes an environment of its own for TRL in the user's cache (a few GB, once), lets TRL
choose the fastest of its settings in short runs, then trains with both in turns, once a seed, and prints the table in
Markdown. `--parts` names what is trained on: `recipe`, forward rows of 20 people in updates of 64, as the recipe of the
32B has them and `speed_32b.py` measures them; `laptop`, those of 16 people in updates of 16, as the embedded model's
configuration has them; `default`, what `make run` trains on (both groups, retention). About half an hour; let the
machine do nothing else meanwhile.

All have the same base weights in fp32, the same rows in the same order (but for `grouping epoch`, the kit's other
order), and the same effective batch, LoRA, optimizer, learning rate and two cores. Where an epoch is no multiple of the
batch, its last update is smaller in the kit, while TRL fills it with rows of the next epoch. TRL gets no checkpointing,
loss on the answer only, and prompts that are rendered already; it neither validates nor saves between epochs. *Steady*
is the updates after the first five; *whole* also counts what comes before and after: building the trainer in TRL; the
data check, the vision features and all validations and saves in the kit. Imports count for neither. *CPU* is what the
process computed in the steady state, which other programs disturb least (TRL's dataloader workers, where it has some,
are not in it). All adapters are scored by the kit's validation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

from trl_rows import (
    dataset_of,
    exported,
    limit_pixels,
    lora_arguments,
    read_rows,
    same_tokens,
    training_arguments,
    write_rows,
)

ROOT = Path(__file__).resolve().parent.parent
PINS = ("trl==1.16.0", "datasets==5.2.0")
SETTINGS = [("sdpa", 0), ("eager", 0), ("sdpa", 1), ("sdpa", 2)]  # attention, dataloader workers
MICRO = 16  # rows of a pass that TRL may also choose where an update has more
TRIED = 12  # updates of each of TRL's settings
SKIPPED = 5  # first steps that are no steady state
COMMON = "quantization.bits=16 training.lr_patience=1000 training.min_val_loss=0"
KITS = {"kit": "", "kit, grouping epoch": "training.grouping=epoch"}
FORWARD = "experiment.taught=generation data.num_control=0 retention.retention_ratio=0"
PARTS = {  # configuration, epochs
    "recipe": (f"{FORWARD} experiment.name=rows20 data.num_main=20 training.batch_size=64", 12),
    "laptop": (f"{FORWARD} experiment.name=rows16 data.num_main=16", 6),
    "default": ("", 6),
}


def environment() -> Path:
    """TRL's Python; its environment is made where it is missing or has other versions."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mmrev_kit" / "trl"
    python, ready = folder / "bin" / "python", folder / "ready"
    wanted = (ROOT / "torch.txt").read_text() + (ROOT / "constraints.txt").read_text() + " ".join(PINS)
    if not ready.is_file() or ready.read_text() != wanted:
        print(f"setting up {folder} (several minutes)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        words = ["-r", "torch.txt", "-c", "constraints.txt", *PINS, "transformers", "peft", "accelerate", "pillow"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *words], cwd=ROOT, check=True)
        ready.write_text(wanted)
    return python


def run_job(python: str | Path, kind: str, job: dict) -> dict:
    """One training in a fresh process on two cores."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        own = {"OMP_NUM_THREADS": str(len(cores)), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        own |= {"GOMP_SPINCOUNT": job["spins"]} if job.get("spins") else {}
        done = subprocess.run(
            [str(python), __file__, "--worker", kind, str(path)], cwd=ROOT, env=os.environ | own, text=True,
            capture_output=True, preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{kind} failed:\n{done.stderr[-4000:]}")
        return json.loads(path.read_text())


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def rates(taken: list[tuple[float, float]], job: dict, rows_per_epoch: int, seconds: float) -> dict:
    """What is told of a training.

    Args:
        taken: (wall, CPU) seconds of each update.
        rows_per_epoch: the last update of an epoch holds what is left.
        seconds: the whole training.
    """
    each = math.ceil(rows_per_epoch / job["batch"])
    counts = [min(job["batch"], rows_per_epoch - index % each * job["batch"]) for index in range(len(taken))]
    wall, cpu = (sum(update[clock] for update in taken[SKIPPED:]) for clock in (0, 1))
    steady = sum(counts[SKIPPED:])
    return {"rows": sum(counts), "steps": len(counts), "steady": steady / wall, "cpu": 1000 * cpu / steady,
            "whole": sum(counts) / seconds, "seconds": seconds}  # fmt: skip


# ---- the kit


def state_here():
    """One process on the CPU."""
    from types import SimpleNamespace

    import torch

    return SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu"))


def configuration(job: dict):
    """The kit's configuration of a job; what was made for one job is not found by the next."""
    from mmrev_kit.config.reading import load_config

    own = f"{PARTS[job['part']][0]} {job.get('more', '')} experiment.seed={job['seed']}"
    own += f" training.num_epochs={job['epochs']}"
    folders = f"data.dir={job['folder']}/data_{job['seed']} launch.output_dir={job['output']}"
    return load_config("configs/tiny_cpu.yaml", f"{COMMON} {own} {folders}")


def train_kit(job: dict) -> dict:
    """The kit's own training loop, from the data check to `final/`."""
    from mmrev_kit.config.project import run_dir
    from mmrev_kit.training import loop  # here: TRL's environment has no kit

    config = configuration(job)
    update, taken = loop.update, []

    def timed(run, samples) -> dict:
        began = now()
        record = update(run, samples)
        taken.append(tuple(after - before for before, after in zip(began, now(), strict=True)))
        return record

    loop.update = timed
    began = time.perf_counter()
    loop.train(config, state_here())
    found = rates(taken, job, job["rows_per_epoch"], time.perf_counter() - began)
    assert found["rows"] == job["rows"]
    return found | {"adapter": str(run_dir(config) / "final")}


def export(part: str, seed: int, folder: Path) -> dict:
    """Make the data, and write the rows of all epochs in the kit's order as texts and images for TRL.

    Returns:
        The job that both sides get: numbers, the settings of LoRA and optimizer, and the rows' file.
    """
    from mmrev_kit.config.project import EMBEDDED_MODEL
    from mmrev_kit.data.make import ensure_data
    from mmrev_kit.training.run import ordered_rows, prepare

    epochs = PARTS[part][1]
    job = {"part": part, "seed": seed, "epochs": epochs, "folder": str(folder), "output": f"{folder}/none"}
    config = configuration(job)
    ensure_data(config)
    task = prepare(config)
    encoder, found = task.encoder, []
    for epoch in range(epochs):
        for source, index in ordered_rows(config, task, epoch):
            found.append(exported(encoder, task.train[source][index]))
    path = folder / f"rows_{part}_{seed}.jsonl"
    write_rows(path, found)
    names = "|".join(config.lora.target_modules)
    training = config.training
    return job | {
        "file": str(path), "rows": len(found), "rows_per_epoch": task.plan.rows_per_epoch,
        "batch": training.batch_size * training.gradient_accumulation_steps, "model": str(EMBEDDED_MODEL),
        "pixels": [config.model.min_pixels, config.model.max_pixels], "max_grad_norm": training.max_grad_norm,
        "learning_rate": training.learning_rate, "weight_decay": training.weight_decay,
        "warmup": training.warmup_ratio, "r": config.lora.r, "alpha": config.lora.alpha,
        "dropout": config.lora.dropout, "targets": rf"model\.language_model\.layers\..*\.({names})",
    }  # fmt: skip


def score(job: dict, adapters: dict[str, str]) -> dict[str, float]:
    """The kit's validation loss of each adapter, over the rows of the run's own task."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from mmrev_kit.training.run import start
    from mmrev_kit.training.update import validate

    config = configuration(job | {"output": f"{job['folder']}/score"})
    run, losses = start(config, state_here()), {}
    for name, adapter in adapters.items():
        found = set_peft_model_state_dict(run.model, load_file(Path(adapter) / "adapter_model.safetensors"))
        assert not found.unexpected_keys
        losses[name] = validate(run)[config.experiment.task]
    return losses


# ---- TRL


def train_trl(job: dict) -> dict:
    """TRL's SFTTrainer over the exported rows, in their order."""
    import torch
    from peft import LoraConfig
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = read_rows(job["file"], job.get("limit"))
    processor = limit_pixels(AutoProcessor.from_pretrained(job["model"]), job["pixels"])
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation=job["attention"]
    )
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            ends.append(now())

    steps = math.ceil(len(rows) / job["batch"])
    settings = SFTConfig(
        **training_arguments(job, job["micro"]), lr_scheduler_type="constant_with_warmup",
        warmup_steps=math.ceil(job["warmup"] * steps), optim="adamw_torch", completion_only_loss=True,
        gradient_checkpointing=False, bf16=False, fp16=False, use_cpu=True, dataloader_num_workers=job["workers"],
        dataloader_persistent_workers=bool(job["workers"]), dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", **lora_arguments(job))
    began = time.perf_counter()
    trainer = SFTTrainer(model=model, args=settings, train_dataset=dataset_of(rows), processing_class=processor,
                         peft_config=lora, callbacks=[Clock()])  # fmt: skip
    built = time.perf_counter() - began
    first = next(iter(trainer.get_train_dataloader()))  # the same tokens, and loss on the same ones?
    assert same_tokens(first, rows[: job["micro"]])
    began = now()
    trainer.train()
    trainer.save_model(job["output"])
    seconds = built + time.perf_counter() - began[0]
    pairs = zip([began, *ends], ends, strict=False)
    taken = [tuple(after - before for before, after in zip(*pair, strict=True)) for pair in pairs]
    found = rates(taken, job, len(rows), seconds)
    assert found["rows"] == len(rows)
    versions = {name: version(name) for name in ("trl", "datasets", "torch", "transformers", "peft")}
    return found | {"adapter": job["output"], "versions": versions}


def best_settings(python: Path, job: dict) -> tuple[dict, list[str]]:
    """TRL's fastest settings on the first rows, and a line about each that was tried."""
    from mmrev_kit.training.jobs import SPINS

    tried, batch = [], job["batch"]
    limit = {"limit": batch * (SKIPPED + TRIED), "output": f"{job['folder']}/try"}
    micros = (batch, MICRO) if batch > MICRO else (batch,)
    for (attention, workers), spins, micro in itertools.product(SETTINGS, (None, SPINS), micros):
        own = {"attention": attention, "workers": workers, "spins": spins, "micro": micro}
        tried.append((run_job(python, "trl", job | own | limit)["steady"], own))
    how = {None: "", SPINS: ", threads that wait as the kit's"}  # None: as OpenMP waits by itself
    lines = [f"{own['attention']}, {own['workers']} workers, {own['micro']} rows{how[own['spins']]}: {rate:.1f}"
             for rate, own in tried]  # fmt: skip
    return max(tried, key=lambda pair: pair[0])[1], lines


def compare(python: Path, part: str, seeds: int, folder: Path) -> None:
    """Train with all in turns, once a seed, and print the table of one part."""
    from mmrev_kit.training.jobs import SPINS

    found = {name: [] for name in (*KITS, "TRL")}
    for seed in range(seeds):
        job = export(part, seed, folder)
        if seed == 0:
            chosen, lines = best_settings(python, job)
            print(f"\n### {part}: {job['rows']:,} samples in {job['epochs']} epochs, {job['batch']} an update\n")
            print(f"TRL's settings, samples/s: {'; '.join(lines)}.\n")
        for number, name in enumerate(found):
            own = {"output": f"{folder}/{part}_{seed}_{number}"}
            own |= chosen if name == "TRL" else {"more": KITS[name], "spins": SPINS}
            result = run_job(*((python, "trl") if name == "TRL" else (sys.executable, "kit")), job | own)
            found[name].append(result)
        losses = score(job, {name: results[-1]["adapter"] for name, results in found.items()})
        for name, results in found.items():
            results[-1]["loss"] = losses[name]
            numbers = ", ".join(f"{key} {results[-1][key]:.2f}" for key in ("steady", "whole", "cpu", "loss"))
            print(f"seed {seed}, {name}: {numbers}; load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    print(
        "| trainer | samples/s, steady (x TRL) | samples/s, whole (x TRL) | CPU s a 1,000 samples | validation loss |"
    )
    print("|---|---|---|---|---|")
    for name, results in found.items():
        pairs = list(zip(results, found["TRL"], strict=True))
        cells = [f"{mean(own[key] for own in results):.1f} ({mean(own[key] / trl[key] for own, trl in pairs):.2f})"
                 for key in ("steady", "whole")]  # fmt: skip
        losses = [own["loss"] for own in results]
        cells += [f"{mean(own['cpu'] for own in results):.1f}"]
        cells += [f"{mean(losses):.4f}" + (f" ± {stdev(losses):.4f}" if seeds > 1 else "")]
        print(f"| {name} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {number}" for name, number in found["TRL"][0]["versions"].items())
    updates = f"{found['kit'][0]['steps']} updates, {found['TRL'][0]['steps']} of TRL"
    print(f"\n{seeds} seeds, {updates}. {versions}; Python {platform.python_version()}.", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "JOB"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        kind, path = given.worker
        result = {"kit": train_kit, "trl": train_trl}[kind](json.loads(Path(path).read_text()))
        Path(path).write_text(json.dumps(result))
        return
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}", file=sys.stderr)
    python = environment()
    with tempfile.TemporaryDirectory() as folder:
        for part in given.parts.split(","):
            compare(python, part, given.seeds, Path(folder))


if __name__ == "__main__":
    main()
