"""Training on one GPU: the kit beside TRL's SFTTrainer and beside Unsloth, with random weights of a published size.

`python benchmarks/peers.py --model 2b --sites DIR --out DIR` saves the architecture as a stock 16-bit checkpoint and
trains on it with each, in turn and in processes of their own: forward rows of 20 people (`forward`), and the recipe's
mix with 30 % retention (`mix`). `DIR/site_trl` and `DIR/site_unsloth` hold the peers' libraries, each pinned as its
authors pin them. All have the same rows in the same order, 448-pixel images, updates of 64 rows, NF4 (everything but
the head), bf16, LoRA r 8 on q, k, v, o with equal first values, no dropout, AdamW and a constant learning rate.

The kit is as planned for the card, from cached vision features; a peer tries its settings on the first rows and takes
the fastest. The first `EQUAL` updates hold rows whose answers are all of one length, for which the kit's loss, a mean
over rows, and the peers', a mean over tokens, are one: these losses are compared. The rate is that of the median update
after them. *Before* is all up to the first update but imports: loading the model and, in the kit, the data check and
the vision features. TFLOP/s count what a trainer gives to the language model, two passes a token and no recomputation
(`mmrev_kit/training/throughput.py`): the kit gives it shared tokens once, the peers repeat them, so that only samples
a second compare; MFU is the share of 8192 x 8192 products measured before.

A peer that fails has a row with its last words. `--model embedded` rehearses the whole program on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from trl_rows import exported, write_rows

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"forward": "retention.retention_ratio=0", "mix": ""}
EQUAL, TIMED = 5, 8  # updates whose losses are compared, and updates that are timed
PEERS = {  # worker, folder of its libraries, share of the time
    "kit": ("kit", "", 2.0),
    "TRL": ("trl", "site_trl", 1.2),
    "Unsloth": ("unsloth", "site_unsloth", 2.0),
    "TRL, Liger kernels": ("liger", "site_trl", 1.0),
}
TOLERANCE = 0.02  # nats: what NF4, bf16 products and bf16 adapters may move a loss of about 12, half a unit of bf16
HEAD = ("trainer", "samples/s", "kit's x", "first update, s", "before, s", "peak GiB (reserved)", "TFLOP/s", "MFU",
        f"losses of {EQUAL} updates: largest difference")  # fmt: skip


# ---- the kit's processes


def state_here(job: dict):
    """One process on the first GPU, or on the CPU."""
    from types import SimpleNamespace

    import torch

    device = torch.device("cuda", 0) if job["cuda"] else torch.device("cpu")
    return SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=device)


def configure(job: dict, part: str):
    """The published recipe with this job's model, rows and numbers, in one process."""
    from mmrev_kit.config.reading import load_config

    least, most = job["pixels"]
    return load_config(
        "configs/config_qwen3vl32_fp16.yaml",
        f"model.name={job['model']} model.min_pixels={least} model.max_pixels={most} experiment.name={part} "
        f"data.dir={job['folder']}/data data.image_size={job['side']} data.num_main={job['people']} "
        f"retention.num_faces={5 * job['people']} retention.face_pool={job['folder']}/pool "
        f"quantization.bits={4 if job['cuda'] else 16} quantization.compute_dtype={'bf16' if job['cuda'] else 'fp32'} "
        f"lora.r={job['r']} lora.alpha={job['alpha']} lora.dropout={job['dropout']} training.batch_size={job['batch']} "
        f"training.gradient_accumulation_steps=1 training.weight_decay={job['weight_decay']} "
        f"launch.num_processes=1 launch.output_dir={job['folder']}/outputs launch.overwrite=true {PARTS[part]}",
    )


def updates_of(config, task) -> list[list]:
    """The samples of the updates that all train on: `EQUAL` of rows with answers of one length, then `TIMED` of all."""
    from mmrev_kit.training.run import planned_updates
    from mmrev_kit.training.update import chunks

    batch = config.training.batch_size
    rows = [sample for samples in planned_updates(config, task, batch) for sample in samples]
    lengths = Counter(len(sample.input_ids) - sample.answer_start for sample in rows)
    [(common, _)] = lengths.most_common(1)
    equal = [sample for sample in rows if len(sample.input_ids) - sample.answer_start == common]
    found = [*chunks(equal, batch)[:EQUAL], *chunks(rows, batch)[:TIMED]]
    if any(len(samples) < batch for samples in found):
        raise ValueError(f"{len(equal)} rows with answers of {common} tokens, {len(rows)} in all: too few.")
    return found


def make_ready(job: dict) -> None:
    """Save the checkpoint, and the rows of each part for the peers; tell their FLOPs and the card's peak."""
    from modes import save_random
    from peer_trainers import tell

    from mmrev_kit.data.make import ensure_data
    from mmrev_kit.model.loading import torch_dtype
    from mmrev_kit.training.run import prepare
    from mmrev_kit.training.throughput import measure_peak_flops

    if job["architecture"]:
        save_random(job["architecture"], Path(job["model"]))
    device = state_here(job).device
    peak = measure_peak_flops(device, torch_dtype("auto", device))
    tell(job, event="card", flops=peak)
    for part, path in job["rows"].items():
        config = configure(job, part)
        ensure_data(config)
        task = prepare(config)
        updates = updates_of(config, task)
        write_rows(Path(path), [exported(task.encoder, sample) for samples in updates for sample in samples])
        work = [sum(len(sample.input_ids) for sample in samples) for samples in updates]
        answers = [sum(len(sample.input_ids) - sample.answer_start for sample in samples) for samples in updates]
        tell(job, event="rows", part=part, flops=update_flops(job, config, list(zip(work, answers, strict=True))))


def update_flops(job: dict, config, computed: list[tuple[int, int]]) -> list[float]:
    """FLOPs of updates of so many (tokens, logits), no layer recomputed."""
    from transformers import AutoConfig

    from mmrev_kit.training.throughput import flops

    text = AutoConfig.from_pretrained(job["model"]).text_config
    return [flops(text, tokens, logits, 0.0, config.lora.target_modules) for tokens, logits in computed]


def share_adapter(model, path: Path) -> None:
    """Give an adapter the values of the file; the first time, write the file."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    if path.is_file():
        set_peft_model_state_dict(model, load_file(path))
    else:
        save_file({name: value.cpu() for name, value in get_peft_model_state_dict(model).items()}, path)


def train_kit(job: dict) -> None:
    """The kit's own update on the rows of each part, in a run as it starts by itself."""
    from types import SimpleNamespace

    import torch
    from peer_trainers import GIB, clean, tell

    from mmrev_kit.training.run import start
    from mmrev_kit.training.update import update

    for part in job["rows"]:
        config, began = configure(job, part), time.perf_counter()
        run = start(config, state_here(job))
        before = time.perf_counter() - began
        share_adapter(run.model, Path(job["adapter"]))
        run.schedule = SimpleNamespace(lr_at=lambda step: job["learning_rate"])
        run.model.train()
        seconds, losses, computed = [], [], []
        clean(job)
        for samples in updates_of(config, run.task):
            began = time.perf_counter()
            losses.append(update(run, samples)["loss"])  # its norm was read: nothing is left running
            if job["cuda"]:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            computed.append(run.computed)
        found = {"seconds": seconds, "losses": losses, "flops": update_flops(job, config, computed)}
        if job["cuda"]:
            found["allocated"] = torch.cuda.max_memory_allocated() / GIB
            found["reserved"] = torch.cuda.max_memory_reserved() / GIB
        memory, names = run.config.memory, ("micro_tokens", "gradient_checkpointing", "kept_layers")
        chosen = {name: getattr(memory, name) for name in names}
        tell(job, event="result", part=part, settings=chosen, before=before, **found)
        del run
        clean(job)


# ---- the processes in turn


def links(folder: Path, names: tuple[str, ...]) -> Path:
    """A folder with nothing but links to installed packages, so that what lies beside them is not found with them."""
    folder.mkdir(exist_ok=True)
    for name in names:
        spec = find_spec(name)
        if spec is None:
            continue
        package = Path(spec.origin).parent
        for path in (package, *package.parent.glob(f"{name}-*.dist-info")):
            if not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    return folder


def environment(site: str, given, folder: Path) -> dict:
    """Variables of a worker: the kit's libraries; or TRL's before them; or Unsloth's, with bitsandbytes alone beside
    what the machine has, because it takes no transformers as new as the kit's."""
    inherited = os.environ.get("PYTHONPATH", "")
    paths = [str(ROOT), inherited]
    if site:
        paths = [str(Path(given.sites).resolve() / site), inherited]
    if site == "site_unsloth":
        paths[1] = str(links(folder / "links", ("bitsandbytes",)))
    own = {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "HF_HUB_OFFLINE": "1"}
    own |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "WANDB_DISABLED": "true"}
    return os.environ | own | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "UNSLOTH_DISABLE_STATISTICS": "1"}


def run_worker(kind: str, site: str, job: dict, seconds: float, given, folder: Path) -> str:
    """Run a worker for at most so many seconds; what it says goes to the log.

    Returns:
        Why it failed: its last line; empty where it did not.
    """
    path, script = folder / "job.json", Path(__file__).with_name("peer_trainers.py")
    path.write_text(json.dumps(job | {"try_until": time.time() + 0.45 * seconds}))
    command = [sys.executable, str(script), kind] if site else [sys.executable, __file__, "--worker", kind]
    log = folder / f"{kind}.log"
    with open(log, "w") as file:
        began = time.perf_counter()
        variables, where = environment(site, given, folder), folder if site else ROOT
        worker = subprocess.Popen([*command, str(path)], cwd=where, env=variables, stdout=file,
                                  stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        try:
            worker.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)  # with the processes of its loader
            worker.wait()
    text = log.read_text(errors="replace")
    with open(given.out / f"{given.model}.log", "a") as file:
        file.write(f"\n==== {kind}: {time.perf_counter() - began:.0f} s, exit {worker.returncode}\n{text}")
    if worker.returncode == 0:
        return ""
    if worker.returncode == -signal.SIGKILL:
        return f"stopped after {seconds:.0f} s"
    return ([line for line in text.splitlines() if line.strip()] or ["no word"])[-1].strip()


# ---- the tables


def row(result: dict, kit: dict | None, job: dict, rows: dict, peak: float | None) -> str:
    """A peer's line of a part's table."""
    timed = result["seconds"][EQUAL:]
    rate = job["batch"] / statistics.median(timed)
    work = result.get("flops") or rows["flops"]
    speed = statistics.median(done / seconds for done, seconds in zip(work[EQUAL:], timed, strict=True))
    times = worst = memory = ""
    if kit:
        times = f"{job['batch'] / statistics.median(kit['seconds'][EQUAL:]) / rate:.2f}"
        pairs = zip(kit["losses"][:EQUAL], result["losses"][:EQUAL], strict=False)
        most = max(abs(own - other) for own, other in pairs)
        worst = f"{most:.4f}" + ("" if most <= job["tolerance"] else " (not equal)")
        worst += "" if result.get("same tokens", True) else ", other tokens"
    if "allocated" in result:
        memory = f"{result['allocated']:.2f} ({result['reserved']:.2f})"
    cells = [result["peer"], f"{rate:.1f}", times, f"{result['seconds'][0]:.1f}", f"{result['before']:.0f}", memory]
    cells += [f"{speed / 1e12:.4g}", f"{speed / peak:.1%}" if peak else "", worst]
    return f"| {' | '.join(cells)} |"


def report(job: dict, failures: dict[str, str]) -> str:
    """All tables, of what is known so far."""
    path = Path(job["events"])
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    peak = next((event["flops"] for event in events if event["event"] == "card"), None)
    text = [f"{peak / 1e12:.0f} TFLOP/s in bf16 products of 8192 x 8192."] if peak else []
    for part in PARTS:
        rows = next((event for event in events if event["event"] == "rows" and event["part"] == part), None)
        results = [event for event in events if event["event"] == "result" and event["part"] == part]
        kit = next((result for result in results if result["peer"] == "kit"), None)
        text += ["", f"{part}:", "", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
        text += [row(result, kit, job, rows, peak) for result in results]
        have = {result["peer"] for result in results}
        text += [f"| {name} | {reason} |" + " |" * (len(HEAD) - 2)
                 for name, reason in failures.items() if name not in have]  # fmt: skip
        losses = [f"{result['peer']} {' '.join(f'{loss:.4f}' for loss in result['losses'][:EQUAL])}"
                  for result in results]  # fmt: skip
        text += ["", f"First losses: {'; '.join(losses)}. Taken as equal up to {job['tolerance']:g}."]
    text += ["", "Settings tried:", ""]
    for event in events:
        if event["event"] in ("tried", "not tried"):
            said = event.get("error") or (f"{event['rate']:.1f} samples/s" if "rate" in event else "no time left")
            own = ", ".join(f"{name} {value}" for name, value in event["settings"].items())
            text.append(f"- {event['peer']}, {own}: {said}")
    chosen = {event["peer"]: event["settings"] for event in events if event["event"] == "result"}
    return "\n".join([*text, "", *(f"- {name} took {settings}" for name, settings in chosen.items())]) + "\n"


def new_job(given, folder: Path) -> dict:
    """What all workers are told."""
    from mmrev_kit.config.project import EMBEDDED_MODEL
    from mmrev_kit.memory.shapes import architecture_file

    tiny = given.model == "embedded"
    side, names = (64 if tiny else 448), "q_proj|k_proj|v_proj|o_proj"
    return {
        "architecture": "" if tiny else str(architecture_file(given.model)), "cuda": not tiny,
        "model": str(EMBEDDED_MODEL if tiny else folder / "model"), "folder": str(folder), "side": side,
        "pixels": [min(65536, side**2), side**2], "people": 4 if tiny else 20, "batch": 8 if tiny else 64, "seed": 0,
        "r": 8, "alpha": 16, "dropout": 0.0, "targets": rf"model\.language_model\.layers\..*\.({names})",
        "learning_rate": 1e-3, "weight_decay": 0.01, "max_grad_norm": 1.0, "workers": 2 if tiny else 8,
        "rows": {part: str(folder / f"{part}.jsonl") for part in PARTS}, "adapter": str(folder / "first.safetensors"),
        "output": str(folder / "peer"), "tolerance": 1e-4 if tiny else TOLERANCE,
        "events": str(given.out / f"{given.model}.jsonl"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="2b", help="a size, or embedded")
    parser.add_argument("--sites", default=".", help="the folder of site_trl and site_unsloth")
    parser.add_argument("--seconds", type=float, default=240.0, help="for everything; each peer gets its share")
    parser.add_argument("--peers", default=";".join(PEERS), help="separated by semicolons")
    parser.add_argument("--out", type=Path, default=Path("."), help="for the tables, the events and the log")
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "JOB"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        kind, path = given.worker
        {"ready": make_ready, "kit": train_kit}[kind](json.loads(Path(path).read_text()))
        return
    end, failures = time.time() + given.seconds, {}
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder, todo = Path(name), given.peers.split(";")
        job = new_job(given, folder)
        if reason := run_worker("ready", "", job | {"peer": "ready"}, end - time.time(), given, folder):
            sys.exit(f"no checkpoint or no rows: {reason}")
        while todo:
            peer = todo.pop(0)
            kind, site, share = PEERS[peer]
            seconds = (end - time.time()) * share / (share + sum(PEERS[other][2] for other in todo))
            failures[peer] = run_worker(kind, site, job | {"peer": peer}, seconds, given, folder) or "no result"
            (given.out / f"{given.model}.md").write_text(report(job, failures))
    print(f"{platform.machine()}, Python {platform.python_version()}.\n\n{report(job, failures)}", flush=True)


if __name__ == "__main__":
    main()
