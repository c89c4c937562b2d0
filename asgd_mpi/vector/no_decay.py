"""Which parameters weight decay is for: biases, normalisation and positions often go without (--rule.no_decay).

Kinds, as torchvision's references and timm tell them apart:
norm       weight and bias of layers that normalise (torch's, or of a class with Norm in its name), and any weight of one dimension
bias       other parameters whose name ends in `bias`
position   class tokens, embeddings of positions, tables of relative positions
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from asgd_mpi.vector.flat import places
from asgd_mpi.vector.groups import ParameterGroup, Settings

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_POSITIONS = (
    "class_token",
    "cls_token",
    "pos_embed",
    "pos_embedding",
    "position_embedding",
    "relative_position_bias_table",
)


def parameter_groups(module: nn.Module, without_decay: Iterable[str] = ()) -> list[ParameterGroup]:
    """Return a group for each trained parameter of a network; those of the kinds named have no weight decay."""
    kinds, kind_of = set(without_decay), dict(_kinds(module))
    return [
        ParameterGroup(
            place.start,
            place.stop,
            Settings(weight_decay=0.0) if kind_of[id(parameter)] in kinds else Settings(),
        )
        for parameter, place in places(module)
    ]


def _kinds(module: nn.Module) -> Iterator[tuple[int, str]]:
    """Yield the identity and the kind of every parameter; of one that several layers share, the last one's."""
    for layer in module.modules():
        is_norm = isinstance(layer, _NORMS) or "norm" in type(layer).__name__.lower()
        for name, parameter in layer.named_parameters(recurse=False):
            if name in _POSITIONS:
                yield id(parameter), "position"
            elif is_norm:
                yield id(parameter), "norm"
            elif name.endswith("bias"):
                yield id(parameter), "bias"
            else:
                yield id(parameter), "norm" if parameter.dim() == 1 else "weight"
