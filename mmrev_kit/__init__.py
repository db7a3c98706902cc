"""A research kit for the multimodal reversal curse: what was taught as `[image] -> description`, asked the other way.

The rooms, each of which imports only those above it:

    files        files and folders that are whole or absent
    config       the settings: their defaults, reading them, paths, seeds, optimizers; how progress is said
    data         the tasks; people, pictures, partners, retention pools; checks; rows to tokens; the mix
    model        loading in 4 or 16 bit, LoRA, packing, vision features, fused operations, scoring
    memory       what a run needs on a card, and the fastest micro-batches that fit
    training     the schedule, an update, the loop, checkpoints, jobs and their processes
    pretraining  only for making an embedded model anew
    evaluation   what was answered: metrics, statistics, the verdict, tables
    notebook     what the notebooks show, and starting a job from a cell

What most people need is here, and loaded when it is used:

    load_config(path, overrides)      a configuration, strictly read
    ensure_data(config)               an experiment and its pools, made where they are absent
    make_plan(tasks, pools, ...)      the retention mix: which rows an epoch holds
    Schedule(...)                     warm-up, plateau, end, for any training loop
    load_base(name, bits=4, ...)      the frozen base model in 4 or 16 bit
    add_adapter(model, r=8, ...)      a LoRA adapter on it
    estimate(config)                  a run's memory from shapes alone
    launch(config)                    train in processes of its own, watched from here
    evaluate(config)                  ask all test questions
    verdict(records, task)            what the answers say about the curse
"""

from importlib import import_module

__version__ = "0.1.0"
_HOMES = {
    "load_config": "config.reading",
    "ensure_data": "data.make",
    "make_plan": "data.mixing",
    "Schedule": "training.scheduler",
    "load_base": "model.loading",
    "add_adapter": "model.loading",
    "estimate": "memory.estimate",
    "launch": "notebook.launch",
    "evaluate": "notebook.launch",
    "verdict": "evaluation.verdict",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
