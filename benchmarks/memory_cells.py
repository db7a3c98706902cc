"""The memory estimate beside what a GPU allocates, cell by cell, with random weights.

`python benchmarks/memory_cells.py` measures, for each model, micro-batches of three sizes x none, half or all of the
layers kept from checkpointing, with the 32B's recipe; then two cells with each of `SETTINGS`. It prints a table in
Markdown with the card and the versions; micro-batches that run out of memory have a row, too. A cell is two updates of
one micro-batch each, with cached vision features and logits where an answer is predicted. Rows are forward rows of one
image (448 x 448: 196 visual tokens), 36 text and 9 answer tokens; packed, an image has eight of them.

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
from dataclasses import dataclass
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
from mmrev_kit.model.loading import (
    adapter_arguments,
    add_adapter,
    base_arguments,
    load_base,
    set_recomputed,
    torch_dtype,
    trainable,
)
from mmrev_kit.model.packing import Layout, attention_scale
from mmrev_kit.model.processor import make_encoder
from mmrev_kit.model.qwen3vl import drop_tower
from mmrev_kit.training.update import sample_losses

GIB, IMAGES, PACKED_ROWS = 2**30, 16, 8
SIZES = (1, 1), (4, PACKED_ROWS), (IMAGES, PACKED_ROWS)  # images, and rows of each
HEAD = "| model | settings | micro-batch | kept | tokens | predicted | allocated | error "
HEAD += "| reserved, predicted | reserved | error |"
RECIPE = "4 bit, r 8 on q, k, v, o"
SETTINGS = {
    RECIPE: "",
    "16 bit": "quantization.bits=16",
    "no dropout": "lora.dropout=0",
    "r 64 on all seven": "lora.r=64 lora.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
    "r 8 on gate, up, down": "lora.target_modules=[gate_proj,up_proj,down_proj]",
}


@dataclass(frozen=True)
class Cell:
    """One way to run a micro-batch: `images`, with `rows` packed of each, and the layers that are kept."""

    images: int
    rows: int
    kept: int

    @property
    def packing(self) -> str:
        return "shared_prefix" if self.rows > 1 else "none"


def cells(layers: int, recipe: bool) -> list[Cell]:
    """Those of the 32B's recipe, and those of other settings."""
    if not recipe:
        return [Cell(4, PACKED_ROWS, kept) for kept in (0, layers)]
    return [Cell(*size, kept) for size in SIZES for kept in (0, layers // 2, layers)]


def make_ready(bench: Bench, cell: Cell) -> None:
    """The model as the cell wants it, and a clean allocator."""
    set_recomputed(bench.core, cell.kept)
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
                scaler.scale(sample_losses(bench.model, batch, device, dtype).mean()).backward()
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


def line(bench: Bench, cell: Cell, words: list[str], samples: list) -> str:
    """One row of the table."""
    layout = Layout(cell.packing, 1 << 30, attention_scale(bench.core.config.text_config), GPU_MULTIPLE)
    batcher = Batcher(layout, bench.encoder, bench.features, bench.state.device)
    (one,) = lay_out(shares(samples, cell.packing, bench.encoder.image_id, 1)[0], layout)
    config = with_memory(bench.config, gradient_checkpointing=True, kept_layers=cell.kept)
    phases = tuple(phase for phase in PHASES if phase != "vision tower")
    wanted = estimate(config, config.model.name, [one], accumulates=False, phases=phases)
    found = measure(bench, cell, samples, batcher)
    size = f"{cell.images} x {cell.rows}"
    words = [*words, size, str(cell.kept), f"{one.tokens:,}", f"{wanted.allocated_gib:.2f}"]
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


def build(given, architecture: str, folder: str, more: str) -> Bench:
    """The model with its adapter, and an encoder."""
    device = torch.device("cuda", 0) if given.cuda else torch.device("cpu")
    state = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=device)
    pixels = given.image_size**2
    config = load_config(
        "configs/config_qwen3vl32_fp16.yaml",
        f"model.name={architecture} model.max_pixels={pixels} model.min_pixels={min(65536, pixels)} "
        f"data.image_size={given.image_size} launch.output_dir={folder}/outputs launch.num_processes=1 "
        f"quantization.compute_dtype={given.dtype if given.cuda else 'auto'} {more}",
    )
    began = time.perf_counter()
    model = add_adapter(load_base(**base_arguments(config, device)), **adapter_arguments(config))
    print(f"{architecture}: built in {time.perf_counter() - began:.0f} s", flush=True)
    dtype = torch_dtype(config.quantization.compute_dtype, device)
    return Bench(config, state, model, dtype, make_encoder(config), None, 0.0)


def run_model(given, architecture: str, settings: str, deadline: float) -> list[str]:
    """The rows of one model with these settings; cells that would start after the deadline are left out, and said."""
    name, found = Path(architecture).stem.removeprefix("qwen3vl_").upper(), []
    with tempfile.TemporaryDirectory() as folder:
        bench = build(given, architecture, folder, SETTINGS[settings])
        rows = forward_samples(bench, Path(folder) / "images", IMAGES, PACKED_ROWS)
        bench.features = build_features(bench.config, bench.model, bench.encoder, rows, bench.dtype, bench.state)
        drop_tower(bench.model)
        for cell in cells(bench.core.config.text_config.num_hidden_layers, settings == RECIPE):
            if time.perf_counter() > deadline:
                print(f"{name}, {settings}: no time left for {cell}", flush=True)
                continue
            samples = [
                one
                for start in range(0, cell.images * PACKED_ROWS, PACKED_ROWS)
                for one in rows[start : start + cell.rows]
            ]
            found.append(line(bench, cell, [name, settings], samples))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="2b,4b,8b,32b", help="sizes or architecture files, separated by commas")
    parser.add_argument("--recipe-only", action="store_true", help="leave out the other settings")
    parser.add_argument("--seconds", type=float, default=540.0, help="cells that would start later are left out")
    parser.add_argument("--image-size", type=int, default=448)
    parser.add_argument("--dtype", default="fp16", choices=["fp16", "bf16"])
    parser.add_argument("--out", help="a file for the table")
    given = parser.parse_args()
    given.cuda, deadline = torch.cuda.is_available(), time.perf_counter() + given.seconds
    card = torch.cuda.get_device_name() if given.cuda else platform.machine() + " CPU, where nothing is measured"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    lines = [f"{card}. {versions}. GiB.", "", HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    print("\n".join(lines), flush=True)
    settings = list(SETTINGS)[: 1 if given.recipe_only else None]
    for word, one in itertools.product(given.models.split(","), settings):
        lines += run_model(given, architecture_file(word) if word in PUBLISHED else word, one, deadline)
        gc.collect()
        if given.cuda:
            torch.cuda.empty_cache()
        if given.out:
            Path(given.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
