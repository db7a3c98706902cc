"""What a run saves: adapters that stock peft loads, the state to go on from, and the manifest. No pickle anywhere."""

import hashlib
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmrev_kit import __version__, files
from mmrev_kit.config.project import project_root
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.run_data import RunData, people_digest
from mmrev_kit.model.bases import VERSION, adapter_digest, base_fingerprint, base_of, version_of
from mmrev_kit.training.cards import adapter_card
from mmrev_kit.training.history import read_history
from mmrev_kit.training.preflight import PACKAGES
from mmrev_kit.training.scheduler import warnings_for

STATE_FORMAT = 1


def save_adapter(run, folder: Path, losses: dict[str, float]) -> None:
    """Write adapter_config.json, adapter_model.safetensors and a model card; `folder` changes as a whole.

    The saved tensors are exactly the trainable parameters.
    """
    with files.new_folder(folder, 4 * run.num_trained) as new:
        run.model.save_pretrained(new, save_embedding_layers=False)
        front = {"base_fingerprint": base_fingerprint(**base_of(run.config)), "adapter_sha256": adapter_digest(new)}
        card = adapter_card(run.config, front, run.progress, run.batch, run.num_trained, losses)
        files.write_text(new / "README.md", card)


def _flatten(value, path: str, tensors: dict, plain: dict) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, f"{path}/{key}" if path else str(key), tensors, plain)
    elif isinstance(value, torch.Tensor):
        tensors[path] = value.detach().to("cpu", copy=True)  # safetensors refuses the shared maps of 8-bit states
    else:
        plain[path] = value


def _unflatten(flat: dict) -> dict:
    nested: dict = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        target = nested
        for key in parents:
            target = target.setdefault(int(key) if key.isdigit() else key, {})
        target[last] = value
    return nested


def save_last(run) -> None:
    """Write `last/`: adapter, optimizer, scaler, schedule and progress, so that the rest of the run is the same.

    The first process writes; all must call it, for each may have a share of the optimizer. The history goes first, so
    that it never lacks a step that `last/` has behind it.
    """
    state = run.optimizer.state_dict()
    if not run.state.is_main_process:
        return
    adapter = {name: p.detach().cpu().contiguous() for name, p in run.model.named_parameters() if p.requires_grad}
    tensors, plain = {}, {}
    _flatten(state["state"], "", tensors, plain)
    record = {
        "format": STATE_FORMAT,
        "progress": run.progress,
        "schedule": run.schedule.state_dict(),
        "scaler": run.scaler.state_dict(),
        "optimizer": plain,
        "param_groups": state["param_groups"],
    }
    run.history.write()
    size = sum(tensor.nbytes for tensor in (*adapter.values(), *tensors.values()))
    with files.new_folder(run.folder / "last", size) as new:
        save_file(adapter, new / "adapter.safetensors")
        save_file(tensors, new / "optimizer.safetensors")
        files.write_json(new / "state.json", record)


def load_last(run) -> bool:
    """Go on from `last/`; False where there is none.

    The history is cut back to the step that was saved: what came after is done again.

    Raises:
        ConfigError: the folder was not written by this version of the kit, or for another run, or cannot be read.
    """
    folder = run.folder / "last"
    if not folder.is_dir():
        return False
    try:
        _restore(run, folder)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{folder}: not a state of this run ({reason}). Set launch.overwrite=true to start anew."
        ) from None
    return True


def _restore(run, folder: Path) -> None:
    manifest = run.folder / "manifest.json"
    before = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    version = version_of(before["base"]["fingerprint"]) if "base" in before else VERSION
    changed = [name for name, value in run_identity(run, version).items() if before.get(name, value) != value]
    if changed:
        raise ValueError(f"it did not begin with the same {' and '.join(changed)}, see manifest.json")
    record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if record["format"] != STATE_FORMAT:
        raise ValueError(f"format {record['format']} in state.json")
    adapter = load_file(folder / "adapter.safetensors")
    parameters = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    if {name: p.shape for name, p in parameters.items()} != {name: tensor.shape for name, tensor in adapter.items()}:
        raise ValueError("the adapter has other tensors")
    state = _unflatten(load_file(folder / "optimizer.safetensors") | record["optimizer"])
    if len(state) not in (0, len(parameters)):  # 0: every update so far was skipped
        raise ValueError("the optimizer has other tensors")
    for name, parameter in parameters.items():
        parameter.data.copy_(adapter[name])
    run.optimizer.load_state_dict({"state": state, "param_groups": record["param_groups"]})
    run.scaler.load_state_dict(record["scaler"])
    run.schedule.load_state_dict(record["schedule"])
    run.progress = {name: record["progress"][name] for name in run.progress}
    history, step, epoch = read_history(run.history.path), run.progress["global_step"], run.progress["epoch"]
    history |= {"steps": history["steps"][:step], "epochs": history["epochs"][:epoch]}
    if (len(history["steps"]), len(history["epochs"])) != (step, epoch):
        raise ValueError(f"{run.history.path.name} ends before step {step}")
    run.taken = sum(not record.get("skipped") for record in history["steps"])
    run.history.data = history | {"status": "running", "reason": None}


def _git_commit() -> str | None:
    command = ["git", "-C", str(project_root()), "rev-parse", "HEAD"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


def _short(path: Path) -> str:
    return str(path.relative_to(project_root())) if path.is_relative_to(project_root()) else str(path)


def pictures_digest(data: RunData, looks: dict[Path, str]) -> str:
    """A SHA-256 of what the run's rows show, those of the pools too, row by row.

    Args:
        looks: what the pictures look like, see `images.look_of`: the check of the data has decoded them all.
    """
    shown = [[looks.get(image) for image in row.images] for _, _, rows in data.sources() for row in rows]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def run_identity(run, version: int = VERSION) -> dict:
    """What must stay the same when a run goes on, apart from its configuration; `version` is the fingerprint's."""
    model, base = run.config.model, base_fingerprint(**base_of(run.config), version=version)
    return {
        "seed": run.config.experiment.seed,
        "base": {"name": model.name, "revision": model.revision, "fingerprint": base},
        "data": {_short(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in run.task.data.files},
        "people": people_digest(run.config),
        "pictures": pictures_digest(run.task.data, run.task.encoder.looks),
        "effective_batch": run.batch,
        "plan": run.task.plan.table(),
    }


def write_manifest(run) -> None:
    """Write manifest.json: everything needed to tell later what this run was."""
    device = run.state.device
    versions = {name: version(name) for name in PACKAGES}
    facts = {
        "versions": versions | {"mmrev-kit": __version__, "python": platform.python_version()},
        "git_commit": _git_commit(),
        **run_identity(run),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
        "compute_dtype": str(run.dtype).removeprefix("torch."),
        "num_processes": run.state.num_processes,
        "trainable_parameters": run.num_trained,
        "memory": run.memory.record() if run.memory else None,
        "warnings": warnings_for(run.config),
    }
    files.write_json(run.folder / "manifest.json", facts)
