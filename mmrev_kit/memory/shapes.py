"""The sizes of a Qwen3-VL, read from its configuration."""

from dataclasses import dataclass
from pathlib import Path

from mmrev_kit.config.project import model_path
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.model.base_files import FAMILY, read_config

UNKNOWN = (
    "the memory estimate knows Qwen3-VL only. mmrev_kit.training.rehearse.rehearse(cfg) measures a few updates of the "
    "configured model with random weights"
)
PUBLISHED = ("2b", "4b", "8b", "32b")


@dataclass(frozen=True)
class ModelShapes:
    """The sizes of a Qwen3-VL that memory depends on: of the language model under transformers' names (so that what
    takes its text configuration takes these, too), of the vision tower as `v_`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int
    tied: bool
    v_depth: int
    v_hidden: int
    v_inter: int
    v_patch_values: int  # numbers in a patch
    v_positions: int
    v_merge: int  # patches a visual token
    v_deepstack: int
    name: str = "model"

    @property
    def query(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer of a decoder layer."""
        h, f = self.hidden_size, self.intermediate_size
        found = {"q_proj": (h, self.query), "k_proj": (h, self.key), "v_proj": (h, self.key), "o_proj": (self.query, h)}
        return found | {"gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}

    def vision_linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of every linear layer of the vision tower."""
        h, f, wide = self.v_hidden, self.v_inter, self.v_hidden * self.v_merge
        merger = [(wide, wide), (wide, self.hidden_size)]
        return [(h, 3 * h), (h, h), (h, f), (f, h)] * self.v_depth + merger * (1 + self.v_deepstack)


TEXT_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
VISION_FIELDS = {
    "v_depth": "depth", "v_hidden": "hidden_size", "v_inter": "intermediate_size",
    "v_positions": "num_position_embeddings",
}  # fmt: skip


def read_shapes(source: str | Path, name: str | None = None) -> ModelShapes:
    """The shapes of a model, from its JSON file or the folder that holds one.

    Args:
        name: how messages call it; None: as the file or the folder is called.

    Raises:
        ConfigError: no such file, a model that the kit cannot use (see `read_config`), one of another family, a field
            that is missing, or a size that is not positive.
    """
    path = model_path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        known = ", ".join(map(architecture_file, PUBLISHED))
        raise ConfigError(f"{source}: no model of that name; give a model's config.json or one of {known}.")
    name = name or (path.parent.name if path.name == "config.json" else path.stem)
    values = read_config(path, name)
    if values.get("model_type", FAMILY) != FAMILY:
        raise ConfigError(f"{name} is a {values['model_type']}: {UNKNOWN}.")

    def number(part: str, key: str, default: int | None = None) -> int:
        value = values[part].get(key, default)
        if value is None:
            raise ConfigError(f"{name}: {part} has no {key}, which the memory estimate needs.")
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConfigError(f"{name}: {part}: {key} = {value!r}: must be a whole number above 0.")
        return value

    text, vision = "text_config", "vision_config"
    sizes = {key: number(text, key) for key in TEXT_FIELDS}
    sizes |= {ours: number(vision, key) for ours, key in VISION_FIELDS.items()}
    patch = number(vision, "in_channels", 3) * number(vision, "temporal_patch_size", 2)
    tied = values.get("tie_word_embeddings", values[text].get("tie_word_embeddings", False))
    return ModelShapes(
        **sizes,
        head_dim=number(text, "head_dim", sizes["hidden_size"] // sizes["num_attention_heads"]),
        tied=bool(tied),
        v_patch_values=patch * number(vision, "patch_size") ** 2,
        v_merge=number(vision, "spatial_merge_size", 2) ** 2,
        v_deepstack=len(values[vision].get("deepstack_visual_indexes") or ()),
        name=name,
    )


def architecture_file(size: str) -> str:
    """The file of a published model's sizes, which the kit brings."""
    return f"configs/models/qwen3vl_{size}.json"


def size_in_name(name: str) -> str | None:
    """Which of the published sizes a name on the hub, such as Qwen/Qwen3-VL-8B-Instruct, speaks of; None: of none."""
    words = name.lower().replace("/", "-").replace("_", "-").split("-")
    return next((size for size in PUBLISHED if size in words), None) if "qwen3" in words else None


def as_shapes(source) -> ModelShapes:
    """`ModelShapes` of whatever names or holds a model; `32b` and the like are the published sizes."""
    if isinstance(source, ModelShapes):
        return source
    if isinstance(source, str) and source.lower() in PUBLISHED:
        source = architecture_file(source.lower())
    return read_shapes(source)


def visual_tokens(shapes: ModelShapes, pixels: int) -> int:
    """Visual tokens of an image of so many pixels: a patch has 3 colours and 2 frames (a picture is doubled)."""
    return max(1, pixels // (shapes.v_merge * shapes.v_patch_values // 6))
