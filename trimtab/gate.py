"""The gate of a router, as backward needs it to have the logits again without their being kept.

Shapes: T tokens, E experts, D model width.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from trimtab.hooks import RouterState

# (T, D) input, (E, D) weight and (E,) bias; all None where logits are kept instead.
KeptGate = tuple[Tensor | None, Tensor | None, Tensor | None]


def kept_gate(state: "RouterState", module: nn.Module, gate_input: Tensor, logits_TE: Tensor) -> KeptGate:
    """(T, D) input, weight and bias of the gate, to compute logits again from; three times None to keep logits.

    Args:
        state: of the router.
        module: the router.
        gate_input: what it was called with.
        logits_TE: (T, E) that the gate made of it.
    """
    # Holding an input that nobody else holds would cost more than the logits. A frozen gate does not hold its
    # input, and under autocast gates hold a cast copy.
    if state.gate_weight is None or torch.is_autocast_enabled(gate_input.device.type):
        return None, None, None
    weight = getattr(module, state.gate_weight)
    held_by_gate = weight.requires_grad and gate_input.dtype == logits_TE.dtype
    if not (state.keeps_input or held_by_gate):
        return None, None, None
    bias = None if state.gate_bias is None else getattr(module, state.gate_bias).detach()
    return gate_input.detach().reshape(-1, gate_input.shape[-1]), weight.detach(), bias


def logits_again(
    held: Tensor | None, gate_weight_ED: Tensor | None, gate_bias_E: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(T, E) logits in backward: computed again by their gate, or as they were held.

    Args:
        held: (T, D) input of the gate, or (T, E) logits if there is no ``gate_weight_ED``.
        gate_weight_ED: (E, D) weight of the gate, or None.
        gate_bias_E: (E,) bias of the gate, or None.
        dtype: of the logits.
    """
    assert held is not None
    if gate_weight_ED is None:
        return held
    bias_E = None if gate_bias_E is None else gate_bias_E.to(dtype)
    return F.linear(held.to(dtype), gate_weight_ED.to(dtype), bias_E)
