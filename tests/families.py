"""Tiny random models of other families, each saved by its own transformers class with a processor of its family.

Nothing is downloaded. The tokenizers hold the embedded models' vocabulary behind each family's own special tokens; the
chat templates write what the published ones write for a user turn of texts and pictures and an answer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from vocabulary import SPECIAL_TOKENS, tokenizer_corpus, train_tokenizer

from mmrev_kit.model.plain import LORA_TARGETS

SIDE = 32  # pixels: of the families that show every picture at one size

QWEN = """{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}\
{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# The published template of Qwen3.5 opens a thought for the answer to come, and trims the texts.
THINKING = """{% for message in messages %}<|im_start|>{{ message.role }}
{% set text %}{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endset %}{% if message.role == 'assistant' %}<think>

</think>

{% endif %}{{ text | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
SMOL = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTERN = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, eq=False)
class Family:
    """A tiny model of a family.

    Attributes:
        build: writes it to a folder.
        lora: linear layers that LORA_TARGETS names for it, over all layers of the language model.
        pixels: model.min_pixels and model.max_pixels that suit its processor.
        shown: how its processor is told to show a picture within them.
        before: what its chat template writes between what asks for an answer and the answer.
    """

    name: str
    build: Callable[[Path], None]
    lora: int
    pixels: tuple[int, int]
    shown: dict
    before: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def settings(self) -> str:
        """What a configuration has to say of it, beside model.name."""
        low, high = self.pixels
        targets = LORA_TARGETS[self.name].replace(" ", "")
        return f"model.min_pixels={low} model.max_pixels={high} lora.target_modules=[{targets}]"


@cache
def vocabulary() -> str:
    return train_tokenizer(tokenizer_corpus()).to_str()


def tokenizer(extra: tuple[str, ...], named: dict[str, str], **roles):
    """The embedded models' byte-level BPE with more special tokens, some of them under a name of their own."""
    from tokenizers import Tokenizer

    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(vocabulary()), extra_special_tokens=named, **roles
    )
    made.add_special_tokens({"additional_special_tokens": [*SPECIAL_TOKENS, *extra]})
    return made


def qwen_tokenizer():
    return tokenizer((), {}, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def text_sizes(words, **more) -> dict:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(words), "pad_token_id": words.pad_token_id}
    return sizes | {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id} | more


def image_ids(words) -> dict:
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}


def save(folder: Path, config, processor) -> None:
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def qwen_images(patch: int):
    """Image and video processor for patches of so many pixels, two by two merged."""
    size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    return (
        transformers.Qwen2VLImageProcessor(patch_size=patch, merge_size=2, size=size),
        transformers.Qwen2VLVideoProcessor(patch_size=patch, merge_size=2),
    )


def qwen2_5_vl(folder: Path) -> None:
    words = qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 64, "window_size": 32, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text_sizes(words, rope_parameters=rope), vision_config=vision, **image_ids(words)
    )
    images, videos = qwen_images(8)
    processor = transformers.Qwen2_5_VLProcessor(images, words, videos, chat_template=QWEN)
    save(folder, config, processor)


def qwen3_5(folder: Path) -> None:
    words = qwen_tokenizer()
    words.add_tokens(["<think>", "</think>"])
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "mrope_interleaved": True}
    rope |= {"partial_rotary_factor": 0.25}
    text = text_sizes(words, num_hidden_layers=4, head_dim=32, linear_num_value_heads=4, rope_parameters=rope, **linear)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 64}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, **image_ids(words))
    images, _ = qwen_images(8)
    videos = transformers.Qwen3VLVideoProcessor(patch_size=8, merge_size=2)
    processor = transformers.Qwen3VLProcessor(images, words, videos, chat_template=THINKING)
    save(folder, config, processor)


def smolvlm(folder: Path) -> None:
    named = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    named |= {"end_of_utterance_token": "<end_of_utterance>", "global_image_token": "<global-img>"}
    tiles = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
    roles = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    words = tokenizer((*named.values(), *tiles), named, **roles)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": SIDE, "patch_size": 8}
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", "head_dim": 16} | text_sizes(words), vision_config=vision, scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"), pad_token_id=words.pad_token_id,
    )  # fmt: skip
    sizes = {"size": {"longest_edge": 4 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    processor = transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**sizes), words, transformers.SmolVLMVideoProcessor(**sizes),
        image_seq_len=(SIDE // 8 // 2) ** 2, chat_template=SMOL,
    )  # fmt: skip
    save(folder, config, processor)


def internvl(folder: Path) -> None:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    named |= {"video_token": "<video>"}
    words = tokenizer(tuple(named.values()), named, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": [SIDE, SIDE], "patch_size": [8, 8]}
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2"} | text_sizes(words), vision_config=vision,
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=(SIDE // 8 // 2) ** 2,
    )  # fmt: skip
    size = {"height": SIDE, "width": SIDE}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size), words, transformers.InternVLVideoProcessor(size=size),
        image_seq_length=(SIDE // 8 // 2) ** 2, chat_template=INTERN,
    )  # fmt: skip
    save(folder, config, processor)


LIMITS = {"size": {"shortest_edge": 1024, "longest_edge": 4096}}
FAMILIES = {
    family.name: family
    for family in (
        Family("qwen2_5_vl", qwen2_5_vl, 2 * 4, (1024, 4096), LIMITS),
        Family("qwen3_5", qwen3_5, 1 * 4 + 3 * 3, (1024, 4096), LIMITS),
        Family("smolvlm", smolvlm, 2 * 4, (SIDE**2, SIDE**2), {"do_image_splitting": False}, " "),
        Family("internvl", internvl, 2 * 4, (SIDE**2, SIDE**2), {"crop_to_patches": False}),
    )
}
