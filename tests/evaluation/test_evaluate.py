"""The five tests: answers and log-probabilities against one plain forward pass a row, on one process and on two."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmrev_kit.config.project import EMBEDDED_MODEL, run_dir
from mmrev_kit.config.reading import to_yaml
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.faults import DataError
from mmrev_kit.data.questions import choose_questions, read_questions, reorder
from mmrev_kit.data.run_data import people_digest
from mmrev_kit.evaluation import predict as predict_module
from mmrev_kit.evaluation.predict import check_answer_lengths, evaluation_key, judge
from mmrev_kit.evaluation.results import read_evaluation, read_records
from mmrev_kit.evaluation.tables import notes
from mmrev_kit.files import write_json, write_text
from mmrev_kit.model.loading import adapter_arguments, add_adapter, base_arguments, load_base, trainable
from mmrev_kit.model.processor import make_encoder
from mmrev_kit.model.scoring import generate, score_options
from mmrev_kit.notebook.launch import evaluate, refuse_other_inputs, what_to_ask

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    """The embedded model with an adapter that changes something."""
    from mmrev_kit.config.reading import load_config

    config = load_config("configs/tiny_cpu.yaml", "quantization.bits=16")
    torch.manual_seed(0)
    built = add_adapter(load_base(**base_arguments(config, CPU)), **adapter_arguments(config)).eval()
    for parameter in trainable(built):
        torch.nn.init.normal_(parameter, std=0.1)
    return built


def ask(config, drop="none"):
    encoder = make_encoder(config, drop)
    return encoder, read_questions(config)


def test_answers_that_may_not_be_as_long_as_the_right_one_are_refused_before_anything_is_loaded(small_config):
    """The longest expected answer and its end, by the tokenizer itself."""
    config = small_config()
    encoder, questions = ask(config)
    texts = {question.row.answer for question in questions}
    most = 1 + max(len(encoder.tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    config.evaluation.max_new_tokens = most
    check_answer_lengths(config, questions)
    config.evaluation.max_new_tokens = most - 1
    told = rf"max_new_tokens = {most - 1}: .* \d+ questions is longer, in .*forward_test\.jsonl:\d+ {most} tokens"
    with pytest.raises(ConfigError, match=told):
        evaluate(config, None)
    assert not list(Path(config.launch.output_dir).glob("base_*"))


@pytest.mark.parametrize(("setting", "was"), [("model.max_pixels", 16_384), ("training.max_length", 300)])
def test_a_run_is_not_asked_with_pictures_or_prompts_of_another_size_than_it_was_trained_on(small_config, setting, was):
    config = small_config(f"model.name=embedded-one-order {setting}={was}")
    folder = run_dir(config)
    shutil.copytree(Path(__file__).parents[1] / "fixtures/first_version/finished/best", folder / "best")
    write_text(folder / "config.yaml", to_yaml(config))
    other = small_config(f"model.name=embedded-one-order {setting}={was - 1}")
    with pytest.raises(ConfigError, match=rf"was trained with {setting} = {was}, not {was - 1}\. Set {setting}={was}"):
        evaluate(other)
    assert not (folder / "eval").exists()


def test_people_that_were_changed_after_the_training_are_refused(small_config, small_data, tmp_path, capsys):
    """A picture of another size, then a description, then both as they were in a folder of another name."""
    data = Path(shutil.copytree(small_data / "small", tmp_path / "mine"))
    config = small_config(f"data.folder={data}")
    folder = run_dir(config)
    write_text(folder / "config.yaml", to_yaml(config))
    write_json(folder / "manifest.json", {"people": people_digest(config)})
    refuse_other_inputs(config, folder)

    picture, people = next((data / "images").iterdir()), data / "entities.json"
    for path, content in ((picture, picture.read_bytes()), (people, people.read_bytes())):
        path.write_bytes(content + b"\n")
        with pytest.raises(ConfigError, match=r"not trained on these people and pictures of .*mine: they were"):
            refuse_other_inputs(config, folder)
        path.write_bytes(content)
    assert capsys.readouterr().out == ""

    other = Path(shutil.copytree(data, tmp_path / "other"))
    (other / "entities.json").write_bytes(people.read_bytes() + b"\n")
    refuse_other_inputs(small_config(f"data.folder={other}"), folder)
    assert "NOTE: " in capsys.readouterr().out


def test_an_unfinished_thought_is_unparsed_and_after_a_thought_the_answer_counts(small_config):
    _, questions = ask(small_config())
    by_test = {question.row.task: question for question in questions}
    choice, told = by_test["mcq_i2d"], by_test["forward"]
    for answer in ("<think>\nI need to check whether A", "<think>B</think><think> so A", "<think>"):
        assert judge(choice, answer) == (None, False)
    assert judge(told, f"<think> {told.row.answer}") == (None, False)
    letter = choice.row.answer
    assert judge(choice, f"<think>\nIs it {'A' if letter != 'A' else 'B'}?\n</think>\n\n{letter}") == (letter, True)
    assert judge(told, f"<think></think>{told.row.answer}") == (told.row.answer, True)


@pytest.mark.parametrize("task", ["forward", "reverse", "cw_image", "mcq_i2d", "mcq_d2i"])
def test_option_scores_equal_a_plain_forward_pass_of_each_option_alone(model, small_config, task):
    encoder, questions = ask(small_config())
    chosen = [question for question in questions if question.row.task == task][::5][:3]
    prompts = [encoder.encode(question.row, with_answer=False) for question in chosen]
    with torch.no_grad():
        found = score_options(model, encoder, prompts, [question.options for question in chosen], CPU)
        for index, question in enumerate(chosen):
            for column, option in enumerate(question.options):
                sample = encoder.encode(replace(question.row, answer=option))
                batch = encoder.collate([sample])
                batch.pop("labels")
                logs = model(**batch).logits[0].log_softmax(-1)
                places = range(sample.answer_start, len(sample.input_ids))
                expected = sum(logs[place - 1, sample.input_ids[place]].item() for place in places)
                assert found[index, column].item() == pytest.approx(expected, abs=2e-3)


def test_greedy_answers_do_not_depend_on_padding_or_the_cache(model, small_config):
    encoder, questions = ask(small_config())
    chosen = questions[::17]  # all tasks, lengths and numbers of images
    prompts = [encoder.encode(question.row, with_answer=False) for question in chosen]
    together = generate(model, encoder, prompts, 6, CPU)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt.input_ids])
        batch = encoder.collate([prompt])
        batch.pop("labels")
        for _ in range(6):  # the reference: no cache, one token at a time, the arg max
            batch["input_ids"], batch["attention_mask"] = ids, torch.ones_like(ids)
            batch["mm_token_type_ids"] = (ids == encoder.image_id).int()
            with torch.no_grad():
                token = model(**batch).logits[0, -1].argmax().item()
            if token == encoder.end_id:
                break
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        expected = encoder.tokenizer.decode(ids[0, len(prompt.input_ids) :], skip_special_tokens=True)
        assert answer == expected


def test_all_option_orders_keep_the_right_option_right(small_config):
    questions = [q for q in read_questions(small_config("evaluation.option_orders=true")) if q.order]
    assert len(questions) == 24 * 48  # two tests of 24 rows
    plain = {(q.row.task, q.row.where): q.row for q in read_questions(small_config())}
    for question in questions[::7]:
        row, old = question.row, plain[question.row.task, question.row.where]
        right, was = "ABCD".index(row.answer), "ABCD".index(old.answer)
        if row.task == "mcq_i2d":
            assert row.choices[right] == old.choices[was] and sorted(row.choices) == sorted(old.choices)
        else:
            assert row.images[right] == old.images[was] and sorted(row.images) == sorted(old.images)
    letters = [question.row.answer for question in questions[:24]]
    assert {letter: letters.count(letter) for letter in "ABCD"} == dict.fromkeys("ABCD", 6)
    row = questions[0].row
    assert reorder(row, (0, 1, 2, 3)).row == row


CW = ", correct or wrong? Only answer Correct or Wrong."
WHOLE = {"forward": "[image] is", "reverse": f"the d is [image]{CW}", "cw_image": f"[image] is the d{CW}"}
TEXTLESS = {
    "forward": "[image]",
    "reverse": f"[image]{CW}",
    "cw_image": f"[image]{CW}",
    "mcq_i2d": "[image] A. p B. q C. r D. s Only answer A, B, C, or D.",
    "mcq_d2i": "A. [image] B. [image] C. [image] D. [image] Only answer A, B, C, or D.",
}


@pytest.mark.parametrize(("drop", "prompts"), [("none", WHOLE), ("text", TEXTLESS)])
def test_what_is_left_of_a_prompt_without_its_text(small_config, drop, prompts):
    encoder, questions = ask(small_config(), drop)
    first = {question.row.task: question.row for question in questions}
    for task, expected in prompts.items():
        row = replace(first[task], description="the d", connector="is", choices=tuple("pqrs"))
        assert "".join("[image]" if isinstance(part, Path) else part for part in encoder.parts(row)) == expected


def test_a_dropped_image_is_a_neutral_picture_of_the_same_size(small_config):
    row = read_questions(small_config())[0].row
    whole, blank = make_encoder(small_config()), make_encoder(small_config(), "image")
    a, b = whole.collate([whole.encode(row)]), blank.collate([blank.encode(row)])
    assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["image_grid_thw"], b["image_grid_thw"])
    assert not torch.equal(a["pixel_values"], b["pixel_values"])
    assert b["pixel_values"].unique().numel() == 1 and b["pixel_values"].abs().max() < 0.01  # the middle of [-1, 1]


def test_an_unparsed_answer_is_a_miss(small_config):
    first = {question.row.task: question for question in read_questions(small_config())}
    assert judge(first["reverse"], "") == (None, False)
    assert judge(first["mcq_i2d"], "B and C") == (None, False)
    assert judge(first["reverse"], f"{first['reverse'].row.answer}.") == (first["reverse"].row.answer, True)
    assert judge(first["forward"], first["forward"].row.answer.upper() + ".")[1]


@pytest.fixture
def few(small_config, small_data, tmp_path):
    """A function from a number of rows to a configuration whose only test is that many mcq_d2i rows."""

    def make(rows: int, more: str = ""):
        folder = tmp_path / f"rows{rows}"
        if not folder.exists():
            shutil.copytree(small_data / "small", folder / "small")
            for name in ("forward_test", "reverse_test", "cw_image_test", "mcq_i2d_test"):
                (folder / "small" / f"{name}.jsonl").unlink()
            lines = (folder / "small" / "mcq_d2i_test.jsonl").read_text().splitlines(keepends=True)
            (folder / "small" / "mcq_d2i_test.jsonl").write_text("".join(lines[:rows]))
            (folder / "small" / "experiment_info.json").unlink()  # it says how many rows there were
        return small_config(f"data.dir={folder} evaluation.batch_size=2 {more}")

    return make


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def predictions(folder: Path) -> list[dict]:
    return records_of(folder / "predictions.jsonl")


@pytest.mark.long
@pytest.mark.parametrize("rows", [9, 1])
def test_each_row_is_counted_once_on_two_processes(few, rows, capsys):
    one = predictions(evaluate(few(rows), None))
    two = predictions(evaluate(few(rows, "launch.num_processes=2"), None, again=True))
    assert len(one) == len(two) == rows
    assert [record["id"] for record in two] == [f"mcq_d2i_test.jsonl:{line}" for line in range(1, rows + 1)]
    for left, right in zip(one, two, strict=True):
        assert right["options"] == pytest.approx(left["options"], abs=1e-4)
        assert {**left, "options": 0} == {**right, "options": 0}
    assert f"100%, {rows} of {rows} prompts (drop none)" in capsys.readouterr().out
    assert json.loads((evaluate(few(rows), None) / "facts.json").read_text())["num_processes"] == 2


def test_an_adapter_goes_only_onto_its_base(few, tmp_path):
    config = few(1)
    base = tmp_path / "base"
    shutil.copytree(EMBEDDED_MODEL, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.language_model.norm.weight"] += 0.5  # the same shapes, other weights
    save_file(tensors, base / "model.safetensors")
    write_text(run_dir(config) / "best" / "README.md", "---\nbase_fingerprint: 0123456789abcdef\n---\n")
    with pytest.raises(ConfigError, match=r"was trained on the base 0123456789abcdef; embedded is [0-9a-f]{16}"):
        evaluate(config)
    config.model.name = str(base)
    with pytest.raises(ConfigError, match=r"0123456789abcdef; .*base is [0-9a-f]{16}"):
        evaluate(config)
    with pytest.raises(ConfigError, match="not an adapter of a run"):
        evaluate(config, "final")


def test_evaluate_writes_answers_numbers_and_a_verdict_and_does_not_ask_twice(small_config, capsys):
    config = small_config("training.num_epochs=1 evaluation.batch_size=48")
    from mmrev_kit.notebook.launch import launch

    launch(config)
    folder = evaluate(config, drops=("none", "both"))
    records = read_records(folder / "predictions.jsonl")
    found = json.loads((folder / "metrics.json").read_text())
    for test, rows in {"forward": 24, "reverse": 96, "cw_image": 96, "mcq_i2d": 24, "mcq_d2i": 24}.items():
        mine = [record for record in records if (record["test"], record["drop"]) == (test, "none")]
        assert len(mine) == rows == found["none"][test]["all"]["n"]
        assert found["none"][test]["all"]["accuracy"] == sum(record["right"] for record in mine) / rows
        assert found["both"][test]["main"]["accuracy"] is None
        assert found["both"][test]["main"]["agreement"]["n"] == rows // 2
    judged = json.loads((folder / "verdict.json").read_text())
    assert judged["claim"] == "inconclusive" and judged["test"] == "reverse"  # one epoch teaches little
    written = (folder / "predictions.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert evaluate(config, drops=("none", "both")) == folder
    assert "holds this evaluation" in capsys.readouterr().out
    assert (folder / "predictions.jsonl").stat().st_mtime_ns == written

    # another adapter, another picture or other drops: asked again
    questions = read_questions(config)
    key = partial(evaluation_key, config, run_dir(config) / "best", "base", ("none",))
    other = [replace(questions[0], options=("x",)), *questions[1:]]
    tensors = load_file(run_dir(config) / "best" / "adapter_model.safetensors")
    before = key(questions)
    assert before == key(questions) != key(other)
    assert before != evaluation_key(config, run_dir(config) / "best", "base", ("none", "text"), questions)
    save_file(
        {name: tensor + 1 for name, tensor in tensors.items()}, run_dir(config) / "best/adapter_model.safetensors"
    )
    assert key(questions) != before


def test_an_experiment_without_test_files_is_refused_and_the_files_are_named(
    small_config, small_data, tmp_path, capsys
):
    folder = tmp_path / "mine"
    shutil.copytree(small_data / "small", folder)
    for path in folder.glob("*_test.jsonl"):
        path.rename(path.with_suffix(".gone"))
    config = small_config(f"data.folder={folder}")
    with pytest.raises(DataError, match=r"none of forward_test\.jsonl, .*mcq_d2i_test\.jsonl is there"):
        evaluate(config, None)
    assert not list(tmp_path.glob("outputs/**/eval"))


def test_the_key_covers_the_processor_and_the_versions(small_config, tmp_path, monkeypatch):
    shutil.copytree(EMBEDDED_MODEL, tmp_path / "base")
    config = small_config(f"model.name={tmp_path}/base")
    questions = read_questions(config)[:3]

    def key() -> str:
        return evaluation_key(config, None, "base", ("none",), questions)

    keys = [key()]
    for name in ("chat_template.jinja", "tokenizer.json", "preprocessor_config.json", "processor_config.json"):
        path = tmp_path / "base" / name
        if path.is_file():
            path.write_bytes(path.read_bytes() + b" ")
            keys.append(key())
    monkeypatch.setattr(predict_module, "version", lambda name: "0")
    keys.append(key())
    assert len(keys) >= 4 and len(set(keys)) == len(keys) and key() == keys[-1]


def test_some_tests_and_some_rows_of_each_are_asked(small_config):
    """Of 96 rows of reverse and 24 of mcq_i2d, drawn by the experiment's seed."""
    config = small_config("evaluation.tests=[mcq_i2d,reverse] evaluation.max_samples=30")
    everything = read_questions(config)
    chosen = choose_questions(config, everything)
    assert [question.row.task for question in chosen] == ["reverse"] * 30 + ["mcq_i2d"] * 24  # in the files' order
    assert len({question.row.where for question in chosen}) == 54 and all(q in everything for q in chosen)
    assert config.evaluation.partial == "tests=reverse+mcq_i2d,max_samples=30"
    assert choose_questions(config, everything) == chosen
    config.experiment.seed = 1
    assert choose_questions(config, everything) != chosen

    config = small_config("evaluation.tests=[mcq_i2d] evaluation.max_samples=2 evaluation.option_orders=true")
    orders = choose_questions(config, read_questions(config))
    assert len(orders) == 48 and len({question.row.where for question in orders}) == 2
    config = small_config()
    assert choose_questions(config, everything) == everything and config.evaluation.partial is None


def test_how_many_examples_are_shown_is_no_part_of_an_evaluations_key(small_config):
    config = small_config()
    questions = read_questions(config)[:3]
    keys = {
        evaluation_key(small_config(more), None, "base", ("none",), questions)
        for more in ("", "evaluation.save_examples=3", "evaluation.tests=[forward]", "evaluation.max_samples=3")
    }
    assert len(keys) == 1  # the questions themselves are
    assert evaluation_key(small_config("evaluation.batch_size=3"), None, "base", ("none",), questions) not in keys


@pytest.mark.long
def test_a_part_is_asked_beside_the_whole(few, capsys):
    whole = evaluate(few(9), None)
    before = (whole / "predictions.jsonl").read_bytes()
    part = evaluate(few(9, "evaluation.max_samples=4 evaluation.save_examples=2"), None)
    assert part.name == "small,max_samples=4" and part.parent == whole.parent
    assert len(predictions(part)) == 4 and (whole / "predictions.jsonl").read_bytes() == before
    told = "A part of an evaluation: 4 of 9 questions were asked (max_samples=4)."
    for name in ("facts.json", "metrics.json"):
        assert json.loads((part / name).read_text())["part"] == told
        assert "part" not in json.loads((whole / name).read_text())
    assert notes({"part": read_evaluation(part), "whole": read_evaluation(whole)}) == [told]
    page = (part / "examples.html").read_text()
    assert 1 <= page.count("right answer:") <= 4 and page.startswith("<!DOCTYPE html>")
    assert evaluate(few(9, "evaluation.max_samples=4"), None) == part  # not asked again, and without examples now
    assert "holds this evaluation" in capsys.readouterr().out and not (part / "examples.html").exists()
    assert len(what_to_ask(few(9, "evaluation.max_samples=9"))[0]) == 9
    assert what_to_ask(few(9, "evaluation.max_samples=9"))[1] == {}  # everything is asked: nothing is said of it
    with pytest.raises(ConfigError, match=r"evaluation\.tests = forward: .* has rows of mcq_d2i only"):
        evaluate(few(9, "evaluation.tests=[forward]"), None)


@pytest.mark.long
def test_an_evaluation_that_asks_with_trained_connectors_says_so(few):
    """The first version of its training rows had none of them."""
    config = few(9)
    before = evaluate(config, None)
    assert "note" not in json.loads((before / "facts.json").read_text())
    asked = [record["connector"] for record in records_of(Path(config.data.dir) / "small" / "mcq_d2i_test.jsonl")]
    trained = Path(config.data.dir) / "small" / "reverse_train.jsonl"
    first, *others = records_of(trained)
    lines = [json.dumps(record) for record in (first | {"connector": asked[0]}, *others)]
    trained.write_text("\n".join(lines))
    count = asked.count(asked[0])
    told = f"{count} of 9 mcq_d2i_test rows ask with a connector of the training rows: {asked[0]!r}."
    after = evaluate(config, None)
    assert json.loads((after / "facts.json").read_text())["note"] == told
    assert notes({"base": read_evaluation(after)}) == [told]


def test_an_unknown_drop_is_refused(small_config):
    with pytest.raises(ConfigError, match=r"drops = .pictures.: must be of none, image, text, both, none"):
        evaluate(small_config(), None, drops=("pictures",))
