"""The tests after each epoch, by log-probability: what a run knows on its way. Nothing is decided on them.

Every process scores its share of the questions through the batches of training; a row counts once.
"""

import math

from mmrev_kit.data.prompts import Sample
from mmrev_kit.data.questions import Asked
from mmrev_kit.data.tasks import CW
from mmrev_kit.model.packing import make_groups, question_groups
from mmrev_kit.model.scoring import score_samples
from mmrev_kit.training.diagnose import explain
from mmrev_kit.training.update import TrainingError, sum_over_processes

ROW_BYTES = 160  # at most, of a question in training_history.json


def ask(run) -> dict[str, dict[str, dict]]:
    """Ask all test questions of the model as it stands.

    Returns:
        {test: {entity id: what it got right}}, see `count`.

    Raises:
        TrainingError: a log-probability that is not finite, with where it comes from.
    """
    samples = [sample for one in run.task.asked for sample in one.samples]
    run.model.eval()
    mine = score_samples(run.model, run.batcher, samples, run.dtype, run.state.process_index, run.state.num_processes)
    *scores, run.stops = sum_over_processes(run, [*mine, float(run.interrupted)])
    for sample, score in zip(samples, scores, strict=True):
        if not math.isfinite(score):
            reason = f"an option of {sample.row.where} has the log-probability {score}"
            raise TrainingError(f"The tests after an epoch: {reason}. {explain(run, [sample])}")
    return count(run.task.asked, scores)


def count(asked: list[Asked], scores: list[float]) -> dict[str, dict[str, dict]]:
    """What each entity's questions came to, by test: its group, the questions `asked`, those whose likeliest option is
    the `right` one, and in CW `margins`, log p(Correct) - log p(Wrong), of the rows by their right answer.

    Args:
        scores: the log-probability of each option of each question, one after the other.
    """
    found: dict[str, dict[str, dict]] = {}
    left = iter(scores)
    for one in asked:
        row, options = one.question.row, dict(zip(one.question.options, left, strict=False))
        start = {"group": row.group or "main", "asked": 0, "right": 0}
        person = found.setdefault(row.task, {}).setdefault(row.entity_id, start)
        person["asked"] += 1
        person["right"] += max(options, key=options.__getitem__) == row.answer
        if row.type.format == CW:
            sides = person.setdefault("margins", {"Correct": [], "Wrong": []})
            sides[row.answer].append(round(options["Correct"] - options["Wrong"], 4))
    return found


def computed_tokens(samples: list[Sample], packing: str, image_id: int, answers: bool = False) -> int:
    """Tokens that one forward pass over these rows computes; `answers`: they are prompts with several answers."""
    if packing == "none":
        return sum(len(sample.input_ids) for sample in samples)
    groups = question_groups(samples, image_id) if answers else make_groups(samples, packing, image_id)
    return sum(group.tokens for group in groups) + (groups[0].preamble if groups else 0)


def cost_line(asked: list[Asked], updates: list[list[Sample]], packing: str, image_id: int, recomputed: float) -> str:
    """What the tests cost: prompts, and an estimate of their share of an epoch's training.

    A token takes one pass forward in a test; in training it takes one forward, one backward, which is as much with a
    frozen base, and `recomputed` of one more.

    Args:
        updates: the rows of each update of an epoch.
        recomputed: the share of the decoder layers that checkpointing computes again.
    """
    trained = sum(computed_tokens(samples, packing, image_id) for samples in updates)
    samples = [sample for one in asked for sample in one.samples]
    tokens = computed_tokens(samples, packing, image_id, answers=True)
    share = tokens / ((2 + recomputed) * trained)
    return f"tests after each epoch: {len(asked):,} prompts, about {share:.0%} of the time that its training takes"
