"""From a row to tokens: the prompts of all tasks, exact lengths, and batches.

Training and evaluation build every prompt here, with the same chat template and the same pixel limits.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path

from PIL import Image

from mmrev_kit.config.errors import Told
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.images import load_image
from mmrev_kit.data.tasks import Row, build_prompt

MAX_ASPECT = 200  # the processor refuses longer images
SLOT = "\ue000"  # a private-use character: stands for a text part while the chat template is rendered
END = "<|im_end|>"  # ends an answer
IGNORED = -100  # the label of a token that carries no loss


class PromptError(Told, ValueError):
    """A row cannot become a prompt: `reason`, and what to do about it, `advice`."""

    def __init__(self, reason: str, advice: str):
        self.reason, self.advice = reason, advice
        super().__init__(f"{reason} {advice}")


@dataclass(frozen=True)
class Sample:
    """A row as tokens. `input_ids[answer_start:]` are the answer and <|im_end|>, the only tokens that carry loss."""

    row: Row
    input_ids: tuple[int, ...]
    answer_start: int
    max_pixels: int  # the limit its images were scaled to, at most model.max_pixels
    image_tokens: int


class Encoder:
    """Turns rows into samples and samples into batches, for one processor and one set of limits.

    Args:
        processor: a Qwen3-VL processor.
        min_pixels, max_pixels: limits for one image, in pixels after resizing.
        max_length: tokens of prompt and answer together. Where several images do not fit, all images of that prompt
            are scaled down alike; image tokens are never cut.
        drop: for ablations: "image" shows a grey picture of the same size, "text" leaves out description and
            connector, "both" does both.
    """

    def __init__(self, processor, min_pixels: int, max_pixels: int, max_length: int, drop: str = "none"):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.min_pixels, self.max_pixels, self.max_length = min_pixels, max_pixels, max_length
        self.blank, self.textless = drop in ("image", "both"), drop in ("text", "both")
        images = processor.image_processor
        self.merge = getattr(images, "merge_size", 1)  # 1: of another family, which scales pictures by itself
        self.factor = getattr(images, "patch_size", 1) * self.merge  # pixels a side of one visual token
        self.image_id = processor.image_token_id
        self.end_id = self.tokenizer.convert_tokens_to_ids(END)
        self.pad_id = self.tokenizer.pad_token_id
        self.sizes: dict[Path, tuple[int, int]] = {}
        self.looks: dict[Path, str] = {}  # see `images.look_of`; of those that were checked
        self.frame, self.text_ids = cache(self._frame), cache(self._text_ids)
        self.pixels = lru_cache(maxsize=256)(self._pixels)

    def prompt_pieces(self, shape: tuple[bool, ...]) -> list[str]:
        """The chat template around a turn of this shape (True: image), as the pieces between which its texts go.

        Where the template opens a thought for the answer to come, the thought is empty and closed, as the published
        templates write an answer without one.
        """
        # Texts are put in later, as tokens, so that a description which looks like a special token stays text.
        prompt, folder = self.template([turn(shape)], add_generation_prompt=True), self.tokenizer.name_or_path
        if prompt.rstrip().endswith("<think>"):
            prompt = f"{prompt.rstrip()}\n\n</think>\n\n"
        pieces = prompt.split(SLOT)
        if len(pieces) != shape.count(False) + 1:
            raise ConfigError(f"The chat template of {folder} changes the text of a turn; it cannot be used.")
        if prompt.count("<think>") != prompt.count("</think>"):
            raise ConfigError(f"The chat template of {folder} begins a thought and leaves it open; it cannot be used.")
        return pieces

    def template(self, turns: list[dict], **options) -> str:
        """Turns as the chat template writes them.

        Raises:
            ConfigError: it writes the time, so that every day would have other prompts.
        """
        write = partial(self.processor.apply_chat_template, turns, tokenize=False, **options)
        text, folder = self.processor.chat_template, self.tokenizer.name_or_path
        text = text["default"] if isinstance(text, dict) else text
        if "strftime_now" in text:
            clocks = [f"{{% macro strftime_now(form) %}}{day}{{% endmacro %}}" for day in "12"]
            if len({write(chat_template=clock + text) for clock in clocks}) > 1:
                raise ConfigError(f"The chat template of {folder} writes the time (strftime_now): put a date there.")
        return write()

    def _frame(self, shape: tuple[bool, ...]) -> list[list[int]]:
        """`prompt_pieces` as tokens.

        Raises:
            ConfigError: the template asks for no answer, or writes not one image token an image.
        """
        pieces, folder = self.prompt_pieces(shape), self.tokenizer.name_or_path
        if SLOT.join(pieces) == self.template([turn(shape)]):
            raise ConfigError(f"The chat template of {folder} ignores add_generation_prompt; copy it anew.")
        ids = [self.tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces]
        if sum(piece.count(self.image_id) for piece in ids) != shape.count(True):
            raise ConfigError(f"The chat template of {folder} does not write one image token an image; copy it anew.")
        return ids

    def _text_ids(self, text: str) -> list[int]:
        """A text as tokens, none of them an added one: `split_special_tokens` lets through those that are not special,
        such as <think>."""
        backend = self.tokenizer.backend_tokenizer
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]

    def image_size(self, path: Path) -> tuple[int, int]:
        """(width, height) of an image; it is decoded once."""
        if path not in self.sizes:
            self.sizes[path] = load_image(path).size
        return self.sizes[path]

    def grid(self, size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
        """Visual tokens (rows, columns) of an image of `size` (width, height), by the processor's own resize rule."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        width, height = size
        floor = min(self.min_pixels, max_pixels)
        tall, wide = smart_resize(height, width, factor=self.factor, min_pixels=floor, max_pixels=max_pixels)
        return tall // self.factor, wide // self.factor

    def grids(self, sample: Sample) -> list[tuple[int, int]]:
        """Visual tokens (rows, columns) of each image of a sample."""
        return [self.grid(self.image_size(path), sample.max_pixels) for path in sample.row.images]

    def parts(self, row: Row) -> list[str | Path]:
        """The user turn of a row, with this encoder's drop."""
        return build_prompt(row, with_text=not self.textless)

    def encode(self, row: Row, with_answer: bool = True) -> Sample:
        """The row as tokens, images scaled so that the prompt fits.

        Raises:
            PromptError: the row cannot fit into max_length (the message says by how much), or an image is too long.
        """
        ids, answer = self.tokens(row)
        room = self.max_length - (len(ids) - len(row.images)) - len(answer)
        limit, images = self._fit(row, room)
        images_left = iter(images)
        full = []
        for token in ids:
            full += next(images_left) if token == self.image_id else [token]
        return Sample(row, tuple(full + answer if with_answer else full), len(full), limit, sum(map(len, images)))

    def tokens(self, row: Row) -> tuple[list[int], list[int]]:
        """The prompt of a row, one token an image, and its answer with what ends it."""
        parts = self.parts(row)
        frame = self.frame(tuple(isinstance(part, Path) for part in parts))
        ids, texts = list(frame[0]), iter(frame[1:])
        for part in parts:
            if not isinstance(part, Path):
                ids += self.text_ids(part) + next(texts)
        return ids, [*self.text_ids(row.answer), self.end_id]

    def image_ids(self, size: tuple[int, int], limit: int) -> list[int]:
        """The tokens of an image of `size` (width, height) that is scaled to `limit` pixels."""
        return [self.image_id] * math.prod(self.grid(size, limit))

    def _fit(self, row: Row, room: int) -> tuple[int, list[list[int]]]:
        """The pixel limit at which the row's images fill at most `room` tokens, and each image's tokens."""
        sizes = [self.image_size(path) for path in row.images]
        for path, (width, height) in zip(row.images, sizes, strict=True):
            if max(width, height) > MAX_ASPECT * min(width, height):
                reason = f"{path.name} is {width} x {height} pixels: one side is over {MAX_ASPECT} times the other."
                raise PromptError(reason, "Crop or replace the image.")
        limit = self.max_pixels
        images = [self.image_ids(size, limit) for size in sizes]
        if sizes and sum(map(len, images)) > room:
            limit = max(room // len(sizes), 0) * self.factor**2
            if limit >= self.min_pixels:
                images = [self.image_ids(size, limit) for size in sizes]
        if (count := sum(map(len, images))) > room:
            text = self.max_length - room
            raise PromptError(
                f"{text} text tokens and {count} image tokens do not fit into training.max_length = "
                f"{self.max_length}, even with images scaled down to model.min_pixels = {self.min_pixels}.",
                "Raise training.max_length, lower model.min_pixels or shorten the text.",
            )
        return limit, images

    def _picture(self, path: Path) -> Image.Image:
        return Image.new("RGB", self.image_size(path), (128, 128, 128)) if self.blank else load_image(path)

    def _pixels(self, path: Path, max_pixels: int):
        """(patches, patch values) and the patch grid (1, rows, columns) of one image."""
        size = {"shortest_edge": min(self.min_pixels, max_pixels), "longest_edge": max_pixels}
        out = self.processor.image_processor(images=[self._picture(path)], size=size, return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]

    def collate(self, samples: list[Sample], pad_left: bool = False, with_pixels: bool = True) -> dict:
        """One batch, padded on the right; on the left for generating.

        Args:
            with_pixels: False leaves out pixel_values, for a model that is given vision features.

        Returns:
            input_ids, attention_mask, mm_token_type_ids, labels: (samples, longest) integers; labels are -100 except
            on answer tokens; pixel_values (patches, values); image_grid_thw (images, 3). The last two are left out
            where no sample has an image.
        """
        import torch

        longest = max(len(sample.input_ids) for sample in samples)
        ids = torch.full((len(samples), longest), self.pad_id)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORED)
        for index, sample in enumerate(samples):
            tokens = torch.tensor(sample.input_ids)
            shift = longest - len(tokens) if pad_left else 0
            ids[index, shift : shift + len(tokens)] = tokens
            mask[index, shift : shift + len(tokens)] = 1
            labels[index, shift + sample.answer_start : shift + len(tokens)] = tokens[sample.answer_start :]
        sides = [grid for sample in samples for grid in self.grids(sample)]
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": ((ids == self.image_id) & (mask == 1)).int(),
            "labels": labels,
        }
        if sides:
            grid = [[1, self.merge * rows, self.merge * columns] for rows, columns in sides]
            batch["image_grid_thw"] = torch.tensor(grid)
        if sides and with_pixels:
            batch |= self.image_inputs([(path, sample.max_pixels) for sample in samples for path in sample.row.images])
        return batch

    def image_inputs(self, images: list[tuple[Path, int]]) -> dict:
        """What the model is given of images and the pixel limits they are scaled to: pixel_values (patches, values) and
        image_grid_thw (images, 3)."""
        import torch

        values, grids = zip(*(self.pixels(*image) for image in images), strict=True)
        return {"pixel_values": torch.cat(values), "image_grid_thw": torch.cat(grids)}


def turn(shape: tuple[bool, ...], role: str = "user") -> dict:
    """A turn of a conversation: an image where `shape` is True, else the place of a text."""
    content = [{"type": "image"} if image else {"type": "text", "text": SLOT} for image in shape]
    return {"role": role, "content": content}


def describe_lengths(samples: list[Sample], encoder: Encoder) -> list[str]:
    """Plain lines about token lengths: the longest prompt, and which rows had their images scaled down."""
    longest = max(samples, key=lambda sample: len(sample.input_ids))
    answers = sum(len(sample.input_ids) - sample.answer_start for sample in samples)
    lines = [
        f"{len(samples):,} rows of at most {len(longest.input_ids)} tokens ({longest.row.task}), "
        f"{answers / len(samples):.1f} answer tokens a row; max_length {encoder.max_length}"
    ]
    scaled = Counter(sample.row.task for sample in samples if sample.max_pixels < encoder.max_pixels)
    for task, count in sorted(scaled.items()):
        lines.append(f"{count:,} {task} rows have their images scaled down to fit max_length {encoder.max_length}")
    return lines
