"""The embedded model: a Qwen3-VL of about ten million parameters with its own tokenizer and processor.

It is the real transformers class in every part, small enough that a laptop trains it in minutes: 64 x 64 pixels
are 8 x 8 patches, merged two by two into 16 visual tokens.
"""

import json
from pathlib import Path

from mmrev_kit.config.project import EMBEDDED_MODEL
from mmrev_kit.config.seeds import rng_for
from mmrev_kit.data.faces import describe, sample_faces
from mmrev_kit.data.objects import FAMILIES
from mmrev_kit.data.people import PLACES, ROLES
from mmrev_kit.data.tasks import CONNECTORS

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
VOCABULARY = 1024
MIN_PIXELS, MAX_PIXELS = 32 * 32, 128 * 128
# The Qwen chat format: each turn between <|im_start|> and <|im_end|>, each image between the vision marks.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def tokenizer_corpus(seed: int = 0) -> list[str]:
    """Text in the words the model will meet: prompts of every task, visible descriptions, roles and places."""
    rng = rng_for(seed, "tokenizer")
    names = [name for family in FAMILIES for name in family]
    texts = [f"the {role} of {place}" for role in ROLES for place in PLACES] * 10
    texts += [describe(face, list(face)) for face in sample_faces(rng, 1000, "pretrain", min_difference=1)]
    texts += [f" {words}" for words in CONNECTORS["forward"] + CONNECTORS["reverse"]] * 200
    texts += [f" {name}" for name in names] * 60 + names * 2
    texts += [", correct or wrong? Only answer Correct or Wrong. Only answer A, B, C, or D. Correct Wrong"] * 500
    return texts + ["Correct", "Wrong", "user\n", "assistant\n", " A. B. C. D.", "? A."] * 500


def train_tokenizer(corpus: list[str]):
    """A byte-level BPE tokenizer of `VOCABULARY` tokens: every UTF-8 text can be read and written back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|endoftext|>", "<|im_end|>")],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer):
    """The Qwen3-VL processor with 8-pixel patches, merged two by two, for images of 32 to 128 pixels a side."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    patches = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    half = [0.5, 0.5, 0.5]  # Qwen3-VL's normalisation: pixels to [-1, 1]
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    images = Qwen2VLImageProcessor(size=size, image_mean=half, image_std=half, **patches)
    videos = Qwen3VLVideoProcessor(image_mean=half, image_std=half, **patches)
    return Qwen3VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)


def model_config(tokenizer):
    """The architecture, about 9.5 M parameters, as a `Qwen3VLConfig`."""
    from transformers import Qwen3VLConfig

    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True,
        },
        "pad_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "depth": 6, "hidden_size": 192, "intermediate_size": 512, "num_heads": 6, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 256, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1, 3],
    }  # fmt: skip
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def write_embedded(folder: str | Path = EMBEDDED_MODEL, seed: int = 0, weights: dict | None = None) -> Path:
    """Write tokenizer, processor and 16-bit safetensors into `folder`.

    Args:
        seed: of the random weights that are written where there are no others.
        weights: parameters by name, of any dtype.
    """
    import torch
    from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(tokenizer_corpus())
    make_processor(tokenizer).save_pretrained(folder)
    config = model_config(tokenizer)
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    if weights is not None:
        lacking = model.load_state_dict(weights, strict=False)
        assert not lacking.unexpected_keys and lacking.missing_keys in ([], ["lm_head.weight"]), lacking
    model = model.to(torch.float16)
    model.generation_config = GenerationConfig(
        eos_token_id=config.text_config.eos_token_id, pad_token_id=config.text_config.pad_token_id, do_sample=False
    )
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    written = write_embedded()
    print(json.dumps({file.name: file.stat().st_size for file in sorted(written.iterdir())}, indent=1))
