"""Runs the experts of transformers models on trimtab's dispatch and grouped multiply.

transformers lets every family choose how its stacked experts are computed by a name in the configuration. Under
the name registered here they compile as one graph in float32 and bfloat16, follow autocast, and sum in a fixed
order in forward and backward.

Shape suffixes: T tokens, D model, F hidden, E experts, K top-k, N = T * K rows sorted by expert.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trimtab.dispatch import LocalDispatcher
from trimtab.grouped_mm import grouped_mm, grouped_rows

IMPLEMENTATION = "trimtab"


def use_trimtab_experts(model: nn.Module) -> None:
    """Let a transformers model run its experts on trimtab's kernels, in place.

    Args:
        model: a model whose experts transformers dispatches by name.

    Raises:
        ValueError: the model chooses no experts implementation.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    setter = getattr(model, "set_experts_implementation", None)
    if setter is None:
        raise ValueError(
            f"{type(model).__name__} does not choose its experts by name; use it as it is, with compile disabled"
        )
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    setter(IMPLEMENTATION)


def experts_forward(module: Any, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
    """Outputs of a module's experts, weighted and summed over each token's K.

    Args:
        module: transformers' stacked experts: ``gate_up_proj`` or ``up_proj``, ``down_proj``, their biases.
        x_TD: (T, D) tokens. Gradient flows.
        topk_ids_TK: (T, K) int64 experts of each token. No gradient.
        topk_weights_TK: (T, K) weights. Gradient flows.

    Returns:
        (T, D) in x's dtype.
    """
    dispatcher = LocalDispatcher(num_experts=module.num_experts)
    x_ND, counts_E, plan = dispatcher.dispatch(x_TD, topk_ids_TK, topk_weights_TK, score_before_experts=False)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    h = _linear(module, name, x_ND, counts_E)
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    y_ND = _linear(module, "down_proj", h, counts_E)
    if module.has_post_expert_norm:
        y_ND = module.post_expert_norm(y_ND)
    return dispatcher.combine(y_ND, plan).to(x_TD.dtype)


def _linear(module: Any, name: str, x_ND: Tensor, counts_E: Tensor) -> Tensor:
    weight = getattr(module, name)
    y_NF = grouped_mm(x_ND, weight if module.is_transposed else weight.transpose(1, 2), counts_E)
    if module.has_bias:
        bias = getattr(module, f"{name}_bias")
        y_NF = y_NF + grouped_rows(bias, counts_E, x_ND.shape[0]).to(y_NF.dtype)
    return y_NF
