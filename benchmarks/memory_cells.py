"""The memory estimate beside what a GPU allocates, cell by cell, with random NF4 weights.

`python benchmarks/memory_cells.py` measures, for each model, micro-batches of 1, 4 and 16 x checkpointing on and off x
logits at all positions or at the answers x vision features cached or not x rows packed or not, and prints a table in
Markdown with the card and the versions; micro-batches that run out of memory have a row, too. A cell is two updates of
one micro-batch each. Rows are forward rows of one image (448 x 448: 196 visual tokens), 36 text and 9 answer tokens;
packed, an image has eight of them.

`--models mmrev_kit/assets/embedded/config.json --image-size 64` runs the whole program on a CPU, where nothing is
measured.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import platform
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from speed_32b import Bench, forward_samples

from mmrev_kit.config.reading import load_config
from mmrev_kit.memory.estimate import PHASES, estimate
from mmrev_kit.memory.plan import with_memory
from mmrev_kit.memory.shapes import PUBLISHED, architecture_file
from mmrev_kit.model.batches import GPU_MULTIPLE, Batcher, lay_out, shares
from mmrev_kit.model.features import build_features
from mmrev_kit.model.loading import adapter_arguments, add_adapter, base_arguments, load_base, torch_dtype, trainable
from mmrev_kit.model.packing import Layout, attention_scale
from mmrev_kit.model.plain import core_model
from mmrev_kit.model.processor import make_encoder
from mmrev_kit.model.qwen3vl import drop_tower
from mmrev_kit.training.update import sample_losses

GIB, IMAGES, PACKED_ROWS = 2**30, 16, 8
HEAD = "| model | micro-batch | checkpointing | logits | vision | rows | tokens | predicted | allocated | error "
HEAD += "| reserved, predicted | reserved | error |"


@dataclass(frozen=True)
class Cell:
    """One way to run a micro-batch; `micro` counts rows, or images of `PACKED_ROWS` rows where they are packed."""

    micro: int
    checkpointing: bool
    answer_logits: bool
    cached: bool
    packed: bool

    def words(self) -> list[str]:
        return [
            f"{self.micro}{f' x {PACKED_ROWS}' if self.packed else ''}",
            "on" if self.checkpointing else "off",
            "answers" if self.answer_logits else "all",
            "cached" if self.cached else "tower",
            "packed" if self.packed else "padded",
        ]


def cells(micro: list[int], cached: bool) -> list[Cell]:
    """The cells with or without the cache, small micro-batches first."""
    found = itertools.product(micro, (False, True), (True, False), (True, False))
    return [Cell(size, checks, answers, cached, packed) for size, packed, checks, answers in found]


def all_logits_loss(model, batch, device, dtype):
    """The answer tokens' loss with logits at every position, as the library's own loss computes it."""
    inputs = dict(batch.inputs)
    wanted = inputs.pop("logits_to_keep").flatten().nonzero()[:, 0]
    labels = torch.full((batch.inputs["input_ids"].numel(),), -100, device=device)
    labels[wanted if batch.predictor is None else wanted[batch.predictor]] = batch.target
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = model(**inputs).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels)


def make_ready(bench: Bench, cell: Cell) -> None:
    """The model as the cell wants it, and a clean allocator."""
    core = core_model(bench.model)
    if cell.checkpointing:
        core.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        core.gradient_checkpointing_disable()
    bench.model.train()
    gc.collect()
    if bench.cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(bench: Bench, cell: Cell, samples: list, batcher: Batcher) -> tuple[float, float] | None:
    """GiB allocated and reserved at the peak of two updates; None where memory ran out; zeros on a CPU."""
    make_ready(bench, cell)
    parameters, device, dtype = trainable(bench.model), bench.state.device, bench.dtype
    optimizer = torch.optim.AdamW(parameters, 1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    try:
        for _ in range(2):
            for batch in batcher.batches(samples):
                if cell.answer_logits:
                    loss = sample_losses(bench.model, batch, device, dtype).mean()
                else:
                    loss = all_logits_loss(bench.model, batch, device, dtype)
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError:
        optimizer.zero_grad(set_to_none=True)
        return None
    if not bench.cuda:
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def line(bench: Bench, cell: Cell, model: str, samples: list) -> str:
    """One row of the table."""
    packing, whole = "shared_prefix" if cell.packed else "none", 1 << 30  # one micro-batch, whatever its size
    layout = Layout(packing, whole, attention_scale(bench.core.config.text_config), GPU_MULTIPLE)
    batcher = Batcher(layout, bench.encoder, bench.features if cell.cached else None, bench.state.device)
    (one,) = lay_out(shares(samples, packing, bench.encoder.image_id, 1)[0], layout)
    if not cell.answer_logits:
        one = replace(one, logits=one.tokens)
    config = with_memory(bench.config, gradient_checkpointing=cell.checkpointing, cache_features=cell.cached)
    phases = tuple(phase for phase in PHASES if not (cell.cached and phase == "vision tower"))
    wanted = estimate(config, config.model.name, [one], accumulates=False, phases=phases)
    found = measure(bench, cell, samples, batcher)
    words = [model, *cell.words(), f"{one.tokens:,}", f"{wanted.allocated_gib:.2f}"]
    if found is None:
        words += ["out of memory", "", f"{wanted.reserved_gib:.2f}", "", ""]
    elif not bench.cuda:
        words += ["-", "-", f"{wanted.reserved_gib:.2f}", "-", "-"]
    else:
        words += [f"{found[0]:.2f}", f"{wanted.allocated_gib / found[0] - 1:+.1%}"]
        words += [f"{wanted.reserved_gib:.2f}", f"{found[1]:.2f}", f"{wanted.reserved_gib / found[1] - 1:+.1%}"]
    text = f"| {' | '.join(words)} |"
    print(text, flush=True)
    return text


def build(given, architecture: str, folder: str) -> Bench:
    """The model with its adapter, and an encoder."""
    device = torch.device("cuda", 0) if given.cuda else torch.device("cpu")
    state = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=device)
    pixels = given.image_size**2
    config = load_config(
        "configs/config_qwen3vl32_fp16.yaml",
        f"model.name={architecture} model.max_pixels={pixels} model.min_pixels={min(65536, pixels)} "
        f"data.image_size={given.image_size} launch.output_dir={folder}/outputs launch.num_processes=1 "
        f"quantization.compute_dtype={given.dtype if given.cuda else 'auto'}",
    )
    began = time.perf_counter()
    model = add_adapter(load_base(**base_arguments(config, device)), **adapter_arguments(config))
    print(f"{architecture}: built in {time.perf_counter() - began:.0f} s", flush=True)
    dtype = torch_dtype(config.quantization.compute_dtype, device)
    return Bench(config, state, model, dtype, make_encoder(config), None, 0.0)


def run_model(given, architecture: str, deadline: float) -> list[str]:
    """The rows of one model; cells that would start after the deadline are left out, and said."""
    name, found = Path(architecture).stem, []
    with tempfile.TemporaryDirectory() as folder:
        bench = build(given, architecture, folder)
        rows = forward_samples(bench, Path(folder) / "images", IMAGES, PACKED_ROWS)
        for cached in (False, True):
            if cached:
                bench.features = build_features(
                    bench.config, bench.model, bench.encoder, rows, bench.dtype, bench.state
                )
                drop_tower(bench.model)
            for cell in cells(given.micro, cached):
                if time.perf_counter() > deadline:
                    print(f"{name}: no time left for {' '.join(cell.words())}", flush=True)
                    continue
                samples = rows[: cell.micro * PACKED_ROWS] if cell.packed else rows[::PACKED_ROWS][: cell.micro]
                found.append(line(bench, cell, name, samples))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="2b,4b,8b,32b", help="sizes or architecture files, separated by commas")
    parser.add_argument("--micro", default="1,4,16", help=f"micro-batches, of at most {IMAGES}")
    parser.add_argument("--seconds", type=float, default=540.0, help="cells that would start later are left out")
    parser.add_argument("--image-size", type=int, default=448)
    parser.add_argument("--dtype", default="fp16", choices=["fp16", "bf16"])
    parser.add_argument("--out", help="a file for the table")
    given = parser.parse_args()
    given.micro = [int(word) for word in given.micro.split(",")]
    if not all(1 <= size <= IMAGES for size in given.micro):
        parser.error(f"--micro: from 1 to {IMAGES}")
    given.cuda, deadline = torch.cuda.is_available(), time.perf_counter() + given.seconds
    card = torch.cuda.get_device_name() if given.cuda else platform.machine() + " CPU, where nothing is measured"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    lines = [f"{card}. {versions}. GiB.", "", HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    print("\n".join(lines), flush=True)
    for word in given.models.split(","):
        lines += run_model(given, architecture_file(word) if word in PUBLISHED else word, deadline)
        gc.collect()
        if given.cuda:
            torch.cuda.empty_cache()
        if given.out:
            Path(given.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
