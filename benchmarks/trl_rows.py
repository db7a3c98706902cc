"""Rows of the kit for other trainers, and what `trl_cpu.py` and `peers.py` tell TRL alike.

Nothing of the kit is imported here: the environments of other trainers do not have it.
"""

from __future__ import annotations

import json
from pathlib import Path


def exported(encoder, sample) -> dict:
    """A sample as other trainers take it: a prompt that is rendered already, its completion, its pictures.

    Args:
        encoder: `mmrev_kit.data.prompts.Encoder`, with which the sample was made.

    Returns:
        prompt, completion, images (paths), and what must come of them: tokens, of which answer_tokens carry loss.
    """
    content = [{"type": "image"} if isinstance(part, Path) else {"type": "text", "text": part}
               for part in encoder.parts(sample.row)]  # fmt: skip
    prompt = encoder.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    row = {"prompt": prompt, "completion": f"{sample.row.answer}<|im_end|>"}
    row |= {"images": [str(path) for path in sample.row.images], "tokens": len(sample.input_ids)}
    return row | {"answer_tokens": len(sample.input_ids) - sample.answer_start}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: str | Path, limit: int | None = None) -> list[dict]:
    """The exported rows of a file, or its first `limit`."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()][:limit]


def dataset_of(rows: list[dict]):
    """Exported rows as TRL's prompt-completion data set with pictures."""
    from datasets import Dataset, Features, Image, List, Value

    features = Features({"prompt": Value("string"), "completion": Value("string"), "images": List(Image())})
    return Dataset.from_list([{name: row[name] for name in features} for row in rows], features=features)


def limit_pixels(processor, pixels: list[int]):
    """The processor, scaling pictures to [least, most] pixels."""
    processor.image_processor.size = dict(zip(("shortest_edge", "longest_edge"), pixels, strict=True))
    return processor


def lora_arguments(job: dict) -> dict:
    """LoRA's numbers of a job, as `peft.LoraConfig` names them."""
    return {"r": job["r"], "lora_alpha": job["alpha"], "lora_dropout": job["dropout"], "target_modules": job["targets"]}


def training_arguments(job: dict, micro: int) -> dict:
    """What every trainer is told: one pass over the rows in their order, in updates of job["batch"] made of batches of
    `micro` rows; nothing is saved, validated or reported."""
    return {
        "output_dir": job["output"], "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": job["batch"] // micro, "num_train_epochs": 1,
        "learning_rate": job["learning_rate"], "weight_decay": job["weight_decay"],
        "max_grad_norm": job["max_grad_norm"], "max_length": None, "save_strategy": "no", "eval_strategy": "no",
        "report_to": "none", "seed": job["seed"], "disable_tqdm": True, "train_sampling_strategy": "sequential",
    }  # fmt: skip


def same_tokens(batch: dict, rows: list[dict]) -> bool:
    """Whether a trainer's batch has as many tokens as the kit's, row by row, and loss on as many of them."""
    lengths, answers = batch["attention_mask"].sum(1).tolist(), (batch["labels"] != -100).sum(1).tolist()
    return lengths == [row["tokens"] for row in rows] and answers == [row["answer_tokens"] for row in rows]
