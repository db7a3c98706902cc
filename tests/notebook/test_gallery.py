"""Looking at rows: what is highlighted is what carries loss, and text stays text."""

import json
import re
from dataclasses import replace

import pytest
from matplotlib import pyplot

from mmrev_kit.config.project import experiment_dir
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.rows import read_entities
from mmrev_kit.data.run_data import read_experiment
from mmrev_kit.evaluation.predict import Question, predict
from mmrev_kit.model.processor import make_encoder
from mmrev_kit.notebook import gallery, knobs


@pytest.fixture
def encoder(small_config):
    return make_encoder(small_config())


@pytest.fixture
def rows(small_config):
    return read_experiment(experiment_dir(small_config()))[0]


def highlighted(page: str) -> str:
    return "".join(re.findall(r"<span style='background[^']*'>([^<]*)</span>", page))


@pytest.mark.parametrize("file", ["forward_train", "reverse_val", "mcq_i2d_test", "mcq_d2i_test"])
def test_the_answer_and_nothing_else_is_highlighted(encoder, rows, file):
    row = rows[file][2]
    page = gallery.prompt_html(encoder.encode(row), encoder)
    assert highlighted(page) == row.answer + "&lt;|im_end|&gt;"
    assert page.count("<img") == len(row.images) == page.count(" tokens</span>")
    assert f"{file}.jsonl:3" in page
    # a picture of 32 x 32 is 2 x 2 tokens of 16 pixels a side
    assert re.findall(r"(\d+) tokens</span>", page) == ["4"] * len(row.images)
    texts = [part if isinstance(part, str) else 4 for part in encoder.parts(row)] + [row.answer]
    own = sum(part if part == 4 else len(encoder.tokenizer(part).input_ids) for part in texts)
    # <|im_start|>user⏎ … <|im_end|>⏎ <|im_start|>assistant⏎ … <|im_end|>, and what stands about a picture
    frame = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    own += len(encoder.tokenizer(frame).input_ids) + 2 * len(row.images)
    assert f", {own} tokens</b>" in page


def test_each_task_is_shown_once_by_its_first_row(encoder, rows):
    chosen = [rows["reverse_val"][1], rows["forward_train"][2], rows["reverse_val"][0], rows["forward_train"][0]]
    page = gallery.prompts_html([encoder.encode(row) for row in chosen], encoder)
    assert re.findall(r"(\w+)\.jsonl:(\d+)", page) == [("reverse_val", "2"), ("forward_train", "3")]


def test_a_description_cannot_become_part_of_the_page(encoder, rows):
    row = replace(rows["reverse_train"][0], description="<script>alert(1)</script> <img src=x>")
    page = gallery.prompt_html(encoder.encode(row), encoder)
    text = re.sub(r"</?(?:span|div|b)[^>]*>", "", page)
    assert "<script" not in page and page.count("<img") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &lt;img src=x&gt;" in text


def shown(page: str) -> str:
    """The prompt of an answer's page as text, its pictures as their names in angle brackets."""
    prompt = page.split("<div>")[1].split("</div>")[0]
    return re.sub(r'<img alt="([^"]*)"[^>]*>', r"<\1>", prompt)


def test_a_description_that_holds_the_mark_of_a_picture_shifts_none(encoder, rows):
    row = replace(rows["mcq_d2i_test"][0], description="the [image] of [image] Hall")
    record = predict(Question(row, row.type.answers), encoder, "A", [0.0, -1.0, -2.0, -3.0], "none")
    a, b, c, d = (path.name for path in row.images)
    assert shown(gallery.answer_html(record)) == (
        f"the [image] of [image] Hall {row.connector}? A. <{a}> B. <{b}> C. <{c}> D. <{d}> Only answer A, B, C, or D."
    )
    older = {name: value for name, value in record.items() if name != "parts"}  # as earlier versions wrote it
    assert shown(gallery.answer_html(older)) == f"{record['prompt']}<{a}><{b}><{c}><{d}>"
    gone = json.loads(json.dumps(record)) | {"images": ["/nowhere/x.png", *record["images"][1:]]}
    assert f"A. [x.png] B. <{b}>" in shown(gallery.answer_html(gone))


def test_balances(rows):
    table = gallery.balance_table(rows)
    assert table.loc[("reverse_train", "main"), "answers"] == "Correct 60, Wrong 60"
    assert table.loc[("mcq_i2d_test", "control"), "answers"] == "A 3, B 3, C 3, D 3"
    assert table.loc[("forward_test", "main"), ["rows", "entities", "connectors"]].tolist() == [12, 4, 3]


def test_people_and_lengths_are_drawn_and_closed(small_config, encoder, rows):
    folder = experiment_dir(small_config())
    people = read_entities(folder)
    people[0]["description"] = "worth $5 or $6"  # not mathematics
    figure = gallery.people_figure(people, folder)
    figure.canvas.draw()
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert len(titles) == 8 and "worth $5 or $6" in titles[0]
    samples = [encoder.encode(row) for file in ("forward_test", "mcq_d2i_test") for row in rows[file]]
    axis = gallery.lengths_figure(samples, 512).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["forward", "mcq_d2i"]
    sizes = [sorted(len(one.input_ids) for one in samples if one.row.task == task) for task in ("forward", "mcq_d2i")]
    told = [f"{own[0]} to {own[-1]}" for own in sizes]
    figure = gallery.lengths_figure(samples, 512)
    assert figure.alt == f"Tokens a row, of at most 512: forward {told[0]}, mcq_d2i {told[1]}."
    reached = {float(x) for line in figure.axes[0].lines for x in line.get_xdata()}
    assert {512.0, *(float(end) for own in sizes for end in (own[0], own[-1]))} <= reached  # lines to the ends
    assert pyplot.get_fignums() == []


def test_the_browser_walks_through_the_rows_of_a_file(encoder, rows, open_in_jupyterlab):
    open_in_jupyterlab()
    ordered = [encoder.encode(row) for file in ("forward_test", "mcq_d2i_test") for row in rows[file]]
    samples = [*ordered[:3], *reversed(ordered[3:]), ordered[4]]  # a plan's rows stand in its own order, and some again
    file, (number, back, on), page = (getattr(one, "children", one) for one in knobs.browse(samples, encoder).children)
    assert [name.split("/")[1] for name in file.options] == ["forward_test.jsonl", "mcq_d2i_test.jsonl"]
    assert "row 1 of 24" in page.value and "forward_test.jsonl:1," in page.value
    number.value = 5
    assert "row 5 of 24" in page.value and "forward_test.jsonl:5," in page.value
    on.click()
    assert "forward_test.jsonl:6," in page.value
    back.click()
    assert "forward_test.jsonl:5," in page.value
    file.value = file.options[1]
    assert "row 1 of 24" in page.value and "mcq_d2i_test.jsonl:1," in page.value
    number.value = 24
    on.click()
    assert "row 24 of 24" in page.value


def test_the_form_shows_the_picture_that_it_asks_about_and_that_it_is_answering(small_config, open_in_jupyterlab):
    open_in_jupyterlab()
    config, seen = small_config(), []

    def answer(image, text):
        seen.append((image, text, button.disabled, button.description))
        if text == "fails":
            raise ConfigError("told <why>")
        return "the <keeper>"

    answer.config = config
    shown, fields = knobs.ask_form(answer, None, None).children
    choice, path, words, _, button, answered = fields.children
    people = read_entities(experiment_dir(config))
    assert len(choice.options) == 1 + len(people) and people[0]["description"] in choice.options[1][0]
    first = shown.value
    choice.value = choice.options[3][1]
    assert path.value == choice.value and shown.value != first and shown.value.count("<img") == 1
    button.click()
    assert seen[-1] == (path.value, "[image] is", True, "answering \u2026")
    assert answered.value == "<b>the &lt;keeper&gt;</b>" and not button.disabled and button.description == "Ask"
    words.value = "fails"
    button.click()
    assert answered.value == "told &lt;why&gt;" and not button.disabled
    path.value = "nowhere.png"
    assert "<img" not in shown.value and "nowhere.png" in shown.value
