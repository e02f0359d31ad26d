"""A stock transformers model divided over a mesh: attention over tp and cp, experts over ep and etp.

What is left is FSDP, which `trimtab.parallel.fsdp.shard_parameters` does with the modules named here; between
the two, layers are compiled.
"""

from dataclasses import dataclass

from torch import nn

from trimtab.integrations.attention import parallelize_attention
from trimtab.integrations.experts import parallelize_experts
from trimtab.integrations.mtp import mtp_layers
from trimtab.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Divided:
    """Modules whose own parameters are divided already, for FSDP to group by themselves.

    Args:
        experts: stacked experts, divided over ep and etp.
        heads: linears of each attention, divided over tp.
    """

    experts: list[nn.Module]
    heads: list[list[nn.Module]]


def parallelize(model: nn.Module, mesh: Mesh) -> Divided:
    """Divide a transformers model, or one pipeline stage of it, in place.

    Every rank calls it on the same weights, after `use_trimtab_experts` and before compile and FSDP.

    Args:
        model: the model.
        mesh: the ranks.

    Raises:
        ValueError: attention or experts that cannot be divided, or not by these degrees.
    """
    heads = parallelize_attention(model, mesh)
    if mesh.size("ep") == mesh.size("etp") == 1:
        return Divided([], heads)
    return Divided(parallelize_experts(model, mesh), heads)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model that have parameters: the first list of modules that are decoder layers.

    Those of multi-token prediction, which are made of one each, come after them.

    Raises:
        ValueError: the model has none.
    """
    for module in model.modules():
        if not (isinstance(module, nn.ModuleList) and len(module)):
            continue
        # A pipeline stage has stand-ins without parameters where other stages have layers.
        layers = [layer for layer in module if next(layer.parameters(), None) is not None]
        if layers and all("Layer" in type(layer).__name__ for layer in layers):
            return [*layers, *mtp_layers(model)]
    raise ValueError(f"{type(model).__name__} has no list of decoder layers; set compile.enable to false")
