"""Pretraining of an embedded model from nothing, in one plain loop that goes on where it was interrupted."""

import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from mmrev_kit.config.project import EMBEDDED_MODEL
from mmrev_kit.config.sections import ConfigError
from mmrev_kit.files import tidy, write_json
from mmrev_kit.pretraining.accuracy import make_encoder, measure, table
from mmrev_kit.pretraining.learning import Lessons, Step, make_optimizers, rate_at
from mmrev_kit.pretraining.pictures import draw_pictures
from mmrev_kit.pretraining.questions import mix_of
from mmrev_kit.pretraining.recipe import Recipe
from mmrev_kit.pretraining.state import restore, save, write_model
from mmrev_kit.training.lock import held, keep_fresh


def new_model(seed: int, device):
    """A model of random weights, in fp32."""
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    return Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(EMBEDDED_MODEL)).float().to(device).train()


def train(recipe: Recipe, model, optimizers: list, record: dict, folder: Path) -> None:
    """Take the steps that are left; the record grows with them, and the state in `folder` is saved on the way.

    Raises:
        FloatingPointError: the loss is no longer a number.
    """
    began, device = time.monotonic(), model.device
    subjects, drawn = draw_pictures("train", recipe.seed, recipe.num_faces, recipe.looks, recipe.num_workers)
    pixels = torch.from_numpy(drawn).to(device)
    lessons = Lessons(recipe, subjects, make_encoder(EMBEDDED_MODEL))
    print(f"drew {len(pixels):,} pictures in {time.monotonic() - began:.1f} s", flush=True)
    steps = range(record["step"], recipe.steps)
    loader = DataLoader(
        lessons, batch_size=None, sampler=steps, num_workers=recipe.num_workers, pin_memory=device.type == "cuda"
    )
    take_step = Step(model, optimizers, pixels)
    began, kinds = time.monotonic(), list(mix_of(recipe.orders))
    sums = torch.zeros(2, len(kinds), device=device)  # right answers and rows of each kind since the last line
    for step, batch in zip(steps, loader, strict=True):
        rate = rate_at(step, recipe)
        loss, right = take_step(batch, rate)
        places = torch.tensor([kinds.index(kind) for kind in batch["kinds"]]).to(device, non_blocking=True)
        sums.index_add_(1, places, torch.stack([right, torch.ones_like(right)]))
        record["step"] = step + 1
        saving = record["step"] % recipe.save_every == 0 or record["step"] == recipe.steps
        if record["step"] % recipe.log_every == 0 or saving:
            seconds, began = time.monotonic() - began, time.monotonic()
            record["seconds"] += seconds
            _log(record, loss.item(), dict(zip(kinds, (sums[0] / sums[1]).tolist(), strict=True)), rate)
            sums.zero_()
        if saving:
            save(folder, model, optimizers, record)


def _log(record: dict, loss: float, right: dict[str, float], rate: float) -> None:
    """One line on standard output, one entry in the record."""
    if loss != loss:
        raise FloatingPointError(f"The loss is no number at step {record['step']:,}. Lower the rate.")
    record["log"].append({"step": record["step"], "loss": loss, "right": right, "rate": rate})
    shares = ", ".join(f"{kind} {share:.3f}" for kind, share in right.items())
    print(
        f"step {record['step']:,}: loss {loss:.4f}; right: {shares}; rate {rate:.2e}; {record['seconds']:.0f} s",
        flush=True,
    )


def pretrain(recipe: Recipe, out: str | Path) -> dict:
    """Pretrain, write the model to `out`/model with its card, and measure it on what is held out.

    Run again, it goes on from `out`/state; with a finished state it writes the model anew, without training.

    Returns:
        The record: recipe, step, seconds, log, tests, and on what it was made.

    Raises:
        ConfigError: `out` holds the state of another recipe, or folders that no pretraining wrote, or another process
            works there.
    """
    import transformers

    out = Path(out)
    with held(out):
        keep_fresh(out)
        tidy(out)
        state = out / "state"
        if others := [
            part for part in (state, out / "model") if part.exists() and not (state / "state.json").is_file()
        ]:
            raise ConfigError(
                f"{others[0]}: not written by a pretraining, which would replace it. Give another folder."
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = new_model(recipe.seed, device)
        optimizers = make_optimizers(model, recipe.weight_decay, recipe.muon)
        record = restore(state, model, optimizers, recipe)
        if record["step"] < recipe.steps:
            print(f"{recipe.orders}, seed {recipe.seed}: {record['step']:,} of {recipe.steps:,} steps", flush=True)
            name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
            record["made_on"] = f"on {name} (torch {torch.__version__}, transformers {transformers.__version__})"
            with torch.cuda.stream(torch.cuda.Stream() if device.type == "cuda" else None):
                train(recipe, model, optimizers, record, state)
        write_model(out / "model", model, record)
        if recipe.eval_prompts and not record["tests"]:
            record["tests"] = measure(out / "model", recipe)
        write_json(state / "state.json", record)
        write_model(out / "model", model, record)
        print("\n".join(table(record["tests"])), flush=True)
        return record
