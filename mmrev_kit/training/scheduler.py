"""The learning rate: warm-up, then constant, reduced on a plateau, with an early end. Arithmetic only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction

from mmrev_kit.config.sections import Config, TrainingConfig

TARGET_REACHED = "validation loss {loss:.4g} is below min_val_loss = {limit:g}"
RATE_TOO_LOW = "learning rate {rate:g} is below min_lr = {limit:g}"
LAST_EPOCH = "last epoch"


@dataclass(frozen=True)
class Decision:
    """What one validation led to. `lr` is the rate from here on; `stop` is the reason to end, or None."""

    improved: bool
    reduced: bool
    bad_epochs: int
    lr: float
    stop: str | None


@dataclass
class Schedule:
    """Warm-up over `warmup_ratio` of the steps, then constant, then decided by each validation.

    The object knows no optimizer and no process: equal losses give equal decisions on every rank.
    """

    learning_rate: float
    min_lr: float
    lr_reduction_factor: float
    lr_patience: int
    improvement_threshold: float
    min_val_loss: float
    warmup_steps: int
    num_epochs: int
    lr: float = math.nan  # the rate after warm-up; starts as learning_rate
    best: float = math.inf
    bad_epochs: int = 0
    epoch: int = 0
    stop: str | None = None

    def __post_init__(self):
        if math.isnan(self.lr):
            self.lr = self.learning_rate

    @classmethod
    def from_config(cls, training: TrainingConfig, steps_per_epoch: int) -> Schedule:
        """The schedule of a run of `training.num_epochs` epochs of `steps_per_epoch` optimizer steps."""
        names = ("learning_rate", "min_lr", "lr_reduction_factor", "lr_patience", "improvement_threshold")
        same = {name: getattr(training, name) for name in (*names, "min_val_loss", "num_epochs")}
        warmup = math.ceil(Fraction(str(training.warmup_ratio)) * steps_per_epoch * training.num_epochs)
        return cls(warmup_steps=warmup, **same)

    def lr_at(self, step: int) -> float:
        """The rate of optimizer step `step`, counted from 0: a linear rise that reaches the full rate at the last
        warm-up step."""
        return self.lr * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else self.lr

    def observe(self, loss: float) -> Decision:
        """Take one validation loss and decide.

        An improvement is loss < best * (1 - improvement_threshold). Any other epoch is a bad one; at `lr_patience`
        bad epochs in a row the rate is multiplied by `lr_reduction_factor` and the count starts again.

        Raises:
            ValueError: the loss is NaN or infinite.
        """
        if not math.isfinite(loss):
            raise ValueError(f"The validation loss is {loss}; the learning rate cannot be decided from it.")
        self.epoch += 1
        improved = math.isinf(self.best) or loss < self.best * (1 - self.improvement_threshold)
        reduced = False
        if improved:
            self.best, self.bad_epochs = loss, 0
        else:
            self.bad_epochs += 1
            if self.bad_epochs >= self.lr_patience:
                self.lr, self.bad_epochs, reduced = reduced_rate(self.lr, self.lr_reduction_factor), 0, True
        if loss < self.min_val_loss:
            self.stop = TARGET_REACHED.format(loss=loss, limit=self.min_val_loss)
        elif self.lr < self.min_lr:
            self.stop = RATE_TOO_LOW.format(rate=self.lr, limit=self.min_lr)
        elif self.epoch >= self.num_epochs:
            self.stop = LAST_EPOCH
        return Decision(improved, reduced, self.bad_epochs, self.lr, self.stop)

    def state_dict(self) -> dict:
        """Everything needed to go on; plain numbers (`best` is None before the first validation)."""
        state = asdict(self)
        return state | {"best": None if math.isinf(self.best) else self.best}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict()`."""
        for name, value in state.items():
            setattr(self, name, math.inf if name == "best" and value is None else value)


def simulate(losses: list[float], training: TrainingConfig, steps_per_epoch: int = 1) -> list[dict]:
    """What the schedule would do for these validation losses, one record an epoch, up to its end.

    Returns:
        Records of epoch (from 1), loss, lr (the rate that epoch trained with, after warm-up), and the decision's
        improved, reduced, bad_epochs and stop.
    """
    schedule = Schedule.from_config(training, steps_per_epoch)
    records = []
    for epoch, loss in enumerate(losses, start=1):
        rate = schedule.lr
        decision = schedule.observe(loss)
        records.append({"epoch": epoch, "loss": loss, **asdict(decision), "lr": rate, "next_lr": decision.lr})
        if decision.stop:
            break
    return records


def reduced_rate(rate: float, factor: float) -> float:
    """rate * factor as written in decimal: 3e-4 * 0.1 is 3e-5, and not a hair below it."""
    return float(Fraction(str(rate)) * Fraction(str(factor)))


def warnings_for(config: Config) -> list[str]:
    """What a reader of this configuration should know before it is run; nothing is changed."""
    training = config.training
    halved = reduced_rate(training.learning_rate, training.lr_reduction_factor)
    found = []
    if halved < training.min_lr:
        found.append(
            f"The first learning-rate reduction gives {halved:g}, already below min_lr = {training.min_lr:g}: "
            "training ends at the first plateau. Lower training.min_lr to allow more than one rate."
        )
    return found
