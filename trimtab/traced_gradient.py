"""The closed-form gradient of all objectives, written for a compiler: `trimtab.gradient` is what runs in eager.

Shapes: T tokens, E experts, K top-k, G groups of tokens.

A compiler forms its loops itself, so nothing is changed in place and no block is cut. What a CPU takes longest with
are sums along a row that wait for each other. Inductor puts all steps of a row into one loop as long as these fit
together; numbers of a row that are stored on their own (`stored`) keep them apart, and each loop then works at
many rows at a time.
"""

from typing import Literal

import torch
from torch import Tensor

from trimtab.scores import shift_of_sigmoid


def traced_gradient(
    logits_TE: Tensor,
    score: Literal["softmax", "sigmoid"],
    target_GE: Tensor | None,
    z_weight: Tensor | None,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
    largest_ids_T1: Tensor | None = None,
    chosen_TK: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Gradient of all objectives with respect to the logits, in formulas that a compiler fuses.

    Args:
        logits_TE: as of `trimtab.gradient.logit_gradient`.
        score: same.
        target_GE: same.
        z_weight: same.
        group_ids_T: same.
        valid_mask_T: same.
        largest_ids_T1: (T, 1) int64 place of the largest logit of each row, if it is known.
        chosen_TK: same.

    Returns:
        (T, E) in the compute dtype, what `trimtab.gradient.logit_gradient` returns to the last few ulps.
    """
    padding_T1 = None if valid_mask_T is None else ~valid_mask_T[:, None]
    target_TE = None if target_GE is None else _spread(target_GE, logits_TE.shape[0], group_ids_T)
    if chosen_TK is not None:
        target_TE = _with_chosen(logits_TE, target_TE, padding_T1, *chosen_TK)
    if largest_ids_T1 is None:
        largest_T1 = logits_TE.amax(dim=-1, keepdim=True)
    else:
        largest_T1 = stored(logits_TE.gather(1, largest_ids_T1))
    if score == "softmax" or target_TE is None:
        grad_TE = _softmax_part(logits_TE, largest_T1, target_TE, z_weight, padding_T1)
    else:
        grad_TE = _sigmoid_part(logits_TE, largest_T1, target_TE)
        if z_weight is not None:
            grad_TE = grad_TE + _softmax_part(logits_TE, largest_T1, None, z_weight, padding_T1)
    # What is chosen is no objective, and padding has it too.
    return grad_TE if padding_T1 is None or chosen_TK is not None else grad_TE.masked_fill(padding_T1, 0)


def _softmax_part(
    logits_TE: Tensor,
    largest_T1: Tensor,
    target_TE: Tensor | None,
    z_weight: Tensor | None,
    padding_T1: Tensor | None,
) -> Tensor:
    """p (target - sum_j target_j p_j + 2 z_weight lse), p = softmax(z): one loop forms exponentials and sums."""
    if target_TE is None and z_weight is None:
        return torch.zeros_like(logits_TE)
    exp_TE = (logits_TE - largest_T1).exp()
    total_T1 = exp_TE.sum(dim=-1, keepdim=True)
    slope_T1 = None
    if z_weight is not None:
        slope_T1 = (largest_T1 + total_T1.log()) * (2 * z_weight)
        if padding_T1 is not None:
            slope_T1 = slope_T1.masked_fill(padding_T1, 0)
    if target_TE is None:
        assert slope_T1 is not None
        return exp_TE * stored(slope_T1 / total_T1)
    # The router's own softmax, where it has one: the compiler takes it for both.
    probs_TE = exp_TE / total_T1
    offset_T1 = (target_TE * probs_TE).sum(dim=-1, keepdim=True)
    if slope_T1 is not None:
        offset_T1 = offset_T1 - slope_T1
    return (target_TE - offset_T1) * probs_TE


def _sigmoid_part(logits_TE: Tensor, largest_T1: Tensor, target_TE: Tensor) -> Tensor:
    """p h (target - sum_j target_j p_j), p = s / sum_j s_j, s = sigmoid(z), h = 1 - s."""
    scores_TE = (logits_TE + stored(shift_of_sigmoid(largest_T1))).sigmoid()
    total_T1 = scores_TE.sum(dim=-1, keepdim=True)
    mean_T1 = (target_TE * scores_TE).sum(dim=-1, keepdim=True) / total_T1
    probs_TE = scores_TE * stored(total_T1.reciprocal())
    return (target_TE - stored(mean_T1)) * probs_TE * (1 - scores_TE)


def stored(values: Tensor) -> Tensor:
    """Values that Inductor then stores, where it would form them again for each use, and its loops part there."""
    if values.device.type != "cpu":
        return values
    return values.as_strided(values.shape, values.stride())


def _spread(target_GE: Tensor, num_tokens: int, group_ids_T: Tensor | None) -> Tensor:
    """(T, E) targets of each token's group."""
    num_groups, num_experts = target_GE.shape
    if num_groups == 1:
        return target_GE.expand(num_tokens, -1)
    if group_ids_T is not None:
        return target_GE.index_select(0, group_ids_T)
    per_group = num_tokens // max(num_groups, 1)
    return target_GE[:, None].expand(-1, per_group, -1).reshape(num_tokens, num_experts)


def _with_chosen(
    logits_TE: Tensor, target_TE: Tensor | None, padding_T1: Tensor | None, ids_TK: Tensor, grad_TK: Tensor
) -> Tensor:
    """(T, E) targets, those of padding zero, and the gradient of what was chosen."""
    if target_TE is None:
        target_TE = torch.zeros_like(logits_TE)
    elif padding_T1 is not None:
        target_TE = target_TE.masked_fill(padding_T1, 0)
    return target_TE.scatter_add(1, ids_TK, grad_TK)
