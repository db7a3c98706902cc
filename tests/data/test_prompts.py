"""Prompts, token by token, against the processor's own output."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.images import load_image
from mmrev_kit.data.prompts import IGNORED, Encoder, PromptError, describe_lengths
from mmrev_kit.data.rows import read_rows
from mmrev_kit.data.tasks import Row, build_prompt
from mmrev_kit.model.processor import make_encoder

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


def test_text_that_looks_like_an_added_token_stays_text(rows):
    """The published tokenizers add tokens that are not special, which `split_special_tokens` lets through."""
    encoder = make_encoder(load_config("configs/tiny_cpu.yaml"))
    words = ("<think>", "</think>", "<tool_call>")
    assert encoder.tokenizer.add_tokens(list(words)) == 3
    added = set(encoder.tokenizer.convert_tokens_to_ids(list(words)))
    text = "the keeper of <think> Hall </think><tool_call>"
    assert added <= set(encoder.tokenizer(text, split_special_tokens=True).input_ids)
    sample = encoder.encode(replace(rows["reverse"], description=text))
    assert not added & set(sample.input_ids) and text in encoder.tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize(
    "text", ["the keeper of Jade Temple", "größer ☃ 東京 \U0001f600\n\t", " A", "Correct", "x  y\u0301"]
)
def test_other_text_has_the_tokenizers_own_tokens(encoder, text):
    assert encoder.text_ids(text) == encoder.tokenizer(text, add_special_tokens=False).input_ids


# What the published template of the thinking models writes around a last answer, without tools and systems.
THINKING = """
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}{{- '<think>\\n' + '' + '\\n</think>\\n\\n' + message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""


@pytest.mark.parametrize("task", ["forward", "reverse", "mcq_i2d", "mcq_d2i"])
def test_a_template_that_opens_a_thought_gets_it_empty_and_closed(rows, task):
    """In training as the template itself writes an answered turn, and in evaluation the same prompt."""
    encoder, example = make_encoder(load_config("configs/tiny_cpu.yaml")), rows[task]
    encoder.processor.chat_template = THINKING
    content = [
        {"type": "image"} if isinstance(part, Path) else {"type": "text", "text": part}
        for part in build_prompt(example)
    ]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": example.answer}]
    text = encoder.processor.apply_chat_template(turns, tokenize=False).removesuffix("\n")
    pictures = [load_image(path) for path in example.images]
    expected = encoder.processor(text=[text], images=pictures).input_ids[0]
    sample = encoder.encode(example)
    assert encoder.tokenizer.decode(sample.input_ids) == encoder.tokenizer.decode(expected)
    prompt = encoder.encode(example, with_answer=False)
    assert encoder.tokenizer.decode(prompt.input_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert prompt.input_ids == sample.input_ids[: sample.answer_start]


def test_a_template_that_leaves_a_thought_open_otherwise_is_refused(rows):
    encoder = make_encoder(load_config("configs/tiny_cpu.yaml"))
    encoder.processor.chat_template = THINKING.replace("assistant\\n<think>\\n", "assistant\\n<think>\\nOkay, ")
    with pytest.raises(ConfigError, match=r"chat template of \S+embedded begins a thought and leaves it open"):
        encoder.encode(rows["forward"])


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


def test_lengths_are_told_of_the_rows_that_are_used(rows, tmp_path):
    """Rows of two tasks; answers of 2 and of 4 tokens, the end counted, are 3 a row. Four pictures are scaled down."""
    encoder = make_encoder(load_config("configs/tiny_cpu.yaml", "training.max_length=200"))
    images = tuple(write_image(tmp_path / f"{name}.png", 128, 128) for name in "abcd")
    large = encoder.encode(row("mcq_d2i", images=images, answer="A"))
    answer = encoder.tokenizer.decode(encoder.tokenizer("the keeper of Jade Temple").input_ids[:3])
    small = encoder.encode(row("forward", images=images[:1], answer=answer))
    assert [len(one.input_ids) - one.answer_start for one in (large, small)] == [2, 4]
    assert describe_lengths([small, large], encoder) == [
        f"2 rows of at most {len(large.input_ids)} tokens (mcq_d2i), 3.0 answer tokens a row; max_length 200",
        "1 mcq_d2i rows have their images scaled down to fit max_length 200",
    ]
    assert len(describe_lengths([small], encoder)) == 1


def test_images_are_never_cut_where_even_small_ones_do_not_fit(tmp_path):
    config = load_config("configs/tiny_cpu.yaml", "training.max_length=60")
    images = tuple(write_image(tmp_path / f"{name}.png", 128, 128) for name in "abcd")
    with pytest.raises(PromptError, match=r"training.max_length = 60, even with images scaled down"):
        make_encoder(config).encode(row("mcq_d2i", images=images, answer="A"))


def test_the_guides_limits_hold_four_images_only_when_scaled_down(encoder, tmp_path):
    """Four 448 x 448 images are 4 x 196 tokens at 32 pixels a token; 512 cannot hold them with any text."""
    large = Encoder(encoder.processor, 65_536, 200_704, 512)
    large.factor = 32  # Qwen3-VL's patch of 16, merged two by two
    images = tuple(write_image(tmp_path / f"{name}.png", 448, 448) for name in "abcd")
    sample = large.encode(row("mcq_d2i", images=images, answer="A"))
    text = len(sample.input_ids) - sample.image_tokens
    side = int(((512 - text) // 4) ** 0.5)
    assert sample.image_tokens == 4 * side**2 < 4 * 196 and len(sample.input_ids) <= 512
    assert large.encode(row("forward", images=images[:1])).image_tokens == 14 * 14


def test_a_picture_that_the_processor_refuses_is_told(encoder, tmp_path):
    with pytest.raises(PromptError, match=r"long.png is 2010 x 10 pixels: one side is over 200 times the other"):
        encoder.encode(row("forward", images=(write_image(tmp_path / "long.png", 2010, 10),)))
    assert encoder.encode(row("forward", images=(write_image(tmp_path / "just.png", 2000, 10),))).image_tokens > 0


def test_the_orientation_that_a_camera_notes_is_honoured(encoder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.new("RGB", (96, 32), "teal").save(tmp_path / "turned.jpg", exif=exif)
    sample = encoder.encode(row("forward", images=(tmp_path / "turned.jpg",)))
    assert encoder.image_size(tmp_path / "turned.jpg") == (32, 96)
    assert encoder.pixels(tmp_path / "turned.jpg", sample.max_pixels)[1][0].tolist() == [1, 12, 4]  # 8-pixel patches
