"""What `peers.py` runs in a peer's own libraries: TRL's SFTTrainer, and Unsloth. Nothing of the kit is imported here.

Each peer loads the checkpoint once, as NF4 on a GPU, tries its settings on the first rows in short runs, and trains
with the fastest on the rows of each part. All that happens is told line by line in the job's file of events.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trl_rows import dataset_of, limit_pixels, lora_arguments, read_rows, same_tokens, training_arguments

GIB = 2**30
TRIED = 4  # updates of a short run, of which the last two count


def tell(job: dict, **event) -> None:
    """Append an event to the job's file, and print it."""
    line = json.dumps({"peer": job["peer"], **event})
    print(line, flush=True)
    with open(job["events"], "a") as file:
        file.write(line + "\n")


def nf4(job: dict):
    """The kit's own NF4: everything but the head; None on a CPU, where the weights stay as they are."""
    import torch
    from transformers import BitsAndBytesConfig

    if not job["cuda"]:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip


def start_adapter(model, job: dict) -> None:
    """Give the adapter the values with which the kit's began, whatever it has learned meanwhile."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    assert not set_peft_model_state_dict(model, load_file(job["adapter"])).unexpected_keys


def clean(job: dict) -> None:
    """Free what is not used, and begin to measure memory anew."""
    import torch

    gc.collect()
    if job["cuda"]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(trainer, job: dict) -> dict:
    """A whole training of a transformers Trainer.

    Returns:
        seconds and loss of each update, and the peaks in GiB of what was allocated and reserved on the GPU.
    """
    import torch
    from transformers import TrainerCallback

    marks, losses = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            if job["cuda"]:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **more):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    trainer.add_callback(Clock())
    clean(job)
    marks.append(time.perf_counter())
    trainer.train()
    found = {"seconds": [after - before for before, after in itertools.pairwise(marks)], "losses": losses}
    if job["cuda"]:
        found["allocated"] = torch.cuda.max_memory_allocated() / GIB
        found["reserved"] = torch.cuda.max_memory_reserved() / GIB
    return found


def try_settings(job: dict, build: Callable, settings: list[dict]) -> dict:
    """The fastest of the settings on the first rows.

    Raises:
        Exception: the last one's, where none of the settings runs.
    """
    rows, rates, error = read_rows(job["rows"]["forward"], TRIED * job["batch"]), [], None
    for own in settings:
        if rates and time.time() > job["try_until"]:
            tell(job, event="not tried", settings=own)
            continue
        try:
            trainer = build(rows, own)
            found = timed(trainer, job)
        except Exception as problem:  # a peer may fail in any way: its other settings are still worth knowing
            error = problem.with_traceback(None)  # which would keep the memory of the failed run
            tell(job, event="tried", settings=own, error=str(problem).strip().splitlines()[-1][:200])
        else:
            rates.append((job["batch"] / statistics.median(found["seconds"][-2:]), own))
            tell(job, event="tried", settings=own, rate=rates[-1][0], first=found["seconds"][0])
        trainer = None
        clean(job)
    if not rates:
        raise error
    return max(rates, key=lambda pair: pair[0])[1]


def run_peer(job: dict, build: Callable, settings: list[dict], before: float) -> None:
    """Choose settings, then train on each part.

    Args:
        build: from exported rows and settings to a Trainer.
        before: seconds that it took to load the model.
    """
    best = try_settings(job, build, settings)
    for part, path in job["rows"].items():
        rows, began = read_rows(path), time.perf_counter()
        trainer = build(rows, best)
        dataset, built = trainer.train_dataset, time.perf_counter() - began
        batch = trainer.data_collator([dataset[index] for index in range(4)])
        same = bool(best.get("padding_free")) or same_tokens(batch, rows[:4])  # which has one row of all
        found = timed(trainer, job) | {"before": before + built, "same tokens": same}
        tell(job, event="result", part=part, settings=best, **found)
        trainer = None


def worker_arguments(job: dict, settings: dict) -> dict:
    """What both peers are told of settings, the loader and the numbers' types."""
    return training_arguments(job, settings["micro"]) | {
        "gradient_checkpointing": bool(settings["checkpointing"]), "lr_scheduler_type": "constant",
        "bf16": job["cuda"], "use_cpu": not job["cuda"], "logging_strategy": "steps", "logging_steps": 1,
        "dataloader_num_workers": settings["workers"], "dataloader_persistent_workers": bool(settings["workers"]),
        "dataloader_pin_memory": job["cuda"],
    }  # fmt: skip


def settings_of(job: dict, micros: list[tuple[int, bool | str]]) -> Iterator[dict]:
    """Rows of a batch and checkpointing, most promising first; on a CPU the first alone, with few rows."""
    if not job["cuda"]:
        micros = [(job["batch"] // 2, micros[0][1])]
    for micro, checkpointing in micros:
        yield {"micro": micro, "checkpointing": checkpointing, "workers": job["workers"]}


def train_trl(job: dict, liger: bool = False) -> None:
    """TRL's SFTTrainer; its defaults where nothing is said, SDPA, and the kernels of Liger if asked for."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
    from trl import SFTConfig, SFTTrainer

    began = time.perf_counter()
    processor = limit_pixels(AutoProcessor.from_pretrained(job["model"]), job["pixels"])
    base = Qwen3VLForConditionalGeneration.from_pretrained(
        job["model"], dtype=torch.bfloat16 if job["cuda"] else torch.float32, attn_implementation="sdpa",
        quantization_config=nf4(job), device_map={"": 0 if job["cuda"] else "cpu"},
    )  # fmt: skip
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora_arguments(job)))
    before = time.perf_counter() - began

    def build(rows: list[dict], settings: dict) -> SFTTrainer:
        start_adapter(model, job)
        base.gradient_checkpointing_disable()  # what an earlier Trainer has set
        base.disable_input_require_grads()
        config = SFTConfig(**worker_arguments(job, settings), completion_only_loss=True, use_liger_kernel=liger)
        return SFTTrainer(model=model, args=config, train_dataset=dataset_of(rows), processing_class=processor)

    micros = [(32, False), (64, False), (16, False), (64, True), (32, True), (8, False)]
    run_peer(job, build, list(settings_of(job, micros)), before)


def train_unsloth(job: dict) -> None:
    """Unsloth's FastVisionModel with its own collator, over pictures in memory."""
    from unsloth import FastVisionModel, UnslothVisionDataCollator  # isort: skip  # it wants to be the first
    import torch
    from PIL import Image
    from trl import SFTConfig, SFTTrainer

    began = time.perf_counter()
    model, processor = FastVisionModel.from_pretrained(
        job["model"], load_in_4bit=job["cuda"], dtype=torch.bfloat16 if job["cuda"] else torch.float32,
        quantization_config=nf4(job), use_gradient_checkpointing="unsloth", max_seq_length=1024,
    )  # fmt: skip
    limit_pixels(processor, job["pixels"])
    model = FastVisionModel.get_peft_model(
        model, **lora_arguments(job), bias="none", use_gradient_checkpointing="unsloth", random_state=job["seed"]
    )
    before = time.perf_counter() - began

    def build(rows: list[dict], settings: dict) -> SFTTrainer:
        start_adapter(model, job)
        model._unsloth_gradient_checkpointing = settings["checkpointing"]  # what its trainer goes by
        config = SFTConfig(
            **worker_arguments(job, settings), remove_unused_columns=False, dataset_text_field="",
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        pictures = [row | {"images": [Image.open(path).convert("RGB") for path in row["images"]]} for row in rows]
        examples = [{name: row[name] for name in ("prompt", "completion", "images")} for row in pictures]
        padding_free = settings.get("padding_free", False)
        collator = UnslothVisionDataCollator(model, processor, resize="max", padding_free=padding_free)
        return SFTTrainer(model=model, args=config, train_dataset=examples, processing_class=processor,
                          data_collator=collator)  # fmt: skip

    micros = [(32, "unsloth"), (64, "unsloth"), (32, False), (16, "unsloth"), (16, False), (8, "unsloth")]
    settings = list(settings_of(job, micros))
    last = settings[0] | {"padding_free": True}  # which changes the model for good
    run_peer(job, build, [*settings, last], before)


def main() -> None:
    kind, path = sys.argv[1:]
    job = json.loads(Path(path).read_text())
    {"trl": train_trl, "liger": lambda job: train_trl(job, liger=True), "unsloth": train_unsloth}[kind](job)


if __name__ == "__main__":
    main()
