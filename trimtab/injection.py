"""Injection: an autograd node, identity in forward, that adds the losses' gradient in backward.

Shapes: T tokens, K top-k, E experts, D model width, G finest groups, A count maps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab import ops
from trimtab.counts import sum_groups
from trimtab.scores import ScoreName, compute_dtype, log_score_derivative, probs


def logit_gradient(
    logits_TE: Tensor,
    probs_TE: Tensor,
    score: ScoreName,
    target_GE: Tensor,
    z_weight: Tensor | None,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
) -> Tensor:
    """Closed-form gradient of all objectives with respect to the logits.

        dL/dz_te = p_te h(z_te) (target_ge - sum_j target_gj p_tj) + 2 z_weight lse_t softmax(z_t)_e

    Args:
        logits_TE: (T, E) logits z in the compute dtype. No gradient.
        probs_TE: (T, E) probabilities p of the same logits.
        score: score function, gives h.
        target_GE: (G, E) dL/dp of each group.
        z_weight: () dL/d(sum of lse^2), or None without z-loss.
        group_ids_T: (T,) group of each token; None for G contiguous groups of T / G tokens.
        valid_mask_T: (T,) bool, rows that are False get zero; None for all True.

    Returns:
        (T, E) in the compute dtype.
    """
    grad_TE = spread_targets(target_GE, logits_TE.shape[0], group_ids_T)
    softmax_backward(grad_TE, probs_TE)
    derivative_TE = log_score_derivative(logits_TE, score)
    if derivative_TE is not None:
        grad_TE = grad_TE.mul_(derivative_TE)
    if z_weight is not None:
        softmax_TE = probs_TE if score == "softmax" else logits_TE.softmax(dim=-1)
        grad_TE = grad_TE.addcmul_(softmax_TE, z_weight * log_sum_exp(logits_TE, softmax_TE), value=2)
    if valid_mask_T is not None:
        grad_TE = grad_TE.masked_fill_(~valid_mask_T[:, None], 0)
    return grad_TE


def spread_targets(target_GE: Tensor, num_tokens: int, group_ids_T: Tensor | None) -> Tensor:
    """(T, E) targets of each token's group, as a tensor of its own.

    Args:
        target_GE: (G, E) targets.
        num_tokens: T.
        group_ids_T: (T,) group of each token; None for G contiguous groups of T / G tokens.
    """
    num_groups = target_GE.shape[0]
    if num_groups == 1:
        return target_GE.expand(num_tokens, -1).clone(memory_format=torch.contiguous_format)
    if group_ids_T is None:
        return target_GE.repeat_interleave(num_tokens // max(num_groups, 1), dim=0)
    return target_GE.index_select(0, group_ids_T)


def softmax_backward(incoming_TE: Tensor, probs_TE: Tensor) -> None:
    """Replace gradients of p by p (incoming - sum_j incoming_j p_j), as softmax does in its own backward."""
    torch.ops.aten._softmax_backward_data.out(
        incoming_TE, probs_TE, -1, probs_TE.dtype, grad_input=incoming_TE
    )


def log_sum_exp(logits_TE: Tensor, softmax_TE: Tensor) -> Tensor:
    """(T, 1) log-sum-exp of logits whose softmax is known: z - log softmax(z), at the largest, to lose nothing."""
    return logits_TE.amax(dim=-1, keepdim=True) - softmax_TE.amax(dim=-1, keepdim=True).log()


class Injection(torch.autograd.Function):
    """Return the routing weights unchanged; in backward add the objectives' gradient to the logits.

    Args:
        weights: top-k weights (T, K), or what else is applied to the experts. Its gradient passes.
        zero: () zero that comes from counting the same forward; see `trimtab.ops`.
        logits_TE: (T, E) logits, the output of the gate. Receives the injected gradient; kept for
            backward only if ``gate_weight`` is None.
        gate_input_TD: (T, D) input of the gate, which the gate keeps anyway, or None.
        gate_weight: (E, D) weight of the gate, to compute the logits again in backward, or None.
        gate_bias: (E,) bias of the gate, or None.
        counts_AGE: (A, G, E) int64 counts of this microbatch.
        num_tokens_G: (G,) valid tokens of each group.
        sequence_of_group_G: (G,) sequence of each group, or None.
        group_ids_T: (T,) group of each token, or None.
        valid_mask_T: (T,) bool, or None.
        handle: names the ledger row.
        ticket: names the forward.
        num_sequences: B.
        score: score function.
        has_z: some objective is a z-loss.
        needs_prob_sums: some objective reads sums of p.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        zero: Tensor,
        logits_TE: Tensor,
        gate_input_TD: Tensor | None,
        gate_weight: Tensor | None,
        gate_bias: Tensor | None,
        counts_AGE: Tensor,
        num_tokens_G: Tensor,
        sequence_of_group_G: Tensor | None,
        group_ids_T: Tensor | None,
        valid_mask_T: Tensor | None,
        handle: Tensor,
        ticket: Tensor,
        num_sequences: int,
        score: ScoreName,
        has_z: bool,
        needs_prob_sums: bool,
    ) -> Tensor:
        """Identity on ``weights``."""
        held = logits_TE if gate_weight is None else gate_input_TD
        ctx.save_for_backward(
            held,
            gate_weight,
            gate_bias,
            counts_AGE,
            num_tokens_G,
            sequence_of_group_G,
            group_ids_T,
            valid_mask_T,
            handle,
            ticket,
        )
        ctx.num_sequences, ctx.score = num_sequences, score
        ctx.has_z, ctx.needs_prob_sums = has_z, needs_prob_sums
        ctx.logits_dtype = logits_TE.dtype
        # A new tensor and not a view: some models go on to change the weights in place.
        return weights + zero.to(weights.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient of the weights, and give the logits theirs."""
        (
            held,
            gate_weight,
            gate_bias,
            counts_AGE,
            num_tokens_G,
            sequence_of_group_G,
            group_ids_T,
            valid_mask_T,
            handle,
            ticket,
        ) = ctx.saved_tensors
        dtype = ctx.logits_dtype
        logits_TE = held
        if gate_weight is not None:
            bias = None if gate_bias is None else gate_bias.to(dtype)
            logits_TE = F.linear(held.to(dtype), gate_weight.to(dtype), bias)
        logits_TE = logits_TE.to(compute_dtype(dtype))
        probs_TE = probs(logits_TE, ctx.score)
        prob_sums_GE = None
        if ctx.needs_prob_sums:
            counted_TE = probs_TE
            if valid_mask_T is not None:
                counted_TE = probs_TE.masked_fill(~valid_mask_T[:, None], 0)
            prob_sums_GE = sum_groups(counted_TE, group_ids_T, num_tokens_G.shape[0])
        target_GE, z_weight = ops.bind(
            grad_weights,
            handle,
            ticket,
            counts_AGE,
            num_tokens_G,
            sequence_of_group_G,
            ctx.num_sequences,
            prob_sums_GE,
            dtype,
        )
        grad_TE = logit_gradient(
            logits_TE,
            probs_TE,
            ctx.score,
            target_GE,
            z_weight if ctx.has_z else None,
            group_ids_T,
            valid_mask_T,
        )
        return grad_weights, None, grad_TE.to(dtype), *([None] * 14)
