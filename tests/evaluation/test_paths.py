"""One root for relative paths: the data's folder, then the project's; never the folder that a process runs in."""

import shutil

import pytest
from PIL import Image

from mmrev_kit.config.project import experiment_dir
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.images import load_image
from mmrev_kit.data.questions import read_questions
from mmrev_kit.data.rows import read_entities
from mmrev_kit.data.run_data import read_experiment
from mmrev_kit.evaluation import ask
from mmrev_kit.notebook.gallery import people_figure
from mmrev_kit.training.run import prepare


@pytest.fixture
def config(small_config, small_data, tmp_path, monkeypatch):
    """Pictures of the same names in the experiment (32 pixels), the project (40) and the current folder (48), and one
    name that is in the current folder only."""
    made = small_config(f"data.dir={tmp_path}/data")
    experiment, project, current = experiment_dir(made), tmp_path / "project", tmp_path / "project" / "notebooks"
    shutil.copytree(small_data / "small", experiment)
    for folder, side in ((project, 40), (current, 48)):
        for picture in sorted((experiment / "images").iterdir()):
            (folder / "images").mkdir(parents=True, exist_ok=True)
            load_image(picture).resize((side, side)).save(folder / "images" / picture.name)
    Image.new("RGB", (48, 48)).save(current / "images" / "alone.png")
    (project / "configs").mkdir()
    monkeypatch.chdir(current)
    return made


def sides(images) -> dict[str, set[int]]:
    """{picture's name: pixels a side of all files under this name that were read}."""
    found: dict[str, set[int]] = {}
    for image in images:
        found.setdefault(image.name, set()).add(load_image(image).width)
    return found


@pytest.mark.parametrize(("beside", "side"), [(True, 32), (False, 40)])
def test_check_training_evaluation_and_asking_read_the_same_picture(config, monkeypatch, beside, side):
    """Those beside the data's files, or where none is there those of the project."""
    folder = experiment_dir(config)
    if not beside:
        shutil.rmtree(folder / "images")
        folder = folder.parents[1] / "project"
    task = prepare(config)
    samples = [sample for part in (task.train, task.val) for kept in part.values() for sample in kept]
    own = [sample for sample in samples if sample.row.source in ("forward", "reverse")]
    expected = {f"entity_{number:03d}_00.png": {side} for number in range(8)}
    assert sides(image for sample in own for image in sample.row.images) == expected
    read = {path: task.encoder.image_size(path)[0] for sample in own for path in sample.row.images}
    assert set(read.values()) == {side}
    assert sides(image for question in read_questions(config) for image in question.row.images) == expected
    rows, faults = read_experiment(experiment_dir(config))
    assert not faults and sides(image for part in rows.values() for row in part for image in row.images) == expected

    shown = people_figure(read_entities(experiment_dir(config)), experiment_dir(config))
    assert [axis.images[0].get_array().shape[0] for axis in shown.axes] == [side] * 8
    assert next(iter(ask.pictures(config).values())) == folder / "images" / "entity_000_00.png"
    monkeypatch.setattr(ask, "generate", lambda model, encoder, prompts, *_: [prompts[0].row.images[0]])
    asker = ask.Asker(config, None)
    assert load_image(asker("images/entity_003_00.png", "[image] is")).width == 40
    with pytest.raises(ConfigError, match="no picture"):
        asker("images/alone.png", "[image] is")


def test_a_picture_that_is_missing_among_the_others_is_not_taken_from_the_project(config):
    (experiment_dir(config) / "images" / "entity_000_00.png").unlink()
    rows, faults = read_experiment(experiment_dir(config))
    assert faults and all("there is no image images/entity_000_00.png" in fault.reason for fault in faults)
    assert all(found == {32} for part in rows.values() for row in part for found in sides(row.images).values())


def test_a_picture_in_the_current_folder_only_is_no_picture(config):
    path = experiment_dir(config) / "forward_train.jsonl"
    path.write_text(path.read_text().replace("images/entity_001_00.png", "images/alone.png"))
    _, faults = read_experiment(experiment_dir(config))
    assert len(faults) == 15 and all("there is no image images/alone.png" in fault.reason for fault in faults)
