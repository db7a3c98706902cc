"""What pretraining leaves: a state to go on from, and the embedded model's folder with its card."""

import json
from pathlib import Path

from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data import objects
from mmrev_kit.data.faces import credits
from mmrev_kit.files import new_folder, write_json, write_text
from mmrev_kit.pretraining.accuracy import HELD_OUT, summary, table
from mmrev_kit.pretraining.tiny import write_embedded

SHARD = 15 * 2**20  # bytes of a file of weights, at most


def weights_of(model) -> dict:
    """The parameters by name, on the CPU; a tied head is not among them."""
    return {name: part.detach().cpu().contiguous() for name, part in model.named_parameters()}


def save_state(folder: str | Path, weights: dict, record: dict) -> None:
    """Write the weights, in fp32, as files of at most 15 MiB, and the record; the folder is whole or as before.

    The optimizer's moments are not kept: they would double the files, and a new warm-up makes them anew.
    """
    from safetensors.torch import save_file

    with new_folder(folder) as building:
        shards, size = [{}], 0
        for name, value in weights.items():
            if size + value.nbytes > SHARD:
                shards.append({})
                size = 0
            shards[-1][name] = value.float()
            size += value.nbytes
        for number, shard in enumerate(shards, start=1):
            save_file(shard, building / f"weights-{number}.safetensors")
        write_json(building / "state.json", record)


def load_state(folder: str | Path) -> tuple[dict, dict] | tuple[None, None]:
    """(weights, record) of a state, or (None, None) where there is none.

    Raises:
        ConfigError: the folder holds something else.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "state.json").is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder}: no state of a pretraining, which would replace it. Choose another folder.")
        return None, None
    weights = {}
    for file in sorted(folder.glob("weights-*.safetensors")):
        weights |= load_file(file)
    return weights, json.loads((folder / "state.json").read_text(encoding="utf-8"))


def new_record(seed: int) -> dict:
    """The record of a model that has not been trained."""
    return {"seed": seed, "step": 0, "seconds": 0.0, "decayed": False, "runs": [], "log": [], "tests": {}}


def write_model(folder: str | Path, weights: dict, record: dict) -> Path:
    """The embedded model's folder: 16-bit weights, configuration, tokenizer, processor, card."""
    folder = write_embedded(folder, record["seed"], weights)
    write_text(folder / "README.md", model_card(record))
    return folder


def model_card(record: dict) -> str:
    """The model card: what it is, what it was trained on and by whom that was drawn, how long, and how well it does."""
    faces, things = credits(), objects.credits()
    total = f"{sum(run['steps'] * run['prompts_a_step'] for run in record['runs']):,} prompts"
    if len(record["runs"]) > 1:
        total = f"{record['step']:,} steps, {total}, {record['seconds']:.0f} seconds of training"
    lines = [
        "---", "license: apache-2.0", "library_name: transformers", "pipeline_tag: image-text-to-text", "---", "",
        "# The embedded model of mmrev_kit", "",
        "A Qwen3-VL of about ten million parameters (the transformers class in every part), pretrained on drawn faces "
        "and icons to describe a picture, to say whether a description is true of it, and to choose among four "
        "descriptions or four pictures. It is made for experiments that run in minutes on a laptop. It knows nothing "
        "else: it is no assistant, and no Qwen weights are in it.", "",
        "## Training", "",
        f"- seed {record['seed']}; {total}; "
        + ("the rate came down to zero" if record["decayed"] else "the rate did not fall"),
    ]  # fmt: skip
    for run in record["runs"]:
        lines.append(
            f"- {run['steps']:,} steps of {run['prompts_a_step']} prompts on {run['device']} in {run['seconds']:.0f} s "
            f"(torch {run['torch']}, transformers {run['transformers']}), rate {run['rate']:g}, "
            f"{run['optimizer']}"
        )
    lines += [
        "", "## Data", "",
        "Drawn and asked by `mmrev_kit.pretraining`; no photograph and no real person is in it. Faces of the shares "
        "`experiment` and `pool` are in neither training nor these tests. Roles and places of invented facts are met "
        "in texts only, never with a picture.", "",
        f"- faces: {faces['style']} by {faces['artist']}, {faces['license']} ({faces['license_url']}), "
        f"{faces['source']}; {faces['changes']}",
        f"- icons: {things['style']} by {things['creator']}, {things['license']} ({things['license_url']}), "
        f"{things['source']}",
        "", "## Accuracy", "",
        "Whole answers, on what training did not show, with the weights rounded to 16 bits as they are here.", "",
    ]  # fmt: skip
    lines += [f"- {kind}: {words}" for kind, words in HELD_OUT.items()]
    lines += ["", *(table(record["tests"]) if record["tests"] else ["Not measured yet."])]
    lines += ["", "A caption names all seven attributes of a face; the other tasks name one to four.", ""]
    lines += ["## Licence", "", "Apache-2.0 for the weights and the kit; the drawings under the licences above.", ""]
    return "\n".join(lines)


def report(record: dict) -> str:
    """The result in a few lines."""
    head = f"{record['step']:,} steps in {record['seconds']:.0f} s of training"
    return f"{head}\n{summary(record['tests'])}" if record["tests"] else head
