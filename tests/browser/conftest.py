"""A real JupyterLab, started as `make lab` starts it, in headless Chromium, on a small project of its own."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab import GIVEN, ONE, ROOT, Tab, give

# JupyterLab's own news would lie over the page.
NOTICES = '{"fetchNews": "false", "checkForUpdates": false}'


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


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """A copy of the notebooks and configurations, with small parameters."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("notebooks", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "configs" / "sweeps" / "one.yaml").write_text(ONE)
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
    tabs = []

    def open_one(name: str, **options) -> Tab:
        tabs.append(Tab(browser, address, name, **options))
        return tabs[-1]

    yield open_one
    for tab in tabs:
        if not tab.page.is_closed():
            tab.page.screenshot(path=tmp_path_factory.getbasetemp() / f"{tab.name}.png")
            tab.close()
