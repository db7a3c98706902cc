"""Runs killed with SIGKILL at chosen moments: started again they end as if nothing had happened, bit by bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
HISTORY = "training_history.json"
# Epochs of 3 updates: last/ is saved after 2 of them (at steps 2, 4, 6, 8) and after each epoch. Epoch 1 and 3 improve.
SCENARIOS = {
    "whole1": (1, []),
    "at a step": (1, [["step", 6, 0]]),
    "the first last/ has no name yet": (1, [["last"]]),
    "between the renames of last/": (1, [[".last.aside", "last"]]),
    "between the renames of best/": (1, [["best", ".best.aside", "best"]]),
    "best/ saved, epoch not in the history": (1, [["best", HISTORY]]),
    "epoch in the history, last/ not saved": (1, [["best", HISTORY, HISTORY]]),
    "between epochs": (1, [["step", 4, 0]]),
    "final/ has no name yet": (1, [["final"]]),
    "final/ saved, history still running": (1, [["final", HISTORY]]),
    "three times": (1, [["last"], [".last.aside", "last"], ["best", ".last.aside", "last"]]),
    "whole2": (2, []),
    "one worker of two at a step": (2, [["step", 5, 1]]),
    "between the renames of last/ of two": (2, [[".last.aside", "last"]]),
    "one worker of two when all work is done": (2, [["done"]]),
}
# The folders of a run after its first kill; a name that begins with a dot is one being swapped.
LEFT = {
    "the first last/ has no name yet": [".last"],
    "between the renames of last/": [".last", ".last.aside", "best"],
    "between the renames of best/": [".best", ".best.aside", "last"],
    "final/ has no name yet": [".final", "best", "last"],
    "between the renames of last/ of two": [".last", ".last.aside", "best"],
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "tests/training/killed_runs.py", str(folder), json.dumps(SCENARIOS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.getenv("PYTHONPATH")]))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    logs = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in folder.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    return json.loads(done.stdout.splitlines()[-1])  # lines of progress may come first


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_run_ends_like_one_that_nothing_happened_to(killed, name):
    number, moments = SCENARIOS[name]
    *kills, last = killed[name]["tries"]
    # one process: SIGKILL, 9; of two, the launching one goes on, and raises an error when a worker is dead: 1
    killed_code = 0 if moments == [["done"]] else 9 if number == 1 else -1
    assert [one["code"] for one in kills] == [killed_code] * len(moments)
    assert last == {"code": 0, "folders": ["best", "final", "last"]}
    if name in LEFT:
        assert kills[0]["folders"] == LEFT[name]
    found, whole = killed[name]["outcome"], killed[f"whole{number}"]["outcome"]
    assert [step[0] for step in found["steps"]] == list(range(1, 10))
    assert found == whole
    assert found["left over"] == []


def test_the_run_decides_something(killed):
    """Otherwise equal decisions would say little: best/ is replaced once, and the rate is halved once."""
    epochs = killed["whole1"]["outcome"]["epochs"]
    assert [epoch["decision"]["improved"] for epoch in epochs] == [True, False, True]
    assert [epoch["lr"] for epoch in epochs] == [2e-3, 2e-3, 1e-3]
    assert killed["whole1"]["outcome"]["best"] == killed["whole1"]["outcome"]["final"]
