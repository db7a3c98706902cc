"""Prompts of pretraining as arrays, many at a time: pieces of text that were turned into tokens once.

A prompt is a sequence of pieces, each an entry of a `Lexicon`. The pieces end where the tokenizer ends a word anyway,
so that the tokens of a prompt are those that `prompts.Encoder` makes of the whole text.
"""

from dataclasses import dataclass

import numpy

from mmrev_kit.config.seeds import rng_for
from mmrev_kit.data.faces import VALUES, phrases
from mmrev_kit.data.objects import FAMILIES
from mmrev_kit.data.people import PLACES, ROLES
from mmrev_kit.data.tasks import CONNECTORS, CORRECT_QUESTION, LETTERS

START, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
WRITTEN = 4000  # arbitrary texts for copying, and the tokens that one may have
LONGEST_COPY = 20
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", ".,;:!?-+*/()'\"", "äöüßéèñçåøšž",
    "αβγδεζηθλμπσφω", "абвгдежзиклмнопрст", "日本語中文字漢", "→≤±€£°½😀🙂🌍",
)  # fmt: skip
SYLLABLES = ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "zen", "lor")
NO_TARGET = -100


def written_texts(seed: int, count: int = WRITTEN) -> list[str]:
    """Arbitrary short texts, in any script, that mean nothing."""
    rng = rng_for(seed, "written")
    texts = []
    for _ in range(count):
        words = []
        for _ in range(rng.randint(1, 4)):
            if rng.random() < 0.6:
                word = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3)))
                words.append(word.capitalize() if rng.random() < 0.3 else word)
            else:
                words.append("".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 4))))
        texts.append(" ".join(words))
    return texts


def object_names() -> list[tuple[str, int]]:
    """(name, family) of every thing, in the order of `FAMILIES`."""
    return [(name, number) for number, family in enumerate(FAMILIES) for name in family]


class Lexicon:
    """Pieces of prompts as tokens, by number; piece 0 is empty.

    Args:
        tokenizer: the embedded tokenizer.
        grids: (rows, columns) of visual tokens of the image sizes in use.
        seed: of the arbitrary texts.
    """

    def __init__(self, tokenizer, grids: list[tuple[int, int]], seed: int = 0):
        self.tokenizer = tokenizer
        self.pad_id, self.image_id = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self._pieces: list[tuple[list[int], numpy.ndarray, int]] = [([], numpy.zeros((3, 0), int), 0)]
        self._known: dict[tuple[str, bool], int] = {}
        self.start, self.end = self.piece(START, special=True), self.piece(END, special=True)
        self.stop = self.piece("<|im_end|>", special=True)
        self.image = {grid: self._image_piece(*grid) for grid in dict.fromkeys(grids)}
        self.forward = self.pieces(f" {words}" for words in CONNECTORS["forward"])
        self.reverse = self.pieces(f" {words}" for words in CONNECTORS["reverse"])
        self.space, self.ask_cw = self.piece(" "), self.piece(CORRECT_QUESTION)
        self.first_option, self.only = self.piece("? A."), self.piece(" Only answer A, B, C, or D.")
        self.options = self.pieces(f" {letter}." for letter in LETTERS)  # that of A is not used: see first_option
        self.first_image = self.piece("? A. ")
        self.image_options = self.pieces(f" {letter}. " for letter in LETTERS)
        self.letters, self.verdicts = self.pieces(LETTERS), self.pieces(["Wrong", "Correct"])
        facts = [f"the {role} of {place}" for role in ROLES for place in PLACES]
        self.facts = numpy.stack([self.pieces(facts), self.pieces(f" {fact}" for fact in facts)])
        names = [name for name, _ in object_names()]
        self.names = numpy.stack([self.pieces(names), self.pieces(f" {name}" for name in names)])
        copied = [
            *facts,
            *(text for text in written_texts(seed) if len(self.tokenizer(text).input_ids) <= LONGEST_COPY),
        ]
        self.copied, self.to_copy = self.pieces(copied), self.pieces(f"Say: {text}" for text in copied)
        self.person = self.pieces(["a person with", " a person with"])
        self._make_face_pieces()
        self._close()

    def piece(self, text: str, special: bool = False) -> int:
        """The number of a text; special tokens are only read where `special` says so."""
        if (text, special) not in self._known:
            ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids
            self._known[text, special] = len(self._pieces)
            self._pieces.append((ids, numpy.tile(numpy.arange(len(ids)), (3, 1)), len(ids)))
        return self._known[text, special]

    def pieces(self, texts) -> numpy.ndarray:
        """The numbers of several texts."""
        return numpy.array([self.piece(text) for text in texts])

    def _image_piece(self, rows: int, columns: int) -> int:
        """An image between its marks; its tokens take places in a plane, as `get_rope_index` deals them out."""
        marks = self.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
        down, right = (axis.ravel() for axis in numpy.mgrid[:rows, :columns])
        inner = 1 + numpy.stack([numpy.zeros_like(down), down, right])
        last = 1 + max(rows, columns)
        places = numpy.concatenate([numpy.zeros((3, 1), int), inner, numpy.full((3, 1), last)], axis=1)
        self._pieces.append(([marks[0], *[self.image_id] * (rows * columns), marks[1]], places, last + 1))
        return len(self._pieces) - 1

    def _make_face_pieces(self) -> None:
        """`slots[s][first]`: the words of slot s by the values named in it, the last index meaning "not named".

        A slot is an attribute, or a colour with the thing it colours; the words after the first begin with a comma.
        """
        self.slots = []
        groups = (("hair_color", "hair_cut"), ("back_hair",), ("beard",), ("skin",), ("clothes_color", "clothes"))
        for group in groups:
            shape = [len(VALUES[name]) + 1 for name in group]
            tables = []
            for lead in (", ", " "):
                table = numpy.zeros(shape, dtype=int)
                for place in numpy.ndindex(*shape):
                    pairs = zip(group, place, strict=True)
                    named = {name: VALUES[name][i] for name, i in pairs if i < len(VALUES[name])}
                    if named:
                        table[place] = self.piece(lead + _words(named))
                tables.append(table)
            self.slots.append((tuple(list(VALUES).index(name) for name in group), tables))

    def _close(self) -> None:
        lengths = [len(ids) for ids, _, _ in self._pieces]
        self.length, self.advance = numpy.array(lengths), numpy.array([advance for _, _, advance in self._pieces])
        self.offset = numpy.concatenate([[0], numpy.cumsum(self.length)[:-1]])
        self.tokens = numpy.concatenate([numpy.array(ids, int) for ids, _, _ in self._pieces]).astype(numpy.int16)
        self.places = numpy.concatenate([places for _, places, _ in self._pieces], axis=1).astype(numpy.int16)
        del self._pieces, self._known, self.tokenizer  # small to send to other processes

    def describe(self, codes: numpy.ndarray, named: numpy.ndarray, inside: bool) -> numpy.ndarray:
        """Descriptions of people as pieces, as `faces.describe` words them.

        Args:
            codes: (n, 7), the place of each value in `VALUES`.
            named: (n, 7), which attributes are named, at least one.
            inside: whether the text goes on from other text, that is, begins with a space.

        Returns:
            (n, 6) pieces.
        """
        found = [numpy.full(len(codes), self.person[int(inside)])]
        begun = numpy.zeros(len(codes), dtype=bool)
        sizes = numpy.array([len(values) for values in VALUES.values()])
        shown = numpy.where(named, codes, sizes)
        for columns, (later, first) in self.slots:
            place = tuple(shown[:, column] for column in columns)
            found.append(numpy.where(begun, later[place], first[place]))
            begun |= named[:, columns].any(axis=1)
        return numpy.stack(found, axis=1)


def _words(named: dict[str, str]) -> str:
    """The words of one slot, by the rules of `faces.describe`: a colour joins the thing that it colours."""
    from mmrev_kit.data.faces import describe

    text = describe(named, named).removeprefix("a person with ")
    assert len(named) > 1 or text == next(iter(phrases(named).values()))
    return text


@dataclass(frozen=True)
class Block:
    """Prompts of one length, padded on the right, as arrays.

    ids (n, length) and places (3, n, length): tokens and their M-RoPE positions. slots (n x images,): which picture of
    the step each image shows. image_at (n x images x tokens of an image,): where the image tokens are, in the
    flattened ids. answer_at (n, longest answer): the tokens that predict the answer's, in the flattened ids;
    targets (n, longest answer): what they should predict, or `NO_TARGET`. asked (n,): attributes named.
    """

    task: str
    ids: numpy.ndarray
    places: numpy.ndarray
    slots: numpy.ndarray
    image_at: numpy.ndarray
    answer_at: numpy.ndarray
    targets: numpy.ndarray
    asked: numpy.ndarray


def assemble(
    lexicon: Lexicon, task: str, prompts: numpy.ndarray, answers: numpy.ndarray, slots, asked, length: int, longest: int
) -> Block:
    """A block from pieces.

    Args:
        prompts, answers: (n, pieces) pieces, without the chat format.
        length: tokens of a row.
        longest: tokens of an answer, at most, the end token included.

    Raises:
        ValueError: a prompt or an answer that is too long.
    """
    count = len(prompts)
    edges = [numpy.full((count, 1), piece) for piece in (lexicon.start, lexicon.end, lexicon.stop)]
    pieces = numpy.concatenate([edges[0], prompts, edges[1], answers, edges[2]], axis=1)
    lengths, advances = lexicon.length[pieces], lexicon.advance[pieces]
    starts, bases = numpy.cumsum(lengths, axis=1) - lengths, numpy.cumsum(advances, axis=1) - advances
    totals = lengths.sum(axis=1)
    first = lengths[:, : prompts.shape[1] + 2].sum(axis=1)  # the answer's first token
    if totals.max() > length or (totals - first).max() > longest:
        raise ValueError(
            f"{task}: {totals.max()} tokens, {(totals - first).max()} of answer: over {length}, {longest}."
        )
    flat = lengths.ravel()
    owner = numpy.repeat(numpy.arange(flat.size), flat)
    within = numpy.arange(owner.size) - numpy.repeat(numpy.cumsum(flat) - flat, flat)
    source = lexicon.offset[pieces.ravel()][owner] + within
    target = (owner // pieces.shape[1]) * length + starts.ravel()[owner] + within
    ids = numpy.full(count * length, lexicon.pad_id, dtype=numpy.int16)
    ids[target] = lexicon.tokens[source]
    places = numpy.zeros((3, count * length), dtype=numpy.int16)
    places[:, target] = lexicon.places[:, source] + bases.ravel()[owner].astype(numpy.int16)
    steps = numpy.arange(longest)
    real = steps < (totals - first)[:, None]
    at = numpy.where(real, (numpy.arange(count) * length + first - 1)[:, None] + steps, 0)
    return Block(
        task=task,
        ids=ids.reshape(count, length),
        places=places.reshape(3, count, length),
        slots=numpy.asarray(slots, dtype=numpy.int32).ravel(),
        image_at=numpy.flatnonzero(ids == lexicon.image_id).astype(numpy.int32),
        answer_at=at.astype(numpy.int32),
        targets=numpy.where(real, ids[numpy.where(real, at + 1, 0)], NO_TARGET).astype(numpy.int16),
        asked=numpy.asarray(asked, dtype=numpy.int8),
    )
