"""Adapters from elsewhere: refused unless asked for, computed as stock peft does, and named in every result."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import Qwen3VLForConditionalGeneration

from mmrev_kit.config.project import ASSETS, run_dir
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.evaluation.results import find_evaluations, read_evaluation
from mmrev_kit.evaluation.tables import direction_table, notes, verdict_lines
from mmrev_kit.files import write_json
from mmrev_kit.model.adapters import adapter_folder
from mmrev_kit.model.bases import adapter_digest
from mmrev_kit.model.loading import load_adapter, load_base
from mmrev_kit.notebook.launch import adapter_facts, evaluate

FIRST = Path(__file__).parents[1] / "fixtures/first_version/finished"  # a run on embedded-one-order
ONE_ORDER = "model.name=embedded-one-order"
CPU = {"device": "cpu", "bits": 16, "compute_dtype": "fp32"}


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """The output folder of the original scripts: a stock adapter, and a history of lists."""
    folder = tmp_path / "original" / "faces8_forward"
    shutil.copytree(FIRST / "best", folder / "best")
    (folder / "best" / "README.md").write_text("---\nlibrary_name: peft\n---\n# Model Card\n")
    write_json(folder / "training_history.json", {"train_loss": [2.0, 1.0], "val_loss": [1.5, 1.2], "epochs": [1, 2]})
    return folder


def stock_model():
    return Qwen3VLForConditionalGeneration.from_pretrained(ASSETS / "embedded-one-order", dtype=torch.float32)


def save_stock(folder: Path, config) -> Path:
    """A stock adapter whose every tensor is random, as after some training."""
    model = get_peft_model(stock_model(), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_from_elsewhere_is_refused_in_a_sentence_that_names_the_way(small_config, elsewhere):
    told = r"no model card with a base_fingerprint in it\. To put it onto embedded-one-order .* adapter\.unbound=true"
    with pytest.raises(ConfigError, match=told):
        evaluate(small_config(ONE_ORDER), str(elsewhere))
    with pytest.raises(ConfigError, match=r"must be best or final, .* there is no folder .*nowhere.*`hf download`"):
        evaluate(small_config(f"{ONE_ORDER} adapter.unbound=true"), str(elsewhere / "nowhere"))
    assert not (run_dir(small_config(ONE_ORDER)).parent).exists()


@pytest.mark.long
def test_with_consent_it_is_asked_and_every_result_says_so(small_config, small_data, elsewhere, tmp_path, capsys):
    """On data of another name, without a run; what lies beside the adapter stays as it is."""
    data = tmp_path / "data" / "others"
    shutil.copytree(small_data / "small", data)
    for path in data.glob("*_test.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))
    (data / "experiment_info.json").unlink()  # it says how many rows there were
    config = small_config(f"{ONE_ORDER} experiment.taught=null data.folder={data} adapter.unbound=true")
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}

    folder = evaluate(config, str(elsewhere))
    name = f"adapter_faces8_forward_{adapter_digest(elsewhere / 'best')[:8]}"
    assert folder == run_dir(config).parent / name / "eval" / "others" and not run_dir(config).exists()
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before
    reason = f"{elsewhere}/best: not an adapter of a run: no model card with a base_fingerprint in it."
    files = {kind: json.loads((folder / f"{kind}.json").read_text()) for kind in ("facts", "metrics", "verdict")}
    assert {kind: values["unbound"] for kind, values in files.items()} == dict.fromkeys(files, reason)
    assert files["verdict"]["taught"] == ["forward"] and files["facts"]["task"] == "forward"  # by generation alone
    said = "only adapter.unbound=true ties it to this base"
    assert said in files["verdict"]["sentence"] and all(said in one["sentence"] for one in files["verdict"]["beside"])
    assert set(files["metrics"]) == {"none", "unbound"} and set(files["metrics"]["none"]) >= {"forward", "reverse"}

    found = find_evaluations(config, None, None, folder)
    assert list(found) == [f"{name} (unbound)"] and {row[0] for row in direction_table(found).index} == set(found)
    assert said in "\n".join(verdict_lines(read_evaluation(folder).verdict()))
    assert notes(found) == [
        f"{reason} It was asked by adapter.unbound=true. No run tells what main was taught: forward, by "
        "experiment.task and experiment.taught."
    ]
    capsys.readouterr()
    assert evaluate(config, str(elsewhere / "best")) == folder
    assert re.search(r"NOTE: .*unbound=true", told := capsys.readouterr().out) and "holds this evaluation" in told


def test_what_the_original_scripts_taught(small_config, elsewhere):
    """Their forward is generation; their reverse put the image first, which is not this kit's reverse."""
    free = f"{ONE_ORDER} adapter.unbound=true experiment.taught=null"
    for more, taught in (("", "generation"), ("experiment.taught=cw", "cw")):
        assert adapter_facts(small_config(f"{free} {more}"), elsewhere / "best", False)[1]["taught"] == taught
    with pytest.raises(ConfigError, match=r"puts the image first.* experiment\.task=forward experiment\.taught=cw"):
        adapter_facts(small_config(f"{free} experiment.task=reverse"), elsewhere / "best", False)
    write_json(elsewhere / "training_history.json", {"of": "another tool"})
    assert adapter_facts(small_config(free), elsewhere / "best", False)[1]["taught"] is None


def test_a_runs_adapter_is_bound_wherever_it_lies_and_a_changed_one_is_not(small_config, tmp_path):
    config = small_config(f"{ONE_ORDER} adapter.unbound=true")
    copy = Path(shutil.copytree(FIRST / "best", tmp_path / "copy"))
    owner, facts = adapter_facts(config, copy, False)
    assert owner.name == f"adapter_copy_{adapter_digest(copy)[:8]}" and "unbound" not in facts and "note" in facts
    run = tmp_path / "a run"
    shutil.copytree(FIRST, run, ignore=shutil.ignore_patterns("manifest.json"))
    same = small_config(f"{ONE_ORDER} adapter.unbound=true data.image_size=64 model.max_pixels=16384")
    assert adapter_folder(same, str(run)) == run / "best" and adapter_folder(same, "best") == run_dir(same) / "best"
    assert adapter_facts(same, run / "best", False) == (run, {"task": "forward", "taught": "generation"})
    owner, facts = adapter_facts(small_config("adapter.unbound=true"), copy, False)  # on the other embedded model
    assert re.search(r"copy was trained on the base [0-9a-f]{16}; embedded is [0-9a-f]{16}", facts["unbound"])


def logits(model, pixel_values, grid) -> torch.Tensor:
    ids = torch.tensor([[10, 3, *[5] * 16, 4, 11, 12]])
    with torch.no_grad():
        kinds = (ids == 5).int()
        return model(input_ids=ids, pixel_values=pixel_values, image_grid_thw=grid, mm_token_type_ids=kinds).logits


@pytest.mark.parametrize("more", [{}, {"use_dora": True, "modules_to_save": ["down_proj"]}, {"bias": "lora_only"}])
def test_an_adapter_on_every_linear_layer_counts_as_in_stock_peft(tmp_path, more):
    """The vision tower, too, which the kit computes its own way."""
    targets = ["qkv", "proj", "q_proj", "k_proj", "gate_proj", "linear_fc1", "linear_fc2"]
    config = LoraConfig(r=2, target_modules=targets, exclude_modules=[r"model.visual.patch_embed.proj"], **more)
    folder = save_stock(tmp_path / "stock", config)
    generator = torch.Generator().manual_seed(1)
    picture = torch.randn(64, 3 * 2 * 8 * 8, generator=generator), torch.tensor([[1, 8, 8]])
    expected = logits(PeftModel.from_pretrained(stock_model(), folder).eval(), *picture)
    base = load_base("embedded-one-order", **CPU).eval()
    plain = logits(base, *picture)
    found = logits(load_adapter(base, folder, unbound=True).eval(), *picture)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max() < 0.01 * (found - plain).abs().max()


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (LoraConfig(r=2, target_modules=["patch_embed.proj", "q_proj"]), "changes .*patch_embed.proj, which"),
        (LNTuningConfig(target_modules=["q_norm"]), "changes .*q_norm, which"),
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=6, token_dim=256),
            "virtual tokens .PROMPT_TUNING",
        ),
    ],
)
def test_an_adapter_that_would_not_count_is_refused(tmp_path, config, told):
    with pytest.raises(ConfigError, match=told):
        load_adapter(load_base("embedded-one-order", **CPU), save_stock(tmp_path / "stock", config), unbound=True)


def test_a_stock_adapter_is_held_to_its_files_and_names_no_module_to_import(elsewhere):
    file = elsewhere / "best" / "adapter_config.json"
    values = json.loads(file.read_text())
    for change, told in (
        ({"r": 2}, "of another shape: "),
        ({"target_modules": ["o_proj"]}, "missing: .*o_proj.*unexpected: .*q_proj"),
        ({"target_modules": ["query"]}, "fits no adapter of this model"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config"),
    ):
        write_json(file, values | change)
        with pytest.raises(ConfigError, match=told):
            load_adapter(load_base("embedded-one-order", **CPU), elsewhere / "best", unbound=True)
