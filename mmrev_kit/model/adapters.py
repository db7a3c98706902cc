"""Adapters in peft's format: where they lie, put onto a base, and what they must not be."""

from pathlib import Path

from mmrev_kit.config.project import resolve, run_dir
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.model.base_files import AGAIN, read_object, refuse_tensors, tensor_shapes
from mmrev_kit.model.strict import strict

# Of Megatron PEFT would import what it names; aLoRA it switches off where the model is given embeddings; Arrow needs
# more adapters than one; BD-LoRA it drops in 4 bit.
PASSED_OVER = ("megatron_config", "alora_invocation_tokens", "arrow_config", "use_bdlora")


def adapter_folder(config: Config, adapter: str) -> Path:
    """The folder of an adapter: "best" or "final" of the configured run, or a path, of the adapter or of a folder with
    such a `best/`.

    Raises:
        ConfigError: there is no such folder.
    """
    if adapter in ("best", "final"):
        return run_dir(config) / adapter
    folder = resolve(adapter)
    if not folder.is_dir():
        raise ConfigError(
            f"adapter = {adapter!r}: must be best or final, of the run {run_dir(config)}, or a folder with an adapter, "
            f"and there is no folder {folder}. One on the hub: `hf download` it first."
        )
    inner = folder / "best"
    held = [(one / "adapter_config.json").is_file() for one in (folder, inner)]
    return inner if held == [False, True] else folder


@strict()
def attach_adapter(model, folder: Path, **options):
    """`PeftModel.from_pretrained(model, folder, **options)`, whose warnings are errors here.

    Raises:
        ConfigError: a file of it is missing or broken; its tensors are not those that its adapter_config.json asks
            for, one for one; or it is of a kind that would not count, see `refuse_passed_over`.
    """
    from peft import PeftModel, get_peft_model_state_dict

    given = read_object(folder / "adapter_config.json")
    if odd := next((name for name in PASSED_OVER if given.get(name)), None):
        raise ConfigError(f"{folder}: its adapter_config.json sets {odd}, which does not count here.")
    stored = tensor_shapes(folder / "adapter_model.safetensors")
    try:  # other sizes are refused below, by name
        peft_model = PeftModel.from_pretrained(model, folder, ignore_mismatched_sizes=True, **options)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / 'adapter_config.json'} fits no adapter of this model ({error}). {AGAIN}"
        ) from None
    refuse_passed_over(peft_model, folder)
    wanted = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    reshaped = [name for name, shape in stored.items() if name in wanted and wanted[name].shape != shape]
    refuse_tensors(str(folder), wanted.keys() - stored.keys(), stored.keys() - wanted.keys(), reshaped)
    return peft_model


def refuse_passed_over(peft_model, folder: Path) -> None:
    """Raises ConfigError where an adapter would change nothing: virtual tokens, which only a model that is called
    through PEFT sees, and layers whose weights the fast operations read past their modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    kind = peft_model.active_peft_config
    if kind.is_prompt_learning:
        raise ConfigError(f"{folder}: an adapter of virtual tokens ({kind.peft_type.value}), which is not asked here.")
    kinds = BaseTunerLayer | AuxiliaryTrainingWrapper
    changed = (name for name, part in peft_model.named_modules() if isinstance(part, kinds))
    if past := [name for name in changed if name.endswith(("patch_embed.proj", "q_norm", "k_norm"))]:
        raise ConfigError(f"{folder}: it changes {past[0]}, which an adapter cannot do here.")
