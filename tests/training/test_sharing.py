"""A merged model: the tensors that stock peft gives, a check that can fail, files that stock transformers loads."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from mmrev_kit.__main__ import main
from mmrev_kit.config.project import ASSETS
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.files import write_json
from mmrev_kit.model.base_files import tensor_shapes
from mmrev_kit.model.bases import adapter_digest, fingerprint
from mmrev_kit.model.finite import NotFiniteError
from mmrev_kit.model.merging import adapter_layers, copy_small_files, write_weights
from mmrev_kit.training.cards import adapter_card
from mmrev_kit.training.sharing import merge_adapter

FIRST = Path(__file__).parents[1] / "fixtures/first_version/finished"
ONE_ORDER = ASSETS / "embedded-one-order"
OVERRIDES = "model.name=embedded-one-order"  # which the first version called embedded


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with an evaluation."""
    folder = Path(shutil.copytree(FIRST, tmp_path / "run"))
    return folder


def scale(run: Path, factor: float) -> None:
    """Another adapter in the place of the run's, with a card that says nothing of its files."""
    file = run / "best" / "adapter_model.safetensors"
    tensors = {name: value * (factor if "lora_B" in name else 1) for name, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def stock_model(folder=ONE_ORDER):
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def save_stock(folder: Path, config) -> Path:
    model = get_peft_model(stock_model(), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


LOAD = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
assert model.dtype == torch.float16 and not hasattr(model, "peft_config")
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who is this?"}]}]
text = processor.apply_chat_template(turn, add_generation_prompt=True)
batch = processor(text=[text], images=[Image.new("RGB", (64, 64), "red")], return_tensors="pt")
print(processor.batch_decode(model.generate(**batch, max_new_tokens=3)))
assert not [name for name in sys.modules if name.startswith("mmrev_kit")]
"""


def test_the_command_makes_a_model_that_stock_transformers_loads(run, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["merge", str(run), str(out), "--overrides", OVERRIDES]) is None
    said = capsys.readouterr().out
    assert "the adapter moves them by " in said and f"hf upload YOU/NAME {out}" in said
    expected = PeftModel.from_pretrained(stock_model(), run / "best").merge_and_unload().state_dict()
    found = load_file(out / "model.safetensors")
    assert found.keys() == tensor_shapes(ONE_ORDER / "model.safetensors").keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float16 and (tensor.float() - expected[name]).abs().max() < 2e-3, name
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in ONE_ORDER.iterdir()}
    done = subprocess.run([sys.executable, "-c", LOAD, str(out)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers" and card.data.base_model is None  # it is on no hub
    assert card.data.base_fingerprint == fingerprint(ONE_ORDER)
    assert card.data.adapter_sha256 == adapter_digest(run / "best")
    claim = json.loads((run / "eval/first/verdict.json").read_text())["claim"]
    for told in (
        "while the adapter was trained: none (16-bit weights)",
        f"on `first`, before merging: {claim}. ",
        "# first: forward, merged",
        "main people were taught",
        "data: `first`",
        "made up for an experiment",
    ):
        assert told in card.content, told

    with pytest.raises(ConfigError, match="exists and is left as it is"):
        merge_adapter(str(run), str(out), OVERRIDES)


def test_a_check_that_fails_leaves_nothing(run, tmp_path):
    """An adapter so small that 16 bits lose it, and one so large that they cannot hold the sum."""
    (run / "best" / "README.md").write_text("changed")
    more = f"{OVERRIDES} adapter.unbound=true"
    scale(run, 1e-5)
    with pytest.raises(ConfigError, match=r"the adapter itself moves them by 0\.0.*Nothing is written"):
        merge_adapter(str(run), str(tmp_path / "out"), more)
    scale(run, 1e11)
    with pytest.raises((ConfigError, NotFiniteError), match="finite"):
        merge_adapter(str(run), str(tmp_path / "out"), more)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    "more",
    [
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"qkv": 3},
            "alpha_pattern": {"v_proj": 9},
        },
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    ],
)
def test_every_kind_of_lora_is_merged_as_stock_peft_does_and_in_shards(tmp_path, more):
    adapter = save_stock(tmp_path / "stock", LoraConfig(r=2, lora_alpha=4, **more))
    expected = PeftModel.from_pretrained(stock_model(), adapter).merge_and_unload().state_dict()
    files, out = [ONE_ORDER / "model.safetensors"], tmp_path / "out"
    sizes = {name: torch.Size(shape).numel() for name, shape in tensor_shapes(files[0]).items()}
    out.mkdir()
    assert write_weights(out, files, sizes, adapter_layers(ONE_ORDER, adapter), 4_000_000) == torch.float16
    shards = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(shards) >= 5 and all(shard.stat().st_size < 4_100_000 for shard in shards)
    assert index["metadata"]["total_size"] == 2 * sum(sizes.values())
    plain, changed, found = load_file(files[0]), 0, {}
    for shard in shards:
        tensors = load_file(shard)
        assert {index["weight_map"][name] for name in tensors} == {shard.name}
        found |= tensors
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].half()) or (tensor - expected[name].half()).abs().max() < 4e-3, name
        changed += not torch.equal(tensor, plain[name])
    assert changed == len([name for name in load_file(adapter / "adapter_model.safetensors") if "lora_A" in name])


def test_a_configuration_with_the_language_models_sizes_at_its_top_is_copied(tmp_path):
    """As Qwen2.5-VL's published ones have them: there is no text_config."""
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    vision = {"depth": 2, "dtype": "float32", "auto_map": {"AutoModel": "code.Model"}}
    write_json(base / "config.json", {"hidden_size": 8, "torch_dtype": "float32", "vision_config": vision})
    copy_small_files(base, out, torch.bfloat16)
    assert json.loads((out / "config.json").read_text()) == {
        "hidden_size": 8, "torch_dtype": "bfloat16", "vision_config": {"depth": 2, "dtype": "bfloat16"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"), "bias: only LoRA"),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"]), "modules_to_save: only LoRA"),
        (LoraConfig(r=2, target_modules=["lm_head"]), "changes lm_head, which is embedding and head at once"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "peft_type 'IA3': only LoRA"),
    ],
)
def test_what_cannot_be_merged_is_refused_at_once(tmp_path, config, told):
    adapter = save_stock(tmp_path / "stock", config)
    with pytest.raises(ConfigError, match=told):
        merge_adapter(str(adapter), str(tmp_path / "out"), "adapter.unbound=true")
    assert not (tmp_path / "out").exists()


def test_an_adapter_from_elsewhere_names_its_base_or_is_refused(tmp_path, run):
    adapter = save_stock(tmp_path / "stock", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"no model card with a base_fingerprint.* onto .*embedded-one-order"):
        merge_adapter(str(adapter), str(tmp_path / "out"))
    values = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", values | {"base_model_name_or_path": None})
    with pytest.raises(ConfigError, match=r"names no base: add --overrides model\.name="):
        merge_adapter(str(adapter), str(tmp_path / "out"))
    write_json(adapter / "adapter_config.json", values | {"r": 3})
    with pytest.raises(ConfigError, match=r"of another shape: .*q_proj\.lora_A"):
        merge_adapter(str(adapter), str(tmp_path / "out"), "adapter.unbound=true")
    with pytest.raises(ConfigError, match="has random weights"):
        merge_adapter(str(run), str(tmp_path / "out"), "model.name=configs/models/qwen3vl_2b.json")


def test_the_cards_of_adapters_are_read_by_the_hubs_own_class(small_config):
    config = small_config("model.name=Qwen/Qwen3-VL-2B-Instruct experiment.taught=null")
    front = {"base_fingerprint": "3-0123456789abcdef", "adapter_sha256": "ab" * 32}
    text = adapter_card(config, front, {"epoch": 2, "global_step": 30}, 8, 1234, {"forward": 0.25})
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "base_model": "Qwen/Qwen3-VL-2B-Instruct", "library_name": "peft", "pipeline_tag": "image-text-to-text",
        "tags": ["lora", "reversal-curse", "mmrev_kit"], "base_fingerprint": front["base_fingerprint"],
        "adapter_sha256": front["adapter_sha256"],
    }  # fmt: skip
    taught = "main people were taught image → description (generation) and image → description (CW)"
    for told in (taught, "`small`, invented people (4 main, 4 control); pictures: drawn", "| forward | 0.2500 |"):
        assert told in card.text, told
