"""How well a tiny base answers about what its training has not shown, by task and number of attributes named."""

from pathlib import Path

import torch

from mmrev_kit.config.seeds import rng_for
from mmrev_kit.data.objects import ObjectSampler
from mmrev_kit.data.pools import MAX_NAMED
from mmrev_kit.data.tasks import GENERATION, TASK_TYPES, TaskType
from mmrev_kit.pretraining.learning import answer_logits, make_batch, right_answers, to_device
from mmrev_kit.pretraining.pictures import HELD_OUT, SIZE, draw_pictures
from mmrev_kit.pretraining.questions import Faces, TextEncoder, ask
from mmrev_kit.pretraining.recipe import Recipe

FACES = 500  # of each kind of held-out faces, at most
BATCH = 200  # prompts
MAX_LENGTH = 512  # tokens of a prompt; the longest has about 180


def make_encoder(folder: str | Path) -> TextEncoder:
    """The encoder of a tiny base's folder."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    size = processor.image_processor.size
    return TextEncoder(processor, size["shortest_edge"], size["longest_edge"], MAX_LENGTH)


def measure(folder: str | Path, recipe: Recipe) -> list[dict]:
    """The accuracies of a base's folder: greedy whole answers, in fp32, about what is held out of pretraining.

    Args:
        recipe: `eval_prompts`, of each task and kind of pictures, about as many for each number of attributes;
            `seed`, `num_faces`, `looks` and `workers` for the pictures. How the base was made is not asked.

    Returns:
        One entry a kind of pictures, task and number: pictures, task, named, prompts, right. `forward` names all
        seven attributes of a face, an icon has a name only; both are under 1.
    """
    from transformers import Qwen3VLForConditionalGeneration

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    encoder, results, num_faces = make_encoder(folder), [], min(FACES, recipe.num_faces or FACES)
    for kind in HELD_OUT:
        subjects, drawn = draw_pictures(kind, recipe.seed, num_faces, recipe.looks, recipe.num_workers)
        pixels = torch.from_numpy(drawn).to(device)
        for task in TASK_TYPES.values():
            numbers = [1] if kind == "icons" or task.format == GENERATION else range(1, MAX_NAMED + 1)
            prompts = recipe.eval_prompts // len(numbers)
            for number in numbers:
                rng, right = rng_for(recipe.seed, "measure", kind, task.name, number), []
                while len(right) < prompts:
                    rows = ask_about(kind, task, subjects, number, min(BATCH, prompts - len(right)), rng)
                    batch = make_batch(rows, {task.name: 1.0}, (SIZE, SIZE), encoder, (1, 1, 1))
                    batch = to_device(torch.utils.data.default_convert(batch), device)
                    with torch.no_grad():
                        right += right_answers(answer_logits(model, batch, pixels), batch).tolist()
                entry = {"pictures": kind, "task": task.name, "named": number}
                results.append(entry | {"prompts": len(right), "right": int(sum(right))})
    return results


def ask_about(kind: str, task: TaskType, subjects: list, number: int, count: int, rng) -> list:
    """`count` rows of a task about held-out subjects, naming `number` attributes of faces."""
    weights = [float(n == number) for n in range(1, MAX_NAMED + 1)]
    sampler = ObjectSampler(subjects) if kind == "icons" else Faces(subjects, weights, hide=False)
    return ask(task, subjects, sampler, count, rng)


def table(results: list[dict]) -> list[str]:
    """The results as a Markdown table, by kind of pictures and task."""
    lines = ["| pictures | task | accuracy | by attributes named |", "|---|---|---|---|"]
    for kind, task in dict.fromkeys((entry["pictures"], entry["task"]) for entry in results):
        part = [entry for entry in results if (entry["pictures"], entry["task"]) == (kind, task)]
        whole = sum(entry["right"] for entry in part) / sum(entry["prompts"] for entry in part)
        shares = ", ".join(f"{entry['named']}: {entry['right'] / entry['prompts']:.3f}" for entry in part)
        lines.append(f"| {kind} | {TASK_TYPES[task].title} | {whole:.3f} | {shares if len(part) > 1 else ''} |")
    return lines
