"""The optimizers that `training.optimizer` may name: what training makes, and what the memory estimate counts.

Another optimizer is one more entry in `OPTIMIZERS`, under the name that `training.optimizer` is to give.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer.

    Attributes:
        path: where its class is imported from; it is called with the parameters, `lr` and `weight_decay`.
        states: numbers that it keeps for each trained number: 2 in Adam, 0 in plain SGD.
        bits: size of each state: 32 (fp32), or 8 with bitsandbytes' constants; for the memory estimate, as `states` is.
        paged: whether bitsandbytes may move the states of large tensors to the host.
        on_cpu: the name of the optimizer that takes its place on a CPU; None: it runs there itself.
        cpu_options: further arguments of the class on a CPU.
    """

    path: str
    states: int
    bits: int = 32
    paged: bool = False
    on_cpu: str | None = None
    cpu_options: dict = field(default_factory=dict)


OPTIMIZERS = {
    "adamw": OptimizerKind("torch.optim.AdamW", states=2, cpu_options={"fused": True}),
    "adamw_8bit": OptimizerKind("bitsandbytes.optim.AdamW8bit", states=2, bits=8),
    "paged_adamw_8bit": OptimizerKind(
        "bitsandbytes.optim.PagedAdamW8bit", states=2, bits=8, paged=True, on_cpu="adamw_8bit"
    ),
}
