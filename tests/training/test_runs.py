"""Files that are whole or absent, and histories in strict JSON, the kit's own and the original scripts'."""

import errno
import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from mmrev_kit import files
from mmrev_kit.files import finite, fresh_folder, new_folder, to_json, write_json, write_jsonl, write_text
from mmrev_kit.training import history as history_module
from mmrev_kit.training.history import History, read_history

NAN, INF = math.nan, math.inf


def strict(text):
    """JSON as RFC 8259 has it: Python's NaN and Infinity are refused."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def names(folder):
    return sorted(os.listdir(folder))


@pytest.fixture
def full_disk(monkeypatch):
    """A function that makes the named function of `os` fail as on a full disk, from its nth call on."""

    def fail(name, call=1):
        real, calls = getattr(os, name), []

        def failing(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(files.os, name, failing)

    return fail


# JSON


@pytest.mark.parametrize(
    "value, expected",
    [
        (NAN, None),
        (INF, None),
        (-INF, None),
        (0.25, 0.25),
        ({"a": NAN, "b": [1.0, INF, {"c": (-INF, 2)}]}, {"a": None, "b": [1.0, None, {"c": [None, 2]}]}),
        ({1: "NaN", "n": None, "t": True}, {"1": "NaN", "n": None, "t": True}),
    ],
)
def test_numbers_that_are_not_finite_become_null(value, expected):
    assert finite(value) == expected
    assert strict(to_json(value)) == expected


def test_text_is_kept_readable():
    assert to_json("Zoë", indent=None) == '"Zoë"'


def test_write_json_and_jsonl(tmp_path):
    assert write_json(tmp_path / "a.json", {"x": NAN}) == tmp_path / "a.json"
    assert strict((tmp_path / "a.json").read_text()) == {"x": None}
    write_jsonl(tmp_path / "a.jsonl", ({"n": n, "text": "a\nb"} for n in range(3)))
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [strict(line) for line in lines] == [{"n": n, "text": "a\nb"} for n in range(3)]


def test_a_number_type_that_is_no_json_leaves_the_old_file(tmp_path):
    file = write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError):
        write_json(file, [object()])
    assert strict(file.read_text()) == [1]
    assert names(tmp_path) == ["a.json"]


# One file


def test_write_text_makes_folders_and_replaces(tmp_path):
    file = tmp_path / "a" / "b" / "c.txt"
    write_text(file, "a long first version\n")
    write_text(file, "ü\n")
    assert file.read_bytes() == b"\xc3\xbc\n"
    assert names(file.parent) == ["c.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("old", ["the old file\n", None])
def test_a_full_disk_leaves_the_old_file_whole(tmp_path, full_disk, call, old):
    file = tmp_path / "a.txt"
    if old:
        file.write_text(old)
    full_disk(call)
    with pytest.raises(OSError, match="No space left"):
        write_text(file, "the new file\n")
    assert (file.read_text() if file.exists() else None) == old
    assert names(tmp_path) == (["a.txt"] if old else [])


def test_a_text_that_cannot_be_encoded_leaves_the_old_file_whole(tmp_path):
    file = write_text(tmp_path / "a.txt", "the old file\n")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "x" * 100_000 + "\ud800")  # much of it is out before the fault
    assert file.read_text() == "the old file\n"
    assert names(tmp_path) == ["a.txt"]


def test_the_text_is_on_the_disk_before_the_name_is_given(tmp_path, monkeypatch):
    """A rename that reaches the disk before the text leaves an empty file after a power cut."""
    seen = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: (seen.append(os.fstat(handle).st_size), fsync(handle)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (seen.append(Path(a).parent), replace(a, b)))
    write_text(tmp_path / "a.txt", "12345")
    assert seen == [5, tmp_path]  # and it was written beside, on the same disk


# A folder


def test_new_folder_takes_its_place_at_the_end(tmp_path):
    target = tmp_path / "runs" / "best"
    with new_folder(target) as folder:
        assert folder.parent == target.parent  # the same disk, so that it can be renamed
        assert names(folder) == []
        (folder / "a.txt").write_text("a")
        assert not target.exists()
    assert names(target.parent) == ["best"]
    assert names(target) == ["a.txt"]


def test_others_may_read_what_a_run_saves(tmp_path):
    with new_folder(tmp_path / "last") as folder:
        (folder / "adapter.safetensors").write_bytes(b"1")
        (folder / "adapter.safetensors").chmod(0o600)  # as safetensors writes its files
    for path in (tmp_path / "last", tmp_path / "last" / "adapter.safetensors"):
        assert path.stat().st_mode & 0o044 == 0o044


def test_a_folder_in_a_new_one_can_be_entered_by_those_who_may_read_it(tmp_path):
    """Root enters every folder; for anybody else the pictures of an experiment would be out of reach."""
    with fresh_folder(tmp_path / "people") as folder:
        (folder / "images").mkdir()
        (folder / "images").chmod(0o755)
        (folder / "images" / "a.png").write_bytes(b"1")
    assert (tmp_path / "people" / "images").stat().st_mode & 0o777 == 0o755


def test_new_folder_replaces_the_old_one_as_a_whole(tmp_path):
    target = tmp_path / "best"
    target.mkdir()
    (target / "stale.txt").write_text("old")
    (target / "a.txt").write_text("old")
    with new_folder(target) as folder:
        (folder / "a.txt").write_text("new")
        assert (target / "a.txt").read_text() == "old"
        assert names(target) == ["a.txt", "stale.txt"]
    assert names(tmp_path) == ["best"]
    assert names(target) == ["a.txt"]
    assert (target / "a.txt").read_text() == "new"


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "full"), ValueError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [True, False])
def test_a_failure_inside_leaves_things_as_they_were(tmp_path, fault, old):
    target = tmp_path / "best"
    if old:
        target.mkdir()
        (target / "a.txt").write_text("old")
    with pytest.raises(type(fault)), new_folder(target) as folder:
        (folder / "a.txt").write_text("half")
        raise fault
    assert names(tmp_path) == (["best"] if old else [])
    assert not old or (target / "a.txt").read_text() == "old"


@pytest.mark.parametrize("call", [1, 2])
def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path, full_disk, call):
    """Call 1 moves the old folder aside, call 2 gives the new one its name."""
    target = tmp_path / "best"
    target.mkdir()
    (target / "a.txt").write_text("old")
    full_disk("replace", call)
    with pytest.raises(OSError, match="No space left"), new_folder(target) as folder:
        (folder / "a.txt").write_text("new")
    assert names(tmp_path) == ["best"]
    assert (target / "a.txt").read_text() == "old"


def test_an_old_folder_is_on_the_disk_at_every_rename(tmp_path, monkeypatch):
    target = tmp_path / "best"
    target.mkdir()
    (target / "a.txt").write_text("old")
    whole, replace = [], os.replace

    def watched(a, b):
        whole.append({file.read_text() for file in tmp_path.rglob("a.txt")})
        replace(a, b)

    monkeypatch.setattr(files.os, "replace", watched)
    with new_folder(target) as folder:
        (folder / "a.txt").write_text("new")
    assert whole == [{"old", "new"}] * 2
    assert (target / "a.txt").read_text() == "new"


def in_child_killed_at(call: int, work) -> bool:
    """Do `work` in a forked process that is killed with SIGKILL right before its nth operation on files (open, mkdir,
    chmod, rename, remove, rmdir); False where it ends before. The audit hook dies with the child."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = [call]

    def hook(event, arguments):
        if event in {"open", "os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir"}:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        work()
    finally:
        os._exit(0)


@pytest.mark.parametrize("old", [True, False])
def test_a_kill_at_any_moment_of_a_swap_leaves_a_whole_version_that_gets_its_name(tmp_path, old):
    target, file = tmp_path / "last", tmp_path / "training_history.json"

    def save(text: str) -> None:
        write_text(file, text)
        with new_folder(target) as folder:
            for name in ("a", "b"):
                (folder / name).write_text(text)

    versions, asides, calls = set(), 0, 0
    while True:
        if old:
            save("old")
        calls += 1
        killed = in_child_killed_at(calls, lambda: save("new"))
        asides += (tmp_path / ".last.aside").exists() and not target.exists()
        if calls % 2:  # the next save alone is enough, too
            files.tidy(tmp_path)
            left = {path.name for path in tmp_path.iterdir()}
            assert left <= {"last", "training_history.json"} and (not old or len(left) == 2)
            found = [path.read_text() for path in sorted(target.iterdir())] if target.exists() else []
            assert found in ([], ["old"] * 2, ["new"] * 2) and (found or not old)
            versions.add(tuple(found))
        if not killed:
            break
        if not old:
            files.remove_folder(target)
            file.unlink(missing_ok=True)
    assert versions == ({("old",) * 2, ("new",) * 2} if old else {(), ("new",) * 2})
    assert asides == old  # there is one such moment, and it was met
    assert calls > 12
    save("newest")
    files.tidy(tmp_path)
    assert names(tmp_path) == ["last", "training_history.json"] and (target / "b").read_text() == "newest"


def test_tidy_leaves_what_is_not_the_kits_own(tmp_path):
    kept = [
        ".git",
        ".nfs0000012",
        ".ipynb_checkpoints",
        ".best.asides",
        ".a.new",
        "x.new.abcdefgh",
        ".env.part.toolongname",
    ]
    for name in kept:
        (tmp_path / name).mkdir()
    for name in (".last.new.ab3_5678", ".best.aside", ".final.aside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    (tmp_path / "final").mkdir()
    (tmp_path / ".training_history.json.part.ab3_5678").write_text("{")
    files.tidy(tmp_path)
    assert names(tmp_path) == sorted([*kept, "best", "final"])
    assert names(tmp_path / "best") == ["a.txt"] and names(tmp_path / "final") == []


@pytest.mark.parametrize("error", [OSError(errno.EDQUOT, "Disk quota exceeded"), "safetensors", OSError(5, "I/O")])
def test_an_error_of_a_full_disk_says_where_and_how_much(tmp_path, error):
    if error == "safetensors":
        error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(Exception) as raised, new_folder(tmp_path / "a" / "last", 12_345):
        raise error
    if getattr(error, "errno", None) == 5:
        assert raised.value is error  # another fault stays what it is
        return
    free = shutil.disk_usage(tmp_path).free
    found = re.match(rf"No space left for {tmp_path}/a/last: it needs more than ([\d,]+) bytes", str(raised.value))
    assert isinstance(raised.value, files.DiskFull) and raised.value.__cause__ is error
    assert abs(int(found[1].replace(",", "")) - free) < 2**30


@pytest.mark.parametrize(
    ("free", "told"),
    [
        (348_160, "it needs more than 348,160 bytes, or a quota is used up."),  # 344,064 is what is known of it
        (340_000, "it needs at least 344,064 bytes; 340,000 bytes are free, or a quota is used up."),
    ],
)
def test_the_numbers_of_a_full_disk_add_up(tmp_path, monkeypatch, free, told):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(files.DiskFull, match=re.escape(told)), files.needing(tmp_path / "best", 344_064):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_history_on_a_full_disk_says_failed_in_the_bytes_that_it_has(tmp_path, full_disk):
    path = tmp_path / "training_history.json"
    History(path).write()
    size = path.stat().st_size
    full_disk("replace", 1)
    history_module.mark_ended(path, "interrupted")
    assert read_history(path)["status"] == "failed" and path.stat().st_size == size
    history_module.overwrite_status(path)  # once more: nothing is left to say
    assert read_history(path)["status"] == "failed"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(files.NotWritable, match=rf"{tmp_path}/a/b/c cannot be written \(.*Choose another folder"):
        write_text(tmp_path / "a" / "b" / "c", "")


@pytest.mark.parametrize("folder", [True, False])
def test_a_place_that_cannot_be_written_is_named_where_it_exists(folder):
    """Nobody, root neither, makes files in /proc."""
    with pytest.raises(files.NotWritable, match=r"/proc/mine cannot be written \(.*: /proc/\.mine\..*\)\. Choose"):
        if folder:
            with fresh_folder("/proc/mine"):
                pass
        write_text("/proc/mine", "")


def test_a_place_of_a_relative_path_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.chdir("/proc")
    with pytest.raises(files.NotWritable, match=r"^mine cannot be written"):
        write_text("mine", "")


@pytest.mark.parametrize("named", [7, b"/elsewhere"])
def test_an_error_that_names_an_open_file_or_bytes_stays_what_it_is(tmp_path, named):
    with pytest.raises(OSError, match="Errno 5") as told, files.needing(tmp_path / "a"):
        raise OSError(errno.EIO, "Input/output error", named)
    assert told.value.filename == named


@pytest.mark.parametrize("exists", [True, False])
def test_remove_folder(tmp_path, exists):
    folder = tmp_path / "last"
    if exists:
        folder.mkdir()
        (folder / "a.txt").write_text("a")
    files.remove_folder(folder)
    assert names(tmp_path) == []


# The history


@pytest.fixture
def clock(monkeypatch):
    """The time as History sees it; set clock.now."""
    fake = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(history_module, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def on_disk(history):
    return strict(history.path.read_text())


def test_steps_are_written_at_most_every_two_seconds(tmp_path, clock):
    history = History(tmp_path / "training_history.json")
    seen = []
    for number, clock.now in enumerate((1000.0, 1001.0, 1001.9, 1002.0, 1003.5, 1004.0, 1004.5), start=1):
        history.add_step({"global_step": number})
        seen.append(len(on_disk(history)["steps"]))
    # written at 1000, then not before 1002, then not before 1004
    assert seen == [1, 1, 1, 4, 4, 6, 6]
    assert [step["global_step"] for step in history.data["steps"]] == [1, 2, 3, 4, 5, 6, 7]


def test_the_pause_between_writes_can_be_set(tmp_path, clock, monkeypatch):
    monkeypatch.setattr("mmrev_kit.training.history.SECONDS_BETWEEN_WRITES", 0.0)
    history = History(tmp_path / "h.json")
    for number in (1, 2, 3):
        history.add_step({"global_step": number})
        assert len(on_disk(history)["steps"]) == number


def test_epochs_and_the_end_are_written_at_once(tmp_path, clock):
    history = History(tmp_path / "h.json")
    history.add_step({"global_step": 1})
    history.add_step({"global_step": 2})
    assert on_disk(history) == {"status": "running", "reason": None, "steps": [{"global_step": 1}], "epochs": []}
    history.add_epoch({"epoch": 1, "val_loss": {"forward": NAN}})
    assert on_disk(history)["epochs"] == [{"epoch": 1, "val_loss": {"forward": None}}]
    assert len(on_disk(history)["steps"]) == 2  # the waiting step comes along
    history.end("finished", "last epoch")
    assert (on_disk(history)["status"], on_disk(history)["reason"]) == ("finished", "last epoch")
    assert len(on_disk(history)["epochs"]) == 1


def test_a_nan_loss_at_step_3_is_null_in_the_file(tmp_path, monkeypatch):
    """The step keeps the mark that the loop gave it."""
    monkeypatch.setattr("mmrev_kit.training.history.SECONDS_BETWEEN_WRITES", 0.0)
    history = History(tmp_path / "h.json")
    for step, loss in enumerate((2.0, 1.0, NAN, 0.5), start=1):
        history.add_step({"global_step": step, "loss": loss} | ({} if loss == loss else {"skipped": True}))
    steps = on_disk(history)["steps"]
    assert [step["loss"] for step in steps] == [2.0, 1.0, None, 0.5]
    assert [step["global_step"] for step in steps if step.get("skipped")] == [3]


def test_two_histories_share_nothing(tmp_path):
    first, second = History(tmp_path / "a.json"), History(tmp_path / "b.json")
    first.add_step({"global_step": 1})
    assert second.data["steps"] == []


def test_a_history_goes_on_from_what_was_read(tmp_path):
    first = History(tmp_path / "h.json")
    first.add_epoch({"epoch": 1})
    second = History(tmp_path / "h.json")
    second.data = read_history(tmp_path / "h.json")
    second.add_epoch({"epoch": 2})
    assert [record["epoch"] for record in on_disk(second)["epochs"]] == [1, 2]


# Reading


def test_the_kits_own_form_reads_back_as_written(tmp_path):
    data = {
        "status": "finished",
        "reason": "last epoch",
        "task": "reverse",
        "steps_per_epoch": 1,
        "steps": [{"global_step": 1, "epoch": 1, "loss": 0.5, "lr": 1e-4, "grad_norm": None}],
        "epochs": [{"epoch": 1, "train_loss": 0.5, "val_loss": {"reverse": 0.4}, "lr": 1e-4, "decision": None}],
    }
    history = History(tmp_path / "h.json")
    history.data = data
    history.write()
    assert read_history(tmp_path / "h.json") == data


@pytest.fixture
def old_file(tmp_path):
    """A file as the original scripts wrote it: json.dumps, NaN and all."""

    def write(**content):
        file = tmp_path / "training_history.json"
        file.write_text(json.dumps(content))
        return file

    return write


def test_the_original_scripts_form(old_file):
    file = old_file(
        train_loss=[2.0, NAN, 0.5],
        val_loss=[1.5, 1.0, INF],
        epochs=[1, 2, 3],
        step_logs=[
            {"step": 10, "epoch": 1, "loss": 2.5, "lr": 1e-4},
            {"step": 20, "epoch": 1, "loss": NAN, "lr": 1e-4},
            {"global_step": 30, "epoch": 2, "train_loss": "0.75", "learning_rate": 5e-5, "grad_norm": 3.0},
        ],
    )
    assert "NaN" in file.read_text()
    found = read_history(file)
    rows = [(s["global_step"], s["epoch"], s["loss"], s["lr"], s["grad_norm"]) for s in found["steps"]]
    assert rows == [(10, 1, 2.5, 1e-4, None), (20, 1, None, 1e-4, None), (30, 2, 0.75, 5e-5, 3.0)]
    assert [record["epoch"] for record in found["epochs"]] == [1, 2, 3]
    assert [record["train_loss"] for record in found["epochs"]] == [2.0, None, 0.5]
    assert [list(record["val_loss"].values()) for record in found["epochs"]] == [[1.5], [1.0], [None]]
    assert all(record["lr"] is None and record["decision"] is None for record in found["epochs"])
    assert (found["status"], found["reason"], found["task"]) == ("finished", None, None)
    strict(to_json(found))


@pytest.mark.parametrize(
    "content, epochs, train, val",
    [
        ({"train_loss": [2.0, 1.0], "val_loss": [3.0]}, [1, 2], [2.0, 1.0], [3.0, None]),
        ({"train_loss": [2.0], "val_loss": [3.0, 4.0]}, [1, 2], [2.0, None], [3.0, 4.0]),
        ({"val_loss": [3.0], "epochs": [5]}, [5], [None], [3.0]),
        ({"train_loss": [2.0, 1.0], "epochs": [3, 4], "step_logs": []}, [3, 4], [2.0, 1.0], [None, None]),
    ],
)
def test_an_old_file_may_lack_a_list(old_file, content, epochs, train, val):
    found = read_history(old_file(**content))
    assert [record["epoch"] for record in found["epochs"]] == epochs
    assert [record["train_loss"] for record in found["epochs"]] == train
    assert [record["val_loss"]["validation"] for record in found["epochs"]] == val
    assert found["steps"] == []


def test_old_step_numbers_are_kept_and_made_where_missing(old_file):
    steps = read_history(old_file(step_logs=[{"step": 0, "loss": 1.0}, {"step": 1, "loss": 1.0}]))["steps"]
    assert [step["global_step"] for step in steps] == [0, 1]
    steps = read_history(old_file(step_logs=[{"loss": 1.0}, {"loss": 1.0}]))["steps"]
    assert [step["global_step"] for step in steps] == [1, 2]


def test_a_byte_order_mark_is_no_fault(old_file):
    file = old_file(train_loss=[1.0])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_history(file)["epochs"][0]["train_loss"] == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "3",
        "null",
        "[]",
        "{}",
        '{"loss": [1.0]}',
        '{"train_loss": 0.5}',
        '{"train_loss": [0.5], "epochs": 3}',
        '{"step_logs": [1, 2]}',
    ],
)
def test_junk_is_refused_by_name(tmp_path, text):
    file = tmp_path / "junk.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"junk\.json"):
        read_history(file)
