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
    recipe, drawn, icons = record["recipe"], faces.credits(), objects.credits()
    drawn["creator"] = f"{drawn['artist']}, {drawn['changes']}"
    lines = [
        "---", "license: apache-2.0", "library_name: transformers", "pipeline_tag: image-text-to-text", "---", "",
        "# An embedded model of mmrev_kit", "",
        "A Qwen3-VL of about ten million parameters (the transformers class in every part), pretrained on drawn faces "
        "and icons to describe a picture, to say whether a description is true of it, and to choose among four "
        f"descriptions or four pictures, {TITLES[recipe['orders']]}. It is made for experiments that run in minutes "
        "on a laptop. It knows nothing else: it is no assistant, and no Qwen weights are in it.", "",
        "## Training", "",
        f"`python -m mmrev_kit pretrain --orders {recipe['orders']} --seed {recipe['seed']}`: {record['step']:,} steps "
        f"of {recipe['prompts']} prompts in {record['seconds']:.0f} s {record['made_on']}; "
        f"{'Muon and AdamW' if recipe['muon'] else 'AdamW'}, rate {recipe['rate']:g}.", "",
        "## Data", "",
        "Drawn and asked by `mmrev_kit.pretraining`; no photograph and no real person is in it. Faces of the shares "
        "`experiment` and `pool` are in neither training nor these tests. Roles and places of invented facts are met "
        "in texts only, never with a picture.", "",
        *(CREDIT.format_map(credit) for credit in (drawn, icons)),
        "", "## Accuracy", "",
        "Whole answers, on what training did not show, with the weights rounded to 16 bits as they are here.", "",
        *(f"- {kind}: {words}" for kind, words in HELD_OUT.items()), "",
        *(table(record["tests"]) if record["tests"] else ["Not measured yet."]), "",
        "A generated description names all seven attributes of a face; the other tasks name one to four.", "",
        "## Licence", "", "Apache-2.0 for the weights and the kit; the drawings under the licences above.", "",
    ]  # fmt: skip
    return "\n".join(lines)
