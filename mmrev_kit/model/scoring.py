"""Questions put to a model: greedy answers, and the log-probability of every option."""

from dataclasses import replace
from functools import partial

import torch
from torch.nn.functional import cross_entropy

from mmrev_kit.data.prompts import Encoder, Sample
from mmrev_kit.model.batches import Batch, Batcher, from_labels, question_shares
from mmrev_kit.model.finite import refuse
from mmrev_kit.model.fused import takes_wanted
from mmrev_kit.model.plain import core_model, takes_fast_path
from mmrev_kit.model.qwen3vl import positions_after, prompt_positions
from mmrev_kit.model.strict import strict


def answer_losses(model, batch: Batch, device, dtype):
    """The cross-entropy of every answer token of a batch, in nats: (answer tokens,) fp32."""
    inputs = dict(batch.inputs)
    if takes_wanted(core_model(model)):
        inputs["wanted"] = inputs.pop("logits_to_keep")
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = model(**inputs).logits.flatten(0, -2)
    if batch.predictor is not None:
        logits = logits[batch.predictor]
    return cross_entropy(logits.float(), batch.target, reduction="none")


@torch.no_grad()
def score_samples(
    model, batcher: Batcher, samples: list[Sample], dtype, process: int = 0, processes: int = 1
) -> list[float]:
    """The log-probability of each sample's answer after its prompt, <|im_end|> included, in nats: what `score_options`
    gives, through the batches of a training run. Equal samples are computed once.

    Args:
        samples: prompts with each of their options.

    Returns:
        A number a sample; 0 for those that another process computes, so that the sum over all processes has them all.
    """

    def key(sample: Sample) -> tuple:
        return sample.row.images, sample.max_pixels, sample.input_ids

    distinct = list({key(sample): sample for sample in samples}.values())
    shares = question_shares(distinct, batcher.layout.packing, batcher.encoder.image_id, processes)
    found = {}
    for batch in batcher.laid_out(shares[process]):
        losses = answer_losses(model, batch, batcher.device, dtype)
        totals = torch.zeros(batch.rows, device=losses.device).index_add(0, batch.owner.to(losses.device), losses)
        found |= zip(map(key, batch.samples), (-totals).tolist(), strict=True)
    return [found.get(key(sample), 0.0) for sample in samples]


class _Finite:
    """A logits processor that changes nothing and keeps in which samples all logits were finite."""

    def __init__(self):
        self.samples = True

    def __call__(self, ids, logits):
        self.samples = logits.isfinite().all(-1) & self.samples  # read at the end: no token waits for it
        return logits


@strict()
def generate(model, encoder: Encoder, samples: list[Sample], max_new_tokens: int, device) -> list[str]:
    """Greedy answers to one left-padded batch, with the cache; the end token is not part of an answer.

    Raises:
        NotFiniteError: naming the row and the first module.
    """
    from transformers import GenerationConfig

    batch = {name: value.to(device) for name, value in encoder.collate(samples, pad_left=True).items()}
    batch.pop("labels")
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=encoder.end_id,
        pad_token_id=encoder.pad_id,
    )  # fmt: skip
    seen = _Finite()
    ids = model.generate(**batch, generation_config=greedy, logits_processor=[seen])
    _require_finite(model, samples, seen.samples, lambda: model.generate(**batch, generation_config=greedy))
    return encoder.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _require_finite(model, samples: list[Sample], finite, again) -> None:
    """Stop where `finite`, one truth value a sample, is not all true; see `refuse`."""
    if not finite.all():
        refuse(model, samples[finite.tolist().index(False)].row.where, again)


def score_options(model, encoder: Encoder, samples: list[Sample], options: list[tuple[str, ...]], device):
    """The log-probability of each option as the whole answer, the token that ends it included.

    Args:
        options: one tuple a sample, all of the same length.

    Returns:
        (samples, options) log-probabilities in nats.

    Raises:
        NotFiniteError: naming the row and the first module.
    """
    again = partial(_scores if takes_fast_path(model) else _plain_scores, model, encoder, samples, options, device)
    scores = again()
    _require_finite(model, samples, scores.isfinite().all(1), again)
    return scores


def _plain_scores(model, encoder: Encoder, samples: list[Sample], options: list[tuple[str, ...]], device):
    """Each option in a row of its own, through the library's forward pass: not every family's cache can be cut back."""
    columns = []
    for texts in zip(*options, strict=True):
        rows = []
        for sample, text in zip(samples, texts, strict=True):
            row = replace(sample.row, answer=text)
            rows.append(replace(sample, row=row, input_ids=sample.input_ids + tuple(encoder.tokens(row)[1])))
        batch = from_labels(encoder.collate(rows), device)
        logs = -cross_entropy(model(**batch.inputs).logits.float(), batch.target, reduction="none")
        columns.append(torch.zeros(len(rows), device=device).index_add(0, batch.owner.to(device), logs))
    return torch.stack(columns, dim=1)


def _scores(model, encoder: Encoder, samples: list[Sample], options: list[tuple[str, ...]], device):
    """The prompts are read once; each round of options continues from their cache, which is then cut back, so that
    memory does not grow with the number of options."""
    batch = {name: value.to(device) for name, value in encoder.collate(samples, pad_left=True).items()}
    batch.pop("labels")
    core = core_model(model)
    positions = prompt_positions(core, batch)
    out = core(**batch, position_ids=positions, use_cache=True, logits_to_keep=1)
    start = out.logits[:, -1].float().log_softmax(-1)
    cache = out.cache
    columns = []
    for texts in zip(*options, strict=True):
        tokens = [[*encoder.text_ids(text), encoder.end_id] for text in texts]
        longest = max(map(len, tokens))
        ids = torch.tensor([row + [encoder.pad_id] * (longest - len(row)) for row in tokens], device=device)
        real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens], device=device)
        total = start.gather(1, ids[:, :1])[:, 0]
        after = positions_after(positions, longest - 1)
        mask = torch.cat([batch["attention_mask"], real[:, :-1]], dim=1)
        more = core(input_ids=ids[:, :-1], attention_mask=mask, position_ids=after, cache=cache, use_cache=True)
        logs = more.logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        columns.append(total + (logs * real[:, 1:]).sum(1))
        cache.crop(1 - longest)  # a negative number removes that many tokens
    return torch.stack(columns, dim=1)
