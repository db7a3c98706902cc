"""Prompts, token by token, against the processor's own output."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmrev_kit.config import load_config
from mmrev_kit.data import DataError, Row, load_run_data, read_rows
from mmrev_kit.images import load_image
from mmrev_kit.loading import make_encoder
from mmrev_kit.prompts import IGNORED, Encoder, build_prompt, encode_all

QUESTION = "Only answer A, B, C, or D."


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return make_encoder(load_config("configs/tiny_cpu.yaml"))


@pytest.fixture(scope="module")
def rows(small_data) -> dict[str, Row]:
    """One row of each task of the small experiment."""
    files = {
        "forward": "forward_train",
        "reverse": "reverse_train",
        "mcq_i2d": "mcq_i2d_test",
        "mcq_d2i": "mcq_d2i_test",
    }
    return {
        task: read_rows(small_data / "small" / f"{file}.jsonl", task, task, {})[0][0] for task, file in files.items()
    }


def row(task: str, **fields) -> Row:
    base = {
        "source": task, "where": "f:1", "entity_id": "e", "group": None, "images": (Path("a.png"),),
        "description": "the keeper of Jade Temple", "connector": "is", "choices": (), "answer": "x",
    }  # fmt: skip
    return Row(task=task, **(base | fields))


def test_prompts_read_as_specified_with_the_description_before_the_image():
    a, b, c, d = (Path(f"{name}.png") for name in "abcd")
    assert build_prompt(row("forward")) == [a, " is"]
    assert build_prompt(row("reverse", connector="belongs to")) == [
        "the keeper of Jade Temple belongs to ", a, ", correct or wrong? Only answer Correct or Wrong.",
    ]  # fmt: skip
    assert build_prompt(row("mcq_i2d", choices=("p", "q", "r", "s"))) == [a, f" is? A. p B. q C. r D. s {QUESTION}"]
    assert build_prompt(row("mcq_d2i", connector="matches", images=(a, b, c, d))) == [
        "the keeper of Jade Temple matches? A. ", a, " B. ", b, " C. ", c, " D. ", d, f" {QUESTION}",
    ]  # fmt: skip


@pytest.mark.parametrize("task", ["forward", "reverse", "mcq_i2d", "mcq_d2i"])
def test_tokens_and_pixels_equal_the_processors_own(encoder, rows, task):
    example = rows[task]
    content = [
        {"type": "image"} if isinstance(part, Path) else {"type": "text", "text": part}
        for part in build_prompt(example)
    ]
    turns = [{"role": "user", "content": content}]
    text = encoder.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    pictures = [load_image(path) for path in example.images]
    expected = encoder.processor(text=[text + example.answer + "<|im_end|>"], images=pictures, return_tensors="pt")
    batch = encoder.collate([encoder.encode(example)])
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw"):
        assert torch.equal(batch[name], expected[name].to(batch[name].dtype)), name
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"])


def test_labels_are_the_answer_and_its_end_and_nothing_else(encoder, rows):
    samples = [encoder.encode(example) for example in rows.values()]
    batch = encoder.collate(samples)
    for index, example in enumerate(rows.values()):
        kept = batch["labels"][index][batch["labels"][index] != IGNORED]
        assert encoder.tokenizer.decode(kept) == example.answer + "<|im_end|>"
    prompt = encoder.encode(rows["forward"], with_answer=False)
    assert prompt.input_ids == samples[0].input_ids[: samples[0].answer_start]


def test_text_that_looks_like_a_placeholder_stays_text(encoder, rows):
    strange = replace(rows["reverse"], description="the <|image_pad|> of <|im_end|> Café ☃")
    sample = encoder.encode(strange)
    plain = encoder.encode(rows["reverse"])
    assert sample.input_ids.count(encoder.image_id) == plain.input_ids.count(encoder.image_id)
    assert sample.input_ids.count(encoder.end_id) == plain.input_ids.count(encoder.end_id)
    assert "the <|image_pad|> of <|im_end|> Café ☃" in encoder.tokenizer.decode(sample.input_ids)


def write_image(path: Path, width: int, height: int) -> Path:
    Image.new("RGB", (width, height), "teal").save(path)
    return path


@pytest.mark.parametrize("size", [(64, 64), (20, 20), (300, 40), (17, 90), (513, 511), (128, 128)])
def test_visual_tokens_are_counted_as_the_processor_does(encoder, tmp_path, size):
    path = write_image(tmp_path / "i.png", *size)
    sample = encoder.encode(row("forward", images=(path,)))
    grid = encoder.processor.image_processor(images=[load_image(path)], return_tensors="pt")["image_grid_thw"][0]
    assert sample.image_tokens == grid.prod().item() // 4
    assert encoder.pixels(path, sample.max_pixels)[1][0].tolist() == grid.tolist()


def test_several_images_are_scaled_down_together_until_the_prompt_fits(tmp_path):
    config = load_config("configs/tiny_cpu.yaml", "training.max_length=200")
    encoder = make_encoder(config)
    images = tuple(write_image(tmp_path / f"{name}.png", 128, 128) for name in "abcd")  # 64 tokens each at full size
    sample = encoder.encode(row("mcq_d2i", images=images, answer="A"))
    assert len(sample.input_ids) <= 200
    assert sample.input_ids.count(encoder.image_id) == sample.image_tokens
    batch = encoder.collate([sample])
    # what the model will be given fits what the text says: patches merged two by two
    assert batch["image_grid_thw"].prod(1).sum().item() // 4 == sample.image_tokens
    # 128 x 128 at the limit found: as large as the room allows, square, a whole number of tokens a side
    text = len(sample.input_ids) - sample.image_tokens
    side = int(((200 - text) // 4) ** 0.5)
    assert sample.image_tokens == 4 * side * side


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused_with_its_line(small_config):
    config = small_config("training.max_length=20")
    encoder = make_encoder(config)
    data = load_run_data(config)
    with pytest.raises(DataError, match=r"forward_train.jsonl:1: .* training.max_length = 20") as error:
        encode_all(data.train["forward"], encoder)
    assert len(error.value.faults) == len(data.train["forward"])


def test_a_truncated_image_is_named_before_any_model_is_loaded(encoder, tmp_path):
    records = []
    for number in range(8):
        path = write_image(tmp_path / f"{number}.jpg", 64, 64)
        records.append({"entity_id": number, "image_path": path.name, "description": "d", "connector": "is"})
    (tmp_path / "6.jpg").write_bytes((tmp_path / "6.jpg").read_bytes()[: (tmp_path / "6.jpg").stat().st_size // 2])
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    found, faults = read_rows(file, "forward", "forward", {})
    assert not faults
    with pytest.raises(DataError, match=r"rows.jsonl:7: .*6.jpg") as error:
        encode_all(found, encoder)
    assert len(error.value.faults) == 1
