"""The closed-form gradient of all objectives with respect to the logits, in one pass over the tokens.

Shapes: T tokens, E experts, K top-k, G groups of tokens, b tokens of a block (`trimtab.blocks`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.blocks import is_readable, token_blocks, tokens_per_block
from trimtab.counts import sum_groups
from trimtab.scores import ScoreName, log_score_derivative, probs, shift_of_sigmoid
from trimtab.traced_gradient import traced_gradient

_SIGMOID_OF_SHIFTED = math.exp(-36.0)
_FAIR_SHARE = 2.0**-12


def logit_gradient(
    logits_TE: Tensor,
    score: ScoreName,
    target_GE: Tensor | None,
    z_weight: Tensor | None,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
    likely_ids_T1: Tensor | None = None,
    chosen_TK: tuple[Tensor, Tensor] | None = None,
    *,
    likely_is_largest: bool = False,
) -> Tensor:
    """Closed-form gradient of all objectives with respect to the logits.

        dL/dz_te = p_te h(z_te) (target_ge - sum_j target_gj p_tj) + 2 z_weight lse_t softmax(z_t)_e

    Args:
        logits_TE: (T, E) logits z in the compute dtype. No gradient.
        score: score function, gives p and h.
        target_GE: (G, E) dL/dp of each group, (1, E) for all tokens, or None without balance loss.
        z_weight: () dL/d(sum of lse^2), or None without z-loss.
        group_ids_T: (T,) group of each token; None for G contiguous groups of T / G tokens.
        valid_mask_T: (T,) bool, rows that are False get zero; None for all True.
        likely_ids_T1: (T, 1) int64 an expert of each row whose logit is large, as the first chosen one; or None.
        chosen_TK: (T, K) int64 experts and (T, K) further dL/dp of these, masked or not.
        likely_is_largest: that logit is known to be the row's largest.

    Returns:
        (T, E) in the compute dtype. Memory besides: one block on a CPU, elsewhere one (T, E) temporary.
    """
    if torch.compiler.is_compiling() and score != "sqrt_softplus":
        largest_T1 = likely_ids_T1 if likely_is_largest else None
        objectives = target_GE, z_weight, group_ids_T, valid_mask_T
        return traced_gradient(logits_TE, score, *objectives, largest_T1, chosen_TK)
    num_tokens, num_experts = logits_TE.shape
    has_target = target_GE is not None or chosen_TK is not None
    if target_GE is None:
        grad_TE = logits_TE.new_zeros(num_tokens, num_experts)
    else:
        grad_TE = _spread(target_GE, num_tokens, group_ids_T)
    # The slope of sqrt-softplus is formed in several steps.
    rows = tokens_per_block(logits_TE, 8 if score == "sqrt_softplus" else 1)
    scratch_bE = logits_TE.new_empty(rows, num_experts) if rows < num_tokens else None
    ids_TK, grad_TK = (None, None) if chosen_TK is None else chosen_TK
    blocks = token_blocks(rows, grad_TE, logits_TE, valid_mask_T, likely_ids_T1, ids_TK, grad_TK)
    for grad_bE, logits_bE, valid_b, likely_ids_b1, ids_bK, grad_bK in blocks:
        padding_b1 = None if valid_b is None else ~valid_b[:, None]
        if ids_bK is not None:
            if padding_b1 is not None and target_GE is not None:
                grad_bE.masked_fill_(padding_b1, 0)
            grad_bE.scatter_add_(1, ids_bK, grad_bK)
        scratch = None if scratch_bE is None else scratch_bE[: len(grad_bE)]
        z = None if z_weight is None else _Z(z_weight, likely_ids_b1, likely_is_largest, padding_b1)
        # What is chosen is no objective: its gradient passes the same softmax, and padding has it too.
        mask_b1 = padding_b1 if ids_bK is None else None
        _block(grad_bE, logits_bE, score, has_target, mask_b1, scratch, z)
    return grad_TE


class _Z(NamedTuple):
    """What the z-loss of a block needs beside logits and their softmax."""

    weight: Tensor
    likely_ids_b1: Tensor | None
    likely_is_largest: bool
    padding_b1: Tensor | None


def _block(
    grad_bE: Tensor,
    logits_bE: Tensor,
    score: ScoreName,
    has_target: bool,
    mask_b1: Tensor | None,
    scratch_bE: Tensor | None,
    z: _Z | None,
) -> None:
    """Replace targets by the gradient, with one temporary of the block's size."""
    softmax_bE = None
    if score == "softmax":
        softmax_bE = torch.softmax(logits_bE, dim=-1, out=scratch_bE)
        if has_target:
            _softmax_backward(grad_bE, softmax_bE)
    elif score == "sigmoid" and has_target:
        scores_bE, total_b1 = _sigmoid_and_sum(logits_bE, scratch_bE)
        _softmax_backward(grad_bE, scores_bE.div_(total_b1))
        # h = 1 - s: off by half an ulp of 1, as against sigmoid(-z), where a second sigmoid would double the time.
        grad_bE.addcmul_(grad_bE, scores_bE.mul_(total_b1), value=-1)
    elif has_target:
        _softmax_backward(grad_bE, probs(logits_bE, score))
        derivative_bE = log_score_derivative(logits_bE, score)
        assert derivative_bE is not None
        grad_bE.mul_(derivative_bE)
    if z is not None:
        if softmax_bE is None:
            softmax_bE = torch.softmax(logits_bE, dim=-1, out=scratch_bE)
        _add_z(grad_bE, logits_bE, softmax_bE, z)
    if mask_b1 is not None:
        grad_bE.masked_fill_(mask_b1, 0)


def _sigmoid_and_sum(logits_bE: Tensor, out_bE: Tensor | None) -> tuple[Tensor, Tensor]:
    """(b, E) sigmoid(z + shift) and its (b, 1) sums; see `trimtab.scores.shift_of_sigmoid`."""
    if is_readable(logits_bE):
        scores_bE = torch.sigmoid(logits_bE, out=out_bE)
        total_b1 = scores_bE.sum(dim=-1, keepdim=True)
        # No sum is as large as this unless some logit of its row is, and then no shift is needed.
        if total_b1.numel() == 0 or float(total_b1.amin()) > logits_bE.shape[1] * _SIGMOID_OF_SHIFTED:
            return scores_bE, total_b1
    shift_b1 = shift_of_sigmoid(logits_bE.amax(dim=-1, keepdim=True))
    scores_bE = torch.add(logits_bE, shift_b1, out=out_bE).sigmoid_()
    return scores_bE, scores_bE.sum(dim=-1, keepdim=True)


def add_z_gradient(
    grad_TE: Tensor, logits_TE: Tensor, z_weight: Tensor, likely_ids_T1: Tensor, valid_mask_T: Tensor | None
) -> None:
    """Add the gradient of the z-loss, 2 z_weight lse_t softmax(z_t)_e, in place.

    Args:
        grad_TE: (T, E) what is added to, in the compute dtype.
        logits_TE: (T, E) logits in the same dtype. No gradient.
        z_weight: () dL/d(sum of lse^2).
        likely_ids_T1: (T, 1) int64 an expert of each row whose logit is large.
        valid_mask_T: (T,) bool, rows that are False get nothing; None for all True.
    """
    rows = tokens_per_block(logits_TE)
    scratch_bE = torch.empty_like(logits_TE[:rows])
    blocks = token_blocks(rows, grad_TE, logits_TE, likely_ids_T1, valid_mask_T)
    for grad_bE, logits_bE, likely_ids_b1, valid_b in blocks:
        softmax_bE = torch.softmax(logits_bE, dim=-1, out=scratch_bE[: len(grad_bE)])
        padding_b1 = None if valid_b is None else ~valid_b[:, None]
        _add_z(grad_bE, logits_bE, softmax_bE, _Z(z_weight, likely_ids_b1, False, padding_b1))


def _add_z(grad_bE: Tensor, logits_bE: Tensor, softmax_bE: Tensor, z: _Z) -> None:
    slope_b1 = log_sum_exp(logits_bE, softmax_bE, z.likely_ids_b1, z.likely_is_largest).mul_(z.weight)
    if z.padding_b1 is not None:
        slope_b1 = slope_b1.masked_fill_(z.padding_b1, 0)
    grad_bE.addcmul_(softmax_bE, slope_b1, value=2)


def log_sum_exp(
    logits_bE: Tensor, softmax_bE: Tensor, likely_ids_b1: Tensor | None, likely_is_largest: bool = False
) -> Tensor:
    """(b, 1) log-sum-exp of the logits, z - log softmax(z) at one expert of each row: no more exponentials.

    It is off by an ulp of log softmax(z), little at an expert with 2^-12 or more; other rows take their largest.

    Args:
        logits_bE: (b, E) logits. No gradient.
        softmax_bE: (b, E) their softmax, in the compute dtype.
        likely_ids_b1: (b, 1) int64 experts with large logits; None to look for the largest.
        likely_is_largest: these are the largest.
    """
    if likely_ids_b1 is None or not (likely_is_largest or is_readable(logits_bE)):
        largest_b1 = logits_bE.amax(dim=-1, keepdim=True).to(softmax_bE.dtype)
        return largest_b1 - softmax_bE.amax(dim=-1, keepdim=True).log_()
    chosen_b1, probs_b1 = logits_bE.gather(1, likely_ids_b1), softmax_bE.gather(1, likely_ids_b1)
    if not likely_is_largest and probs_b1.numel() and not float(probs_b1.amin()) > _FAIR_SHARE:
        serves_b1 = probs_b1 > _FAIR_SHARE
        chosen_b1 = torch.where(serves_b1, chosen_b1, logits_bE.amax(dim=-1, keepdim=True))
        probs_b1 = torch.where(serves_b1, probs_b1, softmax_bE.amax(dim=-1, keepdim=True))
    return chosen_b1 - probs_b1.log_()


def sum_probs(
    logits_TE: Tensor,
    score: ScoreName,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
    num_groups: int,
) -> Tensor:
    """(G, E) sums of p over each group's valid tokens.

    Args:
        logits_TE: (T, E) logits. No gradient.
        score: score function.
        group_ids_T: (T,) group of each token; None for G contiguous groups of T / G tokens.
        valid_mask_T: (T,) bool; None for all True.
        num_groups: G.
    """
    probs_TE = probs(logits_TE, score)
    if valid_mask_T is not None:
        probs_TE = probs_TE.masked_fill(~valid_mask_T[:, None], 0)
    return sum_groups(probs_TE, group_ids_T, num_groups)


def _spread(target_GE: Tensor, num_tokens: int, group_ids_T: Tensor | None) -> Tensor:
    """(T, E) targets of each token's group, as a tensor of its own."""
    num_groups = target_GE.shape[0]
    if num_groups == 1:
        return target_GE.expand(num_tokens, -1).clone(memory_format=torch.contiguous_format)
    if group_ids_T is None:
        # Not repeat_interleave, which returns a view: autograd adds a router's own gradient in place to this one
        # only if nothing else holds its memory.
        grad_TE = target_GE.new_empty(num_tokens, target_GE.shape[1])
        per_group = num_tokens // max(num_groups, 1)
        grad_TE.view(num_groups, per_group, target_GE.shape[1]).copy_(target_GE[:, None])
        return grad_TE
    return target_GE.index_select(0, group_ids_T)


def _softmax_backward(incoming_bE: Tensor, probs_bE: Tensor) -> None:
    """Replace gradients of p by p (incoming - sum_j incoming_j p_j), as softmax does in its own backward."""
    torch.ops.aten._softmax_backward_data.out(
        incoming_bE, probs_bE, -1, probs_bE.dtype, grad_input=incoming_bE
    )
