"""Sweeps: what a file stands for, runs side by side, a failure that is a row, going on, and one tidy table."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pandas
import pytest
from psutil import process_iter

from mmrev_kit.__main__ import main
from mmrev_kit.config.project import experiment_dir, project_root, run_dir
from mmrev_kit.config.reading import to_yaml
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.evaluation.results import pool, read_evaluation
from mmrev_kit.notebook import sweep_results, sweep_runs
from mmrev_kit.notebook.sweeps import Point, read_sweep

SHIPPED = sorted(project_root().glob("configs/sweeps/*.yaml"))
PEOPLE = "data.num_main=4 data.num_control=4 data.image_size=32 retention.retention_ratio=0"
SMALL = f"{PEOPLE} training.num_epochs=1 training.batch_size=64 evaluation.by_epoch=true evaluation.max_new_tokens=16"
GRID = """
question: Which?
seeds: [3, 5]
grid:
  taught:
    by CW: {experiment.taught: cw}
    on a base that is not there: {model.name: nowhere/at-all.json}
"""


@pytest.fixture
def written(tmp_path):
    """A function from a sweep's text to the sweep of that file, in the test's folder."""

    def write(text: str, overrides: str = "", **more):
        (tmp_path / "mine.yaml").write_text(text)
        where = f"launch.output_dir={tmp_path}/outputs data.dir={tmp_path}/data"
        return read_sweep(str(tmp_path / "mine.yaml"), overrides=f"{where} {overrides}", **more)

    return write


def test_a_grid_is_every_combination_with_every_seed_and_runs_have_names_of_their_own(written):
    sweep = written(
        "seeds: [0, 1]\nsettings: {training.num_epochs: 2}\ngrid:\n  lora.r: [2, 4]\n  how:\n"
        "    plain: {}\n    with words: {experiment.taught: cw, training.learning_rate: 1e-4}\n"
        "  lora.target_modules: [[q_proj], [q_proj, k_proj]]\n"
    )
    assert len(sweep.points) == 8 and len(sweep.runs()) == 16
    assert [seed for _, seed in sweep.runs()] == [0] * 8 + [1] * 8
    point = next(point for point in sweep.points if point.name == "r 4, with words, q_proj-k_proj")
    config = sweep.config(point, 1)
    assert (config.lora.r, config.lora.target_modules, config.experiment.taught) == (4, ["q_proj", "k_proj"], "cw")
    assert (config.training.learning_rate, config.training.num_epochs, config.experiment.seed) == (1e-4, 2, 1)
    assert len({run_dir(sweep.config(*run)) for run in sweep.runs()}) == 16
    assert {experiment_dir(sweep.config(*run)).name for run in sweep.runs()} == {"mine_seed0", "mine_seed1"}


def test_points_share_a_seeds_people_where_their_data_settings_are_equal(written):
    sweep = written("seeds: [0, 1]\ngrid:\n  data.num_main: [20, 16]\n  experiment.taught: [cw, both]\n")
    names = {(p.name, seed): experiment_dir(sweep.config(p, seed)).name for p, seed in sweep.runs()}
    assert names["num_main 20, cw", 0] == names["num_main 20, both", 0] == "mine_seed0"  # as in the base
    assert names["num_main 16, cw", 1] == names["num_main 16, both", 1] == "mine_seed1_num_main-16"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gird: {lora.r: [1]}", r"mine\.yaml: .*gird.*"),
        ("grid: {lora.rr: [1]}", r"lora\.rr"),
        ("grid: {lora.r: [1, 1]}", "a level comes twice"),
        ("grid: [lora.r]", r"mine\.yaml: Cannot merge"),
        ("grid: {lora.r: 3}", r"give a setting \(section\.key\) a list of levels"),
        ("grid: {lora.r: [-1]}", r"lora\.r = -1: must be a number from 1"),
        ("grid: {ranks: [1, 2]}", "an axis of another name levels with their settings"),
        ("grid: {lora.r: [1], a: {b: {lora.r: 2}}}", r"lora\.r and a both set lora\.r"),
        ("settings: {lora.r: 1}\ngrid: {lora.r: [1, 2]}", r"lora\.r: the grid sets it, and so do"),
        ("grid: {experiment.seed: [1, 2]}", r"experiment\.seed: a sweep names its runs itself"),
        (
            "settings: {experiment.task: reverse}\ngrid: {experiment.taught: [cw, both]}",
            "'cw' and 'both' would be one training: in task reverse main is taught reverse in both",
        ),
        ("grid: {a: {x y: {}, x-y: {lora.r: 2}}}", "'x y' and 'x-y' would have one folder"),
        ("seeds: [1, 1]\ngrid: {lora.r: [1]}", "seeds = .* must be different numbers"),
        ("seeds: [0, 1]\nsettings: {data.folder: data/mine}\ngrid: {lora.r: [1]}", "Give one seed"),
        ("expected: {r 2: no reversal curse}\ngrid: {lora.r: [1]}", r"there is no point 'r 2'\. There are r 1"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_made(written, tmp_path, text, told):
    with pytest.raises(ConfigError, match=told):
        written(text)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_sweep_can_be_read_and_says_what_it_asks(path):
    sweep = read_sweep(str(path))
    assert sweep.file.question.endswith("?") and len(sweep.runs()) <= 30
    assert len(sweep.seeds) == (1 if sweep.name == "bases" else 3)


@pytest.mark.parametrize(
    ("cores", "cards", "parallel", "processes", "expected"),
    [
        (2, 0, None, None, [[0, 1]]),  # two cores a run where nothing is said
        (5, 0, None, None, [[0, 2, 4], [1, 3]]),
        (2, 0, 2, None, [[0], [1]]),
        (1, 0, None, None, [[0]]),
        (8, 0, None, 4, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (16, 4, None, None, ["0", "1", "2", "3"]),
        (16, 4, 2, None, ["0,1", "2,3"]),
        (16, 8, None, 4, ["0,1,2,3", "4,5,6,7"]),
        (2, 0, 3, None, "parallel = 3: this machine has 2 cores, for at most 2"),
        (16, 4, 3, 2, "parallel = 3: this machine has 4 GPUs, for at most 2"),
        (2, 0, 0, None, "parallel = 0"),
        (2, 0, "two", None, "parallel = 'two'"),
    ],
)
def test_cores_and_cards_are_dealt_out(monkeypatch, cores, cards, parallel, processes, expected):
    monkeypatch.setattr(sweep_runs.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(sweep_runs, "read_cards", lambda: [None] * cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            sweep_runs.deal(parallel, processes)
        return
    shares = sweep_runs.deal(parallel, processes)
    assert [",".join(share.cards) if cards else share.cores for share in shares] == expected
    used = [core for share in shares for core in share.cores]
    assert sorted(used) == list(range(cores))


def test_cards_are_those_that_may_be_used(monkeypatch):
    monkeypatch.setattr(sweep_runs, "read_cards", lambda: [None] * 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7")
    assert [share.cards for share in sweep_runs.deal(None, None)] == [["5"], ["7"]]


@pytest.mark.long
def test_a_sweep_runs_fails_where_it_must_goes_on_and_is_one_table(written, tmp_path, capsys):
    sweep = written(GRID, SMALL)
    results = sweep_runs.run_sweep(sweep)
    good = [result for result in results if not result.error]
    assert [(result.point.name, result.seed) for result in good] == [("by CW", 3), ("by CW", 5)]
    assert all("nowhere has no at-all.json" in result.error for result in results if result.error)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("-- run ")]
    assert len(lines) == 4 and "of 4: seed " in lines[0] and " elapsed" in lines[-1]

    table = pandas.read_csv(sweep_results.write_csv(sweep, results))
    failed = table[table["error"].notna()]
    assert len(failed) == 2 and failed["accuracy"].isna().all() and set(failed["seed"]) == {3, 5}
    rows = table[table["error"].isna()]
    keys = ["point", "seed", "epoch", "test", "group"]
    assert not rows.duplicated(keys).any()
    for result in good:  # the table's numbers against the records, counted anew
        mine = rows[(rows["seed"] == result.seed) & rows["epoch"].isna()].set_index(["test", "group"])
        for test, group in mine.index:
            own = [r for r in result.evaluation.records if r["test"] == test and group in ("all", r["group"])]
            assert mine.loc[(test, group), "n"] == len(own)
            assert mine.loc[(test, group), "accuracy"] == pytest.approx(sum(r["right"] for r in own) / len(own))
            if test in ("reverse", "cw_image"):
                said = sum(r["read_as"] == "Correct" for r in own) / len(own)
                assert mine.loc[(test, group), "rate"] == pytest.approx(said)
        told = result.evaluation.verdict().claim
        assert set(mine["claim"]) == {told}
        after = rows[(rows["seed"] == result.seed) & (rows["epoch"] == 1)].set_index(["test", "group"])
        likeliest = [r for r in result.evaluation.records if r["test"] == "reverse" and r["group"] == "main"]
        share = sum(r["likeliest_right"] for r in likeliest) / len(likeliest)
        assert after.loc[("reverse", "main"), "accuracy"] == pytest.approx(share)  # best/ is the only epoch's
    pooled = rows[rows["seed"].isna()].set_index(["test", "group"])
    assert pooled.loc[("reverse", "main"), "people"] == 8  # four of each seed
    shown = sweep_results.claim_table(sweep, results)
    assert list(shown.index) == [("by CW", "all"), ("by CW", 3), ("by CW", 5)] + [
        ("on a base that is not there", seed) for seed in (3, 5)
    ]
    assert "CW, main: 0." in sweep_results.levels_figure(sweep, results).alt

    shutil.rmtree(run_dir(sweep.config(sweep.points[0], 5)) / "eval")  # as if cut before its evaluation
    again = sweep_runs.run_sweep(sweep)
    assert "1 of 4 runs are there; 3 to do" in capsys.readouterr().out
    assert [result.evaluation and result.evaluation.metrics for result in again] == [
        result.evaluation and result.evaluation.metrics for result in results
    ]


def test_a_run_of_another_configuration_is_not_taken_for_this_one(small_config, tmp_path):
    """The finished run of the first version, evaluated as it was."""
    config = small_config()
    assert sweep_runs.finished(config) is None
    shutil.copytree(project_root() / "tests/fixtures/first_version/finished", run_dir(config))
    evaluated = run_dir(config) / "eval" / experiment_dir(config).name
    (run_dir(config) / "eval" / "first").rename(evaluated)
    assert sweep_runs.finished(config) is None  # its config.yaml says other things
    for folder in (run_dir(config), evaluated):
        (folder / "config.yaml").write_text(to_yaml(config))
    assert sweep_runs.finished(config) == evaluated
    config.evaluation.by_epoch = True
    assert sweep_runs.finished(config) == evaluated
    config.evaluation.max_new_tokens += 1
    assert sweep_runs.finished(config) is None
    config.evaluation = replace(config.evaluation, max_samples=9)  # some questions only have a folder of their own
    part = evaluated.rename(f"{evaluated},max_samples=9")
    (part / "config.yaml").write_text(to_yaml(config))
    assert sweep_runs.finished(config) == part
    assert sweep_runs.read_result(config, Point({}, {}), 0).evaluation.folder == part


def test_people_of_every_seed_are_people_of_their_own(small_config):
    folder = project_root() / "tests/fixtures/first_version/finished/eval/first"
    one = read_evaluation(folder)
    both = pool("p", {0: one, 1: replace(one, name="again")})
    assert both.name == "p" and len(both.records) == 2 * len(one.records)
    assert both.metrics["none"]["forward"]["main"]["n_entities"] == 8
    assert both.metrics["none"]["forward"]["main"]["accuracy"] == one.metrics["none"]["forward"]["main"]["accuracy"]


def test_the_table_says_main_before_control_whatever_comes_first_in_an_evaluation(written):
    one = read_evaluation(project_root() / "tests/fixtures/first_version/finished/eval/first")
    records = sorted(one.records, key=lambda record: record["group"])  # control first
    sweep = written("grid: {lora.r: [1]}\n")
    flipped = pool("p", {0: replace(one, records=records)})
    result = sweep_runs.Result(sweep.points[0], 0, flipped, {"epochs": [{"epoch": n, "seconds": 45.0} for n in (1, 2)]})
    row = sweep_results.claim_table(sweep, [result]).loc[("r 1", 0)]
    assert row["training"] == "1 min 30 s" and row["claim"] == flipped.verdict().claim
    for test, title in (("forward", "forward"), ("reverse", "CW")):
        shares = [
            [r["right"] for r in records if r["group"] == group and r["test"] == test] for group in ("main", "control")
        ]
        assert row[title] == " / ".join(f"{sum(s) / len(s):.2f}" for s in shares)


def test_a_row_of_the_sweeps_csv_has_the_numbers_of_its_test_and_group(written):
    """Counted anew from the records; the AUROC over all pairs of a right and a wrong statement of one person, ties a
    half, as the mean over persons."""
    one = read_evaluation(project_root() / "tests/fixtures/first_version/finished/eval/first")
    sweep = written("grid: {lora.r: [1]}\n")
    table = pandas.read_csv(
        sweep_results.write_csv(sweep, [sweep_runs.Result(sweep.points[0], 7, one, {"epochs": []})])
    )
    row = table[(table["seed"] == 7) & (table["test"] == "reverse") & (table["group"] == "control")].iloc[0]
    mine = [r for r in one.records if (r["test"], r["group"], r["drop"]) == ("reverse", "control", "none")]
    margins = [
        (r["entity_id"], r["options"]["Correct"] - r["options"]["Wrong"], r["expected"] == "Correct") for r in mine
    ]
    shares = []
    for person in {person for person, *_ in margins}:
        right, wrong = ([m for who, m, true in margins if who == person and true is kind] for kind in (True, False))
        shares.append(sum((a > b) + 0.5 * (a == b) for a in right for b in wrong) / len(right) / len(wrong))
    assert row[["n", "people", "direction", "format"]].tolist() == [len(mine), 4, "description → image", "CW"]
    assert row["accuracy"] == pytest.approx(sum(r["right"] for r in mine) / len(mine))
    assert row["rate"] == pytest.approx(sum(r["read_as"] == "Correct" for r in mine) / len(mine))
    assert row["auroc"] == pytest.approx(sum(shares) / 4)
    assert row[["low", "high"]].tolist() == pytest.approx(one.metrics["none"]["reverse"]["control"]["cluster_interval"])
    assert row["low"] < row["accuracy"] < row["high"] and row["lora.r"] == 1


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    assert main(["sweep", str(tmp_path / "none.yaml")]) == 2
    assert "there is no such configuration file" in capsys.readouterr().err


def wait_for(condition, seconds: int = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)


@pytest.mark.long
def test_a_sweep_that_was_killed_leaves_nothing_running_and_goes_on_where_it_was(tmp_path):
    (tmp_path / "mine.yaml").write_text("grid: {experiment.taught: [cw]}\n")
    more = "training.save_steps=2 training.batch_size=8 training.num_epochs=2 evaluation.by_epoch=false"
    words = f"{SMALL} {more} launch.output_dir={tmp_path}/outputs data.dir={tmp_path}/data"
    command = [sys.executable, "-m", "mmrev_kit", "sweep", str(tmp_path / "mine.yaml"), "--overrides", words]
    run = tmp_path / "outputs" / "mine_seed0_cw_forward"
    process = subprocess.Popen(command, cwd=project_root(), stdout=subprocess.DEVNULL)
    try:
        wait_for((run / "last" / "state.json").is_file)
    finally:
        process.kill()
        process.wait()
    wait_for(
        lambda: not any(str(tmp_path) in " ".join(one.info["cmdline"] or []) for one in process_iter(["cmdline"])), 30
    )
    steps = len(json.loads((run / "training_history.json").read_text())["steps"])
    done = subprocess.run(command, cwd=project_root(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 1 runs are there; 1 to do" in done.stdout
    log = (tmp_path / "outputs" / "mine_sweep" / "runs" / run.name / "run.log").read_text()
    assert f"going on from {run / 'last'}" in log
    history = json.loads((run / "training_history.json").read_text())
    assert history["status"] == "finished" and len(history["steps"]) > steps
    assert pandas.read_csv(tmp_path / "outputs" / "mine_sweep" / "sweep.csv")["claim"].notna().all()
