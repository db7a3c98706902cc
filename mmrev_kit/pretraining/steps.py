"""The machinery of pretraining: the recipe, steps made ahead by other processes, one step, the learning rate."""

import os
import shlex
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy

from mmrev_kit.config.sections import ConfigError
from mmrev_kit.pretraining.model import Optimizer, answer_logits, losses_of, shapes_of, to_arrays
from mmrev_kit.pretraining.pictures import SIZE, Pictures
from mmrev_kit.pretraining.plan import StepPlan, make_step, plan_step
from mmrev_kit.pretraining.questions import ArraySampler
from mmrev_kit.pretraining.text import Lexicon

CHUNK = 16  # steps that one process makes at a time


@dataclass(frozen=True)
class Recipe:
    """How to pretrain. `minutes` counts from the start of the process's work, drawing and tests included."""

    minutes: float = 9.0
    steps: int | None = None  # of this run, instead of minutes
    seed: int = 0
    prompts: int = 512  # a step
    rate: float = 2e-3
    warmup: int = 200  # steps, of the first run; a quarter of them after going on
    decay_share: float = 0.3  # of this run's steps, in which the rate falls to zero; 0: it does not fall
    weight_decay: float = 0.05
    muon: bool = True
    easy_steps: int = 1500
    num_faces: int | None = None  # None: all there are
    looks: int = 2  # pictures of each face
    other_every: int = 24  # every so many steps one of another picture size; 0: none
    other_faces: int = 1000  # faces drawn at each other size
    eval_prompts: int = 2000  # a task and set of held-out pictures
    log_every: int = 100
    save_seconds: float = 150.0
    compile: bool = True  # on a GPU
    capture: bool = True  # a step as a CUDA graph, on a GPU
    workers: int | None = None  # None: one a core, less two

    def __post_init__(self):
        if self.prompts < 16 or self.minutes < 0 or not 0 <= self.decay_share <= 1:
            raise ConfigError("pretraining needs prompts >= 16, minutes >= 0 and decay_share from 0 to 1.")

    @property
    def num_workers(self) -> int:
        """Processes that draw and ask."""
        return max(1, (os.cpu_count() or 2) - 2) if self.workers is None else self.workers


def read_recipe(values: dict, overrides: str = "") -> Recipe:
    """A recipe from values by field, and words such as "muon=false rate=1e-3".

    Raises:
        ConfigError: an unknown field, or a value of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        words = OmegaConf.from_dotlist(shlex.split(overrides))
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), values, words))
    except OmegaConfBaseException as error:
        raise ConfigError(f"pretraining: {str(error).splitlines()[0]}") from None


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of visual tokens of a picture of (width, height) pixels."""
    return size[1] // 16, size[0] // 16


class Source:
    """All that steps are made of: pictures and plans by picture size, and which size a step has."""

    def __init__(self, recipe: Recipe, pictures: dict[tuple[int, int], Pictures], lexicon: Lexicon):
        self.seed, self.other_every, self.sizes = recipe.seed, recipe.other_every, list(pictures)
        self.samplers = {size: ArraySampler(known, lexicon, grid_of(size)) for size, known in pictures.items()}
        self.plans: dict[tuple[int, int], StepPlan] = {}
        for size in pictures:
            number = recipe.prompts if size == (SIZE, SIZE) else max(16, recipe.prompts // 4)
            plan = plan_step(number, grid_of(size))
            self.plans[size] = StepPlan(plan.blocks, plan.object_share, recipe.easy_steps)

    def size_of(self, step: int) -> tuple[int, int]:
        """The picture size of a step: other sizes take turns."""
        if self.other_every and step % self.other_every == self.other_every - 1 and len(self.sizes) > 1:
            return self.sizes[1 + step // self.other_every % (len(self.sizes) - 1)]
        return self.sizes[0]

    def step(self, step: int) -> dict[str, numpy.ndarray]:
        """A step as arrays; see `model.to_arrays`."""
        size = self.size_of(step)
        return to_arrays(*make_step(self.samplers[size], self.plans[size], self.seed, step))

    def shapes(self, size: tuple[int, int]) -> tuple[tuple, tuple]:
        """(rows, tokens) and (rows, answer tokens) of each block."""
        blocks, _ = make_step(self.samplers[size], self.plans[size], self.seed, 0)
        return shapes_of(blocks), tuple(block.targets.shape for block in blocks)


_source: list[Source] = []  # of a process that makes steps


def _set_source(source: Source) -> None:
    _source[:] = [source]


def _chunk(first: int) -> list[dict]:
    return [_source[0].step(step) for step in range(first, first + CHUNK)]


class Feed:
    """Steps in order, made ahead by other processes; with workers = 0 by this one."""

    def __init__(self, source: Source, first: int, workers: int):
        self.source, self.next, self.workers = source, first, workers
        self.pool = ProcessPoolExecutor(workers, initializer=_set_source, initargs=(source,)) if workers else None
        self.asked, self.waiting, self.ready = first, [], []
        self._ask()

    def _ask(self) -> None:
        while self.pool and len(self.waiting) < 2 * self.workers:
            self.waiting.append(self.pool.submit(_chunk, self.asked))
            self.asked += CHUNK

    def take(self) -> dict[str, numpy.ndarray]:
        """The next step's arrays."""
        if not self.pool:
            self.next += 1
            return self.source.step(self.next - 1)
        if not self.ready:
            self.ready = self.waiting.pop(0).result()
            self._ask()
        return self.ready.pop(0)

    def close(self) -> None:
        """End the processes."""
        if self.pool:
            self.pool.shutdown(wait=True, cancel_futures=True)


class Runner:
    """Steps of one shape: eager, or replayed as a CUDA graph.

    Args:
        pixels: all pictures of this size, on the device.
        shapes, answers: see `Source.shapes`.
        fast: (text layer, vision block), compiled or not.
    """

    def __init__(self, model, optimizer: Optimizer, pixels, shapes, answers, fast: tuple, capture: bool):
        self.model, self.optimizer, self.pixels = model, optimizer, pixels
        self.shapes, self.answers, self.fast = shapes, answers, fast
        self.capture, self.graph, self.batch, self.report = capture, None, None, None

    def _compute(self):
        import torch

        device = self.pixels.device.type
        # Without autocast's cache, which would outlive a captured step.
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
            logits = answer_logits(self.model, self.batch, self.pixels, self.shapes, *self.fast)
        loss, report = losses_of(logits, self.batch, self.answers)
        loss.backward()
        self.optimizer.step()
        return report

    def _clear(self) -> None:
        for part in self.optimizer.parameters:
            part.grad = None

    def _record(self) -> None:
        """Warm up at rate 0, which changes no weight, then record the step."""
        import torch

        kept = self.optimizer.rates.values.clone()
        self.optimizer.rates.values[0] = 0
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._clear()
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.report = self._compute()
        self.optimizer.rates.values.copy_(kept)
        self.graph = graph

    def run(self, arrays: dict[str, numpy.ndarray]):
        """One update; returns the step's report (see `losses_of`), which the next step may overwrite."""
        import torch

        new = {name: torch.from_numpy(value) for name, value in arrays.items()}
        if self.pixels.is_cuda:  # from pinned memory a copy does not wait for the steps before
            new = {name: value.pin_memory() for name, value in new.items()}
        if self.batch is None:
            self.batch = {name: value.to(self.pixels.device) for name, value in new.items()}
        for name, value in new.items():
            self.batch[name].copy_(value, non_blocking=True)
        if self.capture and self.graph is None:
            self._record()
        if self.graph is not None:
            self.graph.replay()
            return self.report
        self._clear()
        return self._compute()


class DecayingRate:
    """The rate: warm-up, constant, and at the end a straight fall to zero.

    With `steps` the fall covers the last `decay_share` of them. With `minutes` it begins when that share of the run's
    time is left, and its length follows from the time that a step has taken.
    """

    def __init__(self, recipe: Recipe, first: bool, began: float, ending: float):
        self.recipe, self.warmup = recipe, max(1, recipe.warmup if first else recipe.warmup // 4)
        self.begin = time.monotonic()
        self.deadline = began + 60 * recipe.minutes - ending
        self.fall_from, self.last = None, recipe.steps
        if recipe.steps is not None and recipe.decay_share:
            self.fall_from = recipe.steps - round(recipe.decay_share * recipe.steps)

    def look(self, done: int, seconds_a_step: float) -> None:
        """Decide, when `done` steps of this run are over, whether the fall begins or the run ends."""
        if self.recipe.steps is not None:
            return
        now = time.monotonic()
        left = self.deadline - now
        if self.recipe.decay_share == 0:
            if left < self.recipe.log_every * seconds_a_step:
                self.last = done
        elif self.fall_from is None and left <= self.recipe.decay_share * (self.deadline - self.begin):
            self.fall_from = done
            self.last = done + max(1, int(0.97 * left / seconds_a_step))
        if left < 0 and self.fall_from is None:
            self.last = done

    def rate(self, done: int) -> float:
        """The rate of the step after `done` steps of this run."""
        factor = min(1.0, (done + 1) / self.warmup)
        if self.fall_from is not None and done >= self.fall_from:
            factor *= max(0.0, (self.last - done) / (self.last - self.fall_from))
        return self.recipe.rate * factor

    def over(self, done: int) -> bool:
        """Whether the run has taken its last step."""
        return self.last is not None and done >= self.last
