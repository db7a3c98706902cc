"""The loop: gradients that depend on no split, an exact record, and what is saved."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from mmrev_kit.config.project import run_dir
from mmrev_kit.config.seeds import seed_for
from mmrev_kit.data.images import load_image
from mmrev_kit.data.tasks import build_prompt
from mmrev_kit.model.loading import adapter_arguments, add_adapter, base_arguments, load_base, trainable
from mmrev_kit.training import loop, update
from mmrev_kit.training.history import read_history
from mmrev_kit.training.loop import train
from mmrev_kit.training.run import ordered_rows, prepare, start
from mmrev_kit.training.update import TrainingError, accumulate, chunks, sample_losses, validate

CPU = torch.device("cpu")


@pytest.fixture
def state():
    """One process; the state that accelerate gives in a launched one has these fields, too."""
    return SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=CPU)


def flat_gradient(model) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in trainable(model)])


def mixed_samples(run, count: int) -> list:
    """Rows of all sources in turn: answers of two tokens and of many, one image and four."""
    sources = list(run.task.train.values())
    return [sources[number % len(sources)][number] for number in range(count)]


def test_the_gradient_does_not_depend_on_the_micro_batch(small_config, state):
    run = start(small_config("lora.dropout=0 quantization.bits=16"), state)
    for parameter in trainable(run.model):  # LoRA's B starts at zero, where half of the gradients vanish
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    samples = mixed_samples(run, 7)
    found = {}
    for packing in ("none", "block", "shared_prefix"):
        for tokens in (1, 100, 200, 5000):
            run.batcher.layout = replace(run.batcher.layout, packing=packing, micro_tokens=tokens)
            run.optimizer.zero_grad()
            loss = accumulate(run, samples)
            found[packing, tokens] = loss, flat_gradient(run.model), len(list(run.batcher.batches(samples)))
    loss, gradient, count = found["none", 1]
    assert gradient.abs().max() > 1e-4 and count == 7
    assert {count for *_, count in found.values()} >= {1, 2, 7}
    for other in found.values():
        assert other[0] == pytest.approx(loss, rel=1e-5)
        assert (other[1] - gradient).norm() <= 1e-5 * gradient.norm()


def test_identity_rows_are_learned_and_validated_without_pictures(small_config, state):
    """An update of them alone, and their own validation loss: the mean over rows that go through alone."""
    run = start(small_config("lora.dropout=0 mitigation.identity=0.1 retention.retention_ratio=0"), state)
    mine, asked = run.task.train["identity"][:5], run.task.val["identity"]
    assert len(asked) == 8 * 2 * 2 and not any(sample.image_tokens for sample in [*mine, *asked])

    def alone(samples) -> float:
        batches = (run.task.encoder.collate([sample]) for sample in samples)
        return sum(sample_losses(run.model, batch, CPU, run.dtype).item() for batch in batches) / len(samples)

    assert accumulate(run, mine) == pytest.approx(alone(mine), rel=1e-5)
    with torch.no_grad():
        losses = validate(run)
        assert list(losses) == ["forward", "cw_image", "reverse", "identity"]
        assert losses["identity"] == pytest.approx(alone(asked), rel=1e-5)


def test_loss_and_gradient_equal_the_librarys_own_sample_by_sample(small_config, state):
    """The reference: the processor's tokens, the model's own loss of each sample alone, and their plain mean."""
    config = small_config("lora.dropout=0 quantization.bits=16 quantization.compute_dtype=auto")
    run = start(config, state)
    samples = mixed_samples(run, 6)
    losses = []
    for sample in samples:
        processor = run.task.encoder.processor
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in build_prompt(sample.row)
        ]
        turn = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        images = [load_image(path) for path in sample.row.images]
        prompt = processor(text=[text], images=images, return_tensors="pt")["input_ids"].shape[1]
        inputs = processor(text=[text + sample.row.answer + "<|im_end|>"], images=images, return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, :prompt] = -100
        losses.append(run.model(**inputs, labels=labels).loss)
    torch.stack(losses).mean().backward()
    expected = flat_gradient(run.model).clone()
    run.optimizer.zero_grad()
    loss = accumulate(run, samples)
    assert loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert (flat_gradient(run.model) - expected).norm() <= 1e-5 * expected.norm()


def test_a_smaller_last_update_counts_each_sample_once(small_config, state):
    """6 micro-batches accumulated by 4: the second update holds 2, and its gradient is their mean, not half of it."""
    run = start(small_config("lora.dropout=0 training.batch_size=1 training.gradient_accumulation_steps=4"), state)
    samples = mixed_samples(run, 6)
    updates = chunks(samples, run.batch)
    assert [len(rows) for rows in updates] == [4, 2]
    accumulate(run, updates[1])
    found = flat_gradient(run.model).clone()
    run.optimizer.zero_grad()
    for sample in samples[4:]:
        (sample_losses(run.model, run.task.encoder.collate([sample]), CPU, run.dtype)[0] / 2).backward()
    assert (found - flat_gradient(run.model)).norm() <= 1e-5 * found.norm()


def test_a_sample_without_an_answer_token_is_an_error(small_config, state):
    run = start(small_config(), state)
    batch = run.task.encoder.collate(run.task.train["forward"][:2])
    batch["labels"][1] = -100
    with pytest.raises(TrainingError, match="no answer token"):
        sample_losses(run.model, batch, CPU, run.dtype)


def test_validation_counts_each_row_once_whatever_the_batch(small_config, state):
    run = start(small_config(), state)
    expected = {}
    run.model.eval()
    for source, samples in run.task.val.items():
        with torch.no_grad():
            alone = [sample_losses(run.model, run.task.encoder.collate([s]), CPU, run.dtype).item() for s in samples]
        expected[source] = sum(alone) / len(alone)
    assert validate(run) == pytest.approx(expected, rel=1e-5)
    assert set(expected) == {"forward", "cw_image", "reverse", "face_cw", "face_mcq_i2d", "face_mcq_d2i"}


def test_a_run_leaves_a_complete_folder_that_stock_peft_loads(small_config, state):
    from peft import PeftModel

    config = small_config()
    train(config, state)
    folder = run_dir(config)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"best", "final", "last", "training_history.json", "manifest.json"}
    for adapter in ("best", "final"):
        files = {path.name for path in (folder / adapter).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    saved = load_file(folder / "final" / "adapter_model.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["trainable_parameters"] == sum(tensor.numel() for tensor in saved.values()) == 86_016
    assert manifest["effective_batch"] == 8 and manifest["seed"] == 0 and len(manifest["data"]) == 12

    history = read_history(folder / "training_history.json")
    assert history["status"] == "finished" and history["reason"] == "last epoch"
    assert [step["global_step"] for step in history["steps"]] == list(range(1, history["total_steps"] + 1))
    for step in history["steps"]:
        assert step["tokens_per_second"] > 20 * step["samples_per_second"] > 0  # every row has more than 20 tokens
        assert step["mfu"] is None  # not known on a CPU
    rows = sum(record["rows per epoch"] for record in manifest["plan"])
    assert history["total_steps"] == 2 * math.ceil(rows / 8)
    for record in history["epochs"]:  # the epoch's loss is the mean over its samples, the smaller last update included
        steps = [step for step in history["steps"] if step["epoch"] == record["epoch"]]
        sizes = [8] * (len(steps) - 1) + [rows - 8 * (len(steps) - 1)]
        mean = sum(step["loss"] * size for step, size in zip(steps, sizes, strict=True)) / rows
        assert record["train_loss"] == pytest.approx(mean, rel=1e-9)
    last = history["epochs"][-1]
    task = prepare(config)
    model = PeftModel.from_pretrained(load_base(**base_arguments(config, CPU)), folder / "final").eval()
    with torch.no_grad():
        losses = [
            sample_losses(model, task.encoder.collate([sample]), CPU, torch.float32).item()
            for sample in task.val["forward"]
        ]
    assert sum(losses) / len(losses) == pytest.approx(last["val_loss"]["forward"], rel=1e-5)


def test_a_history_of_the_first_version_says_mfu_by_its_name(tmp_path):
    steps = [{"global_step": 1, "loss": 1.0, "matrix_share": 0.5}, {"global_step": 2, "loss": 0.9, "mfu": None}]
    path = tmp_path / "training_history.json"
    path.write_text(json.dumps({"status": "finished", "steps": steps, "epochs": []}))
    read = read_history(path)["steps"]
    assert [step["mfu"] for step in read] == [0.5, None] and not any("matrix_share" in step for step in read)


def test_best_is_saved_on_an_improvement_only(small_config, state, monkeypatch):
    saved = []
    monkeypatch.setattr(
        loop, "save_adapter", lambda run, folder, losses: saved.append((folder.name, run.progress["epoch"]))
    )
    losses = iter([2.0, 1.95, 1.5, 1.6])  # 1.95 is less than 5 % below 2.0
    monkeypatch.setattr(loop, "validate", lambda run: {"forward": next(losses)})
    monkeypatch.setattr(loop, "train_epoch", lambda run: 1.0)
    train(small_config("training.num_epochs=4 training.lr_patience=1 training.min_lr=1e-5"), state)
    assert saved == [("best", 1), ("best", 3), ("final", 4)]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_recorded_as_null(small_config, state, monkeypatch):
    config = small_config()
    real, calls = update.sample_losses, []

    def broken(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(update, "sample_losses", broken)
    with pytest.raises(TrainingError, match="Step 3: loss nan"):
        train(config, state)

    def refuse(constant):
        raise ValueError(constant)

    text = (run_dir(config) / "training_history.json").read_text()
    history = json.loads(text, parse_constant=refuse)  # strict: NaN is not JSON
    assert history["status"] == "failed" and "Step 3" in history["reason"]
    assert [step["loss"] is None for step in history["steps"]] == [False, False, True]
    assert [step.get("skipped", False) for step in history["steps"]] == [False, False, True]


@pytest.mark.long
def test_an_interrupted_run_goes_on_and_equals_the_uninterrupted_one(small_config, state, tmp_path, monkeypatch):
    whole = small_config()
    train(whole, state)
    real, calls = loop.update, []

    def interrupted(run, samples):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(run, samples)

    again = small_config(f"launch.output_dir={tmp_path}/again")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(again, state)
    assert read_history(run_dir(again) / "training_history.json")["status"] == "interrupted"
    train(again, state)
    a, b = (read_history(run_dir(config) / "training_history.json") for config in (whole, again))
    assert [step["loss"] for step in a["steps"]] == [step["loss"] for step in b["steps"]]
    assert [record["val_loss"] for record in a["epochs"]] == [record["val_loss"] for record in b["epochs"]]
    left, right = (load_file(run_dir(config) / "final" / "adapter_model.safetensors") for config in (whole, again))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_grouping_by_epoch_keeps_the_rows_and_puts_those_of_an_image_together(small_config, state):
    run = start(small_config("training.grouping=epoch"), state)
    rows = ordered_rows(run.config, run.task, 0)
    assert sorted(rows) == sorted(run.task.plan.epoch_rows(0)) and rows == ordered_rows(run.config, run.task, 0)
    samples = [run.task.train[source][index] for source, index in rows]

    def images_an_update(samples: list) -> float:
        updates = chunks([sample for sample in samples if sample.row.task == "forward"], 8)
        return sum(len({sample.row.images for sample in rows}) for rows in updates) / len(updates)

    shuffled = [run.task.train[source][index] for source, index in run.task.plan.epoch_rows(0)]
    assert images_an_update(samples) < 0.5 * images_an_update(shuffled)
    run.progress["epoch"] = 1
    assert ordered_rows(run.config, run.task, 1) != rows
    forward = [sample for sample in samples if sample.row.task == "forward"][:15]
    assert math.isfinite(update.update(run, forward)["loss"])
    assert run.computed[0] < 0.8 * sum(len(sample.input_ids) for sample in forward)


@pytest.mark.long
def test_once_features_are_made_a_run_needs_no_vision_tower(small_config, state, monkeypatch):
    """As on a GPU, where the tower is dropped: training, validation, saving and going on do without it."""
    from peft import PeftModel

    monkeypatch.setattr("mmrev_kit.training.run.drop_tower", lambda model: setattr(model.model, "visual", None))
    config = small_config("training.num_epochs=1 retention.retention_ratio=0")
    train(config, state)
    run = start(config, state)
    assert run.model.get_base_model().model.visual is None and run.progress["epoch"] == 1
    losses = validate(run)
    assert losses == pytest.approx(run.history.data["epochs"][0]["val_loss"], rel=1e-6)
    model = PeftModel.from_pretrained(load_base(**base_arguments(config, CPU)), run.folder / "final")
    assert model.get_base_model().model.visual is not None


def test_equal_seeds_give_equal_adapters_and_other_seeds_others(small_config):
    def weights(seed: int) -> torch.Tensor:
        config = small_config(f"experiment.seed={seed}")
        torch.manual_seed(seed_for(seed, "adapter"))
        model = add_adapter(load_base(**base_arguments(config, CPU)), **adapter_arguments(config))
        return torch.cat([p.detach().flatten() for p in trainable(model)])

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))
