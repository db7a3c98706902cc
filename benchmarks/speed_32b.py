"""Training speed of the 32B architecture (random NF4 weights) on one GPU: the kit beside two other recipes.

`python benchmarks/speed_32b.py` measures all recipes in one run, in about ten minutes on an H100, and prints a
table of each part in Markdown:

1. forward rows of one image each (448 x 448 pixels: 196 visual tokens; 36 text and 9 answer tokens);
2. the rows of a whole experiment of 20 people with 30 % retention, at the config's pixel limits;
3. the kit's recipes of both once more under a cap of 31 GiB, which is what a V100 of 32 GB offers.

In passes of so many tokens, every layer is recomputed; *as planned* is what a run does on this card by itself.

The recipes: *guide*: embedding, head and norms in fp32 as PEFT's k-bit preparation leaves them, eager attention,
checkpointing, all logits, the vision tower in every pass, 1 row at a time. *careful*: SDPA, 16-bit embedding and
head, checkpointing, all logits, the vision tower in every pass, 8 rows at a time. *kit*: its own code.
All are fp16 autocast with a gradient scaler, LoRA r 8 on q, k, v, o, and AdamW.

`--architecture mmrev_kit/assets/embedded/config.json --image-size 64` rehearses the whole program on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch

from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import Config
from mmrev_kit.config.seeds import rng_for
from mmrev_kit.data.faces import draw_face, sample_faces
from mmrev_kit.data.make import ensure_data
from mmrev_kit.data.prompts import Sample
from mmrev_kit.data.tasks import Row
from mmrev_kit.memory.plan import configured_shapes, plan, split_updates
from mmrev_kit.model.batches import Batcher, make_layout
from mmrev_kit.model.features import build_features
from mmrev_kit.model.fused import fuse, unfuse
from mmrev_kit.model.loading import (
    adapter_arguments,
    add_adapter,
    base_arguments,
    load_base,
    set_recomputed,
    torch_dtype,
    trainable,
)
from mmrev_kit.model.packing import gather_images, image_key
from mmrev_kit.model.plain import core_model
from mmrev_kit.model.qwen3vl import drop_tower
from mmrev_kit.training.run import Run, prepare
from mmrev_kit.training.throughput import flops, measure_peak_flops, peak_memory_gib
from mmrev_kit.training.update import chunks, update

GIB = 2**30
TEXT, ANSWER, COMMON = 36, 9, 9  # tokens of a forward row beside its image; `COMMON` of the text stand before a fork


@dataclass
class Bench:
    """What the recipes share."""

    config: Config
    state: SimpleNamespace
    model: object
    dtype: object
    encoder: object
    peak_flops: float | None
    deadline: float
    gib: float = 0.0
    features: object = None
    rows: list | None = None

    @property
    def core(self):
        return core_model(self.model)

    @property
    def cuda(self) -> bool:
        return self.state.device.type == "cuda"


def configure(given) -> Config:
    """The 32B recipe on one process; the 8-process run's effective batch of 64 in one."""
    pixels = given.image_size**2
    words = (
        f"model.name={given.architecture} experiment.name=speed{given.image_size} data.dir={given.data} "
        f"data.image_size={given.image_size} model.max_pixels={pixels} model.min_pixels={min(65536, pixels)} "
        f"retention.num_faces={given.faces} retention.face_pool={given.data}/pool{given.image_size}_{given.faces} "
        "launch.num_processes=1 training.gradient_accumulation_steps=64 training.num_epochs=2 "
        f"launch.output_dir={given.data}/outputs quantization.compute_dtype={'fp16' if given.cuda else 'auto'}"
    )
    return load_config("configs/config_qwen3vl32_fp16.yaml", words)


def forward_samples(bench: Bench, folder: Path, images: int, rows: int) -> list[Sample]:
    """Forward rows of random tokens: `rows` of each of `images` drawn faces."""
    config, encoder = bench.config, bench.encoder
    rng = rng_for(0, "speed")
    vocabulary = bench.core.config.text_config.vocab_size
    folder.mkdir(parents=True, exist_ok=True)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(300, vocabulary) for _ in range(count))

    header, after, samples = ids(COMMON - 3), ids(3), []
    for number, face in enumerate(sample_faces(rng, images, "pool")):
        path = folder / f"{number}.png"
        draw_face(face, config.data.image_size).save(path)
        height, width = encoder.grid(encoder.image_size(path), config.model.max_pixels)
        common = (*header, *[encoder.image_id] * (height * width), *after)
        for line in range(rows):
            row = Row("forward", "forward", f"speed:{line}", str(number), "main", (path,), "", "", (), "")
            text = common + ids(TEXT - COMMON)
            samples.append(Sample(row, text + ids(ANSWER), len(text), config.model.max_pixels, height * width))
    return samples


def clean(bench: Bench) -> None:
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()


def result(
    bench: Bench, name: str, rows: int, seconds: float, tokens: int, logits: int, updates: int, recompute: float = 1.0
) -> dict:
    """One line of the table; `recompute` is the share of the layers that are recomputed."""
    text, found = bench.core.config.text_config, {"recipe": name, "samples/s": rows / seconds}
    found |= {"updates": updates, "seconds": seconds, "tokens/s": tokens / seconds}
    found["peak GiB"] = peak_memory_gib(bench.state.device)
    found["reserved GiB"] = torch.cuda.max_memory_reserved() / GIB if bench.cuda else None
    for key, again in (("mfu", recompute), ("mfu without recomputation", 0.0)):
        done = flops(text, tokens, logits, again, bench.config.lora.target_modules)
        found[key] = done / seconds / bench.peak_flops if bench.peak_flops else None
    print(json.dumps(found), flush=True)
    return found


def library_recipe(bench: Bench, name: str, samples: list[Sample], micro: int, count: int, accumulate: int) -> dict:
    """Batches through the library's own path with all logits: `count` timed micro-batches."""
    optimizer = torch.optim.AdamW(trainable(bench.model), 1e-4)
    scaler = torch.amp.GradScaler(bench.state.device.type, enabled=bench.dtype == torch.float16)
    parts = chunks(samples, micro)
    parts, tokens, rows, began = (parts * (1 + (count + 1) // len(parts)))[: count + 1], 0, 0, 0.0
    for part in parts:
        bench.encoder.collate(part)  # pictures are read and scaled beforehand, as a loader's own processes would do
    clean(bench)
    for number, part in enumerate(parts):
        if number == 1:  # the first pass warms up
            if bench.cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
        batch = {key: value.to(bench.state.device) for key, value in bench.encoder.collate(part).items()}
        with torch.autocast(bench.state.device.type, bench.dtype, enabled=bench.dtype != torch.float32):
            loss = bench.model(**batch).loss
        scaler.scale(loss / accumulate).backward()
        if number:
            rows, tokens = rows + len(part), tokens + batch["input_ids"].numel()
        if number % accumulate == 0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trainable(bench.model), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
    if bench.cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    optimizer.zero_grad(set_to_none=True)
    return result(bench, name, rows, seconds, tokens, tokens, count // accumulate)


def others(bench: Bench, samples: list[Sample], count: int) -> list[dict]:
    """The guide's and the careful recipe, on the library's own modules and without the kit's hooks."""
    core, found = bench.core, []
    visual, language = core.model.visual, core.model.language_model
    fast, norms = type(visual), [m for n, m in language.named_modules() if n.endswith("norm")]
    hooked = [language.embed_tokens, *norms]
    hooks = [dict(module._forward_hooks) for module in hooked]
    for module in hooked:
        module._forward_hooks.clear()
    visual.__class__ = fast.__mro__[1] if fast.__name__.startswith("Fast") else fast
    unfuse(core)
    small = {name: p for name, p in core.named_parameters() if p.dtype == torch.float16 and not p.requires_grad}
    bench.model.train()
    try:
        found.append(library_recipe(bench, "careful (8 x 1)", samples, 8, count, 1))
        kept = {name: p.data.cpu() for name, p in small.items()}
        for p in small.values():
            p.data = p.data.float()
        core.set_attn_implementation("eager")
        found.insert(0, library_recipe(bench, "guide (1 x 8)", samples, 1, 8, 8))
        core.set_attn_implementation("sdpa")
        for name, p in small.items():
            p.data = kept[name].to(bench.state.device)
    finally:
        visual.__class__ = fast
        fuse(core)
        for module, saved in zip(hooked, hooks, strict=True):
            module._forward_hooks.update(saved)
    return found


def kit_recipe(bench: Bench, name: str, updates: list[list[Sample]], **options) -> dict | None:
    """The kit's own update, once to warm up and then on every further one; None where time or memory is short."""
    if time.perf_counter() > bench.deadline:
        print(f"{name}: no time left", flush=True)
        return None
    config = replace(bench.config, memory=replace(bench.config.memory, **options))
    layers = bench.core.config.text_config.num_hidden_layers
    set_recomputed(bench.core, config.memory.kept_layers)
    parameters = trainable(bench.model)
    layout = make_layout(config, bench.model, bench.state.device)
    run = Run(
        config=config,
        state=bench.state,
        task=None,
        model=bench.model,
        optimizer=torch.optim.AdamW(parameters, 1e-4),
        scaler=torch.amp.GradScaler(bench.state.device.type, enabled=bench.dtype == torch.float16),
        dtype=bench.dtype,
        schedule=SimpleNamespace(lr_at=lambda step: 1e-4),
        history=None,
        batcher=Batcher(layout, bench.encoder, bench.features, bench.state.device),
        peak_flops=bench.peak_flops,
    )
    bench.model.train()
    clean(bench)
    began, tokens, logits = 0.0, 0, 0
    try:
        for number, samples in enumerate(updates):
            if number == 1:
                began = time.perf_counter()
            update(run, samples)  # reads its loss: nothing is left running
            if number:
                tokens, logits = tokens + run.computed[0], logits + run.computed[1]
    except torch.OutOfMemoryError:
        print(json.dumps({"recipe": name, "out of memory": True}), flush=True)
        return None
    seconds, rows = time.perf_counter() - began, sum(map(len, updates[1:]))
    again = config.memory.recomputed_layers(layers) / layers
    return result(bench, name, rows, seconds, tokens, logits, len(updates) - 1, again)


def planned(bench: Bench, updates: list[list[Sample]]) -> tuple[dict, str]:
    """What a run would choose for this card, or for the cap that it is under; and that in words."""
    shapes, image_id = configured_shapes(bench.config), bench.encoder.image_id
    split = partial(split_updates, updates, bench.config, shapes, image_id, 1)
    found = plan(bench.config, bench.gib, 1, shapes, split)
    memory = found.apply(bench.config).memory
    settings = {name: getattr(memory, name) for name in ("micro_tokens", "gradient_checkpointing", "kept_layers")}
    layers = shapes.num_hidden_layers
    kept = memory.kept_layers if memory.gradient_checkpointing else layers
    return settings, f"as planned: passes of {memory.micro_tokens:,} tokens, {kept} of {layers} layers kept"


def by_image(bench: Bench, samples: list[Sample]) -> list[Sample]:
    """The samples as `grouping: epoch` orders them."""
    return gather_images(samples, lambda s: s.row.source, lambda s: image_key(s, bench.encoder.image_id))


def forward_updates(samples: list[Sample], images: int, rows: int, count: int) -> list[list[Sample]]:
    """`count` updates of `rows` rows of each of `images` images."""
    whole = images * rows
    return [(samples * count)[start : start + whole] for start in range(0, whole * count, whole)]


def kit_recipes(bench: Bench, forward: list[Sample], mixed: list[Sample], parts: set[str], note: str = "") -> dict:
    """The kit's recipes of part 1 and part 2."""
    shuffled = list(forward)
    rng_for(0, "order").shuffle(shuffled)
    count, found = (7 if bench.cuda else 2), {"1": [], "2": []}
    four, alone = forward_updates(forward, 4, 15, count), chunks(shuffled, 64)[:count]
    groupings = {"batch": chunks(mixed, 64)[:count], "epoch": chunks(by_image(bench, mixed), 64)[:count]}
    if not note:  # kernels are made, and read for each shape of product, when they are first needed
        first = [samples for updates in (four, alone, *groupings.values()) for samples in updates[:3]]
        for tokens in (4096, 8192):
            kit_recipe(bench, "first updates, not in the table", first, micro_tokens=tokens)
    if "1" in parts:
        name = "kit, default grouping of 20 people, 64 rows"
        found["1"] = [
            kit_recipe(bench, f"kit, 4 images x 15 rows{note}", four, micro_tokens=4096),
            kit_recipe(bench, f"{name}{note}", alone, micro_tokens=4096),
        ]
        if not note:
            many = forward_updates(forward, 16, 15, 2)
            found["1"] += [
                kit_recipe(bench, f"{name}, one pass", alone, micro_tokens=8192),
                kit_recipe(bench, "kit, 16 images x 15 rows, passes of 8,192 tokens", many, micro_tokens=8192),
                kit_recipe(bench, "kit, 16 images x 15 rows, passes of 16,384 tokens", many, micro_tokens=16384),
            ]
    if "2" in parts:
        for name, updates in groupings.items():
            for tokens in (4096,) if note else (4096, 8192):
                label = f"kit, grouping {name}, passes of {tokens:,} tokens{note}"
                found["2"].append(kit_recipe(bench, label, updates, micro_tokens=tokens))
            if bench.cuda:
                options, words = planned(bench, updates)
                found["2"].append(kit_recipe(bench, f"kit, grouping {name}, {words}{note}", updates, **options))
    return {part: [line for line in lines if line] for part, lines in found.items()}


def table(lines: list[dict]) -> str:
    """A Markdown table; ratios are to the guide's and to the careful recipe of the same part."""
    base = {line["recipe"].split()[0]: line["samples/s"] for line in reversed(lines)}
    head = "| recipe | samples/s | x guide | x careful | tokens/s | peak GiB (reserved) | MFU, recomputation "
    text = [head + "counted (not counted) |", "|---|---|---|---|---|---|---|"]
    for line in lines:
        ratios = [f"{line['samples/s'] / base[name]:.1f}" if name in base else "" for name in ("guide", "careful")]
        reserved = f" ({line['reserved GiB']:.2f})" if line["reserved GiB"] else ""
        mfu = f"{line['mfu']:.1%} ({line['mfu without recomputation']:.1%})" if line["mfu"] else ""
        cells = [line["recipe"], f"{line['samples/s']:.2f}", *ratios, f"{line['tokens/s']:,.0f}"]
        text.append(f"| {' | '.join(cells)} | {line['peak GiB']:.2f}{reserved} | {mfu} |")
    return "\n".join(text)


def build(given) -> Bench:
    """Data, model and adapter."""
    device = torch.device("cuda", 0) if given.cuda else torch.device("cpu")
    state = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=device)
    config = configure(given)
    print("\n".join(ensure_data(config)), flush=True)
    task, began = prepare(config), time.perf_counter()
    dtype = torch_dtype(config.quantization.compute_dtype, device)
    peak_flops = measure_peak_flops(device, dtype)
    model = add_adapter(load_base(**base_arguments(config, device)), **adapter_arguments(config))
    for parameter in trainable(model):  # LoRA's B starts at zero, where a backward pass has less to do
        torch.nn.init.normal_(parameter, std=0.01)
    print(f"built in {time.perf_counter() - began:.0f} s", flush=True)
    bench = Bench(config, state, model, dtype, task.encoder, peak_flops, time.perf_counter() + given.seconds)
    rows = [row for epoch in range(2) for row in task.plan.epoch_rows(epoch)]
    bench.rows = [task.train[source][index] for source, index in rows]
    return bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="configs/models/qwen3vl_32b.json")
    parser.add_argument("--data", default="data", help="folder for data and vision features; made where it is absent")
    parser.add_argument("--image-size", type=int, default=448)
    parser.add_argument("--faces", type=int, default=100, help="faces of the retention pool")
    parser.add_argument("--parts", default="1,2,3")
    parser.add_argument("--cap-gib", type=float, default=31.0)
    parser.add_argument("--seconds", type=float, default=600.0, help="recipes that would start later are left out")
    parser.add_argument("--out", help="a file for the tables")
    given = parser.parse_args()
    given.cuda = torch.cuda.is_available()
    parts = set(given.parts.split(","))
    bench = build(given)
    forward = forward_samples(bench, Path(given.data) / f"speed_images{given.image_size}", 20, 15)
    card = torch.cuda.get_device_name() if given.cuda else platform.machine() + " CPU"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    peak = f"; {bench.peak_flops / 1e12:.0f} TFLOP/s in fp16 products of 8192 x 8192" if bench.peak_flops else ""
    lines: dict[str, list[dict]] = {"1": [], "2": []}
    shuffled = list(forward)
    rng_for(0, "order").shuffle(shuffled)
    for part, samples in (("1", shuffled), ("2", bench.rows)):
        if part in parts:
            lines[part] += others(bench, samples, 4 if given.cuda else 1)
    bench.gib = torch.cuda.get_device_properties(0).total_memory / GIB if given.cuda else 0.0
    bench.features = build_features(
        bench.config, bench.model, bench.encoder, forward + bench.rows, bench.dtype, bench.state
    )
    drop_tower(bench.model)
    for part, found in kit_recipes(bench, forward, bench.rows, parts).items():
        lines[part] += found
    if "3" in parts:
        if given.cuda:
            torch.cuda.set_per_process_memory_fraction(given.cap_gib / bench.gib)
            bench.gib = given.cap_gib
        capped = kit_recipes(bench, forward, bench.rows, parts, f", under {given.cap_gib:g} GiB")
        for part, found in capped.items():
            lines[part] += found
    text = f"{card}{peak}. {versions}.\n"
    for part, title in (("1", "Forward rows"), ("2", "The mix of a whole experiment")):
        text += f"\n{title}\n\n{table(lines[part])}\n" if lines[part] else ""
    print("\n" + text)
    if given.out:
        Path(given.out).write_text(text)


if __name__ == "__main__":
    main()
