"""What comes from others (data, adapters, models, configurations) is read: it is never run and leads nowhere else."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from PIL import Image
from safetensors.torch import load_file, save

from mmrev_kit.config.project import EMBEDDED_MODEL, run_dir
from mmrev_kit.config.reading import load_config, to_yaml
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.faults import DataError
from mmrev_kit.data.folder import make_folder_experiment
from mmrev_kit.data.rows import read_entities, read_rows
from mmrev_kit.data.run_data import read_run_data
from mmrev_kit.files import write_json, write_jsonl
from mmrev_kit.model.bases import base_fingerprint, base_of, check_base
from mmrev_kit.model.loading import base_arguments, load_base
from mmrev_kit.model.processor import load_processor
from mmrev_kit.notebook import launch
from mmrev_kit.notebook.render import execute
from mmrev_kit.training.checkpoints import load_last, save_last
from mmrev_kit.training.run import start

ROOT = Path(__file__).parent.parent
TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0zAcE"  # of a token's form, and nobody's
SCRIPT, HANDLER = "the <script>alert(1)</script> of Jade Temple", "the <img src=x onerror=alert(2)> of $5 & $6"


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}


def sources():
    for path in [*(ROOT / "mmrev_kit").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        yield path.name, path.read_text(encoding="utf-8")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        yield path.name, "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def test_nothing_in_the_code_reads_a_format_that_can_run_code():
    seen = 0
    for name, source in sources():
        tree = ast.parse(source)
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not modules & {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}, name
        for function, keywords in calls(tree):
            seen += 1
            assert function not in ("eval", "exec", "torch.load", "torch.save", "yaml.load", "numpy.load"), name
            remote = keywords.get("trust_remote_code")
            assert remote is None or ast.unparse(remote) == "False", name
    assert seen > 1000


# ---- adapters, models, states, configurations


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_an_adapter_that_is_no_safetensors_file_is_refused(small_config, tmp_path, name):
    config, ran = small_config(), tmp_path / "ran"
    adapter = run_dir(config) / "best"
    adapter.mkdir(parents=True)
    (adapter / "README.md").write_text(f"base_fingerprint: {base_fingerprint(**base_of(config))}\n")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / name).write_bytes(pickle.dumps(Bomb(ran)))
    with pytest.raises(ConfigError, match="no adapter_model"):
        check_base(adapter, partial(base_fingerprint, **base_of(config)), "embedded")
    with pytest.raises(ConfigError, match="no adapter_model"):
        launch.evaluate(config)
    assert not ran.exists()
    pickle.loads((adapter / name).read_bytes())
    assert ran.exists()  # so it would have shown


@pytest.fixture
def model(tmp_path):
    """The embedded model with code beside it that its files ask for."""
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED_MODEL, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n")
    wanted = {"AutoConfig": "evil.A", "AutoProcessor": "evil.B", "AutoTokenizer": ["evil.C", "evil.C"]}
    wanted |= {"AutoModelForImageTextToText": "evil.D", "AutoImageProcessor": "evil.E", "AutoVideoProcessor": "evil.F"}
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "preprocessor_config.json"):
        values = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(values | {"auto_map": wanted}))
    return folder


@pytest.mark.parametrize("known", [True, False])
def test_code_beside_a_model_is_never_run(small_config, model, tmp_path, known, monkeypatch):
    import torch

    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks a user at a terminal
    if not known:  # a class that transformers does not have, so that only the code beside it could be meant
        for name in ("processor_config.json", "tokenizer_config.json"):
            values = json.loads((model / name).read_text())
            (model / name).write_text(json.dumps(values | {"processor_class": "Evil", "tokenizer_class": "Evil"}))
        (model / "preprocessor_config.json").unlink()
    config = small_config(f"model.name={model}")
    if known:
        assert type(load_processor(config.model.name)).__name__ == "Qwen3VLProcessor"
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_processor(config.model.name)
    load_base(**base_arguments(config, torch.device("cpu")))
    assert not (tmp_path / "ran").exists()


def test_weights_come_from_safetensors_only_and_a_base_brings_no_adapter(small_config, model):
    import torch

    config = small_config(f"model.name={model}")
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match="holds an adapter"):
        load_base(**base_arguments(config, torch.device("cpu")))
    (model / "adapter_config.json").unlink()
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"lacks model\.safetensors"):
        load_base(**base_arguments(config, torch.device("cpu")))


@pytest.mark.parametrize(
    "text",
    [
        'lora: !!python/object/apply:pathlib.Path.touch ["{ran}"]',
        'experiment:\n  name: !!python/object/apply:os.system ["touch {ran}"]',
        'lora:\n  target_modules: ["${{oc.env:SECRET_WORD}}"]',
        "retention:\n  weights:\n    cw: ${{oc.env:SECRET_WORD}}",
        "experiment:\n  name: ${{oc.env:SECRET_WORD}}",
    ],
)
def test_a_configuration_is_values_and_nothing_else(tmp_path, monkeypatch, text):
    monkeypatch.setenv("SECRET_WORD", "5")
    path = tmp_path / "c.yaml"
    path.write_text(text.format(ran=tmp_path / "ran"))
    with pytest.raises(ConfigError):
        load_config(path)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def saved(small_config):
    """A run that has saved its state."""
    import torch

    state = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=torch.device("cpu"))
    run = start(small_config("retention.retention_ratio=0"), state)
    save_last(run)
    return run


def test_a_state_that_is_not_ours_is_refused(saved, tmp_path):
    assert load_last(saved)
    folder, whole, ran = saved.folder / "last", tmp_path / "whole", tmp_path / "ran"
    shutil.copytree(folder, whole)
    state = json.loads((whole / "state.json").read_text())
    tensors = load_file(whole / "adapter.safetensors")
    name = next(iter(tensors))
    changes = {
        "state.json": [b"", b"[]", b"{}", json.dumps(state | {"format": 0}).encode(), None],
        "optimizer.safetensors": [pickle.dumps(Bomb(ran)), b"", None],
        "adapter.safetensors": [pickle.dumps(Bomb(ran)), save({name: tensors[name]}), None],
    }
    for file, contents in changes.items():
        for content in contents:
            (folder / file).unlink()
            if content is None:
                (folder / file).with_suffix(".pt").write_bytes(pickle.dumps(Bomb(ran)))
            else:
                (folder / file).write_bytes(content)
            with pytest.raises(ConfigError, match="not a state of this run"):
                load_last(saved)
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
    assert load_last(saved) and not ran.exists()


# ---- paths in data files


@pytest.fixture
def places(tmp_path, monkeypatch):
    """An experiment's folder, a picture outside of it and of the project, and the folder that the test runs in."""
    data, private, work = tmp_path / "data" / "e", tmp_path / "private", tmp_path / "work"
    for folder in (data / "images", private, work):
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), "navy").save(folder / "p.png")
    (data / "images" / "link.png").symlink_to(private / "p.png")
    (data / "images" / "near.png").symlink_to(data / "p.png")
    (data / "inner").symlink_to(private)
    monkeypatch.chdir(work)
    Image.new("RGB", (32, 32), "navy").save(data / "p.png")
    return data, private, work


ROW = {"entity_id": "e1", "description": "the keeper", "connector": "is"}
OUTSIDE = ["../../private/p.png", "images/../../../private/p.png", "images/link.png", "inner/p.png", "ABSOLUTE"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_path_that_leads_out_of_the_data_is_refused_unless_allowed(places, name):
    data, private, _ = places
    name = str(private / "p.png") if name == "ABSOLUTE" else name
    path = data / "forward_train.jsonl"
    write_jsonl(path, [ROW | {"image_path": "p.png"}, ROW | {"image_path": name}])
    rows, faults = read_rows(path, "forward", "forward", {})
    assert [row.where for row in rows] == [f"{path}:1"]
    assert str(faults[0]).startswith(f"{path}:2: the image {name} leads out of the data, to {private}/p.png")
    assert "data.allow_outside=true" in str(faults[0])
    for roots in (None, (private,)):
        rows, faults = read_rows(path, "forward", "forward", {}, roots)
        assert not faults and rows[1].images == (private / "p.png",)


@pytest.mark.parametrize("name", ["p.png", "images/p.png", "images/near.png", "images/../p.png", "DATA", "WORK", "../work/p.png"])  # fmt: skip  # noqa: E501
def test_paths_within_the_data_or_the_project_are_read(places, name):
    data, _, work = places
    for folder in ("configs", "notebooks"):  # what makes it a project's folder
        (work / folder).mkdir()
    name = {"DATA": str(data / "images" / "p.png"), "WORK": str(work / "p.png")}.get(name, name)
    write_jsonl(data / "f.jsonl", [ROW | {"image_path": name}])
    rows, faults = read_rows(data / "f.jsonl", "forward", "forward", {})
    assert not faults and len(rows) == 1


def test_the_folder_that_a_process_runs_in_gives_no_access(places, monkeypatch):
    data, private, _ = places
    write_jsonl(data / "f.jsonl", [ROW | {"image_path": "p.png"}, ROW | {"image_path": str(private / "p.png")}])
    monkeypatch.chdir(private)
    (fault,) = read_rows(data / "f.jsonl", "forward", "forward", {})[1]
    assert fault.where.endswith(":2") and "leads out of the data" in str(fault)


def test_options_and_pools_and_entities_are_held_to_the_same_rule(small_config, small_data, places):
    _, private, _ = places
    outside = str(private / "p.png")
    target = small_data / "hostile"
    shutil.copytree(small_data / "small", target)
    pool = target / "retention_images"
    shutil.copytree(small_data / "pool", pool)
    lines = (pool / "mcq_d2i_val.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    options = dict(zip("ABCD", [*row.pop("image_choices")[:3], outside], strict=True))
    write_jsonl(pool / "retention_mcq_d2i_val.jsonl", [row | {"options": options, "answer": "A"}])
    config = small_config(f"experiment.name=hostile retention.face_pool={pool}")
    told = [str(fault) for fault in read_run_data(config)[1]]
    assert len(told) == 1 and told[0].startswith(f"{pool}/retention_mcq_d2i_val.jsonl:1: the image {outside} leads out")
    config.data.allow_outside = True
    assert not read_run_data(config)[1]

    people = read_entities(target)
    people[2]["images"] = [outside]
    (target / "entities.json").write_text(json.dumps(people))
    assert not read_run_data(config)[1]
    config.data.allow_outside = False
    with pytest.raises(DataError, match=r"entities.json: entity 3: the image .* leads out of the data"):
        read_run_data(config)
    shutil.rmtree(target)


def test_your_own_pictures_may_be_linked_from_elsewhere_and_no_others(small_config, places):
    data, private, _ = places
    pics = private / "pics"
    pics.mkdir()
    for number in range(4):
        Image.new("RGB", (40, 40), (40 * number, 90, 200)).save(pics / f"p{number}.png")
    Image.new("RGB", (40, 40), "red").save(private / "other.png")
    (pics / "link.png").symlink_to(private / "other.png")
    more = f"data.dir={data} experiment.name=own data.source=folder data.images_dir={pics} data.link_images=true"
    more += f" data.entities_file={private}/people.csv retention.retention_ratio=0"
    lines = ["description,image", *(f"the mayor of town {n},p{n}.png" for n in range(4))]
    (private / "people.csv").write_text("\n".join(lines))
    config = small_config(more)
    make_folder_experiment(data / "own", config.data, 0)
    assert not read_run_data(config)[1]
    config.data.images_dir = None
    with pytest.raises(DataError, match="leads out of the data"):
        read_run_data(config)

    lines[2:4] = ["the guard,link.png", "the cook,../other.png"]
    (private / "people.csv").write_text("\n".join(lines))
    config = small_config(more)
    with pytest.raises(DataError) as error:
        make_folder_experiment(data / "more", config.data, 0)
    told = list(map(str, error.value.faults))
    assert [fault.split(":")[1] for fault in told] == ["3", "4"] and all("data.allow_outside" in f for f in told)
    config.data.allow_outside = True
    with pytest.raises(DataError, match="a picture is also that of"):  # now both are read, and are one picture
        make_folder_experiment(data / "more", config.data, 0)


# ---- tokens


@pytest.mark.parametrize(
    "name", [TOKEN, f"https://user:{TOKEN}@host/model", "https://user:hf_xxx@host/model", f"org/{TOKEN}", "MINE"]
)
def test_a_configuration_with_a_token_is_refused_without_repeating_it(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    name = "org/a-token-of-another-form" if name == "MINE" else name
    (tmp_path / "c.yaml").write_text(f"model:\n  name: {name}\n")
    config = load_config()
    config.model.name = name
    for attempt in (
        lambda: load_config(tmp_path / "c.yaml"),
        lambda: load_config(None, f"model.name={name}"),
        lambda: load_config(None, f"modle.name={name}"),
        lambda: load_config(None, "", {"experiment.name": name}),
        lambda: to_yaml(config),
        lambda: execute("train", [("nmae", name)]),
    ):
        with pytest.raises(ConfigError, match="token or password") as error:
            attempt()
        assert name not in str(error.value) and "hf_" not in str(error.value)


def test_ordinary_names_are_no_tokens():
    for name in ("Qwen/Qwen3-VL-32B-Instruct", "hf_models/tiny", "outputs/hf_internal_testing_tiny", "a@b"):
        assert load_config(None, f"model.name={name}").model.name == name


# ---- a whole run over hostile data, with tokens at hand


@pytest.fixture(scope="module")
def project(small_data, tmp_path_factory):
    """A clone with a token in its remote's address, in which data, training and evaluation were run as notebooks, over
    an experiment whose descriptions are markup and with tokens in the environment."""
    root = tmp_path_factory.mktemp("project")
    for name in ("configs", "notebooks"):
        shutil.copytree(ROOT / name, root / name)
    for words in (["init", "-q"], ["remote", "add", "origin", f"https://user:{TOKEN}@host/x.git"], ["add", "configs"],
                  ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "a"]):  # fmt: skip
        subprocess.run(["git", *words], cwd=root, check=True)
    people = read_entities(small_data / "small")
    texts = {people[0]["description"]: SCRIPT, people[1]["description"]: HANDLER}
    texts |= {people[0]["name"]: SCRIPT, people[4]["description"]: f"a third, {SCRIPT}"}
    shutil.copytree(small_data / "small", root / "data" / "small")
    for path in (root / "data" / "small").glob("*.json*"):
        text = path.read_text()
        for old, new in texts.items():
            text = text.replace(json.dumps(old), json.dumps(new))
        lines = text.splitlines(keepends=True)
        path.write_text("".join(lines[::3]) if path.suffix == ".jsonl" else text)
    note = root / "data" / "small" / "experiment_info.json"
    write_json(note, json.loads(note.read_text()) | {"counts": {}})  # a third of the rows is meant
    overrides = (
        "data.num_main=4 data.num_control=4 data.image_size=32 retention.num_faces=40 training.num_epochs=1 "
        f"retention.face_pool={small_data}/pool evaluation.max_new_tokens=40"
    )
    environment = os.environ | {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
    for name, words in {"data": [], "train": [], "evaluate": ["-p", "drops", "none", "-p", "base", "False"]}.items():
        command = [sys.executable, "-m", "mmrev_kit", "notebook", name, "-p", "name", "small", *words]
        command += ["-p", "overrides", overrides]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout + done.stderr
        assert TOKEN not in done.stdout + done.stderr
    return root


class Page(HTMLParser):
    """What a browser would make of a page: its text, and whatever in it would run."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.active, self.tag = "", [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        run = [(name, value or "") for name, value in attributes if name != "alt"]  # a picture's text is only read
        self.active += [tag for name, value in run if "alert(" in value or (name, value) == ("src", "x")]

    def handle_data(self, data):
        if self.tag == "script" and "alert(" in data:
            self.active.append("script")
        self.text += data

    def handle_endtag(self, tag):
        self.tag = ""


def test_the_page_reader_sees_what_would_run():
    assert Page(SCRIPT).active == ["script"] and Page(HANDLER).active == ["img", "img"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["data", "train", "evaluate"])
def test_descriptions_are_text_in_rendered_notebooks(project, name):
    page = Page((project / "outputs" / "small_forward" / f"{name}.html").read_text())
    assert not page.active
    if name != "train":  # which shows no description
        assert SCRIPT in page.text


@pytest.mark.long
def test_no_token_reaches_a_file_of_the_run(project):
    folder = project / "outputs" / "small_forward"
    files = [path for path in (project / "outputs").rglob("*") if path.is_file()]
    assert {"manifest.json", "config.yaml", "train.log", "training_history.json", "train.ipynb"} <= {
        path.name for path in folder.iterdir()
    }
    assert (folder / "best" / "README.md").is_file() and (folder / "eval" / "small" / "facts.json").is_file()
    assert len(json.loads((folder / "manifest.json").read_text())["git_commit"]) == 40
    for path in files:
        assert TOKEN.encode() not in path.read_bytes(), path


def test_a_terminal_without_utf8_shows_what_is_said_all_the_same():
    words = "from mmrev_kit.__main__ import main; print(main(['train', '--config', 'ï.yaml'])); print('é')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, env=environment)
    assert done.stdout == "2\n\\xe9\n"
    assert "\\xef.yaml" in done.stderr and "Traceback" not in done.stderr
