"""The memory budget for readers: bars, knobs, modes, and the guide's numbers."""

from pathlib import Path

import pytest
from families import FAMILIES

from mmrev_kit.config.reading import load_config
from mmrev_kit.config.reporting import decimal
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.memory.estimate import GIB, lora_tensors, optimizer_bytes
from mmrev_kit.memory.plan import MARGIN, candidate, padded_updates, with_memory
from mmrev_kit.memory.shapes import as_shapes, visual_tokens
from mmrev_kit.notebook import budget

LARGE = "configs/config_qwen3vl32_fp16.yaml"


@pytest.fixture
def config():
    return load_config(LARGE)


def test_the_bars_add_up_to_what_the_card_shows(config):
    found, plan = budget.budget(config, "32b", "V100 32", micro_batch=8)
    for one in found.values():
        assert sum(budget.grouped(one).values()) == pytest.approx(one.device_gib)
    assert plan.fits and found["as planned"].device_gib <= plan.card_gib * (1 - MARGIN)
    assert found["without checkpointing"].device_gib > 2 * found["as set"].device_gib
    figure = budget.budget_figure(found, "V100 32")
    texts = [text.get_text() for text in figure.axes[0].texts]
    totals = [decimal(one.device_gib, 1) for one in found.values()]
    assert [text.split(":")[0] for text in texts] == totals
    assert all(f"{name} {total}" in figure.alt for name, total in zip(found, totals, strict=True))
    for number, one in enumerate(found.values()):
        widths = [bars[number].get_width() for bars in figure.axes[0].containers[: len(budget.GROUPS) + 1]]
        assert sum(widths) == pytest.approx(one.device_gib)
    assert any("does not fit" in text for text in texts) and len(figure.axes[0].containers) == len(budget.GROUPS) + 1


def test_every_knob_moves_the_bar(config):
    base, plan = budget.budget(config, "8b", "A100 80", checkpointing=False)
    size = base["as set"].allocated_gib
    for knob, value, grows in (
        ("r", 64, True), ("length", 1024, True), ("optimizer", "adamw_8bit", False), ("checkpointing", True, False),
        ("micro_batch", 16, True),
    ):  # fmt: skip
        found, _ = budget.budget(config, "8b", "A100 80", **{"checkpointing": False, knob: value})
        assert (found["as set"].allocated_gib > size) == grows, knob
    more, _ = budget.budget(config, "8b", "A100 80", checkpointing=False, processes=8)
    one, _ = budget.budget(config, "8b", "A100 80", checkpointing=False, processes=1)
    assert more["as set"].device_gib > one["as set"].device_gib
    assert plan.card_gib == budget.CARDS["A100 80"]


def test_the_modes_are_the_guides_own_verdicts(config):
    table = budget.mode_table(config, "V100 32")
    assert list(table["V100 32"]) == ["fits", "fits", "out of memory"]
    assert list(budget.mode_table(config, "V100 32", spread=3)["V100 32"])[1] == "fits"
    assert table["GiB a card"]["deepspeed ZeRO-2"] > 60
    # over 3 cards a card holds 1 / 3 - 1 / 4 of the 16-bit model more than over 4: 33.4 billion weights, 62.1 GiB
    three = budget.mode_table(config, "V100 32", spread=3)["GiB a card"]["auto"]
    assert 12 * (three - table["GiB a card"]["auto"]) == pytest.approx(2 * 33.4e9 / GIB, rel=0.02)
    found, _ = budget.budget(config, "32b", "V100 32")
    assert table["GiB a card"]["qlora"] == pytest.approx(found["as planned"].device_gib, rel=0.2)
    assert table["cards"].tolist() == [8, 4, 8]


def test_the_guides_table_stands_beside_the_arithmetic(config):
    table = budget.guide_table(config)
    assert table["guide (GB)"].to_list() == [18.0, 0.5, 1.0, 8.0, 27.5]
    assert table["estimate (GB)"]["LoRA"] == pytest.approx(0.0797, abs=1e-4)  # 19,922,944 x 4 B
    assert table["estimate (GB)"]["optimizer"] == pytest.approx(0.1594, abs=1e-4)
    assert table["estimate (GB)"].iloc[:-1].sum() == pytest.approx(table["estimate (GB)"]["sum"])


def test_what_the_page_says_of_the_guides_numbers_is_computed(config):
    page = " ".join((Path(__file__).parents[2] / "configs" / "README.md").read_text(encoding="utf-8").split())
    section = page.split("## The guide's numbers")[1].split(" ## ")[0]
    shapes, training, targets = as_shapes("32b"), config.training, config.lora.target_modules
    count, double = (sum(lora_tensors(shapes, r, targets)) for r in (8, 16))
    few, many = (
        candidate(with_memory(config, micro_tokens=241), shapes, padded_updates([(241, 9, 196)] * rows, rows), 8, True)
        for rows in (4, 8)
    )
    visual = visual_tokens(shapes, 448 * 448)
    assert few.estimate.allocated_gib == many.estimate.allocated_gib and config.lora.r == 8
    assert visual_tokens(shapes, config.model.max_pixels) == visual and 4 * visual > training.max_length
    assert training.learning_rate * training.lr_reduction_factor < training.min_lr
    for words in (
        f"{' + '.join(f'{size:g}' for size in budget.GUIDE_GB.values())} = {sum(budget.GUIDE_GB.values())} GB",
        f"{count:,} at r 8", f"in {shapes.num_hidden_layers} layers: {count / 33.4e9:.2%}".replace("%", " %"),
        f"{4 * count / 1e6:.0f} MB in fp32; {4 * double / 1e6:.0f} MB is r 16",
        f"{4 * count / 1e9:.2f} + {optimizer_bytes([count], 'adamw') / 1e9:.2f} GB, not 0.5 + 1 GB",
        f"4 steps take {few.estimate.allocated_gib:.2f} GiB and 8 take {many.estimate.allocated_gib:.2f}",
        f"4 x {visual} = {4 * visual} visual tokens, which a max_length of {training.max_length} cannot hold",
        f"the largest into {2 * shapes.hidden_size * shapes.intermediate_size / GIB:.2f} GiB",
        f"{training.learning_rate:.0e} x {training.lr_reduction_factor:g}".replace("e-0", "e-"),
        f"below min_lr = {training.min_lr:.0e}".replace("e-0", "e-"),
    ):  # fmt: skip
        assert words in section, words


def test_what_the_page_says_of_zero_is_computed(config):
    page = " ".join((Path(__file__).parents[2] / "configs" / "README.md").read_text(encoding="utf-8").split())
    section = page.split("## Modes")[1].split(" ## ")[0]
    counts = {size: sum(lora_tensors(as_shapes(size), 8, config.lora.target_modules)) for size in ("2b", "8b", "32b")}
    shared = {size: (4 * count + optimizer_bytes([count], "adamw")) / GIB for size, count in counts.items()}
    table = budget.mode_table(config, "V100 32")
    for words in (
        f"{counts['32b']:,} numbers with 4 B of gradient and 8 B",
        f"are {shared['32b']:.2f} GiB (2B: {shared['2b']:.2f}, 8B: {shared['8b']:.2f})",
        f"a 16-bit base of {2 * 33.4e9 / GIB:.0f} GiB",
        f"needs {table['GiB a card']['deepspeed ZeRO-2']:.0f} GiB a card",
    ):
        assert words in section, words


def test_headless_there_is_one_figure_and_in_jupyterlab_knobs(config, open_in_jupyterlab):
    start = {"model": "2b", "card": "RTX 4090 24", "micro_batch": 4}
    assert len(budget.controls(config, **start).axes) == 1
    open_in_jupyterlab()
    panel = budget.controls(config, **start)
    assert "data:image/png" in panel._repr_mimebundle_()["text/html"]  # what a page without widgets shows
    knobs, page = panel.children
    by_name = {knob.description: knob for knob in knobs.children}
    assert set(by_name) == {
        "model", "card", "r", "length", "pixels", "micro_batch", "checkpointing", "optimizer", "processes",
    }  # fmt: skip
    before = page.value
    by_name["model"].value = "32b"
    found, _ = budget.budget(config, **start | {"model": "32b"})
    assert f"as set {found['as set'].device_gib:.1f}, " in page.value and page.value.count("data:image/png") == 1
    assert page.value.split("base64")[1] != before.split("base64")[1]


def test_the_budget_is_that_of_the_configured_model_unless_another_is_named(config, family_folder, capsys):
    assert (budget.shown_model(config), budget.shown_model(config, "8b")) == ("32b", "8b")
    tiny = load_config("configs/tiny_cpu.yaml")
    assert as_shapes(budget.shown_model(tiny)) == as_shapes("embedded")
    assert as_shapes(budget.shown_model(tiny, "configs/models/qwen3vl_2b.json")) == as_shapes("2b")
    assert capsys.readouterr().out == ""
    folder = family_folder(FAMILIES["internvl"])
    for other, named in ((load_config("configs/tiny_cpu.yaml", f"model.name={folder}"), None), (config, str(folder))):
        assert budget.shown_model(other, named) is None
        assert f"{folder}: the memory estimate knows Qwen3-VL only" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="7b: no model of that name"):
        budget.shown_model(config, "7b")


def test_an_unknown_card_names_the_known_ones(config):
    with pytest.raises(ConfigError, match="H100 80"):
        budget.budget(config, "2b", "GTX 970")
    with pytest.raises(ConfigError, match="micro_batch = 0"):
        budget.budget(config, "2b", "H100 80", micro_batch=0)
