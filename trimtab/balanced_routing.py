"""Fused routing of a router that has a balancer: its microbatch, its counts in the ledger, its gradient.

Shapes: T tokens, E experts, K top-k, B sequences, S length, D model width.
"""

import torch
from torch import Tensor, nn

from trimtab import ops, route_ops
from trimtab.fused import Gate, Observed, with_gradient
from trimtab.gate import KeptGate, kept_gate
from trimtab.hooks import RouterState, current_microbatch, expert_bias, host_place
from trimtab.microbatch import Microbatch
from trimtab.routing import Routing, weigh
from trimtab.taps import record, replayed_ids


def route_balanced(
    state: RouterState,
    module: nn.Module,
    gate_input: Tensor,
    logits_TE: Tensor,
    routing: Routing,
    expert_bias_E: Tensor | None,
    replay_ids_TK: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Weights and ids of a forward whose tokens count: counted, with every objective in their backward.

    Args:
        state: of the router.
        module: the router.
        gate_input: (B, S, D) or (T, D) what it was called with.
        logits_TE: (T, E) logits. Gradient flows.
        routing: settings.
        expert_bias_E: (E,) selection bias, or None.
        replay_ids_TK: (T, K) int64 ids to use instead of choosing, or None.

    Returns:
        (T, K) weights and int64 ids; None where tokens do not count, as in evaluation.
    """
    microbatch = current_microbatch(state, module, gate_input, logits_TE)
    if microbatch is None:
        return None
    gate: KeptGate = (None, None, None)
    if state.injects and logits_TE.requires_grad:
        gate = kept_gate(state, module, gate_input, logits_TE)
    parts = microbatch.parts
    if len(parts) == 1:
        return _route_part(state, parts[0], logits_TE, routing, expert_bias_E, replay_ids_TK, gate)
    nothing = [None] * len(parts)
    routed = [
        _route_part(state, part, part_logits_TE, routing, expert_bias_E, part_ids_TK, (input_TD, *gate[1:]))
        for part, part_logits_TE, part_ids_TK, input_TD in zip(
            parts,
            microbatch.split(logits_TE),
            nothing if replay_ids_TK is None else microbatch.split(replay_ids_TK),
            nothing if gate[0] is None else microbatch.split(gate[0]),
            strict=True,
        )
    ]
    return torch.cat([weights_TK for weights_TK, _ in routed]), torch.cat([ids_TK for _, ids_TK in routed])


def _route_part(
    state: RouterState,
    part: Microbatch,
    logits_TE: Tensor,
    routing: Routing,
    expert_bias_E: Tensor | None,
    replay_ids_TK: Tensor | None,
    gate: KeptGate,
) -> tuple[Tensor, Tensor]:
    """(T, K) weights and ids of one microbatch; for the arguments see `route_balanced`.

    Args:
        state: of the router.
        part: the microbatch.
        logits_TE: (T, E) of its tokens.
        routing: settings.
        expert_bias_E: same.
        replay_ids_TK: same, of its tokens.
        gate: as `trimtab.gate.kept_gate` returns it, with the input of its tokens.
    """
    detached_TE = logits_TE.detach()
    if part.tap is not None:
        replay_ids_TK = _replayed(state, part, detached_TE, routing, expert_bias_E, replay_ids_TK)
    injects = state.injects and logits_TE.requires_grad
    sorted_logits = routing.sorts_logits(expert_bias_E, replay_ids_TK)
    weights_TK, ids_TK, counts_GE, *_ = route_ops.forward(
        detached_TE,
        expert_bias_E,
        replay_ids_TK,
        part.valid_mask_T,
        part.group_ids_T,
        part.num_tokens_G.shape[0],
        False,
        routing,
        injects or not logits_TE.requires_grad,
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
        reads=injects,
    )
    if not injects and logits_TE.requires_grad:
        weights_TK = weigh(logits_TE, ids_TK, routing, sorted_logits)
    if part.tap is not None:
        recorded = record(state, part, detached_TE, ids_TK, weights_TK)
        zero = recorded if zero is None else zero if recorded is None else zero + recorded
    if not injects:
        return weights_TK if zero is None else weights_TK + zero.to(weights_TK.dtype), ids_TK
    input_TD, weight_ED, bias_E = gate
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
        sorted_logits,
        part.group_ids_T,
        part.valid_mask_T,
        observed,
        None if input_TD is None or weight_ED is None else Gate(input_TD, weight_ED, bias_E),
        host_place(state, logits_TE),
    )
    return weights_TK, ids_TK


def _replayed(
    state: RouterState,
    microbatch: Microbatch,
    logits_TE: Tensor,
    routing: Routing,
    expert_bias_E: Tensor | None,
    given_TK: Tensor | None,
) -> Tensor | None:
    """(T, K) ids of `trimtab.replay_routing`, where there are any, else those given."""
    ids_TK = replayed_ids(state, microbatch)
    if ids_TK is None or not microbatch.tap.has_gaps:
        return given_TK if ids_TK is None else ids_TK
    if given_TK is None:
        given_TK = route_ops.forward(
            logits_TE, expert_bias_E, None, None, None, 0, False, routing, with_weights=False
        )[1]
    return torch.where(ids_TK[:, :1] < 0, given_TK, ids_TK)
