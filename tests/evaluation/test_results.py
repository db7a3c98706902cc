"""Evaluations read back, side by side, and the result files of the original scripts."""

import json
from pathlib import Path

import pytest
from scipy.stats import binomtest

from mmrev_kit.config.reporting import decimal
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.evaluation.metrics import metrics
from mmrev_kit.evaluation.results import (
    complete,
    find_evaluations,
    judge_anew,
    published,
    read_evaluation,
    read_original,
    read_records,
)
from mmrev_kit.evaluation.tables import (
    accuracy_table,
    comparison_table,
    direction_table,
    drop_table,
    gate_table,
    notes,
    rates_table,
    verdict_lines,
)
from mmrev_kit.files import write_json, write_jsonl
from mmrev_kit.notebook.gallery import answer_html, answers_html
from mmrev_kit.notebook.plots import accuracy_figure, answers_figure

CW = ("Correct", "Wrong")
OPTIONS = {"forward": ("the head of Jade Temple", "x"), "reverse": CW, "cw_image": CW}


def record(test: str, entity: int, row: int, right: bool, **more) -> dict:
    options = OPTIONS.get(test, tuple("ABCD"))
    expected = options[row % 2]
    said = expected if right else options[(row + 1) % 2]
    return {
        "id": f"{test}_test.jsonl:{entity}-{row}", "test": test, "drop": "none", "order": None,
        "group": "main" if entity < 4 else "control", "entity_id": str(entity), "prompt": "[image] is",
        "images": ["/nowhere/face.png"], "expected": expected, "answer": said, "read_as": said, "right": right,
        "options": {option: -1.0 if option == said else -2.0 for option in options}, "likeliest": said,
        "likeliest_right": right,
    } | more  # fmt: skip


def all_records(right=lambda test, entity, row: True, **more) -> list[dict]:
    tests = ("forward", "reverse", "cw_image", "mcq_i2d", "mcq_d2i")
    return [record(t, e, r, right(t, e, r), **more) for t in tests for e in range(8) for r in range(2)]


def write_evaluation(folder, records, task, taught=None):
    write_jsonl(folder / "predictions.jsonl", records)
    complete(folder, {"task": task, "taught": taught})
    return folder


def whole_evaluation(folder: Path) -> Path:
    """As an evaluation leaves it, with its answers counted."""
    write_jsonl(folder / "predictions.jsonl", all_records())
    complete(folder, {"task": "forward", "key": "k"})
    return folder


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: cut(f / "predictions.jsonl", 40), r"predictions.jsonl: 40 rows, not the 80 that were written"),
        (lambda f: (f / "predictions.jsonl").write_text(""), "no prediction in it"),
        (lambda f: (f / "predictions.jsonl").unlink(), "There is no evaluation"),
        (lambda f: (f / "facts.json").write_text('{"task": '), "no whole evaluation"),
        (lambda f: (f / "facts.json").write_text("[]"), "no whole evaluation"),
        (lambda f: (f / "facts.json").unlink(), "no whole evaluation"),
    ],
)
def test_an_evaluation_that_is_not_whole_is_refused(tmp_path, spoil, told):
    folder = whole_evaluation(tmp_path / "run/eval/e")
    assert len(read_evaluation(folder).records) == 80
    spoil(folder)
    with pytest.raises(ConfigError, match=told):
        read_evaluation(folder)


def cut(path: Path, lines: int) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))


def test_kept_answers_are_judged_by_todays_rules_and_results_that_are_gone_are_written_again(tmp_path, capsys):
    """Older rules read "It might be Correct" as Correct; today's read nothing."""
    folder = tmp_path / "run/eval/e"
    records = all_records()
    old = next(one for one in records if one["test"] == "reverse" and one["expected"] == "Correct")
    old["answer"] = "It might be Correct"
    write_jsonl(folder / "predictions.jsonl", records)
    complete(folder, {"task": "forward", "key": "k"})
    accuracy = json.loads((folder / "metrics.json").read_text())["none"]["reverse"]["all"]["accuracy"]
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = read_evaluation(folder)  # as set beside another run: judged so too, and the files left as they are
    assert other.metrics["none"]["reverse"]["all"]["accuracy"] == 15 / 16
    assert "1 of 80 kept answers are judged otherwise by today's rules" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    judge_anew(folder)
    (found,) = [one for one in read_evaluation(folder).records if one["answer"] == "It might be Correct"]
    assert (found["read_as"], found["right"]) == (None, False)
    now = json.loads((folder / "metrics.json").read_text())["none"]["reverse"]["all"]["accuracy"]
    assert (accuracy, now) == (1.0, 15 / 16)
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    judge_anew(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    (folder / "verdict.json").unlink()
    judge_anew(folder)
    assert (folder / "verdict.json").is_file()


@pytest.fixture
def original(tmp_path):
    """As the scripts wrote it, field by field; the numbers are those published for the 8B model after training."""

    def part(correct: int, total: int) -> dict:
        example = {"prompt": "…", "expected": "Correct", "prediction": "Wrong", "correct": False}
        return {"accuracy": correct / total, "correct": correct, "total": total, "examples": [example]}

    values = {"forward": (57, 60), "reverse": (61, 120), "mcq_i2d": (5, 20), "mcq_d2i": (4, 20)}
    return write_json(tmp_path / "eval_results_8b.json", {test: part(*pair) for test, pair in values.items()})


def test_the_original_scripts_results_are_read_and_drawn_beside_a_run(original, tmp_path):
    found = read_original(original)["none"]
    assert found["cw_image"]["all"]["accuracy"] == 61 / 120 and found["forward"]["all"]["n"] == 60
    assert "reverse" not in found  # the scripts showed the image first
    low, high = binomtest(61, 120).proportion_ci(method="wilson")
    assert found["cw_image"]["all"]["wilson"] == pytest.approx([low, high])
    assert found["mcq_d2i"]["all"]["p_exact"] == pytest.approx(binomtest(4, 20, 0.25, "greater").pvalue)
    assert found["forward"]["all"]["p_exact"] is None  # chance 0: no test
    folder = write_evaluation(tmp_path / "run/eval/e", all_records(), "forward")
    both = {"run": read_evaluation(folder, "run"), "8b": read_evaluation(original)}
    table = direction_table(both)
    assert list(table.columns) == ["generation", "CW", "choice"]
    assert table.loc[("8b", "image → description", "all")].tolist() == [
        "0.95 (0.86 to 0.98)", "0.51 (0.42 to 0.60)", "0.25 (0.11 to 0.47)",
    ]  # fmt: skip
    assert table.loc[("8b", "description → image", "all")].tolist() == ["", "", "0.20 (0.08 to 0.42)"]
    assert [group for name, _, group in table.index if name == "run"] == ["main", "control"] * 2
    for group in ("main", "control"):
        cell = table.loc[("run", "description → image", group), "CW"]
        assert cell.startswith("1.00 (") and cell.endswith("), TPR 1.00, FPR 0.00, AUROC 1.00")
    figure = accuracy_figure({name: one.metrics for name, one in both.items()})
    drawn = {axis.get_title().replace("\n", ": "): axis.texts for axis in figure.axes if axis.get_title()}
    cells = {title: [text.get_text() for text in texts] for title, texts in drawn.items()}
    assert cells == {
        "forward: image → description": ["1.00", "1.00", "0.95"],
        "CW image first: image → description": ["1.00", "1.00", "0.51"],
        "I2D: image → description": ["1.00", "1.00", "0.25"],
        "CW: description → image": ["1.00", "1.00"],
        "D2I: description → image": ["1.00", "1.00", "0.20"],
    }


def test_the_published_numbers_stand_in_the_cells_that_they_belong_to(small_config):
    found = find_evaluations(small_config(), None, "published")
    assert list(found) == list(published()) and len(found) == 5
    run = found["8B forward + retention"]
    assert {test: (groups["all"]["correct"], groups["all"]["n"]) for test, groups in run.metrics["none"].items()} == {
        "forward": (57, 60), "cw_image": (61, 120), "mcq_i2d": (5, 20), "mcq_d2i": (4, 20),
    }  # fmt: skip
    table = direction_table(found)
    assert table.loc[(run.name, "image → description", "all"), "CW"] == "0.51 (0.42 to 0.60), TPR 0.45, FPR 0.43"
    assert (table["CW"].xs("description → image", level="direction") == "").all()  # nobody asked it
    assert drop_table(run.metrics).loc[("forward", "all"), "drop image"] == "0.03 right"
    (note,) = notes(found)
    assert "image first" in note and "no control group" in note
    for one in found.values():
        rates = one.metrics["none"]["cw_image"]["all"]["rates"]
        if rates:  # as many Correct as Wrong rows: the accuracy is that of the rates, which are rounded
            assert one.metrics["none"]["cw_image"]["all"]["accuracy"] == pytest.approx((1 + rates["tpr"] - rates["fpr"]) / 2, abs=0.01)  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        '{"train_loss": []}',
        '{"forward": {"accuracy": 1}}',
        '{"forward": {"accuracy": 0.9, "correct": 1, "total": 2, "examples": []}}',
        '{"forward": {"correct": 3, "total": 2}}',
    ],
)
def test_a_file_that_is_none_of_the_original_results_is_refused(tmp_path, content):
    (tmp_path / "eval_results.json").write_text(content)
    with pytest.raises(ConfigError, match=r"eval_results\.json"):
        read_original(tmp_path / "eval_results.json")


@pytest.mark.parametrize("stated", [0.95, 95.0, 95, 0.9499999])
def test_a_stated_accuracy_may_be_a_share_or_per_cent(tmp_path, stated):
    path = write_json(tmp_path / "e.json", {"forward": {"accuracy": stated, "correct": 57, "total": 60}})
    assert read_original(path)["none"]["forward"]["all"]["accuracy"] == 0.95


def test_tables_of_one_evaluation(tmp_path):
    records = all_records(lambda test, entity, row: test == "forward" or entity >= 4 or row == 0)
    dropped = [r | {"drop": "both", "right": None, "likeliest_right": None} for r in records]
    for row in dropped[:4]:
        row["read_as"], row["answer"] = None, ""
    found = read_evaluation(write_evaluation(tmp_path / "a_forward/eval/a", records + dropped, "forward"))
    assert found.name == "a_forward" and found.task == "forward"
    table = accuracy_table(found.metrics)
    assert table.loc[("CW", "main"), "accuracy"] == "0.50" and table.loc[("CW", "control"), "accuracy"] == "1.00"
    # Wilson's of 4 of 8; one-sided over the four persons, who are at chance in CW and above a chance of a quarter by
    # a quarter in choices: 1 of 2^4, times the four tests that have a chance (Holm)
    assert table.loc[("CW", "main")].drop("by entity").tolist() == [8, 4, 4, "0.50", "0.22 to 0.78", "0.50", "1.000", 0, "0.50"]  # fmt: skip  # noqa: E501
    assert table.loc[("I2D", "main"), ["chance", "p"]].tolist() == ["0.25", "0.250"]
    ends = found.metrics["none"]["reverse"]["main"]["cluster_interval"]
    assert table.loc[("CW", "main"), "by entity"] == " to ".join(map(decimal, ends))
    silent = [one | ({"read_as": None, "right": False} if one["id"].endswith(":0-0") else {}) for one in records]
    changed = accuracy_table(metrics(silent))
    assert changed.loc[("I2D", "main"), ["right", "unparsed", "by likeliest"]].tolist() == [3, 1, "0.50"]
    rates = rates_table(found.metrics)
    assert rates.loc[("CW", "main"), "TPR"] == "1.00" and rates.loc[("CW", "main"), "FPR"] == "1.00"
    assert rates.loc[("CW", "main"), "said Correct"] == 8 and rates.loc[("CW", "control"), "separation"] == "1.00"
    assert list(accuracy_table(found.metrics).index[:3]) == [
        ("forward", "all"),
        ("forward", "main"),
        ("forward", "control"),
    ]
    drops = drop_table(found.metrics)
    assert drops.loc[("CW", "main"), "drop none"] == "0.50 right"
    assert drops.loc[("forward", "main"), "drop both"] == "0.50 same answer"  # 4 of 8 became unparsed
    figure = answers_figure(found.metrics["none"])
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    tests = ["CW", "CW image first", "I2D", "D2I"]
    assert titles == [f"{test}, {group}" for group in ("main", "control") for test in tests]
    assert [text.get_text() for text in figure.axes[0].texts] == ["4", "0", "0", "4", "0", "0"]
    judged = found.verdict()
    words = {True: "yes", False: "no", None: "unknown"}
    assert list(gate_table(judged).itertuples(name=None)) == [
        (gate.name, words[gate.passed], gate.text) for gate in judged.gates
    ]
    lines = verdict_lines(judged)
    assert lines[0].startswith("VERDICT (CW): inconclusive (") and lines[1].startswith("Beside it (D2I): ")


def test_what_main_was_taught_is_kept_and_the_first_version_taught_generation(tmp_path):
    for task, taught, kinds in [
        ("forward", None, ("forward", "cw_image")),
        ("forward", "cw", ("cw_image",)),
        ("reverse", None, ("reverse",)),
    ]:
        folder = write_evaluation(tmp_path / f"{task}{taught}", all_records(), task, taught)
        assert read_evaluation(folder).verdict().taught == kinds
        assert tuple(json.loads((folder / "verdict.json").read_text())["taught"]) == kinds
    write_json(folder / "facts.json", {"task": "forward"})
    assert read_evaluation(folder).verdict().taught == ("forward",)


def test_two_runs_are_compared_row_by_row(tmp_path):
    first = read_evaluation(write_evaluation(tmp_path / "a/eval/e", all_records(), "forward"), "first")
    worse = all_records(lambda test, entity, row: not (test == "reverse" and entity < 3))
    second = read_evaluation(write_evaluation(tmp_path / "b/eval/e", worse, None), "second")
    table = comparison_table(first, second)
    assert table.loc["CW", "only first right"] == 6 and table.loc["CW", "only second right"] == 0
    assert table.loc["CW", "McNemar p (Holm)"] == "0.156"  # 5 * 2 * 0.5**6
    assert table.loc["CW", ["rows", "first", "second"]].tolist() == [16, "1.00", "0.63"]  # 10 of 16
    assert table.loc["CW", "permutation p"] == "0.250"  # 2 * 0.5**3: three persons differ, all one way
    assert not (tmp_path / "b/eval/e/verdict.json").exists()  # a base model has no direction that it was taught


def test_what_there_is_to_compare_is_found(small_config, original, tmp_path):
    config = small_config()
    write_evaluation(tmp_path / "outputs/small_reverse/eval/small", all_records(), "reverse")
    (tmp_path / "outputs/small_forward/eval/small").mkdir(parents=True)  # an evaluation that did not finish
    base = write_evaluation(tmp_path / "outputs/base_0/eval/small", all_records(), None)
    assert list(find_evaluations(config, base, str(original))) == ["small_reverse", "base", "eval_results_8b"]
    with pytest.raises(ConfigError, match="There is no evaluation"):
        find_evaluations(config, None, str(tmp_path / "nothing"))


def test_every_evaluation_that_is_named_is_compared_whatever_its_folders_are_called(small_config, tmp_path):
    """All evaluations of one data set end in its name; one is called as the run itself, one as the base."""
    config, mine = small_config(), tmp_path / "outputs/small_reverse/eval/small"
    write_evaluation(mine, all_records(), "reverse")
    base = write_evaluation(tmp_path / "outputs/base_0/eval/small", all_records(), None)
    names = ("a", "b", "small_reverse", "base")
    others = [write_evaluation(tmp_path / "other runs" / name / "eval/small", all_records(), None) for name in names]
    found = find_evaluations(config, base, " ".join(f"'{path}'" for path in others))
    assert [one.folder for one in found.values()] == [mine, base, *others]
    assert list(found) == ["small_reverse", "base", "a", "b", "small_reverse (small)", "base (small)"]
    assert all(one.name == name for name, one in found.items())
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        write_json(tmp_path / version / "eval_results.json", {"forward": {"correct": 1, "total": 2}})
    files = f"{tmp_path}/v1/eval_results.json {tmp_path}/v2/eval_results.json"
    assert list(find_evaluations(config, None, files))[1:] == ["eval_results", "eval_results (v2)"]
    with pytest.raises(ConfigError, match="eval/small twice"):
        find_evaluations(config, None, " ".join(["'" + str(others[0]) + "'"] * 4))
    with pytest.raises(ConfigError, match="Quote a path"):
        find_evaluations(config, None, "it's")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ('{"forward": {"correct": 3, "total": 10, "accuracy": "30%"}}', "forward says 3 of 10 and accuracy '30%'"),
        ('{"forward": {"correct": 3, "total": 10, "accuracy": [0.3]}}', "accuracy [0.3]"),
        ('{"forward": {"correct": 3, "total": 1e400}}', "3 of inf"),
        ('{"forward": {"correct": 3.7, "total": 10}}', "3.7 of 10"),
        ('{"forward": {"correct": "3", "total": "10", "accuracy": 0.3}}', "forward says '3' of '10' and accuracy 0.3"),
        ('{"forward": {"correct": true, "total": 10}}', "True of 10"),
        ('{"forward": {"correct": 1, "correct": 3, "total": 10}}', "'correct' is given twice"),
        ('{"forward": {"correct": NaN, "total": 10}}', "NaN is no number of JSON"),
        ('{"mcq_I2D": {"correct": 3, "total": 10}, "forward": {"correct": 1, "total": 2}}', "mcq_I2D: no such test"),
        ('{"reverse": {"correct": 3, "total": 9}, "cw_image": {"correct": 1, "total": 1}}', "both reverse and"),
        ("[1]", "no results file"),
    ],
)  # fmt: skip
def test_a_results_file_whose_numbers_would_be_misread_is_refused(tmp_path, values, told):
    (tmp_path / "eval_results.json").write_text(values)
    with pytest.raises(ConfigError) as caught:
        read_original(tmp_path / "eval_results.json")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def without(name: str):
    return lambda record: {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize(
    "change",
    [
        lambda record: {},
        lambda record: record | {"test": "CW"},
        lambda record: record | {"options": 3},
        without("entity_id"),
        without("options"),
    ],
)
def test_a_line_that_is_no_prediction_is_named(tmp_path, change):
    good = record("forward", 0, 0, True)
    bad = change(good)
    (tmp_path / "predictions.jsonl").write_text(f"{json.dumps(good)}\n\n{json.dumps(bad)}\n")
    with pytest.raises(ConfigError, match=r"predictions\.jsonl:3"):
        read_records(tmp_path / "predictions.jsonl")


@pytest.mark.parametrize("facts", [{"task": "cw"}, {"task": ["forward"]}, {"task": "forward", "taught": "all"}])
def test_facts_of_a_task_that_does_not_exist_are_refused(tmp_path, facts):
    folder = whole_evaluation(tmp_path / "run/eval/e")
    values = json.loads((folder / "facts.json").read_text())
    write_json(folder / "facts.json", values | facts)
    with pytest.raises(ConfigError, match="no whole evaluation"):
        read_evaluation(folder)


def test_the_gallery_shows_right_and_wrong_answers_and_escapes_them(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "face.png")
    records = all_records(lambda test, entity, row: row == 0, images=[str(tmp_path / "face.png")])
    page = answers_html(records)
    assert page.count("<img") == 5 * 2 * 2  # test x group x right or wrong
    assert answers_html(records, each=3).count("<img") == 5 * 2 * 2 * 3  # of four each
    html = answer_html(
        record("reverse", 0, 1, False, parts=["<b>a</b> ", None, ", or"], answer="<script>", read_as=None)
    )
    assert "&lt;b&gt;a&lt;/b&gt; [face.png], or" in html and "&lt;script&gt;" in html and "unparsed" in html
    assert "<script>" not in html and html.index("Correct -1.00") < html.index("Wrong -2.00")
