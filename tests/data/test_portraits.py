"""Pictures by a text-to-image model: a tiny pipeline of random weights, made of diffusers' own classes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.config.seeds import seed_for
from mmrev_kit.data import portraits
from mmrev_kit.data.faults import DataError
from mmrev_kit.data.images import load_image
from mmrev_kit.data.make import ensure_data
from mmrev_kit.data.run_data import read_experiment

diffusers = pytest.importorskip("diffusers", reason="install the extra: pip install -e '.[diffusers]'")
STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A Stable Diffusion of some thousand parameters, 64 x 64 pixels, with a card that names a licence."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=32, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(4, 8),
            norm_num_groups=2, cross_attention_dim=32, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(
            latent_channels=4, block_out_channels=[4, 8], norm_num_groups=2,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        )  # fmt: skip
        text = CLIPTextConfig(
            hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=100,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        letters = [chr(code) for code in range(33, 75)] + list("abcdefghijklmnopqrstuvwxyz")
        names = ["<|startoftext|>", "<|endoftext|>", *dict.fromkeys(letters)]
        words = CLIPTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=[], model_max_length=77)
        made = diffusers.StableDiffusionPipeline(
            vae=vae, text_encoder=CLIPTextModel(text), tokenizer=words, unet=unet,
            scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    made.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n# Tiny\n")
    return folder


@pytest.fixture
def config(pipeline, tmp_path):
    """A function from further overrides to a configuration of four people with two pictures each."""

    def make(more: str = ""):
        given = f"data.source=diffusers data.image_model={pipeline} data.num_main=4 data.num_control=0"
        given += f" data.images_per_entity=2 data.image_size=32 retention.retention_ratio=0 data.folder={tmp_path}/mine"
        return load_config("configs/tiny_cpu.yaml", f'{given} "data.image_options={{num_inference_steps: 2}}" {more}')

    return make


def test_people_come_with_prompts_that_say_what_can_be_seen():
    data = load_config(None, "data.source=diffusers data.image_model=m data.num_main=204 data.num_control=20").data
    people = portraits.make_people(data, 3)
    seen = ("gender", "age", "hair_color", "eye_color", "nationality")
    for number, person in enumerate(people):
        assert all(str(person[name]) in person["face_prompt"] for name in seen)
        assert person["profession"] is None and person["hobby"] is None and "attributes" not in person
        assert all(sum(person[name] != other[name] for name in seen) >= 2 for other in people[:number])
    assert people == portraits.make_people(data, 3) != portraits.make_people(data, 4)


def test_a_cut_run_goes_on_picture_by_picture(config, pipeline, tmp_path, capsys, monkeypatch):
    """Two of eight pictures are there from before: they are taken as they are, the others are the pipeline's own."""
    folder, kept = tmp_path / "mine", tmp_path / ".mine.pictures"
    settings = config()
    whole, left = portraits.make_missing, []

    def cut(model, missing, total):
        left.extend(missing)
        for made_by, path in missing[:2]:
            portraits.make_picture(model, path, **made_by)
        raise KeyboardInterrupt

    monkeypatch.setattr(portraits, "make_missing", cut)
    with pytest.raises(KeyboardInterrupt):
        ensure_data(settings)
    assert not folder.exists() and len(list(kept.iterdir())) == 2 and len(left) == 8
    first = {path.name: path.read_bytes() for path in kept.iterdir()}
    Image.new("RGB", (32, 32), "red").save(kept / sorted(first)[0], "PNG")  # taken by what made it, not by its look

    asked = []
    monkeypatch.setattr(portraits, "make_missing", lambda *given: (asked.extend(given[1]), whole(*given)))
    ensure_data(settings)
    said = capsys.readouterr().out
    assert "2 of 8 pictures are there from before" in said and [path.name for _, path in asked] == [
        path.name for _, path in left[2:]
    ]
    assert not kept.exists()  # the experiment is whole
    files, faults = read_experiment(folder)
    assert not faults and len(files["forward_train"]) == 60

    people = json.loads((folder / "entities.json").read_text())
    stock = diffusers.StableDiffusionPipeline.from_pretrained(pipeline, use_safetensors=True)
    person, other = people[1], people[2]
    for one, view in ((person, 1), (other, 0)):
        random = torch.Generator().manual_seed(seed_for(0, "portrait", one["id"], view))
        expected = stock(one["face_prompt"], generator=random, **STEPS).images[0]
        assert expected.size == (64, 64)
        expected = expected.resize((32, 32), Image.Resampling.LANCZOS)
        assert load_image(folder / one["images"][view]).tobytes() == expected.tobytes()
    looks = {load_image(folder / name).tobytes() for one in people for name in one["images"]}
    assert len(looks) == 8

    info = json.loads((folder / "experiment_info.json").read_text())
    assert (info["source"], info["image_model"], info["image_options"]) == ("diffusers", str(pipeline), STEPS)
    credit = info["image_credits"]
    assert credit["model"] == str(pipeline) and credit["license"] == "openrail++" and len(credit["files_sha256"]) == 64
    assert "found" in "\n".join(ensure_data(settings))
    with pytest.raises(DataError, match=r"image_options is {'num_inference_steps': 2}, not {'num_inference_steps': 3}"):
        ensure_data(config('"data.image_options={num_inference_steps: 3}"'))


def test_what_made_a_picture_is_in_its_name(config, pipeline, tmp_path, monkeypatch):
    """Other options, another seed or another file of the model: none of the pictures that are there is taken."""
    names = []

    def note(model, missing, total):
        names.append({path.name for _, path in missing})
        raise KeyboardInterrupt

    monkeypatch.setattr(portraits, "make_missing", note)
    other = Path(shutil.copytree(pipeline, tmp_path / "other"))
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"beta_end": 0.03}))
    more = ('"data.image_options={num_inference_steps: 3}"', "experiment.seed=1", f"data.image_model={other}")
    for change in ("", "", *more):
        with pytest.raises(KeyboardInterrupt):
            ensure_data(config(change))
    assert names[0] == names[1] and all(len(found) == 8 for found in names)
    assert len(set.union(*names)) == 8 * 4


def test_what_is_no_pipeline_of_pictures_from_text_is_refused(config, pipeline, tmp_path):
    bad = {name: Path(shutil.copytree(pipeline, tmp_path / name)) for name in ("code", "pickle", "kind", "unknown")}
    (bad["code"] / "pipeline.py").write_text("raise SystemExit")
    weights = bad["pickle"] / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    for name, kind in (("kind", "StableDiffusionUpscalePipeline"), ("unknown", ["pipeline", "Mine"])):
        index = bad[name] / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": kind}))
    for name, told in (
        ("code", r"comes with code \(.*pipeline\.py\), which is not run"),
        ("unknown", r"asks for \['pipeline', 'Mine'\], which this diffusers does not have"),
    ):
        with pytest.raises(ConfigError, match=told):
            ensure_data(config(f"data.image_model={bad[name]}"))
    with pytest.raises(ConfigError, match=r"cannot be read as a pipeline: .*diffusion_pytorch_model"):
        portraits.load_pipeline(bad["pickle"])
    with pytest.raises(ConfigError, match=r"has no option guidance\. It has .*guidance_scale"):
        ensure_data(config('"data.image_options={guidance: 1}"'))
    with pytest.raises(ConfigError, match="has no option prompt"):
        ensure_data(config('"data.image_options={prompt: x}"'))
    with pytest.raises(ConfigError, match=r"is refused by the pipeline: .*divisible by"):
        portraits.make_picture(pipeline, tmp_path / "a.png", "a man", 0, 32, STEPS | {"height": 31, "width": 64})
    with pytest.raises(ConfigError, match=r"model_index\.json: it is no diffusers pipeline"):
        ensure_data(config(f"data.image_model={tmp_path}"))
    with pytest.raises(ConfigError, match=r"is needed where data\.source is diffusers"):
        load_config(None, "data.source=diffusers")
    with pytest.raises(ConfigError, match=r"is read where data\.source is diffusers only"):
        load_config(None, "data.image_model=x")
    assert not (tmp_path / "mine").exists()


def test_a_missing_package_is_asked_for_in_one_sentence(config, monkeypatch):
    monkeypatch.setattr(portraits, "find_spec", lambda name: None)
    told = "data.source=diffusers needs a package that is not here: pip install 'mmrev-kit[diffusers]'."
    with pytest.raises(ConfigError, match=re.escape(told)):
        ensure_data(config())
