"""Texts as they are compared: what a reader sees of them, without what cannot be seen or says nothing."""

import re
import unicodedata
from functools import lru_cache

THOUGHT = re.compile(r"^.*</think>|<think>.*$", re.DOTALL)  # thoughts are no answer; an unfinished one leaves none
SPECIAL = re.compile(r"<\|[^|>]*\|>")  # <|im_end|> and its like
BOXED = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
MARKDOWN = re.compile(r"[*`$]|^[#> \t]+|(?<![^\W_])_+|_+(?![^\W_])", re.MULTILINE)
QUOTES = str.maketrans(
    dict.fromkeys("\u2018\u2019", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb\u300c\u300d", '"')
    | {"\u3002": ". "}
)


def visible(text: str) -> str:
    """The text in NFKC with straight quotes, without thoughts, special tokens, markdown and invisible characters."""
    text = SPECIAL.sub(" ", THOUGHT.sub("", unicodedata.normalize("NFKC", text)))
    text = BOXED.sub(r"\1", BOXED.sub(r"\1", text.translate(QUOTES)))
    text = "".join(character for character in text if unicodedata.category(character) != "Cf")
    return MARKDOWN.sub("", text).strip()


@lru_cache(maxsize=2**14)  # a pool says the same few thousand texts again and again
def normal(description: str) -> str:
    """The description for comparison: NFKC, no case, single spaces, no surrounding quotes, markdown or full stop."""
    text = unicodedata.normalize("NFKC", visible(description).casefold())
    return " ".join(text.split()).strip(" \"'()[]").rstrip(" .!\u3002\"'")
