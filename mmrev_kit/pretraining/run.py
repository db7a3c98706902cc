"""Pretraining of an embedded model from nothing, in one plain loop that goes on where it was interrupted."""

import argparse
import json
import shutil
import time
from dataclasses import fields
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from mmrev_kit.config.project import EMBEDDED_MODEL
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data import faces, objects
from mmrev_kit.files import new_folder, tidy, write_json
from mmrev_kit.pretraining.accuracy import make_encoder, measure, table
from mmrev_kit.pretraining.learning import Lessons, Step, make_optimizers, rate_at
from mmrev_kit.pretraining.pictures import HELD_OUT, draw_pictures
from mmrev_kit.pretraining.questions import mix_of
from mmrev_kit.pretraining.recipe import Recipe, read_recipe
from mmrev_kit.training.lock import held, keep_fresh

CARD = EMBEDDED_MODEL.parent / "base_card.md"
SHARD = "15MB"  # of a file of the state, at most
CREDIT = "- {style} by {creator}; {license} ({license_url}), {source}"
TITLES = {
    "both": "with correct-or-wrong questions in both orders, image first and text first",
    "one": "with correct-or-wrong questions in one order, text first; it never met one with the image first",
}


def new_model(seed: int, device):
    """A model of random weights, in fp32."""
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    return Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(EMBEDDED_MODEL)).float().to(device).train()


def train(recipe: Recipe, model, optimizers: list, record: dict, folder: Path) -> None:
    """Take the steps that are left; the record grows with them, and the state in `folder` is saved on the way.

    Raises:
        FloatingPointError: the loss is no longer a number.
    """
    began, device = time.monotonic(), model.device
    subjects, drawn = draw_pictures("train", recipe.seed, recipe.num_faces, recipe.looks, recipe.num_workers)
    pixels = torch.from_numpy(drawn).to(device)
    lessons = Lessons(recipe, subjects, make_encoder(EMBEDDED_MODEL))
    print(f"drew {len(pixels):,} pictures in {time.monotonic() - began:.1f} s", flush=True)
    steps = range(record["step"], recipe.steps)
    loader = DataLoader(lessons, None, sampler=steps, num_workers=recipe.num_workers, pin_memory=device.type == "cuda")
    take_step = Step(model, optimizers, pixels)
    began, kinds = time.monotonic(), list(mix_of(recipe.orders))
    sums = torch.zeros(2, len(kinds), device=device)  # right answers and rows of each kind since the last line
    for step, batch in zip(steps, loader, strict=True):
        rate = rate_at(step, recipe)
        loss, right = take_step(batch, rate)
        places = torch.tensor([kinds.index(kind) for kind in batch["kinds"]]).to(device, non_blocking=True)
        sums.index_add_(1, places, torch.stack([right, torch.ones_like(right)]))
        record["step"] = step + 1
        saving = record["step"] % recipe.save_every == 0 or record["step"] == recipe.steps
        if record["step"] % recipe.log_every == 0 or saving:
            seconds, began = time.monotonic() - began, time.monotonic()
            record["seconds"] += seconds
            _log(record, loss.item(), dict(zip(kinds, (sums[0] / sums[1]).tolist(), strict=True)), rate)
            sums.zero_()
        if saving:
            save(folder, model, optimizers, record)


def _log(record: dict, loss: float, right: dict[str, float], rate: float) -> None:
    """One line on standard output, one entry in the record."""
    if loss != loss:
        raise FloatingPointError(f"The loss is no number at step {record['step']:,}. Lower the rate.")
    record["log"].append({"step": record["step"], "loss": loss, "right": right, "rate": rate})
    shares = ", ".join(f"{kind} {share:.3f}" for kind, share in right.items())
    line = f"step {record['step']:,}: loss {loss:.4f}; right: {shares}; rate {rate:.2e}; {record['seconds']:.0f} s"
    print(line, flush=True)


def save(folder: Path, model, optimizers: list[torch.optim.Optimizer], record: dict) -> None:
    """Write the state, in files of at most `SHARD`, and round the run itself to what was written.

    The weights become 16-bit floats, the optimizers' moments bfloat16 (they need its range): half the size, and a run
    that goes on from here computes what the one that was not interrupted does. The folder is whole or as before.
    """
    from huggingface_hub import save_torch_state_dict

    rounded = {f"model.{name}": (part.data, torch.float16) for name, part in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, moments in optimizer.state_dict()["state"].items():
            for key, value in moments.items():
                dtype = torch.bfloat16 if value.ndim else value.dtype  # a count of steps stays exact
                rounded[f"optimizer.{number}.{index}.{key}"] = value, dtype
    written = {name: value.to("cpu", dtype) for name, (value, dtype) in rounded.items()}
    for name, (value, _) in rounded.items():
        value.copy_(written[name])
    with new_folder(folder) as building:
        save_torch_state_dict(written, building, max_shard_size=SHARD)
        write_json(building / "state.json", record)


def restore(folder: Path, model, optimizers: list[torch.optim.Optimizer], recipe: Recipe) -> dict:
    """Put a state into model and optimizers, if there is one; returns its record, or a new one.

    Raises:
        ConfigError: it is the state of another recipe.
    """
    from safetensors.torch import load_file

    wanted = recipe.learned()
    if not (folder / "state.json").is_file():
        return {"recipe": wanted, "step": 0, "seconds": 0.0, "log": [], "tests": []}
    record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for name, value in record["recipe"].items():
        if value != wanted.get(name):
            made = f"{folder} was pretrained with {name} = {value}, not {wanted.get(name)}."
            raise ConfigError(f"{made} Give the same {name}, or another folder as out.")
    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    model.load_state_dict(weights, strict=False)  # the tied head is not among them
    for number, optimizer in enumerate(optimizers):
        moments: dict[int, dict] = {}
        for name, value in tensors.items():
            kind, *rest = name.split(".")
            if kind == "optimizer" and rest[0] == str(number):
                moments.setdefault(int(rest[1]), {})[rest[2]] = value.float()
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return record


def write_model(folder: Path, model, record: dict) -> None:
    """The model's folder: 16-bit weights and the card; all other files are those of `EMBEDDED_MODEL`."""
    from safetensors.torch import save_file

    weights = {name: part.detach().to("cpu", torch.float16).contiguous() for name, part in model.named_parameters()}
    with new_folder(folder) as building:
        for file in EMBEDDED_MODEL.iterdir():
            if file.suffix in (".json", ".jinja"):
                shutil.copy(file, building)
        save_file(weights, building / "model.safetensors", metadata={"format": "pt"})
        (building / "README.md").write_text(model_card(record), encoding="utf-8")


def model_card(record: dict) -> str:
    """The model card: what it is, what it was trained on and by whom that was drawn, how long, and how well it does."""
    recipe, drawn = record["recipe"], faces.credits()
    drawn["creator"] = f"{drawn['artist']}, {drawn['changes']}"
    return CARD.read_text(encoding="utf-8").format(
        **recipe | record, taught=TITLES[recipe["orders"]], optimizers="Muon and AdamW" if recipe["muon"] else "AdamW",
        credits="\n".join(map(CREDIT.format_map, (drawn, objects.credits()))),
        held_out="\n".join(f"- {kind}: {words}" for kind, words in HELD_OUT.items()),
        accuracy="\n".join(table(record["tests"]) if record["tests"] else ["Not measured yet."]),
    )  # fmt: skip


def pretrain(recipe: Recipe, out: str | Path) -> dict:
    """Pretrain, write the model to `out`/model with its card, and measure it on what is held out.

    Run again, it goes on from `out`/state; with a finished state it writes the model anew, without training.

    Returns:
        The record: recipe, step, seconds, log, tests, and on what it was made.

    Raises:
        ConfigError: `out` holds the state of another recipe, or folders that no pretraining wrote, or another process
            works there.
    """
    import transformers

    out = Path(out)
    with held(out):
        keep_fresh(out)
        tidy(out)
        state = out / "state"
        others = [part for part in (state, out / "model") if part.exists() and not (state / "state.json").is_file()]
        if others:
            raise ConfigError(f"{others[0]}: no pretraining wrote it, and this one would replace it. Name another out.")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = new_model(recipe.seed, device)
        optimizers = make_optimizers(model, recipe.weight_decay, recipe.muon)
        record = restore(state, model, optimizers, recipe)
        if record["step"] < recipe.steps:
            print(f"{recipe.orders}, seed {recipe.seed}: {record['step']:,} of {recipe.steps:,} steps", flush=True)
            name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
            record["made_on"] = f"on {name} (torch {torch.__version__}, transformers {transformers.__version__})"
            with torch.cuda.stream(torch.cuda.Stream() if device.type == "cuda" else None):
                train(recipe, model, optimizers, record, state)
        write_model(out / "model", model, record)
        if recipe.eval_prompts and not record["tests"]:
            record["tests"] = measure(out / "model", recipe)
        write_json(state / "state.json", record)
        write_model(out / "model", model, record)
        print("\n".join(table(record["tests"])), flush=True)
        return record


def main(words: list[str]) -> None:
    """`python -m mmrev_kit pretrain`, with an option for each field of `Recipe`."""
    parser = argparse.ArgumentParser(prog="mmrev pretrain", description="Make or measure an embedded model.")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", help="a folder: its state to go on from, if there is one; model and state are written")
    target.add_argument("--measure", metavar="FOLDER", help="print the held-out accuracies of a tiny base's folder")
    for field in fields(Recipe):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {}
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **kind)
    given = vars(parser.parse_args(words))
    out, folder = given.pop("out"), given.pop("measure")
    recipe = read_recipe(given)
    if folder and not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{folder}: there is no model. One that was pretrained lies in model/ of its folder.")
    if out:
        pretrain(recipe, out)
    else:
        print("\n".join(table(measure(folder, recipe))))
