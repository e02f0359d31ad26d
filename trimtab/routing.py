"""From logits to experts and weights: the plain definition, written with differentiable torch operators.

Shapes: T tokens, E experts, K top-k, H expert groups, N = E / H experts per group.

`trimtab.router.Router` runs these functions; `trimtab.fused` runs them under one autograd node, and its kernels
must equal them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.scores import ScoreName, check_score, compute_dtype, log_scores, scores

GroupScore = Literal["max", "top2_sum"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """How K of E experts are chosen and weighted.

    Attributes:
        top_k: K.
        score: score function s of the logits.
        normalize_top_k: divide the K weights by their sum.
        scale: factor on the weights, applied last.
        score_after_top_k: choose by the logits and take the softmax over the K chosen ones.
        num_expert_groups: H, groups of E / H consecutive experts.
        top_k_groups: groups a token may choose from.
        group_score: value of a group: its best expert, or the sum of its best two.

    Raises:
        ValueError: fields out of range or in contradiction.
    """

    top_k: int
    score: ScoreName
    normalize_top_k: bool
    scale: float = 1.0
    score_after_top_k: bool = False
    num_expert_groups: int = 1
    top_k_groups: int = 1
    group_score: GroupScore = "max"

    def __post_init__(self) -> None:
        check_score(self.score)
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if not 1 <= self.top_k_groups <= self.num_expert_groups:
            raise ValueError(
                f"top_k_groups={self.top_k_groups} must be in [1, num_expert_groups={self.num_expert_groups}]"
            )
        if self.group_score not in ("max", "top2_sum"):
            raise ValueError(f"group_score={self.group_score!r} must be 'max' or 'top2_sum'")
        if self.score_after_top_k and self.score != "softmax":
            raise ValueError(f"score_after_top_k=True needs score='softmax', got {self.score!r}")

    @property
    def limits_groups(self) -> bool:
        """Whether a token may choose from some of the expert groups only."""
        return self.top_k_groups < self.num_expert_groups

    @property
    def normalizes(self) -> bool:
        """Whether a token's weights sum to `scale`."""
        return self.normalize_top_k or self.score_after_top_k

    @property
    def weights_are_local(self) -> bool:
        """Whether a weight depends on the logits of the chosen experts alone, and not on all."""
        return self.normalizes or self.score != "softmax"

    def ranks_logits(self, has_expert_bias: bool) -> bool:
        """Whether experts are ranked by their logits.

        Scores rise with logits, so where nothing is added to them the order is the same, and logits do not
        saturate.
        """
        return self.score_after_top_k or not (has_expert_bias or self.limits_groups)

    def check(self, num_experts: int) -> None:
        """Raise a ValueError if E experts cannot be routed so."""
        if self.top_k > num_experts:
            raise ValueError(f"top_k={self.top_k} must be in [1, num_experts={num_experts}]; lower top_k")
        if num_experts % self.num_expert_groups:
            raise ValueError(
                f"num_expert_groups={self.num_expert_groups} must divide num_experts={num_experts}"
            )
        group_size = num_experts // self.num_expert_groups
        if self.top_k > self.top_k_groups * group_size:
            raise ValueError(
                f"top_k={self.top_k} must be at most {self.top_k_groups * group_size}, the experts in "
                f"top_k_groups={self.top_k_groups} groups of {group_size}"
            )
        if self.limits_groups and self.group_score == "top2_sum" and group_size < 2:
            raise ValueError(f"group_score='top2_sum' needs 2 experts per group, got {group_size}")


def choose(logits_TE: Tensor, routing: Routing, expert_bias_E: Tensor | None) -> Tensor:
    """Experts of every token: the top-k of what ranks them.

    Args:
        logits_TE: (T, E) logits; ranked in float32 at least. No gradient.
        routing: settings.
        expert_bias_E: (E,) added to the scores (to the logits under ``score_after_top_k``), or None.

    Returns:
        (T, K) int64, distinct within a row and always in [0, E): NaN ranks first and -inf last. Which of
        several equal experts are taken is left to `torch.topk`, which gives equal rows equal ids.
    """
    logits_TE = logits_TE.to(compute_dtype(logits_TE.dtype))
    ranks_logits = routing.ranks_logits(expert_bias_E is not None)
    ranks_TE = logits_TE if ranks_logits else scores(logits_TE, routing.score)
    if expert_bias_E is not None:
        ranks_TE = ranks_TE + expert_bias_E
    if routing.limits_groups:
        ranks_TE = _mask_groups(ranks_TE, routing)
    return ranks_TE.topk(routing.top_k, dim=-1).indices


def _mask_groups(ranks_TE: Tensor, routing: Routing) -> Tensor:
    ranks_THN = ranks_TE.unflatten(-1, (routing.num_expert_groups, -1))
    best_per_group = 2 if routing.group_score == "top2_sum" else 1
    ranks_TH = ranks_THN.topk(best_per_group, dim=-1).values.sum(dim=-1)
    kept_ids = ranks_TH.topk(routing.top_k_groups, dim=-1).indices
    dropped_TH = torch.ones_like(ranks_TH, dtype=torch.bool).scatter(-1, kept_ids, False)
    return ranks_THN.masked_fill(dropped_TH.unsqueeze(-1), -torch.inf).flatten(-2)


def weigh(logits_TE: Tensor, ids_TK: Tensor, routing: Routing) -> Tensor:
    """Weights of the chosen experts.

    Args:
        logits_TE: (T, E) logits. Gradient flows.
        ids_TK: (T, K) int64 chosen experts.
        routing: settings.

    Returns:
        (T, K) in the compute dtype; rows sum to ``scale`` if normalised. Gradient flows.
    """
    if routing.normalizes:
        # s_i / sum_j s_j as a softmax of log s: no epsilon that would shrink small scores, no 0 / 0.
        weights_TK = log_scores(logits_TE.gather(1, ids_TK), routing.score).softmax(dim=-1)
    else:
        weights_TK = scores(logits_TE, routing.score).gather(1, ids_TK)
    return weights_TK if routing.scale == 1.0 else weights_TK * routing.scale


def weigh_backward(
    grad_weights_TK: Tensor, logits_TK: Tensor, routing: Routing, derivative_TK: Tensor | None
) -> Tensor:
    """Gradient of `weigh` with respect to the logits of the chosen experts, where no other logit gets any.

        normalised:  dL/dz_k = scale w_k h_k (g_k - sum_j g_j w_j)
        elementwise: dL/dz_k = scale s_k h_k g_k

    Args:
        grad_weights_TK: (T, K) g in the compute dtype.
        logits_TK: (T, K) logits of the chosen experts in the compute dtype.
        routing: settings; not of weights that are a softmax over all experts.
        derivative_TK: (T, K) h = d log s / dz; None for 1.

    Returns:
        (T, K) in the compute dtype.
    """
    grad_TK = grad_weights_TK if routing.scale == 1.0 else grad_weights_TK * routing.scale
    if routing.normalizes:
        share_TK = log_scores(logits_TK, routing.score).softmax(dim=-1)
        grad_TK = torch.ops.aten._softmax_backward_data(grad_TK, share_TK, -1, share_TK.dtype)
    else:
        grad_TK = grad_TK * scores(logits_TK, routing.score)
    return grad_TK if derivative_TK is None else grad_TK * derivative_TK
