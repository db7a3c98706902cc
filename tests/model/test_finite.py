"""Numbers that are not finite stop everything outside training too: asking, evaluation, vision features, validation."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmrev_kit.config.project import run_dir
from mmrev_kit.data.questions import read_questions
from mmrev_kit.evaluation.ask import Asker, pictures
from mmrev_kit.model.features import build_features, images_of
from mmrev_kit.model.finite import NotFiniteError
from mmrev_kit.model.loading import base_arguments, load_base
from mmrev_kit.model.processor import make_encoder
from mmrev_kit.model.scoring import generate, score_options
from mmrev_kit.notebook.launch import evaluate
from mmrev_kit.training import loop
from mmrev_kit.training.rehearse import rehearse
from mmrev_kit.training.run import start
from mmrev_kit.training.update import TrainingError

ADAPTER = Path(__file__).parents[1] / "fixtures" / "first_version" / "finished" / "best"
FIRST = "model.language_model.layers.3.self_attn.q_proj.lora_B.default, whose own weights are not finite"
CPU = torch.device("cpu")
STATE = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=CPU)


def put_spoilt_adapter(config) -> None:
    """The run's best/, with one NaN in layer 3's lora_B."""
    folder = Path(shutil.copytree(ADAPTER, run_dir(config) / "best"))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.language_model.layers.3.self_attn.q_proj.lora_B.weight"][7, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def test_a_nan_in_an_adapter_stops_asking_and_evaluation_with_row_and_module(small_config):
    config = small_config("model.name=embedded-one-order")
    put_spoilt_adapter(config)
    with pytest.raises(TrainingError, match=rf"cw_image_test\.jsonl:\d+: .*not finite.* {FIRST}"):
        evaluate(config)
    folder = run_dir(config) / "eval" / "small"
    assert not (folder / "predictions.jsonl").exists() and not (folder / "verdict.json").exists()
    asker = Asker(config)
    with pytest.raises(NotFiniteError, match=f"own:1: .* {FIRST}"):
        asker(next(iter(pictures(config).values())), "[image] is")
    questions = [question for question in read_questions(config) if question.row.task == "reverse"][:3]
    encoder = make_encoder(config)
    prompts = [encoder.encode(question.row, with_answer=False) for question in questions]
    with pytest.raises(NotFiniteError, match=f"{questions[0].row.where}: .* {FIRST}"), torch.no_grad():
        score_options(asker.model, encoder, prompts, [question.options for question in questions], CPU)


def test_only_the_row_that_is_not_finite_is_named(small_config):
    """The second of three prompts is given an image of infinite values."""
    config = small_config("quantization.bits=16")
    model, encoder = load_base(**base_arguments(config, CPU)), make_encoder(config)
    rows, seen = [], set()
    for row in (question.row for question in read_questions(config) if question.row.task == "forward"):
        if row.images[0] not in seen and len(rows) < 3:
            seen.add(row.images[0])
            rows.append(row)
    prompts, real = [encoder.encode(row, with_answer=False) for row in rows], encoder.pixels

    def pixels(path, limit):
        values, grid = real(path, limit)
        return (values * float("inf") if path == rows[1].images[0] else values), grid

    assert len(generate(model, encoder, prompts, 3, CPU)) == 3
    encoder.pixels = pixels
    with pytest.raises(NotFiniteError, match=rf"^{rows[1].where}: .* is model\.visual\."), torch.no_grad():
        generate(model, encoder, prompts, 3, CPU)


def test_vision_features_that_are_not_finite_are_never_kept(small_config):
    config = small_config("quantization.bits=16")
    run = start(config, STATE)
    samples = run.task.train["forward"][:4]
    base = load_base(**base_arguments(config, CPU))
    config.launch.output_dir += "_anew"
    base.model.visual.blocks[2].mlp.linear_fc1.weight[3, 3] = float("nan")
    first = r"model\.visual\.blocks\.2\.mlp\.linear_fc1, whose own weights are not finite"
    with pytest.raises(NotFiniteError, match=rf"image {images_of(samples)[0][0]}: .* {first}"):
        build_features(config, base, run.task.encoder, samples, torch.float32, STATE)
    assert not list(Path(config.launch.output_dir).glob("features/*/*"))
    features, image = run.batcher.features, images_of(samples)[0]
    features.write(image, features.get(image) * float("nan"))  # as earlier versions kept them
    features._held.clear()
    assert not features.read(image)


def test_each_sources_validation_loss_must_be_finite(small_config):
    run = start(small_config(), STATE)
    source = next(name for name in run.task.val if name.startswith("face_"))
    sample = run.task.val[source][0]
    image = sample.row.images[0], sample.max_pixels
    features = run.batcher.features
    assert all(image not in images_of(rows) for name, rows in run.task.val.items() if name == "forward")
    features._held[features.key(image)] = features.get(image) * float("nan")
    with pytest.raises(TrainingError, match=rf"validation loss of {source} is nan\. .*image {image[0]}"):
        loop.finish_epoch(run, 1.0, 0.0)


def test_a_rehearsal_whose_loss_is_not_finite_says_so(small_config):
    """After one update at 1e30 the adapter's values are beyond what fp32 can multiply."""
    with pytest.raises(TrainingError, match=r"The loss is nan\. .*lora"):
        rehearse(small_config("training.learning_rate=1e30 training.min_lr=0 training.warmup_ratio=0"), updates=1)


def test_greedy_means_greedy_whatever_the_generation_config_says(small_config, tmp_path):
    """Against the arg max, one token at a time, without the library's loop."""
    from mmrev_kit.config.project import EMBEDDED_MODEL

    folder = Path(shutil.copytree(EMBEDDED_MODEL, tmp_path / "base"))
    values = json.loads((folder / "generation_config.json").read_text())
    strange = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "min_new_tokens": 5, "suppress_tokens": [300]}
    (folder / "generation_config.json").write_text(json.dumps(values | strange | {"do_sample": True, "temperature": 9}))
    config = small_config(f"quantization.bits=16 model.name={folder}")
    model, encoder = load_base(**base_arguments(config, CPU)), make_encoder(config)
    prompts = [encoder.encode(question.row, with_answer=False) for question in read_questions(config)[::11]]
    answers = generate(model, encoder, prompts, 8, CPU)
    for prompt, answer in zip(prompts, answers, strict=True):
        batch, ids = encoder.collate([prompt]), torch.tensor([prompt.input_ids])
        batch.pop("labels")
        while ids.shape[1] < len(prompt.input_ids) + 8:
            batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            batch["mm_token_type_ids"] = (ids == encoder.image_id).int()
            with torch.no_grad():
                token = model(**batch).logits[0, -1].argmax()
            if token == encoder.end_id:
                break
            ids = torch.cat([ids, token[None, None]], dim=1)
        assert answer == encoder.tokenizer.decode(ids[0, len(prompt.input_ids) :], skip_special_tokens=True)
