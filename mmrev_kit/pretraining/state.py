"""What pretraining leaves: a state to go on from, and the model's folder with its card."""

import json
import shutil
from pathlib import Path

import torch

from mmrev_kit.config.project import EMBEDDED_MODEL
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data import faces, objects
from mmrev_kit.files import new_folder, write_json
from mmrev_kit.pretraining.accuracy import table
from mmrev_kit.pretraining.pictures import HELD_OUT
from mmrev_kit.pretraining.recipe import Recipe

CARD = EMBEDDED_MODEL.parent / "base_card.md"
SHARD = "15MB"  # of a file of the state, at most
CREDIT = "- {style} by {creator}; {license} ({license_url}), {source}"
TITLES = {
    "both": "with correct-or-wrong questions in both orders, image first and text first",
    "one": "with correct-or-wrong questions in one order, text first; it never met one with the image first",
}


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
