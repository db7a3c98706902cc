# KEPT of tests/memory/test_memory.py anew: layers kept against what is allocated and reserved, beside the estimate
import os, time, traceback
BEGAN = time.perf_counter()
from pathlib import Path
from types import SimpleNamespace
import torch
import speed_32b as s
from mmrev_kit.memory.estimate import estimate
from mmrev_kit.memory.plan import with_memory, split_updates, configured_shapes
from mmrev_kit.model import fused
from mmrev_kit.model.features import build_features
from mmrev_kit.model.qwen3vl import drop_tower
from mmrev_kit.training.update import chunks
def log(*words): print(f"[{time.perf_counter() - BEGAN:6.1f}]", *words, flush=True)
LIMIT, load = float(os.environ.get("SECONDS_ALL", 110)), s.load_config
s.load_config = lambda file, words: load(file, words + " data.num_main=8 data.num_control=0")
tiny = bool(os.environ.get("TINY"))
given = SimpleNamespace(architecture="mmrev_kit/assets/embedded/config.json" if tiny else "configs/models/qwen3vl_32b.json", data="data", image_size=64 if tiny else 448, faces=40, seconds=LIMIT, cuda=torch.cuda.is_available())
s.measure_peak_flops = lambda *_: None
bench = s.build(given); bench.deadline = BEGAN + LIMIT
log("built")
forward = s.forward_samples(bench, Path(given.data) / "speed_images448", 4, 15)
rows = bench.rows[:72]
bench.features = build_features(bench.config, bench.model, bench.encoder, forward + rows, bench.dtype, bench.state)
drop_tower(bench.model)
log("features")
shapes, can = configured_shapes(bench.config), fused.can_compile
def one(name, updates, micro, kept, accumulates, old=False):
    fused.can_compile = (lambda device: False) if old else can
    try:
        found = s.kit_recipe(bench, f"{name}, {micro} tokens, {kept} kept", updates, micro_tokens=micro, kept_layers=kept)
        if found is None: return
        config = with_memory(bench.config, micro_tokens=micro, kept_layers=kept)
        parts = [m for m in split_updates(updates[1:], config, shapes, bench.encoder.image_id, 1, micro)[0]]
        wanted = estimate(config, shapes, parts, 1, accumulates, ("last layer", "loss", "optimizer step"), old)
        m, peak, reserved = wanted.micro_batch, found["peak GiB"] or 1, found["reserved GiB"] or 1
        log(f"{'MODULES' if old else 'KEPT'} {name} {micro} (MicroBatch({m.sequences}, {m.length}, {m.logits}, {m.visual}), {accumulates}, {kept}, {peak:.3f}, {reserved:.3f}), {m.tokens} tokens, estimated {wanted.allocated_gib:.3f} ({wanted.allocated_gib/peak-1:+.2%}) {wanted.reserved_gib:.3f} ({wanted.reserved_gib/reserved-1:+.2%}) {wanted.phase}: " + ", ".join(f"{c.name} {c.gib:.3f}" for c in wanted.components) + "; phases " + ", ".join(f"{k} {v:.2f}" for k, v in wanted.peaks.items()))
    except Exception: traceback.print_exc()
def exact():
    """Losses and gradients of one micro-batch, modules beside the operation; overflow at the scaler's first scale."""
    from mmrev_kit.model.batches import Batcher, make_layout
    from mmrev_kit.model.loading import set_recomputed, trainable
    from mmrev_kit.training.update import sample_losses
    from mmrev_kit.model.plain import language_model
    set_recomputed(bench.core, 0); bench.model.train()
    own = trainable(bench.model); up = [q for n, q in bench.model.named_parameters() if "lora_B" in n]
    batcher = Batcher(make_layout(with_memory(bench.config, micro_tokens=4096), bench.model, bench.state.device), bench.encoder, bench.features, bench.state.device)
    groups = [g for l in language_model(bench.core).layers for g in l.operation.groups.values()]
    def run(new, p, scale, seed=0):
        fused.can_compile = can if new else (lambda device: False)
        for g in groups:
            g.p = p
            for m in g.adapted: m.lora_dropout[g.names[0]].p = p
        torch.manual_seed(seed); losses = []
        for batch in batcher.batches(rows[8:16]):
            loss = sample_losses(bench.model, batch, bench.state.device, bench.dtype); losses.append(loss.detach()); (loss.sum() / 8 * scale).backward()
        grad = torch.cat([q.grad.flatten() for q in own]) / scale
        for q in own: q.grad = None
        return torch.cat(losses), grad
    for B, p, scale in ((0.01, 0.0, 2.0**10), (0.01, 0.05, 2.0**10), (0.01, 0.05, 2.0**16), (0.0, 0.05, 2.0**16)):
        for q in up: torch.nn.init.normal_(q, std=B) if B else torch.nn.init.zeros_(q)
        if True:
            if True:
                found = {k: run(k[0] == "o", p, scale, int(k[-1])) for k in ("op0", "mod0", "op1", "mod1")}
                log(f"EXACT B {B} p {p} scale {scale:.0f}: loss " + " ".join(f"{k} {v[0].mean():.5f}" for k, v in found.items()) + "; norm " + " ".join(f"{k} {v[1].norm():.5f}" for k, v in found.items()) + "; zeros " + " ".join(f"{k} {(v[1] == 0).float().mean():.4f}" for k, v in found.items()) + "; inf or nan " + " ".join(f"{k} {int((~v[1].isfinite()).sum())}" for k, v in found.items()))
                pairs = [("op0", "mod0"), ("op0", "op1"), ("mod0", "mod1"), ("op1", "mod1")]
                log("   gradients differ by: " + " ".join(f"{a}-{b} {(found[a][1] - found[b][1]).norm() / found[b][1].norm():.5f}" for a, b in pairs) + "; losses: " + " ".join(f"{a}-{b} {(found[a][0] - found[b][0]).abs().max():.5f}" for a, b in pairs))
    for g in groups:
        g.p = 0.05
        for m in g.adapted: m.lora_dropout[g.names[0]].p = 0.05
    fused.can_compile = can
    for q in up: torch.nn.init.normal_(q, std=0.01)
four = s.forward_updates(forward, 4, 15, 2)
mixed, eight = [rows[:8], rows[8:72]], [rows[:8], rows[8:16]]
layers = shapes.num_hidden_layers
for kept in (0, 8, 16): one("four", four, 4096, min(kept, layers), False)
for kept in (0, 12, 24): one("eight rows", eight, 4096, min(kept, layers), False)
try: exact()
except Exception: traceback.print_exc()
for kept in (0, 6): one("mix", mixed, 4096, min(kept, layers), True)
one("four", four, 4096, min(40, layers), False)
one("mix", mixed, 2048, layers, True)
for way, updates in (("four", four), ("eight rows", eight)): one(way, updates, 4096, 0, False, old=True)
one("mix", mixed, 4096, min(40, layers), True)
one("mix", mixed, 1024, layers, True)
one("mix", mixed, 4096, 0, True, old=True)
log("done")
