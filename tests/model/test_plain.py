"""The plain path: four other families, each row against the library's own processing and loss of that row alone."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, INTERN, SMOL
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mmrev_kit.config.project import EMBEDDED_MODEL
from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.plain import PlainEncoder
from mmrev_kit.data.prompts import IGNORED, PromptError
from mmrev_kit.data.tasks import Row, build_prompt
from mmrev_kit.memory import plan as plan_module
from mmrev_kit.memory.estimate import estimate
from mmrev_kit.model.bases import base_fingerprint
from mmrev_kit.model.batches import Batcher, make_layout, obstacle
from mmrev_kit.model.loading import add_adapter, load_base, trainable
from mmrev_kit.model.plain import LORA_TARGETS, language_model
from mmrev_kit.model.processor import load_processor, make_encoder
from mmrev_kit.model.scoring import generate, score_options
from mmrev_kit.training.preflight import preflight
from mmrev_kit.training.update import sample_losses

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
        if len(row.images) == 1:
            shown = encoder.image_inputs([(row.images[0], sample.max_pixels)])
            assert all(torch.equal(batch[name], value) for name, value in shown.items()) and "pixel_values" in shown
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
def test_rows_without_a_picture_are_the_librarys_alone_and_beside_others(family, family_folder, rows):
    """Rows of the identity bridge: their tokens, and each row's loss in batches of them alone and mixed."""
    folder, jade = family_folder(family), "the keeper of Jade Temple"
    bridge = [
        Row("identity", "identity", f"i:{connector}", "a", "main", (), jade, connector, (), jade)
        for connector in ("is known as", "is portrayed by a picture that is known as")
    ]
    model, encoder = with_adapter(family, folder, 16).eval(), encoder_of(family, folder)
    for row in bridge:
        batch, expected = encoder.collate([encoder.encode(row)]), by_the_library(family, folder, row)
        assert batch.keys() == expected.keys() and not any("pixel" in name for name in batch)
        assert all(torch.equal(batch[name], value) for name, value in expected.items())
    batcher = Batcher(make_layout(load_config("configs/tiny_cpu.yaml"), model, CPU), encoder, None, CPU)
    for mixed in (bridge, [bridge[0], rows[0], bridge[1], rows[3]], [rows[2], bridge[1]]):
        (batch,) = batcher.batches([encoder.encode(row) for row in mixed])
        with torch.no_grad():
            losses = sample_losses(model, batch, CPU, torch.float32)
            alone = [model(**by_the_library(family, folder, row)).loss for row in mixed]
        assert torch.allclose(losses, torch.stack(alone), atol=2e-6, rtol=0)
        assert len({round(loss, 3) for loss in losses.tolist()}) == len(mixed)


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


def test_pictures_of_one_prompt_are_scaled_alike_until_it_fits(family_folder, pictures, rows):
    """Qwen2.5-VL: four pictures of 16, 15, 16 and 10 tokens (16 x 16 pixels each) and 81 others, in 111 of room."""
    family = FAMILIES["qwen2_5_vl"]
    folder, row = family_folder(family), rows[3]
    whole = encoder_of(family, folder).encode(row)
    text = len(whole.input_ids) - whole.image_tokens
    encoder = encoder_of(family, folder, text + 30)
    sample = encoder.encode(row)
    assert whole.max_pixels == 4096 and sample.max_pixels == (30 // 4) * 16**2  # 7 tokens for each picture
    assert len(sample.input_ids) == text + sample.image_tokens and 4 * 4 <= sample.image_tokens <= 30
    smaller = replace(family, shown={"size": {"shortest_edge": 1024, "longest_edge": sample.max_pixels}})
    expected, batch = by_the_library(smaller, folder, row), encoder.collate([sample])
    assert all(torch.equal(batch[name], value) for name, value in expected.items())
    together = encoder.collate([sample, encoder.encode(rows[0])])  # of two limits in one batch
    assert together["image_grid_thw"].prod(1).tolist() == [*expected["image_grid_thw"].prod(1).tolist(), 64]
    with pytest.raises(PromptError, match=rf"{text} text tokens and \d+ image tokens do not fit"):
        encoder_of(family, folder, text + 3).encode(row)


def change(folder: Path, target: Path, name: str, edit) -> Path:
    """A copy of a base with one file changed; None for its new text removes it."""
    copy = Path(shutil.copytree(folder, target))
    text = edit((copy / name).read_text())
    (copy / name).unlink() if text is None else (copy / name).write_text(text)
    return copy


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (SMOL, None, "has no chat_template.jinja"),
        # all pictures before all texts, as LLaVA's template writes them
        (
            "in message['content'] %}",
            "in message['content'] | sort(attribute='type') %}",
            "does not keep the order of texts and images",
        ),
        ("{{ 'Assistant:' }}", "Bot:", "is not how the same conversation begins once it is answered"),
        ("'Assistant:'", "'Assistant: '", "tokens of prompt and answer run into one another"),
    ],
)
def test_a_chat_template_that_cannot_be_followed_is_refused(family_folder, rows, tmp_path, before, after, words):
    def spoil(text: str) -> str | None:
        assert text.count(before) == 1
        return after and text.replace(before, after)

    family = FAMILIES["smolvlm"]
    folder = change(family_folder(family), tmp_path / "base", "chat_template.jinja", spoil)
    with pytest.raises(ConfigError, match=words) as caught:
        encoder_of(family, folder).encode(rows[2])
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_template_that_ignores_the_generation_prompt_is_read_from_the_answered_conversation(
    family_folder, rows, tmp_path
):
    """As some families' are published; the tokens are those that the template had with a prompt for the answer."""
    family, asks = FAMILIES["internvl"], "{% if add_generation_prompt %}"
    assert INTERN.count(asks) == 1
    silent = change(
        family_folder(family),
        tmp_path / "base",
        "chat_template.jinja",
        lambda text: text.replace(asks, "{% if false %}"),
    )
    encoders = encoder_of(family, family_folder(family)), encoder_of(family, silent)
    for row in rows:
        published, read = (encoder.encode(row) for encoder in encoders)
        assert (published.input_ids, published.answer_start) == (read.input_ids, read.answer_start)


def test_what_ends_an_answer_is_the_templates_token_or_the_tokenizers(family_folder, rows, tmp_path):
    family = FAMILIES["internvl"]
    with_end = encoder_of(family, family_folder(family))
    bare = change(
        family_folder(family), tmp_path / "base", "chat_template.jinja", lambda text: text.replace("<|im_end|>", "")
    )
    without = encoder_of(family, bare)
    end = with_end.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert with_end.end_id == end == without.end_id == without.tokenizer.eos_token_id
    assert without.encode(rows[1]).input_ids[-1] == end


def test_a_text_that_holds_a_token_of_the_model_is_a_fault_of_its_row(family_folder, rows):
    family = FAMILIES["smolvlm"]
    encoder = encoder_of(family, family_folder(family))
    for field in ("description", "connector", "answer"):
        with pytest.raises(PromptError, match=r"holds <image>, which is a token of this model"):
            encoder.encode(replace(rows[2], **{field: "the keeper of <image> Hall"}))


@pytest.mark.parametrize(
    ("name", "limits", "key"), [("smolvlm", (256, 1000), "max_pixels"), ("internvl", (1100, 4096), "min_pixels")]
)
def test_pixel_limits_that_a_processors_own_size_breaks_are_refused(family_folder, rows, name, limits, key):
    family = replace(FAMILIES[name], pixels=limits)
    with pytest.raises(ConfigError, match=rf"model\.{key} = .* of 64 x 64 with 1024 pixels\. Set model\.{key}=1024\."):
        encoder_of(family, family_folder(FAMILIES[name])).encode(rows[0])


def test_a_processor_that_lacks_its_package_says_which(family_folder, monkeypatch):
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(ConfigError, match=r"its processor needs a package: .*num2words"):
        load_processor(str(family_folder(FAMILIES["smolvlm"])))


def test_a_folder_that_calls_itself_another_family_lacks_that_familys_tensors(tmp_path):
    """Qwen3-VL's file names with Qwen2.5-VL's model_type: nothing is drawn at random."""

    def rename(text: str) -> str:
        return text.replace('"qwen3_vl', '"qwen2_5_vl')

    folder = change(EMBEDDED_MODEL, tmp_path / "base", "config.json", rename)
    with pytest.raises(ConfigError, match=r"tensors in .* are not those that its configuration asks for; missing: "):
        load_base(str(folder), bits=16, device="cpu")


@each_family
def test_the_fingerprint_covers_weights_template_and_tokenizer(family, family_folder, tmp_path):
    folder = family_folder(family)
    found = {base_fingerprint(str(folder))}
    for name, edit in {
        "chat_template.jinja": lambda text: text + "\n",
        "tokenizer.json": lambda text: text + "\n",
        "processor_config.json": lambda text: text.replace("0.5", "0.4").replace("0.48145466", "0.5") + " ",
        "config.json": lambda text: text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'),
    }.items():
        found.add(base_fingerprint(str(change(folder, tmp_path / name.partition(".")[0], name, edit))))
    copy = Path(shutil.copytree(folder, tmp_path / "weights"))
    tensors = load_file(copy / "model.safetensors")
    tensors[max(tensors)] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    found.add(base_fingerprint(str(copy)))
    assert len(found) == 6 - (family.name == "qwen3_5")  # which has four layers


@pytest.mark.parametrize("bits", [16, 4])
@each_family
def test_random_weights_stand_in_for_any_family(family, family_folder, bits):
    """For a rehearsal: what no file holds is what the library computes; weights are normal, equal for equal seeds."""
    path = family_folder(family) / "config.json"
    models = [load_base(str(path), bits=bits, compute_dtype="fp32", device="cpu", seed=seed) for seed in (0, 0, 1)]
    whole = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
    first, same, other = (dict(model.named_parameters()) for model in models)
    buffers = dict(models[0].named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in whole.named_buffers())
    assert first.keys() == dict(whole.named_parameters()).keys()
    assert all(torch.equal(first[name], same[name]) for name in first)
    spread = [value.std().item() for value in first.values() if value.ndim > 1 and value.is_floating_point()]
    assert all(abs(std - 0.02) < 0.004 for std in spread) and spread
    name = next(name for name, value in first.items() if value.ndim > 1)
    assert not torch.equal(first[name], other[name])


def test_the_preflight_tells_the_path_and_the_projections(family_folder):
    def path_of(words: str) -> list[str]:
        facts = preflight(load_config("configs/tiny_cpu.yaml", words)).facts
        return [line for line in facts if line.startswith(("path", "lora"))]

    assert path_of("") == ["path: fast (qwen3_vl has a module of its own)"]
    family = FAMILIES["qwen3_5"]
    folder = family_folder(family)
    plain, lora = path_of(f"model.name={folder} lora.target_modules=[q_proj,v_proj]")
    assert plain.startswith("path: plain (qwen3_5 has no module of its own)") and "rehearse(cfg)" in plain
    assert lora.startswith(
        "lora.target_modules=[q_proj, k_proj, v_proj, o_proj, in_proj_qkv, in_proj_z, out_proj] adapt"
    )
    assert len(path_of(f"model.name={folder} {family.settings}")) == 1


def test_on_a_gpu_nothing_is_planned_for_a_family_that_the_estimate_does_not_know(family_folder, monkeypatch, capsys):
    family = FAMILIES["internvl"]
    config = load_config("configs/tiny_cpu.yaml", f"model.name={family_folder(family)} {family.settings}")
    monkeypatch.setattr(plan_module, "card_memory", lambda config, device: (16.0, False))
    state = SimpleNamespace(is_main_process=True, num_processes=1, device=torch.device("cuda"))
    for plan in ("auto", "off"):
        config.memory.plan = plan
        assert plan_module.plan_or_refuse(config, [], [], 0, state) == (config, None)
        told = capsys.readouterr().out
        assert "as configured" in told and "knows Qwen3-VL only" in told and "rehearse(cfg)" in told
    with pytest.raises(ConfigError, match=r"is a internvl: the memory estimate knows Qwen3-VL only\. .*rehearse"):
        estimate(config)


def test_the_table_of_projections_is_the_codes():
    text = (ROOT / "configs" / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| `([^`|]+)` \|", text, flags=re.MULTILINE)
    assert {name: targets for name, targets in rows if name in LORA_TARGETS} == LORA_TARGETS
