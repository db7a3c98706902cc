"""The learning rate: warm-up, then constant, reduced on a plateau, with an early end. Arithmetic only.

Usable alone, in any loop that validates after each epoch:

    schedule = Schedule(learning_rate=2e-3, min_lr=1e-4, warmup_steps=20, num_epochs=10)
    while not schedule.stop:
        for batch in epoch:  # before each optimizer step: group["lr"] = schedule.lr_at(step)
            ...
        schedule.observe(validation_loss)
"""

import math
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Self

from mmrev_kit.config.sections import Config, TrainingConfig


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
    """Warm-up over `warmup_steps`, then constant, then decided by each validation.

    The object knows no optimizer and no process: equal losses give equal decisions on every rank. Defaults are those
    of `TrainingConfig`, the published recipe for the 32B model.

    Attributes:
        learning_rate: the full rate, reached at the last warm-up step.
        min_lr: training ends at the first validation at which the rate is below this.
        lr_reduction_factor: what a plateau multiplies the rate by.
        lr_patience: epochs in a row without an improvement that make a plateau.
        improvement_threshold: share of the best loss by which a lower one must be lower to be an improvement.
        min_val_loss: training ends when the validation loss is below it.
        warmup_steps: optimizer steps of the linear rise.
        num_epochs: validations after which training ends.
        lr: the rate after warm-up, as of the latest decision; best: the loss of the latest improvement.
        stop: why training is to end, or None.

    Raises:
        ValueError: a number that `TrainingConfig` would not take either.
    """

    learning_rate: float = TrainingConfig.learning_rate
    min_lr: float = TrainingConfig.min_lr
    lr_reduction_factor: float = TrainingConfig.lr_reduction_factor
    lr_patience: int = TrainingConfig.lr_patience
    improvement_threshold: float = TrainingConfig.improvement_threshold
    min_val_loss: float = TrainingConfig.min_val_loss
    warmup_steps: int = 0
    num_epochs: int = TrainingConfig.num_epochs
    lr: float = math.nan  # learning_rate at first
    best: float = math.inf
    bad_epochs: int = 0
    epoch: int = 0
    stop: str | None = None

    def __post_init__(self):
        names = vars(self).keys() & {field.name for field in fields(TrainingConfig)}
        TrainingConfig(**{name: getattr(self, name) for name in names})  # its limits hold here
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps = {self.warmup_steps}: must be a number from 0.")
        if math.isnan(self.lr):
            self.lr = self.learning_rate

    @classmethod
    def from_config(cls, training: TrainingConfig, steps_per_epoch: int) -> Self:
        """The schedule of a run of `training.num_epochs` epochs of `steps_per_epoch` optimizer steps."""
        names = {field.name for field in fields(cls)} & vars(training).keys()
        warmup = math.ceil(Fraction(str(training.warmup_ratio)) * steps_per_epoch * training.num_epochs)
        return cls(warmup_steps=warmup, **{name: getattr(training, name) for name in names})

    def lr_at(self, step: int) -> float:
        """The rate of optimizer step `step`, counted from 0: a linear rise that reaches the full rate at the last
        warm-up step. An update that was skipped is no step."""
        return self.lr * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else self.lr

    def observe(self, loss: float) -> Decision:
        """Take one validation loss and decide.

        An improvement is loss < best * (1 - improvement_threshold). Any other epoch is a bad one; at `lr_patience`
        bad epochs in a row the rate is multiplied by `lr_reduction_factor` and the count starts again.

        Raises:
            ValueError: the loss is NaN or infinite, or negative: an improvement is a share of it.
        """
        loss = float(loss)
        if not 0 <= loss < math.inf:
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
            self.stop = f"validation loss {loss:.4g} is below min_val_loss = {self.min_val_loss:g}"
        elif self.lr < self.min_lr:
            self.stop = f"learning rate {self.lr:g} is below min_lr = {self.min_lr:g}"
        elif self.epoch >= self.num_epochs:
            self.stop = "last epoch"
        return Decision(improved, reduced, self.bad_epochs, self.lr, self.stop)

    def state_dict(self) -> dict:
        """Everything needed to go on; plain numbers (`best` is None before the first validation)."""
        state = asdict(self)
        return state | {"best": None if math.isinf(self.best) else self.best}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: it has other names.
        """
        if wrong := state.keys() ^ vars(self).keys():
            raise ValueError(f"No state of a schedule: {', '.join(sorted(wrong))} missing or unknown.")
        for name, value in state.items():
            setattr(self, name, math.inf if name == "best" and value is None else value)


def reduced_rate(rate: float, factor: float) -> float:
    """rate * factor as written in decimal: 3e-4 * 0.1 is 3e-5, and not a hair below it."""
    return float(Fraction(str(rate)) * Fraction(str(factor)))


def warnings_for(config: Config) -> list[str]:
    """What a reader of this configuration should know before it is run; nothing is changed."""
    training, own, told = config.training, config.experiment, []
    if own.task == "reverse" and own.taught not in (None, "cw"):
        told.append(
            f"experiment.taught = {own.taught!r}: in task reverse main is taught by reverse rows, whatever it says."
        )
    reduced = reduced_rate(training.learning_rate, training.lr_reduction_factor)
    if training.learning_rate < training.min_lr:
        told.append(
            f"training.learning_rate = {training.learning_rate:g} is below training.min_lr = {training.min_lr:g}: "
            "training ends after the first epoch, whatever its loss. Lower training.min_lr to train longer."
        )
    elif reduced < training.min_lr:
        told.append(
            f"The first learning-rate reduction gives {reduced:g}, already below min_lr = {training.min_lr:g}: "
            "training ends at the first plateau. Lower training.min_lr to allow more than one rate."
        )
    return told
