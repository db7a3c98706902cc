"""Rows packed into sequences with little padding; rows that begin with the same image share it. Pure layout.

A `Group` is one prefix and its suffixes: rows with the same image up to the last token that all of them share, and
then each row's own rest. A row that shares nothing is a group of its own. Groups stand one after the other in a
sequence, after its preamble: the tokens with which all prompts begin. A boolean mask lets a token see the preamble,
its own group's prefix and its own suffix up to itself, and nothing else; every suffix keeps the positions that it has
in its row; the prefix's last token predicts the first token of every suffix. So each row's loss is the one that it has
alone, whatever stands beside it, and the gradient of a batch is the sum over its rows.

What differs is dropout: the adapter draws one mask for a token, so that rows which share a prefix or the preamble
share its mask. The mean over masks is the same, the draw is another one (as it is for another micro-batch or another
number of processes).

`grouping: batch` shares prefixes among the rows that an update holds anyway: an update's gradient is unchanged.
`grouping: epoch` (`gather_images`) orders the epoch so that the rows of one image come in the same update: faster,
and another trajectory: an update sees fewer images, each with more of its connectors, while every row still comes
once an epoch and every source keeps its share of each update.
"""

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrev_kit.data.prompts import Encoder, Sample
from mmrev_kit.model.qwen3vl import row_positions

MASK_COST = 2.0  # a masked attention product (SDPA, dense mask) against other work of as many operations
MAX_PADDING = 0.1  # padding per token at most; with none, the embedded model takes a third longer on a CPU
UNEVEN = 0.005  # by which the fullest process may have more than the mean: nothing is looked for below
PADDING, PREAMBLE = -1, -2  # instead of a group's number


@dataclass(frozen=True)
class Layout:
    """How a process runs its share of an update.

    Attributes:
        packing: none (padded rows through the library's own path), block or shared_prefix.
        micro_tokens: tokens of one forward pass at most, unless one row alone has more.
        attention_scale: length of a sequence at which attention costs as much as everything else.
        multiple: sequences are filled up to a multiple of this.
    """

    packing: str
    micro_tokens: int
    attention_scale: float = 2000.0
    multiple: int = 1


def attention_scale(text_config) -> float:
    """The sequence length at which masked attention costs as much as a decoder layer's matrix products.

    A layer takes 2 operations per weight and token; attention takes 4 x length x heads x head_dim per token, and a
    dense mask is slower than a matrix product by `MASK_COST`. About 14,900 for the 32B, 770 for the embedded model.
    `text_config` has the sizes of the language model under transformers' names.
    """
    width = text_config.num_attention_heads * text_config.head_dim
    return 2 * layer_weights(text_config) / (4 * width * MASK_COST)


def layer_weights(text_config) -> int:
    """Weights in the matrix products of one decoder layer."""
    heads = 2 * text_config.num_attention_heads + 2 * text_config.num_key_value_heads
    return text_config.hidden_size * (heads * text_config.head_dim + 3 * text_config.intermediate_size)


def computed(sample: Sample) -> int:
    """Tokens of a row that the model is given: its last one predicts nothing, and nothing looks at it."""
    return len(sample.input_ids) - 1


@dataclass(frozen=True)
class Group:
    """Rows that share their first `prefix` tokens; of these, a sequence's groups share the first `preamble`.

    `tokens` are those that are computed for the group, the preamble's not counted.
    """

    samples: tuple[Sample, ...]
    prefix: int
    tokens: int
    preamble: int = 0


def common(samples: Sequence[Sample]) -> int:
    """How many first tokens rows have in common, as far as the shortest prompt goes."""
    low, high = min(s.input_ids for s in samples), max(s.input_ids for s in samples)
    same = next((index for index, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))
    return min(same, *(sample.answer_start for sample in samples))


def make_group(samples: Sequence[Sample], preamble: int = 0) -> Group:
    """The rows as one group, with everything shared that they have in common before their answers."""
    prefix = common(samples) if len(samples) > 1 else preamble
    tokens = prefix - preamble + sum(computed(sample) - prefix for sample in samples)
    return Group(tuple(samples), prefix, tokens, preamble)


def image_key(sample: Sample, image_id: int) -> Hashable | None:
    """What rows must have in common to share a prefix: the image, its size, and all tokens up to its last one.

    None for rows with several images, which share nothing.
    """
    if len(sample.row.images) != 1:
        return None
    end = sample.input_ids.index(image_id) + sample.image_tokens
    return sample.row.images[0], sample.max_pixels, sample.input_ids[:end]


def make_groups(samples: Sequence[Sample], packing: str, image_id: int) -> list[Group]:
    """The rows as groups, in the order of their first rows; only `shared_prefix` puts several rows into one, and lets
    all groups share how their prompts begin: the first tokens of the chat, up to the first image."""
    preamble = 0
    if packing == "shared_prefix" and samples:
        before = min(sample.answer_start for sample in samples) - 1  # what predicts an answer is the group's own
        preamble = min(common(samples), before)
        preamble = next((index for index in range(preamble) if samples[0].input_ids[index] == image_id), preamble)
    found: dict[Hashable, list[Sample]] = {}
    for index, sample in enumerate(samples):
        key = image_key(sample, image_id) if packing == "shared_prefix" else None
        found.setdefault(index if key is None else key, []).append(sample)
    return [make_group(part, preamble) for part in found.values()]


def question_groups(samples: Sequence[Sample], image_id: int) -> list[Group]:
    """Prompts that come with several answers, as groups in the order of their first rows: a prompt with its answers,
    or all prompts of a task that begin with one image, whichever takes fewer tokens."""
    images: dict[Hashable, dict[tuple, list[Sample]]] = {}
    for sample in samples:
        prompt = sample.row.images, sample.max_pixels, sample.input_ids[: sample.answer_start]
        key = image_key(sample, image_id) or prompt
        images.setdefault((sample.row.task, key), {}).setdefault(prompt, []).append(sample)
    found = []
    for prompts in images.values():
        apart = [make_group(rows) for rows in prompts.values()]
        together = make_group([sample for rows in prompts.values() for sample in rows])
        found += [together] if together.tokens < sum(group.tokens for group in apart) else apart
    return found


def fitting(group: Group, limit: int) -> list[Group]:
    """A group, or, where it has more tokens than the limit, its halves with prefixes of their own, and so on."""
    if group.tokens <= limit or len(group.samples) < 2:
        return [group]
    middle = len(group.samples) // 2
    halves = group.samples[:middle], group.samples[middle:]
    return [small for half in halves for small in fitting(make_group(half, group.preamble), limit)]


def balance(groups: Sequence[Group], bins: int) -> list[list[Group]]:
    """Groups dealt to `bins` so that none holds much more than another: longest first, to the emptiest (LPT)."""
    heap = [(0, number) for number in range(bins)]
    dealt: list[list[Group]] = [[] for _ in range(bins)]
    for group in sorted(groups, key=lambda group: -group.tokens):
        held, number = heap[0]
        dealt[number].append(group)
        heapq.heapreplace(heap, (held + group.tokens, number))
    return dealt


def heaviest(dealt: list[list[Group]]) -> int:
    """Tokens of the fullest bin, with its preamble."""
    return max(sum(group.tokens for group in part) + part[0].preamble for part in dealt if part)


def exchanges(mine: list[Group], theirs: list[Group]) -> Iterator[tuple[int, int, int, int, int]]:
    """What a process can give another one: a group, for one of theirs or for none, or the last rows of a group.

    Yields:
        Tokens that the first loses and the other gains, the group's place, its first row given, the place of what is
        taken (-1: nothing is).
    """
    for place, group in enumerate(mine):
        for number, taken in [(-1, 0), *((number, other.tokens) for number, other in enumerate(theirs))]:
            yield group.tokens - taken, group.tokens - taken, place, 0, number
        own = [computed(sample) - group.prefix for sample in group.samples]
        for first in range(1, len(own)):
            given = sum(own[first:])
            yield given, given + group.prefix - group.preamble, place, first, -1


def share_out(groups: list[Group], processes: int) -> list[list[Group]]:
    """Each process's groups, so that the slowest has as little to do as possible; the same on every process.

    A local search from `balance`: what takes most off the fullest process and leaves the other one with less than the
    fullest had, until there is no such exchange, or all are even to `UNEVEN`.
    """
    dealt = balance(groups, processes)
    while True:
        loads = [sum(group.tokens for group in part) for part in dealt]
        full = loads.index(max(loads))
        if loads[full] * processes <= (1 + UNEVEN) * sum(loads):
            return dealt
        after, _, other, place, first, number = min(
            (max(loads[full] - lost, loads[other] + gained), gained, other, place, first, number)
            for other in range(processes)
            if other != full
            for lost, gained, place, first, number in exchanges(dealt[full], dealt[other])
        )
        if after >= loads[full]:
            return dealt
        given = dealt[full].pop(place)
        if first:
            dealt[full].append(make_group(given.samples[:first], given.preamble))
            given = make_group(given.samples[first:], given.preamble)
        if number >= 0:
            dealt[full].append(dealt[other].pop(number))
        dealt[other].append(given)


def micro_batches(groups: list[Group], limit: int) -> list[list[Group]]:
    """Groups dealt to few micro-batches of at most `limit` tokens each; a row that is longer alone goes alone."""
    groups = [small for group in groups for small in fitting(group, limit)]
    fewest = max(1, -(-sum(group.tokens for group in groups) // limit))
    for count in range(fewest, len(groups)):
        dealt = balance(groups, count)
        if heaviest(dealt) <= max(limit, max(group.tokens + group.preamble for group in groups)):
            return dealt
    return [[group] for group in groups]


def arrange(groups: list[Group], scale: float, multiple: int = 1) -> list[list[Group]]:
    """The groups of one micro-batch as sequences: long ones cost attention, many unequal ones cost padding.

    Taken is the number of sequences with the least cost, sequences x length x (1 + length / `scale`), of those that
    keep to `MAX_PADDING`; one sequence has no padding.
    """
    counts = sorted({*range(1, min(len(groups), 12) + 1), *(len(groups) * k // 8 or 1 for k in range(1, 9))})
    tokens = sum(group.tokens for group in groups)

    def cost(rows: list[list[Group]]) -> tuple[bool, float]:
        longest = heaviest(rows)
        length, room = -(-longest // multiple) * multiple, tokens + len(rows) * groups[0].preamble
        return len(rows) * longest > (1 + MAX_PADDING) * room, len(rows) * length * (1 + length / scale)

    return min((balance(groups, count) for count in counts), key=cost)


def filled_length(rows: list[list[Group]], multiple: int) -> int:
    """Tokens of the longest sequence, filled up to a multiple."""
    return -(-heaviest(rows) // multiple) * multiple


@dataclass
class Packed:
    """Sequences ready for the model, as numpy arrays of shape (sequences, length) where nothing else is said.

    Attributes:
        samples: the rows, in the order in which `owner` numbers them.
        images: (path, pixel limit) in the order of the image tokens.
        positions: (3, sequences, length).
        group, segment: which group a token belongs to, and which part of it: 0 the prefix, 1 and on the suffixes;
            both are -1 on padding. The preamble's group is -2, its part 0.
        wanted: where logits are needed.
        predictor, target, owner: (answer tokens,): which of the wanted logits predicts it, the token, whose it is.
    """

    samples: list[Sample]
    images: list[tuple[Path, int]]
    input_ids: Any
    positions: Any
    group: Any
    segment: Any
    wanted: Any
    predictor: Any
    target: Any
    owner: Any


def pack(rows: list[list[Group]], encoder: Encoder, multiple: int = 1) -> Packed:
    """Sequences of groups as arrays."""
    import numpy

    length = filled_length(rows, multiple)
    ids = numpy.full((len(rows), length), encoder.pad_id, dtype=numpy.int64)
    positions = numpy.zeros((3, *ids.shape), dtype=numpy.int64)
    group_of, segment_of = numpy.full_like(ids, PADDING), numpy.full_like(ids, PADDING)
    samples, images, needed, targets, owners = [], [], [], [], []
    for row, groups in enumerate(rows):
        end = preamble = groups[0].preamble
        ids[row, :preamble] = groups[0].samples[0].input_ids[:preamble]
        positions[:, row, :preamble] = numpy.arange(preamble)
        group_of[row, :preamble], segment_of[row, :preamble] = PREAMBLE, 0
        for number, group in enumerate(groups):
            fork = end + group.prefix - preamble  # the prefix is written with the first suffix
            for part, sample in enumerate(group.samples, start=1):
                first = group.prefix if part > 1 else preamble
                begin, end = end, end + computed(sample) - first
                ids[row, begin:end] = sample.input_ids[first:-1]
                placed = row_positions(sample.input_ids, encoder.grids(sample), encoder.image_id)
                positions[:, row, begin:end] = placed[:, first:-1]
                group_of[row, begin:end] = number
                segment_of[row, begin:end] = part
                own = max(begin, fork)  # where the suffix begins
                segment_of[row, begin:own] = 0
                if part == 1:  # the images of a shared prefix, or of a row alone
                    images += [(path, sample.max_pixels) for path in sample.row.images]
                answer = own + sample.answer_start - group.prefix
                needed += [row * length + (index - 1 if index > own else fork - 1) for index in range(answer, end + 1)]
                targets += sample.input_ids[sample.answer_start :]
                owners += [len(samples)] * (end + 1 - answer)
                samples.append(sample)
    wanted = numpy.zeros(ids.size, dtype=bool)
    wanted[needed] = True
    predictor = (numpy.cumsum(wanted) - 1)[needed]
    return Packed(
        samples, images, ids, positions, group_of, segment_of, wanted.reshape(ids.shape), predictor,
        numpy.asarray(targets), numpy.asarray(owners),
    )  # fmt: skip


def attention_mask(group, segment):
    """Which token (row of the last two axes) sees which: a boolean (sequences, 1, length, length) tensor.

    Args:
        group, segment: as in `Packed`, tensors of shape (sequences, length).
    """
    same = (group[:, :, None] == group[:, None, :]) | (group[:, None, :] == PREAMBLE)
    seen = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    return (same & seen).tril()[:, None]


def gather_images(rows: list, source_of: Callable, key_of: Callable) -> list:
    """An epoch's rows in another order: those of one key follow each other, every source evenly spread.

    The order is a function of the rows' own order: keys come in the order of their first rows, and the sources are
    merged so that each has its share of every stretch, to within one row.

    Args:
        source_of: from a row to its source.
        key_of: from a row to what it may share, or None.
    """
    by_source: dict[Hashable, dict[Hashable, list]] = {}
    for index, row in enumerate(rows):
        key = key_of(row)
        by_source.setdefault(source_of(row), {}).setdefault(index if key is None else key, []).append(row)
    merged = []
    for number, parts in enumerate(by_source.values()):
        together = [row for part in parts.values() for row in part]
        merged += [((2 * index + 1) / len(together), number, index, row) for index, row in enumerate(together)]
    return [row for *_, row in sorted(merged, key=lambda item: item[:3])]
