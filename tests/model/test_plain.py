"""The plain path: four other families, each row against the library's own processing and loss of that row alone."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmrev_kit.config.project import EMBEDDED_MODEL
from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.plain import PlainEncoder
from mmrev_kit.data.prompts import IGNORED, PromptError
from mmrev_kit.data.tasks import Row, build_prompt
from mmrev_kit.memory.plan import plan_or_refuse
from mmrev_kit.model.batches import Batcher, make_layout, obstacle
from mmrev_kit.model.bases import base_fingerprint
from mmrev_kit.model.loading import add_adapter, load_base, trainable
from mmrev_kit.model.plain import LORA_TARGETS, language_model
from mmrev_kit.model.processor import load_processor, make_encoder
from mmrev_kit.model.scoring import generate, score_options
from mmrev_kit.training.preflight import preflight
from mmrev_kit.training.rehearse import Rehearsal
from mmrev_kit.training.run import prepare
from mmrev_kit.training.update import sample_losses
from families import FAMILIES, SMOL

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[2]
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=str)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Four pictures of noise, three sizes."""
    folder, random = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    paths = [folder / f"{number}.png" for number in range(4)]
    for path, (width, height) in zip(paths, [(64, 64), (48, 80), (64, 64), (100, 40)], strict=True):
        noise = torch.randint(0, 255, (height, width, 3), generator=random, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
    return paths


@pytest.fixture(scope="module")
def rows(pictures) -> list[Row]:
    """One of each order of texts and pictures, of different lengths."""
    jade, gold = "the keeper of Jade Temple", "the smith of Gold Bay"
    return [
        Row("forward", "forward", "f:1", "a", "main", (pictures[0],), jade, "is", (), jade),
        Row("cw_image", "cw_image", "f:2", "a", "main", (pictures[1],), jade, "is", (), "Wrong"),
        Row("reverse", "reverse", "f:3", "b", "control", (pictures[3],), gold, "looks like", (), "Correct"),
        Row("mcq_d2i", "mcq_d2i", "f:4", "b", "control", tuple(pictures), gold, "looks like", (), "C"),
    ]


def encoder_of(family, folder: Path, max_length: int = 600) -> PlainEncoder:
    encoder = make_encoder(
        load_config("configs/tiny_cpu.yaml", f"model.name={folder} {family.settings} training.max_length={max_length}")
    )
    assert type(encoder) is PlainEncoder
    return encoder


def by_the_library(family, folder: Path, row: Row) -> dict:
    """A row as the library's own chat processing makes it, question and answer; labels on the answer and its end."""
    processor = AutoProcessor.from_pretrained(folder)
    parts = [
        {"type": "image", "image": Image.open(part).convert("RGB")}
        if isinstance(part, Path)
        else {"type": "text", "text": part}
        for part in build_prompt(row)
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": row.answer}]}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}, answer], tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"images_kwargs": family.shown},
    )  # fmt: skip
    *_, end, _ = inputs["input_ids"][0].tolist()  # the template writes a line break after what ends an answer
    ending = [*processor.tokenizer(family.before + row.answer, add_special_tokens=False).input_ids, end]
    assert processor.tokenizer.decode([end]) in ("<|im_end|>", "<end_of_utterance>")
    ids = inputs["input_ids"][:, :-1]
    assert ids[0, -len(ending) :].tolist() == ending
    cut = {name: value[:, :-1] for name, value in inputs.items() if value.shape == inputs["input_ids"].shape}
    labels = torch.full_like(ids, IGNORED)
    labels[0, -len(ending) :] = ids[0, -len(ending) :]
    return dict(inputs) | cut | {"labels": labels}


@each_family
def test_rows_are_the_librarys_token_for_token_and_pixel_for_pixel(family, family_folder, rows):
    folder = family_folder(family)
    encoder = encoder_of(family, folder)
    for row in rows:
        sample, expected = encoder.encode(row), by_the_library(family, folder, row)
        batch = encoder.collate([sample])
        assert batch.keys() == expected.keys() and len(batch["input_ids"][0]) == len(sample.input_ids)
        for name, value in expected.items():
            assert torch.equal(batch[name], value), name
        prompt = encoder.encode(row, with_answer=False)
        assert prompt.input_ids == sample.input_ids[: sample.answer_start]
        assert (batch["labels"][0] != IGNORED).nonzero()[0].item() == sample.answer_start


@each_family
@pytest.mark.parametrize("pad_left", [True, False])
def test_a_batch_is_what_the_processor_makes_of_several_rows(family, family_folder, rows, pad_left):
    encoder = encoder_of(family, family_folder(family))
    samples = [encoder.encode(row) for row in rows]
    images = [[Image.open(path).convert("RGB") for path in row.images] for row in rows]
    side = {"padding_side": "left" if pad_left else "right"}
    expected = encoder.processor(
        text=[encoder.texts(row)[1] for row in rows], images=images, padding=True, text_kwargs=side,
        images_kwargs=family.shown, return_tensors="pt",
    )  # fmt: skip
    batch = encoder.collate(samples, pad_left)
    labels = batch.pop("labels")
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    assert [labels[number][labels[number] != IGNORED].tolist() for number in range(4)] == [
        list(sample.input_ids[sample.answer_start :]) for sample in samples
    ]


def with_adapter(family, folder: Path, bits: int):
    """The base with a LoRA adapter that changes something."""
    base = load_base(str(folder), bits=bits, compute_dtype="fp32", device="cpu")
    torch.manual_seed(0)
    targets = LORA_TARGETS[family.name].split(", ")
    model = add_adapter(base, target_modules=targets, dropout=0.0, gradient_checkpointing=bits == 4)
    for parameter in trainable(model):
        torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("bits", [16, 4])
@each_family
def test_each_rows_loss_is_the_librarys_own_on_that_row_alone(family, family_folder, rows, bits):
    """And the adapter alone is trained, in every layer of the language model and nowhere else."""
    folder = family_folder(family)
    model, encoder = with_adapter(family, folder, bits), encoder_of(family, folder)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    inside = {id(parameter) for parameter in language_model(model).parameters()}
    assert len(names) == 2 * family.lora and all(id(parameter) in inside for parameter in trainable(model))
    assert len({re.search(r"\.layers\.(\d+)\.", name)[1] for name in names}) == len(language_model(model).layers)
    assert not any(type(module).__module__.startswith("mmrev_kit") for module in model.modules())

    assert re.fullmatch(rf"{family.name} has no module of its own and takes the plain path", obstacle(model))
    config = load_config("configs/tiny_cpu.yaml")
    batcher = Batcher(make_layout(config, model, CPU), encoder, None, CPU)
    samples = [encoder.encode(row) for row in rows]
    (batch,) = batcher.batches(samples)  # the four rows side by side
    model.eval()
    with torch.no_grad():
        losses = sample_losses(model, batch, CPU, torch.float32)
        alone = [model(**by_the_library(family, folder, row)).loss for row in rows]
    assert torch.allclose(losses, torch.stack(alone), atol=2e-6, rtol=0)
    assert len({round(loss, 3) for loss in losses.tolist()}) == len(rows)
    sample_losses(model.train(), batch, CPU, torch.float32).mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable(model))


@each_family
def test_a_rows_loss_depends_on_its_picture(family, family_folder, rows):
    """So that the comparison above is not one of text alone."""
    folder = family_folder(family)
    model = load_base(str(folder), bits=16, compute_dtype="fp32", device="cpu").eval()
    losses = []
    for drop in ("none", "image"):
        config = load_config("configs/tiny_cpu.yaml", f"model.name={folder} {family.settings}")
        encoder = make_encoder(config, drop)
        with torch.no_grad():
            losses.append(sample_losses(model, encoder.collate([encoder.encode(rows[0])]), CPU, torch.float32).item())
    assert abs(losses[0] - losses[1]) > 1e-5


@each_family
def test_answers_and_option_log_probabilities_are_the_librarys(family, family_folder, rows):
    """Each prompt alone: greedy by the argmax of whole forward passes, an option as minus the library's summed loss."""
    folder = family_folder(family)
    model, encoder = with_adapter(family, folder, 16).eval(), encoder_of(family, folder)
    asked = rows[1:3]
    prompts, options = [encoder.encode(row, with_answer=False) for row in asked], [("Correct", "Wrong")] * 2
    with torch.no_grad():
        answers = generate(model, encoder, prompts, 3, CPU)
        scores = score_options(model, encoder, prompts, options, CPU)
        for number, (row, prompt) in enumerate(zip(asked, prompts, strict=True)):
            batch = encoder.collate([prompt])
            batch.pop("labels")
            for _ in range(3):
                token = model(**batch).logits[:, -1].argmax(-1, keepdim=True)
                batch["input_ids"] = torch.cat([batch["input_ids"], token], 1)
                for name in batch.keys() & {"attention_mask", "mm_token_type_ids"}:
                    one = torch.full_like(batch[name][:, :1], int(name == "attention_mask"))
                    batch[name] = torch.cat([batch[name], one], 1)
                if token.item() == encoder.end_id:
                    break
            told = batch["input_ids"][0, len(prompt.input_ids) :]
            assert encoder.tokenizer.decode(told, skip_special_tokens=True) == answers[number]
            for column, text in enumerate(options[number]):
                expected = by_the_library(family, folder, replace(row, answer=text))
                count = (expected["labels"] != IGNORED).sum()
                assert abs(scores[number, column] + count * model(**expected).loss) < 1e-4
