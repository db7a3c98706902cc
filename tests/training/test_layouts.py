"""The guide's eight processes, and several nodes: the same losses as one process, every row computed once."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mmrev_kit.config.project import run_dir
from mmrev_kit.notebook.launch import launch
from mmrev_kit.training.run import ordered_rows, prepare

ROOT = Path(__file__).parents[2]
# Every process writes the rows that it computes, by file and line, into a file of its own.
RECORDED = """
import os, sys
from mmrev_kit.model.batches import Batcher
from mmrev_kit.config.reading import load_config
from mmrev_kit.notebook.launch import launch
from forking import fork_jobs

packed = Batcher.packed

def recorded(self, sequences):
    with open(f"{sys.argv[1]}/rows{os.environ['RANK']}.txt", "a") as file:
        samples = (sample for groups in sequences for group in groups for sample in group.samples)
        file.writelines(f"{sample.row.where}\\n" for sample in samples)
    return packed(self, sequences)

Batcher.packed = recorded
fork_jobs()
launch(load_config("configs/tiny_cpu.yaml", sys.argv[2]))
"""


@pytest.mark.long
def test_eight_processes_accumulating_eight_equal_one_accumulating_64(small_config, small_overrides, tmp_path):
    """420 rows: six updates of 64, and one of 36, of which some processes have fewer than others."""
    common = "experiment.task=reverse lora.dropout=0 training.batch_size=1 training.num_epochs=1"
    eight = f"{common} training.gradient_accumulation_steps=8 launch.num_processes=8 launch.output_dir={tmp_path}/eight"
    one = f"{common} training.gradient_accumulation_steps=64 launch.output_dir={tmp_path}/one"
    command = [sys.executable, "-c", RECORDED, str(tmp_path), f"{small_overrides} {eight}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 processes" in done.stdout
    config = small_config(eight)
    manifest = json.loads((run_dir(config) / "manifest.json").read_text())
    assert manifest["num_processes"] == 8 and manifest["effective_batch"] == 64

    a, b = launch(small_config(one)), json.loads((run_dir(config) / "training_history.json").read_text())
    assert a["steps_per_epoch"] == b["steps_per_epoch"] == 7  # 420 / 64, rounded up
    for left, right in zip(a["steps"], b["steps"], strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-4)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-3)
    assert b["epochs"][0]["train_loss"] == pytest.approx(a["epochs"][0]["train_loss"], rel=1e-4)
    assert b["epochs"][0]["val_loss"] == pytest.approx(a["epochs"][0]["val_loss"], rel=1e-4)

    task = prepare(config)
    planned = [task.train[source][index].row.where for source, index in ordered_rows(config, task, 0)]
    planned += [sample.row.where for samples in task.val.values() for sample in samples]
    computed = [(tmp_path / f"rows{rank}.txt").read_text().splitlines() for rank in range(8)]
    assert Counter(row for rows in computed for row in rows) == Counter(planned)
    assert all(computed)


@pytest.fixture(scope="module")
def machines():
    """Two network namespaces, joined by a cable: [(name, interface, address)]."""
    number = os.getpid()
    found = [(f"mmrev{number}{end}", f"mm{number}{end}", f"10.231.7.{place}") for place, end in enumerate("ab", 1)]
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and the program ip (iproute2), to make network namespaces")

    def ip(words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["ip", *words.split()], capture_output=True, text=True)

    try:
        made = [ip(f"netns add {name}") for name, _, _ in found]
        made += [ip(f"link add {found[0][1]} type veth peer name {found[1][1]}")]
        for name, interface, address in found:
            made += [ip(f"link set {interface} netns {name}"), ip(f"-n {name} addr add {address}/24 dev {interface}")]
            made += [ip(f"-n {name} link set {interface} up"), ip(f"-n {name} link set lo up")]
        wrong = [step.stderr.strip() for step in made if step.returncode]
        if wrong:
            pytest.skip(f"needs the right to make network namespaces (here: {wrong[0]})")
        yield found
    finally:
        for name, _, _ in found:
            ip(f"netns del {name}")


def on_both(machines, launcher, words: list[str]) -> list[tuple[int, str]]:
    """The status and output of the training on each machine.

    Args:
        launcher: from the machine's number to the words before `-m mmrev_kit train`.
        words: the overrides of each machine.
    """
    processes = []
    for rank, (name, interface, _) in enumerate(machines):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", *launcher(rank), "-m", "mmrev_kit", "train"]
        command += ["--config", "configs/tiny_cpu.yaml", "--num_processes", "2", "--overrides", words[rank]]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    texts = [process.communicate(timeout=500)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def accelerate(machines):
    address = machines[0][2]
    return lambda rank: (
        f"accelerate.commands.launch --multi_gpu --num_machines 2 --num_processes 2 --machine_rank {rank} "
        f"--main_process_ip {address} --main_process_port 29500 --mixed_precision no --dynamo_backend no".split()
    )


def torchrun(machines):
    address = machines[0][2]
    return lambda rank: (
        f"torch.distributed.run --nnodes 2 --nproc_per_node 1 --node_rank {rank} "
        f"--master_addr {address} --master_port 29500".split()
    )


def slurm_script() -> str:
    return (ROOT / "configs" / "README.md").read_text().split("```bash\n#!")[1].split("```")[0]


def test_the_slurm_script_starts_one_torchrun_a_node(tmp_path):
    """With stand-ins for the programs of a cluster: srun runs its command once a node, torchrun says its words."""
    stand_ins = """
scontrol() { printf 'node7\\nnode8\\n'; }
srun() { for SLURM_NODEID in 0 1; do export SLURM_NODEID; "${@:2}"; done; }
"""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    torchrun = tmp_path / ".venv" / "bin" / "torchrun"
    torchrun.write_text('#!/bin/bash\necho "$@"\n')
    torchrun.chmod(0o755)
    environment = os.environ | {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    command = ["bash", "-euc", f"{stand_ins}\n#!{slurm_script()}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    rest = "--master_addr node7 --master_port 29500 -m mmrev_kit train --config configs/config_qwen3vl32_fp16.yaml "
    rest += "--num_processes 16"
    expected = [f"--nnodes 2 --nproc_per_node 8 --node_rank {rank} {rest}" for rank in (0, 1)]
    assert done.stdout.splitlines() == expected


@pytest.mark.long
def test_two_machines_equal_two_processes_of_one(machines, small_config, small_overrides, tmp_path):
    """Both see the run folder, as on a shared disk. With another configuration both are refused."""
    common = "experiment.task=reverse lora.dropout=0 training.num_epochs=1"
    words = f"{small_overrides} {common} launch.output_dir={tmp_path}/two"
    (status, text), (other, more) = on_both(machines, accelerate(machines), [words, words])
    assert (status, other) == (0, 0), text + more
    expected = launch(small_config(f"{common} launch.num_processes=2 launch.output_dir={tmp_path}/one"))
    folder = tmp_path / "two" / "small_reverse"
    found = json.loads((folder / "training_history.json").read_text())
    assert [step["loss"] for step in found["steps"]] == [step["loss"] for step in expected["steps"]]
    assert found["epochs"][0]["val_loss"] == expected["epochs"][0]["val_loss"] and found["status"] == "finished"
    own = {path.name for path in (tmp_path / "one" / "small_reverse").iterdir()} - {"train.log"}
    assert {path.name for path in folder.iterdir()} == own  # and nothing of the second machine's

    for status, text in on_both(machines, torchrun(machines), [words + " training.learning_rate=1e-3"] * 2):
        assert status == 1 and "holds a run with another configuration: training.learning_rate (0.002 there" in text


@pytest.mark.long
def test_machines_that_do_not_share_what_they_must_are_refused(machines, small_overrides, tmp_path):
    """Before weights are read: another configuration on the second machine, whose saved state is not there either."""
    words = f"{small_overrides} experiment.task=reverse launch.output_dir={tmp_path}/three"
    other = f"{words} training.max_grad_norm=2 launch.output_dir={tmp_path}/four"
    (tmp_path / "three" / "small_reverse" / "last").mkdir(parents=True)
    (tmp_path / "three" / "small_reverse" / "last" / "state.json").write_text("{}")
    for status, text in on_both(machines, torchrun(machines), [words, other]):
        assert status == 1 and "Not the same for all processes: the configuration; what is saved in launch" in text
    assert not list(tmp_path.rglob("training_history.json"))
