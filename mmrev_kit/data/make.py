"""Making what a run needs and does not find: its experiment and its pools."""

import json
from dataclasses import asdict

from mmrev_kit.config.project import experiment_dir
from mmrev_kit.config.sections import Config
from mmrev_kit.data.design import design_of
from mmrev_kit.data.faults import DataError, Fault
from mmrev_kit.data.folder import make_folder_experiment
from mmrev_kit.data.objects import make_object_pool
from mmrev_kit.data.people import make_experiment
from mmrev_kit.data.pools import make_face_pool
from mmrev_kit.data.rows import pool_folders, uses_retention
from mmrev_kit.data.shapes import make_shapes


def ensure_data(config: Config) -> list[str]:
    """Make the experiment and the pools where they are absent; existing folders are never changed.

    Returns:
        What the design can show (`design.design_of`), then one line a folder: made, or already there.

    Raises:
        DataError: a folder that the kit made under this name was made with other settings.
    """
    folder = experiment_dir(config)
    wanted = asdict(config.data) | {"seed": config.experiment.seed}
    info = folder / "experiment_info.json"
    said = design_of(config)
    if not folder.exists():
        make = {"drawn": make_experiment, "folder": make_folder_experiment, "shapes": make_shapes}[config.data.source]
        make(folder, config.data, config.experiment.seed)
        said = [*(said or design_of(config)), f"made {folder}"]
    else:
        made = json.loads(info.read_text(encoding="utf-8")) if info.is_file() else {}
        keys = ["source", "seed", "images_per_entity"]
        keys += ["num_main", "num_control", "image_size"] if config.data.source == "drawn" else []
        wrong = [f"{key} is {made[key]}, not {wanted[key]}" for key in keys if key in made and made[key] != wanted[key]]
        if wrong:
            advice = "Choose another data.folder or experiment.name, or remove the folder to have it made anew."
            raise DataError([Fault(str(info), f"made with other settings: {', '.join(wrong)}.", advice)])
        said.append(f"found {folder}")
    if uses_retention(config):
        size, seed = config.data.image_size, config.experiment.seed
        for kind, pool in pool_folders(config).items():
            said.append(f"{'found' if pool.exists() else 'made'} {pool}")
            if kind == "face" and not pool.exists():
                make_face_pool(pool, config.retention.num_faces, size, seed)
            elif not pool.exists():
                make_object_pool(pool, size, seed)
    return said
