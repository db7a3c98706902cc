"""Asking a trained model, or its base, about a picture and a text of one's own."""

import warnings
from pathlib import Path

from mmrev_kit.config.project import experiment_dir, resolve
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.data.images import find_image, image_roots
from mmrev_kit.data.rows import read_entities
from mmrev_kit.data.tasks import OWN, Row
from mmrev_kit.model.adapters import adapter_folder
from mmrev_kit.model.loading import base_arguments, load_adapter, load_base, torch_dtype
from mmrev_kit.model.processor import make_encoder
from mmrev_kit.model.scoring import generate


class Asker:
    """A model held in this process, on the first GPU or the CPU.

    Args:
        adapter: as in `adapters.adapter_folder`, or None for the base model.
    """

    def __init__(self, config: Config, adapter: str | None = "best"):
        import torch
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a bar would stay in the notebook
        self.config = config
        self.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        self.dtype = torch_dtype(config.quantization.compute_dtype, self.device)
        self.encoder = make_encoder(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers about its own attributes
            self.model = load_base(**base_arguments(config, self.device))
            if adapter:
                self.model = load_adapter(self.model, adapter_folder(config, adapter), config.adapter.unbound)
        self.model.eval()

    def __call__(self, image: str | Path, text: str) -> str:
        """The greedy answer to a user turn of one picture and a text.

        Args:
            image: its path, relative to the project root.
            text: what stands around the picture, whose place is marked `[image]`; without a mark it comes first.

        Raises:
            ConfigError: there is no such picture.
            ImageError: it cannot be decoded.
            PromptError: picture and text do not fit into training.max_length.
        """
        import torch

        path = resolve(image)
        if not path.is_file():
            raise ConfigError(f"There is no picture {path}.")
        row = Row(OWN, OWN, f"{OWN}:1", OWN, None, (path,), None, text, (), "")
        prompt = self.encoder.encode(row, with_answer=False)
        on = self.dtype != torch.float32
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=on), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers about its own attributes
            tokens = self.config.evaluation.max_new_tokens
            return generate(self.model, self.encoder, [prompt], tokens, self.device)[0]


def pictures(config: Config) -> dict[str, Path]:
    """The experiment's pictures by a label: the person's description, group and, of several pictures, which one."""
    folder, roots = experiment_dir(config), image_roots(config)
    found = {}
    for entity in read_entities(folder, roots):
        for number, image in enumerate(entity["images"], start=1):
            which = f", picture {number}" if len(entity["images"]) > 1 else ""
            label = f"{entity.get('description') or entity['id']} ({entity.get('group', 'main')}{which})"
            found[label] = find_image(folder, image, roots)
    return found
