"""Pretraining: what is asked, what is held out, the forward pass against the stock model, resuming, measuring."""

import itertools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from vocabulary import tokenizer_corpus, train_tokenizer

from mmrev_kit import __main__ as command
from mmrev_kit.config.project import EMBEDDED_MODEL
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.faces import VALUES, describe, share_of
from mmrev_kit.data.objects import FAMILIES
from mmrev_kit.data.people import PLACES, ROLES
from mmrev_kit.data.pools import is_true_of
from mmrev_kit.data.tasks import CONNECTORS, LETTERS, TASK_TYPES
from mmrev_kit.model.scoring import generate
from mmrev_kit.pretraining import accuracy, learning, run
from mmrev_kit.pretraining.learning import Step
from mmrev_kit.pretraining.pictures import (
    TRIPLE,
    all_faces,
    draw_pictures,
    held_out_background,
    held_out_combinations,
    is_face,
    make_subjects,
    names_combination,
    shows_combination,
)
from mmrev_kit.pretraining.questions import NAMES, number_weights, step_rows
from mmrev_kit.pretraining.recipe import FEWEST, Recipe, read_recipe
from mmrev_kit.training.lock import held

SMALL = {"prompts": 16, "num_faces": 24, "looks": 1, "workers": 0, "log_every": 1, "eval_prompts": 8, "easy_steps": 0}
SMALL |= {"muon": False}  # on a CPU a step of Muon takes a minute
CW = ("reverse", "cw_image")


@pytest.fixture(scope="module")
def subjects() -> list:
    """All training faces and icons, undrawn."""
    return make_subjects("train", 0, None, 1)


def rows_of(orders: str, subjects: list, step: int, prompts: int = 512) -> list:
    faces = [subject for subject in subjects if is_face(subject)]
    icons = [subject for subject in subjects if not is_face(subject)]
    return step_rows(Recipe(orders=orders, easy_steps=0), faces, icons, step, prompts)


@pytest.fixture(scope="module")
def steps(subjects) -> dict[str, list]:
    """The rows of three steps of 512 prompts, of either kind of base."""
    return {orders: [row for step in range(3) for row in rows_of(orders, subjects, step)] for orders in ("both", "one")}


def shown(row, subjects) -> list[dict]:
    """The attributes of what a row's pictures show."""
    return [subjects[int(path.stem)].attributes for path in row.images]


def texts_of(row) -> list[str]:
    return [*row.choices] or [row.description]


@pytest.fixture(scope="module")
def meanings(steps) -> dict[str, dict]:
    """{description of a face: what it names}, from all descriptions that there are."""
    said = {text for row in steps["both"] + steps["one"] if row.images for text in texts_of(row)}
    known = {}
    for number in (1, 2, 3, 4, 7):
        for names in itertools.combinations(VALUES, number):
            for values in itertools.product(*(VALUES[name] for name in names)):
                named = dict(zip(names, values, strict=True))
                text = describe(named, names)
                if text in said:
                    assert text not in known  # one meaning for each text
                    known[text] = named
    assert {text for text in said if text.startswith("a person")} == set(known)
    return known


def is_true(text: str, seen: dict, meanings: dict) -> bool:
    """Whether a description is true of what a picture shows, judged from its words."""
    return seen["name"] == text if "name" in seen else text in meanings and is_true_of(meanings[text], seen)


def test_right_answers_are_true_and_wrong_ones_false(steps, subjects, meanings):
    for row in steps["both"] + steps["one"][:512]:
        judged = [is_true(text, seen, meanings) for text in texts_of(row) for seen in shown(row, subjects)]
        if row.task == "forward":
            assert judged == [True] and len(meanings.get(row.answer, VALUES)) == len(VALUES)
        elif row.task in CW:
            assert judged == [row.answer == "Correct"]
        elif row.images:
            assert judged == [letter == row.answer for letter in LETTERS]
            assert len({*row.choices, *row.images}) == (5 if row.choices else 4)


def test_the_kinds_differ_in_the_order_of_half_of_the_correct_or_wrong_questions_alone(steps):
    both, one = (Counter(row.source for row in steps[orders]) for orders in ("both", "one"))
    assert one == {"forward": 192, "reverse": 480, "mcq_i2d": 432, "mcq_d2i": 288, "text": 144}
    assert both == one | {"reverse": 240, "cw_image": 240}
    encoder = accuracy.make_encoder(EMBEDDED_MODEL)
    for row in steps["both"]:
        if row.task in CW:
            first, second, last = (encoder.parts(row) * 2)[:3] if row.task == "reverse" else ("", *encoder.parts(row))
            connectors = CONNECTORS["forward" if row.task == "cw_image" else "reverse"]
            assert row.connector in connectors and isinstance(second, Path)
            if row.task == "cw_image":
                assert last == f" {row.connector} {row.description}, correct or wrong? Only answer Correct or Wrong."
            else:
                assert first == f"{row.description} {row.connector} "
                assert last == ", correct or wrong? Only answer Correct or Wrong."
    for task in CW:
        answers = Counter(row.answer for row in steps["both"] if row.task == task)
        assert answers == {"Correct": 120, "Wrong": 120}
    with pytest.raises(ConfigError, match="both, one"):
        Recipe(orders="two")


def test_what_is_held_out_occurs_in_no_training_row(steps, subjects):
    assert len(held_out_combinations()) == 16
    facts = {f"the {role} of {place}" for role in ROLES for place in PLACES}
    for row in steps["both"] + steps["one"]:
        for seen in shown(row, subjects):
            if "name" in seen:
                assert seen["background"] != held_out_background(seen["icon"])
            else:
                assert share_of(seen) == "pretrain" and not shows_combination(seen)
        if row.images:
            assert not any(names_combination(text) for text in texts_of(row))
            assert not any(fact in text for text in texts_of(row) for fact in facts)


def test_combinations_are_known_by_their_words(meanings):
    rng = random.Random(0)
    faces = all_faces()["combinations"] + all_faces()["train"][:2000]
    for face in rng.sample(faces, 1500):
        names = rng.sample(list(VALUES), rng.randint(1, 7))
        assert names_combination(describe(face, names)) == (set(TRIPLE) <= set(names) and shows_combination(face))


def test_texts_copy_and_match_facts_and_names_without_any_picture(steps):
    facts = {f"the {role} of {place}" for role in ROLES for place in PLACES}
    kinds = Counter()
    for row in (row for row in steps["both"] if row.source == "text"):
        assert not row.images
        if row.connector.startswith("Say: "):
            assert row.connector == f"Say: {row.answer}"
            kinds["copied fact" if row.answer in facts else "copied"] += 1
        elif "correct or wrong" in row.connector:
            said, other = row.connector.split(", correct or wrong")[0].rsplit("the ", 1)
            assert said.startswith(f"the {other} ") == (row.answer == "Correct")
            kinds[row.answer] += 1
        else:
            said, rest = row.connector.removesuffix(" Only answer A, B, C, or D.").split("? A. ")
            options = [part for one in rest.split(" B. ") for two in one.split(" C. ") for part in two.split(" D. ")]
            assert len(set(options)) == 4 and said.startswith(f"{options[LETTERS.index(row.answer)]} ")
            assert set(options) <= facts or set(options) <= set(NAMES)
            kinds["facts" if set(options) <= facts else "names"] += 1
    assert kinds == dict.fromkeys(["copied fact", "copied", "Correct", "Wrong", "facts", "names"], 24)


def test_shares_are_disjoint_and_held_out_pictures_are_not_trained(subjects):
    sets = {kind: {tuple(face.values()) for face in faces} for kind, faces in all_faces().items()}
    assert not any(a & b for a, b in itertools.combinations(sets.values(), 2))
    assert len(sets["train"]) > 20_000 and len(sets["faces"]) > 5000 and len(sets["combinations"]) > 200
    assert {share_of(face) for kind in ("faces", "combinations") for face in all_faces()[kind]} == {"held_out"}
    seen = {(s.attributes["icon"], s.attributes["background"]) for s in subjects if not is_face(s)}
    icons = {(s.attributes["icon"], s.attributes["background"]) for s in make_subjects("icons", 0, None, 2)}
    assert (
        not seen & icons and {icon for icon, _ in seen} == {icon for icon, _ in icons} and len(seen) == 5 * len(icons)
    )
    assert {icon for icon, _ in icons} == {i for family in FAMILIES for part in family.values() for i in part}


def test_questions_grow_from_one_attribute_to_all_numbers():
    early, late = number_weights(0, 1000), number_weights(1000, 1000)
    assert early[0] / sum(early) > 0.95 and len(set(late)) == 1 and number_weights(0, 0) == late
    two = make_subjects("train", 0, 40, 2)
    assert [s.attributes["look"] for s in two[:4:2]] == ["0", "0"] and two[0].attributes["look"] != two[1].attributes[
        "look"
    ]


@pytest.fixture(scope="module")
def small():
    """A small drawn setting: recipe, subjects, pixels, and a model of random weights."""
    recipe = Recipe(**SMALL)
    subjects, drawn = draw_pictures("train", 0, 24, 1, 0)
    return recipe, subjects, torch.from_numpy(drawn), run.new_model(0, "cpu").eval()


def make_lessons(recipe, subjects) -> learning.Lessons:
    return learning.Lessons(recipe, subjects, accuracy.make_encoder(EMBEDDED_MODEL))


def test_a_step_depends_on_its_number_alone_and_other_sizes_take_turns(small):
    recipe, subjects, *_ = small
    lessons = make_lessons(recipe, subjects)
    loader = torch.utils.data.DataLoader(lessons, batch_size=None, sampler=range(5, 8), num_workers=2)
    for step, batch in zip(range(5, 8), loader, strict=True):
        again = lessons[step]
        assert all(numpy.array_equal(again[name], numpy.asarray(batch[name])) for name in again)
    assert not numpy.array_equal(lessons[5]["input_ids"], lessons[6]["input_ids"])
    sizes = [lessons.rows(step)[1] for step in range(0, 24 * 6)]
    assert sizes.count((64, 64)) == 23 * 6 and {*sizes} == {(64, 64), *learning.OTHER_SIZES}


def test_patches_are_the_processors():
    processor = AutoProcessor.from_pretrained(EMBEDDED_MODEL)
    pixels = numpy.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=numpy.uint8)
    theirs = processor.image_processor(images=[Image.fromarray(part) for part in pixels], return_tensors="pt")
    ours = learning.to_patches(torch.from_numpy(pixels), (96, 64), 8, 2)
    assert theirs["image_grid_thw"].tolist() == [[1, 8, 12]] * 2
    assert (ours.flatten(0, 1) - theirs["pixel_values"]).abs().max() < 1e-5
    half = learning.to_patches(torch.full((1, 64, 64, 3), 51, dtype=torch.uint8), (32, 48), 8, 2)
    assert half.shape == (1, 4 * 6, 3 * 2 * 8 * 8) and torch.allclose(half, torch.tensor(51 / 127.5 - 1))


def test_the_forward_pass_is_transformers_own(small, tmp_path):
    """Against the stock model on rows side by side, with pictures read from files and positions of its own."""
    recipe, subjects, pixels, model = small
    lessons = make_lessons(recipe, subjects)
    rows, size = lessons.rows(3)
    for number in {int(path.stem) for row in rows for path in row.images}:
        Image.fromarray(pixels[number].numpy()).save(tmp_path / f"{number}.png")
    batch = torch.utils.data.default_convert(lessons[3])
    with torch.no_grad():
        ours = learning.answer_logits(model, batch, pixels)
        right = learning.right_answers(ours, batch)
        encoder, stock = accuracy.make_encoder(EMBEDDED_MODEL), {}
        for row in rows:
            read = replace(row, images=tuple(tmp_path / path.name for path in row.images))
            inputs = encoder.collate([encoder.encode(read)], with_pixels=bool(row.images))
            labels = inputs.pop("labels")[0]
            answer = (labels >= 0).nonzero()[:, 0]
            logits = model(**inputs).logits[0, answer - 1]
            stock.setdefault((row.source, tuple(labels[answer].tolist())), []).append(logits)
    parts = {"forward": 1.0, "reverse": 0.75, "cw_image": 0.75, "mcq_i2d": 1.5, "mcq_d2i": 1.5, "text": 0.4}
    counts = Counter(batch["kinds"])
    for owner, kind in enumerate(batch["kinds"]):
        own = (batch["owner"] == owner) & (batch["weight"] > 0)  # the rest fills up
        mine, target = ours[own], batch["target"][own]
        (found,) = [s for s in stock[kind, tuple(target.tolist())] if (s - mine).abs().max() < 1e-4]
        assert bool(right[owner]) == bool((found.argmax(-1) == target).all())
        share = torch.tensor([1, 0.1]) if len(target) == 2 else torch.ones(len(target))
        expected = parts[kind] / sum(parts.values()) / counts[kind] * share / share.sum()
        assert torch.allclose(batch["weight"][own], expected)
    assert len(batch["kinds"]) == len(rows) and size == (64, 64) and abs(float(batch["weight"].sum()) - 1) < 1e-5
    pictures = {path for row in rows for path in row.images}
    assert len(pictures) <= len(batch["pictures"]) and batch["seen"].max() == len(pictures) * 16


def test_right_answers_are_what_greedy_decoding_writes(tmp_path):
    """The shipped base on held-out faces, half of the rows with an answer that is not what it says."""
    model = AutoModelForImageTextToText.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    encoder = accuracy.make_encoder(EMBEDDED_MODEL)
    subjects, drawn = draw_pictures("faces", 0, 24, 1, 0)
    rows = []
    for task in ("forward", "reverse", "mcq_i2d"):
        rows += accuracy.ask_about("faces", TASK_TYPES[task], subjects, 2, 4, random.Random(0))
    rows[1] = replace(rows[1], answer=rows[2].answer)
    rows[4] = replace(rows[4], answer={"Correct": "Wrong", "Wrong": "Correct"}[rows[4].answer])
    batch = learning.make_batch(rows, dict.fromkeys(("forward", "reverse", "mcq_i2d"), 1.0), (64, 64), encoder)
    with torch.no_grad():
        batch = torch.utils.data.default_convert(batch)
        right = learning.right_answers(learning.answer_logits(model, batch, torch.from_numpy(drawn)), batch)
    for number in range(len(drawn)):
        Image.fromarray(drawn[number]).save(tmp_path / f"{number}.png")
    reader = accuracy.make_encoder(EMBEDDED_MODEL)
    expected = Counter()
    for row in rows:
        read = replace(row, images=tuple(tmp_path / path.name for path in row.images))
        (written,) = generate(model, reader, [reader.encode(read, with_answer=False)], 40, torch.device("cpu"))
        expected[row.source] += written == row.answer
    assert expected == {"forward": 3, "reverse": 3, "mcq_i2d": 4}
    assert expected == Counter(kind for kind, good in zip(batch["kinds"], right.tolist(), strict=True) if good)


def test_every_parameter_has_one_optimizer(small):
    adamw, muon = learning.make_optimizers(small[3], 0.05)
    (matrices,) = (group["params"] for group in muon.param_groups)
    tables, vectors = (group["params"] for group in adamw.param_groups)
    taken = [*matrices, *tables, *vectors]
    assert len({id(part) for part in taken}) == len(taken) == len(list(small[3].parameters()))
    assert {id(small[3].lm_head.weight), id(small[3].model.visual.pos_embed.weight)} <= {id(part) for part in tables}
    assert all(part.ndim == 1 for part in vectors) and len(matrices) > 60
    (alone,) = learning.make_optimizers(small[3], 0.05, muon=False)
    assert sum(len(group["params"]) for group in alone.param_groups) == len(taken)


def test_muon_takes_the_steps_of_the_librarys_own():
    torch.manual_seed(0)
    shapes = [(8, 16), (8, 16), (16, 8), (8, 8)]
    theirs = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    ours = [torch.nn.Parameter(part.detach().clone()) for part in theirs]
    settings = {"lr": 0.01, "weight_decay": 0.05, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = torch.optim.Muon(theirs, **settings), learning.Muon(ours, **settings)
    began = [part.detach().clone() for part in ours]
    for _ in range(3):
        for one, other in zip(theirs, ours, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for start, one, other in zip(began, theirs, ours, strict=True):
        moved = (one - start).norm()
        assert moved > 0.03 and (one - other).norm() < 0.05 * moved  # the products are rounded to bfloat16
        momenta = [
            optimizer.state[part]["momentum_buffer"] for optimizer, part in zip(optimizers, (one, other), strict=True)
        ]
        torch.testing.assert_close(*momenta)


def test_a_save_rounds_the_run_so_that_going_on_is_exact(tmp_path):
    """With the real optimizers on small layers: one that goes on from the files, and one that was not interrupted."""
    recipe, runs = Recipe(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 8), "layer": torch.nn.Linear(8, 4)})
        runs.append((model, learning.make_optimizers(model, 0.05)))
    inputs = torch.tensor([[0, 1], [2, 4], [3, 3]])

    def step(model, optimizers):
        model["layer"](model["embed"](inputs)).square().sum().backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"].fill_(1e-3)
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(3):
        step(*runs[0])
    run.save(tmp_path / "state", *runs[0], {"recipe": recipe.learned(), "step": 3})
    record = run.restore(tmp_path / "state", *runs[1], recipe)
    assert record["step"] == 3 and runs[1][1][0].state_dict()["state"][0]["step"] == 3
    for _ in range(2):
        step(*runs[0])
        step(*runs[1])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True))
    assert not torch.equal(runs[0][0]["layer"].weight, runs[0][0]["layer"].weight.half().float())


def test_the_rate_warms_up_holds_and_falls_to_zero():
    recipe = Recipe(steps=100, rate=1.0, warmup=10, decay_share=0.5)
    rates = [learning.rate_at(step, recipe) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[50] == 1.0
    assert rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)


def files(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.fixture
def one_thread():
    """Several threads add gradients of shared rows in any order, so that no two runs are equal bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_second_pretraining_into_a_folder_in_which_one_is_under_way_is_refused(tmp_path):
    with held(tmp_path / "out"), pytest.raises(ConfigError, match=r"out is in use by process \d+ on .* since"):
        run.pretrain(Recipe(**SMALL, steps=1), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["model", "state"])
def test_folders_that_are_no_pretrainings_are_not_replaced(tmp_path, name):
    mine = tmp_path / name / "weights.safetensors"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ConfigError, match=f"{name}: no pretraining wrote it"):
        run.pretrain(Recipe(**SMALL, steps=1), tmp_path)
    assert mine.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.long
def test_the_loss_falls_and_a_killed_run_goes_on_to_the_same_model(tmp_path, monkeypatch, capsys, one_thread):
    recipe = Recipe(**SMALL, orders="one", steps=6, save_every=3, warmup=2)
    whole = run.pretrain(recipe, tmp_path / "whole")
    assert [entry["step"] for entry in whole["log"]] == list(range(1, 7))
    assert whole["log"][-1]["loss"] < 0.8 * whole["log"][0]["loss"]
    assert "cw_image" not in whole["log"][0]["right"]
    assert {(e["pictures"], e["task"]) for e in whole["tests"]} >= {("faces", "cw_image"), ("icons", "mcq_d2i")}

    taken, step = [], Step.__call__

    def killed(*words):
        taken.append(1)
        if len(taken) == 5:
            raise KeyboardInterrupt
        return step(*words)

    monkeypatch.setattr(Step, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        run.pretrain(recipe, tmp_path / "killed")
    again = run.pretrain(replace(recipe, log_every=2), tmp_path / "killed")
    assert len(taken) == 5 + 3 and "3 of 6 steps" in capsys.readouterr().out
    states = [files(tmp_path / name / "state") for name in ("whole", "killed")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert whole["tests"] == again["tests"]
    sizes = [file.stat().st_size for file in (tmp_path / "whole" / "state").iterdir()]
    assert len(sizes) <= 8 and max(sizes) < 16 * 2**20 and sum(sizes) < 64 * 2**20

    before = {file.name: file.read_bytes() for file in (tmp_path / "whole" / "model").iterdir()}
    assert run.pretrain(recipe, tmp_path / "whole") == whole and len(taken) == 8  # finished: only written anew
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "whole" / "model").iterdir()}
    with pytest.raises(ConfigError, match="orders = one, not both"):
        run.pretrain(replace(recipe, orders="both"), tmp_path / "whole")

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole" / "model")
    assert model.dtype == torch.float16
    assert all(torch.equal(part, states[0][f"model.{name}"]) for name, part in model.named_parameters())
    for name in ("config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert before[name] == (EMBEDDED_MODEL / name).read_bytes()
    for words in ("ToonHead", "CC BY 4.0", "MIT", "--orders one --seed 0", "6 steps", "| faces | CW |", "Apache-2.0"):
        assert words in before["README.md"].decode()


@pytest.mark.long
def test_accuracies_are_counted_by_task_and_number_of_attributes(capsys):
    words = ["--measure", str(EMBEDDED_MODEL), "--eval-prompts", "8", "--workers", "0", "--num-faces", "24"]
    run.main([*words, "--looks", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 * len(TASK_TYPES)
    (captions,) = [line for line in lines if line.startswith("| faces | forward |")]
    assert float(captions.split("|")[3]) == 1.0
    results = [
        {"pictures": "faces", "task": "reverse", "named": n, "prompts": 4, "right": r} for n, r in ((1, 4), (2, 1))
    ]
    assert accuracy.table(results)[2:] == ["| faces | CW | 0.625 | 1: 1.000, 2: 0.250 |"]


def test_the_vocabulary_is_the_shipped_one():
    assert train_tokenizer(tokenizer_corpus()).get_vocab() == AutoTokenizer.from_pretrained(EMBEDDED_MODEL).get_vocab()


def test_the_command_line_and_the_notebook_read_every_field(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(run, "pretrain", lambda *words: given.append(words))
    run.main(["--orders", "one", "--num-faces", "30", "--rate", "1e-4", "--no-muon", "--out", "s"])
    assert given == [(Recipe(orders="one", num_faces=30, rate=1e-4, muon=False), "s")]
    assert read_recipe({"orders": "one", "num_faces": 30}, "looks=1") == Recipe(orders="one", num_faces=30, looks=1)
    for values, words in (({"steps": "many"}, ""), ({}, "lookz=1"), ({"prompts": 2}, "")):
        with pytest.raises(ConfigError, match="pretraining: "):
            read_recipe(values, words)
    for name, value in {
        "looks": 0,
        "save_every": 0,
        "workers": -1,
        "eval_prompts": -7,
        "rate": "nan",
        "num_faces": 15,
    }.items():
        with pytest.raises(ConfigError, match=f"pretraining: {name} = "):
            read_recipe({name: value})
    for words in (["--prompts", "2"], ["--steps", "many"]):
        assert command.main(["pretrain", *words, "--out", str(tmp_path)]) == 2
    assert command.main(["pretrain", "--measure", str(tmp_path)]) == 2
    with pytest.raises(ConfigError, match=r"decay_share = 1\.5: "):
        read_recipe({"decay_share": 1.5})
    assert FEWEST >= 4 and len(given) == 1
