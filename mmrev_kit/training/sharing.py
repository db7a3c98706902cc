"""A trained adapter merged into its base, to be used and shared without the kit."""

import shlex
from functools import partial
from pathlib import Path

from mmrev_kit.config.project import resolve
from mmrev_kit.config.reading import load_config
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.model.adapters import adapter_folder
from mmrev_kit.model.base_files import read_object
from mmrev_kit.model.bases import adapter_digest, base_fingerprint, base_of
from mmrev_kit.model.merging import merge
from mmrev_kit.training.cards import merged_card


def merge_adapter(source: str, out: str, overrides: str = "") -> Path:
    """See `merging.merge`; returns the folder made.

    Args:
        source: a run folder, whose `best/` is taken, or a folder with an adapter. Its base is the run's, else the one
            that its adapter_config.json names.
        overrides: as in `load_config`, in force over the run's.

    Raises:
        ConfigError: see `merging.merge`; no base is named.
    """
    adapter = adapter_folder(Config(), str(resolve(source)))
    kept = adapter.parent / "config.yaml"
    run = adapter.parent if kept.is_file() and (adapter.parent / "manifest.json").is_file() else None
    name = None if run else read_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    base = f"model.name={shlex.quote(str(name))}" if name else ""
    if not run and not name and "model.name=" not in overrides:
        raise ConfigError(f"{adapter} names no base: add --overrides model.name=…, and adapter.unbound=true.")
    config = load_config(kept if run else None, f"{base} {overrides}")
    card = partial(merged_card, config, adapter, run, base_fingerprint(**base_of(config)), adapter_digest(adapter))
    merge(config, adapter, resolve(out), card)
    return resolve(out)
