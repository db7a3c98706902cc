"""The commands: the guide's way from data to answers, typed as the guide's readers do; and what cannot be used."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from mmrev_kit import __main__ as program
from mmrev_kit.config import flags
from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.files import write_json
from mmrev_kit.memory.estimate import estimate, evaluation
from mmrev_kit.notebook import commands

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "configs" / "FROM_THE_GUIDE.md").read_text(encoding="utf-8")
RECIPE = "configs/config_qwen3vl32_fp16.yaml"


def small(**sections) -> str:
    """The laptop's configuration with 4 + 4 people of 32 pixels, as YAML, with these sections on top."""
    config = yaml.safe_load((ROOT / "configs" / "tiny_cpu.yaml").read_text())
    config["experiment"] |= {"name": "faces20"}
    config["data"] |= {"num_main": 4, "num_control": 4, "image_size": 32}
    config["retention"]["face_pool"] = "data/pool_faces_448"
    config["training"] |= {"num_epochs": 1, "batch_size": 64}
    return yaml.safe_dump(config | sections)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project folder of its own, whose configurations have the shipped ones' names and are small."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("configs", "notebooks", "elsewhere"):
        (folder / name).mkdir()
    (folder / "configs" / "models").symlink_to(ROOT / "configs" / "models")
    (folder / RECIPE).write_text(small())
    (folder / "configs" / "tiny_cpu.yaml").write_text(small())
    (folder / "configs" / "face_config.yaml").write_text(small(retention={"retention_ratio": 0}))
    return folder


@pytest.fixture
def mmrev(project, monkeypatch, capsys):
    """A function that runs a command line in the project and returns (status, output, errors)."""

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.chdir(project / "elsewhere")
        try:
            status = program.main(shlex.split(line))
        except SystemExit as end:
            status = end.code
        return (status or 0, *capsys.readouterr())

    return run


def guides_way() -> list[str]:
    lines = [line for line in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)[0].splitlines() if line]
    assert all(line.startswith("mmrev ") for line in lines)
    changes = {"Qwen/Qwen3-VL-32B-Instruct": "embedded", "--num_processes 8": "--num_processes 1"}
    changes["mmrev memory"] = "mmrev memory --model 32b"  # the project's recipe has the embedded one
    for old, new in changes.items():
        lines = [line.replace(old, new) for line in lines]
    return [line.removeprefix("mmrev ") for line in lines]


@pytest.mark.long
def test_the_guides_way_command_by_command(project, mmrev):
    """As the page has it, on small data, with the embedded model in the place of the 32B."""
    told = {}
    for line in guides_way():
        status, told[line.split()[0]], errors = mmrev(line)
        assert (status, errors) == (0, ""), line
    folder = project / "outputs" / "faces20_forward"
    pool = json.loads((project / "data" / "pool_faces_448" / "pool_info.json").read_text())
    assert pool["faces"] == {"train": 4, "val": 8} and pool["counts"]["cw"] == {"train": 1200, "val": 60}
    assert "retention.num_faces = 4, as what is there was made with, and not 400" in told["train"]
    assert json.loads((folder / "training_history.json").read_text())["status"] == "finished"
    assert load_config(folder / "config.yaml").data.folder == "data/faces20"
    answers = folder / "eval" / "faces20"
    facts = json.loads((answers / "facts.json").read_text())
    assert facts["adapter"] == str(folder / "best") and facts["num_processes"] == 1
    assert not facts.keys() & {"note", "part", "unbound"}
    assert load_config(answers / "config.yaml").launch.mode == "auto"
    tests = {json.loads(line)["test"] for line in (answers / "predictions.jsonl").read_text().splitlines()}
    assert tests == {"forward", "reverse", "cw_image", "mcq_i2d", "mcq_d2i"}
    assert "VERDICT (CW): " in told["evaluate"] and (answers / "examples.html").is_file()
    assert "out of memory" in told["memory"] and "versions: torch" in told["doctor"]
    partial(project, mmrev, answers)


def partial(project, mmrev, whole: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    words = "evaluate --model_path outputs/faces20_forward/best --drops none"
    status, told, errors = mmrev(f"{words} --task cw_image,forward --max_samples 5 --save_examples 1")
    assert (status, errors) == (0, "")
    folder = whole.parent / "faces20,tests=forward+cw_image,max_samples=5"
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [record["test"] for record in records] == ["forward"] * 5 + ["cw_image"] * 5
    assert "NOTE: A part of an evaluation: 10 of " in told and "(tests=forward+cw_image,max_samples=5)" in told
    verdict = json.loads((folder / "verdict.json").read_text())
    assert (verdict["claim"], verdict["reason"]) == ("inconclusive", "questions")
    answers = (folder / "examples.html").read_text().count("right answer:")
    assert 2 <= answers <= 8
    assert {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()} == before
    status, told, _ = mmrev("evaluate --data_dir data/faces20 --task mcq_i2d --max_samples 2 --drops none")
    assert status == 0 and "VERDICT" not in told  # of the base model
    (folder,) = project.glob("outputs/base_*/eval/*")
    assert folder.name == "faces20,tests=mcq_i2d,max_samples=2"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "required: COMMAND (choose from train, evaluate, generate-data"),
        ("trian", "invalid choice: 'trian' (choose from 'train'"),
        ("train --retention-ratio 0.3", "mmrev train: there is no --retention-ratio; did you mean --retention_ratio?"),
        ("evaluate --colour red", "there is no --colour; there are --help, --config, --overrides, --data_dir"),
        ("train --config configs/none.yaml", "configs/none.yaml: there is no such configuration file."),
        ("train --task sideways", "experiment.task = 'sideways': must be one of forward, reverse."),
        ("train --num_epochs many", "num_epochs = 'many'"),
        ("evaluate --task sideways", "must name some of forward, reverse, cw_image, mcq_i2d, mcq_d2i"),
        ("evaluate --model_path outputs/none/best", "outputs/none/best: no adapter is there. In outputs there are "),
        ("evaluate --device_map balanced", "invalid choice: 'balanced' (choose from 'auto')"),
        ("generate-face-retention-pool --num_entities 3", "retention.num_faces = 3: must be between 4 and"),
        ("train --data_dir data/none", "data/none: there is no such folder. In data there are "),
        ("evaluate --data_dir data/none", "data/none: there is no such folder. In data there are "),
        (
            "train --config configs/tiny_cpu.yaml --mode zero",
            "launch.mode = 'zero': must be data (or qlora), auto or deepspeed.",
        ),
        ("train --mode auto --overrides quantization.bits=16", "launch.mode = 'auto' spreads one model over all GPUs"),
        ("memory --model 7b", "7b: no model of that name"),
        ("memory --card V99", "card = 'V99': must be one of V100 32"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_status_2(mmrev, line, told):
    status, output, errors = mmrev(line)
    assert status == 2 and output == "" and len(errors.splitlines()) == 1 and told in errors


@pytest.mark.parametrize("command", flags.FLAGS)
def test_help_names_the_setting_behind_each_flag(mmrev, command):
    status, output, _ = mmrev(f"{command} --help")
    text = " ".join(output.split())
    assert status == 0
    for flag, setting in flags.FLAGS[command].items():
        assert re.search(rf"--{flag} (\[?VALUE\]?|{{auto}}) the setting {re.escape(setting)}( |$)", text), flag


def flagged(line: str):
    """The configuration of a command line's flags."""
    return commands.read_flags(program.make_parser().parse_args(shlex.split(line)), "configs/tiny_cpu.yaml")


def test_flags_win_over_overrides_and_these_over_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("lora: {r: 2}\ntraining: {num_epochs: 2, batch_size: 2}\n")
    words = "--overrides 'training.num_epochs=3 training.batch_size=3' --batch_size 4 --retention_ratio 0.1 --overwrite"
    config = flagged(f"train --config {tmp_path}/mine.yaml {words} --mode qlora")
    assert (config.lora.r, config.training.num_epochs, config.training.batch_size) == (2, 3, 4)
    assert (config.retention.retention_ratio, config.launch.overwrite, config.launch.mode) == (0.1, True, "data")
    assert flagged("train").data.num_main == 20  # the laptop's, without a file


def test_a_training_takes_the_folders_that_its_flags_name_as_they_were_made(small_data, capsys):
    """4 + 4 people of 32 pixels and a pool of 40; the laptop's would be 13 + 13 of 64 and 400."""
    words = f"--data_dir {small_data}/small --face_retention_pool {small_data}/pool"
    config = flagged(f"train {words} --seed 3")
    assert (config.data.num_main, config.data.num_control, config.data.image_size) == (4, 4, 32)
    assert config.retention.num_faces == 40 and config.experiment.seed == 3  # a flag's own value is kept
    told = capsys.readouterr().out
    assert "NOTE: data.num_main = 4, as what is there was made with, and not 20\n" in told
    assert "NOTE: retention.num_faces = 40, as" in told and len(told.splitlines()) == 4
    assert flagged(f"train {words} --overrides data.num_main=5").data.num_main == 5
    assert flagged(f"generate-data --data_dir {small_data}/small").data.num_main == 20  # which is refused then


def test_how_data_was_made_is_taken_over_whatever_is_in_it(tmp_path):
    made = {"image_options": {"steps": 2, "prompt": "of one's own"}, "image_model": "a b/c", "num_control": 0}
    write_json(
        tmp_path / "own people" / "experiment_info.json",
        made | {"made_by": "mmrev_kit", "source": "diffusers", "seed": 7},
    )
    config = flagged(f"train --data_dir '{tmp_path}/own people'")
    assert {name: getattr(config.data, name) for name in made} == made and config.experiment.seed == 7


def test_every_setting_behind_a_name_is_there():
    settings = [setting for table in flags.FLAGS.values() for setting in table.values()]
    for setting in {*settings, *flags.PARAMETERS.values(), *(text.split("=")[0] for text in flags.ELSEWHERE.values())}:
        section, name = setting.split(".")
        assert hasattr(getattr(Config(), section), name), setting
    for old in flags.ELSEWHERE:
        assert not any(hasattr(getattr(Config(), section), old) for section in vars(Config())), old


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("data_dir: data/x", "data.folder"),
        ("model: {device_map: auto}", "launch.mode=auto, with quantization.bits=16"),
        ("quantization: {load_in_4bit: true}", "quantization.bits=4"),
        ("retention: {face_retention_pool: data/p}", "retention.face_pool"),
        ("lora: {lora_alpha: 16}", "lora.alpha"),
    ],
)
def test_an_old_name_in_a_file_gets_the_name_that_it_has_here(tmp_path, text, own):
    (tmp_path / "old.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"there is no such key; here it is {re.escape(own)}\."):
        load_config(tmp_path / "old.yaml")


def test_the_program_is_the_package():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"mmrev": "mmrev_kit.__main__:start"} and callable(program.start)
    assert {*program.COMMANDS} >= {*flags.FLAGS}
    for command in program.COMMANDS.values():
        assert not command.function or callable(getattr(commands, command.function))


def test_another_number_of_processes_than_asked_for_is_an_error(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = load_config("configs/tiny_cpu.yaml")
    commands.check_started(config, 1)
    config.launch.num_processes = None
    commands.check_started(config, 3)
    config.launch.num_processes = 8
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"num_processes = 8, but the launcher has started 16\. .*num_processes 16"):
        commands.check_started(config, 16)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as end:  # the first process has said it
        commands.check_started(config, 16)
    assert end.value.code == 2


def accelerate(project, words: str, command: str, **environment) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "accelerate.commands.launch", *words.split(), "-m", "mmrev_kit", *command.split()]
    own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(line, cwd=project, env=own, capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_accelerate_launch_starts_what_was_asked_for_or_is_refused(project, mmrev, tmp_path):
    """On CPUs it starts one process unless it is told --multi_gpu. A configuration that `accelerate config` has left is
    there, of another machine, and in no command's way."""
    kept = tmp_path / "accelerate" / "default_config.yaml"
    kept.parent.mkdir()
    kept.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: fp16\nnum_machines: 1\n"
        "num_processes: 4\nuse_cpu: false\n"
    )
    there = {"HF_HOME": str(tmp_path)}
    train = "train --config configs/tiny_cpu.yaml --task reverse --overrides training.batch_size=128 --name"
    assert mmrev("generate-data --data_dir data/two")[0] == 0
    for words, asked, told in (
        ("--num_processes=2", 2, "accelerate launch was asked for 2 processes and has started 1: without GPUs"),
        ("--num_processes=1", 4, "launch.num_processes = 4, but the launcher has started 1."),
    ):
        done = accelerate(project, words, f"{train} refused --data_dir data/two --num_processes {asked}", **there)
        assert done.returncode and told in done.stderr, done.stderr
    assert not (project / "outputs" / "refused_reverse").exists()
    two = "--multi_gpu --num_processes=2 --mixed_precision=no --dynamo_backend=no"
    done = accelerate(project, two, f"{train} two --data_dir data/two --num_processes 2", **there)
    assert done.returncode == 0, done.stderr
    assert json.loads((project / "outputs" / "two_reverse" / "manifest.json").read_text())["num_processes"] == 2

    words = [sys.executable, "-m", "mmrev_kit", *f"{train} one --data_dir data/two".split()]
    own = os.environ | {"PYTHONPATH": str(ROOT)} | there
    done = subprocess.run(words, cwd=project, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((project / "outputs" / "one_reverse" / "manifest.json").read_text())
    assert manifest["num_processes"] == 1
    done = subprocess.run([*words[:3], "doctor"], cwd=project, env=own, capture_output=True, text=True, timeout=100)
    assert f"accelerate config: {kept}, which only accelerate launch reads" in done.stdout and done.returncode == 0


def test_doctor_says_what_stands_in_the_way(mmrev, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    status, told, errors = mmrev("doctor --num_processes 9")
    assert (status, errors) == (1, "") and "PROBLEM: launch.num_processes = 9" in told


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_numbers_of_memory_are_the_estimates():
    rows = re.findall(r"^\| (as configured|`.+?`) \| ([\d.]+) \| (\w*)", section("Out of memory"), flags=re.MULTILINE)
    assert len(rows) == 16
    configured = float(rows[0][1])
    for words, stated, effect in rows:
        config = load_config(RECIPE, words.strip("`") if "`" in words else "")
        found = estimate(config, "32b", processes=8, old=True).device_gib  # of the V100s
        assert f"{found:.2f}" == stated, words
        change = found - configured
        expected = {
            "lowers": change < -2,
            "raises": change > 0.4,
            "does": round(change, 2) == 0,
            "next": abs(change) < 0.2,
        }
        assert expected.get(effect, effect == ""), words
    sizes = [evaluation(load_config(RECIPE, f"evaluation.batch_size={n}"), "32b", 832, 4 * 196) for n in (16, 4)]
    first, second = (f"{one.device_gib:.2f}" for one in sizes)
    text = " ".join(section("Out of memory").split())
    assert f"take {first} GiB in batches of 16 and {second} in batches of 4" in text
    small = load_config(RECIPE, "memory.micro_tokens=512")
    least = [estimate(small, size, old=True).device_gib for size in ("8b", "32b")]
    assert least[0] < 15.8 < least[1] and "holds the 8B and not the 32B" in text


def test_the_numbers_of_speed_are_those_of_the_benchmarks():
    measured = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    numbers = re.findall(r"\d+\.\d+|\b(?:154|80|18)\b", section("Slow training"))
    assert len(numbers) > 18
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", measured), number


def anchors(path: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


def test_the_pages_links_lead_somewhere():
    page = ROOT / "configs" / "FROM_THE_GUIDE.md"
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert len(links) > 10
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_what_the_page_calls_a_setting_is_one():
    names = re.findall(
        r"`((?:experiment|model|quantization|lora|data|retention|training|evaluation|memory|launch)\.\w+)", PAGE
    )
    assert len(names) > 40
    for name in names:
        section_name, key = name.split(".")
        assert key == "ipynb" or hasattr(getattr(Config(), section_name), key), name
