"""Low-rank adapters of stacked experts: each expert has its own pair of matrices beside each of its weights.

    y = W_e x + scale * B_e A_e x

The two thin products run on the same grouped multiply as the experts, on the rows that are there anyway; B A, as
large as the experts, is never made.

Shapes: N rows sorted by expert, E experts, e experts of this rank, D inner and F outer width of a weight, r rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from trimtab.experts import grouped_linear
from trimtab.parallel.mesh import Mesh
from trimtab.parallel.placements import local

# Child of a module of stacked experts.
LORA_A, LORA_B = "lora_A", "lora_B"
_SCALE, _DROPOUT = "_trimtab_lora_scale", "_trimtab_lora_dropout"


class Stacked(nn.Module):
    """One half of the adapters of a module of experts, under the names of the weights they are added to."""


def add_expert_adapters(
    experts: nn.Module, *, rank: int, scale: float, dropout: float, transposed: bool, mesh: Mesh | None
) -> tuple[Stacked, Stacked]:
    """Give the weights of stacked experts adapters, on the meta device, and freeze the experts.

    Args:
        experts: holds (E, ., .) weights; whole, or divided over ep.
        rank: r.
        scale: of B A.
        dropout: of each row of x while it trains.
        transposed: weights are (E, in, out).
        mesh: what the experts are divided over; None for one process.

    Returns:
        All A, and all B.

    Raises:
        ValueError: experts whose hidden layers are divided over etp.
    """
    if mesh is not None and mesh.size("etp") > 1:
        raise ValueError(
            "adapters of experts: each expert's A is one matrix for all of its hidden layer, which ranks of etp "
            "divide; set etp=1"
        )
    lora_a, lora_b = Stacked(), Stacked()
    for name, weight in experts.named_parameters(recurse=False):
        weight.requires_grad_(False)
        if weight.dim() != 3:
            continue
        num_experts, first, second = weight.shape
        width_in, width_out = (first, second) if transposed else (second, first)
        for half, shape in ((lora_a, (rank, width_in)), (lora_b, (width_out, rank))):
            half.register_parameter(name, _empty((num_experts, *shape), weight, mesh))
    experts.add_module(LORA_A, lora_a)
    experts.add_module(LORA_B, lora_b)
    setattr(experts, _SCALE, scale)
    setattr(experts, _DROPOUT, dropout)
    return lora_a, lora_b


def expert_adapter(experts: nn.Module, name: str, x_ND: Tensor, counts_e: Tensor) -> Tensor | None:
    """What the adapter of one weight adds to its product, (N, F); None if it has none.

    Args:
        experts: the module.
        name: of the weight.
        x_ND: (N, D) rows sorted by expert. Gradient flows.
        counts_e: (e,) rows of each expert.
    """
    lora_a = getattr(experts, LORA_A, None)
    if lora_a is None:
        return None
    a_erD, b_eFr = (local(getattr(half, name)) for half in (lora_a, getattr(experts, LORA_B)))
    if (dropout := getattr(experts, _DROPOUT)) > 0:
        x_ND = F.dropout(x_ND, dropout, training=experts.training)
    h_Nr = grouped_linear(x_ND, a_erD, None, counts_e, transposed=False)
    return grouped_linear(h_Nr, b_eFr, None, counts_e, transposed=False) * getattr(experts, _SCALE)


@torch.no_grad()
def draw_a(half: nn.Module) -> None:
    """Initial values of first halves: uniform in +-1 / sqrt(D), as Kaiming's rule with a = sqrt(5) has it."""
    for parameter in half.parameters(recurse=False):
        bound = parameter.shape[-1] ** -0.5
        parameter.uniform_(-bound, bound)


@torch.no_grad()
def draw_b(half: nn.Module) -> None:
    """Initial values of second halves: zero, so that a model with new adapters is the one without."""
    for parameter in half.parameters(recurse=False):
        parameter.zero_()


def _empty(shape: tuple[int, ...], weight: Tensor, mesh: Mesh | None) -> nn.Parameter:
    if not isinstance(weight, DTensor) or mesh is None:
        return nn.Parameter(torch.empty(shape, dtype=weight.dtype, device="meta"))
    part = torch.empty(shape[0] // mesh.size("ep"), *shape[1:], dtype=weight.dtype, device="meta")
    placements = (Shard(0), Replicate())
    return nn.Parameter(DTensor.from_local(part, mesh.device_mesh("ep", "etp"), placements, run_check=False))
