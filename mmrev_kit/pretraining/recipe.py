"""The settings of pretraining."""

import math
import os
import shlex
from dataclasses import dataclass

from mmrev_kit.config.sections import ConfigError

ORDERS = {"both": ("reverse", "cw_image"), "one": ("reverse",)}  # the tasks among which CW questions are shared out
FEWEST = 16  # pictures of either kind in a step: every question finds its wrong options
IDLE = ("eval_prompts", "log_every", "workers")  # fields that change nothing of what is learned


@dataclass(frozen=True)
class Recipe:
    """How to pretrain. On a CPU equal recipes give equal models, whatever the number of workers and interruptions."""

    orders: str = "both"  # of CW questions: both (half of them image first) or one (text first only)
    seed: int = 0
    steps: int = 4000
    prompts: int = 512  # a step
    rate: float = 2e-3
    warmup: int = 200  # steps
    decay_share: float = 0.3  # of the steps, in which the rate falls to zero
    weight_decay: float = 0.05
    muon: bool = True  # False: AdamW alone, which learns far more slowly; on a CPU a step of Muon takes a minute
    easy_steps: int = 1500  # over these the questions grow from one attribute to all numbers alike
    num_faces: int | None = None  # None: all there are
    looks: int = 2  # pictures of each face
    save_every: int = 500  # steps; a save rounds the run to 16 bits, see `state.save`
    eval_prompts: int = 2000  # a task and set of held-out pictures
    log_every: int = 100
    workers: int | None = None  # processes that draw and ask; None: one a core, less two

    def __post_init__(self):
        if self.orders not in ORDERS:
            raise ConfigError(f"pretraining: orders = {self.orders!r}: must be one of {', '.join(ORDERS)}.")
        least = dict.fromkeys(("steps", "looks", "save_every", "log_every"), 1) | {"eval_prompts": 0, "workers": 0}
        for name, limit in (least | {"prompts": 16, "num_faces": FEWEST}).items():
            if (value := getattr(self, name)) is not None and value < limit:
                raise ConfigError(f"pretraining: {name} = {value}: must be >= {limit}.")
        if not 0 < self.rate < math.inf or not 0 < self.decay_share <= 1:
            found = f"rate = {self.rate}, decay_share = {self.decay_share}"
            raise ConfigError(f"pretraining: {found}: both must be numbers above 0, and decay_share at most 1.")

    @property
    def num_workers(self) -> int:
        """Processes that draw and ask."""
        return max(1, (os.cpu_count() or 2) - 2) if self.workers is None else self.workers

    def learned(self) -> dict:
        """The fields on which the model depends."""
        return {name: value for name, value in vars(self).items() if name not in IDLE}


def read_recipe(values: dict, overrides: str = "") -> Recipe:
    """A recipe from values by field, and words such as "looks=1 rate=1e-3".

    Raises:
        ConfigError: an unknown field, or a value that cannot be used.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        words = OmegaConf.from_dotlist(shlex.split(overrides))
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), values, words))
    except OmegaConfBaseException as error:
        raise ConfigError(f"pretraining: {str(error).splitlines()[0]}") from None
