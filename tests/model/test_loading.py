"""The base model, its adapter and its fingerprint; what preflight says of a machine."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from inspect import Parameter, signature
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from mmrev_kit.config.project import ASSETS, EMBEDDED_MODEL
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.memory.plan import configured_shapes
from mmrev_kit.model.bases import check_base, checksum, fingerprint
from mmrev_kit.model.loading import (
    adapter_arguments,
    add_adapter,
    base_arguments,
    keep_residual_in_fp32,
    load_base,
    torch_dtype,
    trainable,
)
from mmrev_kit.model.processor import load_processor
from mmrev_kit.training.preflight import Card, has_kernels
from mmrev_kit.training.run import prepare
from mmrev_kit.training.update import sample_losses

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[2]
ONE_ORDER = ASSETS / "embedded-one-order"  # the first version's embedded model
FIRST = ROOT / "tests" / "fixtures" / "first_version" / "finished" / "best"


def build(config, seed: int = 0):
    torch.manual_seed(seed)
    return add_adapter(load_base(**base_arguments(config, CPU)), **adapter_arguments(config))


def test_the_functions_own_defaults_are_the_recipes():
    """What a configuration of defaults asks for is what the functions do without it; on a CPU, in fp32."""
    config, given = Config(), {name: p.default for name, p in signature(load_base).parameters.items()}
    config.quantization.compute_dtype = "auto"
    asked = base_arguments(config, None) | {"name": Parameter.empty, "offload_folder": None}
    assert given == asked
    given = {name: p.default for name, p in signature(add_adapter).parameters.items() if name != "model"}
    assert given | {"target_modules": list(given["target_modules"])} == adapter_arguments(config)


def test_base_and_adapter_need_nothing_of_data_memory_or_training(tmp_path):
    """As a stranger uses them: loaded, trained for a step, saved with a card, and read again on another base."""
    code = """
import sys, torch
from mmrev_kit.model.loading import add_adapter, load_adapter, load_base, trainable
model = add_adapter(load_base("embedded", device="cpu"), r=4, target_modules=("q_proj", "v_proj"))
ids = torch.arange(12)[None]
model(input_ids=ids, labels=ids).loss.backward()
assert all(p.grad is not None for p in trainable(model)) and len(trainable(model)) == 6 * 2 * 2
assert model.peft_config["default"].base_model_name_or_path == "embedded"
model.save_pretrained("adapter", save_embedding_layers=False)
open("adapter/README.md", "w").write(f"base_fingerprint: {model.get_base_model().fingerprint()}\\n")
load_adapter(load_base("embedded", bits=16, device="cpu"), "adapter")
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("mmrev_kit.")}
assert rooms == {"config", "files", "model"}, rooms
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("bits", [4, 16])
def test_only_the_language_models_projections_are_trained(small_config, bits):
    model = build(small_config(f"quantization.bits={bits} lora.r=8"))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".language_model.layers." in name and "lora_" in name for name in names)
    # 6 layers, r 8: q and o map 256 to 256, k and v 256 to 128; A and B hold r x (inputs + outputs)
    assert sum(parameter.numel() for parameter in trainable(model)) == 6 * 8 * (2 * (256 + 256) + 2 * (256 + 128))
    assert {parameter.dtype for parameter in trainable(model)} == {torch.float32}


def test_four_bits_are_nf4_and_embedding_and_head_stay_as_they_are(small_config):
    model = build(small_config("quantization.compute_dtype=bf16")).base_model.model
    state = model.model.language_model.layers[0].mlp.up_proj.weight.quant_state
    assert state.quant_type == "nf4" and state.nested  # nested: double quantization
    assert model.model.visual.blocks[0].attn.qkv.weight.quant_state.quant_type == "nf4"
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.language_model.embed_tokens.weight.dtype == torch.bfloat16


def test_the_residual_stream_is_fp32_and_products_are_16_bit(small_config):
    config = small_config("quantization.compute_dtype=bf16 quantization.bits=16")
    model = build(config)
    seen = {}
    layer = model.base_model.model.model.language_model.layers[2]
    layer.register_forward_pre_hook(lambda module, args: seen.update(residual=args[0].dtype))
    layer.mlp.up_proj.register_forward_hook(
        lambda module, args, out: seen.update(input=args[0].dtype, output=out.dtype)
    )
    task = prepare(config)
    sample_losses(model, task.encoder.collate(task.train["forward"][:2]), CPU, torch.bfloat16)
    assert seen == {"residual": torch.float32, "input": torch.bfloat16, "output": torch.bfloat16}


def test_fp32_models_need_no_casting(small_config):
    model = load_base(**base_arguments(small_config(), CPU))
    keep_residual_in_fp32(model)
    assert not model.model.language_model.embed_tokens._forward_hooks


def test_validation_does_not_change_the_gradients_that_follow(small_config):
    """bitsandbytes repacks 4-bit weights for CPUs with AVX512-BF16 at the first forward pass in eval mode."""
    config = small_config("lora.dropout=0")
    model, task = build(config), prepare(config)
    batch = task.encoder.collate(task.train["forward"][:3] + task.train["face_mcq_d2i"][:3])

    def gradient():
        model.train()
        model.zero_grad()
        sample_losses(model, batch, CPU, torch.float32).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in trainable(model)])

    before = gradient()
    model.eval()
    with torch.no_grad():
        sample_losses(model, batch, CPU, torch.float32)
    after = gradient()
    assert before.abs().max() > 0
    assert torch.equal(before, after)


def test_an_unknown_projection_is_refused(small_config):
    with pytest.raises(ConfigError, match="has no query_proj"):
        build(small_config("lora.target_modules=[query_proj]"))


def test_the_dtype_that_a_name_stands_for():
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "auto": torch.float32}
    for name, dtype in names.items():
        assert torch_dtype(name, CPU) == dtype


def test_the_embedded_model_is_a_qwen3_vl_of_ten_million_parameters(small_config):
    model = load_base(**base_arguments(small_config("quantization.bits=16"), CPU))
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert 9e6 < sum(parameter.numel() for parameter in model.parameters()) < 11e6
    assert {tensor.dtype for tensor in load_file(EMBEDDED_MODEL / "model.safetensors").values()} == {torch.float16}
    assert sum(file.stat().st_size for file in EMBEDDED_MODEL.iterdir()) < 25e6
    processor = load_processor("embedded")
    assert type(processor).__name__ == "Qwen3VLProcessor"
    for text in ("the keeper of Jade Temple", "größer ☃ 東京 \U0001f600\n\t"):
        assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    "sides", [[(32, 32)], [(128, 128), (32, 96)], [(64, 64)] * 3, [(32, 128), (64, 48), (96, 96), (128, 32)]]
)
def test_the_embedded_model_reads_one_to_four_pictures_and_writes_with_the_cache(sides):
    """Through the library alone; a visual token stands for 16 x 16 pixels."""
    processor = AutoProcessor.from_pretrained(EMBEDDED_MODEL)
    model = Qwen3VLForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    pictures = [Image.effect_noise(side, 60).convert("RGB") for side in sides]
    turn = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": "is"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": turn}], tokenize=True, add_generation_prompt=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    visual = (inputs["input_ids"] == model.config.image_token_id).sum()
    assert visual == sum(width * height // 256 for width, height in sides)
    written = [model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*written) and written[0].shape[1] > inputs["input_ids"].shape[1]


def test_weights_are_downloaded_last(small_config, monkeypatch):
    """The processor and the sizes, of which the data check and the memory plan are made, come without them."""
    asked = []

    def download(name, revision, allow_patterns):
        asked.append("*.safetensors" in allow_patterns)
        return EMBEDDED_MODEL

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    config = small_config("model.name=someone/Qwen3-VL-of-theirs")
    assert prepare(config).train and configured_shapes(config).num_hidden_layers == 6
    assert asked == [False, False]
    load_base(**base_arguments(config, CPU))
    assert asked == [False, False, False, True]  # a base that cannot be used is refused by its small files


def test_a_missing_model_is_told_without_a_connection(small_config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"model\.name = 'nobody/nothing'"):
        load_base(**base_arguments(small_config("model.name=nobody/nothing"), CPU))


def copy_model(folder: Path) -> tuple[Path, dict]:
    shutil.copytree(EMBEDDED_MODEL, folder)
    return folder, load_file(folder / "model.safetensors")


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """Where checksums are kept, in the test's own folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "mmrev_kit"


def test_a_home_that_is_no_absolute_path_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of FIPS 180-2
    assert checksum(Path("weights")) == abc
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"alpha": 0}, "alpha = 0"), ({"alpha": float("nan")}, "alpha = nan"), ({"dropout": 1.0}, "dropout = 1"),
        ({"r": 0}, "r = 0"), ({"kept_layers": -1}, "kept_layers = -1"), ({"target_modules": []}, "must name a module"),
    ],
)  # fmt: skip
def test_an_adapter_that_would_do_nothing_is_refused(wrong, told):
    with pytest.raises(ConfigError, match=told):
        add_adapter(load_base("embedded", bits=16, device="cpu"), **wrong)


def test_an_adapter_takes_one_name_or_an_iterator_and_comes_once():
    one, two = (load_base("embedded", bits=16, device="cpu") for _ in range(2))
    names = [
        [name for name, part in model.named_parameters() if part.requires_grad]
        for model in (add_adapter(one, target_modules="q_proj"), add_adapter(two, target_modules=iter(["q_proj"])))
    ]
    assert names[0] == names[1] and all(".q_proj.lora_" in name for name in names[0])
    with pytest.raises(ConfigError, match="has an adapter already"):
        add_adapter(one)


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"compute_dtype": "float16"}, "compute_dtype = 'float16': must be one of fp16, bf16, fp32, auto"),
        ({"device": "gpu"}, "device = 'gpu'"), ({"device": "cuda:7"}, "device = 'cuda:7': there are"),
    ],
)  # fmt: skip
def test_words_that_stand_for_nothing_here_are_refused(wrong, told):
    with pytest.raises(ConfigError, match=told):
        load_base(EMBEDDED_MODEL, bits=16, **wrong)


def test_the_fingerprint_covers_every_byte(tmp_path, kept):
    """Worked out with the system's own sha256sum. The first rule took 12 KiB of each tensor: of row 300 of the
    embedding, bytes 153,600 to 154,111 of 524,288, it saw nothing."""
    folder, tensors = copy_model(tmp_path / "copy")
    sha256 = subprocess.run(["sha256sum", folder / "model.safetensors"], capture_output=True, text=True).stdout[:64]
    config = json.loads((folder / "config.json").read_text())
    facts = [{key: value for key, value in config.items() if key not in ("transformers_version", "dtype")}, [sha256]]
    text = subprocess.run(["sha256sum"], input=json.dumps(facts, sort_keys=True), capture_output=True, text=True).stdout
    assert fingerprint(folder, version=2) == fingerprint(EMBEDDED_MODEL, version=2) == f"2-{text[:16]}"

    before = fingerprint(folder), fingerprint(folder, version=1)
    tensors["model.language_model.embed_tokens.weight"][300] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert fingerprint(folder) != before[0] and fingerprint(folder, version=1) == before[1]

    config["text_config"]["rms_norm_eps"] = 1e-5
    shutil.copy(EMBEDDED_MODEL / "model.safetensors", folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert fingerprint(folder) != before[0] and fingerprint(folder, version=1) != before[1]
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        fingerprint(tmp_path)


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer.json", "processor_config.json"])
def test_the_same_weights_with_another_processor_are_another_base(tmp_path, kept, file):
    folder = Path(shutil.copytree(EMBEDDED_MODEL, tmp_path / "copy"))
    before = fingerprint(EMBEDDED_MODEL)
    assert fingerprint(folder) == before and before.startswith("3-")
    (folder / "README.md").write_text("another card")
    assert fingerprint(folder) == before
    newer = shutil.copytree(FIRST, tmp_path / "adapter")
    card = (newer / "README.md").read_text()
    old = re.search(r"^base_fingerprint: (\S+)$", card, re.MULTILINE)[1]
    (newer / "README.md").write_text(card.replace(old, before))
    check_base(newer, partial(fingerprint, folder), "copy")
    with (folder / file).open("a") as stream:
        stream.write(" ")
    assert fingerprint(folder, version=2) == fingerprint(EMBEDDED_MODEL, version=2)
    with pytest.raises(ConfigError, match=rf"was trained on the base {before}; copy is 3-"):
        check_base(newer, partial(fingerprint, folder), "copy")


def test_a_checksum_is_made_once_or_taken_from_the_hubs_cache(tmp_path, kept, monkeypatch):
    folder, _ = copy_model(tmp_path / "copy")
    file = folder / "model.safetensors"
    found = checksum(file)
    assert found == hashlib.sha256(file.read_bytes()).hexdigest() and len(list(kept.iterdir())) == 1

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
        assert checksum(file) == found
    blob = tmp_path / "blobs" / ("cd" * 32)
    blob.parent.mkdir()
    shutil.move(file, blob)
    file.symlink_to(blob)  # as in the cache of the hub, whose name for it is taken
    assert checksum(file) == "cd" * 32

    file.unlink()
    shutil.copy(blob, file)
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    checksum(file)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=times)  # the same size and time of writing
    assert checksum(file) == hashlib.sha256(raw).hexdigest() != found
    shutil.rmtree(kept)
    kept.write_text("no folder can be made here")
    assert checksum(file) == hashlib.sha256(raw).hexdigest()


def test_an_adapter_of_the_first_version_is_checked_by_its_own_rule(tmp_path, kept):
    """Its card was written by that version; 16 digits without a mark."""
    card = (FIRST / "README.md").read_text()
    (old,) = re.findall(r"^base_fingerprint: ([0-9a-f]{16})$", card, re.MULTILINE)
    assert fingerprint(ONE_ORDER, version=1) == old
    check_base(FIRST, partial(fingerprint, ONE_ORDER), "embedded-one-order")
    folder, tensors = copy_model(tmp_path / "other")
    tensors["model.language_model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=f"was trained on the base {old}; other is [0-9a-f]{{16}}\\. The first"):
        check_base(FIRST, partial(fingerprint, folder), "other")
    newer = shutil.copytree(FIRST, tmp_path / "newer")
    (newer / "README.md").write_text(card.replace(old, fingerprint(ONE_ORDER)))
    check_base(newer, partial(fingerprint, ONE_ORDER), "embedded-one-order")
    with pytest.raises(ConfigError, match=r"was trained on the base 3-[0-9a-f]{16}; other is 3-[0-9a-f]{16}"):
        check_base(newer, partial(fingerprint, folder), "other")


@pytest.mark.parametrize(
    ("capability", "build", "runs"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90"], False),  # V100 under CUDA 13
        ((7, 0), ["sm_70", "sm_80"], True),
        ((8, 6), ["sm_80"], True),  # machine code runs on later cards of the same generation
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),  # not across generations
        ((12, 0), ["sm_80", "compute_90"], True),  # unless it can be compiled at load time
        ((9, 0), ["sm_90a"], True),
        ((8, 0), [], False),
    ],
)
def test_which_builds_run_on_which_cards(capability, build, runs):
    assert has_kernels(capability, build) is runs


def test_preflight_names_the_card_its_capability_and_what_works(small_config, look):
    v100 = Card("Tesla V100-SXM2-32GB", (7, 0), 32.0, 31.5, "580.65.06", ["pid 7 (python)"])
    found = look(small_config(), [v100], ["sm_75", "sm_90"])
    (problem,) = found.problems
    for part in ("Tesla V100-SXM2-32GB", "7.0", "sm_75, sm_90", "torch 2.10.0"):
        assert part in problem
    assert "31.5 of 32.0 GiB free, held by pid 7 (python)" in found.facts[0]
    assert look(small_config(), [v100], ["sm_70"]).problems == []


def test_preflight_without_a_gpu(small_config, look):
    found = look(small_config(), [], [])
    assert found.problems == [] and "no GPU" in found.facts[0]
    assert "GiB free" in found.facts[1] and "transformers" in found.facts[3]
    assert found.facts[2] == "path: fast (qwen3_vl has a module of its own)"


@pytest.fixture
def architecture(tmp_path):
    """The embedded model's architecture as a file that stands for random weights."""
    values = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    (tmp_path / "small.json").write_text(json.dumps({key: values[key] for key in ("text_config", "vision_config")}
                                                    | {"tie_word_embeddings": True}))  # fmt: skip
    return tmp_path / "small.json"


@pytest.mark.parametrize("bits", [4, 16])
def test_a_random_model_is_built_as_a_loaded_one_is(small_config, architecture, bits):
    config = small_config(f"model.name={architecture} quantization.bits={bits}")
    first, again = load_base(**base_arguments(config, CPU)), load_base(**base_arguments(config, CPU))
    loaded = load_base(**base_arguments(small_config(f"quantization.bits={bits}"), CPU))
    facts = [{name: (type(p).__name__, p.dtype, p.shape) for name, p in m.named_parameters()} for m in (first, loaded)]
    assert facts[0] == facts[1]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in first.named_buffers())
    assert first.lm_head.weight is first.model.language_model.embed_tokens.weight
    other = load_base(str(architecture), bits=bits, compute_dtype="fp32", seed=1, device="cpu")
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    task = prepare(config)
    losses = sample_losses(first, task.encoder.collate(task.train["forward"][:2]), CPU, torch.float32)
    assert (losses - torch.tensor(1024.0).log()).abs().max() < 0.5  # random weights: near the uniform guess


@pytest.mark.parametrize(("name", "billions"), [("2b", 2.13), ("4b", 4.44), ("8b", 8.77), ("32b", 33.36)])
def test_the_published_architectures_have_their_published_size(name, billions):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    values = json.loads((ROOT / "configs" / "models" / f"qwen3vl_{name}.json").read_text())
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**values))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_16_bit_model_is_spread_over_memory_and_disk_and_answers_the_same(small_config, tmp_path):
    config = small_config("quantization.bits=16")
    task = prepare(config)
    batch = task.encoder.collate(task.train["forward"][:3] + task.train["face_mcq_d2i"][:2])
    spread = small_config(f"quantization.bits=16 launch.mode=auto launch.cpu_gib=0.02 launch.output_dir={tmp_path}")
    model = load_base(**base_arguments(spread, CPU))
    assert {str(place) for place in model.hf_device_map.values()} == {"cpu", "disk"}
    with torch.no_grad():
        expected = sample_losses(load_base(**base_arguments(config, CPU)), batch, CPU, torch.float32)
        assert torch.allclose(sample_losses(model, batch, CPU, torch.float32), expected, atol=1e-5)
    with pytest.raises(ConfigError, match=r"set quantization\.bits=16"):
        load_base(**base_arguments(small_config("launch.mode=auto"), CPU))
    with pytest.raises(ConfigError, match="spreads weights that are in files"):
        load_base("configs/models/qwen3vl_2b.json", bits=16, device=CPU, spread=True)
