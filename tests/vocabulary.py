"""How the vocabulary of the embedded models was made; both kinds share the file in `EMBEDDED_MODEL`."""

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
    """A byte-level BPE `tokenizers.Tokenizer`: every UTF-8 text can be read and written back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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
    return tokenizer
