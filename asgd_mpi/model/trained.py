"""Which parameters of a network are trained: those that the flat vectors hold, in order; a frozen one stays as it is."""

from __future__ import annotations

from torch import nn

from asgd_mpi.errors import ConfigError


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the flat vectors hold, in order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def demand_trained(module: nn.Module) -> None:
    """Raise ConfigError if nothing of a network is trained."""
    frozen = [name for name, _ in module.named_parameters()]
    if not frozen:
        raise ConfigError(
            "the network has no parameters: there is nothing to train. Give one that has."
        )
    if not trained(module):
        raise ConfigError(
            f"all {len(frozen)} parameters of the network are frozen (requires_grad=False), from {frozen[0]} to "
            f"{frozen[-1]}: there is nothing to train. Leave requires_grad on for those that are to be trained."
        )
