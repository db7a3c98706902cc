"""Pretraining of the embedded model: `python -m mmrev_kit pretrain --minutes 9 --state DIR --out DIR`.

Warm-up, a constant rate, and at the end a rate that falls to zero, so that several runs add up: a run goes on from the
last one's state, and its data go on where they stopped.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy

from mmrev_kit.config.project import resolve
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.model.vision import tower_block
from mmrev_kit.pretraining import accuracy
from mmrev_kit.pretraining.model import Optimizer, text_layer
from mmrev_kit.pretraining.pictures import OTHER_SIZES, SIZE, Pictures, make_pictures
from mmrev_kit.pretraining.plan import plan_step
from mmrev_kit.pretraining.state import load_state, new_record, report, save_state, weights_of, write_model
from mmrev_kit.pretraining.steps import DecayingRate, Feed, Recipe, Runner, Source, grid_of, read_recipe
from mmrev_kit.pretraining.text import Lexicon
from mmrev_kit.pretraining.tiny import model_config, tokenizer_corpus, train_tokenizer

PARAMETERS = (
    "minutes", "steps", "seed", "prompts", "rate", "decay_share", "num_faces", "eval_prompts", "workers", "out",
    "state", "overrides",
)  # fmt: skip
ENDING = 40  # seconds kept for the last tests and files, of a run on a GPU


def configure(values: dict) -> tuple[Recipe, Path, Path]:
    """The recipe of a notebook's parameters, the model's folder and the state's; relative ones in the project.

    Args:
        values: {name: value} of `PARAMETERS`.

    Raises:
        ConfigError: a value of the wrong type.
    """
    recipe = read_recipe({name: values[name] for name in PARAMETERS[:-3]}, values["overrides"] or "")
    for name, value in vars(recipe).items():
        print(f"{name}: {value}")
    return recipe, resolve(values["out"]), resolve(values["state"])


def preview(recipe: Recipe, number: int = 8):
    """A few training pictures in one row, as a picture; and a table of what a step asks."""
    import pandas
    from PIL import Image

    known = make_pictures("train", recipe.seed, number, 1, False, (SIZE, SIZE), 1)
    row = Image.fromarray(numpy.concatenate(list(known.pixels), axis=1))
    columns = ["task", "prompts", "tokens of a row", "attributes, at least", "at most"]
    return row, pandas.DataFrame(plan_step(recipe.prompts).blocks, columns=columns).set_index("task")


@dataclass
class Setting:
    """What a run works on, see `prepare`."""

    model: object
    record: dict
    lexicon: Lexicon
    source: Source
    feed: Feed
    pixels: dict  # by picture size, on the device
    held_out: dict[str, Pictures]
    device: object


def prepare(recipe: Recipe, state: str | Path | None) -> Setting:
    """Draw, and load or start the model. All other processes start here, before any work on a GPU."""
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    began = time.monotonic()
    tokenizer = train_tokenizer(tokenizer_corpus())
    config = model_config(tokenizer)
    sizes = [(SIZE, SIZE), *(OTHER_SIZES if recipe.other_every else ())]
    lexicon = Lexicon(tokenizer, [grid_of(size) for size in sizes], recipe.seed)
    pictures = {}
    for size in sizes:
        number = recipe.num_faces if size == (SIZE, SIZE) else recipe.other_faces
        looks = recipe.looks if size == (SIZE, SIZE) else 1
        pictures[size] = make_pictures("train", recipe.seed, number, looks, True, size, recipe.num_workers)
    held_out = accuracy.held_out_pictures(recipe.seed, recipe.num_faces, recipe.num_workers)
    drawn = sum(len(known.pixels) for known in [*pictures.values(), *held_out.values()])
    print(f"drew {drawn:,} pictures in {time.monotonic() - began:.1f} s", flush=True)

    weights, record = load_state(state) if state else (None, None)
    record = record or new_record(recipe.seed)
    source = Source(recipe, pictures, lexicon)
    feed = Feed(source, record["step"], recipe.num_workers)
    torch.manual_seed(recipe.seed)
    model = Qwen3VLForConditionalGeneration(config).float()
    if weights:
        model.load_state_dict(weights, strict=False)
        print(f"going on after step {record['step']:,}", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    pixels = {size: torch.from_numpy(known.pixels).to(device) for size, known in pictures.items()}
    return Setting(model, record, lexicon, source, feed, pixels, held_out, device)


def make_runners(recipe: Recipe, setting: Setting, optimizer: Optimizer) -> dict[tuple[int, int], Runner]:
    """A runner for each picture size; the main one compiled."""
    import torch

    cuda = setting.device.type == "cuda"
    runners = {}
    for size, pixels in setting.pixels.items():
        fast = (text_layer, tower_block)
        if cuda and recipe.compile and size == (SIZE, SIZE):
            fast = tuple(torch.compile(part, dynamic=False) for part in fast)
        shapes = setting.source.shapes(size)
        runners[size] = Runner(setting.model, optimizer, pixels, *shapes, fast, cuda and recipe.capture)
    return runners


def train(recipe: Recipe, setting: Setting, schedule: DecayingRate, save) -> None:
    """Steps until the schedule says stop; the record in `setting` grows with them.

    Args:
        save: called from time to time.

    Raises:
        FloatingPointError: the loss is no longer a number.
    """
    record, done = setting.record, 0
    optimizer = Optimizer(setting.model, recipe.weight_decay, recipe.muon)
    runners = make_runners(recipe, setting, optimizer)
    tasks = [f"{task} {low}-{high}" for task, _, _, low, high in setting.source.plans[SIZE, SIZE].blocks]
    total, counted, since, saved = 0, 0, time.monotonic(), time.monotonic()
    try:
        while not schedule.over(done):
            size = setting.source.size_of(record["step"])
            rate = schedule.rate(done)
            optimizer.prepare(rate)
            report = runners[size].run(setting.feed.take())
            done, record["step"] = done + 1, record["step"] + 1
            if size == (SIZE, SIZE):
                total, counted = total + report, counted + 1
            if done % recipe.log_every == 0 or schedule.over(done):
                losses, right = (total / max(1, counted)).tolist() if counted else ([], [])
                now = time.monotonic()
                seconds = (now - since) / (done % recipe.log_every or recipe.log_every)
                _log(record, tasks, losses, right, rate, seconds)
                schedule.look(done, seconds)
                record["seconds"] += now - since
                total, counted, since = 0, 0, now
                if now - saved > recipe.save_seconds:
                    save()
                    saved = since = time.monotonic()
    finally:
        setting.feed.close()
    record["decayed"] = schedule.fall_from is not None


def _log(record: dict, tasks: list[str], losses: list[float], right: list[float], rate: float, seconds: float) -> None:
    """One line on standard output, one entry in the record."""
    if any(loss != loss for loss in losses):
        raise FloatingPointError(f"The loss is no number at step {record['step']:,}. Lower the rate.")
    entry = {"step": record["step"], "rate": rate, "seconds_a_step": seconds}
    entry |= {"loss": dict(zip(tasks, losses, strict=False)), "right": dict(zip(tasks, right, strict=False))}
    record["log"].append(entry)
    shares = ", ".join(f"{task} {share:.3f}" for task, share in zip(tasks, right, strict=False))
    print(
        f"step {record['step']:,}: loss {sum(losses) / max(1, len(losses)):.4f}; right: {shares}; rate {rate:.2e}, "
        f"{1000 * seconds:.1f} ms a step", flush=True,
    )  # fmt: skip


def shipped(weights: dict) -> dict:
    """The weights as the model's folder holds them: rounded to 16 bits."""
    return {name: value.half().float() for name, value in weights.items()}


def rewrite(out: str | Path | None, state: str | Path | None) -> dict:
    """Write the model's folder from a state, without training; returns the state's record.

    Raises:
        ConfigError: there is no state.
    """
    weights, record = load_state(state) if state else (None, None)
    if not weights:
        raise ConfigError(f"minutes = 0 writes the model of a state, and there is none in {state}.")
    if out:
        write_model(out, weights, record)
    print(report(record), flush=True)
    return record


def pretrain(recipe: Recipe, out: str | Path | None = None, state: str | Path | None = None) -> dict:
    """Pretrain for a while, test on what is held out, and write the state and the model; minutes = 0: only write.

    Args:
        out: the folder of the model to write; None: none.
        state: where to go on from, if it is there, and what to write; None: start anew and keep no state.

    Returns:
        The record: runs, log, tests.
    """
    import torch
    import transformers

    began = time.monotonic()
    if recipe.minutes == 0 and not recipe.steps:
        return rewrite(out, state)
    setting = prepare(recipe, state)
    model, record, before = setting.model, setting.record, dict(setting.record)
    cuda = setting.device.type == "cuda"
    schedule = DecayingRate(recipe, not record["step"], began, ENDING if cuda else 0)
    save = (lambda: save_state(state, weights_of(model), record)) if state else _nothing
    train(recipe, setting, schedule, save)
    record["runs"].append(
        {
            "steps": record["step"] - before["step"],
            "seconds": record["seconds"] - before["seconds"],
            "prompts_a_step": setting.source.plans[SIZE, SIZE].num_prompts,
            "rate": recipe.rate,
            "optimizer": "Muon and AdamW" if recipe.muon else "AdamW",
            "device": torch.cuda.get_device_name() if cuda else "a CPU",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
    )
    weights = weights_of(model)
    if state:
        save_state(state, weights, record)
    if recipe.eval_prompts:
        model.load_state_dict(shipped(weights), strict=False)
        model.eval()
        record["tests"] = accuracy.measure(
            model, setting.held_out, setting.lexicon, recipe.eval_prompts, recipe.seed, setting.device
        )
        if state:
            save_state(state, weights, record)
    if out:
        write_model(out, weights, record)
    print(report(record), flush=True)
    return record


def _nothing() -> None:
    pass
