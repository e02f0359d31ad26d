"""Fused routing of a router that has a balancer: its microbatch, its counts in the ledger, its gradient.

Shapes: T tokens, E experts, K top-k, B sequences, S length, D model width.
"""

from torch import Tensor, nn

from trimtab import ops, route_ops
from trimtab.fused import Gate, Observed, with_gradient
from trimtab.hooks import RouterState, current_microbatch, expert_bias, kept_gate
from trimtab.routing import Routing


def route_balanced(
    state: RouterState,
    module: nn.Module,
    gate_input: Tensor,
    logits_TE: Tensor,
    routing: Routing,
    expert_bias_E: Tensor | None,
    replay_ids_TK: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Weights and ids of one microbatch, counted, with every objective in their backward.

    Args:
        state: of the router.
        module: the router.
        gate_input: (B, S, D) or (T, D) what it was called with.
        logits_TE: (T, E) logits. Gradient flows.
        routing: settings.
        expert_bias_E: (E,) selection bias, or None.
        replay_ids_TK: (T, K) int64 ids to use instead of choosing, or None.

    Returns:
        (T, K) weights and int64 ids; None where nothing is injected, in evaluation, or where one forward holds
        several microbatches: these are for the hook.
    """
    if not (state.injects and logits_TE.requires_grad):
        return None
    microbatch = current_microbatch(state, module, gate_input, logits_TE)
    if microbatch is None or len(microbatch.parts) > 1:
        return None
    (part,) = microbatch.parts
    detached_TE = logits_TE.detach()
    weights_TK, ids_TK, counts_GE, *_ = route_ops.forward(
        detached_TE,
        expert_bias_E,
        replay_ids_TK,
        part.valid_mask_T,
        part.group_ids_T,
        part.num_tokens_G.shape[0],
        False,
        routing,
    )
    num_sequences = 0 if part.sequence_of_group_G is None else part.num_sequences
    counts_AGE, zero = ops.observe(
        state.handle,
        part.ticket,
        detached_TE,
        ids_TK,
        expert_bias(state),
        part.group_ids_T,
        part.valid_mask_T,
        part.num_tokens_G,
        part.sequence_of_group_G,
        num_sequences,
        state.num_maps,
        counts_GE,
    )
    input_TD, weight_ED, bias_E = kept_gate(state, module, gate_input, logits_TE)
    gate = None if input_TD is None or weight_ED is None else Gate(input_TD, weight_ED, bias_E)
    observed = Observed(
        zero,
        counts_AGE,
        part.num_tokens_G,
        part.sequence_of_group_G,
        state.handle,
        part.ticket,
        num_sequences,
        state.has_z,
        state.needs_prob_sums,
    )
    weights_TK = with_gradient(
        logits_TE,
        weights_TK,
        ids_TK,
        routing,
        part.group_ids_T,
        part.valid_mask_T,
        observed,
        gate,
    )
    return weights_TK, ids_TK
