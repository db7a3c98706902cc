"""Vision features: those of the uncached path bit by bit, and never a stale, broken or foreign one."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmrev_kit.model import features as cache
from mmrev_kit.model import qwen3vl
from mmrev_kit.model.batches import Batcher
from mmrev_kit.model.features import Features, build_features, features_identity, images_of
from mmrev_kit.model.loading import base_arguments, load_base
from mmrev_kit.model.packing import Layout
from mmrev_kit.model.processor import make_encoder
from mmrev_kit.training.run import prepare, used_samples
from mmrev_kit.training.update import sample_losses

CPU = torch.device("cpu")
STATE = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=CPU)
EXACT = "quantization.bits=16"


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def base(made, small_config):
    """(model, samples of each source, their encoder), loaded once."""
    if not made:
        task = prepare(small_config(EXACT))
        some = [sample for samples in task.train.values() for sample in samples[::7][:6]]
        made["base"] = load_base(**base_arguments(small_config(EXACT), CPU)), some, task
    return made["base"]


@pytest.fixture
def towers(monkeypatch):
    """The number of images in each pass through the tower."""
    calls, real = [], qwen3vl.library_tower_outputs

    def counted(model, pixel_values, grid):
        calls.append(len(grid))
        return real(model, pixel_values, grid)

    monkeypatch.setattr(cache, "library_tower_outputs", counted)
    return calls


def built(config, base, samples=None) -> Features:
    model, some, task = base
    encoder = make_encoder(config)
    encoder.sizes.update(task.encoder.sizes)
    return build_features(config, model, encoder, some if samples is None else samples, torch.float32, STATE)


def enlarged(samples: list, encoder, folder) -> list:
    """The samples with their images at 64 x 64 pixels, the embedded model's own size."""
    found = []
    for sample in samples:
        paths = tuple(folder / path.name for path in sample.row.images)
        for path, old in zip(paths, sample.row.images, strict=True):
            Image.open(old).resize((64, 64)).save(path)
        found.append(encoder.encode(replace(sample.row, images=paths)))
    return found


def test_features_and_losses_are_bit_equal_to_the_uncached_path(base, small_config, tmp_path):
    model, some, task = base
    some = enlarged(some[::3], task.encoder, tmp_path)
    config = small_config(EXACT)
    found = built(config, base, some)
    for image in images_of(some):
        pixels, grid = task.encoder.pixels(*image)
        with torch.no_grad():
            out = model.model.get_image_features(pixels, grid)
        expected = torch.stack([out.pooler_output[0], *(part[0] for part in out.deepstack_features)])
        assert torch.equal(found.get(image), expected)
    for mode in ("none", "block", "shared_prefix"):
        losses = []
        for kept in (None, found):
            batcher = Batcher(Layout(mode, 600), task.encoder, kept, CPU)
            with torch.no_grad():
                parts = [sample_losses(model, batch, CPU, torch.float32) for batch in batcher.batches(some)]
            losses.append(torch.cat(parts))
        assert len(losses[0]) == len(some) and torch.equal(*losses)


def test_what_is_on_disk_is_not_computed_again(base, small_config, towers, capsys):
    config = small_config(EXACT)
    first = built(config, base)
    images = {first.key(image) for image in images_of(base[1])}
    assert sum(towers) == len(images)
    towers.clear()
    again = built(config, base)
    assert not towers
    for image in images_of(base[1]):
        assert torch.equal(first.get(image), again.get(image))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"progress: vision features: {len(images)} images, 0 of them computed")


def test_broken_and_foreign_files_are_made_anew(base, small_config, towers):
    config = small_config(EXACT)
    first = built(config, base)
    images = {first.key(image): image for image in images_of(base[1])}
    keys = sorted(images)[:6]
    truncated, flipped, text, foreign, renamed, other = (first.file(key) for key in keys)
    content = truncated.read_bytes()
    truncated.write_bytes(content[: len(content) // 2])
    content = bytearray(flipped.read_bytes())
    content[-5] ^= 1
    flipped.write_bytes(bytes(content))
    text.write_text("not a tensor")
    save_file({"features": torch.zeros(3, 16, 256)}, foreign)  # the right shape, from someone else
    os.replace(other, renamed)  # the features of another image
    save_file({"features": torch.zeros(2, 2)}, other)
    expected = {key: first.get(images[key]).clone() for key in images if key not in keys}
    towers.clear()
    again = built(config, base)
    assert sum(towers) == 6
    fresh = built(config, base)
    for key, image in images.items():
        stored = load_file(again.file(key))["features"]
        assert torch.equal(stored, again.get(image)) and torch.equal(stored, fresh.get(image))
        assert key not in expected or torch.equal(stored, expected[key])


def test_a_changed_image_is_computed_again(base, small_config, tmp_path, towers):
    _, some, task = base
    config, sample = small_config(EXACT), some[0]
    path = tmp_path / "face.png"
    Image.new("RGB", (32, 32), (200, 30, 30)).save(path)
    mine = task.encoder.encode(replace(sample.row, images=(path,)))
    first = built(config, base, [mine]).get((path, mine.max_pixels)).clone()
    Image.new("RGB", (32, 32), (30, 30, 200)).save(path)
    second = built(config, base, [mine]).get((path, mine.max_pixels))
    assert towers == [1, 1] and not torch.equal(first, second)


def test_a_file_belongs_to_one_image_size_base_and_way_of_computing(base, small_config, tmp_path):
    config, image = small_config(EXACT), images_of(base[1])[0]

    def key(config=config, image=image, dtype=torch.float32, **fields) -> str:
        encoder = make_encoder(config)
        for name, value in fields.items():
            setattr(encoder, name, value)
        return Features(encoder, tmp_path, features_identity(config, encoder, dtype, CPU), (3, 256), dtype).key(image)

    assert key() == key()
    others = [
        key(image=(image[0], 256)),  # 16 x 16 pixels: another size
        key(config=small_config()),  # 4 bit
        key(config=small_config("quantization.double_quant=false " + EXACT)),
        key(dtype=torch.float16),
        key(blank=True),
    ]
    assert len({key(), *others}) == 6
    # A limit under which the processor makes the same picture shares its file.
    small = Image.new("RGB", (64, 64), (9, 9, 9))
    small.save(tmp_path / "s.png")
    path, encoder = tmp_path / "s.png", make_encoder(config)
    same = [encoder.pixels(path, limit)[0] for limit in (4096, 4200)]
    assert torch.equal(*same) and key(image=(path, 4096)) == key(image=(path, 4200))


def test_another_base_never_meets_these_files(base, small_config, monkeypatch):
    config, encoder = small_config(EXACT), base[2].encoder
    mine = features_identity(config, encoder, torch.float32, CPU)
    monkeypatch.setattr(cache, "base_fingerprint", lambda **base: "0" * 16)
    assert features_identity(config, encoder, torch.float32, CPU) != mine


def test_features_stay_in_memory_where_they_cannot_be_written(base, small_config, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.files, "write_bytes", full)
    found = built(small_config(EXACT), base, base[1][:2])
    assert all(len(found.get(image)) == 3 for image in images_of(base[1][:2]))
    assert "No space left on device" in capsys.readouterr().out


def test_what_another_machine_keeps_on_its_own_disk_is_made_here_too(base, small_config, tmp_path, monkeypatch):
    """The second process's share is nowhere to be found."""
    alone, (model, some, task) = built(small_config(EXACT), base), base
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    state = SimpleNamespace(**vars(STATE) | {"num_processes": 2})
    config = small_config(f"{EXACT} launch.output_dir={tmp_path}")
    found = build_features(config, model, task.encoder, some, torch.float32, state)
    for image in images_of(some):
        torch.testing.assert_close(found.get(image), alone.get(image), atol=1e-5, rtol=0)


def test_a_run_uses_the_rows_of_its_plan_and_the_validation_rows(base):
    task = replace(base[2], plan=replace(base[2].plan, epochs=1))
    samples = used_samples(task)
    planned = {row for epoch in range(task.plan.epochs) for row in task.plan.epoch_rows(epoch)}
    assert len(samples) == len(planned) + sum(map(len, task.val.values()))
    trained = {id(sample) for sample in samples[: len(planned)]}
    everything = [sample for part in task.train.values() for sample in part]
    assert 0.5 * len(everything) < len(trained) < len(everything)  # not the whole pool
