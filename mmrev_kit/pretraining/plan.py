"""What a step of pretraining asks: a pure function of (seed, step).

Its pictures are those of its D2I questions; captions, CW and I2D ask about the same pictures, so that the vision tower
reads each picture once for several prompts.
"""

from dataclasses import dataclass

import numpy

from mmrev_kit.config.seeds import seed_for
from mmrev_kit.data.pools import MAX_NAMED
from mmrev_kit.pretraining.questions import ArraySampler, place_answers
from mmrev_kit.pretraining.text import Block, Lexicon, assemble

LONGEST_COPY = 28  # tokens with the end token


@dataclass(frozen=True)
class StepPlan:
    """What a step is made of.

    `blocks`: (task, prompts, tokens of a row, attributes named at least, at most) of each block; mcq_d2i is first.
    """

    blocks: tuple[tuple[str, int, int, int, int], ...]
    object_share: float = 0.2
    easy_steps: int = 1500  # over these the questions grow from one attribute to all numbers alike

    @property
    def num_prompts(self) -> int:
        """Prompts of one step."""
        return sum(count for _, count, *_ in self.blocks)


def plan_step(prompts: int, grid: tuple[int, int] = (4, 4)) -> StepPlan:
    """The plan of a step of about `prompts` prompts with images of grid = rows x columns visual tokens."""
    more = grid[0] * grid[1] - 16
    unit = prompts / 512
    shares = (
        ("mcq_d2i", 96, 136 + 4 * more, 1, MAX_NAMED),
        ("caption", 64, 64 + more, 7, 7),
        ("reverse", 160, 72 + more, 1, MAX_NAMED),
        ("mcq_i2d", 72, 120 + more, 1, 2),
        ("mcq_i2d", 72, 160 + more, 3, MAX_NAMED),
        ("text", 48, 64, 1, 1),
    )
    blocks = []
    for task, count, length, low, high in shares:
        count = max(4, 4 * round(count * unit / 4))  # letters come out even
        blocks.append((task, count, length, low, high))
    return StepPlan(tuple(blocks))


def number_weights(low: int, high: int, step: int, easy_steps: int) -> numpy.ndarray:
    """How often each number of attributes from low to high is asked at a step: few first, later all alike."""
    progress = min(1.0, step / easy_steps) if easy_steps else 1.0
    weights = numpy.array([max(progress, 0.02) ** (number - 1) for number in range(1, high + 1)])
    weights = weights[low - 1 :] if progress == 1.0 else weights
    return weights / weights.sum()


def texts_only(rng, lexicon: Lexicon, count: int, length: int) -> Block:
    """Copying, and questions about texts alone: invented facts and things, none of them with a picture."""
    thirds = [count - 2 * (count // 3), count // 3, count // 3]
    copies, statements, choices = (numpy.zeros((number, 16), dtype=int) for number in thirds)
    answers = numpy.zeros((count, 1), dtype=int)
    chosen = rng.integers(len(lexicon.copied), size=thirds[0])
    facts = rng.random(thirds[0]) < 0.5
    chosen[facts] = rng.integers(lexicon.facts.shape[1], size=int(facts.sum()))
    copies[:, 0], answers[: thirds[0], 0] = lexicon.to_copy[chosen], lexicon.copied[chosen]
    truth = rng.permutation(numpy.arange(thirds[1]) % 2).astype(bool)
    pairs = distinct(rng, lexicon.facts.shape[1], thirds[1], 2)
    pairs[truth, 1] = pairs[truth, 0]
    words = rng.choice(lexicon.reverse, size=thirds[1])
    statements[:, :4] = numpy.stack(
        [lexicon.facts[0][pairs[:, 0]], words, lexicon.facts[1][pairs[:, 1]], numpy.full(thirds[1], lexicon.ask_cw)], 1
    )
    answers[thirds[0] : thirds[0] + thirds[1], 0] = lexicon.verdicts[truth.astype(int)]
    for pieces, part in ((lexicon.facts, slice(0, thirds[2] // 2)), (lexicon.names, slice(thirds[2] // 2, None))):
        number = len(choices[part])
        right, options = place_answers(rng, distinct(rng, pieces.shape[1], number, 4))
        asked = options[numpy.arange(number), right]
        columns = [pieces[0][asked], rng.choice(lexicon.reverse, size=number)]
        for place in range(4):
            letter = lexicon.options[place] if place else lexicon.first_option
            columns += [numpy.full(number, letter), pieces[1][options[:, place]]]
        choices[part, :11] = numpy.stack([*columns, numpy.full(number, lexicon.only)], axis=1)
        answers[thirds[0] + thirds[1] :][part, 0] = lexicon.letters[right]
    prompts = numpy.concatenate([copies, statements, choices])
    return assemble(lexicon, "text", prompts, answers, [], numpy.ones(count), length, LONGEST_COPY)


def distinct(rng, known: int, count: int, width: int) -> numpy.ndarray:
    """(count, width) numbers below `known`, different within a row."""
    found = rng.integers(known, size=(count, width))
    while True:
        ordered = numpy.sort(found, axis=1)
        bad = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if not bad.any():
            return found
        found[bad] = rng.integers(known, size=(int(bad.sum()), width))


def make_step(sampler: ArraySampler, plan: StepPlan, seed: int, step: int) -> tuple[list[Block], numpy.ndarray]:
    """The blocks of a step and its pictures; equal arguments give equal steps.

    Returns:
        blocks: in the plan's order; their slots count the pictures below.
        images: which pictures of `sampler.pictures` the step shows.
    """
    rng = numpy.random.default_rng(seed_for(seed, "step", step))
    blocks, images, order, used = [], numpy.zeros(0, dtype=int), numpy.zeros(0, dtype=int), 0
    for task, count, length, low, high in plan.blocks:
        weights = number_weights(low, high, step, plan.easy_steps)
        numbers = rng.choice(numpy.arange(high + 1 - len(weights), high + 1), size=count, p=weights)
        if task == "mcq_d2i":
            block, images = sampler.picture_choices(rng, count, length, numbers, plan.object_share)
            order = rng.permutation(len(images))
        elif task == "text":
            block = texts_only(rng, sampler.lexicon, count, length)
        else:
            slots = order[(used + numpy.arange(count)) % len(order)]
            used += count
            ask = {"caption": sampler.captions, "reverse": sampler.statements, "mcq_i2d": sampler.text_choices}[task]
            block = ask(rng, images[slots], slots, length, numbers)
        blocks.append(block)
    return blocks, images
