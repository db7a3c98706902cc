"""Small data shared by the tests: 4 + 4 people at 32 pixels, and a pool of 40 others."""

import os
import signal
from functools import cache
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as launched runs have it, and before torch is loaded
if "PYTEST_XDIST_WORKER" in os.environ:  # each of several test processes has a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import Config
from mmrev_kit.data.make import ensure_data
from mmrev_kit.data.pools import make_face_pool

# A shell's background job ignores interrupts, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
SMALL = (
    "experiment.name=small experiment.taught=generation experiment.match_exposure=null "
    "data.num_main=4 data.num_control=4 data.image_size=32 "
    "retention.num_faces=40 training.batch_size=8 training.num_epochs=2 "
    "lora.r=8 lora.alpha=16 lora.target_modules=[q_proj,k_proj,v_proj,o_proj]"
)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """A data folder with the experiment `small` and the pool `pool`."""
    folder = tmp_path_factory.mktemp("data")
    make_face_pool(folder / "pool", 40, 32, 0, rows_per_task=(60, 8))
    ensure_data(load_config("configs/tiny_cpu.yaml", f"{SMALL} data.dir={folder} retention.face_pool={folder}/pool"))
    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """From one of `families.FAMILIES` to the folder of its tiny model, which is made once and not to be changed."""

    @cache
    def make(family) -> Path:
        folder = tmp_path_factory.mktemp(family.name)
        family.build(folder)
        return folder

    return make


@pytest.fixture
def small_overrides(small_data, tmp_path) -> str:
    """Overrides for configs/tiny_cpu.yaml: small data, runs in the test's own folder."""
    return f"{SMALL} data.dir={small_data} retention.face_pool={small_data}/pool launch.output_dir={tmp_path}/outputs"


@pytest.fixture
def small_config(small_overrides):
    """A function from further overrides to a configuration."""

    def make(more: str = "") -> Config:
        return load_config("configs/tiny_cpu.yaml", f"{small_overrides} {more}")

    return make


# Minutes each: they come first, so that at the end no process works alone at one of them.
FIRST = "test_notebooks.py", "test_train.py", "test_evaluate.py", "test_plain_runs.py"


def pytest_collection_modifyitems(items):
    """The longest files first. Tests marked `long`, of half a minute or more, are left out unless asked for."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
    if "MMREV_LONG" not in os.environ:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes long: run with make test-long"))


@pytest.fixture
def open_in_jupyterlab(monkeypatch):
    """A function that makes this process look like the kernel of a notebook that a person has open."""
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)

    def open_one() -> None:
        monkeypatch.setenv("JPY_SESSION_NAME", "one.ipynb")
        monkeypatch.setattr("IPython.core.getipython.get_ipython", object)

    return open_one


@pytest.fixture
def look(monkeypatch):
    """`preflight` of a machine with other cards, another build of torch and, where given, other shared memory."""
    from mmrev_kit.training import preflight

    def look(config, cards: list, build: list[str], cuda: str | None = None, shared_gib: float | None = None):
        monkeypatch.setattr(preflight, "read_cards", lambda: cards)
        monkeypatch.setattr(preflight, "torch_build", lambda: (build, cuda))
        if shared_gib is not None:
            monkeypatch.setattr(preflight, "free_shared_gib", lambda: shared_gib)
        return preflight.preflight(config)

    return look
