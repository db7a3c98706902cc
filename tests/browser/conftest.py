"""A real JupyterLab, started as `make lab` starts it, in headless Chromium, on a small project of its own."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
# The server's notices would lie over the page; nothing here may ask the network for news.
SETTINGS = {
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
}
SMALL = (
    "experiment.taught=generation data.image_size=32 retention.num_faces=40 retention.face_pool=data/pool "
    "training.batch_size=32 training.max_length=512"
)
# What each notebook is given in its cell of parameters, so that it ends within seconds.
GIVEN = {
    "data": {"name": "small", "num_main": 4, "num_control": 4, "overrides": SMALL},
    "memory": {"model": "8b", "card": "A100 80"},
    "train": {"name": "small", "num_epochs": 1, "overrides": f"data.num_main=4 data.num_control=4 {SMALL}"},
    "evaluate": {"name": "small", "drops": "none", "overrides": f"data.num_main=4 data.num_control=4 {SMALL}"},
    "reproduce": {
        "name": "small",
        "seeds": "0",
        "num_epochs": 1,
        "overrides": f"data.num_main=4 data.num_control=4 {SMALL.replace('experiment.taught=generation ', '')}",
    },
    "helpers": {
        "num_epochs": 1,
        "batch_size": 32,
        "overrides": f"experiment.name=small data.num_main=4 data.num_control=4 {SMALL}",
    },
    "pretrain_tiny": {
        "steps": 2,
        "prompts": 8,
        "num_faces": 40,
        "eval_prompts": 4,
        "workers": 1,
        "overrides": "looks=1",
    },
}


def chromium() -> str | None:
    """Where the system's Chromium is, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def pytest_collection_modifyitems(items):
    """Without a browser these tests say what to install."""
    try:
        import playwright.sync_api  # noqa: F401

        missing = None if chromium() else "Chromium is missing: apt-get install chromium"
    except ImportError:
        missing = "Playwright is missing: pip install playwright"
    for item in items:
        if missing and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"needs a browser. {missing}"))


def give(path: Path, values: dict) -> None:
    """Write other values into a notebook's cell of parameters, as a user would type them."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for name, value in values.items():
        cell.source, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", cell.source)
        assert count == 1, f"{path.name} has no parameter {name}"
    nbformat.write(notebook, path)


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """A copy of the notebooks and configurations, with small parameters."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("notebooks", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    for name, values in GIVEN.items():
        give(folder / "notebooks" / f"{name}.ipynb", values)
    return folder


@pytest.fixture(scope="session")
def server(project, tmp_path_factory) -> str:
    """The address of a JupyterLab that `make lab` started in the project, with its token."""
    settings = tmp_path_factory.mktemp("settings")
    for name, text in SETTINGS.items():
        path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    words = f"--no-browser --allow-root --ServerApp.port={port} --ServerApp.port_retries=0"
    words += f" --IdentityProvider.token={token} --expose-app-in-browser"
    # -o: the environment that runs these tests is the one to use, and is not set up anew
    ready = ".venv/ready-torch"
    command = ["make", "-f", str(ROOT / "Makefile"), "-o", ready, "lab", f"BIN={Path(sys.executable).parent}"]
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(settings / "workspaces"),
        "PYTHONPATH": str(ROOT),
        "JUPYTER_PLATFORM_DIRS": "1",
    }
    log = open(settings / "log", "w")
    process = subprocess.Popen(
        [*command, f"ARGS={words}"], cwd=project, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < end, (settings / "log").read_text()
            time.sleep(0.2)
        yield f"{address}/lab?token={token}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=30)
