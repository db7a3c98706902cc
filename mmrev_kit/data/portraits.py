"""The `diffusers` source: an experiment whose pictures a text-to-image model makes, from each person's face_prompt."""

import hashlib
import inspect
import io
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from PIL import Image, ImageOps

from mmrev_kit.config.project import hide_secrets, resolve
from mmrev_kit.config.reporting import paced
from mmrev_kit.config.sections import ConfigError, DataConfig
from mmrev_kit.config.seeds import rng_for, seed_for
from mmrev_kit.data.assets import read_asset
from mmrev_kit.data.faces import PATIENCE
from mmrev_kit.data.partners import connector_split, experiment_rows
from mmrev_kit.data.people import make_entities, write_experiment
from mmrev_kit.files import checksum, remove_folder, to_json, write_bytes

OURS = ("prompt", "generator", "num_images_per_prompt", "output_type", "return_dict")  # arguments that are no options
READ = ("*.json", "*.safetensors", "*.txt", "*.model")  # of a pipeline's folder


def make_people(data: DataConfig, seed: int) -> list[dict]:
    """The people of an experiment, see `people.make_entities`, with what a photograph may show of them: gender, age,
    colour of hair and eyes, nationality, and the `face_prompt` that says so. Two differ in at least two of these.

    Raises:
        ConfigError: groups too small or too large.
    """
    entities, table = make_entities(data, seed), read_asset("people")
    rng, looks, failed = rng_for(seed, "portraits"), [], 0
    while len(looks) < len(entities):
        look = {name: rng.choice(values) for name, values in table["portraits"].items()}
        if all(sum(look[name] != other[name] for name in look) >= 2 for other in looks):
            looks.append(look)
        elif (failed := failed + 1) > PATIENCE:
            raise ConfigError(f"{len(entities)} people who differ in two visible things: only {len(looks)} were found.")
    for entity, look in zip(entities, looks, strict=True):
        del entity["attributes"]  # of a drawing
        entity |= look | {"face_prompt": table["face_prompt"].format(**look)}
    return entities


def make_portraits(folder: str | Path, data: DataConfig, seed: int) -> Path:
    """Make an experiment with pictures by `data.image_model`, see `people.write_experiment`.

    A picture follows from the pipeline's files, the prompt, the options, and a seed of its own by person and view. It
    is kept under the digest of these in `.<name>.pictures` beside the folder until that is whole: a run that was cut
    goes on, and takes none for what other files or settings made.

    Raises:
        ConfigError: groups too small or too large, no diffusers, or no such pipeline or option; see `make_picture`.
    """
    if find_spec("diffusers") is None:
        raise ConfigError("data.source=diffusers needs a package that is not here: pip install 'mmrev-kit[diffusers]'.")
    folder, entities, connectors = Path(folder), make_people(data, seed), connector_split(seed)
    model = pipeline_folder(data.image_model)
    check_options(model, data.image_options)
    kept, credits = folder.with_name(f".{folder.name}.pictures"), credits_of(model, data.image_model)
    pictures = []  # what makes each, where it is kept, where it belongs
    for entity in entities:
        for view, name in enumerate(entity["images"]):
            made_by = {"prompt": entity["face_prompt"], "seed": seed_for(seed, "portrait", entity["id"], view)}
            made_by |= {"size": data.image_size, "options": data.image_options}
            facts = made_by | {"files": credits["files_sha256"], "diffusers": version("diffusers")}
            digest = hashlib.sha256(to_json(facts).encode()).hexdigest()[:32]
            pictures.append((made_by, kept / f"{digest}.png", name))

    def draw(building: Path) -> None:
        make_missing(model, [(made_by, path) for made_by, path, _ in pictures if not path.is_file()], len(pictures))
        for _, path, name in pictures:
            shutil.copyfile(path, building / name)

    info = {"source": "diffusers", "seed": seed}
    info |= {name: getattr(data, name) for name in ("image_size", "images_per_entity", "image_model", "image_options")}
    info |= {"connectors": connectors, "image_credits": credits}
    write_experiment(folder, entities, experiment_rows(entities, connectors, seed), draw, **info)
    remove_folder(kept)
    return folder


def make_missing(model: Path, missing: list[tuple[dict, Path]], total: int) -> None:
    """Make these pictures one by one, in a process of their own: the graphics card is free again afterwards."""
    if len(missing) < total:
        print(f"{total - len(missing)} of {total} pictures are there from before", flush=True)
    if not missing:
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        for made_by, path in paced(missing, "pictures"):
            try:
                process.submit(make_picture, model, path, **made_by).result()
            except BrokenProcessPool:
                raise ConfigError(
                    "The process that makes the pictures was ended from outside, perhaps for want of memory. "
                    f"Those made are kept in {path.parent}: run this again to go on."
                ) from None


def make_picture(model: Path, path: Path, prompt: str, seed: int, size: int, options: dict) -> None:
    """Make one picture in the size that the model is made for, cut it square, scale it, and write it as PNG.

    Raises:
        ConfigError: the pipeline refuses an option, blanks the picture out, makes one of a single colour, or needs more
            memory than the graphics card has.
    """
    import torch

    pipeline = load_pipeline(model)
    try:
        made = pipeline(prompt=prompt, generator=torch.Generator("cpu").manual_seed(seed), **options)
    except torch.OutOfMemoryError:
        raise ConfigError(f"{model} needs more memory than the graphics card has: choose a smaller one.") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"data.image_options: {options} is refused by the pipeline: {error}") from None
    if any(getattr(made, "nsfw_content_detected", None) or []):
        raise ConfigError(f"The pipeline's safety checker blanked out {prompt!r}: choose another experiment.seed.")
    image = ImageOps.fit(made.images[0].convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    if all(low == high for low, high in image.getextrema()):
        raise ConfigError(f"{model} made a picture of one colour of {prompt!r}: its numbers overflow, or it is broken.")
    content = io.BytesIO()
    image.save(content, "PNG")
    write_bytes(path, content.getvalue())


@cache
def load_pipeline(model: Path):
    """The pipeline in a folder, ready: on a graphics card in 16 bit, part by part, else in fp32. Of its files
    safetensors and JSON are read; no code is run.

    Raises:
        ConfigError: it cannot be read.
    """
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    gpu = torch.cuda.is_available()
    bf16 = gpu and torch.cuda.get_device_capability() >= (8, 0)
    dtype = torch.bfloat16 if bf16 else torch.float16 if gpu else torch.float32
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            model, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"{model} cannot be read as a pipeline: {' '.join(str(error).split())[:500]}") from None
    pipeline.set_progress_bar_config(disable=True)
    if gpu:
        pipeline.enable_model_cpu_offload()
    return pipeline


def pipeline_folder(name: str) -> Path:
    """The folder of a pipeline; one on the hub is downloaded, or found in the cache, first.

    Raises:
        ConfigError: there is none, or it comes with code.
    """
    folder = resolve(name)
    if not folder.is_dir():
        from diffusers import DiffusionPipeline
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            folder = Path(DiffusionPipeline.download(name, use_safetensors=True, trust_remote_code=False))
            hf_hub_download(name, "README.md")
        except EntryNotFoundError:
            pass  # it has no card
        except (OSError, ValueError) as error:  # the hub's own errors are such
            reason = hide_secrets(str(error).strip().splitlines()[0])
            raise ConfigError(
                f"data.image_model = {name!r}: no such folder, and no pipeline on the hub: {reason}"
            ) from None
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"data.image_model = {name!r}: {folder} has no model_index.json: it is no diffusers pipeline."
        )
    if code := next(folder.rglob("*.py"), None):
        raise ConfigError(f"data.image_model = {name!r} comes with code ({code}), which is not run.")
    return folder


def check_options(model: Path, options: dict) -> None:
    """Raises ConfigError where the pipeline's class makes no pictures from text alone, or has no such option."""
    import diffusers

    name = json.loads((model / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None:
        raise ConfigError(f"data.image_model: {model} asks for {name!r}, which this diffusers does not have.")
    known = inspect.signature(kind.__call__).parameters
    needed = [key for key, one in known.items() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    if "prompt" not in known or set(needed) - {"self", "prompt"}:
        raise ConfigError(f"data.image_model: {name} is no text-to-image pipeline: it takes {', '.join(needed[1:])}.")
    if unknown := [key for key in options if key not in known or key in OURS]:
        free = ", ".join(key for key in known if key not in ("self", *OURS))
        raise ConfigError(f"data.image_options: {name} has no option {unknown[0]}. It has {free}.")


def credits_of(model: Path, name: str) -> dict:
    """The model and its licence, for experiment_info.json; None where its card does not tell."""
    from huggingface_hub import ModelCard

    card = model / "README.md"
    told = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict() if card.is_file() else {}
    files = sorted({path for pattern in READ for path in model.rglob(pattern)})
    facts = [[str(path.relative_to(model)), checksum(path)] for path in files]
    credit = {"model": name, "files_sha256": hashlib.sha256(to_json(facts).encode()).hexdigest()}
    credit |= {key: told.get(key) for key in ("license", "license_name", "license_link")}
    return credit | {"made_with": f"diffusers {version('diffusers')}"}
