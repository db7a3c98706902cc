"""A process's share of an update as batches for the model: packed or padded, with vision features or pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmrev_kit.config.sections import Config
from mmrev_kit.data.prompts import IGNORED, Encoder, Sample
from mmrev_kit.model.features import Features
from mmrev_kit.model.micro_batch import MicroBatch
from mmrev_kit.model.packing import (
    Group,
    Layout,
    arrange,
    attention_mask,
    attention_scale,
    filled_length,
    make_groups,
    micro_batches,
    pack,
    question_groups,
    share_out,
)
from mmrev_kit.model.plain import core_model, takes_fast_path, text_config
from mmrev_kit.model.qwen3vl import as_model_input, takes_features

CPU_TOKENS = 2048  # tokens of a micro-batch where memory is no limit
GPU_TOKENS = 4096  # with checkpointing, about 5 GiB of the 32B's activations
GPU_MULTIPLE = 8  # sequences on a GPU are filled up to a multiple of this
MASKED = ("sdpa", "eager")  # attention implementations that take a mask of any form


@dataclass
class Batch:
    """What one micro-batch needs.

    Attributes:
        inputs: keyword arguments of the model, on its device.
        predictor: which of the wanted logits predicts each answer token; None: each its own.
        target: the answer tokens.
        owner: whose they are; on the CPU.
        rows, tokens: samples in it, tokens computed for them (padding included).
        samples: those samples, in the order that `owner` counts; empty for a batch made from labels alone.
    """

    inputs: dict
    predictor: object
    target: object
    owner: object
    rows: int
    tokens: int
    samples: tuple[Sample, ...] = ()


def obstacle(model) -> str | None:
    """Why rows cannot be packed and vision features not be given to this model, or None."""
    if not takes_fast_path(model):
        return f"{core_model(model).config.model_type} has no module of its own and takes the plain path"
    if not takes_features(model):
        return "the model takes no precomputed vision features (mm_encoder_outputs)"
    name = text_config(model)._attn_implementation
    if name not in MASKED:
        return f"attention implementation {name} takes no mask of four dimensions"
    return None


def micro_tokens(config: Config, device) -> int:
    """Tokens of one micro-batch: as configured; else 2,048 on a CPU, and on a GPU 4,096 with gradient checkpointing and
    1,024 without, twice as many on a card of 60 GiB or more."""
    if config.memory.micro_tokens is not None:
        return config.memory.micro_tokens
    if device.type != "cuda":
        return CPU_TOKENS
    large = torch.cuda.get_device_properties(device).total_memory >= 60 * 2**30
    return GPU_TOKENS * (2 if large else 1) // (1 if config.memory.gradient_checkpointing else 4)


def make_layout(config: Config, model, device) -> Layout:
    """How this process runs its share; packing needs a model that it works with."""
    limit = micro_tokens(config, device)
    if obstacle(model):
        return Layout("none", limit)
    scale, multiple = attention_scale(text_config(model)), GPU_MULTIPLE if device.type == "cuda" else 1
    return Layout(config.training.packing, limit, scale, multiple)


@dataclass
class Batcher:
    """Makes the batches of one process.

    Attributes:
        features: of the run's images; None: pixels are given to the model, and it goes through the tower again.
        additive: eager attention adds its mask; a boolean one would be added as 0 and 1.
    """

    layout: Layout
    encoder: Encoder
    features: Features | None
    device: object
    additive: bool = False

    def batches(self, samples: list[Sample], process: int = 0, processes: int = 1):
        """Yield `process`'s share of the samples, batch by batch; every process computes the same shares.

        Every sample is in exactly one batch of one process.
        """
        yield from self.laid_out(shares(samples, self.layout.packing, self.encoder.image_id, processes)[process])

    def laid_out(self, share: list):
        """Yield a process's share, from `shares` or `question_shares`, batch by batch."""
        make = self.plain if self.layout.packing == "none" else self.packed
        for micro_batch in lay_out(share, self.layout):
            yield make(micro_batch.content)

    def images(self, images: list[tuple[Path, int]]) -> dict:
        """What the model is given of these images, in the order of their tokens: features, or pixels without them;
        nothing where there are none."""
        if not images:
            return {}
        if self.features is not None:
            return as_model_input([self.features.get(image) for image in images], self.device)
        return {name: value.to(self.device) for name, value in self.encoder.image_inputs(images).items()}

    def plain(self, samples: list[Sample]) -> Batch:
        """Rows side by side, padded; mask and positions are the library's own."""
        batch = from_labels(self.encoder.collate(samples, with_pixels=self.features is None), self.device)
        if self.features is not None:
            batch.inputs |= self.images([(path, sample.max_pixels) for sample in samples for path in sample.row.images])
        batch.samples = tuple(samples)
        return batch

    def packed(self, rows: list[list[Group]]) -> Batch:
        """Packed sequences of these groups of rows."""
        arrays = pack(rows, self.encoder, self.layout.multiple)

        def tensor(array):
            return torch.from_numpy(array).to(self.device, non_blocking=True)

        mask = attention_mask(tensor(arrays.group), tensor(arrays.segment))
        if self.additive:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float16).min)
        inputs = {
            "input_ids": tensor(arrays.input_ids),
            "attention_mask": mask,
            "position_ids": tensor(arrays.positions),
            "logits_to_keep": tensor(arrays.wanted),
        }
        inputs |= self.images(arrays.images)
        return Batch(
            inputs, tensor(arrays.predictor), tensor(arrays.target), torch.from_numpy(arrays.owner),
            rows=len(arrays.samples), tokens=arrays.input_ids.size, samples=tuple(arrays.samples),
        )  # fmt: skip


def shares(samples: list[Sample], packing: str, image_id: int, processes: int) -> list[list]:
    """Each process's share of an update: its samples where nothing is packed, else its groups."""
    if packing == "none":
        return [samples[process::processes] for process in range(processes)]
    return share_out(make_groups(samples, packing, image_id), processes)


def question_shares(samples: list[Sample], packing: str, image_id: int, processes: int) -> list[list]:
    """`shares` of prompts that come with several answers: what they have in common is computed once."""
    if packing == "none":
        return shares(samples, packing, image_id, processes)
    return share_out(question_groups(samples, image_id), processes)


def lay_out(share: list, layout: Layout) -> Iterator[MicroBatch]:
    """A process's share, from `shares`, as the micro-batches that it runs one after the other, each laid out when it is
    asked for."""
    if layout.packing == "none":
        for part in padded(share, layout.micro_tokens):
            lengths = [len(sample.input_ids) for sample in part]
            visual, masked = sum(sample.image_tokens for sample in part), len(set(lengths)) > 1
            yield MicroBatch(len(part), max(lengths), answer_tokens(part), visual, masked, part)
        return
    for groups in micro_batches(share, layout.micro_tokens):
        rows = arrange(groups, layout.attention_scale, layout.multiple)
        logits = sum(answer_tokens(group.samples) for group in groups)
        visual = sum(group.samples[0].image_tokens for group in groups)  # an image that rows share is there once
        yield MicroBatch(len(rows), filled_length(rows, layout.multiple), logits, visual, content=rows)


def answer_tokens(samples: Sequence[Sample]) -> int:
    """Tokens that carry loss, each predicted at one position."""
    return sum(len(sample.input_ids) - sample.answer_start for sample in samples)


def padded(samples: list[Sample], limit: int) -> list[list[Sample]]:
    """Samples in runs whose padded batch has at most `limit` tokens, unless one alone has more."""
    runs: list[list[Sample]] = []
    for sample in samples:
        longest = max(len(s.input_ids) for s in [sample, *(runs[-1] if runs else [])])
        if runs and longest * (len(runs[-1]) + 1) <= limit:
            runs[-1].append(sample)
        else:
            runs.append([sample])
    return runs


def from_labels(inputs: dict, device) -> Batch:
    """A batch from `Encoder.collate`: logits where an answer token is predicted, nowhere else."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")[:, 1:]  # position i predicts token i + 1
    kept = labels != IGNORED
    inputs["logits_to_keep"] = torch.nn.functional.pad(kept, (0, 1))
    inputs = {name: value.to(device) for name, value in inputs.items()}
    owner = kept.nonzero()[:, 0]
    return Batch(inputs, None, labels[kept].to(device), owner, len(labels), inputs["input_ids"].numel())
