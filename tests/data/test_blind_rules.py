"""Rules that never look at a picture gain nothing: whatever beats chance in these tests has used what it was taught.

Each rule knows every training row of both groups, more than any run shows, and may take a hint from another group's
test rows. A picture is a name to it.
"""

from collections import Counter, defaultdict
from statistics import mean, stdev

import pytest
from scipy.stats import t

from mmrev_kit.data.partners import connector_split, experiment_rows
from mmrev_kit.data.tasks import LETTERS

SEEDS = range(20)


def made(main, control, seed):
    people = [
        {"id": str(n), "description": f"d{n}", "images": [f"i{n}"], "group": "main" if n < main else "control"}
        for n in range(main + control)
    ]
    return experiment_rows(people, connector_split(seed), seed)


def best(votes):
    """The options with most votes, as {option: share of the guess}."""
    top = max(votes.values())
    winners = [option for option, count in votes.items() if count == top]
    return dict.fromkeys(winners, 1 / len(winners))


class Judging:
    """Correct or Wrong: what the training labels of a connector, a text, an image or a pair say."""

    def __init__(self, rows, test):
        train = rows["reverse_train"] + rows["cw_image_train"]
        self.asked = rows[test]
        self.keys = {
            "prior": lambda row: "",
            "connector": lambda row: row["connector"],
            "popularity of the text": lambda row: row["description"],
            "popularity of the image": lambda row: row["image_path"],
            # d3 with i5 and d5 with i3 are one couple; one that training calls wrong is wrong, any other one is right
            "elimination": lambda row: frozenset((row["description"][1:], row["image_path"][1:])),
        }
        self.seen = {name: defaultdict(Counter) for name in self.keys}
        for row in train:
            for name, key in self.keys.items():
                if name != "elimination" or row["label"] == "Wrong":
                    self.seen[name][key(row)][row["label"]] += 1

    def score(self, name):
        guesses = [(best(self.seen[name].get(self.keys[name](row)) or {"Correct": 1}), row) for row in self.asked]
        return mean(guess.get(row["label"], 0.0) for guess, row in guesses)


class Choosing:
    """One of four: the letter or option that other questions favour, or what is left when trained Wrongs go."""

    def __init__(self, rows, test):
        self.asked = rows[test]
        self.field = "choices" if test == "mcq_i2d_test" else "image_choices"
        self.wrong = {
            frozenset((row["description"][1:], row["image_path"][1:]))
            for row in rows["reverse_train"] + rows["cw_image_train"]
            if row["label"] == "Wrong"
        }
        self.offered = Counter(option for row in self.asked for option in row[self.field])
        self.trained = Counter(row["description"] for row in rows["reverse_train"] + rows["cw_image_train"])
        self.trained.update(row["image_path"] for row in rows["reverse_train"] + rows["cw_image_train"])
        half = {row["entity_id"]: number % 2 for number, row in enumerate(self.asked)}
        self.letters = defaultdict(Counter)  # of the other half of the people
        for row in self.asked:
            self.letters["", 1 - half[row["entity_id"]]][row["correct_index"]] += 1
            self.letters[row["connector"], 1 - half[row["entity_id"]]][row["correct_index"]] += 1
        self.half = half

    def score(self, name):
        return mean(best(self.votes(name, row)).get(row["correct_index"], 0.0) for row in self.asked)

    def votes(self, name, row):
        if name in ("prior", "connector"):
            return self.letters["" if name == "prior" else row["connector"], self.half[row["entity_id"]]]
        options = row[self.field]
        if name == "popularity in training":
            return {i: self.trained[option] for i, option in enumerate(options)}
        if name == "popularity among the options":
            return {i: self.offered[option] for i, option in enumerate(options)}
        shown = row["image_path"][1:] if self.field == "choices" else row["description"][1:]
        return {i: -(frozenset((shown, option[1:])) in self.wrong) for i, option in enumerate(options)}


RULES = {
    **{
        (test, rule): (Judging, 1 / 2)
        for test in ("reverse_test", "cw_image_test")
        for rule in ("prior", "connector", "popularity of the text", "popularity of the image", "elimination")
    },
    **{
        (test, rule): (Choosing, 1 / len(LETTERS))
        for test in ("mcq_i2d_test", "mcq_d2i_test")
        for rule in ("prior", "connector", "popularity in training", "popularity among the options", "elimination")
    },
}


@pytest.mark.parametrize(
    ("main", "control"), [(10, 10), (12, 12), (16, 16), (20, 0), pytest.param(112, 112, marks=pytest.mark.long)]
)
def test_no_blind_rule_beats_chance(main, control):
    experiments = [made(main, control, seed) for seed in SEEDS]
    for (test, rule), (kind, chance) in RULES.items():
        scores = [kind(rows, test).score(rule) for rows in experiments]
        margin = t.ppf(0.995, len(scores) - 1) * stdev(scores) / len(scores) ** 0.5
        assert mean(scores) - margin <= chance + 1e-9, (test, rule, mean(scores), margin)


def test_elimination_pays_in_small_groups():
    """What the rules are there to find: with 8 a group, the wrong options are pairs that training called wrong."""
    scores = [Choosing(made(8, 8, seed), "mcq_d2i_test").score("elimination") for seed in SEEDS]
    assert mean(scores) > 0.4
