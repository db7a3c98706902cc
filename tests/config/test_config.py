"""The configuration: typed strictly, one place for defaults, the guide's values to the letter."""

import math
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from mmrev_kit.config import reading as module
from mmrev_kit.config.project import effective_batch, experiment_dir, project_root, resolve, run_dir
from mmrev_kit.config.reading import differences, load_config, to_yaml
from mmrev_kit.config.sections import (
    Config,
    ConfigError,
    ExperimentConfig,
    RetentionConfig,
    RetentionWeights,
    TrainingConfig,
)
from mmrev_kit.config.seeds import rng_for, seed_for
from mmrev_kit.training.scheduler import warnings_for

ROOT = Path(__file__).resolve().parents[2]
YAMLS = sorted((ROOT / "configs").glob("*.yaml"))
GUIDE = "configs/config_qwen3vl32_fp16.yaml"
TINY = "configs/tiny_cpu.yaml"


@pytest.fixture
def load(tmp_path):
    """A function from YAML text to the configuration that it gives."""

    def load_text(text, **more):
        file = tmp_path / "given.yaml"
        file.write_text(text)
        return load_config(file, **more)

    return load_text


def value_of(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


# The two files


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: file.name)
def test_every_key_of_a_shipped_file_is_a_field_and_arrives_as_written(file):
    """Read again by PyYAML alone, whose 1.1 grammar leaves 1e-4 as text."""

    def leaves(mapping, target):
        assert is_dataclass(target)
        for key, value in mapping.items():
            assert key in {item.name for item in fields(target)}
            if isinstance(value, dict):
                yield from leaves(value, getattr(target, key))
            else:
                yield value, getattr(target, key)

    pairs = list(leaves(yaml.safe_load(file.read_text()), load_config(file)))
    assert len(pairs) > 4
    for written, arrived in pairs:
        assert arrived == (float(written) if isinstance(arrived, float) else written)


def test_the_two_files_are_the_ones_of_the_specification():
    assert {Path(GUIDE).name, Path(TINY).name} <= {file.name for file in YAMLS}


@pytest.mark.parametrize(
    "key, value",
    {
        "quantization.bits": 4,
        "quantization.double_quant": True,
        "quantization.compute_dtype": "fp16",
        "lora.r": 8,
        "lora.alpha": 16,
        "lora.dropout": 0.05,
        "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "training.learning_rate": 0.0001,
        "training.min_lr": 0.00006,
        "training.lr_reduction_factor": 0.5,
        "training.lr_patience": 1,
        "training.improvement_threshold": 0.05,
        "training.min_val_loss": 0.2,
        "training.batch_size": 1,
        "training.gradient_accumulation_steps": 8,
        "training.num_epochs": 10,
        "training.max_length": 512,
        "training.warmup_ratio": 0.02,
        "training.weight_decay": 0.01,
        "training.max_grad_norm": 1.0,
        "model.min_pixels": 65_536,
        "model.max_pixels": 200_704,
        "retention.face_share": 1.0,
        "retention.retention_ratio": 0.3,
        "retention.weights": RetentionWeights(1.0, 1.0, 1.0),
        "retention.tasks": ["forward"],
        "memory.gradient_checkpointing": True,
        "launch.num_processes": 8,
    }.items(),
)
def test_the_guides_values(key, value):
    found = value_of(load_config(GUIDE), key)
    assert found == value
    assert type(found) is type(value)


def test_the_defaults_are_the_guides_too():
    """The file repeats them, so that they can be read; what it says of this run alone is the model and the launch."""
    assert set(differences(Config(), load_config(GUIDE))) == {"model.name", "launch.num_processes", "experiment.taught"}


def test_pixels_are_squares_of_the_guides_sizes():
    model = load_config(GUIDE).model
    assert (math.isqrt(model.min_pixels), math.isqrt(model.max_pixels)) == (256, 448)
    assert (256**2, 448**2) == (model.min_pixels, model.max_pixels)


@pytest.mark.parametrize("processes, samples", [(8, 64), (1, 8), (3, 24)])
def test_effective_batch_of_the_guide(processes, samples):
    # 1 x 8 x 8 = 64
    assert effective_batch(load_config(GUIDE), processes) == samples


def test_effective_batch_multiplies_all_three():
    config = load_config(overrides="training.batch_size=3 training.gradient_accumulation_steps=5")
    assert effective_batch(config, 7) == 105  # 3 x 5 x 7


def test_tiny_is_the_embedded_model_with_a_control_group():
    tiny = load_config(TINY)
    assert (tiny.model.name, tiny.launch.num_processes) == ("embedded", 1)
    assert (tiny.data.num_main, tiny.data.num_control) == (20, 13)


# The warning about min_lr


def test_the_guides_first_reduction_is_told_to_end_the_run():
    (warning,) = warnings_for(load_config(GUIDE))
    assert "5e-05" in warning  # 1e-4 x 0.5
    assert "6e-05" in warning
    assert "min_lr" in warning


def test_a_rate_below_min_lr_is_told_to_end_after_the_first_epoch():
    (warning,) = warnings_for(Config(training=TrainingConfig(learning_rate=5e-5, min_lr=6e-5)))
    assert "training ends after the first epoch, whatever its loss" in warning and "5e-05" in warning


def test_tiny_has_nothing_to_warn_of():
    for words, told in (("task=forward taught=cw", 0), ("task=reverse taught=cw", 0), ("task=reverse taught=both", 1)):
        overrides = " ".join(f"experiment.{word}" for word in words.split())
        assert len(warnings_for(load_config(TINY, overrides))) == told
    assert warnings_for(load_config(TINY)) == []  # 2e-3 x 0.5 = 1e-3, not below 1e-4


@pytest.mark.parametrize(
    "rate, factor, min_lr, warned",
    [
        (2e-4, 0.5, 1e-4, 0),  # the reduced rate is min_lr, not below it
        (2e-4, 0.5, 1.01e-4, 1),
        (3e-4, 0.1, 3e-5, 0),  # equal as written; in binary the product is a hair below
    ],
)
def test_warned_only_below_min_lr(rate, factor, min_lr, warned):
    training = TrainingConfig(learning_rate=rate, lr_reduction_factor=factor, min_lr=min_lr)
    assert len(warnings_for(Config(training=training))) == warned


# Unknown keys


@pytest.mark.parametrize(
    "text, near",
    [
        ("trainig: {lr_patience: 2}", "training"),
        ("training: {lr_patiance: 2}", "lr_patience"),
        ("lora: {target_module: [q_proj]}", "target_modules"),
        ("retention: {weights: {mcq_i2s: 2}}", "mcq_i2d"),
    ],
)
def test_an_unknown_key_of_a_file_names_the_nearest(load, text, near):
    with pytest.raises(ConfigError, match=rf"given\.yaml.*not in.*'{near}'"):
        load(text)


@pytest.mark.parametrize(
    "key, near",
    [
        ("trainig.lr_patience", "training"),
        ("training.lr_patiance", "lr_patience"),
        ("retention.weights.mcq_d2", "mcq_d2i"),
    ],
)
def test_an_unknown_key_of_overrides_and_values_names_the_nearest(key, near):
    with pytest.raises(ConfigError, match=rf"overrides: {key}=2.*'{near}'"):
        load_config(overrides=f"{key}=2")
    with pytest.raises(ConfigError, match=rf"not in.*'{near}'"):
        load_config(values={key: 2})


def test_a_key_like_no_other_is_refused_too():
    with pytest.raises(ConfigError, match="zzz"):
        load_config(overrides="training.zzz=1")


# Types


@pytest.mark.parametrize("text", ["1e-4", "'1e-4'", "1.0e-4", "0.0001"])
def test_a_float_in_any_spelling(load, text):
    rate = load(f"training: {{learning_rate: {text}}}").training.learning_rate
    assert (rate, type(rate)) == (0.0001, float)


def test_a_whole_number_for_a_float_arrives_as_a_float(load):
    value = load("training: {max_grad_norm: 2}").training.max_grad_norm
    assert (value, type(value)) == (2.0, float)


@pytest.mark.parametrize(
    "text, key",
    [
        ("lora: {r: eight}", "lora.r"),
        ("lora: {r: 8.5}", "lora.r"),
        ("lora: {r: [8]}", "lora.r"),
        ("lora: {target_modules: q_proj}", "lora.target_modules"),
        ("launch: {overwrite: maybe}", "launch.overwrite"),
        ("training: {learning_rate: high}", "training.learning_rate"),
        ("retention: {weights: {cw: many}}", "retention.weights.cw"),
        ("training: 3", "training"),
    ],
)
def test_a_value_of_the_wrong_type_names_file_and_key(load, text, key):
    with pytest.raises(ConfigError, match=rf"given\.yaml.*\b{key}\b"):
        load(text)


@pytest.mark.parametrize(
    "text, key",
    [
        ("experiment: {name: 010}", "experiment.name"), ("experiment: {name: on}", "experiment.name"),
        ("experiment: {name: 1e3}", "experiment.name"), ("model: {revision: 0012345}", "model.revision"),
        ("lora: {target_modules: [1, q_proj]}", "lora.target_modules"),
    ],
)  # fmt: skip
def test_a_text_that_yaml_reads_as_something_else_is_to_be_quoted(load, text, key):
    with pytest.raises(ConfigError, match=rf"given\.yaml: {key} is text: put it in quotes"):
        load(text)


def test_a_quoted_text_stays_as_it_is(load):
    assert load("experiment: {name: '010'}").experiment.name == "010"


@pytest.mark.parametrize("name", ["x" * 260, "\u00e9" * 100, "a\nb", "a ", "a\0b", "a,data.num_main=4"])
def test_a_name_that_no_folder_can_have_is_refused(name):
    with pytest.raises(ConfigError, match=r"experiment\.name = .* must be a plain folder name"):
        load_config(values={"experiment.name": name})


def test_an_attention_that_transformers_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"attn_implementation = 'bogus': must be one of sdpa, eager"):
        load_config(overrides="model.attn_implementation=bogus")


@pytest.mark.parametrize("word", ["None", "none", "null", "~", "'None'", ""])
def test_none_in_a_file_is_no_value_where_one_is_optional(load, word):
    found = load(f"launch:\n  num_processes: {word}\nmodel:\n  revision: {word}\n")
    assert found.launch.num_processes is None
    assert found.model.revision is None


@pytest.mark.parametrize("key", ["lora.r", "training.learning_rate", "experiment.name", "lora.target_modules"])
@pytest.mark.parametrize("word", ["None", "null"])
def test_none_is_refused_where_a_value_is_required(load, key, word):
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=key):
        load(f"{section}:\n  {name}: {word}\n")
    with pytest.raises(ConfigError, match=key):
        load_config(overrides=f"{key}={word}")


# What papermill makes of `-p name value`


@pytest.mark.parametrize(
    "key, given, arrives",
    [
        ("launch.overwrite", "true", True),
        ("launch.overwrite", "false", False),
        ("launch.overwrite", True, True),
        ("launch.num_processes", 7, 7),  # -p num_processes 007
        ("launch.num_processes", "7", 7),
        ("training.learning_rate", 7, 7.0),
        ("training.learning_rate", "1e-4", 0.0001),
        ("training.learning_rate", 0.0001, 0.0001),
        ("experiment.name", 7, "7"),
        ("experiment.name", "true", "true"),
        ("lora.target_modules", ["q_proj"], ["q_proj"]),
    ],
)
def test_a_parameter_is_coerced_to_the_type_of_its_field(key, given, arrives):
    # overwrite starts as true, so that "false" is seen to arrive
    found = value_of(load_config(overrides="launch.overwrite=true", values={key: given}), key)
    assert found == arrives
    assert type(found) is type(arrives)


@pytest.mark.parametrize("given", [None, "none", "None", "null"])
def test_a_parameter_of_none_means_as_configured(load, given):
    values = {"launch.num_processes": given, "training.learning_rate": given, "launch.overwrite": given}
    found = load("launch: {num_processes: 3, overwrite: true}\ntraining: {learning_rate: 2e-3}", values=values)
    assert (found.launch.num_processes, found.training.learning_rate, found.launch.overwrite) == (3, 0.002, True)


@pytest.mark.parametrize(
    "key, given",
    [
        ("launch.num_processes", "true"),
        ("launch.num_processes", "false"),
        ("launch.num_processes", True),
        ("launch.num_processes", "[1,2]"),
        ("launch.num_processes", float("nan")),
        ("launch.num_processes", 2.5),
        ("training.learning_rate", "true"),
        ("training.learning_rate", "[1,2]"),
        ("training.learning_rate", float("nan")),
        ("training.learning_rate", float("inf")),
        ("launch.overwrite", "[1,2]"),
        ("launch.overwrite", float("nan")),
        ("experiment.task", "true"),
        ("experiment.task", 7),
        ("experiment.task", float("nan")),
        ("experiment.task", "[1,2]"),
        ("lora.target_modules", "[1,2]"),
        ("lora.target_modules", 7),
    ],
)
def test_a_parameter_that_does_not_fit_is_refused_by_name_and_value(key, given):
    with pytest.raises(ConfigError) as refused:
        load_config(values={key: given})
    assert key in str(refused.value)
    assert str(given) in str(refused.value)


@pytest.mark.parametrize("given", ["${nowhere}", "${model.name}", "???"])
def test_omegaconfs_own_syntax_is_no_way_around_the_types(given):
    """A reference that leads nowhere, a text where a number belongs, a mark for 'missing' that keeps the default."""
    with pytest.raises(ConfigError, match="num_processes"):
        load_config(values={"launch.num_processes": given})


# Sources and their order


def test_overrides_are_words_of_any_section():
    found = load_config(overrides="training.lr_patience=2 lora.r=16 retention.weights.cw=2.5 model.revision='a b'")
    assert differences(Config(), found) == {
        "training.lr_patience": (1, 2),
        "lora.r": (8, 16),
        "retention.weights": (RetentionWeights(1.0, 1.0, 1.0), RetentionWeights(2.5, 1.0, 1.0)),
        "model.revision": (None, "a b"),
    }


def test_an_override_may_be_a_list():
    assert load_config(overrides="lora.target_modules=[q_proj,v_proj]").lora.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize("text", ["0012345", "7e10", "1_000"])
def test_an_override_of_a_text_is_taken_as_typed(text):
    """A revision is the start of a git hash, which may be digits only."""
    assert load_config(overrides=f"model.revision={text}").model.revision == text


@pytest.mark.parametrize("text", ["lora.r", "lora.r 16", "lora.r=16 training", "lora.r='16", "lora.target_modules=[q"])
def test_an_override_of_another_form_is_refused(text):
    with pytest.raises(ConfigError, match="overrides"):
        load_config(overrides=text)


def test_later_sources_win(load):
    text = "lora: {r: 2, alpha: 2, dropout: 0.2}"
    found = load(text, overrides="lora.r=3 lora.alpha=3 lora.alpha=5", values={"lora.r": 4}).lora
    # r: 8 < 2 < 3 < 4; alpha: 16 < 2 < 3 < 5; dropout: 0.05 < 0.2; target_modules: only the default
    assert (found.r, found.alpha, found.dropout) == (4, 5, 0.2)
    assert found.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("text", ["", "# nothing yet\n"])
def test_an_empty_file_is_the_defaults(load, text):
    assert load(text) == Config() == load_config()


def test_one_configuration_does_not_change_another():
    load_config().lora.target_modules.append("gate_proj")
    assert load_config().lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("text", ["- lora", "3", "lora: [", "lora: {r: 1}\nlora: {r: 2}"])
def test_a_file_that_is_no_mapping_is_refused_by_name(load, text):
    with pytest.raises(ConfigError, match=r"given\.yaml"):
        load(text)


def test_a_missing_file_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"configs/none\.yaml: there is no"):
        load_config("configs/none.yaml")


# Ranges


@pytest.mark.parametrize(
    "key, value",
    [
        ("experiment.task", "backward"),
        ("experiment.name", "a/b"),
        ("experiment.name", ".."),
        ("model.min_pixels", 0),
        ("model.min_pixels", 200_705),  # above max_pixels
        ("quantization.bits", 8),
        ("quantization.compute_dtype", "fp8"),
        ("lora.r", 0),
        ("lora.alpha", 0),
        ("lora.dropout", 1.1),
        ("lora.dropout", 1.0),  # nothing would be learned
        ("lora.dropout", -0.1),
        ("lora.target_modules", []),
        ("data.images_per_entity", 0),
        ("data.image_size", 8),
        ("retention.retention_ratio", 1.0),  # r / (1 - r) has no value
        ("retention.retention_ratio", -0.1),
        ("retention.face_share", 1.1),
        ("retention.weights.cw", -1.0),
        ("retention.tasks", ["forwards"]),
        ("training.learning_rate", 0),
        ("training.learning_rate", -1e-4),
        ("training.min_lr", -1e-9),
        ("training.lr_reduction_factor", 1.0),
        ("training.lr_reduction_factor", 0.0),
        ("training.lr_patience", 0),
        ("training.improvement_threshold", -0.01),
        ("training.improvement_threshold", 1.01),
        ("training.batch_size", 0),
        ("training.gradient_accumulation_steps", 0),
        ("training.num_epochs", 0),
        ("training.max_length", 0),
        ("training.warmup_ratio", 1.5),
        ("training.max_grad_norm", 0),
        ("training.optimizer", "sgd"),
        ("launch.num_processes", 0),
    ],
)
def test_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        load_config(values={key: value})


@pytest.mark.parametrize(
    "key, value",
    [
        ("lora.dropout", 0.0),
        ("retention.retention_ratio", 0.0),
        ("training.min_lr", 0.0),
        ("training.improvement_threshold", 0.0),
        ("training.min_val_loss", 0.0),
        ("training.warmup_ratio", 0.0),
        ("training.weight_decay", 0.0),
        ("quantization.bits", 16),
        ("retention.weights.cw", 0.0),
        ("retention.tasks", ["forward", "reverse"]),
        ("training.optimizer", "paged_adamw_8bit"),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(key, value):
    assert value_of(load_config(values={key: value}), key) == value


def test_all_weights_zero_is_refused():
    with pytest.raises(ConfigError, match=r"retention\.weights"):
        RetentionConfig(weights=RetentionWeights(0.0, 0.0, 0.0))


# Saving and comparing


@pytest.mark.parametrize("file", [None, *YAMLS], ids=lambda file: file.name if file else "defaults")
def test_a_saved_configuration_reads_back_equal(load, file):
    changed = "training.learning_rate=3e-5 launch.num_processes=none lora.target_modules=[q_proj]"
    before = load_config(file, changed, {"model.revision": "a: b #c"})
    text = to_yaml(before)
    assert load(text) == before
    assert set(yaml.safe_load(text)) == {item.name for item in fields(Config)}  # the whole of it, not the differences


@pytest.mark.parametrize("name", ["007", "1e5", "true", "no", "nan", "2026-01-01", "12:30", "1_000", "Zoë #1"])
def test_a_name_that_looks_like_something_else_is_saved_as_text(load, name):
    assert load(to_yaml(Config(experiment=ExperimentConfig(name=name)))).experiment.name == name


def test_differences():
    a, b = load_config(), load_config(overrides="lora.r=4 training.num_epochs=3 launch.num_processes=2")
    assert differences(a, load_config()) == {}
    expected = {"lora.r": (8, 4), "training.num_epochs": (10, 3), "launch.num_processes": (None, 2)}
    assert differences(a, b) == expected
    assert differences(b, a) == {key: (new, old) for key, (old, new) in expected.items()}


# Paths


@pytest.mark.parametrize("folder", [".", "notebooks", "mmrev_kit/assets", "tests"])
def test_relative_paths_start_at_the_project_from_any_folder(monkeypatch, folder):
    monkeypatch.chdir(ROOT / folder)
    assert project_root() == ROOT
    assert resolve("data/x") == ROOT / "data" / "x"
    tiny = load_config(TINY)
    assert run_dir(tiny) == ROOT / "outputs" / "faces20x13_forward"
    assert experiment_dir(tiny) == ROOT / "data" / "faces20x13"


def test_outside_any_project_paths_start_beside_the_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolve("configs") == Path(module.__file__).resolve().parents[2] / "configs"


def test_the_nearest_project_counts(monkeypatch, tmp_path):
    """An installed package used from another checkout writes there, not beside itself."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "notebooks" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notebooks" / "mine")
    assert resolve("outputs") == tmp_path.resolve() / "outputs"


def test_an_absolute_path_stays(tmp_path):
    config = load_config(overrides=f"launch.output_dir={tmp_path}/o data.dir={tmp_path}/d experiment.task=reverse")
    assert run_dir(config) == tmp_path.resolve() / "o" / "faces20_reverse"
    assert experiment_dir(config) == tmp_path.resolve() / "d" / "faces20"


# Seeds


@pytest.mark.parametrize(
    "purpose, seed",
    [
        # printf 0/mix/face_cw/0 | sha256sum = fa328e062c47d3aa...; >> 1
        ((0, "mix", "face_cw", 0), 0x7D1947031623E9D5),
        # printf 7/data/faces20 | sha256sum = 7d0eadf0dbfcb804...; >> 1
        ((7, "data", "faces20"), 0x3E8756F86DFE5C02),
        # printf 0 | sha256sum = 5feceb66ffc86f38...; >> 1
        ((0,), 0x2FF675B37FE4379C),
    ],
)
def test_seeds_are_the_first_63_bits_of_a_hash(purpose, seed):
    assert seed_for(*purpose) == seed


def test_every_word_of_the_purpose_counts():
    purposes = [(0,), (1,), (0, "a"), (0, "b"), (1, "a"), (0, "a", 0), (0, "a", 1), (0, "a", 10), (0, "b", 0)]
    seeds = [seed_for(*purpose) for purpose in purposes]
    assert len(set(seeds)) == len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_do_not_disturb_each_other():
    alone = [rng_for(0, "a").random() for _ in range(3)]
    assert len(set(alone)) == 1
    first, other = rng_for(0, "a"), rng_for(0, "b")
    drawn = other.random(), first.random()
    assert drawn[1] == alone[0] != drawn[0]


def test_packing_none_is_a_choice_and_no_missing_value(tmp_path):
    config = load_config(None, "training.packing=none")
    assert config.training.packing == "none"
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config
    with pytest.raises(ConfigError, match="shared_prefix"):
        load_config(None, "training.packing=blocks")
