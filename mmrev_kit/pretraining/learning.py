"""What a step computes: its batch, the answers' logits, the loss, the optimizers and the rate."""

from collections import Counter
from functools import partial

import numpy
import torch
from torch.nn.functional import cross_entropy, embedding, interpolate, pad
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from mmrev_kit.data.pools import Subject
from mmrev_kit.data.prompts import Encoder
from mmrev_kit.data.tasks import Row
from mmrev_kit.model.packing import PADDING, attention_mask, make_groups, micro_batches, pack
from mmrev_kit.model.vision import equal_sized
from mmrev_kit.pretraining.pictures import SIZE, is_face
from mmrev_kit.pretraining.questions import mix_of, step_rows
from mmrev_kit.pretraining.recipe import Recipe

OTHER_SIZES = ((32, 32), (48, 48), (96, 96), (128, 128), (64, 96), (96, 64))  # width, height
OTHER_EVERY = 24  # every so many steps one of another picture size, with a quarter of the prompts
LENGTH = 256  # tokens of a sequence, if no row is longer
# Of sequences, answer tokens and pictures: filled up to a multiple, so that most steps have one shape; see `Step`.
FILLED = 16, 512, 128
STOP_WEIGHT = 0.1  # of the end token after a letter or a verdict, which is learnt at once


def make_batch(
    rows: list[Row], parts: dict[str, float], size: tuple[int, int], encoder: Encoder, multiples=FILLED
) -> dict:
    """Rows packed into sequences, see `model.packing`, as small numpy arrays.

    Args:
        parts: each kind's part of the loss, by the rows' source. The rows of a kind count alike, and so do the answer
            tokens of a row, but see `STOP_WEIGHT`.
        size: width and height, in pixels, at which the pictures are shown.
        multiples: see `FILLED`.

    Returns:
        input_ids, group, segment (sequences, length), positions (3, sequences, length): as in `packing.Packed`;
        seen (sequences, length): which visual token stands there, from 1 on, picture after picture; 0: none;
        pictures (different pictures,): their numbers; predictor (answer tokens,): the place, among all tokens, that
        predicts each; target, owner (answer tokens,): as in `packing.Packed`; weight (answer tokens,): they add up to
        1, those that fill up have none; kinds (rows,): the sources in the order of `owner`; size.
    """
    sequences, answers, shown_at_once = multiples
    encoder.sizes = dict.fromkeys((path for row in rows for path in row.images), size)
    groups = make_groups([encoder.encode(row) for row in rows], "shared_prefix", encoder.image_id)
    packed = pack(micro_batches(groups, LENGTH - groups[0].preamble), encoder, LENGTH)
    shown = numpy.array([int(path.stem) for path, _ in packed.images], dtype=numpy.int64)
    pictures, slots = numpy.unique(shown, return_inverse=True)
    seen = (packed.input_ids == encoder.image_id).astype(numpy.int32)
    tokens = seen.sum() // max(1, len(slots))
    seen[seen > 0] = (slots[:, None] * tokens + numpy.arange(1, tokens + 1)).ravel()
    owner = packed.owner
    ends = numpy.append(owner[1:] != owner[:-1], True)
    share = numpy.where(ends & (numpy.bincount(owner)[owner] == 2), STOP_WEIGHT, 1.0)
    kinds = [sample.row.source for sample in packed.samples]
    counts = Counter(kinds)
    share *= numpy.array([parts[kind] / counts[kind] for kind in kinds])[owner] / numpy.bincount(owner, share)[owner]
    return {
        "input_ids": _filled(packed.input_ids.astype(numpy.int16), sequences),
        "positions": _filled(packed.positions.astype(numpy.int16), sequences, axis=1),
        "group": _filled(packed.group.astype(numpy.int16), sequences, PADDING),
        "segment": _filled(packed.segment.astype(numpy.int16), sequences, PADDING),
        "seen": _filled(seen, sequences),
        "pictures": _filled(pictures, shown_at_once),
        "predictor": _filled(numpy.flatnonzero(packed.wanted)[packed.predictor], answers),
        "target": _filled(packed.target, answers),
        "owner": _filled(owner, answers),
        "weight": _filled((share / share.sum()).astype(numpy.float32), answers),
        "kinds": kinds,
        "size": size,
    }


def _filled(values: numpy.ndarray, multiple: int, value: int = 0, axis: int = 0) -> numpy.ndarray:
    more = [(0, -values.shape[axis] % multiple if number == axis else 0) for number in range(values.ndim)]
    return numpy.pad(values, more, constant_values=value)


class Lessons:
    """The batches of all steps, by number: a data set for a `DataLoader`, whose workers ask and pack.

    Args:
        subjects: what is pictured, see `pictures.make_subjects`.
    """

    def __init__(self, recipe: Recipe, subjects: list[Subject], encoder: Encoder):
        self.recipe, self.encoder = recipe, encoder
        self.faces = [subject for subject in subjects if is_face(subject)]
        self.icons = [subject for subject in subjects if not is_face(subject)]

    def rows(self, step: int) -> tuple[list[Row], tuple[int, int]]:
        """The rows of a step, and the size at which it shows its pictures."""
        turn, rest = divmod(step + 1, OTHER_EVERY)
        size = (SIZE, SIZE) if rest else OTHER_SIZES[turn % len(OTHER_SIZES)]
        prompts = self.recipe.prompts if rest else self.recipe.prompts // 4
        return step_rows(self.recipe, self.faces, self.icons, step, prompts), size

    def __getitem__(self, step: int) -> dict:
        rows, size = self.rows(step)
        mix = mix_of(self.recipe.orders).items()
        return make_batch(rows, {kind: part for kind, (_, part) in mix}, size, self.encoder)


def to_patches(pixels, size: tuple[int, int], patch: int, merge: int):
    """Pictures at a size as the processor's patches.

    Args:
        pixels: (pictures, height, width, 3) bytes; resized where they are not of `size` = width, height.

    Returns:
        (pictures, patches, values), in [-1, 1].
    """
    width, height = size
    values = pixels.permute(0, 3, 1, 2).float()
    if values.shape[2:] != (height, width):
        values = interpolate(values, (height, width), mode="bilinear", antialias=True)
    rows, columns = height // (patch * merge), width // (patch * merge)
    values = (values / 127.5 - 1).view(-1, 3, rows, merge, patch, columns, merge, patch)
    values = values.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(len(pixels), rows * columns * merge**2, 3, 1, patch**2)
    return values.expand(-1, -1, -1, 2, -1).flatten(2)  # a picture is two equal frames


def answer_logits(model, batch: dict, pixels):
    """The logits at every answer token, (answer tokens, vocabulary): each different picture is seen once.

    Args:
        model: a `Qwen3VLForConditionalGeneration`.
        batch: of `make_batch`, its arrays as tensors on the model's device.
        pixels: (all pictures, height, width, 3) bytes, on the model's device.
    """
    text, visual = model.model.language_model, model.model.visual
    hidden, places, deepstack = text.embed_tokens(batch["input_ids"].long()), batch["seen"].long(), []

    def in_place(merged):
        """The vision features where their tokens stand, zeros elsewhere."""
        return embedding(places, pad(merged.flatten(0, 1), (0, 0, 1, 0)), padding_idx=0)

    if len(batch["pictures"]):
        width, height = batch["size"]
        patches = to_patches(pixels[batch["pictures"]], batch["size"], visual.patch_size, visual.spatial_merge_size)
        _, merged, deepstack = equal_sized(visual, patches, height // visual.patch_size, width // visual.patch_size)
        hidden = hidden.where(places[..., None] == 0, in_place(merged).to(hidden.dtype))
    angles = text.rotary_emb(hidden, batch["positions"].long())
    mask = attention_mask(batch["group"], batch["segment"])
    for number, layer in enumerate(text.layers):
        hidden = layer(hidden, attention_mask=mask, position_embeddings=angles)
        if number < len(deepstack):
            hidden = hidden + in_place(deepstack[number])
    return model.lm_head(text.norm(hidden.flatten(0, 1).index_select(0, batch["predictor"])))


def to_device(batch: dict, device) -> dict:
    """A batch with its tensors on the device."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def right_answers(logits, batch: dict):
    """(rows,) 1.0 where all tokens of an answer are the likeliest after those before them, which is where greedy
    decoding writes it."""
    wrong = ((logits.argmax(-1) != batch["target"]) & (batch["weight"] > 0)).float()
    return (torch.zeros(len(batch["kinds"]), device=wrong.device).index_add_(0, batch["owner"], wrong) == 0).float()


class Muon(torch.optim.Muon):
    """torch's Muon, with the matrices of one shape taken together: the same step in a tenth of the GPU's launches."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple]] = {}
            for part in group["params"]:
                momentum = self.state[part].setdefault("momentum_buffer", torch.zeros_like(part))
                alike.setdefault(part.shape, []).append((part, part.grad, momentum))
            settings = {name: group[name] for name in ("ns_coefficients", "ns_steps", "eps")}
            one = partial(_zeropower_via_newtonschulz, **settings)
            for shape, found in alike.items():
                parts, grads, momenta = map(list, zip(*found, strict=True))
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                steps = torch.vmap(one)(torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"])))
                torch._foreach_mul_(parts, 1 - group["lr"] * group["weight_decay"])
                steps = steps.to(parts[0].dtype) * _adjust_lr(group["lr"], group["adjust_lr_fn"], shape)
                torch._foreach_sub_(parts, list(steps.unbind()))


def make_optimizers(model, weight_decay: float, muon: bool = True) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between layers (Jordan et al. 2024; update sizes as in Liu et al. 2025, "Muon is scalable
    for LLM training"), AdamW for the rest; without `muon` AdamW for all."""
    named = list(model.named_parameters())
    matrices = {name: part for name, part in named if muon and part.ndim == 2 and "embed" not in name}
    tables = [part for name, part in named if part.ndim > 1 and name not in matrices]
    vectors = [part for _, part in named if part.ndim == 1]
    groups = [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    device = named[0][1].device
    rates = torch.zeros(2, device=device)  # a tensor each, which a recorded step reads anew
    adamw = torch.optim.AdamW(groups, rates[0], (0.9, 0.98), capturable=device.type == "cuda")
    if not muon:
        return [adamw]
    return [adamw, Muon(matrices.values(), rates[1], weight_decay, adjust_lr_fn="match_rms_adamw")]


def rate_at(step: int, recipe: Recipe) -> float:
    """The learning rate of a step: warm-up, constant, and at the end a straight fall to zero."""
    falling = (recipe.steps - step) / (recipe.decay_share * recipe.steps)
    return recipe.rate * min(1.0, (step + 1) / recipe.warmup, falling)


class Step:
    """Takes steps: loss, gradient clipped to norm 1, both optimizers; in bf16 on a GPU.

    There a step whose shape came before is recorded as a CUDA graph and replayed from then on, in half the time: these
    models are so small that the GPU would wait for the host. To be called on one stream, which is not the default one.

    Args:
        pixels: (all pictures, height, width, 3) bytes, on the model's device.
    """

    def __init__(self, model, optimizers: list[torch.optim.Optimizer], pixels):
        self.model, self.optimizers, self.pixels = model, optimizers, pixels
        self.recorded: dict[tuple, tuple | None] = {}
        self.pool = torch.cuda.graph_pool_handle() if pixels.is_cuda else None

    def __call__(self, batch: dict, rate: float):
        """One step at a rate. Returns the loss and `right_answers`, which the next step may overwrite."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"].fill_(rate)
        tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
        shape = *batch["size"], *(value.shape for value in tensors.values())
        if self.pool is None or shape not in self.recorded:
            self.recorded[shape] = None
            return self._compute(to_device(batch, self.pixels.device))
        if self.recorded[shape] is None:
            fixed, graph = to_device(batch, self.pixels.device), torch.cuda.CUDAGraph()
            stream = torch.cuda.current_stream()
            with torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local"):  # another one pins
                found = self._compute(fixed)
            self.recorded[shape] = graph, fixed, found
        graph, fixed, found = self.recorded[shape]
        for name, value in tensors.items():
            fixed[name].copy_(value, non_blocking=True)
        graph.replay()
        return found

    def _compute(self, batch: dict):
        kind = self.pixels.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=False):
            logits = answer_logits(self.model, batch, self.pixels)
        loss = (cross_entropy(logits.float(), batch["target"], reduction="none") * batch["weight"]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach(), right_answers(logits.detach(), batch)
