"""Looking at data: people, rendered prompts with the tokens that carry loss, lengths, balances."""

import base64
import io
from collections import Counter
from html import escape
from itertools import islice
from pathlib import Path

from mmrev_kit.config.errors import Told
from mmrev_kit.config.project import resolve
from mmrev_kit.config.reporting import decimal
from mmrev_kit.data.images import find_image, load_image
from mmrev_kit.data.prompts import Encoder, Sample
from mmrev_kit.data.tasks import Row
from mmrev_kit.notebook.drawing import INK, LIMIT, drawn, grid, subplots

THUMBNAIL = 96  # pixels
PROMPT = "font-family:monospace;font-size:13px;line-height:1.9;white-space:pre-wrap;border:1px solid #ccc;padding:8px"
TOKEN = {
    "special": f"color:{INK}",
    "text": "border-bottom:1px solid #ddd",
    "answer": "background:#ffe08a;color:#000;border:1px solid #c90;border-radius:3px;padding:1px",
}


def balance_table(rows_by_file: dict[str, list[Row]]):
    """A pandas DataFrame with one row a file and group: rows, people, connectors, and how the answers are balanced."""
    import pandas

    def counts(answers) -> str:
        found = Counter(answers)
        few = len(found) <= 4  # else they are descriptions
        return ", ".join(f"{answer} {found[answer]}" for answer in sorted(found)) if few else f"{len(found)} texts"

    names = ["file", "group", "entity", "connector", "answer"]
    records = [
        (file, row.group or "", row.entity_id, row.connector, row.answer)
        for file, rows in rows_by_file.items()
        for row in sorted(rows, key=lambda row: str(row.group))
    ]
    parts = pandas.DataFrame(records, columns=names).groupby(["file", "group"], sort=False)
    unique = {"entities": ("entity", "nunique"), "connectors": ("connector", "nunique")}
    return parts.agg(rows=("answer", "size"), **unique, answers=("answer", counts))


@drawn
def people_figure(entities: list[dict], folder: Path):
    """The people of an experiment: picture, name, group, description.

    Args:
        entities: from `rows.read_entities`; those without `images` are left out.
        folder: the experiment's folder.
    """
    shown = [entity for entity in entities if entity.get("images")]
    columns = 4
    lines = max(1, -(-len(shown) // columns))
    figure, axes = grid(lines, columns, 1.9 * lines)
    told = []
    for axis in axes.flat:
        axis.axis("off")
    for axis, entity in zip(axes.flat, shown, strict=False):
        image = find_image(folder, entity["images"][0], None)  # who reads the entities checks whether it may be shown
        axis.imshow(load_image(image), interpolation="nearest")
        name = entity.get("name") or entity["id"]
        # parse_math: a description with dollar signs is text
        title = f"{name} ({entity.get('group', 'main')})\n{entity.get('description', '')}"
        axis.set_title(title, fontsize=7.5, parse_math=False)
        told.append(title.replace("\n", ": "))
    figure.alt = f"{len(shown)} drawn people. {'; '.join(told)}."
    return figure


def _picture(path: Path, side: int = THUMBNAIL) -> str:
    image = load_image(path)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    wide = f";width:{side}px" if side > THUMBNAIL else ""
    return f'<img alt="{escape(path.name)}" style="vertical-align:middle{wide}" src="data:image/png;base64,{data}">'


def path_html(path: str) -> str:
    """A picture of the user's as it would be read, in a place of its own, or why it cannot be."""
    side = 2 * THUMBNAIL
    try:
        inner = _picture(resolve(path), side) if path.strip() else "no picture"
    except (Told, OSError) as error:
        inner = escape(str(error))
    return f"<div style='width:{side}px;min-height:{side}px;margin-right:12px;overflow-wrap:anywhere'>{inner}</div>"


def prompt_html(sample: Sample, encoder: Encoder) -> str:
    """One row as the model reads it, token by token; the tokens that carry loss are highlighted.

    Text is escaped: a description cannot become part of the page.
    """
    specials = set(encoder.tokenizer.all_special_ids)
    pieces, images, run = [], iter(sample.row.images), 0
    for position, token in enumerate(sample.input_ids):
        if token == encoder.image_id:
            run += 1
            if sample.input_ids[position + 1] != encoder.image_id:
                shown = "".join(map(_picture, islice(images, 1)))  # other families may write a picture in several runs
                pieces.append(f"{shown}<span style='{TOKEN['special']}'>{run} tokens</span>")
                run = 0
            continue
        kind = "answer" if position >= sample.answer_start else "special" if token in specials else "text"
        text = escape(encoder.tokenizer.decode([token])).replace("\n", "⏎\n")
        pieces.append(f"<span style='{TOKEN[kind]}'>{text}</span>")
    row = sample.row
    head = f"{row.task}, {row.source}: {Path(row.where).name}, {len(sample.input_ids)} tokens"
    return f"<div><b>{escape(head)}</b><div style='{PROMPT}'>{''.join(pieces)}</div></div>"


def prompts_html(samples: list[Sample], encoder: Encoder) -> str:
    """The first sample of each task, one below the other."""
    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(sample.row.task, sample)
    return "".join(prompt_html(sample, encoder) for sample in first.values())


@drawn
def lengths_figure(samples: list[Sample], max_length: int):
    """Prompt lengths in tokens by task, against the limit."""
    figure, (axis,) = subplots(1, 2.8)
    tasks = list(dict.fromkeys(sample.row.task for sample in samples))
    lengths = [[len(sample.input_ids) for sample in samples if sample.row.task == task] for task in tasks]
    axis.boxplot(lengths, orientation="horizontal", tick_labels=tasks, whis=(0, 100), widths=0.6)
    axis.invert_yaxis()
    axis.axvline(max_length, color=LIMIT, linestyle="--", linewidth=1)
    axis.annotate("max_length ", (max_length, 0.6), color=LIMIT, fontsize=9, ha="right", va="bottom")
    axis.grid(axis="x", alpha=0.25)
    axis.set(xlim=(0, None), xlabel="tokens a row (box: middle half; line: shortest to longest)")
    told = [f"{task} {min(own)} to {max(own)}" for task, own in zip(tasks, lengths, strict=True)]
    figure.alt = f"Tokens a row, of at most {max_length}: {', '.join(told)}."
    return figure


ANSWER = "border:1px solid #ccc;border-left:5px solid {};padding:6px;margin:4px 0;font-size:13px"


def answer_html(record: dict) -> str:
    """One answered question: its prompt with the pictures, the right answer, what was written and how it was read."""
    images = iter(record["images"])
    parts = record.get("parts") or [record["prompt"], *(None for _ in record["images"])]  # an older record has no parts
    prompt = "".join(_shown(next(images)) if part is None else escape(part) for part in parts)
    color = {True: "#2a9d4a", False: "#c8322b", None: "#999"}[record["right"]]
    scores = sorted(record["options"].items(), key=lambda pair: -pair[1])[:4]
    best = ", ".join(f"{escape(option)} {decimal(score)}" for option, score in scores)
    read = "unparsed" if record["read_as"] is None else record["read_as"]
    return (
        f"<div style='{ANSWER.format(color)}'><b>{escape(record['test'])}, {escape(record['group'])}</b> "
        f"{escape(str(record['id']))}<div>{prompt}</div><div>right answer: <b>{escape(record['expected'])}</b>; "
        f"written: <b>{escape(record['answer'])}</b>; read as {escape(read)}</div>"
        f"<div style='color:{INK}'>log-probability (nats): {best}</div></div>"
    )


def _shown(path: str) -> str:
    """The picture, or its name where the file has gone since."""
    return _picture(Path(path)) if Path(path).is_file() else f"[{escape(Path(path).name)}]"


def answers_html(records: list[dict], each: int = 1) -> str:
    """For each test and group the first `each` right and as many wrong answers to whole prompts."""
    chosen: dict[tuple, list[dict]] = {}
    for record in records:
        if record["drop"] == "none" and record["right"] is not None:
            chosen.setdefault((record["test"], record["group"], record["right"]), []).append(record)
    return "".join(answer_html(record) for found in chosen.values() for record in found[:each])
