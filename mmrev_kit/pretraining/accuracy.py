"""How well a pretrained model answers about what training has not shown, by task and number of attributes."""

import numpy

from mmrev_kit.config.seeds import seed_for
from mmrev_kit.data.pools import MAX_NAMED
from mmrev_kit.data.tasks import LETTERS, TASK_TYPES
from mmrev_kit.pretraining.model import answer_logits, shapes_of, to_arrays
from mmrev_kit.pretraining.pictures import SIZE, Pictures, make_pictures
from mmrev_kit.pretraining.questions import ArraySampler
from mmrev_kit.pretraining.text import NO_TARGET, Block, Lexicon

TASKS = ("caption", "reverse", "mcq_i2d", "mcq_d2i")
NAMES = {task: TASK_TYPES[task].title if task in TASK_TYPES else task for task in TASKS}
HELD_OUT = {
    "faces": "faces that training did not show",
    "combinations": "faces with three attributes that training did not show together",
    "icons": "icons on a background on which training did not show them",
}
LENGTHS = {"caption": 64, "reverse": 72, "mcq_i2d": 160, "mcq_d2i": 136}  # tokens of a row, at 16 an image
BARS = {"caption": 0.98, "reverse": 0.95, "mcq_i2d": 0.92, "mcq_d2i": 0.92}
BATCH = 200


def held_out_pictures(seed: int, num_faces: int | None, workers: int) -> dict[str, Pictures]:
    """The held-out pictures, by kind; `num_faces` of each kind at most."""
    return {
        kind: make_pictures(kind, seed, 0 if kind == "icons" else num_faces, 2, False, (SIZE, SIZE), workers)
        for kind in HELD_OUT
    }


def ask_task(sampler: ArraySampler, task: str, count: int, rng) -> tuple[Block, numpy.ndarray]:
    """`count` prompts of a task, as many for each number of attributes, and their pictures."""
    numbers = rng.permutation(numpy.arange(count) % MAX_NAMED) + 1
    if task == "mcq_d2i":
        return sampler.picture_choices(rng, count, LENGTHS[task], numbers, 0.0)
    images = sampler.draw_images(rng, count, 0.0)
    ask = {"caption": sampler.captions, "reverse": sampler.statements, "mcq_i2d": sampler.text_choices}[task]
    return ask(rng, images, numpy.arange(count), LENGTHS[task], numbers), images


def answers_to(model, block: Block, images: numpy.ndarray, pixels) -> numpy.ndarray:
    """(n, longest answer) tokens that the model finds likeliest at each place of the right answer.

    An answer is what greedy decoding writes exactly if all of its tokens are the likeliest after those before them.
    """
    import torch

    device = pixels.device
    batch = {name: torch.from_numpy(value).to(device) for name, value in to_arrays([block], images).items()}
    with torch.no_grad():
        logits = answer_logits(model, batch, pixels, shapes_of([block]))
    return logits.argmax(-1).view(block.targets.shape).cpu().numpy()


def answer_task(model, sampler: ArraySampler, task: str, pixels, prompts: int, seed: int) -> dict:
    """One task on one set of pictures: prompts and right answers by number of attributes, and what was answered."""
    lexicon, first = sampler.lexicon, {}
    words = {"reverse": (lexicon.verdicts, ("Wrong", "Correct"))}.get(task, (lexicon.letters, tuple(LETTERS)))
    known = dict(zip(lexicon.tokens[lexicon.offset[words[0]]].tolist(), words[1], strict=True))
    asked, right = {}, {}
    for start in range(0, prompts, BATCH):
        rng = numpy.random.default_rng(seed_for(seed, "test", task, start))
        block, images = ask_task(sampler, task, min(BATCH, prompts - start), rng)
        found = answers_to(model, block, images, pixels)
        good = ((found == block.targets) | (block.targets == NO_TARGET)).all(axis=1)
        for number in numpy.unique(block.asked).tolist():
            rows = block.asked == number
            asked[number] = asked.get(number, 0) + int(rows.sum())
            right[number] = right.get(number, 0) + int(good[rows].sum())
        if task != "caption":
            for token in found[:, 0].tolist():
                first[known.get(token, "other")] = first.get(known.get(token, "other"), 0) + 1
    by_number = [{"attributes": n, "prompts": asked[n], "right": right[n]} for n in sorted(asked)]
    total = sum(asked.values())
    return {
        "accuracy": sum(right.values()) / total,
        "prompts": total,
        "by_number": by_number,
        "answers": {name: first.get(name, 0) for name in (*words[1], "other")} if task != "caption" else None,
    }


def measure(
    model, pictures: dict[str, Pictures], lexicon: Lexicon, prompts: int, seed: int, device
) -> dict[str, dict[str, dict]]:
    """{set of pictures: {task: result}} with `prompts` prompts a task and set; see `answer_task`."""
    import torch

    results = {}
    for kind, known in pictures.items():
        pixels = torch.from_numpy(known.pixels).to(device)
        sampler = ArraySampler(known, lexicon, open_words=True)
        results[kind] = {task: answer_task(model, sampler, task, pixels, prompts, seed) for task in TASKS}
    return results


def imbalance(result: dict) -> float | None:
    """How far the most over- or underused answer is from its even share; None for captions."""
    if not result["answers"]:
        return None
    counts = [count for name, count in result["answers"].items() if name != "other"]
    return max(abs(count / result["prompts"] - 1 / len(counts)) for count in counts)


def summary(results: dict[str, dict[str, dict]]) -> str:
    """One line a set: the accuracies, and the worst imbalance of answers."""
    lines = []
    for kind, tasks in results.items():
        accuracies = ", ".join(f"{NAMES[task]} {result['accuracy']:.3f}" for task, result in tasks.items())
        worst = max(imbalance(result) or 0.0 for result in tasks.values())
        lines.append(f"{kind}: {accuracies}; answers within {100 * worst:.1f} points of even")
    return "\n".join(lines)


def table(results: dict[str, dict[str, dict]]) -> list[str]:
    """The results as a Markdown table, by set, task and number of attributes."""
    lines = ["| pictures | task | accuracy | by attributes named | answers |", "|---|---|---|---|---|"]
    for kind, tasks in results.items():
        for task, result in tasks.items():
            parts = [f"{part['attributes']}: {part['right'] / part['prompts']:.3f}" for part in result["by_number"]]
            answers = result["answers"] or {}
            said = ", ".join(f"{name} {count}" for name, count in answers.items() if count or name != "other")
            lines.append(f"| {kind} | {NAMES[task]} | {result['accuracy']:.3f} | {', '.join(parts)} | {said} |")
    return lines


def frame(results: dict[str, dict[str, dict]]):
    """The accuracies as a pandas DataFrame: a row a set of pictures and task, a column a number of attributes."""
    import pandas

    rows = []
    for kind, tasks in results.items():
        for task, result in tasks.items():
            row = {"pictures": kind, "task": NAMES[task], "prompts": result["prompts"], "all": result["accuracy"]}
            row |= {f"{part['attributes']} named": part["right"] / part["prompts"] for part in result["by_number"]}
            rows.append(row | {"bar": BARS[task]})
    return pandas.DataFrame(rows).set_index(["pictures", "task"]) if rows else pandas.DataFrame()
