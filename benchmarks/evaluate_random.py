"""Evaluation speed and memory of a published architecture with random weights, on one GPU.

`python benchmarks/evaluate_random.py configs/models/qwen3vl_2b.json`: about 1,000 prompts of the four tests, with
448-pixel images, greedy answers of at most 32 tokens and the log-probability of every option; then a tenth of them.
"""

import json
import sys
import tempfile

from mmrev_kit.config.reading import load_config
from mmrev_kit.data.make import ensure_data
from mmrev_kit.notebook.launch import evaluate

BITS = (4, 16)


def measure(folder: str, architecture: str, people: int, bits: int) -> dict:
    """Facts of one evaluation; 15 prompts a person."""
    config = load_config(
        None,
        f"model.name={architecture} experiment.name=people{people} data.dir={folder} data.num_main={people} "
        f"data.image_size=448 retention.retention_ratio=0 quantization.bits={bits} quantization.compute_dtype=bf16 "
        f"launch.num_processes=1 launch.output_dir={folder}/outputs evaluation.batch_size=16 training.max_length=1024",
    )
    ensure_data(config)
    return json.loads((evaluate(config, None) / "facts.json").read_text())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for bits in BITS:
            for people in (7, 67):
                facts = measure(folder, sys.argv[1], people, bits)
                print(
                    f"{sys.argv[1]} {bits} bits: {facts['prompts']:,} prompts, {facts['prompts_per_second']:.2f} "
                    f"prompts/s, peak {facts['peak_memory_gib']:.2f} GiB, {facts['device']}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
