"""Files that would give wrong numbers without a word: each is refused in one sentence, on every path that reads it.

The bases are copies of the embedded model of one order, the adapters copies of one that the first version trained on it
(r 1, on the q_proj of all six layers), with one thing changed.
"""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmrev_kit.config.project import ASSETS, run_dir
from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.evaluation.ask import Asker
from mmrev_kit.memory.plan import configured_shapes
from mmrev_kit.model.bases import adapter_digest, base_fingerprint, model_folder
from mmrev_kit.model.loading import add_adapter, load_adapter, load_base
from mmrev_kit.model.processor import load_processor, make_encoder
from mmrev_kit.model.qwen3vl import read_architecture
from mmrev_kit.model.strict import strict
from mmrev_kit.notebook.launch import evaluate, launch
from mmrev_kit.training.preflight import preflight
from mmrev_kit.training.rehearse import rehearse
from mmrev_kit.training.run import prepare
from mmrev_kit.training.update import TrainingError

ADAPTER = Path(__file__).parents[1] / "fixtures" / "first_version" / "finished" / "best"
NORM, HEAD = "model.language_model.norm.weight", "lm_head.weight"


@pytest.fixture
def base(tmp_path) -> Path:
    return Path(shutil.copytree(ASSETS / "embedded-one-order", tmp_path / "base"))


@pytest.fixture
def adapter(tmp_path) -> Path:
    return Path(shutil.copytree(ADAPTER, tmp_path / "adapter"))


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def one_sentence(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700, text
    return text


# ---- the base


def untie(base: Path) -> None:
    values = json.loads((base / "config.json").read_text())
    values["text_config"]["tie_word_embeddings"] = False
    change(base / "config.json", tie_word_embeddings=False, text_config=values["text_config"])


def with_tensors(base: Path, edit) -> None:
    tensors = load_file(base / "model.safetensors")
    edit(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (untie, f"missing: {HEAD}"),
        (lambda base: with_tensors(base, lambda t: t.pop(NORM)), f"missing: {NORM}"),
        (lambda base: with_tensors(base, lambda t: t.update(more=torch.zeros(2))), "unexpected: more"),
        (lambda base: with_tensors(base, lambda t: t.update({NORM: torch.zeros(255)})), f"of another shape: {NORM}"),
        (
            lambda base: with_tensors(
                base, lambda t: t.update({"model.language_model.layers.2.mlp.up_proj.weight": torch.zeros(768, 255)})
            ),
            r"of another shape: model\.language_model\.layers\.2\.mlp\.up_proj\.weight",
        ),
        (
            lambda base: with_tensors(base, lambda t: t.pop("model.language_model.layers.5.self_attn.q_proj.weight")),
            r"missing: model\.language_model\.layers\.5\.self_attn\.q_proj\.weight",
        ),
        # a head of its own where the configuration says that it is the embedding
        (lambda base: with_tensors(base, lambda t: t.update({HEAD: torch.zeros(1024, 256)})), "both are present"),
    ],
)
def test_a_tensor_that_is_missing_unexpected_or_of_another_shape_is_named(base, bits, spoil, words):
    spoil(base)
    for _ in range(2):  # a second try in the same kernel meets it, too
        with pytest.raises(ConfigError, match=words) as caught:
            load_base(str(base), bits=bits, device="cpu")
        one_sentence(caught)


@pytest.mark.parametrize("family", ["qwen3", "no_such_family"])
def test_a_model_of_texts_alone_is_refused_by_its_small_files_on_every_path(base, small_config, family):
    """Without its weights, which nothing gets to."""
    change(base / "config.json", model_type=family)
    (base / "model.safetensors").unlink()
    config = small_config(f"model.name={base}")
    paths = [
        lambda: load_base(str(base), bits=4, device="cpu"),
        lambda: load_base(str(base), bits=16, device="cpu"),
        lambda: load_base(str(base / "config.json"), device="cpu"),
        lambda: load_processor(str(base)),
        lambda: base_fingerprint(str(base)),
        lambda: configured_shapes(config),
        lambda: Asker(config, None),
        lambda: launch(config),
        lambda: evaluate(config, None),
    ]
    for path in paths:
        with pytest.raises(ConfigError, match=rf"model_type = '{family}', which transformers knows as no model that"):
            path()
    assert not run_dir(config).exists()
    with pytest.raises(TrainingError, match=f"model_type = '{family}'"):
        rehearse(config, updates=1)


@pytest.mark.parametrize(
    ("name", "quantization", "words"),
    [
        ("Qwen/Qwen3-VL-32B-Instruct-FP8", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "-32B-Instruct."),
        ("unsloth/Qwen3-VL-8B-Thinking-unsloth-bnb-4bit", {"quant_method": "bitsandbytes"}, "-8B-Thinking."),
        ("someone/theirs", {"quant_method": "awq"}, "the one that it was made from, which its model card names."),
    ],
)
def test_a_quantized_base_is_refused_before_its_weights_are_fetched(base, monkeypatch, name, quantization, words):
    change(base / "config.json", quantization_config=quantization)
    asked = []

    def download(repository, revision, allow_patterns):
        asked.append("*.safetensors" in allow_patterns)
        return base

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for weights in (True, False):
        with pytest.raises(ConfigError) as caught:
            model_folder(name, weights=weights)
        text = one_sentence(caught)
        assert f"already quantized ({quantization['quant_method']})" in text and text.endswith(words)
    assert asked == [False, False]
    config = load_config("configs/tiny_cpu.yaml", f"model.name={base}")
    assert any("already quantized" in problem for problem in preflight(config).problems)
    with pytest.raises(ConfigError, match="already quantized"):
        configured_shapes(config)
    with pytest.raises(ConfigError, match="already quantized"):
        read_architecture(str(base / "config.json"))


def split(base: Path) -> None:
    """As two shards with their index."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, base / file, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_two_shards_are_read_and_a_missing_one_is_named_with_its_folder(base):
    split(base)
    whole, parts = load_base("embedded-one-order", bits=16, device="cpu"), load_base(str(base), bits=16, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    (base / "model-00002-of-00002.safetensors").unlink()
    for path in (lambda: load_base(str(base), device="cpu"), lambda: base_fingerprint(str(base))):
        with pytest.raises(ConfigError, match=rf"{base} lacks model-00002-of-00002\.safetensors") as caught:
            path()
        one_sentence(caught)
    assert load_processor(str(base))  # which needs no weights


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("chat_template.jinja", "has no chat_template.jinja: copy it from the published model"),
        ("processor_config.json", "holds no whole processor"),
        ("tokenizer.json", "holds no whole processor"),
        ("config.json", "has no config.json"),
    ],
)
def test_a_missing_file_of_the_processor_is_told_with_its_folder(base, file, words):
    (base / file).unlink()
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_processor(str(base))
    assert str(base) in one_sentence(caught)


def header(file: Path, edit=None, length: int | None = None) -> None:
    """The same file with another header, or another length before it."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    text = json.loads(raw[8 : 8 + size])
    if edit:
        edit(text)
    new = json.dumps(text).encode()
    file.write_bytes((len(new) if length is None else length).to_bytes(8, "little") + new + raw[8 + size :])


def move(text: dict) -> None:
    """Offsets that lie beyond the file."""
    entry = next(entry for name, entry in text.items() if name != "__metadata__")
    entry["data_offsets"] = [offset + 10**12 for offset in entry["data_offsets"]]


SPOILT = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "header of 2^62": lambda file: header(file, length=2**62),
    "wrong offsets": lambda file: header(file, move),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_broken_weight_file_is_told_in_one_sentence(base, adapter, how):
    SPOILT[how](base / "model.safetensors")
    config = load_config("configs/tiny_cpu.yaml", f"model.name={base}")
    for path in (lambda: load_base(str(base), device="cpu"), lambda: base_fingerprint(str(base), version=1)):
        with pytest.raises(ConfigError, match=rf"{base}/model\.safetensors is not a whole safetensors file") as caught:
            path()
        one_sentence(caught)
    assert any("not a whole safetensors file" in problem for problem in preflight(config).problems)
    SPOILT[how](adapter / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=rf"{adapter}/adapter_model\.safetensors is not a whole") as caught:
        load_adapter(load_base("embedded-one-order", device="cpu"), adapter)
    one_sentence(caught)


@pytest.mark.parametrize("text", ["[1, 2]", '{"model_type": "qwen3_vl", ', "[" * 100_000, "", "null"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json", "adapter_config.json"])
def test_a_small_file_that_is_no_json_object_is_told_in_one_sentence(base, adapter, file, text):
    if file.startswith("adapter"):
        (adapter / file).write_text(text)
    else:
        (base / file).write_text(text)
    with pytest.raises(ConfigError, match=f"{file} (is not valid JSON|holds a )") as caught:
        load_processor(str(base))
        load_adapter(load_base("embedded-one-order", device="cpu"), adapter)
    one_sentence(caught)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {}),
        ("tokenizer.json", {"model": {"type": "XX"}, "added_tokens": []}),
        ("tokenizer.json", {"model": {"type": "BPE"}, "added_tokens": 3}),
        ("processor_config.json", {"image_processor": 3}),
        ("processor_config.json", {"image_processor": {"patch_size": "x"}}),
    ],
)
def test_json_that_is_no_tokenizer_or_processor_is_told_in_one_sentence(base, file, content):
    (base / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"^{base} holds no whole processor") as caught:
        load_processor(str(base))
    one_sentence(caught)


def edit(file: Path, *path, value) -> None:
    """Put a value at a path of keys; None removes the last."""
    values = json.loads(file.read_text())
    place = values
    for key in path[:-1]:
        place = place[key]
    place.pop(path[-1], None)
    place |= {} if value is None else {path[-1]: value}
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("patch_size",), 4, "patch_size is 8 in config.json and 4 in the processor's files"),
        (("merge_size",), 4, "spatial_merge_size is 2 in config.json and 4 in"),
        (("temporal_patch_size",), 1, "temporal_patch_size is 2 in config.json and 1 in"),
        (("image_mean",), "half", "image_mean is 'half', not three numbers"),
        (("image_std",), [0.5, 0.0, 0.5], "by which nothing can be divided"),
    ],
)
def test_a_processor_that_contradicts_the_model_is_refused(base, path, value, words):
    edit(base / "processor_config.json", "image_processor", *path, value=value)
    with pytest.raises(ConfigError, match=words) as caught:
        load_processor(str(base))
    one_sentence(caught)


def test_another_token_for_images_than_the_tokenizers_is_refused(base):
    change(base / "config.json", image_token_id=3)
    with pytest.raises(ConfigError, match=r"image_token_id is 3 in config.json and 5 in"):
        load_processor(str(base))


def test_a_tokenizer_without_a_padding_token_and_a_template_with_two_image_tokens_are_refused(base, small_config):
    template = (base / "chat_template.jinja").read_text()
    assert template.count("<|image_pad|>") == 1
    (base / "chat_template.jinja").write_text(template.replace("<|image_pad|>", "<|image_pad|><|image_pad|>"))
    encoder = make_encoder(small_config(f"model.name={base}"))
    with pytest.raises(ConfigError, match="does not write one image token an image"):
        encoder.frame((True, False))
    edit(base / "tokenizer_config.json", "pad_token", value=None)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json names no pad_token"):
        load_processor(str(base))


def test_two_chat_templates_are_refused(base):
    """The library takes the one of processor_config.json, and passes over the file that the model is published with."""
    edit(base / "processor_config.json", "chat_template", value="{{ messages }}")
    with pytest.raises(
        ConfigError, match=r"another chat template than that of chat_template\.jinja is in proc"
    ) as caught:
        load_processor(str(base))
    one_sentence(caught)
    template = (base / "chat_template.jinja").read_text()
    edit(base / "processor_config.json", "chat_template", value=template)
    assert load_processor(str(base)).chat_template == template


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("{%- if add_generation_prompt -%}", "{%- if false -%}", "ignores add_generation_prompt; copy it anew"),
        ("{%- for message", "{{- strftime_now('%d %b %Y') -}}{%- for message", "writes the time (strftime_now): put a"),
        (
            "{%- for message",
            "{%- if strftime_now is defined -%}{{- strftime_now('%H') -}}{%- endif -%}{%- for message",
            "writes the time",
        ),
    ],
)
def test_a_template_that_asks_for_no_answer_or_writes_the_time_is_refused(base, small_config, before, after, words):
    """Before any weight is read; a template that writes the time elsewhere alone is as good as any."""
    file = base / "chat_template.jinja"
    template = file.read_text()
    assert template.count(before) == 1
    (base / "model.safetensors").unlink()
    config = small_config(f"model.name={base}")
    file.write_text(
        template.replace(
            "{%- for message", "{%- if tools -%}{{- strftime_now('%H') -}}{%- endif -%}" + "{%- for message"
        )
    )
    assert len(make_encoder(config).frame((True, False))) == 2
    file.write_text(template.replace(before, after))
    with pytest.raises(ConfigError, match=rf"The chat template of {base} {re.escape(words)}") as caught:
        prepare(config)
    one_sentence(caught)


def rename(base: Path) -> None:
    """What transformers does not know it leaves out, and takes its own 1e-6."""
    edit(base / "config.json", "text_config", "rms_norm_eps", value=None)
    edit(base / "config.json", "text_config", "rms_norm_epsilon", value=1.0)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (rename, "the field 'rms_norm_epsilon', which is not known; rms_norm_eps is"),
        # transformers takes 500,000 then; the model has 10,000
        (lambda base: edit(base / "config.json", "text_config", "rope_parameters", value=None), "has no rope_theta in"),
        (lambda base: edit(base / "config.json", "text_config", "num_attention_heads", value="4"), "expected int"),
        (
            lambda base: edit(base / "config.json", "text_config", "rope_parameters", "rope_type", value="yarn"),
            "factor",
        ),
        (
            lambda base: edit(
                base / "config.json", "text_config", "rope_parameters",
                value={"rope_type": "linear", "factor": 0.5, "rope_theta": 1e4, "mrope_section": [6, 5, 5]},
            ),
            "factor field must be",
        ),
    ],
)  # fmt: skip
def test_an_architecture_that_would_be_read_with_other_values_is_refused(base, spoil, words):
    spoil(base)
    for name in (str(base), str(base / "config.json")):
        with pytest.raises(ConfigError, match=words) as caught:
            load_base(name, bits=16, device="cpu")
        one_sentence(caught)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize(
    "name", ["model.language_model.layers.2.mlp.up_proj.weight", NORM, "model.visual.pos_embed.weight"]
)
def test_a_base_with_a_weight_that_is_not_finite_is_refused_before_it_is_quantized(base, name, bits, value):
    """In NF4 a card makes a NaN a number like any other: it looks for the largest value of a block without it."""
    with_tensors(base, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    with pytest.raises(ConfigError, match=rf"{base}: {re.escape(name)} holds a value that is not finite") as caught:
        load_base(str(base), bits=bits, device="cpu")
    one_sentence(caught)


def test_weights_that_the_disk_has_no_room_for_are_not_fetched(base, monkeypatch, small_config):
    """By the size that the index tells; what is there already is taken off."""
    split(base)
    index, there = base / "model.safetensors.index.json", base / "model-00001-of-00002.safetensors"
    change(index, metadata={"total_size": 10**15})
    asked = []

    def download(repository, revision, allow_patterns):
        asked.append("*.safetensors" in allow_patterns)
        return base

    (base / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    needed = f"{10**15 - there.stat().st_size:,} bytes of it are not downloaded yet"
    with pytest.raises(ConfigError, match=needed) as caught:
        model_folder("someone/large")
    one_sentence(caught)
    assert asked == [False]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *words, **more: str(base / "config.json"))
    found = preflight(small_config("model.name=someone/large"))
    assert any(
        f"{10**15 - there.stat().st_size:,} of the base to be downloaded" in warning for warning in found.warnings
    )


# ---- the adapter


def test_an_adapter_whose_tensors_have_another_prefix_is_refused(adapter, small_config):
    file = adapter / "adapter_model.safetensors"
    tensors = {key.replace("model.language_model.", "model."): value for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError) as caught:
        load_adapter(load_base("embedded-one-order", device="cpu"), adapter)
    text = one_sentence(caught)
    first, layer = "base_model.model.model.", "layers.0.self_attn.q_proj.lora_A.weight"
    assert f"missing: {first}language_model.{layer}" in text and f"unexpected: {first}{layer}" in text
    assert text.count("and 9 more") == 2  # 6 layers with A and B; three are named
    config = small_config("model.name=embedded-one-order")
    shutil.copytree(adapter, run_dir(config) / "best")
    with pytest.raises(ConfigError, match="and 9 more"):
        Asker(config)
    with pytest.raises(TrainingError, match="and 9 more"):
        evaluate(config)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"target_modules": r"model\.language_model\.layers\.[01]\..*\.(q_proj)"},
            r"unexpected: \S+layers\.2.* 5 more",
        ),
        ({"r": 2}, r"of another shape: \S+layers\.0\.self_attn\.q_proj\.lora_A\.weight, .* 9 more"),
        ({"use_dora": True}, "missing: .*lora_magnitude_vector"),
        ({"target_modules": "nothing"}, "fits no adapter of this model"),
        ({"peft_type": "NOTHING"}, "fits no adapter of this model"),
        ({"a_later_setting": 3}, r"'a_later_setting'.* these are ignored"),
        ({"ensure_weight_tying": True}, "requested `ensure_weight_tying`, but no tied modules"),
        ({"target_parameters": ["nothing"]}, r"target_parameters=\['nothing'\] were set but no parameter was matched"),
        ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens, which does not count here"),
        ({"arrow_config": {"top_k": 1}}, "sets arrow_config, which does not count here"),
        ({"use_bdlora": {"nblocks": 1}}, "sets use_bdlora, which does not count here"),
    ],
)
def test_an_adapters_configuration_that_is_not_its_files_is_refused(adapter, fields, words):
    change(adapter / "adapter_config.json", **fields)
    for _ in range(2):
        with pytest.raises(ConfigError, match=words) as caught:
            load_adapter(load_base("embedded-one-order", device="cpu"), adapter)
        one_sentence(caught)


@pytest.mark.parametrize("change_it", ["alpha", "rslora", "alora", "weights"])
def test_an_adapter_whose_values_changed_after_it_was_written_is_refused(adapter, change_it):
    """Its card says what the files were; here it is made as `save_adapter` makes it."""
    card, config, tensors = (
        adapter / name for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")
    )
    card.write_text(card.read_text().replace("\n---\n\n#", f"\nadapter_sha256: {adapter_digest(adapter)}\n---\n\n#"))
    assert "adapter_sha256: " in card.read_text()
    model = load_base("embedded-one-order", device="cpu")
    load_adapter(model, adapter).unload()
    if change_it == "weights":
        stored = load_file(tensors)
        save_file({name: 0 * value for name, value in stored.items()}, tensors, {"format": "pt"})
    else:
        fields = {
            "alpha": {"lora_alpha": 64},
            "rslora": {"use_rslora": True},
            "alora": {"alora_invocation_tokens": [1]},
        }
        change(config, **fields[change_it])
    with pytest.raises(ConfigError, match=r"is not what the run wrote \(adapter_sha256 in README\.md\)") as caught:
        load_adapter(load_base("embedded-one-order", device="cpu"), adapter)
    one_sentence(caught)


def test_the_unchanged_adapter_and_base_are_read(adapter, base):
    model = load_adapter(load_base(str(base), device="cpu"), adapter)
    stored = load_file(adapter / "adapter_model.safetensors")
    found = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert found.keys() == stored.keys() and all(torch.equal(found[name], stored[name]) for name in stored)


def test_rows_longer_than_the_model_is_made_for_are_refused():
    with pytest.raises(ConfigError, match=r"max_length = 2,049: the model is made for 2,048 tokens"):
        make_encoder(load_config("configs/tiny_cpu.yaml", "training.max_length=2049"))
    make_encoder(load_config("configs/tiny_cpu.yaml", "training.max_length=2048"))


def test_a_second_adapter_on_the_same_model_is_refused():
    model = load_base("embedded-one-order", device="cpu")
    add_adapter(model, target_modules=("q_proj",))
    with pytest.raises(ConfigError, match="has an adapter already"):
        add_adapter(model, target_modules=("q_proj",))


# ---- the mechanism, on warnings that the libraries make themselves


def dropped_by_transformers() -> None:
    from transformers import GenerationConfig

    GenerationConfig(do_sample=False, temperature=0.3, max_new_tokens=3).validate()


def attention_kept_by_transformers() -> None:
    from transformers import BloomConfig, BloomModel

    model = BloomModel(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1))
    model.set_attn_implementation("sdpa")


def padding_on_the_right_met_by_transformers() -> None:
    from transformers import GenerationConfig

    model, ids = load_base("embedded", bits=16, device="cpu"), torch.tensor([[7, 8, 0], [7, 8, 9]])
    settings = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=0)
    model.generate(
        input_ids=ids, attention_mask=ids.ne(0).long(), mm_token_type_ids=0 * ids, generation_config=settings
    )


def pictures_scaled_by_other_code_of_transformers() -> None:
    from transformers.models.auto.image_processing_auto import _load_class_with_fallback
    from transformers.models.qwen2_vl import Qwen2VLImageProcessor

    assert _load_class_with_fallback({"torchvision": None, "pil": Qwen2VLImageProcessor}, "torchvision")


def pattern_dropped_by_peft() -> None:
    """By a RuntimeWarning."""
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    get_peft_model(model, LoraConfig(target_modules=["0"], rank_pattern={"nothing": 3}))


def dropped_by_peft() -> None:
    from peft import LoraConfig

    LoraConfig(loftq_config={"loftq_bits": 4})


def dropped_by_accelerate() -> None:
    from accelerate.utils.modeling import check_device_map

    check_device_map(torch.nn.Sequential(torch.nn.Linear(2, 2)), {"0": "cpu", "nowhere": "cpu"})


def dropped_by_bitsandbytes() -> None:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(8, 8)
    del layer.weight
    layer.weight, layer.quant_state = torch.nn.Parameter(torch.zeros(32, 1)), None
    layer(torch.zeros(1, 8))


@pytest.mark.parametrize(
    "message",
    [  # as transformers 5.24 and peft word them
        "This may lead to reinitialization of the adapter weights during loading.",
        "We set the attention implementation for the sub-config `x` ... You may encounter undefined behavior.",
        "`rope_parameters`'s factor field must be a float or int >= 1, got 0.5",
        "Qwen3VLTextConfig got `key=rope_scaling` in kwargs but hasn't set it as attribute.",
        "You are loading your model using bnb but no linear modules were found in your model.",
        "The following generation flags are not valid and may be ignored: ['temperature'].",
        "LANCZOS resample requires torchvision >= 0.27. Falling back to BICUBIC which approximates LANCZOS.",
        "Could not load tokenizer from subfolder `x`. Falling back to loading from y.",
        "`standardize_rope_params` was called but no RoPE parameters were found.",
    ],
)
def test_what_the_libraries_say_of_numbers_that_are_not_those_given_is_an_error(message):
    with pytest.raises(ConfigError, match=re.escape(" ".join(message.split()))), strict():
        logging.getLogger("peft.somewhere").warning(message)


@pytest.mark.parametrize(
    "provoke",
    [
        dropped_by_transformers,
        attention_kept_by_transformers,
        padding_on_the_right_met_by_transformers,
        pictures_scaled_by_other_code_of_transformers,
        dropped_by_peft,
        pattern_dropped_by_peft,
        dropped_by_accelerate,
        dropped_by_bitsandbytes,
    ],
)
def test_a_librarys_warning_that_something_is_not_used_is_an_error_each_time(provoke):
    """Also the second time, though the library says it once; and where all warnings are switched off."""
    import warnings

    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    for quiet in (False, False, True):
        with warnings.catch_warnings(), pytest.raises(ConfigError, match="cannot be used as it is configured"):
            if quiet:
                warnings.simplefilter("ignore")
                transformers_logging.set_verbosity_error()
            try:
                with strict():
                    try:
                        provoke()
                    except ValueError:
                        assert (
                            provoke is dropped_by_bitsandbytes
                        )  # it warns, and then fails on the layer without a state
            finally:
                transformers_logging.set_verbosity(before)


def test_other_warnings_pass_and_are_shown(recwarn, caplog):
    import warnings

    caplog.set_level(logging.WARNING, logger="peft")
    with strict():
        logging.getLogger("peft.somewhere").warning("This will lead to slow inference.")
        for code in ("the naive implementation", "slower implementation", "a Python version"):
            logging.getLogger("transformers.somewhere").warning(f"Not installed. Falling back to {code} of it.")
        warnings.warn("`torch_dtype` is deprecated and ignored", FutureWarning, stacklevel=1)
        warnings.warn("a value of the user's own is missing", UserWarning, stacklevel=1)
    assert len(recwarn) == 2 and "slow inference" in caplog.text
    with pytest.raises(ValueError, match="the body's own"), strict():
        logging.getLogger("peft.somewhere").warning("Found missing adapter keys")
        raise ValueError("the body's own error comes first")
