"""Making what a run needs and does not find: its experiment and its pools."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

from mmrev_kit.config.project import experiment_dir, resolve
from mmrev_kit.config.sections import INVENTED, Config
from mmrev_kit.data.design import design_of
from mmrev_kit.data.faults import DataError, Fault
from mmrev_kit.data.folder import changed_pictures, make_folder_experiment
from mmrev_kit.data.objects import make_object_pool
from mmrev_kit.data.people import make_experiment
from mmrev_kit.data.pools import make_face_pool
from mmrev_kit.data.portraits import make_portraits
from mmrev_kit.data.records import read_info
from mmrev_kit.data.run_data import check_bridge, pool_folder, pool_folders, uses_retention
from mmrev_kit.data.shapes import make_shapes
from mmrev_kit.data.tasks import FAIR_GROUP, GROUPS


def ensure_data(config: Config) -> list[str]:
    """Make the experiment and the pools where they are absent; existing folders are never changed.

    A pool may serve runs of other seeds than the one that it was made with, which is said then.

    Returns:
        What the design can show (`design.design_of`), then one line a folder: made, or already there.

    Raises:
        ConfigError: groups that cannot be (see `people.check_groups` and `run_data.check_bridge`).
        DataError: a folder that the kit made under this name was made with other settings.
    """
    data, seed = config.data, config.experiment.seed
    wanted = {"source": data.source, "seed": seed, "images_per_entity": data.images_per_entity}
    if data.source in INVENTED:
        wanted |= {f"num_{group}": size for group, size in data.group_sizes.items()} | {"image_size": data.image_size}
    if data.source == "diffusers":
        wanted |= {name: getattr(data, name) for name in ("image_model", "image_options")}
    if data.source == "folder" and resolve(data.entities_file).is_file():
        wanted["entities_file_sha256"] = sha256(resolve(data.entities_file).read_bytes()).hexdigest()
    make = {
        "drawn": make_experiment, "folder": make_folder_experiment, "diffusers": make_portraits, "shapes": make_shapes,
    }[data.source]  # fmt: skip
    folder = experiment_dir(config)
    if data.source in INVENTED and not folder.exists():
        check_bridge(config, Counter(data.group_sizes))
    design = design_of(config)
    look = partial(changed_pictures, folder, data) if data.source == "folder" else list
    made = _ensure(folder, wanted, "data.folder or experiment.name", partial(make, folder, data, seed), look)
    small = [group for group in GROUPS if 0 < wanted.get(f"num_{group}", 0) < FAIR_GROUP]
    if made.startswith("made") and small:
        rule = f"in groups of fewer than {FAIR_GROUP} their wrong options are pairs that training called wrong"
        made += f"; I2D and D2I of {', '.join(small)} cannot be read: {rule}"
    said = [*(design or design_of(config)), made]  # your own people are counted once they are read
    return said + [ensure_pool(config, kind) for kind in (pool_folders(config) if uses_retention(config) else ())]


def ensure_pool(config: Config, kind: str) -> str:
    """Make the face or the object pool where it is absent, as `ensure_data` does; the line that says so."""
    retention, size, seed = config.retention, config.data.image_size, config.experiment.seed
    folder, wanted = pool_folder(config, kind), {"kind": kind, "image_size": size}
    if kind == "face":
        wanted["num_faces"] = retention.num_faces
        make_pool = partial(make_face_pool, folder, retention.num_faces, size, seed)
    else:
        make_pool = partial(make_object_pool, folder, size, seed)
    line = _ensure(folder, wanted, f"retention.{kind}_pool", make_pool)
    other = read_info(folder).get("seed", seed)
    return line if other == seed else f"{line}, made with seed {other}"


def _ensure(
    folder: Path, wanted: dict, setting: str, make: Callable[[], object], look: Callable[[], list[Path]] = list
) -> str:
    """Make a folder where it is absent, else compare what the kit noted in it with what is wanted.

    Args:
        look: gives the pictures that have changed since.
    """
    if not folder.exists():
        try:
            make()
            return f"made {folder}"
        except FileExistsError:
            if not folder.exists():  # a link that leads nowhere; else another process has made it meanwhile
                raise
    made = read_info(folder)
    made = made and {"num_bridge": 0} | made  # not noted where there is no such group
    changed = [f"{path} has another content now" for path in (look() if made else [])[:3]]
    wrong = changed + [
        f"{key} is {made[key]}, not {value}" for key, value in wanted.items() if made.get(key, value) != value
    ]
    if wrong:
        advice = f"Choose another {setting}, or remove the folder to have it made anew."
        raise DataError([Fault(str(folder), f"made with other settings: {', '.join(wrong)}.", advice)])
    return f"found {folder}"
