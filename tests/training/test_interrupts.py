"""Interrupts and deaths, in a real Jupyter server: no process of a run is left, and the next cell goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import psutil
import pytest
import websocket

from mmrev_kit.training.history import read_history

ROOT = Path(__file__).parents[2]
MARK = "MMREV_KIT_TEST_MARK"


def marked(mark: str) -> dict[int, str]:
    """{pid: command line} of all processes with this mark in their environment; zombies have none."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def wait_for(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.1)


class Lab:
    """A Jupyter server, spoken to as JupyterLab does."""

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.mark = uuid.uuid4().hex
        environment = os.environ | {MARK: self.mark, "PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(folder)}
        command = [sys.executable, "-m", "jupyter", "server", "--no-browser", "--allow-root", f"--port={self.port}"]
        command += ["--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={ROOT}"]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self.answers, 60, "answer of the server")

    def answers(self) -> bool:
        try:
            return bool(self.ask("GET", "status"))
        except OSError:
            return False

    def ask(self, method: str, path: str, content: dict | None = None):
        data = json.dumps(content).encode() if content is not None else None
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def kernel(self) -> str:
        """The id of a new kernel, as of a notebook in notebooks/ that a person has opened."""
        session = {"path": f"notebooks/{uuid.uuid4().hex}.ipynb", "type": "notebook", "kernel": {"name": "python3"}}
        return self.ask("POST", "sessions", session | {"name": "test"})["kernel"]["id"]

    def run(self, kernel: str, code: str) -> "Cell":
        return Cell(self, kernel, code)

    def others(self, baseline: dict) -> dict:
        return {pid: line for pid, line in marked(self.mark).items() if pid not in baseline}


class Cell:
    """A cell that was sent to a kernel; what it showed is in `text`."""

    def __init__(self, lab: Lab, kernel: str, code: str):
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{lab.port}/api/kernels/{kernel}/channels")
        self.id, self.text, self.types, self.status = uuid.uuid4().hex, "", [], None
        header = {
            "msg_id": self.id,
            "msg_type": "execute_request",
            "session": self.id,
            "username": "",
            "version": "5.4",
        }
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False, "stop_on_error": True}
        message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
        self.socket.send(json.dumps(message))

    def read(self, seconds: float, until=None) -> "Cell":
        """Take the cell's messages until it has ended, or `until()` holds."""
        end, idle = time.monotonic() + seconds, False
        self.socket.settimeout(0.2)
        while not (until and until()) and not (idle and self.status):
            assert time.monotonic() < end, self.text
            try:
                message = json.loads(self.socket.recv())
            except websocket.WebSocketTimeoutException:
                continue
            if message["parent_header"].get("msg_id") != self.id:
                continue
            kind, content = message["msg_type"], message["content"]
            self.types.append(kind)
            if kind == "stream":
                self.text += content["text"]
            elif kind == "error":
                self.text += "\n".join(content["traceback"])
            elif kind in ("execute_result", "display_data"):
                self.text += content["data"]["text/plain"]
            elif kind == "execute_reply":
                self.status = content["status"]
            elif kind == "status":
                idle = content["execution_state"] == "idle"
        return self


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    made = Lab(tmp_path_factory.mktemp("jupyter"))
    yield made
    made.process.send_signal(signal.SIGTERM)
    made.process.wait(30)
    for pid in marked(made.mark):
        os.kill(pid, signal.SIGKILL)


LONG = "training.num_epochs=3 training.save_steps=1 training.batch_size=4 launch.num_processes=2"
PROGRAM = """
import sys, time, signal
from pathlib import Path
from mmrev_kit.training import jobs
from mmrev_kit.training.processes import worker_state

def stuck(folder):
    with worker_state(folder) as state:
        (folder / f"{state.process_index}").touch()
BODY

folder = Path(sys.argv[1])
jobs.fork_workers(folder, 2, stuck, folder)
"""
STUCK = """
        if state.process_index == 1:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            time.sleep(600)
        import torch
        torch.distributed.all_reduce(torch.zeros(1))
"""
DONE = """
    time.sleep(600)
"""


def set_up(words: str) -> str:
    """The cells of train.ipynb before the launch."""
    return (
        "from mmrev_kit.config import reading as kit\nfrom mmrev_kit.notebook import launch\n"
        "from mmrev_kit.training import run as train\n"
        f"cfg = kit.load_config('configs/tiny_cpu.yaml', {words!r})\ntask = train.prepare(cfg)"
    )


def steps(folder: Path) -> int:
    history = folder / "training_history.json"
    return len(read_history(history)["steps"]) if history.is_file() else 0


def wait_for_end(pids) -> None:
    """Of all of these processes, within 10 s; a zombie has ended."""

    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    wait_for(lambda: not any(map(runs, pids)), 10, "end of all processes")


@pytest.mark.long
def test_a_job_ends_with_an_interrupt_a_dead_worker_and_a_dead_kernel(lab, small_overrides, tmp_path):
    folder, kernel = tmp_path / "outputs" / "small_forward", lab.kernel()
    assert lab.run(kernel, set_up(f"{small_overrides} {LONG}")).read(120).status == "ok"
    before = marked(lab.mark)

    cell = lab.run(kernel, "launch.launch(cfg)")
    cell.read(120, lambda: steps(folder) > 2 and "display_data" in cell.types)
    workers = lab.others(before)
    assert len(workers) == 3  # the clean Python and those that it forked
    lab.ask("POST", f"kernels/{kernel}/interrupt", {})
    wait_for_end(workers)
    cell.read(20)
    assert cell.status == "error" and "KeyboardInterrupt" in cell.text
    assert f"interrupted; start it again to go on from {folder / 'last'}" in cell.text
    assert cell.types.count("display_data") == 2  # the line and the live figure, then changed in their places
    assert read_history(folder / "training_history.json")["status"] == "interrupted"
    assert lab.run(kernel, "1 + 1").read(20).text == "2"

    done = steps(folder)
    cell = lab.run(kernel, "launch.launch(cfg)").read(120, lambda: steps(folder) > done + 2)
    assert f"2 processes, going on from {folder / 'last'}" in cell.text
    workers = lab.others(before)
    os.kill(max(workers), signal.SIGKILL)
    wait_for_end(workers)
    cell.read(20)
    assert cell.status == "error" and cell.text.count("killed by SIGKILL") == 1
    assert "process 1: TrainingError: the process was killed by SIGKILL" in cell.text
    assert f"failed; start it again to go on from {folder / 'last'}" in cell.text
    assert read_history(folder / "training_history.json")["status"] == "failed"

    done = steps(folder)
    lab.run(kernel, "launch.launch(cfg)").read(120, lambda: steps(folder) > done + 2)
    workers = lab.others(before)
    (pid,) = [pid for pid, line in before.items() if "ipykernel" in line]
    os.kill(pid, signal.SIGKILL)
    wait_for_end({pid, *workers})


@pytest.mark.long
def test_a_job_ends_with_the_process_that_launched_it(small_overrides, tmp_path):
    folder, code = tmp_path / "outputs" / "small_forward", set_up(f"{small_overrides} {LONG}")
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import peft\n{code}\nlaunch.launch(cfg)"], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    wait_for(lambda: steps(folder) > 2 or parent.poll() is not None, 120, "step")
    run = psutil.Process(parent.pid).children(recursive=True)
    assert len(run) == 3 and all(process.cmdline()[1:4] == ["-m", "mmrev_kit", "job"] for process in run)
    parent.kill()
    wait_for_end([process.pid for process in run])
    parent.wait(5)


@pytest.mark.long
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_command_that_ends_ends_papermill_and_its_run(small_overrides, tmp_path, sign):
    mark, folder = uuid.uuid4().hex, tmp_path / "outputs" / "small_forward"
    words = f"{small_overrides} {LONG} launch.num_processes=1"
    command = [sys.executable, "-m", "mmrev_kit", "notebook", "train", "-p", "output_dir", str(folder.parent)]
    with (tmp_path / "out.txt").open("wb") as out:
        made = subprocess.Popen(
            [*command, "-p", "overrides", words], cwd=ROOT, env=os.environ | {MARK: mark}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
    wait_for(lambda: steps(folder) > 2 or made.poll() is not None, 120, "step")
    run = marked(mark)
    assert len(run) == 4  # notebook, papermill, kernel, run
    if sign == signal.SIGKILL:
        made.kill()
        made.wait(5)
        return wait_for_end(run)
    os.killpg(made.pid, sign)  # as Ctrl-C does
    wait_for_end(run)
    assert made.wait(5) == 130
    text = (tmp_path / "out.txt").read_text()
    assert f"interrupted; run the same command again to go on with {folder}" in text
    assert (folder / "last" / "state.json").is_file()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("body", [STUCK, DONE], ids=["waiting for each other", "all work done"])
def test_workers_end_whatever_they_do(tmp_path, sign, body):
    """An interrupt after `worker_state` ends a worker without a result, for which torch's launcher waits for ever."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("BODY", body), str(tmp_path)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists(), 120, "start")
    time.sleep(0.5)  # until the first one waits for the second
    run = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
    assert len(run) >= 2
    process.send_signal(sign)
    wait_for_end({process.pid, *run})
    process.wait(5)
