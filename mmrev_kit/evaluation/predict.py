"""The tests: greedy answers, and the log-probability of every option, for a trained run or a base model."""

import hashlib
import itertools
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from mmrev_kit import __version__
from mmrev_kit.config.reporting import MARK, Pace
from mmrev_kit.config.sections import Config, ConfigError
from mmrev_kit.data.checks import encode_all
from mmrev_kit.data.faults import raise_faults
from mmrev_kit.data.prompts import Encoder
from mmrev_kit.data.questions import Question, choose_questions, read_questions
from mmrev_kit.evaluation.answers import judge_answer
from mmrev_kit.files import write_json, write_jsonl
from mmrev_kit.model.bases import SMALL_FILES, base_fingerprint, base_of, processor_folder, stands_in
from mmrev_kit.model.features import LIBRARIES
from mmrev_kit.model.loading import base_arguments, load_adapter, load_base, torch_dtype
from mmrev_kit.model.processor import make_encoder
from mmrev_kit.model.scoring import generate, score_options
from mmrev_kit.training.processes import UNTRIED, worker_state
from mmrev_kit.training.throughput import peak_memory_gib

MEASURED = "measured.json"  # what the processes say of their evaluation, until facts.json holds it
DROPS = ("none", "image", "text", "both")


def check_answer_lengths(config: Config, questions: list[Question]) -> None:
    """Refuse a question whose expected answer is longer than any that the model may give.

    Raises:
        ConfigError: naming the row, how many there are, and the least setting.
    """
    encoder, rows = make_encoder(config), {question.row.where: question.row for question in questions}
    sizes = {where: len(encoder.text_ids(row.answer)) + 1 for where, row in rows.items()}  # and the end's
    longest, most = max(sizes, key=sizes.__getitem__), config.evaluation.max_new_tokens
    if sizes[longest] > most:
        many = sum(size > most for size in sizes.values())
        raise ConfigError(
            f"evaluation.max_new_tokens = {most}: the expected answer of {many} questions is longer, in {longest} "
            f"{sizes[longest]} tokens, so that no answer could be right. Set evaluation.max_new_tokens="
            f"{sizes[longest] + 8} or more."
        )


def evaluation_key(
    config: Config, adapter: Path | None, base: str, drops: tuple[str, ...], questions: list[Question],
    more: tuple = (),
) -> str:  # fmt: skip
    """A digest of everything that an evaluation's answers depend on: `base` stands for the weights, the small files of
    the model for its processor (chat template, tokenizer, image mean), and the versions for the code; `more` for what
    its results say besides."""
    digest = hashlib.sha256(repr((base, tuple(drops), config.evaluation, config.quantization)).encode())
    digest.update(repr((config.model.min_pixels, config.model.max_pixels, config.training.max_length)).encode())
    for question in questions:
        digest.update(repr(question).encode())
    digest.update("".join(map(repr, more)).encode())
    digest.update(repr([__version__, *(version(name) for name in LIBRARIES)]).encode())
    processor = processor_folder(config.model.name, config.model.revision)
    small = {path for pattern in SMALL_FILES for path in processor.glob(pattern)}
    files = {image for question in questions for image in question.row.images}
    for file in [*sorted(small), *sorted(files), *(sorted(adapter.glob("adapter_*")) if adapter else [])]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def judge(question: Question, answer: str) -> tuple[str | None, bool]:
    """What an answer says (None: unparsed), and whether it is right; unparsed is a miss."""
    return judge_answer(question.row.type.format, answer, question.row.answer, question.options)


def answer_questions(
    config: Config, model, questions: list[Question], drop: str, state, tell: Callable[[int], None]
) -> list[dict]:
    """This process's share of the questions, answered; one record a question, see `predict`.

    Args:
        tell: called with the number of questions that all processes have answered by now, about.
    """
    import torch

    encoder = make_encoder(config, drop)
    samples, faults = encode_all([question.row for question in questions], encoder, quiet=not state.is_main_process)
    raise_faults(faults, config.data.drop_faulty)
    pairs = [(q, s) for q, s in zip(questions, samples, strict=True) if s is not None]

    def kind(index: int) -> tuple[str, int]:  # what a batch must share: options are scored side by side
        return pairs[index][0].row.task, len(pairs[index][0].options)

    order = sorted(range(len(pairs)), key=lambda index: (kind(index), len(pairs[index][1].input_ids), index))
    dtype = torch_dtype(config.quantization.compute_dtype, state.device)
    mine, records = order[state.process_index :: state.num_processes], []
    size = config.evaluation.batch_size
    alike = [list(part) for _, part in itertools.groupby(mine, kind)]  # and of about one length: little is padded
    with torch.no_grad(), torch.autocast(state.device.type, dtype, enabled=dtype != torch.float32):
        for chunk in [part[start : start + size] for part in alike for start in range(0, len(part), size)]:
            asked = [pairs[index][0] for index in chunk]
            prompts = [encoder.encode(question.row, with_answer=False) for question in asked]
            answers = generate(model, encoder, prompts, config.evaluation.max_new_tokens, state.device)
            scores = score_options(model, encoder, prompts, [q.options for q in asked], state.device).tolist()
            for index, question, answer, row in zip(chunk, asked, answers, scores, strict=True):
                records.append(predict(question, encoder, answer, row, drop) | {"index": index})
            tell(min(len(order), len(records) * state.num_processes))
    return records


def predict(question: Question, encoder: Encoder, answer: str, scores: list[float], drop: str) -> dict:
    """The record of one answer, as written to predictions.jsonl."""
    row, parts = question.row, encoder.parts(question.row)
    read, right = judge(question, answer)
    options = dict(zip(question.options, scores, strict=True))
    best = max(options, key=options.__getitem__)
    # Where the right answer cannot be known any more, only the agreement with the answer to the whole prompt counts.
    judged = drop == "none" or (drop == "text" and row.type.known_without_text)
    return {
        "id": Path(row.where).name,
        "test": row.task,
        "drop": drop,
        "order": question.order,
        "group": row.group or "main",
        "entity_id": row.entity_id,
        "prompt": "".join("[image]" if isinstance(part, Path) else part for part in parts),
        "parts": [None if isinstance(part, Path) else part for part in parts],  # None: the next picture
        "images": [str(path) for path in row.images],
        "expected": row.answer,
        "answer": answer,
        "read_as": read,
        "right": right if judged else None,
        "options": options,
        "likeliest": best,
        "likeliest_right": best == row.answer if judged else None,
    }


def evaluate_worker(config: Config, adapter: str | None, drops: tuple[str, ...], folder: str) -> None:
    """What each process runs: its share of the questions; the first process writes predictions.jsonl and MEASURED,
    which says what was evaluated, how fast, and on what.

    Args:
        adapter: a folder with an adapter, or None for the base model.
        drops: from `DROPS`.
    """
    import torch
    from accelerate.utils import gather_object

    with worker_state(Path(folder)) as state:
        if state.is_main_process:
            print(f"{MARK}loading {config.model.name}", flush=True)
        model = load_base(**base_arguments(config, state.device))
        if adapter:
            model = load_adapter(model, adapter, config.adapter.unbound)
        model.eval()
        questions, found = choose_questions(config, read_questions(config)), []
        began = time.perf_counter()
        pace = Pace(len(questions) * len(drops), "prompts")
        for number, drop in enumerate(drops):

            def tell(done: int, before: int = number * len(questions), drop: str = drop) -> None:
                (Path(folder) / UNTRIED).unlink(missing_ok=True)
                if state.is_main_process and pace.due(before + done):
                    print(f"{MARK}{pace.line(before + done, f' (drop {drop})')}", flush=True)

            found += answer_questions(config, model, questions, drop, state, tell)
        seconds, cards = time.perf_counter() - began, torch.cuda.device_count() if config.launch.mode == "auto" else 0
        peak = max(map(peak_memory_gib, [torch.device("cuda", index) for index in range(cards)] or [state.device]))
        found = gather_object(found)
        if state.is_main_process:
            found.sort(key=lambda record: (DROPS.index(record["drop"]), record.pop("index")))
            (Path(folder) / "facts.json").unlink(missing_ok=True)  # the old evaluation is no longer whole
            write_jsonl(Path(folder) / "predictions.jsonl", found)
            facts = {
                "base": {"name": config.model.name, "fingerprint": base_fingerprint(**base_of(config))},
                "adapter": adapter,
                "processor": "stand-in: the embedded tokenizer" if stands_in(config.model.name) else "the model's own",
                "prompts": len(found),
                "prompts_per_second": len(found) / seconds,
                "seconds": seconds,
                "peak_memory_gib": peak,
                "device": torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else "CPU",
                "num_processes": state.num_processes,
            }
            write_json(Path(folder) / MEASURED, facts)
