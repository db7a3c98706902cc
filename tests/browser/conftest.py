"""A real JupyterLab, started as `make lab` starts it, in headless Chromium, on a small project of its own."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
# JupyterLab's own news would lie over the page.
NOTICES = '{"fetchNews": "false", "checkForUpdates": false}'
DATA = "data.num_main=4 data.num_control=4 data.image_size=32 retention.num_faces=40 retention.face_pool=data/pool"
RUN = {"name": "small", "overrides": f"{DATA} experiment.taught=generation training.batch_size=32"}
# What is typed into each notebook's cell of parameters, so that it ends within seconds.
GIVEN = {
    "data": RUN,
    "memory": {"model": "8b", "card": "A100 80", "micro_batch": 4},
    "train": RUN | {"num_epochs": 1},
    "evaluate": RUN | {"drops": "none", "base": False},
    "reproduce": RUN | {"seeds": "0", "num_epochs": 1, "overrides": f"{DATA} training.batch_size=64"},
    "helpers": {"num_epochs": 1, "batch_size": 32, "overrides": f"experiment.name=small {DATA}"},
    "pretrain_tiny": {
        "steps": 2, "prompts": 16, "num_faces": 24, "eval_prompts": 8, "workers": 0, "orders": "one",
        "overrides": "muon=false looks=1 log_every=1",
    },
}  # fmt: skip


def chromium() -> str | None:
    """Where the system's Chromium is, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def missing() -> str | None:
    """What must be installed before these tests can run, or None."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "Playwright is missing: pip install playwright"
    return None if chromium() else "Chromium is missing: apt-get install chromium"


def pytest_collection_modifyitems(items):
    if wanted := missing():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=f"needs a browser. {wanted}"))


def give(path: Path, values: dict) -> None:
    """Write values into a notebook's cell of parameters, as a user would type them."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for name, value in values.items():
        cell.source, count = re.subn(rf"(?m)^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v!r}", cell.source)
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
def address(project, tmp_path_factory) -> str:
    """The address, with its token, of a JupyterLab that `make lab` serves the project with."""
    home, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(8)
    settings = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(NOTICES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"--no-browser --allow-root --expose-app-in-browser --ServerApp.port={port} --ServerApp.port_retries=0"
    command = ["make", "-f", str(ROOT / "Makefile"), "lab", f"ARGS={words} --IdentityProvider.token={token}"]
    command += [f"BIN={Path(sys.executable).parent}", "-o", ".venv/ready-torch"]  # this environment, as it is
    own = {"JUPYTERLAB_SETTINGS_DIR": home / "settings", "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces"}
    own |= {"PYTHONPATH": ROOT, "JUPYTER_RUNTIME_DIR": home / "runtime", "IPYTHONDIR": home / "ipython"}
    environment = os.environ | {name: str(path) for name, path in own.items()}
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 90
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None and time.monotonic() < end, (home / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab?token={token}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


@pytest.fixture(scope="session")
def browser():
    """A context of Debian's Chromium: a window of a laptop's size."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield started.new_context(viewport={"width": 1400, "height": 900})
        started.close()


@pytest.fixture
def open_tab(browser, address, tmp_path_factory):
    """A function from a notebook's name to its `lab.Tab`; a test that fails leaves pictures of its tabs."""
    from lab import Tab

    tabs = []

    def open_one(name: str, **options) -> Tab:
        tabs.append(Tab(browser, address, name, **options))
        return tabs[-1]

    yield open_one
    for tab in tabs:
        if not tab.page.is_closed():
            tab.page.screenshot(path=tmp_path_factory.getbasetemp() / f"{tab.name}.png")
            tab.close()
