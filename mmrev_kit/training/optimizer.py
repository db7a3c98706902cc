"""The configured optimizer, made from its entry in `config.optimizers`."""

from pkgutil import resolve_name

from mmrev_kit.config.optimizers import OPTIMIZERS
from mmrev_kit.config.sections import Config


def make_optimizer(config: Config, parameters: list, device):
    """`training.optimizer` over these parameters; on a CPU the one that takes its place there, which is said once."""
    name, options = config.training.optimizer, {}
    if device.type == "cpu":
        if other := OPTIMIZERS[name].on_cpu:
            print(f"{name}: on CPU this is {other}", flush=True)
            name = other
        options = OPTIMIZERS[name].cpu_options
    make = resolve_name(OPTIMIZERS[name].path)
    return make(parameters, lr=config.training.learning_rate, weight_decay=config.training.weight_decay, **options)
