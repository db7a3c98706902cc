"""What a design can show, told before anything is made."""

import json

import pytest

from mmrev_kit.config.reading import load_config
from mmrev_kit.data.design import claim_power, design_lines, design_of, people_needed
from mmrev_kit.data.make import ensure_data
from mmrev_kit.data.tasks import CW


@pytest.fixture
def table(monkeypatch):
    """A table of powers in which 10 people a group have .8 with 6 questions, and 8 have .9 with 12."""
    powers = {
        "levels": [0.7, 0.95],
        CW: {"6": {"4": [0, 0.1], "10": [0.4, 0.8]}, "12": {"4": [0, 0.2], "8": [0.5, 0.9]}},
    }
    monkeypatch.setattr("mmrev_kit.data.design.read_asset", lambda name: {"powers": powers}[name])


def test_powers_are_looked_up_on_the_cautious_side(table):
    assert claim_power(CW, 6, 10) == claim_power(CW, 9, 11) == 0.8  # 9 questions count as 6
    assert claim_power(CW, 12, 9) == 0.9 and claim_power(CW, 12, 7) == 0.2  # 7 people count as 4
    assert claim_power(CW, 6, 3) == 0 and claim_power(CW, 5, 99) is None
    assert claim_power(CW, 6, 10, 0.825) == pytest.approx(0.6)  # half way between the levels
    assert (people_needed(CW, 6), people_needed(CW, 12), people_needed(CW, 12, 0.7)) == (10, 8, None)


def test_the_lines_name_the_setting_that_would_do(table):
    (line,) = design_lines(20, 0, 12, "forward", None)
    assert line.startswith("This design can reach no claim; data.num_control=8 would. (20 main and 0 control people")
    (line,) = design_lines(4, 4, 6, "reverse", None)
    assert "data.num_main=10 data.num_control=10 would" in line and "power of 0.10" in line
    assert "CW image first" in line  # what decides in task reverse
    (line,) = design_lines(8, 9, 12, "forward", None)
    assert line.startswith("The claim's power is 0.90: 8 main and 9 control people with 12 questions each in CW")
    assert "bound to its format" in design_lines(8, 8, 12, "forward", "generation")[1]
    assert "too few questions" in design_lines(8, 8, 3, "forward", None)[0]


def test_a_configuration_says_it_before_its_data_are_made(tmp_path, small_data):
    words = f"data.dir={tmp_path} experiment.name=lone data.num_main=4 data.num_control=0 retention.retention_ratio=0"
    config = load_config("configs/tiny_cpu.yaml", f"{words} data.image_size=32")
    needed = people_needed(CW, 9)
    (line,) = design_of(config)
    assert f"data.num_main={needed} data.num_control={needed} would" in line
    assert "4 main and 0 control people with 6 questions each" in line  # one wrong partner, asked about twice
    told, made = ensure_data(config)
    assert told == line and made.startswith(f"made {tmp_path}/lone; I2D and D2I of main cannot be read")
    again = ensure_data(config)  # now of the people and questions that are there
    assert again[0] == line and again[1] == f"found {tmp_path}/lone"
    config.data.source = "shapes"
    assert design_of(config) == []


def test_questions_are_counted_in_the_data(small_config):
    config = small_config()
    (line,) = design_of(config)
    rows = [json.loads(text) for text in open(f"{config.data.dir}/small/reverse_test.jsonl")]
    mine = {json.dumps(row) for row in rows if row["entity_id"] == rows[0]["entity_id"]}
    assert f"4 main and 4 control people with {len(mine)} questions each" in line
    told = f"data.num_main={people_needed(CW, 9)} data.num_control={people_needed(CW, 9)} would"
    assert len(mine) == 6 and told in line  # groups of the size that is needed have nine
    config.data.num_main = 20  # the people that are there count, not those that would be drawn
    assert design_of(config) == [line]
