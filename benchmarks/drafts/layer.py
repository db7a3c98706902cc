import cProfile, gc, io, os, pstats, sys, time, traceback
from pathlib import Path
START = float(os.environ.get("START", time.time())); LIMIT = float(os.environ.get("SECONDS_ALL", 240)); OUT = Path(os.environ["OUT"])
def log(*a): print(f"[{time.time()-START:6.1f}]", *a, flush=True)
log("importing")
import torch
import card_share as cs
from mmrev_kit.config.reading import load_config
from mmrev_kit.data.make import ensure_data
from mmrev_kit.memory import layers as memory_layers
from mmrev_kit.model import fused
from mmrev_kit.training.processes import worker_state
from mmrev_kit.training.run import start
log("imported", torch.__version__, torch.cuda.get_device_name())
CASES = [tuple(c.split(":")) for c in os.environ.get("CASES", "new:8:31 old:8:31 new:8:0 old:8:0 new:64:31 old:64:31").split()]

def timed(name, f, count=20, note=""):
    try:
        for _ in range(3): f()
        torch.cuda.synchronize(); a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        for _ in range(count): f()
        b.record(); torch.cuda.synchronize()
        us = 1e3 * a.elapsed_time(b) / count
        log(f"  {name:44s} {us:9.1f} us {note(us) if note else ''}")
    except Exception: log(name, "FAILED"); traceback.print_exc()

def kernels():
    from types import SimpleNamespace
    from bitsandbytes.nn import Linear4bit
    from mmrev_kit.model import layer_attention as la, layer_kernels as lk, layer_lines as ll, kernels as k
    dt, dev = torch.float16, torch.device("cuda", 0)
    h, q, kk, f, H, K, d = 5120, 8192, 1024, 25600, 64, 8, 128
    r = lambda *s, dtype=dt: torch.randn(*s, device=dev, dtype=dtype)
    lin = Linear4bit(h, f, bias=False, compute_dtype=dt, quant_type="nf4"); lin.weight.data = (0.02*torch.randn(f, h)).half(); lin = lin.to(dev)
    ext, plain = torch.empty(f, h + 64, device=dev, dtype=dt), torch.empty(f, h, device=dev, dtype=dt)
    up = r(f, 8, dtype=torch.float32); rate = lambda us: f"{f*h*2.515/us/1e6:.2f} TB/s"
    timed("bitsandbytes dequantize 25600x5120", lambda: k.weight_of(lin, dt), note=rate)
    timed("triton dequantize", lambda: lk.dequantize(lin, plain, None, 1., 0), note=rate)
    timed("triton dequantize, extended", lambda: lk.dequantize(lin, ext, up, 1., 0), note=rate)
    import triton
    state = lin.weight.quant_state
    for blocks in (16, 32, 64, 128):
        for warps in (2, 4, 8):
            n = triton.cdiv(f*h, 64)
            timed(f"  blocks {blocks} warps {warps}", lambda: lk.dequantize_kernel[(triton.cdiv(n, blocks),)](lin.weight, state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset, state.code, plain, n, h//64, h, f, 1., 0, 0, NESTED=True, RANK=0, EXTRA=1, BLOCKS=blocks, BLOCK=64, CONSTANTS=256, ROWS=64, enable_fp_fusion=False, num_warps=warps), note=rate)
    for n, B in ((1752, 3), (4096, 8)):
        log(f" n {n}")
        x, xe = r(n, h), r(n, h + 64); we, w = r(q + 2*kk, h + 64), r(q + 2*kk, h)
        timed("product qkv 5120", lambda: x @ w.t(), note=lambda us: f"{2*n*h*(q+2*kk)/us/1e6:.0f} TFLOP/s")
        timed("product qkv 5184", lambda: xe @ we.t(), note=lambda us: f"{2*n*h*(q+2*kk)/us/1e6:.0f} TFLOP/s")
        g = r(n, q + 2*kk)
        timed("product back qkv 5120", lambda: g @ w); timed("product back qkv 5184", lambda: g @ we)
        wu = r(2*f, h); gu = r(n, 2*f); a = r(n, f); wd = r(h, f)
        fl = lambda us: f"{4*n*h*f/us/1e6:.0f} TFLOP/s"
        timed("product gate+up", lambda: x @ wu.t(), note=fl); timed("product back gate+up", lambda: gu @ wu, note=fl)
        fl2 = lambda us: f"{2*n*h*f/us/1e6:.0f} TFLOP/s"
        timed("product down", lambda: a @ wd.t(), note=fl2); timed("product back down", lambda: x @ wd, note=fl2)
        s = r(n, h, dtype=torch.float32); wt = r(h)
        timed("norm", lambda: lk.norm(s, None, wt, 1e-6, xe)); timed("norm with added", lambda: lk.norm(s, x, wt, 1e-6, xe))
        timed("norm_backward", lambda: lk.norm_backward(xe, s, wt, 1e-6, s, dt))
        timed("gate", lambda: lk.gate(gu, a)); timed("gate_backward", lambda: lk.gate_backward(a, gu.clone()))
        timed("draw 3 x h", lambda: lk.draw(1, n, h, 3, .05, dev)); timed("draw 1 x q", lambda: lk.draw(1, n, q, 1, .05, dev))
        grp = SimpleNamespace(inputs=h, rank=8, starts=[0, q, q + kk], scaling=2.0); m = lk.draw(1, n, h, 3, .05, dev); A = r(24, h)
        low = lk.lora_down(grp, xe[:, :h], m, A, 1.05, xe)
        timed("lora_down qkv", lambda: lk.lora_down(grp, xe[:, :h], m, A, 1.05, xe)); timed("lora_up qkv", lambda: lk.lora_up(grp, xe, m, A, 1.05))
        timed("lora_gradients qkv (2 kernels)", lambda: lk.lora_gradients(grp, xe, xe[:, :h], m, 1.05, g, low))
        gro = SimpleNamespace(inputs=q, rank=8, starts=[0], scaling=2.0); mo = lk.draw(1, n, q, 1, .05, dev); Ao = r(8, q); o = r(n, q); oe = r(n, q + 64)
        lowo = lk.lora_down(gro, o, mo, Ao, 1.05, oe)
        timed("lora_down o", lambda: lk.lora_down(gro, o, mo, Ao, 1.05, oe)); timed("lora_up o", lambda: lk.lora_up(gro, oe, mo, Ao, 1.05))
        timed("lora_gradients o", lambda: lk.lora_gradients(gro, oe, o, mo, 1.05, x, lowo))
        c = r(n, d, dtype=torch.float32); own = H, K, r(d), r(d), 1e-6, c, c
        timed("rotate", lambda: la.rotate(g, *own)); timed("rotate_backward", lambda: la.rotate_backward(g.clone(), g, *own))
        Q, KK = la.rotate(g, *own); V = ll.split(g, H, K)[2]; L = n // B
        mask = torch.ones(B, 1, L, L, dtype=torch.bool, device=dev).tril()
        fa = lambda us: f"{4*B*L*L*q/2/us/1e6:.0f} TFLOP/s causal"
        seen = la.seen_by(mask, n, dev); out, sums = la.attend(Q, KK, V, seen, d**-.5); into = torch.empty_like(g)
        timed(f"attend {B} x {L}", lambda: la.attend(Q, KK, V, seen, d**-.5), note=fa)
        timed("attend_backward", lambda: la.attend_backward(o, Q, KK, V, out, sums, seen, d**-.5, into), note=lambda us: f"{10*B*L*L*q/2/us/1e6:.0f} TFLOP/s causal")
        four = lambda t: t.view(B, L, -1, d).transpose(1, 2)
        kr, vr = (four(t).repeat_interleave(H//K, 1).contiguous().requires_grad_() for t in (KK, V)); qr = four(Q).detach().requires_grad_()
        timed("torch sdpa with mask", lambda: torch.nn.functional.scaled_dot_product_attention(qr, kr, vr, mask), note=fa)
        def both(): torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(qr, kr, vr, mask), (qr, kr, vr), qr)
        timed("torch sdpa forward and backward", both)

def case(state, variant, rows, gib):
    fused.can_compile = can_compile if variant == "new" else (lambda device: False)
    memory_layers.as_operation = as_operation if variant == "new" else lambda config, old: False
    torch.cuda.set_per_process_memory_fraction(1.0); torch.cuda.reset_peak_memory_stats()
    words = f"model.name=configs/models/qwen3vl_32b.json experiment.name=share data.num_main=20 training.num_epochs=1 launch.num_processes=1 {f'memory.gpu_gib={gib} ' if gib != '0' else ''}"
    log("\n".join(ensure_data(load_config("configs/config_qwen3vl32_fp16.yaml", words)))[-300:])
    config = load_config("configs/config_qwen3vl32_fp16.yaml", f"{words} training.gradient_accumulation_steps={rows}")
    run = start(config, state); run.model.train(); log(f"=== {variant} {rows} rows, {gib} GiB: started, {torch.cuda.memory_allocated()/2**30:.2f} GiB")
    updates = 10 if int(rows) < 32 else 4
    measured = cs.measure(run, int(rows), updates); log("measured; losses", [round(r["loss"], 4) for r in measured["records"]], "norms", [round(r["grad_norm"], 4) for r in measured["records"]])
    log("ms", [round(r["ms"]) for r in measured["records"]], "tokens", [r["tokens"] for r in measured["records"]], f"reserved {torch.cuda.max_memory_reserved()/2**30:.2f}")
    cs.report(run, int(rows), measured); log(cs.busy(run, measured["batches"]))
    if variant == "new" and rows == "8":
        seen = cProfile.Profile(); batch = measured["batches"][cs.WARM_UP]
        torch.cuda.synchronize(); began = time.perf_counter(); seen.enable(); cs.training.accumulate(run, batch); seen.disable(); torch.cuda.synchronize()
        log(f"profiled accumulate {1e3*(time.perf_counter()-began):.0f} ms")
        text = io.StringIO(); pstats.Stats(seen, stream=text).sort_stats("tottime").print_stats(28); print(text.getvalue()[:5000], flush=True)
        from torch.profiler import profile, ProfilerActivity
        with profile(activities=[ProfilerActivity.CUDA]) as prof: cs.training.update(run, batch); torch.cuda.synchronize()
        (OUT / f"kernels_{gib}.txt").write_text(prof.key_averages().table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=90))

as_operation, can_compile = memory_layers.as_operation, fused.can_compile
done = OUT / "tests_done"
while not done.exists() and time.time() - START < 150: time.sleep(0.5)
log("tests are done" if done.exists() else "not waiting for the tests any longer")
if not os.environ.get("NO_KERNELS"):
    try: kernels()
    except Exception: traceback.print_exc()
    gc.collect(); torch.cuda.empty_cache()
with worker_state(Path(".")) as state:
    for variant, rows, gib in CASES:
        if time.time() - START > LIMIT - 25: log("no time left for", variant, rows, gib); continue
        try: case(state, variant, rows, gib)
        except Exception: log("FAILED", variant, rows, gib); traceback.print_exc(); sys.stderr.flush()
        gc.collect(); torch.cuda.empty_cache()
log("done")
