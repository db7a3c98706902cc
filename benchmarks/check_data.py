"""Seconds to check 1,000 rows with 1,000 distinct 256-pixel images: `python benchmarks/check_data.py`."""

import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy
from PIL import Image

from mmrev_kit.config.reading import load_config
from mmrev_kit.data.checks import check_statements, encode_all
from mmrev_kit.data.faults import raise_faults
from mmrev_kit.data.rows import read_rows
from mmrev_kit.model.processor import make_encoder

ROWS, SIDE = 1000, 256


def write_rows(folder: Path, kind: str) -> Path:
    """Photograph-like pictures: smooth noise, which compresses about as a photograph does."""
    random = numpy.random.default_rng(0)
    records = []
    for number in range(ROWS):
        small = random.integers(0, 255, (32, 32, 3), dtype=numpy.uint8)
        picture = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        name = f"{number}.{kind}"
        picture.save(folder / name)
        records.append({"entity_id": number, "image_path": name, "description": f"the {number}", "connector": "is"})
    path = folder / "forward_train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def main() -> None:
    encoder = make_encoder(load_config("configs/tiny_cpu.yaml"))
    versions = f"Python {platform.python_version()}, Pillow {Image.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}")
    for kind in ("png", "jpg"):
        with tempfile.TemporaryDirectory() as folder:
            path = write_rows(Path(folder), kind)
            began = time.perf_counter()
            rows, faults = read_rows(path, "forward", "forward", {})
            samples, more = encode_all(rows, encoder)
            raise_faults(faults + check_statements(rows, encoder.looks) + more, drop=False)
            seconds = time.perf_counter() - began
            assert len(samples) == ROWS
            print(f"{kind}: {ROWS:,} rows, {ROWS:,} distinct {SIDE}-pixel images: {seconds:.2f} s")


if __name__ == "__main__":
    main()
