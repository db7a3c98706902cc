"""`launch.mode=deepspeed`: updates whose optimizer DeepSpeed's engine shares out among the processes (ZeRO-2).

Rows, passes, losses and schedule are those of `update`. The engine is given the adapter's parameters alone: it would
send a whole model from the first process to all others, and the frozen base has no state to share. Each process keeps
the gradients of its passes, and the engine sums them once an update: left alone, ZeRO-2 sums after every backward pass,
and processes whose rows make another number of passes would wait for each other for ever. Summed, not averaged, the
gradient is that of the mean over the update's samples, however they are dealt out.
"""

import logging
import math
import os
from importlib.util import find_spec

import torch
from torch.nn.functional import pad

from mmrev_kit.config.sections import Config, ConfigError


def refuse_mode(config: Config, num_processes: int | None = None) -> None:
    """Raises ConfigError where a training cannot run in `launch.mode`.

    Args:
        num_processes: of the run; None where that is not known yet.
    """
    if config.launch.mode == "auto":
        told = "spreads one model over all GPUs to evaluate it, and does not train"
        raise ConfigError(f"launch.mode = 'auto' {told}. Set launch.mode=data; quantization.bits=4 for a large base.")
    if config.launch.mode != "deepspeed":
        return
    if find_spec("deepspeed") is None:
        told = "deepspeed is not installed. Run pip install -e '.[deepspeed]', or set launch.mode=data"
        raise ConfigError(f"launch.mode = 'deepspeed': {told}.")
    if num_processes == 1:
        told = "shares the optimizer out among processes, and this run has one"
        raise ConfigError(f"launch.mode = 'deepspeed' {told}. Set launch.num_processes=2 or more, or launch.mode=data.")


class ShardedOptimizer:
    """An optimizer whose states lie in equal shares on all processes; a run's `optimizer` in this mode.

    Its `state_dict()` is that of the whole optimizer, so that `last/` is the same as without shares.

    Args:
        optimizer: a `torch.optim.AdamW` over `parameters`; it is changed.
        parameters: what is trained, in fp32.

    Attributes:
        param_groups, zero_grad: as an optimizer's; `lr` is read at each step.
    """

    def __init__(self, config: Config, optimizer, parameters: list, device):
        os.environ.setdefault("DS_ACCELERATOR", device.type)  # which it would guess, and warn of
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if device.type == "cpu":  # gloo does: an operation of its own for CPUs would have to be compiled
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.parameters, self.sizes = parameters, [parameter.numel() for parameter in parameters]
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # the passes are ours; it only counts
            "gradient_clipping": config.training.max_grad_norm,
            "gradient_allreduce_op": "sum",
            "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": sum(self.sizes)},
            "timers": {"throughput": {"enabled": False}},
        }
        module = torch.nn.ParameterList(parameters)
        self.engine, self.zero, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        for hook in self.zero._grad_acc_hooks:  # they would sum after each pass
            hook.remove()
        self.inner, self.param_groups, self.zero_grad = optimizer, optimizer.param_groups, self.zero.zero_grad
        self.norm = torch.nn.Parameter(torch.zeros(1, device=device))
        self.judge = torch.optim.SGD([self.norm])  # by its gradient, the norm's, a GradScaler sees what is not finite

    def sum_gradients(self) -> None:
        """Sum the gradients of all processes, each of which must have one for every parameter, and keep a share."""
        with self.engine.coalesce_grad_reduction():
            pass  # its end sums what lies in the parameters

    def step(self, scaler) -> float:
        """Clip, step, and give every process the new parameters; returns the norm of the gradient before it was
        clipped. Where that is not finite, nothing is changed but the scaler."""
        self.zero.override_loss_scale(scaler.get_scale())
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        if scaler.is_enabled():
            self.norm.grad = torch.full_like(self.norm, norm)
            scaler.unscale_(self.judge)
            scaler.update()
        return norm if math.isfinite(norm) else math.inf

    def state_dict(self) -> dict:
        """As of the optimizer without shares; every process must call it."""
        own = self.inner.state_dict()
        state, (group,) = own["state"].get(0, {}), own["param_groups"]
        whole = {number: {} for number in range(len(self.parameters))} if state else {}
        for name, value in state.items():
            parts = [value] * len(self.parameters)  # the number of steps
            if value.ndim:
                shares = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
                torch.distributed.all_gather(shares, value)
                parts = torch.cat(shares)[: sum(self.sizes)].split(self.sizes)
                parts = [part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]
            for number, part in enumerate(parts):
                whole[number][name] = part
        return {"state": whole, "param_groups": [group | {"params": list(range(len(self.parameters)))}]}

    def load_state_dict(self, whole: dict) -> None:
        """Go on from `state_dict()`, with the parameters as they are now."""
        self.zero.refresh_fp32_params()
        (group,), state = whole["param_groups"], {}
        for name, value in whole["state"].get(0, {}).items():
            state[name] = value
            if value.ndim:
                flat = torch.cat([whole["state"][number][name].flatten() for number in range(len(self.parameters))])
                flat = pad(flat, (0, self.zero.bit16_groups_flat[0].numel() - len(flat)))
                state[name] = flat.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
        self.inner.load_state_dict({"state": {0: state} if state else {}, "param_groups": [group | {"params": [0]}]})
