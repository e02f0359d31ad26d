"""Injection: an autograd node, identity in forward, that adds the losses' gradient in backward.

Shapes: T tokens, K top-k, E experts, D model width, G finest groups, A count maps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab import host_logits, ops
from trimtab.gate import logits_again
from trimtab.gradient import logit_gradient, sum_probs
from trimtab.scores import ScoreName, compute_dtype


class Injection(torch.autograd.Function):
    """Return the routing weights unchanged; in backward add the objectives' gradient to the logits.

    Args:
        weights: top-k weights (T, K), or what else is applied to the experts. Its gradient passes.
        zero: () zero that comes from counting the same forward in a traced model; see `trimtab.ops`.
        logits_TE: (T, E) logits, the output of the gate. Receives the injected gradient; kept for
            backward only if ``gate_weight`` is None, and on the device only if ``place`` is.
        gate_input_TD: (T, D) input of the gate, which the gate keeps anyway, or None.
        gate_weight: (E, D) weight of the gate, to compute the logits again in backward, or None.
        gate_bias: (E,) bias of the gate, or None.
        place: names where logits wait on the host, see `trimtab.host_logits`; None to keep them on the device.
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
        returned: ``weights`` are (2,) zeros of the losses that the caller is given, balance losses and z-losses,
            and the gradient that comes back to them scales what the logits receive.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        zero: Tensor | None,
        logits_TE: Tensor,
        gate_input_TD: Tensor | None,
        gate_weight: Tensor | None,
        gate_bias: Tensor | None,
        place: Tensor | None,
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
        returned: bool = False,
    ) -> Tensor:
        """Identity on ``weights``."""
        held, rows_T0 = gate_input_TD, None
        if gate_weight is None:
            held, rows_T0 = host_logits.hold(logits_TE, place, ticket)
        ctx.save_for_backward(
            held,
            rows_T0,
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
        ctx.has_z, ctx.needs_prob_sums, ctx.returned = has_z, needs_prob_sums, returned
        ctx.logits_dtype = logits_TE.dtype
        # A new tensor and not a view: some models go on to change the weights in place.
        return weights.clone() if zero is None else weights + zero.to(weights.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient of the weights, and give the logits theirs."""
        (
            held,
            rows_T0,
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
        if gate_weight is None:
            held = host_logits.take(grad_weights, held, rows_T0, counts_AGE.shape[2], dtype)
        logits_TE = logits_again(held, gate_weight, gate_bias, dtype).to(compute_dtype(dtype))
        prob_sums_GE = None
        if ctx.needs_prob_sums:
            num_groups = num_tokens_G.shape[0]
            prob_sums_GE = sum_probs(logits_TE, ctx.score, group_ids_T, valid_mask_T, num_groups)
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
        if ctx.returned:
            balance_scale, z_scale = grad_weights.to(logits_TE.dtype).unbind()
            target_GE = None if target_GE is None else target_GE * balance_scale
            z_weight = None if z_weight is None else z_weight * z_scale
        grad_TE = logit_gradient(
            logits_TE,
            ctx.score,
            target_GE,
            z_weight if ctx.has_z else None,
            group_ids_T,
            valid_mask_T,
        )
        return grad_weights, None, grad_TE.to(dtype), *([None] * 16)
