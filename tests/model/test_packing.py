"""Packed rows: the losses and gradients that each row has alone, whatever stands beside it."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product, takewhile
from types import SimpleNamespace

import pytest
import torch

from mmrev_kit.data.run_data import read_run_data
from mmrev_kit.data.tasks import build_prompt
from mmrev_kit.model import batches, packing
from mmrev_kit.model.batches import Batcher, make_layout, obstacle, padded
from mmrev_kit.model.fused import fuse, unfuse
from mmrev_kit.model.loading import adapter_arguments, add_adapter, base_arguments, load_base, trainable
from mmrev_kit.model.packing import Group, Layout, attention_mask, gather_images, make_group, make_groups
from mmrev_kit.model.qwen3vl import row_positions
from mmrev_kit.training import throughput, update
from mmrev_kit.training.run import prepare, start
from mmrev_kit.training.update import accumulate, sample_losses

CPU = torch.device("cpu")
EXACT = "lora.dropout=0 quantization.bits=16"
STATE = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=CPU)


@pytest.fixture(scope="module")
def made():
    """A model with an adapter that is not zero, and the samples of a run; made once."""
    return {}


@pytest.fixture
def model_and_task(made, small_config):
    if not made:
        config = small_config(EXACT)
        torch.manual_seed(0)
        model = add_adapter(load_base(**base_arguments(config, CPU)), **adapter_arguments(config))
        for parameter in trainable(model):  # LoRA's B starts at zero, where half of the gradients vanish
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        made["found"] = model, prepare(config)
    return made["found"]


def batcher(task, mode: str, micro_tokens: int = 10_000, scale: float = 430.0, multiple: int = 1) -> Batcher:
    return Batcher(Layout(mode, micro_tokens, scale, multiple), task.encoder, None, CPU)


def mix(task, count: int, seed: int) -> list:
    """A random mix of all sources (all four tasks), some images several times."""
    rng = random.Random(seed)
    sources = sorted(task.train)
    chosen = [rng.choice(task.train[rng.choice(sources)]) for _ in range(count)]
    shared = [s for s in task.train["forward"] if s.row.images == rng.choice(task.train["forward"]).row.images]
    return [*chosen, *shared[:4], chosen[0]]


def each_loss(model, part: list) -> dict[int, list[float]]:
    """{id(sample): its losses} of batches."""
    found: dict[int, list[float]] = {}
    for batch, samples in part:
        for sample, loss in zip(samples, sample_losses(model, batch, CPU, torch.float32).tolist(), strict=True):
            found.setdefault(id(sample), []).append(loss)
    return found


def gradient(model) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in trainable(model)])


def alone(model, task, samples: list) -> tuple[list[float], torch.Tensor]:
    """The reference: each row by itself through the library's own mask and positions."""
    model.zero_grad(set_to_none=True)
    losses = []
    for sample in samples:
        loss = sample_losses(model, task.encoder.collate([sample]), CPU, torch.float32)[0]
        (loss / len(samples)).backward()
        losses.append(loss.item())
    return losses, gradient(model)


def pack_with_order(task, samples: list, mode: str, **options):
    """Batches with the samples of each in the order of their losses."""
    maker = batcher(task, mode, **options)
    groups = make_groups(samples, mode, task.encoder.image_id)
    for part in packing.micro_batches(groups, maker.layout.micro_tokens):
        rows = packing.arrange(part, maker.layout.attention_scale, maker.layout.multiple)
        yield maker.packed(rows), packing.pack(rows, task.encoder, maker.layout.multiple).samples


@pytest.mark.parametrize("mode", ["none", "block", "shared_prefix"])
def test_rows_without_a_picture_have_the_library_s_losses_alone_and_beside_others(model_and_task, small_config, mode):
    model, task = model_and_task
    rows = read_run_data(small_config("mitigation.identity=0.2"))[0].pools["identity"]
    samples, processor = [task.encoder.encode(row) for row in rows[:4]], task.encoder.processor
    for sample in samples:
        (text,) = build_prompt(sample.row)
        turn = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        prompt = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        asked = processor(text=[prompt], return_tensors="pt")["input_ids"].shape[1]
        inputs = processor(text=[prompt + sample.row.answer + "<|im_end|>"], return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, :asked] = -100
        with torch.no_grad():
            expected = model(**inputs, labels=labels).loss.item()
        for others in ([], samples, mix(task, 3, 0)):
            found = [
                loss
                for batch in batcher(task, mode).batches([sample, *others])
                for own, loss in zip(batch.samples, sample_losses(model, batch, CPU, torch.float32), strict=True)
                if own is sample
            ]
            assert [loss.item() for loss in found] == pytest.approx([expected] * len(found), rel=1e-5) and found


@pytest.mark.parametrize("mode", ["block", "shared_prefix"])
def test_losses_and_gradient_are_those_of_each_row_alone(model_and_task, mode):
    model, task = model_and_task
    for seed, options in enumerate(({}, {"micro_tokens": 150}, {"scale": 1e6}, {"scale": 1.0, "multiple": 8})):
        samples = mix(task, 7, seed)
        assert {s.row.task for s in mix(task, 40, seed)} == {"forward", "cw_image", "reverse", "mcq_i2d", "mcq_d2i"}
        expected, direction = alone(model, task, samples)
        model.zero_grad(set_to_none=True)
        found: dict[int, list[float]] = {}
        for batch, order in pack_with_order(task, samples, mode, **options):
            losses = sample_losses(model, batch, CPU, torch.float32)
            (losses.sum() / len(samples)).backward()
            for sample, loss in zip(order, losses.tolist(), strict=True):
                found.setdefault(id(sample), []).append(loss)
        assert sorted(len(part) for part in found.values()) == sorted(Counter(map(id, samples)).values())
        for sample, loss in zip(samples, expected, strict=True):
            assert found[id(sample)] == pytest.approx([loss] * len(found[id(sample)]), rel=1e-5)
        assert (gradient(model) - direction).norm() <= 1e-5 * direction.norm()


def test_rows_that_branch_at_their_answers_share_the_token_that_predicts_them(model_and_task):
    """One prompt, five answers (and one row twice): the prefix's last token predicts six first tokens.

    No row's last token is computed, so that an answer of one token adds none to the prefix.
    """
    model, task = model_and_task
    first = task.train["forward"][0]
    prompt = first.input_ids[: first.answer_start]
    answers = [first.input_ids[first.answer_start :], (40, 41, 2), (40, 42, 2), (50, 2), (2,)]
    samples = [replace(first, input_ids=prompt + answer) for answer in answers] + [first]
    group = make_group(samples)
    assert group.prefix == first.answer_start
    assert group.tokens == len(prompt) + 2 * (len(answers[0]) - 1) + 2 + 2 + 1
    expected, _ = alone(model, task, samples)
    [(batch, order)] = pack_with_order(task, samples, "shared_prefix")
    found = sample_losses(model, batch, CPU, torch.float32).tolist()
    by_id = dict(zip(map(id, order), found, strict=True))
    assert [by_id[id(sample)] for sample in samples] == pytest.approx(expected, rel=1e-5)
    assert len(batch.inputs["input_ids"][0]) == group.tokens


def test_what_all_prompts_begin_with_is_computed_once_a_sequence(model_and_task):
    _, task = model_and_task
    image, rows = task.encoder.image_id, {s.row.images: s for s in task.train["forward"]}
    forward = list(rows.values())[:4]
    mixed = [*forward, task.train["reverse"][0], task.train["face_mcq_d2i"][0]]
    for samples in (forward, mixed):
        before = [s.input_ids[: s.input_ids.index(image)] if image in s.input_ids else s.input_ids for s in samples]
        begin = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*before, strict=False)))
        groups = make_groups(samples, "shared_prefix", image)
        assert {group.preamble for group in groups} == {begin} and begin >= 3
        packed = packing.pack([groups], task.encoder)
        assert packed.input_ids.shape == (1, begin + sum(len(s.input_ids) - 1 - begin for s in samples))
        assert packed.input_ids[0, :begin].tolist() == list(samples[0].input_ids[:begin])
        two = packing.pack([groups[:2], groups[2:]], task.encoder)
        assert [row[:begin].tolist() for row in two.input_ids] == [list(samples[0].input_ids[:begin])] * 2
    assert {group.preamble for group in make_groups(mixed, "block", image)} == {0}
    assert make_groups([], "shared_prefix", image) == []
    assert make_groups(forward[:1], "shared_prefix", image)[0].preamble == forward[0].input_ids.index(image)


def test_suffixes_and_neighbours_do_not_see_each_other(model_and_task):
    """Changing the tokens of one suffix moves its own logits and no others."""
    model, task = model_and_task
    shared = [s for s in task.train["forward"] if s.row.images == task.train["forward"][0].row.images][:4]
    other = [task.train["reverse"][0], task.train["face_mcq_d2i"][0]]
    groups = make_groups([*shared, *other], "shared_prefix", task.encoder.image_id)
    assert [len(group.samples) for group in groups] == [4, 1, 1]
    inputs = batcher(task, "shared_prefix", scale=1e9).packed(packing.arrange(groups, 1e9)).inputs  # one sequence
    packed = packing.pack(packing.arrange(groups, 1e9), task.encoder)
    inputs["logits_to_keep"] = torch.ones_like(inputs["logits_to_keep"])
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    group = next(n for n in range(3) if (packed.segment[packed.group == n] > 1).any())
    mine = torch.from_numpy((packed.group == group) & (packed.segment == 2))
    changed["input_ids"][mine] = 77
    with torch.no_grad():
        before, after = (model(**given).logits for given in (inputs, changed))
    moved = (before - after).abs().amax(-1) > 1e-6
    assert moved[mine.flatten()].all() and not moved[~mine.flatten()].any()


def test_positions_are_the_librarys_own(model_and_task):
    model, task = model_and_task
    core = model.get_base_model().model
    for source, samples in task.train.items():
        batch = task.encoder.collate(samples[:3])
        rope = {name: batch[name] for name in ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")}
        expected, _ = core.get_rope_index(**rope)
        for place, sample in enumerate(samples[:3]):
            found = row_positions(sample.input_ids, task.encoder.grids(sample), task.encoder.image_id)
            assert torch.equal(torch.from_numpy(found), expected[:, place, : len(sample.input_ids)]), source


def test_positions_of_an_image_that_is_no_square():
    sample = SimpleNamespace(input_ids=(1, 9, 9, 9, 9, 9, 9, 2, 3))
    assert row_positions(sample.input_ids, [(2, 3)], 9).tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]


def test_the_mask_by_hand():
    group = torch.tensor([[0, 0, 0, 0, 1, -1]])
    segment = torch.tensor([[0, 1, 1, 2, 1, -1]])
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],  # padding sees itself: a row of the softmax must not be empty
    ]
    assert attention_mask(group, segment)[0, 0].int().tolist() == expected


def test_every_sample_is_in_one_batch_of_one_process(model_and_task):
    _, task = model_and_task
    samples = mix(task, 60, 3)
    for mode in ("none", "block", "shared_prefix"):
        for processes in (1, 2, 3, 5):
            limit = 300
            rows, tokens = 0, []
            for process in range(processes):
                found = list(batcher(task, mode, limit).batches(samples, process, processes))
                rows += sum(batch.rows for batch in found)
                tokens.append(sum(batch.tokens for batch in found))
                fits = [batch.tokens <= 1.1 * limit for batch in found]  # little is padding
                assert all(fits)
            assert rows == len(samples)
            assert mode == "none" or max(tokens) < 1.25 * min(tokens)


def test_shares_are_the_same_samples_whatever_the_processes(model_and_task):
    _, task = model_and_task
    samples = mix(task, 30, 1)
    groups = make_groups(samples, "shared_prefix", task.encoder.image_id)
    for processes in (1, 2, 4, 50):
        shares = packing.share_out(groups, processes)
        assert len(shares) == processes
        assert shares == packing.share_out(groups, processes)
        dealt = Counter(id(sample) for share in shares for group in share for sample in group.samples)
        assert dealt == Counter(map(id, samples))


def test_a_large_group_is_halved_where_that_helps():
    def group(count: int) -> Group:
        samples = [SimpleNamespace(input_ids=(*range(10), 100 + n, 0, 1), answer_start=11) for n in range(count)]
        return make_group(samples)

    assert group(8).prefix == 10 and group(8).tokens == 10 + 8 * 2
    shares = packing.share_out([group(8)], 2)
    assert [[part.tokens for part in share] for share in shares] == [[18], [18]]
    assert [[len(g.samples) for g in part] for part in packing.micro_batches([group(8)], 20)] == [[4], [4]]
    assert [len(part) for part in packing.micro_batches([group(1)] * 3, 5)] == [1, 1, 1]  # longer alone: alone
    assert packing.micro_batches([], 5) == []


def test_shares_are_as_even_as_the_rows_allow():
    """Beside every way to share out; the longest first to the emptiest would give 7 and 5 tokens in the first case."""
    rng = random.Random(0)
    cases = [(2, [3, 3, 2, 2, 2]), *((rng.choice((2, 3)), rng.choices(range(20, 90), k=7)) for _ in range(20))]
    for processes, sizes in cases:
        groups = [make_group([SimpleNamespace(input_ids=(0,) * (size + 1), answer_start=1)]) for size in sizes]
        found = packing.heaviest(packing.share_out(groups, processes))
        ways = product(range(processes), repeat=len(sizes))
        best = min(
            max(sum(s for s, p in zip(sizes, way, strict=True) if p == n) for n in range(processes)) for way in ways
        )
        assert best <= found <= 1.05 * best
    assert packing.heaviest(packing.balance([Group((), 0, size) for size in (3, 3, 2, 2, 2)], 2)) == 7


def test_rows_of_an_image_go_to_another_process_where_that_helps():
    """Ten tokens of an image and two for each of five rows, 20, beside a row of 4: one of the five goes, 18 and 16."""
    rows = [SimpleNamespace(input_ids=(*range(10), 100 + n, 0, 1), answer_start=11) for n in range(5)]
    alone = SimpleNamespace(input_ids=(7,) * 5, answer_start=3)
    shares = packing.share_out([make_group(rows), make_group([alone])], 2)
    assert [[len(group.samples) for group in share] for share in shares] == [[4], [1, 1]]
    assert [sum(group.tokens for group in share) for share in shares] == [18, 16]


def test_few_long_sequences_or_many_short_ones_by_their_cost():
    groups = [Group((), 0, tokens) for tokens in (50, 50, 50, 51)]
    assert len(packing.arrange(groups, scale=1e9)) == 1  # attention for nothing: no padding at all
    assert len(packing.arrange(groups, scale=10.0)) == 4  # attention is dear: short sequences
    assert len(packing.arrange([*groups, Group((), 0, 70)], scale=10.0)) == 1  # unequal: over 10 % padding otherwise
    uneven = [Group((), 0, tokens) for tokens in (100, 60, 40)]
    assert sorted(sum(g.tokens for g in row) for row in packing.arrange(uneven, scale=100.0)) == [100, 100]


def test_padded_runs_keep_to_the_limit():
    samples = [SimpleNamespace(input_ids=(0,) * length) for length in (3, 4, 9, 2, 2)]
    assert [len(run) for run in padded(samples, 8)] == [2, 1, 2]


def test_rows_of_one_image_follow_each_other_and_each_row_comes_once():
    rng = random.Random(0)
    rows = [("forward", n) for n in range(70)] + [("cw", n) for n in range(30)]
    rng.shuffle(rows)

    def key(row):
        return row[1] // 7 if row[0] == "forward" else None

    found = gather_images(rows, source_of=lambda row: row[0], key_of=key)
    assert sorted(found) == sorted(rows) and found != rows
    assert found == gather_images(list(rows), source_of=lambda row: row[0], key_of=key)
    keys = [key(row) for row in found if row[0] == "forward"]
    assert sum(a != b for a, b in pairwise(keys)) == 9  # ten images, each in one stretch
    order = [key(row) for row in rows if row[0] == "forward"]
    assert list(dict.fromkeys(keys)) == list(dict.fromkeys(order))
    for begin in range(0, 100, 10):
        assert 6 <= sum(row[0] == "forward" for row in found[begin : begin + 10]) <= 8


def test_the_default_update_is_that_of_padded_rows(small_config):
    """Through `start` and `accumulate`, with the feature cache: every packing, split over 1 and 3 processes."""
    run = start(small_config(EXACT), STATE)
    assert run.batcher.layout.packing == "shared_prefix" and run.batcher.features is not None
    rows = run.task.plan.epoch_rows(0)[:9]
    samples = [run.task.train[source][index] for source, index in rows]
    found = {}
    for mode in ("none", "block", "shared_prefix"):
        run.batcher.layout = replace(run.batcher.layout, packing=mode)
        run.optimizer.zero_grad()
        found[mode] = accumulate(run, samples), gradient(run.model).clone(), run.computed
    for mode in ("block", "shared_prefix"):
        assert found[mode][0] == pytest.approx(found["none"][0], rel=1e-5)
        assert (found[mode][1] - found["none"][1]).norm() <= 1e-5 * found["none"][1].norm()
        assert found[mode][2][1] == found["none"][2][1]  # as many logits
    assert found["shared_prefix"][2][0] <= found["block"][2][0] < found["none"][2][0]
    parts = []
    for process in range(3):
        run.optimizer.zero_grad()
        for batch in run.batcher.batches(samples, process, 3):
            (sample_losses(run.model, batch, CPU, run.dtype).sum() / len(samples)).backward()
        parts.append(gradient(run.model).clone() if trainable(run.model)[0].grad is not None else 0)
    assert (sum(parts) - found["none"][1]).norm() <= 1e-5 * found["none"][1].norm()


def test_eager_attention_takes_the_same_mask(model_and_task):
    model, task = model_and_task
    core = model.get_base_model()
    samples = mix(task, 5, 0)
    groups = make_groups(samples, "shared_prefix", task.encoder.image_id)
    maker = batcher(task, "shared_prefix")
    rows = packing.arrange(groups, maker.layout.attention_scale)
    expected = sample_losses(model, maker.packed(rows), CPU, torch.float32)
    core.set_attn_implementation("eager")
    try:
        assert obstacle(model) is None
        found = sample_losses(model, replace(maker, additive=True).packed(rows), CPU, torch.float32)
    finally:
        core.set_attn_implementation("sdpa")
    assert torch.allclose(found, expected, rtol=1e-5)


def test_a_model_without_the_hook_is_trained_unpacked(small_config, monkeypatch, capsys):
    config = small_config(EXACT)
    run = start(config, STATE)
    samples = [run.task.train[source][index] for source, index in run.task.plan.epoch_rows(0)[:6]]
    expected = accumulate(run, samples), gradient(run.model).clone()
    monkeypatch.setattr(batches, "takes_features", lambda model: False)
    capsys.readouterr()
    run = start(config, STATE)
    assert "not packed" in capsys.readouterr().out
    assert run.batcher.layout.packing == "none" and run.batcher.features is None
    assert accumulate(run, samples) == pytest.approx(expected[0], rel=1e-5)
    assert (gradient(run.model) - expected[1]).norm() <= 1e-5 * expected[1].norm()


def test_the_hook_and_the_mask_are_looked_for_in_the_model(model_and_task, small_config):
    model, _ = model_and_task

    class Old(torch.nn.Module):
        config = SimpleNamespace(model_type="qwen3_vl")

        def forward(self, input_ids, attention_mask=None):
            return input_ids

    assert obstacle(model) is None
    assert "mm_encoder_outputs" in obstacle(Old())
    assert make_layout(small_config("training.packing=none"), model, CPU).packing == "none"
    layout = make_layout(small_config("training.packing=block memory.micro_tokens=77"), model, CPU)
    assert (layout.packing, layout.micro_tokens) == ("block", 77)
    text = model.get_base_model().config.text_config
    linear = model.get_base_model().model.language_model.layers[0]
    weights = sum(m.in_features * m.out_features for n, m in linear.named_modules() if n.endswith("base_layer"))
    weights += sum(m.in_features * m.out_features for n, m in linear.mlp.named_modules() if n.endswith("proj"))
    assert packing.layer_weights(text) == weights  # q, k, v, o carry the adapter; gate, up, down do not


def test_the_flops_of_a_token_by_hand():
    text = SimpleNamespace(
        hidden_size=4, num_attention_heads=2, num_key_value_heads=1, head_dim=3, intermediate_size=5,
        num_hidden_layers=2, vocab_size=11,
    )  # fmt: skip
    layer = 4 * 6 + 2 * 4 * 3 + 6 * 4 + 3 * 4 * 5
    assert packing.layer_weights(text) == layer
    forward = 2 * 2 * layer * 10
    head = 2 * 4 * 11 * 3
    assert throughput.flops(text, 10, 3, recompute=False) == 2 * (forward + head)
    down = 2 * 2 * (4 * 5) * 10
    assert throughput.flops(text, 10, 3, recompute=True) == 3 * forward - down + 2 * head
    assert throughput.flops(text, 10, 3, recompute=True, adapted=["up_proj", "down_proj"]) == 3 * forward + 2 * head
    assert throughput.flops(text, 10, 3, recompute=0.5) == 2.5 * forward - down / 2 + 2 * head


@pytest.mark.parametrize("kept", [0, 2])
@pytest.mark.parametrize(("adapted", "downs"), [("q_proj", 1), ("down_proj", 2)])
@pytest.mark.parametrize("change", [fuse, unfuse])
def test_checkpointing_recomputes_what_the_work_counts(small_config, adapted, downs, change, kept):
    more = f"memory.kept_layers={kept} lora.target_modules=[{adapted}]"
    config = small_config(f"memory.gradient_checkpointing=true {more}")
    model, calls = add_adapter(load_base(**base_arguments(config, CPU)), **adapter_arguments(config)).train(), Counter()
    change(model.get_base_model())
    for name, module in model.named_modules():
        if ".language_model." in name and name.endswith(("_proj", "base_layer")) and not hasattr(module, "lora_A"):
            kind = next(part for part in name.split(".") if part.endswith("_proj"))
            module.register_forward_hook(lambda *_, kind=kind: calls.update([kind]))
    task = prepare(config)
    samples = [sample for rows in task.train.values() for sample in rows[:2]]
    update.sample_losses(model, task.encoder.collate(samples), CPU, torch.float32).sum().backward()
    layers = model.config.text_config.num_hidden_layers
    again = {f"{name}_proj": 2 * layers - kept for name in ("q", "k", "v", "o", "gate", "up")}
    assert calls == again | {"down_proj": downs * layers - (downs - 1) * kept}


def test_checkpointing_changes_no_bit_of_the_gradient_whatever_is_kept(small_config):
    found = []
    for more in (
        "gradient_checkpointing=false",
        *(f"gradient_checkpointing=true memory.kept_layers={k}" for k in (0, 2)),
    ):
        config = small_config(f"memory.{more}")
        torch.manual_seed(1)  # of the adapter's first values, and of dropout
        model = add_adapter(load_base(**base_arguments(config, CPU)), **adapter_arguments(config)).train()
        task = prepare(config)
        for parameter in trainable(model):
            torch.nn.init.normal_(parameter, std=0.05)
        samples = [sample for rows in task.train.values() for sample in rows[:2]]
        update.sample_losses(model, task.encoder.collate(samples), CPU, torch.float32).sum().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in trainable(model)]))
    assert (found[0] != 0).all()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
