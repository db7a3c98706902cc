"""The base model's processor, and the encoder that makes prompts with it."""

from pathlib import Path

from mmrev_kit.config.project import EMBEDDED_MODEL, resolve
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.data.plain import PlainEncoder
from mmrev_kit.data.prompts import END, Encoder
from mmrev_kit.model.base_files import AGAIN, FAMILY, read_object
from mmrev_kit.model.bases import family_of, is_random, processor_folder, stands_in
from mmrev_kit.model.qwen3vl import read_architecture, whole_config
from mmrev_kit.model.strict import strict

PARTS = ("tokenizer", "image_processor", "image_token")  # without which no row can be made
FILES = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


@strict()
def load_processor(name: str):
    """The own processor of a base model that `load_base` loads. Code that lies beside a model is never run.

    A random Qwen3-VL has none: its image processor with the embedded tokenizer stands in.

    Raises:
        ConfigError: a file of it is missing or broken, it is another family's, it has no chat template, or
            two, or takes no images, or it contradicts the model's configuration.
    """
    from transformers import AutoProcessor

    if stands_in(name):
        processor = AutoProcessor.from_pretrained(EMBEDDED_MODEL)
        vision = read_architecture(name).vision_config
        processor.image_processor.patch_size = vision.patch_size
        processor.image_processor.merge_size = vision.spatial_merge_size
        processor.image_processor.temporal_patch_size = vision.temporal_patch_size
        return processor
    folder = processor_folder(name)
    for file in FILES:
        if (folder / file).is_file():
            read_object(folder / file)
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:
        raise ConfigError(f"{folder}: its processor needs a package: {' '.join(str(error).split())}") from None
    except Exception as error:  # what a file of another shape raises: KeyError, TypeError, Exception itself
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"{folder} holds no whole processor. {AGAIN} ({reason[:600]})") from None
    kind, fast = type(processor).__name__, family_of(name) == FAMILY
    if fast and kind != "Qwen3VLProcessor":
        raise ConfigError(f"{folder}: {kind} is not the processor of a Qwen3-VL; is processor_config.json missing?")
    if lacking := [part for part in PARTS if getattr(processor, part, None) is None]:
        raise ConfigError(f"{folder}: {kind} has no {' and no '.join(lacking)}: no processor of images and texts.")
    if not processor.chat_template:
        raise ConfigError(f"{folder} has no chat_template.jinja: copy it from the published model.")
    own, taken = folder / "chat_template.jinja", processor.chat_template  # by name, where there are several
    taken = taken.get("default") if isinstance(taken, dict) else taken
    if own.is_file() and taken != own.read_text(encoding="utf-8"):  # which the library passes over
        raise ConfigError(f"{folder}: another chat template than that of {own.name} is in processor_config.json.")
    if processor.tokenizer.pad_token_id is None:
        raise ConfigError(f"{folder}: tokenizer_config.json names no pad_token. {AGAIN}")
    if fast:
        refuse_contradiction(folder, processor)
    return processor


def refuse_contradiction(folder: Path, processor) -> None:
    """Raises ConfigError where a Qwen3-VL's processor makes other inputs than the model of the same folder takes."""
    if END not in processor.tokenizer.get_vocab():
        raise ConfigError(f"{folder / 'tokenizer.json'} has no token {END}, which ends an answer. {AGAIN}")
    config = whole_config(folder / "config.json")
    vision, images = config.vision_config, processor.image_processor
    pairs = {
        "image_token_id": (config.image_token_id, processor.image_token_id),
        "patch_size": (vision.patch_size, images.patch_size),
        "spatial_merge_size": (vision.spatial_merge_size, images.merge_size),
        "temporal_patch_size": (vision.temporal_patch_size, images.temporal_patch_size),
    }
    for name, (model, own) in pairs.items():
        if model != own:
            raise ConfigError(f"{folder}: {name} is {model} in config.json and {own} in the processor's files. {AGAIN}")
    for name in ("image_mean", "image_std"):
        values = getattr(images, name)
        if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
            raise ConfigError(f"{folder}: the processor's {name} is {values!r}, not three numbers. {AGAIN}")
    if not all(images.image_std):
        raise ConfigError(
            f"{folder}: the processor's image_std is {images.image_std}, by which nothing can be divided."
        )


def make_encoder(config: Config, drop: str = "none") -> Encoder:
    """The encoder of a configuration: its processor, pixel limits and length limit; `drop` as in `Encoder`.

    Raises:
        ConfigError: see `load_processor`; or the model is made for shorter rows.
    """
    name = config.model.name  # a model of the hub is asked for once, and is a folder from here on
    base = name if is_random(name) else str(processor_folder(name, config.model.revision))
    processor = load_processor(base)
    limits = config.model.min_pixels, config.model.max_pixels, config.training.max_length
    values = read_object(resolve(base) if is_random(name) else Path(base) / "config.json")
    longest = (values.get("text_config") or values).get("max_position_embeddings")
    if type(longest) is int and config.training.max_length > longest:
        has = f"the model is made for {longest:,} tokens (max_position_embeddings)"
        raise ConfigError(f"training.max_length = {config.training.max_length:,}: {has}.")
    kind = Encoder if values.get("model_type", FAMILY) == FAMILY else PlainEncoder
    return kind(processor, *limits, drop=drop)
