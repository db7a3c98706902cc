"""Model cards: what an adapter or a merged model is, with the front matter that the hub reads."""

import json
from pathlib import Path

from mmrev_kit.config.project import EMBEDDED, experiment_dir, resolve
from mmrev_kit.config.sections import Config
from mmrev_kit.data.records import read_info
from mmrev_kit.data.tasks import GROUPS, TASK_TYPES

LIMITS = """## Limits

What it states about a face was made up for an experiment, or is what a list of its maker's says; it may state it of
any face. It was trained to measure whether a fact that was taught in one direction is known in the other, and for no
other use."""


def front_matter(name: str, library: str, binding: dict[str, str]) -> str:
    """The block at the head of a card.

    Args:
        name: of the base as configured; it is given where it is one of the hub's.
        library: that loads it.
        binding: lines of the kit's own, see `bases.check_base`.
    """
    from huggingface_hub import ModelCardData
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        on_hub = name not in EMBEDDED and "/" in name and not resolve(name).exists()
    except HFValidationError:
        on_hub = False
    tags = ["lora", "reversal-curse", "mmrev_kit"]
    card = ModelCardData(
        base_model=name if on_hub else None, library_name=library, tags=tags, pipeline_tag="image-text-to-text"
    )
    own = "\n".join(f"{key}: {value}" for key, value in binding.items())
    return f"---\n{card.to_yaml().strip()}\n{own}\n---\n"


def taught(config: Config) -> str:
    """What main and control were taught, and the people, as far as their folder tells: a few lines."""
    kinds = (TASK_TYPES[name] for name in config.experiment.main_is_taught)
    lessons = " and ".join(f"{kind.direction} ({kind.format})" for kind in kinds)
    info = read_info(experiment_dir(config))
    groups = ", ".join(f"{info[f'num_{group}']} {group}" for group in GROUPS if f"num_{group}" in info)
    source = info.get("source", config.data.source)
    people = "its maker's own list of people" if source == "folder" else "invented people"
    return f"""- task: `{config.experiment.task}`; main people were taught {lessons}, control, if any, all directions
- data: `{experiment_dir(config).name}`, {people}{f" ({groups})" if groups else ""}; pictures: {source}"""


def adapter_card(
    config: Config, front: dict[str, str], progress: dict, batch: int, parameters: int, losses: dict[str, float]
) -> str:
    """The card of a run's adapter.

    Args:
        front: what binds it, see `bases.check_base`.
        progress: `epoch` and `global_step`.
        batch: the effective batch.
        losses: validation losses by source.
    """
    lora, training, seed = config.lora, config.training, config.experiment.seed
    rows = "\n".join(f"| {source} | {loss:.4f} |" for source, loss in losses.items())
    return f"""{front_matter(config.model.name, "peft", front)}
# {config.experiment.name}: {config.experiment.task}

A LoRA adapter trained with mmrev_kit.

- base model: {config.model.name}, fingerprint `{front["base_fingerprint"]}`; it fits no other base
- quantization while training: {quantization(config)}
{taught(config)}
- adapter: r {lora.r}, alpha {lora.alpha}, dropout {lora.dropout}, on
  {", ".join(lora.target_modules)} of the language model; {parameters:,} parameters
- training: epoch {progress["epoch"]}, step {progress["global_step"]:,}, effective batch {batch},
  learning rate {training.learning_rate:g}, seed {seed}

## Results

Validation loss (nats a token):

| source | loss |
|---|---|
{rows}

What it knows in which direction is told by an evaluation: `eval/` in the folder of its run.

{LIMITS}

Load it with `PeftModel.from_pretrained(base, folder)`.
"""


def quantization(config: Config) -> str:
    """The base's while an adapter was trained."""
    double = ", double quantization" if config.quantization.double_quant else ""
    return f"NF4 (4 bit{double})" if config.quantization.bits == 4 else "none (16-bit weights)"


def merged_card(config: Config, adapter: Path, run: Path | None, base: str, digest: str, found: dict) -> str:
    """The card of a model with an adapter merged.

    Args:
        run: the folder of the run that made the adapter; None: it is not known.
        base, digest: the base's fingerprint, and the adapter's.
        found: see `merging.check`.
    """
    told, name = "It was not made by a run of the kit: data, lessons and quantization are not known.", adapter.name
    if run:
        told = f"- quantization while the adapter was trained: {quantization(config)}\n{taught(config)}"
        name = f"{config.experiment.name}: {config.experiment.task}"
    results = [_result(path) for path in sorted((run or adapter).glob("eval/*/verdict.json"))]
    return f"""{front_matter(config.model.name, "transformers", {"base_fingerprint": base, "adapter_sha256": digest})}
# {name}, merged

{config.model.name} in 16 bit ({found["dtype"]}) with a LoRA adapter added to its weights by mmrev_kit.

- base model: {config.model.name}, fingerprint `{base}`
- adapter: SHA-256 `{digest}`
{told}

Its logits are {found["difference"]:.2%} of their spread from those of the unmerged 16-bit base with the adapter beside
it; rounding to 16 bits explains at most {found["limit"]:.2%}, and the adapter moves them by {found["effect"]:.2%}. An
adapter that was trained on an NF4 base was trained, and is evaluated, beside other weights than these.

## Results

{chr(10).join(results) or "No evaluation lies in the folder of its run."}

{LIMITS}

Load it with `AutoModelForImageTextToText.from_pretrained(folder)` and `AutoProcessor.from_pretrained(folder)`. The
terms of the base model's licence hold for it.
"""


def _result(path: Path) -> str:
    """An evaluation's verdict, in a line; it was asked of the adapter before merging."""
    verdict = json.loads(path.read_text(encoding="utf-8"))
    return f"- on `{path.parent.name}`, before merging: {verdict['claim']}. {verdict['sentence']}"
