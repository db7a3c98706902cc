"""What preflight says of a machine, with cards, builds and limits that are given to it; and a run without a network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmrev_kit.config.project import EMBEDDED_MODEL, run_dir
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.notebook import launch
from mmrev_kit.training.preflight import Card, memory_needed_gib, preflight, read_cards

ROOT = Path(__file__).parents[2]
BUILD = ["sm_70", "sm_80", "sm_90"]


def v100(free: float = 31.5, total: float = 32.0, driver: str = "580.65.06", holders: tuple = ()) -> Card:
    return Card("Tesla V100-SXM2-32GB", (7, 0), total, free, driver, list(holders))


def test_a_card_without_kernels_is_refused_before_anything_is_written(small_config, monkeypatch):
    """As launch does it: the cards are this machine's, the build is this torch's (none has kernels for 3.5)."""
    kepler = Card("Tesla K40", (3, 5), 12.0, 11.9, "580.65.06")
    monkeypatch.setattr("mmrev_kit.training.preflight.read_cards", lambda: [kepler])
    config = small_config()
    for start in (launch.launch, launch.evaluate):
        with pytest.raises(
            ConfigError, match=r"Tesla K40, compute capability 3\.5.*no kernels.*install torch 2\.10\.0"
        ):
            start(config)
    assert not run_dir(config).exists()


@pytest.mark.parametrize(
    ("driver", "cuda", "oldest"),
    [
        ("580.65.05", "13.0", "580.65.06"),
        ("575.57.08", "13.2", "580.65.06"),
        ("580.65.06", "13.0", None),
        ("580.159.04", "13.0", None),
        ("525.60.12", "12.8", "525.60.13"),
        ("525.105.17", "12.8", None),
        ("470.57.02", "12.6", "525.60.13"),
    ],
)
def test_a_driver_too_old_for_the_builds_cuda_is_refused(small_config, look, driver, cuda, oldest):
    problems = look(small_config(), [v100(driver=driver)], BUILD, cuda).problems
    if oldest is None:
        assert problems == []
    else:
        (problem,) = problems
        assert f"driver {driver} is too old" in problem and f"CUDA {cuda} and needs {oldest} or newer" in problem
        assert "Update the driver" in problem


def test_cards_of_different_size_are_told_and_the_smallest_is_named(small_config, look):
    cards = [v100(), v100(15.5, 16.0), v100()]
    found = look(small_config("launch.num_processes=3"), cards, BUILD, "12.8", 64.0)
    assert found.problems == []
    assert found.warnings == ["the cards differ: the smallest, GPU 1 with 16.0 GiB, decides"]
    assert look(small_config("launch.num_processes=1"), cards, BUILD, "12.8", 64.0).warnings == []  # GPU 0 alone


def test_cards_of_which_some_have_no_bf16_need_one_dtype_for_all(small_config, look):
    cards = [v100(), Card("A100", (8, 0), 32.0, 31.0, "580.65.06")]
    (problem,) = look(small_config("launch.num_processes=2"), cards, BUILD, "12.8", 64.0).problems
    assert "compute_dtype=fp16" in problem
    fp16 = small_config("launch.num_processes=2 quantization.compute_dtype=fp16")
    assert look(fp16, cards, BUILD, "12.8", 64.0).problems == []


def test_a_held_card_is_a_problem_only_where_the_run_does_not_fit_beside_it(small_config, look):
    """32.8 billion weights in NF4 with double quantization take 0.516 bytes each: 15.8 GiB and more with the rest."""
    big = "model.name=configs/models/qwen3vl_32b.json launch.num_processes=1"
    needed = memory_needed_gib(small_config(big))
    assert 15.8 < needed < 24
    held = v100(free=needed - 1, holders=("pid 4242 (python)",))
    (problem,) = look(small_config(big), [held], BUILD, "12.8").problems
    for part in (
        "GPU 0",
        "pid 4242 (python)",
        f"{needed - 1:.1f} GiB left",
        f"{needed:.1f} GiB",
        "CUDA_VISIBLE_DEVICES",
    ):
        assert part in problem
    assert look(small_config(big + " memory.force=true"), [held], BUILD, "12.8").problems == []
    unnamed = look(small_config(big), [v100(free=3.0)], BUILD, "12.8").problems
    assert "29.0 of 32.0 GiB are held by a process that the driver does not name" in unnamed[0]
    held.free_gib = needed + 1
    found = look(small_config(big), [held], BUILD, "12.8")
    assert found.problems == [] and "held by pid 4242 (python): the run shares the card" in found.warnings[0]
    found = look(small_config(big), [v100(), v100(free=3.0, holders=("pid 7 (other)",))], BUILD, "12.8")
    assert found.problems == found.warnings == []  # a card that the run does not use
    assert look(small_config(big), [v100(14.0, 14.5)], BUILD, "12.8").problems == []  # the memory plan refuses it


def test_a_model_that_is_not_here_yet_has_no_known_need(small_config):
    assert memory_needed_gib(small_config("model.name=nobody/no-such-model")) is None


def test_more_processes_than_cards_are_refused_naming_both(small_config, look):
    config = small_config("launch.num_processes=3")
    (problem,) = look(config, [v100(), v100()], BUILD, "12.8", 64.0).problems
    assert "launch.num_processes = 3, but this machine has 2 GPUs" in problem and "num_processes=2" in problem
    assert look(config, [], BUILD, "12.8", 0.0).problems == []  # on CPUs any number


@pytest.mark.parametrize(
    ("processes", "mib", "problems", "warnings"),
    [(8, 64, 1, 0), (2, 64, 0, 1), (8, 512, 0, 1), (8, 1024, 0, 0), (1, 1, 0, 0)],
)
def test_a_small_dev_shm_is_told_with_its_size_and_the_option(small_config, look, processes, mib, problems, warnings):
    """64 MiB is what docker gives: less than 10 MiB for each of eight processes."""
    config = small_config(f"launch.num_processes={processes}")
    found = look(config, [v100()] * processes, BUILD, "12.8", mib / 1024)
    assert (len(found.problems), len(found.warnings)) == (problems, warnings)
    for text in found.problems + found.warnings:
        assert f"{mib} MiB free for {processes} processes" in text and "--shm-size=1g" in text


def test_no_card_at_all_is_a_fact(small_config, look):
    found = look(small_config(), [], [])
    assert found.problems == found.warnings == []
    assert "no GPU: the run uses the CPU" in found.facts[0] and "CUDA_VISIBLE_DEVICES" in found.facts[0]


SMI = """#!/bin/sh
case "$1" in
--query-compute-apps=*) echo "GPU-b, 4242, /usr/bin/python3";;
--query-gpu=*)
    echo "0, GPU-a, Tesla V100, 7.0, 32768, 32000, 580.65.06"
    echo "1, GPU-b, Tesla V100, 7.0, 16384, 512, 580.65.06";;
esac
"""


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, [32, 16]), ("1", [16]), ("GPU-a", [32]), ("1,0", [32, 16]), ("", []), ("-1", []), ("MIG-c", [None])],
)
def test_the_drivers_tool_is_read_and_hidden_cards_do_not_count(monkeypatch, tmp_path, visible, expected):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cards = read_cards()
    assert [card.total_gib for card in cards] == expected
    assert [card.holders for card in cards if card.total_gib == 16] == [["pid 4242 (python3)"]] * (16 in expected)


@pytest.mark.parametrize("unknown", ["[N/A]", "[Not Supported]", "[Unknown Error]"])
def test_memory_that_the_driver_does_not_tell_is_said_once_with_the_setting(
    small_config, look, monkeypatch, tmp_path, unknown
):
    """As on a card that shares the host's memory, and with a comma in the card's name."""
    tool = tmp_path / "nvidia-smi"
    lines = [f"{index}, GPU-{index}, NVIDIA GB10, early, 12.1, {unknown}, {unknown}, 580.95.05" for index in (0, 1)]
    said = " ".join(f'"{line}"' for line in lines)
    tool.write_text(f'#!/bin/sh\ncase "$1" in\n--query-gpu=*) printf "%s\\n" {said};;\nesac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cards = read_cards()
    assert [(card.name, card.capability, card.total_gib, card.free_gib) for card in cards] == [
        ("NVIDIA GB10, early", (12, 1), None, None)
    ] * 2
    found = look(small_config("launch.num_processes=2"), cards, ["sm_120"], "13.0", 64.0)
    assert found.facts[0] == "GPU 0: NVIDIA GB10, early, memory unknown, driver 580.95.05" and found.problems == []
    (warning,) = found.warnings
    assert "the memory of GPU 0, 1" in warning and "memory.gpu_gib" in warning
    told = look(small_config("launch.num_processes=2 memory.gpu_gib=100"), cards, ["sm_120"], "13.0", 64.0)
    assert told.warnings == []
    mixed = [*cards[:1], v100()]
    config = small_config("launch.num_processes=2 quantization.compute_dtype=fp16")
    assert look(config, mixed, [*BUILD, "sm_120"], "12.8", 64.0).problems == []


def test_a_capability_that_the_driver_does_not_tell_is_not_judged(small_config, look):
    card = Card("NVIDIA", None, 32.0, 31.5, "580.65.06")
    assert look(small_config(), [card], BUILD, "12.8").problems == []


def test_people_that_cannot_be_invented_stand_in_the_way(small_config, tmp_path):
    config = small_config(f"data.dir={tmp_path} data.num_main=100000")
    (problem,) = [line for line in preflight(config).problems if "data.num_main" in line]
    assert "data.num_main + data.num_control = 100004: there are 224 different descriptions" in problem


def test_a_driver_that_fails_is_told_and_not_taken_for_no_gpu(small_config, monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (warning,) = preflight(small_config()).warnings
    assert "the run uses the CPU" in warning and "Driver/library version mismatch" in warning


NO_NETWORK = """
import os, socket
def refuse(*args):
    with open(os.environ["TRIED"], "a") as file:
        print(os.getpid(), args[1:] if isinstance(args[0], socket.socket) else args, file=file)
    raise OSError("the network is off")
def guard(real):
    def connect(self, address):
        local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        return real(self, address) if local else refuse(self, address)
    return connect
socket.socket.connect, socket.socket.connect_ex = guard(socket.socket.connect), guard(socket.socket.connect_ex)
real_lookup = socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **more: (
    real_lookup(host, *rest, **more) if host in (None, "localhost", "127.0.0.1", "::1") else refuse(host)
)
"""
SCRIPT = """
import socket, sys
from mmrev_kit.config.reading import load_config
from mmrev_kit.notebook.launch import evaluate, launch
config = load_config("configs/tiny_cpu.yaml", sys.argv[1])
launch(config)
if sys.argv[2] == "folder":
    evaluate(config)
try:
    socket.create_connection(("huggingface.co", 443), timeout=5)
except OSError as error:
    assert "the network is off" in str(error)
"""


@pytest.mark.parametrize("model", ["embedded", "folder"])
@pytest.mark.long
def test_a_run_and_its_evaluation_connect_to_nothing(small_overrides, tmp_path, model):
    """Every connection and look-up outside this machine fails and is written down, in the workers too. One that the
    script makes itself at the end shows that the record works. The folder's run has no HF_HUB_OFFLINE to help it."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    environment = os.environ | {"TRIED": str(tmp_path / "tried"), "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}
    environment.pop("HF_HUB_OFFLINE", None)
    words = "experiment.task=reverse training.num_epochs=1 retention.retention_ratio=0 training.batch_size=32"
    if model == "folder":
        shutil.copytree(EMBEDDED_MODEL, tmp_path / "base")
        words += f" model.name={tmp_path}/base"
    else:
        environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-c", SCRIPT, f"{small_overrides} {words}", model]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = (tmp_path / "tried").read_text().splitlines()
    assert len(tried) == 1 and "huggingface.co" in tried[0], tried
