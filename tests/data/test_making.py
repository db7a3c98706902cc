"""The same data made by two processes at once, and by one that is killed."""

import multiprocessing
import os
import signal

import pytest

from mmrev_kit.data import people, pools
from mmrev_kit.data.make import ensure_data
from mmrev_kit.data.pools import make_face_pool

FORK = multiprocessing.get_context("fork")  # what the test has changed holds in the processes, too


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A file that gets a byte for every face that any process draws."""
    original = pools.draw_face

    def draw(*arguments):
        with open(tmp_path / "drawn", "ab") as file:
            file.write(b".")
        return original(*arguments)

    monkeypatch.setattr(pools, "draw_face", draw)
    monkeypatch.setattr(people, "draw_face", draw)
    return tmp_path / "drawn"


def test_of_two_that_make_the_same_data_one_works_and_the_other_takes_it(small_config, tmp_path, drawn):
    config = small_config(f"data.dir={tmp_path}/data retention.face_pool={tmp_path}/data/pool")
    barrier, said = FORK.Barrier(2), FORK.SimpleQueue()

    def make() -> None:
        barrier.wait()
        said.put(ensure_data(config))

    processes = [FORK.Process(target=make) for _ in range(2)]
    for process in processes:
        process.start()
    lines = sorted(said.get() for _ in processes)
    for process in processes:
        process.join()
    words = [{one[place].split()[0] for one in lines} for place in (1, 2)]  # after the design's line
    assert words == [{"made", "found"}] * 2
    assert drawn.stat().st_size == 8 + 40  # each person and each face of the pool once
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["pool", "small"]


def test_what_a_killed_maker_left_goes_with_the_next(tmp_path, monkeypatch):
    def make(folder: str) -> None:
        make_face_pool(tmp_path / folder, 20, 16, 0, (4, 4))

    with monkeypatch.context() as patch:
        patch.setattr(pools, "draw_face", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        process = FORK.Process(target=make, args=("pool",))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    left = sorted(path.name for path in tmp_path.iterdir())
    assert [name[:10] for name in left] == [".pool.lock", ".pool.new."]
    make("pool")
    make("other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "pool"]
    for path in (tmp_path / "other").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "pool" / path.relative_to(tmp_path / "other")).read_bytes()
