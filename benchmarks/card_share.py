"""What each card of several has to do in an update: milliseconds, share of the matrix rate, where the time goes.

`python benchmarks/card_share.py --rows 8,64 --gib 31` trains the recipe's architecture with random NF4 weights on the
real mix of 20 people: 8 rows an update are one card's share of 64 on eight. It prints a line of Markdown for each
number of rows, and then, from two updates under torch's profiler, the GPU's busy time by kind of kernel.

`torchrun --nproc_per_node 4 benchmarks/card_share.py --rows 16` prints for each update how long every card computed and
how long it waited for the others in the sum of the gradients.

`--predict 1,2,4,8` needs no GPU: for an epoch's updates of 64 rows, how the rows are shared out among so many cards,
and how long the others wait for the fullest by the time that the plan goes by. The sum of the gradients is not in it.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.profiler import ProfilerActivity, profile

from mmrev_kit.config.reading import load_config
from mmrev_kit.data.make import ensure_data
from mmrev_kit.memory.plan import FIXED, configured_shapes, plan, split_updates
from mmrev_kit.model.batches import GPU_MULTIPLE, lay_out, shares
from mmrev_kit.model.packing import Layout, attention_scale
from mmrev_kit.training import update as training
from mmrev_kit.training.processes import worker_state
from mmrev_kit.training.run import Run, epoch_updates, ordered_rows, prepare, start

WARM_UP = 4  # updates that are not counted: they make kernels
HEAD = "| cards | rows a card | tokens | ms | samples/s | share of the matrix rate | waiting for others | peak GiB |"
# Tokens, passes and kept layers (of 64) of an update of the 32B, and its seconds on one H100, layers as operations; the
# passes of an update that has several are worked out from its largest one.
RATES = (
    (2944, 1, 0, 1.0272), (2944, 1, 8, 0.9930), (2944, 1, 16, 0.9723), (2944, 1, 40, 0.8745), (1920, 1, 0, 0.7215),
    (1920, 1, 12, 0.6849), (1920, 1, 24, 0.6829), (8584, 3, 0, 3.0441), (8584, 3, 6, 2.8513), (8584, 3, 40, 2.4927),
    (8192, 5, 64, 2.5861), (8224, 9, 64, 3.6738),
)  # fmt: skip
KINDS = {
    "dequantization": ("dequant",),
    "products and attention": ("gemm", "cutlass", "nvjet", "xmma", "flash", "fmha"),
    "fused": ("triton",),
    "copies": ("memcpy", "memset"),
    "elementwise": ("elementwise",),
}


def timed_sum(run: Run, summing, spent: dict[str, float]) -> None:
    """`training._sum_gradients`, with the time before it and in it noted: a card that is early waits there."""
    synchronize(run)
    began = time.perf_counter()
    summing(run)
    synchronize(run)
    spent |= {"computed": began - spent["began"], "waited": time.perf_counter() - began}


def synchronize(run: Run) -> None:
    if run.state.device.type == "cuda":
        torch.cuda.synchronize()


def measure(run: Run, rows: int, updates: int) -> dict:
    """Time `updates` updates of `rows` rows a process; the medians, and each update's times on every process."""
    order = training.chunks(ordered_rows(run.config, run.task, 0), rows * run.state.num_processes)
    batches = [[run.task.train[source][index] for source, index in part] for part in order[: WARM_UP + updates]]
    records, cards = [], []
    summing = training._sum_gradients
    spent: dict[str, float] = {}
    training._sum_gradients = lambda run: timed_sum(run, summing, spent)
    try:
        for batch in batches:
            synchronize(run)
            spent["began"] = time.perf_counter()
            record = training.update(run, batch)
            synchronize(run)
            whole = time.perf_counter() - spent["began"]
            records.append(record | {"tokens": run.computed[0], "ms": 1e3 * whole})
            cards.append({name: 1e3 * spent[name] for name in ("computed", "waited")} | {"ms": 1e3 * whole})
    finally:
        training._sum_gradients = summing
    everyone = gather_object([cards]) if run.state.num_processes > 1 else [cards]
    return {"records": records[WARM_UP:], "cards": [each[WARM_UP:] for each in everyone], "batches": batches}


def busy(run: Run, batches: list[list]) -> str:
    """The GPU's busy milliseconds an update by kind of kernel, with launches, of two updates under the profiler."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        for batch in batches[WARM_UP : WARM_UP + 2]:
            training.update(run, batch)
        synchronize(run)
    spent, launches = defaultdict(float), defaultdict(int)
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            words = event.name.lower()
            kind = next((kind for kind, parts in KINDS.items() if any(part in words for part in parts)), "other")
            spent[kind] += event.time_range.elapsed_us() / 2e3
            launches[kind] += 1
    kinds = ", ".join(f"{kind} {spent[kind]:.0f} ({launches[kind] // 2:,})" for kind in sorted(spent, key=spent.get))
    return f"GPU busy {sum(spent.values()):.0f} ms an update (launches): {kinds}"


def report(run: Run, rows: int, measured: dict) -> None:
    """A line of the table, and what each card did in each update."""
    records, cards, count = measured["records"], measured["cards"], run.state.num_processes
    middle = {
        name: statistics.median(each[name] for each in records) for name in ("ms", "tokens", "samples_per_second")
    }
    shares = [each["mfu"] for each in records if each["mfu"] is not None]
    share = f"{statistics.mean(shares):.1%}" if shares else ""
    waits = [each["waited"] / each["ms"] for card in cards for each in card]
    cells = [
        f"{count}",
        f"{rows}",
        f"{middle['tokens']:,.0f}",
        f"{middle['ms']:,.0f}",
        f"{middle['samples_per_second']:.2f}",
    ]
    peak = max(each["peak_memory_gib"] for each in records)
    print(f"| {' | '.join(cells)} | {share} | {statistics.mean(waits):.1%} | {peak:.2f} |", flush=True)
    for number in range(len(records) if count > 1 else 0):
        print("  computed, ms:", *(f"{card[number]['computed']:.0f}" for card in cards), flush=True)


def seconds_a_token() -> tuple[float, float]:
    """Seconds of a token's forward pass that fit `RATES` best, by the plan's time; and how far off, rms."""
    work = [(2 + (64 - kept) / 64) * tokens + FIXED * passes for tokens, passes, kept, _ in RATES]
    each = [one / seconds for one, (*_, seconds) in zip(work, RATES, strict=True)]
    found = sum(each) / sum(one**2 for one in each)
    return found, statistics.mean((found * one - 1) ** 2 for one in each) ** 0.5


def predict(config, counts: list[int], gib: float) -> None:
    """A line for each number of cards, by the time that the plan goes by: see `memory.plan.candidate`."""
    task, shapes = prepare(config), configured_shapes(config)
    image_id, packing = task.encoder.image_id, config.training.packing
    updates, alone = [part for part in epoch_updates(config, task, 0, 64) if len(part) == 64], None
    pace, off = seconds_a_token()
    print(f"{pace:.2e} s x (tokens x (2 + share of layers recomputed) + {FIXED:,}) a pass: {off:.1%} off\n")
    print("| cards | as planned | tokens of the fullest | waiting for it, mean (at most) | rows/s | beside one card |")
    print("|---|---|---|---|---|---|")
    for count in counts:
        split = partial(split_updates, updates, config, shapes, image_id, count)
        memory = plan(config, gib, count, shapes, split).chosen.memory
        each = 2 + memory.recomputed_layers(shapes.num_hidden_layers) / shapes.num_hidden_layers
        layout, tokens, times = Layout(packing, memory.micro_tokens, attention_scale(shapes), GPU_MULTIPLE), [], []
        for samples in updates:
            dealt = [list(lay_out(share, layout)) for share in shares(samples, packing, image_id, count)]
            tokens.append(max(sum(one.tokens for one in card) for card in dealt))
            times.append([sum(each * one.tokens + FIXED for one in card) for card in dealt])
        waits, spent = [1 - statistics.mean(cards) / max(cards) for cards in times], sum(map(max, times))
        alone = alone or spent * count
        rate = 64 * len(updates) / (pace * spent)
        how = f"passes of {memory.micro_tokens:,}, {memory.kept_layers} layers kept"
        wait = f"{statistics.mean(waits):.1%} ({max(waits):.1%})"
        print(f"| {count} | {how} | {statistics.mean(tokens):,.0f} | {wait} | {rate:.1f} | {alone / spent:.2f} |")


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given.add_argument("--rows", default="8,64", help="rows of a process in an update, separated by commas")
    given.add_argument("--gib", type=float, help="the card's memory, as memory.gpu_gib; all of it without")
    given.add_argument("--updates", type=int, default=10)
    given.add_argument("--people", type=int, default=20)
    given.add_argument("--overrides", default="")
    given.add_argument("--predict", help="numbers of cards, separated by commas: how rows would be shared out")
    given = given.parse_args()
    if given.predict:
        words = f"model.name=configs/models/qwen3vl_32b.json experiment.name=share data.num_main={given.people} "
        config = load_config("configs/config_qwen3vl32_fp16.yaml", words + given.overrides)
        ensure_data(config)
        predict(config, [int(count) for count in given.predict.split(",")], given.gib or 80)
        return
    with worker_state(Path(".")) as state:
        words = (
            f"model.name=configs/models/qwen3vl_32b.json experiment.name=share data.num_main={given.people} "
            f"training.num_epochs=1 launch.num_processes={state.num_processes} "
            f"{f'memory.gpu_gib={given.gib:g} ' if given.gib else ''}{given.overrides} "
        )
        if state.is_main_process:
            print("\n".join(ensure_data(load_config("configs/config_qwen3vl32_fp16.yaml", words))), flush=True)
            card = torch.cuda.get_device_name() if state.device.type == "cuda" else platform.processor()
            print(
                f"\n{state.num_processes} x {card}, torch {torch.__version__}\n\n{HEAD}\n|{'---|' * HEAD.count(' |')}"
            )
        state.wait_for_everyone()
        for rows in map(int, given.rows.split(",")):
            config = load_config(
                "configs/config_qwen3vl32_fp16.yaml", f"{words} training.gradient_accumulation_steps={rows}"
            )
            run = start(config, state)
            run.model.train()
            measured = measure(run, rows, given.updates)
            kinds = busy(run, measured["batches"]) if state.device.type == "cuda" else ""
            if state.is_main_process:
                report(run, rows, measured)
                print(kinds, flush=True)
            del run, measured
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
