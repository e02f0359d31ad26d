"""From logits to experts and weights: the plain definition, written with differentiable torch operators.

Shapes: T tokens, E experts, K top-k, H expert groups, N = E / H experts per group.

`trimtab.route_ops` runs these functions where it has no kernels, and its kernels must equal them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.blocks import token_blocks, tokens_per_block
from trimtab.scores import ScoreName, check_score, compute_dtype, log_scores, scores, shift_of_sigmoid
from trimtab.top_k import largest_ids, largest_ids_of_blocks

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

    def sorts_logits(self, expert_bias_E: Tensor | None, replay_ids_TK: Tensor | None) -> bool:
        """Whether the first of a token's experts is the one with its largest logit."""
        return replay_ids_TK is None and expert_bias_E is None and not self.limits_groups

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
        (T, K) int64, distinct within a row and always in [0, E), in descending order: NaN ranks first and -inf
        last, and of equal experts the lowest ids are taken.
    """
    logits_TE = logits_TE.detach().to(compute_dtype(logits_TE.dtype))
    compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if compiles and logits_TE.device.type == "cpu" and logits_TE.dtype == torch.float32:
        # What forms the ranks is fused with what stands before; the choice is faster than a compiler's.
        return largest_ids_of_blocks(_ranks(logits_TE, routing, expert_bias_E).contiguous(), routing.top_k)
    rows = tokens_per_block(logits_TE, 2)
    if rows >= len(logits_TE):
        return largest_ids(_ranks(logits_TE, routing, expert_bias_E), routing.top_k)
    ids_TK = logits_TE.new_empty(len(logits_TE), routing.top_k, dtype=torch.int64)
    for logits_bE, ids_bK in token_blocks(rows, logits_TE, ids_TK):
        largest_ids(_ranks(logits_bE, routing, expert_bias_E), routing.top_k, ids_bK)
    return ids_TK


def _ranks(logits_TE: Tensor, routing: Routing, expert_bias_E: Tensor | None) -> Tensor:
    """(T, E) what experts are ranked by; -inf outside each token's best groups."""
    if routing.ranks_logits(expert_bias_E is not None):
        ranks_TE = logits_TE if expert_bias_E is None else logits_TE + expert_bias_E
    else:
        ranks_TE = scores(logits_TE, routing.score)
        if expert_bias_E is not None:
            ranks_TE = ranks_TE.add_(expert_bias_E)
    return _mask_groups(ranks_TE, routing) if routing.limits_groups else ranks_TE


def _mask_groups(ranks_TE: Tensor, routing: Routing) -> Tensor:
    ranks_THN = ranks_TE.unflatten(-1, (routing.num_expert_groups, -1))
    if routing.group_score == "top2_sum":
        ranks_TH = ranks_THN.gather(-1, largest_ids(ranks_THN, 2)).sum(dim=-1)
    else:
        ranks_TH = ranks_THN.amax(dim=-1)
    kept_ids = largest_ids(ranks_TH, routing.top_k_groups)
    dropped_TH = torch.ones_like(ranks_TH, dtype=torch.bool).scatter(-1, kept_ids, False)
    return ranks_THN.masked_fill(dropped_TH.unsqueeze(-1), -torch.inf).flatten(-2)


def weigh(logits_TE: Tensor, ids_TK: Tensor, routing: Routing, sorted_logits: bool = False) -> Tensor:
    """Weights of the chosen experts.

    Args:
        logits_TE: (T, E) logits. Gradient flows.
        ids_TK: (T, K) int64 chosen experts.
        routing: settings.
        sorted_logits: the first of each row is the largest, which then need not be looked for.

    Returns:
        (T, K) in the compute dtype; rows sum to ``scale`` if normalised. Gradient flows.
    """
    if routing.normalizes:
        weights_TK = _shares(logits_TE.gather(1, ids_TK), routing, sorted_logits)
    elif routing.score != "softmax":
        weights_TK = scores(logits_TE.gather(1, ids_TK), routing.score)
    else:
        weights_TK = _of_all(logits_TE, ids_TK)
    return weights_TK if routing.scale == 1.0 else weights_TK * routing.scale


def _of_all(logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """(T, K) softmax over all experts, of the chosen ones."""
    rows = tokens_per_block(logits_TE)
    if rows >= len(logits_TE) or (logits_TE.requires_grad and torch.is_grad_enabled()):
        return scores(logits_TE, "softmax").gather(1, ids_TK)
    blocks = token_blocks(rows, logits_TE, ids_TK)
    return torch.cat([scores(logits_bE, "softmax").gather(1, ids_bK) for logits_bE, ids_bK in blocks])


def _shares(logits_TK: Tensor, routing: Routing, sorted_logits: bool) -> Tensor:
    """(T, K) s_i / sum_j s_j, without an epsilon that would shrink small scores and without 0 / 0.

    By hand, as torch.softmax over a last axis as short as K takes four times as long; but where stock routers take
    just this softmax, theirs, bit for bit.
    """
    score = routing.score
    logits_TK = logits_TK.to(compute_dtype(logits_TK.dtype))
    if routing.score_after_top_k:
        return logits_TK.softmax(dim=-1)
    detached_TK = logits_TK.detach()
    largest_T1 = detached_TK[:, :1] if sorted_logits else detached_TK.amax(dim=-1, keepdim=True)
    if score == "sigmoid":
        shares_TK = (logits_TK + shift_of_sigmoid(largest_T1)).sigmoid()
    else:
        shares_TK = (log_scores(logits_TK, score) - log_scores(largest_T1, score)).exp()
    return shares_TK / shares_TK.sum(dim=-1, keepdim=True)


def weigh_backward(
    grad_weights_TK: Tensor,
    logits_TK: Tensor,
    routing: Routing,
    derivative_TK: Tensor | None,
    sorted_logits: bool = False,
) -> Tensor:
    """Gradient of `weigh` with respect to the logits of the chosen experts, where no other logit gets any.

        normalised:  dL/dz_k = scale w_k h_k (g_k - sum_j g_j w_j)
        elementwise: dL/dz_k = scale s_k h_k g_k

    Args:
        grad_weights_TK: (T, K) g in the compute dtype.
        logits_TK: (T, K) logits of the chosen experts in the compute dtype.
        routing: settings; not of weights that are a softmax over all experts.
        derivative_TK: (T, K) h = d log s / dz; None for 1.
        sorted_logits: the first of each row is the largest.

    Returns:
        (T, K) in the compute dtype.
    """
    grad_TK = grad_weights_TK if routing.scale == 1.0 else grad_weights_TK * routing.scale
    if routing.normalizes:
        shares_TK = _shares(logits_TK, routing, sorted_logits)
        grad_TK = grad_TK * shares_TK
        grad_TK = grad_TK.addcmul(shares_TK, grad_TK.sum(dim=-1, keepdim=True), value=-1)
    else:
        grad_TK = grad_TK * scores(logits_TK, routing.score)
    return grad_TK if derivative_TK is None else grad_TK * derivative_TK
