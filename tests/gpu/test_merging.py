"""A 2B architecture merged on a GPU: `pytest tests/gpu` on a machine with one."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3VLForConditionalGeneration

from mmrev_kit.files import write_json
from mmrev_kit.model.loading import random_model
from mmrev_kit.model.processor import load_processor
from mmrev_kit.model.qwen3vl import read_architecture
from mmrev_kit.training.sharing import merge_adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: run it on a machine with one"),
]
ARCHITECTURE = "configs/models/qwen3vl_2b.json"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_2b_is_merged_and_its_logits_are_those_of_the_unmerged_model(tmp_path, dtype, capsys):
    """Random weights as a published model's files, in shards, with a stock adapter on every linear layer."""
    base = tmp_path / "base"
    model = random_model(read_architecture(ARCHITECTURE), dtype, torch.device("cuda", 0), 0, None)
    model.save_pretrained(base, max_shard_size="1GB")
    load_processor(ARCHITECTURE).save_pretrained(base)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    write_json(tmp_path / "adapter" / "adapter_config.json", values | {"base_model_name_or_path": str(base)})
    del model, adapted
    torch.cuda.empty_cache()

    out = merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "merged"), "adapter.unbound=true")
    print(capsys.readouterr().out)
    merged = Qwen3VLForConditionalGeneration.from_pretrained(out, device_map="cuda:0")
    assert merged.dtype == dtype and {path.name for path in Path(out).iterdir()} >= {"README.md", "config.json"}
    assert torch.cuda.max_memory_allocated() < 3 * merged.get_memory_footprint()
