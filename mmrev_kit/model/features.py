"""The frozen vision tower's outputs, computed once: in memory and in safetensors files, one an image and size.

The files lie in `<launch.output_dir>/features` and may be deleted at any time. A file's name is a digest of all that
its content depends on: the bytes of the image file, the size it is scaled to, the processor's settings, the base
model and its quantization, the compute dtype and the kind of device, and the versions of the libraries in between. So
a changed image, pixel limit or base never meets a stale entry; a file that is broken or that someone else put there
is made anew. Files are read as memory maps: the processes of a machine share one copy in the page cache.
"""

import hashlib
import json
import math
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from mmrev_kit import files
from mmrev_kit.config.project import resolve
from mmrev_kit.config.reporting import MARK, Pace
from mmrev_kit.config.sections import Config
from mmrev_kit.data.prompts import Encoder, Sample
from mmrev_kit.model.bases import base_fingerprint, base_of
from mmrev_kit.model.finite import is_finite, refuse
from mmrev_kit.model.micro_batch import VISION_PATCHES
from mmrev_kit.model.qwen3vl import feature_shape, library_tower_outputs

FORMAT = 1  # to be raised when the tower's outputs are computed or written in another way
LIBRARIES = ("torch", "torchvision", "transformers", "pillow", "bitsandbytes")
SECONDS_BEFORE_LINES = 5.0
HEADER, BLOCK = 2048, 4096  # bytes: at most of a file's own description; of a disk's block
Image = tuple[Path, int]  # a file and the pixel limit of the row that it is in


def features_identity(config: Config, encoder: Encoder, dtype, device) -> str:
    """All that a feature depends on beside its image, as text."""
    processor = encoder.processor.image_processor
    facts = {
        "format": FORMAT,
        "processor": {key: value for key, value in processor.to_dict().items() if key != "size"},
        "blank": encoder.blank,
        "base": base_fingerprint(**base_of(config)),
        "quantization": [config.quantization.bits, config.quantization.double_quant],
        "attention": config.model.attn_implementation,
        "dtype": str(dtype),
        "device": device.type,
        "versions": {name: version(name) for name in LIBRARIES},
    }
    return json.dumps(facts, sort_keys=True, default=str)


class Features:
    """Features by image; `get` never computes.

    Args:
        folder: where the files are.
        identity: from `features_identity`.
        shape: (1 + DeepStack layers, hidden) of every feature.
    """

    def __init__(self, encoder: Encoder, folder: Path, identity: str, shape: tuple[int, int], dtype):
        self.encoder, self.folder, self.identity = encoder, Path(folder), identity
        self.shape, self.dtype = shape, dtype
        self._digests: dict[Path, str] = {}
        self._keys: dict[Image, str] = {}
        self._held: dict[str, object] = {}

    def size(self, image: Image) -> tuple[int, int]:
        """Visual tokens (rows, columns): all that a pixel limit decides."""
        path, limit = image
        return self.encoder.grid(self.encoder.image_size(path), limit)

    def key(self, image: Image) -> str:
        """40 hex digits: the name of the image's file. The image file is read once."""
        if image not in self._keys:
            path, _ = image
            if path not in self._digests:
                self._digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
            text = f"{self.identity}\n{self._digests[path]}\n{self.size(image)}"
            self._keys[image] = hashlib.sha256(text.encode()).hexdigest()[:40]
        return self._keys[image]

    def file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, image: Image):
        """The (1 + DeepStack layers, visual tokens, hidden) features of an image, on the CPU.

        Raises:
            KeyError: they have not been made.
        """
        return self._held[self.key(image)]

    def read(self, image: Image) -> bool:
        """Take an image's features from its file; False where there is no file that can be trusted."""
        from safetensors import SafetensorError, safe_open

        key = self.key(image)
        if key in self._held:
            return True
        try:
            with safe_open(self.file(key), framework="pt") as stored:
                facts = stored.metadata() or {}
                tensor = stored.get_tensor("features")
        except (SafetensorError, OSError):
            return False
        rows, columns = self.size(image)
        wanted = (self.shape[0], rows * columns, self.shape[1])
        if tuple(tensor.shape) != wanted or tensor.dtype != self.dtype:
            return False
        if facts.get("key") != key or facts.get("checksum") != checksum(tensor) or not is_finite(tensor):
            return False
        self._held[key] = tensor
        return True

    def write(self, image: Image, tensor) -> None:
        """Write an image's features to their file; where that cannot be done they stay in memory."""
        from safetensors.torch import save

        key = self.key(image)
        tensor = tensor.to("cpu", self.dtype).contiguous()
        facts = {"key": key, "checksum": checksum(tensor), "identity": self.identity}
        try:
            files.write_bytes(self.file(key), save({"features": tensor}, facts), sync=False)
        except OSError as error:
            print(f"vision features are not written to {self.folder}: {error.strerror}", flush=True)
            self._held[key] = tensor


def bytes_to_write(
    config: Config, encoder: Encoder, samples: Iterable[Sample], shape: tuple[int, int], dtype, device
) -> int:
    """What `build_features` will write for these samples, in the disk's blocks; features that are there need nothing.

    Args:
        shape: as in `Features`.
    """
    folder = resolve(config.launch.output_dir) / "features"
    features = Features(encoder, folder, features_identity(config, encoder, dtype, device), shape, dtype)
    sizes = {features.key(image): math.prod(features.size(image)) for image in images_of(samples)}
    each = [
        HEADER + shape[0] * tokens * shape[1] * dtype.itemsize
        for key, tokens in sizes.items()
        if not features.file(key).is_file()
    ]
    return sum(math.ceil(size / BLOCK) * BLOCK for size in each)


def bytes_expected(config: Config, shapes, folders: Iterable[Path]) -> int:
    """About what `bytes_to_write` will say, from the sizes of all pictures in the data's folders alone, before a row is
    read; what is in the folder of features already is taken off.

    Args:
        shapes: a `memory.shapes.ModelShapes`.
    """
    from PIL import Image

    tokens, kept = 0, resolve(config.launch.output_dir) / "features"
    token = shapes.v_patch_values * shapes.v_merge // 6  # pixels of a visual token: 3 colours, 2 frames
    for path in (path for folder in folders for path in folder.rglob("*")):
        with suppress(OSError, ValueError), Image.open(path) as image:
            pixels = image.width * image.height
            tokens += min(config.model.max_pixels, max(config.model.min_pixels, pixels)) // token
    size = 2 if config.quantization.compute_dtype in ("fp16", "bf16") else 4
    there = sum(file.stat().st_size for file in kept.rglob("*.safetensors"))
    return max(0, tokens * (1 + shapes.v_deepstack) * shapes.hidden_size * size - there)


def checksum(tensor) -> str:
    """A CRC-32 of a tensor's bytes."""
    return f"{zlib.crc32(memoryview(tensor.contiguous().view(torch.uint8).flatten().numpy())):08x}"


def images_of(samples: Iterable[Sample]) -> list[Image]:
    """The distinct images of samples, in their order."""
    return list(dict.fromkeys((path, sample.max_pixels) for sample in samples for path in sample.row.images))


def compute(features: Features, model, images: list[Image], device, report: bool) -> None:
    """Put images through the tower, batch by batch, and keep what comes out.

    Args:
        report: print lines of progress where it takes more than a few seconds.

    Raises:
        NotFiniteError: naming the image and the first module.
    """
    dtype, done, pace = features.dtype, 0, Pace(len(images), "images")
    while done < len(images):
        pixels, grids = [], []
        for image in images[done:]:
            values, grid = features.encoder.pixels(*image)
            pixels.append(values)
            grids.append(grid)
            if sum(map(len, pixels)) >= VISION_PATCHES:
                break
        inputs = torch.cat(pixels).to(device), torch.cat(grids).to(device)
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = [tensor.to(dtype) for tensor in library_tower_outputs(model, *inputs)]
            for image, tensor in zip(images[done : done + len(pixels)], outputs, strict=True):
                if not is_finite(tensor):
                    refuse(model, f"image {image[0]}", partial(library_tower_outputs, model, *inputs))
                features.write(image, tensor)
        done += len(pixels)
        if report and pace.due(done) and pace.elapsed > SECONDS_BEFORE_LINES:
            print(f"{MARK}vision features: {pace.line(done)}", flush=True)


def build_features(config: Config, model, encoder: Encoder, samples: Iterable[Sample], dtype, state) -> Features:
    """Features of all images of `samples`, from files where there are any; each process (`accelerate.PartialState`)
    makes its share of the rest with the base model's vision tower."""
    folder = resolve(config.launch.output_dir) / "features"
    features = Features(
        encoder, folder, features_identity(config, encoder, dtype, state.device), feature_shape(model), dtype
    )
    by_key = {features.key(image): image for image in images_of(samples)}
    images, began = list(by_key.values()), time.perf_counter()
    missing = [image for image in images if not features.read(image)]
    if state.num_processes > 1:
        torch.distributed.barrier()  # every process has looked before the first file is written
    was_training = model.training
    model.eval()
    mine = missing[state.process_index :: state.num_processes]
    compute(features, model, mine, state.device, report=state.is_main_process)
    if state.num_processes > 1:
        torch.distributed.barrier()
    left = [image for image in missing if not features.read(image)]  # those of other machines, without a shared disk
    compute(features, model, left, state.device, report=False)
    for image in left:
        features.read(image)
    model.train(was_training)
    if state.is_main_process:
        line = f"vision features: {len(images):,} images, {len(missing):,} of them computed"
        print(f"{MARK}{line}, {time.perf_counter() - began:.1f} s", flush=True)
    return features
