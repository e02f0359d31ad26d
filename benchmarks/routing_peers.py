"""transformers' and Megatron-Core's losses on a routing, and Megatron's own router.

Peers get the router's probabilities handed to them where their functions accept them, which is more than their own
callers do.

Shapes: T tokens, B sequences, D width, E experts, K top-k.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.routing_nets import COEF, Case, Losses, Net, Variant, add_parameters

_OBJECTIVES = ("sequence", "batch", "z", "sequence + z")
_OWN_BASE = "Megatron router: none"


class TransformersLosses(Losses):
    """transformers' `load_balancing_loss_func`: softmax, top-k and counts again, pooled over layers."""

    def __init__(self, case: Case) -> None:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        self.case, self.function = case, load_balancing_loss_func

    def model(self, logits: Sequence[Tensor]) -> Tensor:
        return COEF * self.function(tuple(logits), self.case.num_experts, self.case.top_k)


def megatron_utils() -> Any:
    """Megatron-Core's module of router functions, or None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.transformer.moe import moe_utils
    except ImportError:
        return None
    return moe_utils


class MegatronLosses(Losses):
    """Megatron's loss functions on the common routing: its scores and counts are handed over."""

    def __init__(self, case: Case, objective: str) -> None:
        self.case, self.objective, self.utils = case, objective, megatron_utils()

    def layer(self, routed: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        logits_TE, weights_TK, ids_TK, scores_TE = routed
        if "z" in self.objective:
            # Megatron ties its z-loss to the logits; the routing here has run, so it is tied to the weights.
            z_loss = self.utils.z_loss_func(logits_TE, COEF)
            weights_TK = self.utils.MoEAuxLossAutoScaler.apply(weights_TK, z_loss)
        if self.objective != "z":
            case = self.case
            if case.score != "softmax":
                scores_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
            groups = case.sequences if "sequence" in self.objective else 1
            # Rows are (length, batch) as Megatron has them: a sequence is every B-th row.
            ids = ids_TK.view(-1, groups, case.top_k) + torch.arange(groups)[:, None] * case.num_experts
            counts = torch.zeros(groups * case.num_experts, dtype=torch.int64)
            counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))
            weights_TK = _balance(self.utils, case, groups, scores_TE, counts, weights_TK)
        return weights_TK, None


def _balance(
    utils: Any, case: Case, groups: int, scores_TE: Tensor, counts: Tensor, output: Tensor
) -> Tensor:
    scores = scores_TE.reshape(case.tokens // groups, -1)
    loss = utils.switch_load_balancing_loss_func(
        probs=scores,
        tokens_per_expert=counts,
        total_num_tokens=scores.shape[0],
        topk=case.top_k,
        num_experts=case.num_experts,
        moe_aux_loss_coeff=COEF,
    )
    return utils.MoEAuxLossAutoScaler.apply(output, loss / groups)


class MegatronRouter(nn.Module):
    """Megatron's router as its own `TopKRouter.routing` calls it, without communication and logging."""

    objective = "none"

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.utils = case, megatron_utils()
        self.register_buffer("expert_bias_E", None)
        add_parameters(self, case)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and dense (T, E) weights."""
        case, utils = self.case, self.utils
        logits_TE = F.linear(x, self.weight) if hasattr(self, "weight") else x
        if "z" in self.objective:
            logits_TE = utils.MoEAuxLossAutoScaler.apply(logits_TE, utils.z_loss_func(logits_TE, COEF))
        weights_TE, _ = utils.topk_routing_with_score_function(
            logits_TE, case.top_k, score_function=case.score, expert_bias=self.expert_bias_E
        )
        if "sequence" in self.objective or "batch" in self.objective:
            routing_map, scores_TE = utils.compute_routing_scores_for_aux_loss(
                logits_TE, case.top_k, case.score
            )
            groups = case.sequences if "sequence" in self.objective else 1
            counts = routing_map.reshape(case.tokens // groups, -1).sum(dim=0)
            weights_TE = _balance(utils, case, groups, scores_TE, counts, weights_TE)
        return logits_TE, weights_TE


def _router(objective: str) -> type[MegatronRouter]:
    return type(f"MegatronRouter_{objective}", (MegatronRouter,), {"objective": objective})


def peer_variants(case: Case) -> list[Variant]:
    """What is installed of the peers, and serves the case."""
    variants = []
    if case.score == "softmax":
        net = Net(case, TransformersLosses(case))
        variants.append(Variant("transformers", "batch", net, reference_factor=float(case.top_k)))
    if megatron_utils() is None:
        return variants
    for objective in _OBJECTIVES:
        net = Net(case, MegatronLosses(case, objective))
        variants.append(Variant("Megatron functions", objective, net, interleaved=True))
    for objective in ("none", *_OBJECTIVES):
        variant = Variant(
            "Megatron router", objective, Net(case, router=_router(objective)), own_base=_OWN_BASE
        )
        # Its loss counts the top-k of the scores, whatever bias chose the experts.
        variant.interleaved, variant.unbiased, variant.dense = True, True, True
        variants.append(variant)
    return variants
