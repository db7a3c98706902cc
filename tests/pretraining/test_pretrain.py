"""Pretraining: prompts in arrays against the kit's own, what is asked, what is held out, steps, state, model."""

import dataclasses
import itertools

import numpy
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLForConditionalGeneration

from mmrev_kit.config.project import EMBEDDED_MODEL
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.data.faces import VALUES, describe, share_of
from mmrev_kit.data.objects import FAMILIES
from mmrev_kit.data.people import PLACES, ROLES
from mmrev_kit.data.pools import is_true_of
from mmrev_kit.data.prompts import Encoder
from mmrev_kit.data.tasks import CONNECTORS, LETTERS, Row
from mmrev_kit.pretraining import accuracy, command, run, state
from mmrev_kit.pretraining.model import (
    Optimizer,
    answer_logits,
    losses_of,
    orthogonal,
    patches_of,
    shapes_of,
    to_arrays,
)
from mmrev_kit.pretraining.pictures import (  # fmt: skip
    ICONS,
    Pictures,
    face_index,
    faces_of,
    held_out_background,
    hidden_triples,
    holds_combination,
    make_pictures,
)
from mmrev_kit.pretraining.plan import make_step, number_weights, plan_step
from mmrev_kit.pretraining.questions import name_attributes
from mmrev_kit.pretraining.steps import DecayingRate, Feed, Recipe, Source
from mmrev_kit.pretraining.text import NO_TARGET, Lexicon, object_names
from mmrev_kit.pretraining.tiny import model_config, tokenizer_corpus, train_tokenizer

SMALL = {"prompts": 16, "num_faces": 24, "looks": 1, "workers": 0, "other_every": 0, "log_every": 1, "eval_prompts": 8}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(tokenizer_corpus())


@pytest.fixture(scope="module")
def lexicon(tokenizer):
    return Lexicon(tokenizer, [(4, 4), (2, 2), (4, 6)])


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    """All training faces and icons, undrawn: one grey picture stands for all."""
    codes = numpy.array([[VALUES[n].index(v) for n, v in zip(VALUES, f, strict=True)] for f in faces_of("train")])
    names = numpy.arange(len(object_names()))
    families = numpy.array([family for _, family in object_names()])
    return Pictures(numpy.zeros((1, 64, 64, 3), numpy.uint8), codes, 2, names, families, face_index(codes))


@pytest.fixture(scope="module")
def source(pictures, lexicon) -> Source:
    return Source(Recipe(easy_steps=0), {(64, 64): pictures}, lexicon)


@pytest.fixture(scope="module")
def steps(source) -> list:
    """(blocks, pictures shown) of four steps of 512 prompts."""
    sampler, plan = source.samplers[64, 64], source.plans[64, 64]
    return [make_step(sampler, plan, 0, number) for number in range(4)]


@pytest.fixture(scope="module")
def setting():
    """A small drawn setting with a model of random weights."""
    return run.prepare(Recipe(**SMALL), None)


def turns(tokenizer, lexicon, block) -> list[tuple[str, str]]:
    """(user turn with <image> for each picture, answer) of each prompt of a block."""
    found = []
    for row in block.ids:
        text = tokenizer.decode(row[row != lexicon.pad_id])
        assert text.startswith("<|im_start|>user\n") and text.endswith("<|im_end|>")
        turn, answer = text.split("<|im_end|>\n<|im_start|>assistant\n")
        turn = turn.removeprefix("<|im_start|>user\n")
        image = "<|vision_start|>" + 16 * "<|image_pad|>" + "<|vision_end|>"
        found.append((turn.replace(image, "<image>"), answer.removesuffix("<|im_end|>")))
    return found


def as_row(task: str, turn: str, answer: str, path) -> Row:
    """The row of data that a turn came from, read from its text alone."""
    description, choices, images = None, (), (path,)
    if task == "caption":
        connector, description = turn.removeprefix("<image> "), answer
    elif task == "reverse":
        said = turn.split(" <image>, correct")[0]
        connector = max((w for w in CONNECTORS["reverse"] if said.endswith(f" {w}")), key=len)
        description = said.removesuffix(f" {connector}")
    elif task == "mcq_i2d":
        connector, rest = turn.removeprefix("<image> ").split("? A. ", 1)
        rest = rest.removesuffix(" Only answer A, B, C, or D.")
        choices = tuple(part for part in _cut(rest))
    else:
        said, _ = turn.split("? A. ", 1)
        connector = max((w for w in CONNECTORS["reverse"] if said.endswith(f" {w}")), key=len)
        description, images = said.removesuffix(f" {connector}"), (path,) * 4
    kit = {"caption": "forward"}.get(task, task)
    return Row(kit, kit, "x:1", "e", "main", images, description, connector, choices, answer)


def _cut(rest: str) -> list[str]:
    first, rest = rest.split(" B. ")
    second, rest = rest.split(" C. ")
    return [first, second, *rest.split(" D. ")]


def test_prompts_are_the_encoders_own_tokens(tokenizer, lexicon, steps, tmp_path):
    path = tmp_path / "grey.png"
    Image.new("RGB", (64, 64), "grey").save(path)
    processor = AutoProcessor.from_pretrained(EMBEDDED_MODEL)
    processor.tokenizer = tokenizer
    encoder = Encoder(processor, 1024, 16384, 512)
    for block in steps[0][0]:
        if block.task == "text":
            continue
        for (turn, answer), ids in list(zip(turns(tokenizer, lexicon, block), block.ids, strict=True))[::3]:
            row = as_row(block.task, turn, answer, path)
            assert row.connector in CONNECTORS["forward" if row.task in ("forward", "mcq_i2d") else "reverse"]
            sample = encoder.encode(row)
            assert sample.input_ids == tuple(ids[ids != lexicon.pad_id].tolist())


def test_places_are_those_of_get_rope_index(tokenizer, lexicon, pictures, steps):
    model = Qwen3VLForConditionalGeneration(model_config(tokenizer)).model
    wide = Source(Recipe(prompts=16), {(64, 64): pictures, (96, 64): pictures, (32, 32): pictures}, lexicon)
    for size, blocks in (((64, 64), steps[0][0]), ((96, 64), None), ((32, 32), None)):
        blocks = blocks or make_step(wide.samplers[size], wide.plans[size], 0, 0)[0]
        grid = torch.tensor([[1, size[1] // 8, size[0] // 8]])
        for block in blocks:
            ids = torch.from_numpy(block.ids[:8]).long()
            shown = grid.repeat(int(len(block.slots) / len(block.ids) * len(ids)), 1) if len(block.slots) else None
            kinds, mask = (ids == lexicon.image_id).int(), (ids != lexicon.pad_id).long()
            places, _ = model.get_rope_index(ids, kinds, image_grid_thw=shown, attention_mask=mask)
            assert torch.equal(places, torch.from_numpy(block.places[:, :8]).long() * mask)


def faces_shown(source, images) -> list[dict | None]:
    """The attributes of each picture of a step; None for a thing."""
    sampler = source.samplers[64, 64]
    codes = [sampler.codes[i // 2] if i < sampler.num_faces else None for i in images]
    return [c if c is None else {n: VALUES[n][v] for n, v in zip(VALUES, c, strict=True)} for c in codes]


def truth(text: str, image: int, face: dict | None, source, known: dict) -> bool:
    """Whether a description is true of a picture, judged from its words."""
    if face is not None:
        named = known.get(text)
        return named is not None and is_true_of(named, face)
    sampler = source.samplers[64, 64]
    return object_names()[sampler.pictures.names[image - sampler.num_faces]][0] == text


def family_of(text: str) -> int:
    return next(number for number, family in enumerate(FAMILIES) if text in family)


@pytest.fixture(scope="module")
def meanings(tokenizer, lexicon, steps):
    """{description: attributes} of all that can be said of faces with up to four attributes, as far as it is said."""
    said = set()
    for blocks, _ in steps[:2]:
        for block in blocks:
            if block.task in ("reverse", "mcq_i2d", "mcq_d2i"):
                for turn, answer in turns(tokenizer, lexicon, block):
                    row = as_row(block.task, turn, answer, None)
                    said |= {row.description, *row.choices}
    known = {}
    for number in range(1, 5):
        for names in itertools.combinations(VALUES, number):
            if any(describe({n: VALUES[n][0] for n in VALUES}, names).count(",") >= 0 for _ in (0,)):
                for values in itertools.product(*(VALUES[name] for name in names)):
                    named = dict(zip(names, values, strict=True))
                    text = describe(named, names)
                    if text in said:
                        assert text not in known  # one meaning for each text
                        known[text] = named
    assert {text for text in said if text and text.startswith("a person")} == set(known)
    return known


def test_right_answers_are_true_and_wrong_ones_false(tokenizer, lexicon, source, steps, meanings):
    for blocks, images in steps[:2]:
        faces = faces_shown(source, images)
        for block in blocks:
            if block.task == "text":
                continue
            per_row = len(block.slots) // len(block.ids)
            for number, (turn, answer) in enumerate(turns(tokenizer, lexicon, block)):
                row = as_row(block.task, turn, answer, None)
                slots = block.slots[number * per_row : (number + 1) * per_row]
                judge = [
                    [truth(text, images[slot], faces[slot], source, meanings) for slot in slots]
                    for text in (row.choices or [row.description])
                ]
                if block.task == "caption":
                    face = faces[slots[0]]
                    assert answer == describe(face, VALUES) if face else judge == [[True]]
                elif block.task == "reverse":
                    assert judge == [[answer == "Correct"]]
                else:
                    options = judge[0] if block.task == "mcq_d2i" else [part[0] for part in judge]
                    assert options == [letter == answer for letter in LETTERS]
                    if row.choices and faces[slots[0]] is None:
                        assert len({family_of(text) for text in row.choices}) == 4
                    if block.task == "mcq_d2i":
                        assert len({int(images[slot]) for slot in slots}) == 4


def test_no_description_names_a_combination_that_is_held_out(meanings):
    hidden = hidden_triples()
    assert hidden.sum() == 16
    assert not any(
        len(named) > 2 and set(named) >= set(TRIPLE) and holds_combination(named) for named in meanings.values()
    )


TRIPLE = ("hair_color", "clothes_color", "clothes")


def test_answers_are_balanced_and_images_shared(tokenizer, lexicon, steps):
    for blocks, images in steps:
        assert len(images) == 4 * 96
        for block in blocks:
            answers = [answer for _, answer in turns(tokenizer, lexicon, block)]
            if block.task in ("mcq_i2d", "mcq_d2i"):
                assert {answers.count(letter) for letter in LETTERS} == {len(answers) // 4}
            if block.task == "reverse":
                assert answers.count("Correct") == answers.count("Wrong") == len(answers) / 2
            assert block.slots.size == 0 or block.slots.max() < len(images)


def test_texts_copy_and_match_roles_without_any_picture(tokenizer, lexicon, steps):
    facts = {f"the {role} of {place}" for role in ROLES for place in PLACES}
    seen = set()
    for blocks, _ in steps:
        for block in blocks:
            for turn, answer in turns(tokenizer, lexicon, block):
                if block.task != "text":
                    assert not any(fact in turn + answer for fact in facts)
                elif turn.startswith("Say: "):
                    assert turn == f"Say: {answer}"
                    seen |= {answer} & facts
                elif "correct or wrong" in turn:
                    first, second = turn.removesuffix(", correct or wrong? Only answer Correct or Wrong.").rsplit(
                        "the ", 1
                    )
                    assert (first.startswith(f"the {second} ")) == (answer == "Correct")
                else:
                    said, rest = turn.removesuffix(" Only answer A, B, C, or D.").split("? A. ")
                    options = _cut(rest)
                    assert len(set(options)) == 4 and said.startswith(options[LETTERS.index(answer)])
    assert len(seen) > 10


def test_shares_are_disjoint_and_held_out_pictures_are_not_trained():
    sets = {kind: set(faces_of(kind)) for kind in ("train", "faces", "combinations")}
    assert not any(a & b for a, b in itertools.combinations(sets.values(), 2))
    for kind, share in (("train", "pretrain"), ("faces", "held_out"), ("combinations", "held_out")):
        for values in list(sets[kind])[:400]:
            face = dict(zip(VALUES, values, strict=True))
            assert share_of(face) == share and holds_combination(face) == (kind == "combinations")
    assert len(sets["train"]) > 20_000 and len(sets["faces"]) > 5000 and len(sets["combinations"]) > 200
    icons = make_pictures("icons", 0, 0, 1, False, (32, 32), 1)
    assert icons.pixels.shape == (len(ICONS), 32, 32, 3) and not len(icons.codes)
    assert len({held_out_background(icon) for _, icon in ICONS}) == 6


def test_questions_grow_from_one_attribute_to_all_numbers():
    assert number_weights(1, 4, 0, 1000)[0] > 0.95
    assert numpy.allclose(number_weights(1, 4, 1000, 1000), 0.25)
    assert numpy.allclose(number_weights(3, 4, 1000, 1000), 0.5)
    assert len(number_weights(3, 4, 10, 1000)) == 4
    named = name_attributes(numpy.random.default_rng(0), numpy.array([1, 2, 3, 4] * 50))
    assert named.sum(axis=1).tolist() == [1, 2, 3, 4] * 50 and (named.sum(axis=0) > 30).all()


def test_a_step_depends_on_seed_and_number_alone(source):
    a, b, c = source.step(5), source.step(5), source.step(6)
    assert all(numpy.array_equal(a[name], b[name]) for name in a)
    assert not numpy.array_equal(a["ids"], c["ids"]) and {n: v.shape for n, v in a.items()} == {
        n: v.shape for n, v in c.items()
    }
    feed = Feed(source, 5, 1)
    ahead = [feed.take(), feed.take()]
    feed.close()
    assert numpy.array_equal(ahead[0]["ids"], a["ids"]) and numpy.array_equal(ahead[1]["ids"], c["ids"])


def test_patches_are_the_processors():
    processor = AutoProcessor.from_pretrained(EMBEDDED_MODEL)
    pixels = numpy.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=numpy.uint8)
    theirs = processor.image_processor(images=[Image.fromarray(part) for part in pixels], return_tensors="pt")
    ours = patches_of(torch.from_numpy(pixels))
    assert theirs["image_grid_thw"].tolist() == [[1, 8, 12]] * 2
    assert (ours.flatten(0, 1) - theirs["pixel_values"]).abs().max() < 1e-5


def test_the_forward_pass_is_transformers_own(setting):
    """Against the stock model, which computes its own masks and positions, block by block."""
    size = (64, 64)
    sampler, plan = setting.source.samplers[size], setting.source.plans[size]
    blocks, images = make_step(sampler, plan, 0, 3)
    batch = {name: torch.from_numpy(value) for name, value in to_arrays(blocks, images).items()}
    pixels = setting.pixels[size]
    with torch.no_grad():
        ours = answer_logits(setting.model, batch, pixels, shapes_of(blocks))
        parts = ours.split([block.targets.size for block in blocks])
        for block, part in zip(blocks, parts, strict=True):
            ids = torch.from_numpy(block.ids).long()
            extra = {}
            if len(block.slots):
                extra["pixel_values"] = patches_of(pixels[images[block.slots]]).flatten(0, 1)
                extra["image_grid_thw"] = torch.tensor([[1, 8, 8]] * len(block.slots))
            mask, kinds = (ids != sampler.lexicon.pad_id).long(), (ids == sampler.lexicon.image_id).int()
            logits = setting.model(input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, **extra).logits
            real = torch.from_numpy(block.targets != NO_TARGET).flatten()
            stock = logits.flatten(0, 1)[torch.from_numpy(block.answer_at).long().flatten()]
            assert (stock - part)[real].abs().max() < 1e-4
            assert ids.flatten()[torch.from_numpy(block.answer_at).flatten()[real].long() + 1].tolist() == (
                block.targets.ravel()[real.numpy()].tolist()
            )


def test_weights_of_a_step_add_up_and_blocks_report_their_own_loss(setting):
    blocks, images = make_step(setting.source.samplers[64, 64], setting.source.plans[64, 64], 0, 3)
    batch = {name: torch.from_numpy(value) for name, value in to_arrays(blocks, images).items()}
    assert abs(batch["weights"].sum() - 1) < 1e-5
    logits = torch.full((len(batch["targets"]), 1024), 0.0)
    loss, report = losses_of(logits, batch, tuple(block.targets.shape for block in blocks))
    assert torch.allclose(report[0], torch.tensor(1024.0).log(), atol=1e-4) and abs(loss - report[0, 0]) < 1e-4
    logits[torch.arange(len(logits)), batch["targets"].long().clamp(min=0)] = 30.0
    loss, report = losses_of(logits, batch, tuple(block.targets.shape for block in blocks))
    assert loss < 1e-4 and (report[1] == 1).all()


def test_adamw_is_torchs_own():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    kinds = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    stock = torch.optim.AdamW(kinds, lr=0.01, betas=(0.9, 0.98))
    optimizer = Optimizer(ours, 0.1, muon=False)
    for number in range(5):
        data = torch.randn(4, 5) * (0.01 + number / 100)
        for model in (ours, theirs):
            model.zero_grad()
            model(data).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        stock.step()
        optimizer.prepare(0.01)
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours.bias, theirs.bias, atol=1e-6, rtol=1e-4)


def test_muon_steps_have_singular_values_near_one():
    torch.manual_seed(0)
    for rows, columns, split in ((8, 20, 1), (20, 8, 1), (24, 8, 3)):
        found = orthogonal(torch.randn(2, rows, columns), split)
        values = torch.linalg.svdvals(found.view(2 * split, rows // split, columns))
        assert found.shape == (2, rows, columns) and 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("muon", [True, False])
def test_the_optimizer_takes_every_parameter_once(setting, muon):
    optimizer = Optimizer(setting.model, muon=muon)
    taken = [*optimizer.others, *(part for parts in optimizer.matrices.values() for part in parts)]
    assert len({id(part) for part in taken}) == len(taken) == len(list(setting.model.parameters()))
    assert bool(optimizer.matrices) == muon


def test_the_schedule_warms_up_holds_and_falls_to_zero():
    schedule = DecayingRate(Recipe(steps=100, rate=1.0, warmup=10, decay_share=0.5), True, 0.0, 0.0)
    rates = [schedule.rate(done) for done in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[49] == 1.0
    assert rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)
    assert not schedule.over(99) and schedule.over(100)
    again = DecayingRate(Recipe(steps=100, rate=1.0, warmup=40, decay_share=0), False, 0.0, 0.0)
    assert again.rate(9) == again.rate(99) == 1.0


def test_with_minutes_the_fall_begins_when_its_share_of_the_time_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    schedule = DecayingRate(Recipe(minutes=10, rate=1.0, decay_share=0.25), True, 0.0, 100.0)
    for done, at in ((100, 100.0), (1000, 374.0)):
        now[0] = at
        schedule.look(done, 0.1)
        assert schedule.fall_from is None and not schedule.over(done)
    now[0] = 380.0
    schedule.look(1100, 0.1)
    assert schedule.fall_from == 1100 and abs(schedule.last - (1100 + 1164)) <= 1  # 120 s left, 3 % of them kept
    assert schedule.rate(1100 + 582) == pytest.approx(0.5, abs=1e-3)
    straight = DecayingRate(Recipe(minutes=10, decay_share=0), True, 0.0, 100.0)
    now[0] = 495.0
    straight.look(50, 0.1)
    assert straight.over(50)


def test_a_few_steps_reduce_the_loss_and_a_run_goes_on(tmp_path, capsys):
    recipe = Recipe(**SMALL, steps=6, muon=False, warmup=2, decay_share=0)
    first = run.pretrain(recipe, None, tmp_path / "state")
    losses = [sum(entry["loss"].values()) for entry in first["log"]]
    assert losses[-1] < 0.8 * losses[0] and first["step"] == 6 and not first["decayed"]
    assert {file.name for file in (tmp_path / "state").iterdir()} == {
        "state.json", "weights-1.safetensors", "weights-2.safetensors", "weights-3.safetensors",
    }  # fmt: skip
    sizes = [file.stat().st_size for file in (tmp_path / "state").iterdir()]
    assert max(sizes) < 16 * 2**20 and sum(sizes) < 45 * 2**20

    more = dataclasses.replace(recipe, steps=2, decay_share=1.0)
    folder = tmp_path / "model"
    second = run.pretrain(more, folder, tmp_path / "state")
    assert "going on after step 6" in capsys.readouterr().out
    assert second["step"] == 8 and len(second["runs"]) == 2 and second["decayed"]
    assert [entry["step"] for entry in second["log"]] == list(range(1, 9))
    results = second["tests"]
    assert {kind: set(tasks) for kind, tasks in results.items()} == {
        kind: set(accuracy.TASKS) for kind in accuracy.HELD_OUT
    }
    assert all(result["prompts"] == 8 for tasks in results.values() for result in tasks.values())

    run.pretrain(Recipe(minutes=0), tmp_path / "again", tmp_path / "state")
    for name in ("model.safetensors", "README.md", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(ConfigError, match="there is none"):
        run.pretrain(Recipe(minutes=0), folder, tmp_path / "nothing")

    weights, _ = state.load_state(tmp_path / "state")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.float16
    for name, part in model.named_parameters():
        assert torch.equal(part, weights[name].half())
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer("Correct", add_special_tokens=False).input_ids.__len__() == 1
    card = (folder / "README.md").read_text()
    for words in ("ToonHead", "CC BY 4.0", "MIT", "seed 0", "8 steps", "| faces | CW |", "Apache-2.0"):
        assert words in card
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25 * 2**20


def test_a_state_is_kept_bit_by_bit(setting, tmp_path):
    weights = state.weights_of(setting.model)
    state.save_state(tmp_path / "s", weights, {"step": 3})
    found, record = state.load_state(tmp_path / "s")
    assert record == {"step": 3} and found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert state.load_state(tmp_path / "nothing") == (None, None)


def test_whole_answers_are_what_greedy_decoding_writes(setting):
    """The likeliest tokens after the right ones are a right answer exactly if generation writes it."""
    sampler, pixels = setting.source.samplers[64, 64], setting.pixels[64, 64]
    block, images = accuracy.ask_task(sampler, "reverse", 6, numpy.random.default_rng(0))
    found = accuracy.answers_to(setting.model, block, images, pixels)
    for row, first, picture in zip(block.ids, found[:, 0], images, strict=True):
        ids = torch.from_numpy(row[row != sampler.lexicon.pad_id]).long()[None, :-2]
        out = setting.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == sampler.lexicon.image_id).int(),
            pixel_values=patches_of(pixels[[picture]]).flatten(0, 1), image_grid_thw=torch.tensor([[1, 8, 8]]),
            max_new_tokens=1, do_sample=False,
        )  # fmt: skip
        assert out[0, -1] == first


def test_results_are_counted_by_number_of_attributes_and_by_answer(setting):
    known = setting.held_out
    results = accuracy.measure(setting.model, known, setting.lexicon, 8, 0, "cpu")
    part = results["faces"]["mcq_d2i"]
    assert [entry["attributes"] for entry in part["by_number"]] == [1, 2, 3, 4]
    assert sum(entry["prompts"] for entry in part["by_number"]) == sum(part["answers"].values()) == 8
    assert set(part["answers"]) == {*LETTERS, "other"}
    part["answers"] = {"A": 4, "B": 2, "C": 1, "D": 1, "other": 0}
    assert accuracy.imbalance(part) == 0.25
    assert len(accuracy.table(results)) == 2 + 12
    assert accuracy.summary(results).count("\n") == 2


def test_plans_scale_and_other_sizes_take_turns(source):
    assert plan_step(512).num_prompts == 512 and plan_step(1024).num_prompts == 1024
    assert all(count % 4 == 0 for _, count, *_ in plan_step(40).blocks)
    several = Source.__new__(Source)
    several.other_every, several.sizes = 4, [(64, 64), (32, 32), (96, 96)]
    assert [several.size_of(step)[0] for step in range(12)] == [64, 64, 64, 32, 64, 64, 64, 96, 64, 64, 64, 32]


def test_the_command_line_reads_every_field():
    recipe, given = command.read_arguments(["--minutes", "0.5", "--no-muon", "--num-faces", "30", "--state", "s"])
    assert recipe == Recipe(minutes=0.5, muon=False, num_faces=30) and (given.state, given.out) == ("s", None)
    with pytest.raises(ConfigError):
        Recipe(prompts=2)
