"""The tests after each epoch: the numbers of an evaluation of that adapter, every row once, and training as without."""

import json
from collections import Counter
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from mmrev_kit.config.project import experiment_dir, run_dir
from mmrev_kit.data.questions import encode_questions, read_questions
from mmrev_kit.evaluation.metrics import of_epoch
from mmrev_kit.model.batches import question_shares
from mmrev_kit.model.loading import base_arguments, load_adapter, load_base
from mmrev_kit.model.processor import make_encoder
from mmrev_kit.model.scoring import score_options, score_samples
from mmrev_kit.notebook.launch import launch
from mmrev_kit.training.by_epoch import ask, count
from mmrev_kit.training.history import asked_line, read_history
from mmrev_kit.training.loop import train
from mmrev_kit.training.run import prepare, start

CPU = torch.device("cpu")
QUICK = "training.num_epochs=1 training.batch_size=64 retention.retention_ratio=0 quantization.bits=16"


@pytest.fixture
def state():
    return SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=CPU)


def asked_of(config, adapter) -> dict:
    """What an evaluation's own scoring, without packing and cached features, makes of an adapter: {(test, person):
    [rows, right ones, margins by right answer]}."""
    model = load_adapter(load_base(**base_arguments(config, CPU)), adapter).eval()
    encoder, found = make_encoder(config), {}
    with torch.no_grad():
        for questions in (list(part) for _, part in groupby(read_questions(config), lambda one: one.row.task)):
            prompts = [encoder.encode(question.row, with_answer=False) for question in questions]
            scores = score_options(model, encoder, prompts, [one.options for one in questions], CPU).tolist()
            keep(found, questions, scores)
    return found


def keep(found: dict, questions: list, scores: list[list[float]]) -> None:
    for question, own_scores in zip(questions, scores, strict=True):
        best = question.options[own_scores.index(max(own_scores))]
        own = found.setdefault((question.row.task, question.row.entity_id), [0, 0, {"Correct": [], "Wrong": []}])
        own[0], own[1] = own[0] + 1, own[1] + (best == question.row.answer)
        if question.options == ("Correct", "Wrong"):
            own[2][question.row.answer].append(own_scores[0] - own_scores[1])


def test_an_epochs_tests_are_those_of_its_adapter_and_training_is_as_without(
    small_config, state, tmp_path, monkeypatch
):
    monkeypatch.setattr("mmrev_kit.training.run.drop_tower", lambda model: setattr(model.model, "visual", None))
    plain = small_config(QUICK)
    train(plain, state)
    config = small_config(f"{QUICK} evaluation.by_epoch=true launch.output_dir={tmp_path}/asked")
    train(config, state)
    without, history = (read_history(run_dir(one) / "training_history.json") for one in (plain, config))
    assert [step["loss"] for step in without["steps"]] == [step["loss"] for step in history["steps"]]
    left, right = (load_file(run_dir(one) / "final" / "adapter_model.safetensors") for one in (plain, config))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert "tests" not in without["epochs"][0]

    (record,) = history["epochs"]
    lines = Counter()
    for test in record["tests"]:
        for line in (experiment_dir(config) / f"{test}_test.jsonl").read_text().splitlines():
            lines[test, json.loads(line)["entity_id"]] += 1
    found = {(test, name): person for test, people in record["tests"].items() for name, person in people.items()}
    assert {key: person["asked"] for key, person in found.items()} == lines and len(lines) == 5 * 8
    expected = asked_of(config, run_dir(config) / "final")
    for key, (asked, right, margins) in expected.items():
        assert (found[key]["asked"], found[key]["right"]) == (asked, right), key
        if key[0] in ("reverse", "cw_image"):
            for side, values in margins.items():
                assert found[key]["margins"][side] == pytest.approx(values, abs=3e-3)
        else:
            assert "margins" not in found[key]
    log = [line for line in prepare(config).describe() if line.startswith("tests after each epoch: ")]
    assert log and f" {sum(lines.values()):,} prompts, about " in log[0]


@pytest.mark.parametrize("packing", ["shared_prefix", "none"])
def test_shares_of_any_number_of_processes_have_every_question_once(small_config, state, packing):
    run = start(small_config(f"{QUICK} evaluation.by_epoch=true training.packing={packing}"), state)
    asked = run.task.asked[::9]
    samples = [sample for one in asked for sample in one.samples]
    run.model.eval()
    alone = score_samples(run.model, run.batcher, samples, run.dtype)
    parts = [score_samples(run.model, run.batcher, samples, run.dtype, process, 3) for process in range(3)]
    assert all(sum(part[index] != 0 for part in parts) == 1 for index in range(len(samples)))
    assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx(alone, abs=1e-3)


def test_what_prompts_share_is_computed_once(small_config):
    """D2I shows four images before its letters; a CW prompt has its image last; forward prompts begin with it."""
    config = small_config()
    encoder = make_encoder(config)
    asked = encode_questions(config, encoder)
    for test in ("mcq_d2i", "reverse", "forward"):
        own = [one for one in asked if one.question.row.task == test]
        samples = [sample for one in own for sample in one.samples]
        (share,) = question_shares(samples, "shared_prefix", encoder.image_id, 1)
        prompts, rows = sum(one.samples[0].answer_start for one in own), sum(len(s.input_ids) - 1 for s in samples)
        assert sum(group.tokens for group in share) < (0.6 * rows if test == "forward" else 1.1 * prompts)
        assert sum(len(group.samples) for group in share) == len(samples)


def test_the_likeliest_option_counts_and_margins_stand_by_the_right_answer():
    def question(task, answer, options, group="main"):
        row = SimpleNamespace(task=task, entity_id="p", group=group, answer=answer, type=SimpleNamespace(format=task))
        return SimpleNamespace(question=SimpleNamespace(row=row, options=options))

    asked = [question("CW", "Correct", ("Correct", "Wrong")), question("CW", "Wrong", ("Correct", "Wrong"))]
    asked.append(question("choice", "B", tuple("ABCD"), None))
    found = count(asked, [-1.0, -3.5, -0.5, -2.0, -9.0, -1.0, -8.0, -7.0])
    sides = {"Correct": [2.5], "Wrong": [1.5]}
    assert found["CW"]["p"] == {"group": "main", "asked": 2, "right": 1, "margins": sides}
    assert found["choice"]["p"] == {"group": "main", "asked": 1, "right": 1}


def test_numbers_of_an_epoch_by_hand():
    """Two people: all pairs of the first in order, of the second one of two and a tie."""
    people = {
        "a": {"group": "main", "asked": 4, "right": 3, "margins": {"Correct": [2.0, 1.0], "Wrong": [-1.0, 0.5]}},
        "b": {"group": "main", "asked": 4, "right": 1, "margins": {"Correct": [-1.0], "Wrong": [-2.0, -1.0, 0.0]}},
        "c": {"group": "control", "asked": 4, "right": 4, "margins": {"Correct": [1.0], "Wrong": [-1.0]}},
    }
    found = of_epoch({"reverse": people})["reverse"]
    assert list(found) == ["main", "control"]
    main = found["main"]
    assert (main["n"], main["n_entities"], main["accuracy"], main["chance"]) == (8, 2, 0.5, 0.5)
    assert main["rates"]["auroc"] == pytest.approx((1 + 1.5 / 3) / 2)
    assert main["rates"]["said_correct"] == pytest.approx(4 / 8)  # 2, 1, .5 and 0
    assert main["cluster_interval"][0] < 0.5 < main["cluster_interval"][1]
    plain = {name: {key: person[key] for key in ("group", "asked", "right")} for name, person in people.items()}
    told = of_epoch({"forward": plain})["forward"]["main"]
    assert told["chance"] == 0.5 and told["rates"] is None  # two descriptions to choose among


def test_the_line_about_an_epochs_tests_names_main_first():
    people = {"c": {"group": "control", "asked": 4, "right": 3}, "m": {"group": "main", "asked": 8, "right": 2}}
    line = asked_line({"epoch": 2, "tests": {"reverse": people, "mcq_d2i": people}, "tests_seconds": 1.26})
    assert line == "tests after epoch 2 (main / control): CW 0.25 / 0.75, D2I 0.25 / 0.75, 1.3 s"


def test_a_log_probability_that_is_not_finite_stops_the_run(small_config, state, monkeypatch):
    from mmrev_kit.training import by_epoch
    from mmrev_kit.training.update import TrainingError

    run = start(small_config(f"{QUICK} evaluation.by_epoch=true"), state)
    nan = [float("nan")] * sum(len(one.samples) for one in run.task.asked)
    monkeypatch.setattr(by_epoch, "score_samples", lambda *_: nan)
    where = run.task.asked[0].question.row.where
    with pytest.raises(TrainingError, match=f"an option of {where} has the log-probability nan"):
        ask(run)


@pytest.mark.long
def test_two_processes_ask_as_one_does(small_config, tmp_path):
    common = f"{QUICK} evaluation.by_epoch=true lora.dropout=0"
    two = launch(
        small_config(f"{common} launch.num_processes=2 training.batch_size=32 launch.output_dir={tmp_path}/two")
    )
    one = launch(small_config(common))
    for test, people in one["epochs"][0]["tests"].items():
        for name, person in people.items():
            other = two["epochs"][0]["tests"][test][name]
            assert other["asked"] == person["asked"]
            for side, margins in person.get("margins", {}).items():
                assert other["margins"][side] == pytest.approx(margins, abs=5e-3)
