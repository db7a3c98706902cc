"""Questions for pretraining, many at a time: what `pools.FaceSampler` and `objects.ObjectSampler` do, in arrays.

Wrong answers are really wrong: by the values of a face's attributes, and by the family of a thing.
"""

from dataclasses import replace

import numpy

from mmrev_kit.data.faces import VALUES
from mmrev_kit.data.pools import HARD_SHARE
from mmrev_kit.pretraining.pictures import SIZES, TRIPLE, Pictures, face_index, hidden_triples
from mmrev_kit.pretraining.text import Block, Lexicon, assemble, object_names

TRIES = 60  # rounds in which draws that did not come off are drawn again
NUM_VALUES = numpy.array(SIZES)
FAMILY_OF = numpy.array([family for _, family in object_names()])
TRIPLE_COLUMNS = [list(VALUES).index(name) for name in TRIPLE]
LONGEST_CAPTION = 36  # tokens with the end token; a letter or a verdict is 2


def name_attributes(rng: numpy.random.Generator, numbers: numpy.ndarray) -> numpy.ndarray:
    """(n, 7) booleans: `numbers` attributes of each row, any."""
    rank = rng.random((len(numbers), len(VALUES))).argsort(axis=1).argsort(axis=1)
    return rank < numbers[:, None]


class ArraySampler:
    """True and false descriptions of pictures, as arrays.

    Args:
        pictures: what is asked about; its pixels are not used.
        lexicon: the pieces of prompts.
        grid: (rows, columns) of visual tokens of these pictures.
        open_words: whether words may name a combination that is held out of training, as tests may.
    """

    def __init__(self, pictures: Pictures, lexicon: Lexicon, grid: tuple[int, int] = (4, 4), open_words: bool = False):
        self.pictures = replace(pictures, pixels=None)
        self.lexicon, self.image = lexicon, lexicon.image[grid]
        self.hidden = numpy.zeros_like(hidden_triples()) if open_words else hidden_triples()
        self.codes, self.num_faces = pictures.codes, pictures.num_faces
        self.index = pictures.index if pictures.index is not None else face_index(pictures.codes)
        self.by_family = {f: numpy.flatnonzero(pictures.families == f) for f in numpy.unique(pictures.families)}

    def faces_in(self, images: numpy.ndarray) -> numpy.ndarray:
        """(n, 7) values of the faces in pictures of faces."""
        return self.codes[images // self.pictures.looks]

    def _random_faces(self, rng, count: int) -> numpy.ndarray:
        return self.codes[rng.integers(len(self.codes), size=count)] if count else self.codes[:0]

    def _hides(self, codes, named) -> numpy.ndarray:
        """Whether a description names a combination that is held out."""
        full = named[..., TRIPLE_COLUMNS].all(axis=-1)
        return full & self.hidden[tuple(codes[..., column] for column in TRIPLE_COLUMNS)]

    def near_misses(self, rng, codes, named) -> numpy.ndarray:
        """(n, 3, 7): three false variants each, a square over two named attributes or a line along one."""
        n, rows = len(codes), numpy.arange(len(codes))
        order = numpy.where(named, rng.random(named.shape), -1).argsort(axis=1)
        a, b = order[:, -1], order[:, -2]
        wrong = numpy.repeat(codes[:, None], 3, axis=1)
        square = (named.sum(axis=1) > 1) & (rng.random(n) < 0.5)
        new_a = (codes[rows, a] + rng.integers(1, NUM_VALUES[a])) % NUM_VALUES[a]
        new_b = (codes[rows, b] + rng.integers(1, NUM_VALUES[b])) % NUM_VALUES[b]
        for place, column, value in ((0, a, new_a), (1, b, new_b), (2, a, new_a), (2, b, new_b)):
            wrong[rows[square], place, column[square]] = value[square]
        shifts = numpy.where(numpy.arange(1, 10) < NUM_VALUES[a][:, None], rng.random((n, 9)), 2).argsort(axis=1)[:, :3]
        for place in range(3):
            value = (codes[rows, a] + 1 + shifts[:, place]) % NUM_VALUES[a]
            wrong[rows[~square], place, a[~square]] = value[~square]
        return wrong

    def false_codes(self, rng, codes, named) -> numpy.ndarray:
        """(n, 7): one false variant each, off in one named attribute or another person's."""
        hard = rng.random(len(codes)) < HARD_SHARE
        found = self.near_misses(rng, codes, named)[:, 0]
        todo = numpy.flatnonzero(~hard)
        found[todo] = codes[todo]
        for _ in range(TRIES):
            bad = ((found == codes) | ~named).all(axis=1) | self._hides(found, named)
            todo = numpy.flatnonzero(bad)
            if not len(todo):
                return found
            found[todo] = numpy.where(named[todo], self._random_faces(rng, len(todo)), codes[todo])
        raise ValueError("No false description was found: there are too few different faces.")

    def wrong_texts(self, rng, codes, named) -> numpy.ndarray:
        """(n, 3, 7): three different false variants each, all naming the same attributes."""
        wrong = self.near_misses(rng, codes, named)
        soft = numpy.flatnonzero(rng.random(len(codes)) >= HARD_SHARE)
        wrong[soft] = self._random_faces(rng, 3 * len(soft)).reshape(-1, 3, len(VALUES))
        for number in range(TRIES):
            keys = numpy.concatenate([codes[:, None], wrong], axis=1)
            keys = numpy.ravel_multi_index(tuple(numpy.moveaxis(keys * named[:, None], -1, 0)), SIZES)
            keys.sort(axis=1)
            bad = (keys[:, 1:] == keys[:, :-1]).any(axis=1) | self._hides(wrong, named[:, None]).any(axis=1)
            todo = numpy.flatnonzero(bad)
            if not len(todo):
                return wrong
            wrong[todo] = self._random_faces(rng, 3 * len(todo)).reshape(-1, 3, len(VALUES))
            if number > TRIES // 2:  # few values: random people hardly ever differ three times
                wrong[todo] = self.near_misses(rng, codes[todo], named[todo])
        raise ValueError("No three false descriptions were found: there are too few different faces.")

    def find_faces(self, rng, wanted, named) -> numpy.ndarray:
        """Faces with the wanted values of the named attributes and any others; -1 where none was found."""
        found = numpy.full(len(wanted), -1)
        for _ in range(TRIES):
            todo = numpy.flatnonzero(found < 0)
            if not len(todo):
                break
            tried = numpy.where(named[todo], wanted[todo], self._random_faces(rng, len(todo)))
            found[todo] = self.index[numpy.ravel_multi_index(tuple(tried.T), SIZES)]
        return found

    def wrong_faces(self, rng, codes, named) -> numpy.ndarray:
        """(n, 3): three different faces each, of which the description is false; half of them near misses."""
        n = len(codes)
        wrong = self.find_faces(
            rng, self.near_misses(rng, codes, named).reshape(-1, len(VALUES)), named.repeat(3, axis=0)
        )
        wrong = wrong.reshape(n, 3)
        wrong[rng.random(n) >= HARD_SHARE] = -1
        for _ in range(TRIES):
            true = ((self.codes[wrong] == codes[:, None]) | ~named[:, None]).all(axis=2)
            twice = numpy.stack(
                [(wrong[:, [place]] == numpy.delete(wrong, place, axis=1)).any(axis=1) for place in range(3)], axis=1
            )
            bad = true | twice | (wrong < 0)
            if not bad.any():
                return wrong
            wrong[bad] = rng.integers(len(self.codes), size=int(bad.sum()))
        raise ValueError("No three wrong faces were found: there are too few different faces.")

    def strangers(self, rng, families: numpy.ndarray, count: int) -> numpy.ndarray:
        """(n, count): things of different other families each."""
        if not len(families):
            return numpy.zeros((0, count), dtype=int)
        known = numpy.array(sorted(self.by_family))
        scores = numpy.where(known == families[:, None], 2, rng.random((len(families), len(known))))
        chosen = known[scores.argsort(axis=1)[:, :count]]
        found = numpy.zeros(chosen.shape, dtype=int)
        for family in numpy.unique(chosen):
            places = chosen == family
            found[places] = rng.choice(self.by_family[family], size=int(places.sum()))
        return found

    def _pad(self, pieces: numpy.ndarray, width: int = 6) -> numpy.ndarray:
        """(n, ...) name pieces as wide as descriptions of people."""
        padding = [(0, 0)] * pieces.ndim + [(0, width - 1)]
        return numpy.pad(pieces[..., None], padding)

    def draw_images(self, rng, count: int, object_share: float) -> numpy.ndarray:
        """Random pictures, a share of them of things."""
        things = len(self.pictures.names)
        share = 1.0 if not len(self.codes) else object_share if things else 0.0
        number = round(share * count)
        found = numpy.concatenate(
            [
                rng.integers(self.num_faces or 1, size=count - number),
                self.num_faces + rng.integers(things or 1, size=number),
            ]
        )
        return rng.permutation(found)

    def split(self, images: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Places of the pictures of faces, and of those of things."""
        return numpy.flatnonzero(images < self.num_faces), numpy.flatnonzero(images >= self.num_faces)

    def _named(self, rng, codes, numbers):
        """Attributes to name of each face, none of them together a combination that is held out."""
        named = name_attributes(rng, numbers)
        for _ in range(TRIES):
            todo = numpy.flatnonzero(self._hides(codes, named))
            if not len(todo):
                break
            named[todo] = name_attributes(rng, numbers[todo])
        return named

    def captions(self, rng, images, slots, length: int, numbers=None) -> Block:
        faces, things = self.split(images)
        answers = numpy.zeros((len(images), 6), dtype=int)
        codes = self.faces_in(images[faces])
        answers[faces] = self.lexicon.describe(codes, numpy.ones_like(codes, dtype=bool), inside=False)
        answers[things] = self._pad(self.lexicon.names[0][self.pictures.names[images[things] - self.num_faces]])
        words = rng.choice(self.lexicon.forward, size=len(images))
        prompts = numpy.stack([numpy.full(len(images), self.image), words], axis=1)
        asked = numpy.where(images < self.num_faces, len(VALUES), 1)
        return assemble(self.lexicon, "caption", prompts, answers, slots, asked, length, LONGEST_CAPTION)

    def statements(self, rng, images, slots, length: int, numbers) -> Block:
        n, lexicon = len(images), self.lexicon
        truth = rng.permutation(numpy.arange(n) % 2).astype(bool)
        faces, things = self.split(images)
        texts = numpy.zeros((n, 6), dtype=int)
        codes = self.faces_in(images[faces])
        named = self._named(rng, codes, numbers[faces])
        said = numpy.where(truth[faces, None], codes, self.false_codes(rng, codes, named))
        texts[faces] = lexicon.describe(said, named, inside=False)
        own = images[things] - self.num_faces
        other = self.strangers(rng, self.pictures.families[own], 1)[:, 0]
        texts[things] = self._pad(lexicon.names[0][self.pictures.names[numpy.where(truth[things], own, other)]])
        words = rng.choice(lexicon.reverse, size=n)
        rest = numpy.tile([lexicon.space, self.image, lexicon.ask_cw], (n, 1))
        prompts = numpy.concatenate([texts, words[:, None], rest], axis=1)
        asked = numpy.where(images < self.num_faces, numbers, 1)
        return assemble(
            lexicon, "reverse", prompts, lexicon.verdicts[truth.astype(int)][:, None], slots, asked, length, 2
        )

    def text_choices(self, rng, images, slots, length: int, numbers) -> Block:
        n, lexicon = len(images), self.lexicon
        faces, things = self.split(images)
        options = numpy.zeros((n, 4, 6), dtype=int)
        codes = self.faces_in(images[faces])
        named = self._named(rng, codes, numbers[faces])
        said = numpy.concatenate([codes[:, None], self.wrong_texts(rng, codes, named)], axis=1).reshape(-1, len(VALUES))
        options[faces] = lexicon.describe(said, named.repeat(4, axis=0), inside=True).reshape(-1, 4, 6)
        own = images[things] - self.num_faces
        others = self.strangers(rng, self.pictures.families[own], 3)
        options[things] = self._pad(
            lexicon.names[1][self.pictures.names[numpy.concatenate([own[:, None], others], axis=1)]]
        )
        right, options = place_answers(rng, options)
        start = numpy.stack([numpy.full(n, self.image), rng.choice(lexicon.forward, size=n)], axis=1)
        prompts = numpy.concatenate([start, self._listed(options)], axis=1)
        asked = numpy.where(images < self.num_faces, numbers, 1)
        return assemble(lexicon, "mcq_i2d", prompts, lexicon.letters[right][:, None], slots, asked, length, 2)

    def _listed(self, options: numpy.ndarray) -> numpy.ndarray:
        """(n, 4, 6) option texts between their letters, with the instruction."""
        lexicon, parts = self.lexicon, []
        for place in range(4):
            letter = lexicon.options[place] if place else lexicon.first_option
            parts += [numpy.full((len(options), 1), letter), options[:, place]]
        return numpy.concatenate([*parts, numpy.full((len(options), 1), lexicon.only)], axis=1)

    def picture_choices(
        self, rng, count: int, length: int, numbers, object_share: float
    ) -> tuple[Block, numpy.ndarray]:
        """D2I questions, and their pictures (4 x count,) in the order in which they are shown."""
        lexicon, looks = self.lexicon, self.pictures.looks
        images = self.draw_images(rng, count, object_share)
        faces, things = self.split(images)
        texts, shown = numpy.zeros((count, 6), dtype=int), numpy.zeros((count, 4), dtype=int)
        codes = self.faces_in(images[faces])
        named = self._named(rng, codes, numbers[faces])
        texts[faces] = lexicon.describe(codes, named, inside=False)
        wrong = self.wrong_faces(rng, codes, named) if len(faces) else numpy.zeros((0, 3), int)
        shown[faces] = numpy.concatenate(
            [images[faces, None], wrong * looks + rng.integers(looks, size=wrong.shape)], axis=1
        )
        own = images[things] - self.num_faces
        texts[things] = self._pad(lexicon.names[0][self.pictures.names[own]])
        others = self.strangers(rng, self.pictures.families[own], 3)
        shown[things] = self.num_faces + numpy.concatenate([own[:, None], others], axis=1)
        right, shown = place_answers(rng, shown)
        parts = [texts, rng.choice(lexicon.reverse, size=count)[:, None]]
        for place in range(4):
            letter = lexicon.image_options[place] if place else lexicon.first_image
            parts.append(numpy.tile([letter, self.image], (count, 1)))
        prompts = numpy.concatenate([*parts, numpy.full((count, 1), lexicon.only)], axis=1)
        asked, slots = numpy.where(images < self.num_faces, numbers, 1), numpy.arange(4 * count)
        block = assemble(lexicon, "mcq_d2i", prompts, lexicon.letters[right][:, None], slots, asked, length, 2)
        return block, shown.ravel()


def place_answers(rng, options: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Options (n, 4, ...), the first of them right, in random order with balanced places of the right one.

    Returns:
        right (n,): the place of the right option; the options in their new order.
    """
    n = len(options)
    right = rng.permutation(numpy.arange(n) % 4)
    order = 1 + rng.random((n, 3)).argsort(axis=1)
    order = numpy.concatenate([order, numpy.zeros((n, 1), dtype=int)], axis=1)
    rows = numpy.arange(n)
    order[rows, 3] = order[rows, right]
    order[rows, right] = 0
    return right, options[rows[:, None], order]
