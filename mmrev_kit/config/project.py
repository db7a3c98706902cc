"""Where things are: the project's folder, a run's, an experiment's; and no secret in any file."""

import os
import re
from pathlib import Path

from mmrev_kit.config.sections import Config, ConfigError

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = ("embedded", "embedded-one-order")  # the models that come with the kit, by `model.name`
EMBEDDED_MODEL = ASSETS / EMBEDDED[0]
# A Hugging Face token, or what stands before the host of an address: a name and password.
SECRET = re.compile(r"hf_[A-Za-z0-9]{16,}|(?<=://)[^/\s@]+(?=@)")


def hide_secrets(text: str) -> str:
    """`text` with `***` for every token and password in it, such as an error message that names an address."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if len(os.environ.get(name, "")) >= 8:
            text = text.replace(os.environ[name], "***")
    return SECRET.sub("***", text)


def refuse_secrets(text: str, where: str) -> None:
    """A configuration goes into the run folder, the model card and the notebook: no token may be in it.

    Raises:
        ConfigError: there is one; the message does not repeat it.
    """
    if hide_secrets(text) != text:
        raise ConfigError(
            f"{where}: there is a token or password in it, which would be written to the run folder. Take it out and "
            "give it as HF_TOKEN or by `hf auth login`. A notebook or file that shows it already: delete it, renew it."
        )


def project_root() -> Path:
    """The folder that relative paths start from, whatever folder a notebook kernel was started in.

    It is the nearest folder at or above the working folder that holds `configs/` and `notebooks/`, and the folder
    that holds the package where there is none.
    """
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "configs").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return Path(__file__).resolve().parents[2]


def resolve(path: str | Path) -> Path:
    """`path` as an absolute path; a relative one starts from `project_root()`."""
    return (project_root() / Path(path).expanduser()).resolve()


def model_path(name: str) -> Path:
    """Where a base that is on this machine lies: with the kit, or at a path; a name on the hub gives no such path."""
    return ASSETS / name if name in EMBEDDED else resolve(name)


def effective_batch(config: Config, num_processes: int) -> int:
    """Samples per optimizer step: batch_size x gradient_accumulation_steps x processes."""
    return config.training.batch_size * config.training.gradient_accumulation_steps * num_processes


def run_dir(config: Config) -> Path:
    """The run folder: <launch.output_dir>/<experiment.name>_<task>."""
    return resolve(config.launch.output_dir) / f"{config.experiment.name}_{config.experiment.task}"


def experiment_dir(config: Config) -> Path:
    """The folder of the experiment's data: data.folder, or <data.dir>/<experiment.name> where that is not set."""
    return resolve(config.data.folder or Path(config.data.dir) / config.experiment.name)
