"""The kernels of a decoder layer against their lines: on a GPU where there is one, else by Triton's interpreter.

The interpreter is chosen when Triton is imported, so that without a GPU the tests run in a process of their own.
"""

import os
import subprocess
import sys
import weakref
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from mmrev_kit.model import layer_lines as lines
from mmrev_kit.model.packing import attention_mask

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if GPU else "cpu")
if GPU or INTERPRETED:
    from mmrev_kit.model import layer_attention, layer_kernels

kernels_run = pytest.mark.skipif(not (GPU or INTERPRETED), reason="runs in a process with TRITON_INTERPRET=1")
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]


@pytest.mark.skipif(GPU or INTERPRETED or find_spec("triton") is None, reason="needs Triton, and no GPU")
def test_the_kernels_by_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def random(*shape, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)


def close(found, expected, dtype):
    tolerance = 2e-3 if dtype == torch.float16 else 1.6e-2
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()


@kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rank", "starts", "masked"),
    [(8, [0, 64, 96], True), (3, [0], True), (20, [0, 64], False), (1, [0], True), (128, [0], True), (256, [0], True)],
)
def test_adapters(dtype, rank, starts, masked):
    rows, inputs, outputs, j = 75, 160, 128, len(starts)
    extra = -(-rank * j // 64) * 64
    group = SimpleNamespace(inputs=inputs, rank=rank, starts=starts, scaling=1.7, outputs=outputs)
    given = random(rows, inputs + extra, dtype=dtype)
    down = random(j * rank, inputs, dtype=dtype)
    mask = lines.draw(3, rows, inputs, j, 0.3, DEVICE) if masked else None
    found, apart = given.clone(), torch.empty_like(given)
    expected = given.clone()
    low = lines.lora_down(group, given[:, :inputs], mask, down, 1.25, expected)
    for out, values in ((found, found[:, :inputs]), (apart, given[:, :inputs])):
        close(layer_kernels.lora_down(group, values, mask, down, 1.25, out), low, dtype)
        close(out, expected, dtype)
        assert torch.equal(out[:, :inputs], given[:, :inputs]) and not out[:, inputs + j * rank :].any()
    gradient, of_out = random(rows, inputs + extra, dtype=dtype), random(rows, outputs, dtype=dtype)
    arguments = group, gradient, mask, down, 1.25
    close(layer_kernels.lora_up(*arguments), lines.lora_up(*arguments), dtype)
    arguments = group, gradient, given[:, :inputs], mask, 1.25, of_out, low
    pairs = zip(layer_kernels.lora_gradients(*arguments), lines.lora_gradients(*arguments), strict=True)
    for own, other in pairs:
        assert own.dtype == torch.float32
        close(own, other, dtype)


@pytest.mark.skipif(GPU or INTERPRETED or find_spec("triton") is None, reason="compiles for another card: no GPU here")
@pytest.mark.parametrize(("capability", "limit"), [(86, 99 * 1024), (90, 227 * 1024)])
def test_the_largest_adapters_fit_the_shared_memory(monkeypatch, tmp_path, capability, limit):
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from mmrev_kit.model import layer_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target, run, made = GPUTarget("cuda", capability, 32), JITFunction.run, {}

    def compile_only(kernel, *arguments, grid, warmup, **more):
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **more)
        made[kernel.fn.__name__] = max(compiled.metadata.shared, made.get(kernel.fn.__name__, 0))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    card = {"target": lambda: target, "device": lambda: capability, "stream": lambda device: 0}
    card = {f"get_current_{name}": function for name, function in card.items()}
    monkeypatch.setattr(driver, "_active", SimpleNamespace(**card))
    for rank in (64, 256):
        group = SimpleNamespace(inputs=512, rank=rank, starts=[0], scaling=1.0, outputs=512)
        rows, low = (torch.empty(64, width, dtype=torch.float16, device="meta") for width in (512 + rank, rank))
        mask, down = torch.empty(64, 512, dtype=torch.uint8, device="meta"), low.new_empty(rank, 512)
        layer_kernels.lora_down(group, rows[:, :512], mask, down, 1.0, rows)
        layer_kernels.lora_up(group, rows, mask, down, 1.0)
        layer_kernels.lora_gradients(group, rows, rows[:, :512], mask, 1.0, rows[:, :512], low)
    assert len(made) == 3 and max(made.values()) <= limit


@kernels_run
@pytest.mark.parametrize(("count", "p"), [(1, 0.05), (2, 0.5), (3, 0.05), (4, 0.9)])
def test_masks_come_from_their_seed_at_their_rate(count, p):
    rows, width = (1000, 512) if GPU else (128, 256)
    found, again, other = (layer_kernels.draw(seed, rows, width, count, p, DEVICE) for seed in (7, 7, 8))
    assert torch.equal(found, again) and not torch.equal(found, other)
    bits = [((found >> number) & 1).float() for number in range(count)]
    for one in bits:
        assert float(one.mean()) == pytest.approx(1 - p, abs=4.5 * (p * (1 - p) / one.numel()) ** 0.5)
        halves = one.view(-1, 2)
        assert abs(float(torch.corrcoef(halves.t())[0, 1])) < 5 / len(halves) ** 0.5
    if count > 1:
        together = torch.corrcoef(torch.stack([one.flatten() for one in bits])) - torch.eye(count, device=DEVICE)
        assert together.abs().max() < 5 / found.numel() ** 0.5


@kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_the_gated_product(dtype):
    rows, width, extra = 37, 192, 64
    stream, added, weight = (
        random(rows, width),
        random(rows, width, dtype=dtype),
        1 + random(width, dtype=dtype, scale=0.2),
    )
    for more in (None, added):
        found, expected = (torch.zeros(rows, width + extra, dtype=dtype, device=DEVICE) for _ in range(2))
        own = layer_kernels.norm(stream, more, weight, 1e-6, found)
        assert torch.equal(own, lines.norm(stream, more, weight, 1e-6, expected))
        close(found, expected, dtype)
    gradient = random(rows, width + extra, dtype=dtype)
    arguments = gradient, stream, weight, 1e-6, random(rows, width), dtype
    pairs = zip(layer_kernels.norm_backward(*arguments), lines.norm_backward(*arguments), strict=True)
    for own, other in pairs:
        close(own, other, torch.float16 if own.dtype == torch.float32 else dtype)
    joined = random(rows, 2 * width, dtype=dtype)
    found, expected = (torch.zeros(rows, width + extra, dtype=dtype, device=DEVICE) for _ in range(2))
    layer_kernels.gate(joined, found)
    lines.gate(joined, expected)
    close(found, expected, dtype)
    found, expected = joined.clone(), joined.clone()
    layer_kernels.gate_backward(gradient, found)
    lines.gate_backward(gradient, expected)
    close(found, expected, dtype)


@kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "d"), [(4, 2, 32), (20, 4, 16)])
def test_rotary_positions_with_their_norms(dtype, heads, key_heads, d):
    rows = 21
    joined, gradient = (random(rows, (heads + 2 * key_heads) * d, dtype=dtype, scale=s) for s in (1.0, 2.0))
    of_query, of_key = (1 + random(d, dtype=dtype, scale=s) for s in (0.2, 0.3))
    angles = 6 * random(rows, d // 2).repeat(1, 2)
    rest = heads, key_heads, of_query, of_key, 1e-6, angles.cos(), angles.sin()
    for own, other in zip(layer_kernels_rotate(joined, rest), lines.rotate(joined, *rest), strict=True):
        close(own, other, dtype)
    found, expected = gradient.clone(), gradient.clone()
    layer_attention.rotate_backward(found, joined, *rest)
    lines.rotate_backward(expected, joined, *rest)
    close(found, expected, dtype)


def layer_kernels_rotate(joined, rest):
    return layer_attention.rotate(joined, *rest)


@kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("masked", "length"), [(True, 150), (False, 128), (True, 64), (False, 70)])
def test_attention(dtype, masked, length):
    sequences, heads, key_heads, d = 2, 4, 2, 32
    group = torch.tensor([[-2] * 5 + [0] * 40 + [1] * (length - 45), [-2] * 5 + [0] * 30 + [-1] * (length - 35)])
    segment = torch.zeros_like(group)
    segment[:, 20:33], segment[0, 33:45], segment[1, 35:] = 1, 2, -1
    mask = attention_mask(group, segment).to(DEVICE) if masked else sequences
    joined = random(sequences * length, (heads + 2 * key_heads) * d, dtype=dtype)
    query, key, value = lines.split(joined, heads, key_heads)
    query, key = query.contiguous(), key.contiguous()
    expected, _ = lines.attend(query, key, value, mask, d**-0.5)
    seen = layer_attention.seen_by(mask, len(query), DEVICE)
    found, sums = layer_attention.attend(query, key, value, seen, d**-0.5)
    close(found, expected, dtype)
    gradient = random(*found.shape, dtype=dtype)
    own, other = torch.empty_like(joined), torch.empty_like(joined)
    layer_attention.attend_backward(gradient, query, key, value, found, sums, seen, d**-0.5, own)
    lines.attend_backward(gradient, query, key, value, expected, None, mask, d**-0.5, other)
    for one, another in zip(lines.split(own, heads, key_heads), lines.split(other, heads, key_heads), strict=True):
        close(one, another, dtype)


@kernels_run
def test_masks_of_past_lengths_do_not_stay():
    first = weakref.ref(layer_attention.seen_by(1, 64, DEVICE).words)
    assert layer_attention.seen_by(1, 64, DEVICE).words is first()
    for length in range(1, 20):
        layer_attention.seen_by(1, length, DEVICE)
    assert first() is None


@kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), [(37, 192), (64, 64), (5, 128), (129, 960)])
def test_weights_are_bitsandbytes_own_bit_by_bit(dtype, nested, outputs, inputs):
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=nested)
    layer.weight.data = random(outputs, inputs, dtype=dtype, scale=0.02).cpu()
    layer = layer.to(DEVICE)
    up = random(outputs, 8)
    for extra in (0, 64):
        found, expected = (torch.full((outputs, inputs + extra), 7.0, dtype=dtype, device=DEVICE) for _ in range(2))
        for kind, out in ((layer_kernels, found), (lines, expected)):
            kind.dequantize(layer, out, up if extra else None, 1.3, 11)
        assert torch.equal(found, expected)
