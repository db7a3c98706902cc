"""From a row to tokens for any model whose processor has a chat template: every row is what that processor makes of it.

The chat template writes the whole conversation, question and answer; what it writes up to where an answer begins is the
prompt, the answer carries the loss. Tokens, masks and pixels come from the processor's own call, one row at a time.
"""

import re
from functools import cache, lru_cache
from pathlib import Path

from PIL import Image

from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.prompts import IGNORED, SLOT, Encoder, PromptError, Sample, turn
from mmrev_kit.data.tasks import Row

TILING = ("do_image_splitting", "crop_to_patches", "do_pan_and_scan")  # processors' words for one picture as several


class PlainEncoder(Encoder):
    """`Encoder` for a processor of any family.

    Where the processor scales pictures to a number of pixels, as Qwen's do, `min_pixels` and `max_pixels` are its
    limits. Where it shows every picture at a size of its own, a picture is one tile, which must lie within the limits.
    """

    def __init__(self, processor, min_pixels: int, max_pixels: int, max_length: int, drop: str = "none"):
        super().__init__(processor, min_pixels, max_pixels, max_length, drop)
        images = processor.image_processor
        self.scales = self.merge > 1 and {"shortest_edge", "longest_edge"} <= set(dict(images.size))
        self.whole = {name: False for name in TILING if hasattr(images, name)}
        added = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, added)))
        self.image_ids, self.picture = cache(self._image_ids), lru_cache(maxsize=256)(self._picture)
        self.end_id = self._end_id()
        self.end = self.tokenizer.convert_ids_to_tokens(self.end_id)
        begins = self.tokenizer.bos_token is not None and self.frame((True,))[0][0].startswith(self.tokenizer.bos_token)
        self.special = {"add_special_tokens": not begins}  # as the library tells whether a template has written them

    def _end_id(self) -> int:
        """The special token that the chat template writes after an answer, else that which ends what is generated."""
        written = self.template([turn((True,)), turn((False,), "assistant")])
        after = self.tokenizer(written.rpartition(SLOT)[2], add_special_tokens=False).input_ids
        if after and after[0] in self.tokenizer.get_added_vocab().values():
            return after[0]
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(
                f"The chat template of {self.tokenizer.name_or_path} ends an answer with no special token."
            )
        return self.tokenizer.eos_token_id

    def _frame(self, shape: tuple[bool, ...]) -> tuple[list[str], str]:
        """The pieces of the prompt between which the turn's texts go, and the space between prompt and answer.

        Raises:
            ConfigError: the template writes texts and images in another order, or another prompt where an answer is
                still to come than where there is one.
        """
        folder, pieces = self.tokenizer.name_or_path, self.prompt_pieces(shape)
        prompt, image = SLOT.join(pieces), self.processor.image_token
        if [found == image for found in re.findall(f"{SLOT}|{re.escape(image)}", prompt)] != list(shape):
            raise ConfigError(f"The chat template of {folder} does not keep the order of texts and images.")
        whole = self.template([turn(shape), turn((False,), "assistant")]).rpartition(SLOT)[0]
        if not whole.startswith(prompt):
            raise ConfigError(
                f"The chat template of {folder} writes a prompt that is not how the same conversation begins once it "
                "is answered: where the answer begins is not known."
            )
        if (between := whole[len(prompt) :]).strip():  # such as an empty thought, which the answer comes after
            pieces, between = whole.split(SLOT), ""
        return pieces, between

    def texts(self, row: Row) -> tuple[str, str]:
        """The prompt of a row as text, and the prompt with its answer and the token that ends it.

        Raises:
            PromptError: a text holds what the tokenizer would read as one of its added tokens.
        """
        parts = self.parts(row)
        texts = [part for part in parts if not isinstance(part, Path)]
        for text in (*texts, row.answer):
            if found := self.added.search(text):
                raise PromptError(f"{text!r} holds {found[0]}, which is a token of this model.", "Change the text.")
        pieces, between = self.frame(tuple(isinstance(part, Path) for part in parts))
        prompt = "".join(piece + text for piece, text in zip(pieces, [*texts, ""], strict=True))
        return prompt, prompt + between + row.answer + self.end

    def _text_ids(self, text: str) -> list[int]:
        """A text as the tokens of an answer."""
        return self.tokenizer(self.frame((True,))[1] + text, add_special_tokens=False).input_ids

    def tokens(self, row: Row) -> tuple[list[int], list[int]]:
        """As in `Encoder`.

        Raises:
            ConfigError: the last token of the prompt is another one where an answer follows.
            PromptError: see `texts`.
        """
        prompt, whole = (self.tokenizer(text, **self.special).input_ids for text in self.texts(row))
        if whole[: len(prompt)] != prompt:
            raise ConfigError(
                f"The tokens of prompt and answer run into one another with {self.tokenizer.name_or_path}, first in "
                f"{row.where}: its chat template has to end a prompt where a token ends."
            )
        return prompt, whole[len(prompt) :]

    def options(self, limit: int) -> dict:
        """How the processor is to treat pictures, as arguments of its call."""
        size = {"size": {"shortest_edge": min(self.min_pixels, limit), "longest_edge": limit}}
        return {"images_kwargs": size if self.scales else self.whole, "return_tensors": "pt"}

    def _image_ids(self, size: tuple[int, int], limit: int) -> list[int]:
        """The tokens that the processor writes for an image.

        Raises:
            ConfigError: it shows the image at a size of its own, which is outside model.min_pixels and max_pixels.
        """
        blank, text = [[Image.new("RGB", size)]], {"add_special_tokens": False}
        found = self.processor(text=[self.processor.image_token], images=blank, text_kwargs=text, **self.options(limit))
        pixels = found["pixel_values"].numel() // 3  # of three colours
        if not self.scales and not self.min_pixels <= pixels <= self.max_pixels:
            key = "max_pixels" if pixels > self.max_pixels else "min_pixels"
            raise ConfigError(
                f"model.{key} = {getattr(self, key)}: {type(self.processor).__name__} shows a picture of {size[0]} x "
                f"{size[1]} with {pixels} pixels. Set model.{key}={pixels}."
            )
        return found["input_ids"][0].tolist()

    def read(self, sample: Sample) -> dict:
        """What the processor makes of a sample: tensors, those of tokens of shape (1, tokens).

        Raises:
            ConfigError: it makes other tokens than `encode` did.
        """
        text = self.texts(sample.row)[len(sample.input_ids) > sample.answer_start]
        images = [[self.picture(path) for path in sample.row.images]] if sample.row.images else None
        found = self.processor(text=[text], images=images, text_kwargs=self.special, **self.options(sample.max_pixels))
        if tuple(found["input_ids"][0].tolist()) != sample.input_ids:
            kind = type(self.processor).__name__
            raise ConfigError(f"{kind} reads {sample.row.where} otherwise than its chat template and tokenizer do.")
        return dict(found)

    def collate(self, samples: list[Sample], pad_left: bool = False, with_pixels: bool = True) -> dict:
        """One batch, padded on the right; on the left for generating.

        Returns:
            What the processor names, such as input_ids and attention_mask (samples, longest) and, where a row has a
            picture, pixel_values; and labels, as in `Encoder.collate`.
        """
        import torch

        longest = max(len(sample.input_ids) for sample in samples)

        def padded(tensor, value: int):
            more = longest - tensor.shape[1]
            return torch.nn.functional.pad(tensor, (more, 0) if pad_left else (0, more), value=value)

        rows = []
        for sample in samples:
            found = self.read(sample)
            ids, values = found["input_ids"], {"input_ids": self.pad_id, "labels": IGNORED}
            found["labels"] = torch.where(torch.arange(ids.shape[1]) < sample.answer_start, IGNORED, ids)
            per_token = [name for name, tensor in found.items() if tensor.shape == ids.shape]
            rows.append(found | {name: padded(found[name], values.get(name, 0)) for name in per_token})
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: joined([row[name] for row in rows if name in row]) for name in names}

    def image_inputs(self, images: list[tuple[Path, int]]) -> dict:
        text, rows = [self.processor.image_token], []
        for path, limit in images:
            found = self.processor(text=text, images=[[self.picture(path)]], **self.options(limit))
            rows.append({name: value for name, value in found.items() if value.shape != found["input_ids"].shape})
        return {name: joined([row[name] for row in rows]) for name in rows[0]}


def joined(tensors: list):
    """Tensors of several rows, one after the other; where one row has more pictures along an axis than another, zeros
    fill up, as processors do it by themselves."""
    import torch

    longest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        more = [room - size for room, size in zip(longest, tensor.shape[1:], strict=True)]
        filled.append(torch.nn.functional.pad(tensor, [side for room in reversed(more) for side in (0, room)]))
    return torch.cat(filled)
