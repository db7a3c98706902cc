"""The test questions of an experiment: its test rows with the options whose log-probability is asked for."""

import itertools
from dataclasses import dataclass, replace

from mmrev_kit.config.project import experiment_dir
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.config.seeds import rng_for
from mmrev_kit.data.checks import check_account, check_people, check_statements, encode_all
from mmrev_kit.data.faults import DataError, Fault, raise_faults
from mmrev_kit.data.images import image_roots
from mmrev_kit.data.prompts import Encoder, Sample
from mmrev_kit.data.rows import read_entities
from mmrev_kit.data.run_data import read_experiment, trained_connectors
from mmrev_kit.data.tasks import CHOICE, LETTERS, TASK_TYPES, Row


@dataclass(frozen=True)
class Question:
    """A test row, the options whose log-probability is asked for, and how its options were ordered."""

    row: Row
    options: tuple[str, ...]
    order: tuple[int, ...] | None = None


def read_questions(config: Config) -> list[Question]:
    """The experiment's test rows with their options.

    A forward row's options are the descriptions of its own group; with `evaluation.option_orders` a multiple-choice
    row comes in all 24 orders of its options.

    Raises:
        DataError: with every fault of the test files, or where there are none.
    """
    folder = experiment_dir(config)
    files, faults = read_experiment(folder, image_roots(config))
    everything = [row for part in files.values() for row in part]
    people = check_people(everything, read_entities(folder), folder)
    faults += trained_connectors(folder)[1]
    raise_faults(faults + check_statements(everything) + people, config.data.drop_faulty)
    paths = [folder / f"{name}.jsonl" for name in files]  # some rows may be made in memory
    check_account([path for path in paths if path.is_file()], everything, faults)
    known: dict[str | None, list[str]] = {}
    for row in everything:
        if row.description and row.description not in known.setdefault(row.group, []):
            known[row.group].append(row.description)
    questions = []
    for row in (row for test in TASK_TYPES for row in files.get(f"{test}_test", [])):
        if row.type.format == CHOICE and config.evaluation.option_orders:
            questions += [reorder(row, order) for order in itertools.permutations(range(4))]
        else:
            questions.append(Question(row, row.type.answers or tuple(known[row.group])))
    if not questions:
        names = ", ".join(f"{test}_test.jsonl" for test in TASK_TYPES)
        reason = f"there is nothing to ask: none of {names} is there."
        raise DataError([Fault(str(folder), reason, "Make the data again, or correct data.folder.")])
    return questions


def choose_questions(config: Config, questions: list[Question]) -> list[Question]:
    """Those of `evaluation.tests`, of at most `evaluation.max_samples` rows of each, drawn by the experiment's seed.

    Raises:
        ConfigError: no row of the tests that are named is there.
    """
    most, kept = config.evaluation.max_samples, set()
    for test in config.evaluation.tests:
        rows = list(dict.fromkeys(question.row.where for question in questions if question.row.task == test))
        few = most is not None and len(rows) > most
        kept |= set(rng_for(config.experiment.seed, "asked", test).sample(rows, most) if few else rows)
    if not kept:
        there = ", ".join(dict.fromkeys(question.row.task for question in questions))
        named = ", ".join(config.evaluation.tests)
        raise ConfigError(f"evaluation.tests = {named}: {experiment_dir(config)} has rows of {there} only.")
    return [question for question in questions if question.row.where in kept]


def reorder(row: Row, order: tuple[int, ...]) -> Question:
    """A multiple-choice row with its options in another order; order[i] is the old index of the new option i."""
    field = "choices" if row.type.options == "choices" else "images"
    options = tuple(getattr(row, field)[index] for index in order)
    right = LETTERS[order.index(LETTERS.index(row.answer))]
    return Question(replace(row, **{field: options}, answer=right), row.type.answers, order)


@dataclass(frozen=True)
class Asked:
    """A question as samples: its prompt with each of its options as the answer."""

    question: Question
    samples: tuple[Sample, ...]


def encode_questions(config: Config, encoder: Encoder) -> list[Asked]:
    """All test questions, each multiple-choice one in the order of its file, with every option as an answer.

    The pictures have the size that they have where the right answer is asked for.

    Raises:
        DataError: see `read_questions`; a row with an image that does not decode, or a prompt that cannot fit.
    """
    in_order = replace(config, evaluation=replace(config.evaluation, option_orders=False))
    questions = read_questions(in_order)
    samples, faults = encode_all([question.row for question in questions], encoder)
    raise_faults(faults, config.data.drop_faulty)
    found = []
    for question, sample in zip(questions, samples, strict=True):
        if sample is not None:
            prompt, options = sample.input_ids[: sample.answer_start], []
            for text in question.options:
                row = replace(question.row, answer=text)
                options.append(replace(sample, row=row, input_ids=prompt + tuple(encoder.tokens(row)[1])))
            found.append(Asked(question, tuple(options)))
    return found
