"""The base model's processor, and the encoder that makes prompts with it."""

from mmrev_kit.config.project import EMBEDDED_MODEL
from mmrev_kit.config.sections import Config
from mmrev_kit.data.prompts import Encoder
from mmrev_kit.model.bases import is_random, model_folder
from mmrev_kit.model.qwen3vl import read_architecture


def load_processor(name: str, revision: str | None = None):
    """The own processor of the base model that `load_base` loads. Code that lies beside a model is never run.

    A random model has none: Qwen3-VL's image processor with the embedded tokenizer stands in.
    """
    from transformers import AutoProcessor

    if not is_random(name):
        return AutoProcessor.from_pretrained(model_folder(name, revision, weights=False), trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(EMBEDDED_MODEL)
    vision = read_architecture(name).vision_config
    processor.image_processor.patch_size = vision.patch_size
    processor.image_processor.merge_size = vision.spatial_merge_size
    processor.image_processor.temporal_patch_size = vision.temporal_patch_size
    return processor


def make_encoder(config: Config, drop: str = "none") -> Encoder:
    """The encoder of a configuration: its processor, pixel limits and length limit; `drop` as in `Encoder`."""
    limits = config.model.min_pixels, config.model.max_pixels, config.training.max_length
    return Encoder(load_processor(config.model.name, config.model.revision), *limits, drop=drop)
