"""Fused routing: one autograd node from logits to weights, whose backward holds every objective.

Shapes: T tokens, E experts, K top-k, G groups of tokens (the finest any objective asks for), D model width,
A count maps.

Data flow. Forward: `trimtab.route_ops.forward` chooses, weighs and counts; nothing of it is differentiated.
`FusedRouting` hands the weights on and keeps what backward needs: one (T, E) tensor, the logits, or not even these
where they are computed again from the gate's input. Backward: the targets are read where the composable path
(`trimtab.injection`) reads them too, and one pass forms the gradient of the logits: of the weights, of all balance
objectives and of the z-loss.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab import host_logits, ops, route_ops
from trimtab.gate import logits_again
from trimtab.gradient import sum_probs
from trimtab.routing import Routing


class RoutingSums(NamedTuple):
    """What may be logged of a forward.

    Args:
        prob_sums_GE: (G, E) sums of p over each group's valid tokens.
        lse_T: (T,) log-sum-exp of each token's logits.
        entropy_T: (T,) entropy of each token's p in nats.
    """

    prob_sums_GE: Tensor
    lse_T: Tensor
    entropy_T: Tensor


class Routed(NamedTuple):
    """Result of `route`.

    Args:
        weights_TK: (T, K) weights in the compute dtype. Gradient flows.
        ids_TK: (T, K) int64 experts.
        counts_GE: (G, E) int64 assignments of each group's valid tokens.
        sums: what may be logged, if asked for.
    """

    weights_TK: Tensor
    ids_TK: Tensor
    counts_GE: Tensor
    sums: RoutingSums | None


class Gate(NamedTuple):
    """The gate, to compute the logits again in backward instead of keeping them.

    Args:
        input_TD: (T, D) its input, which it keeps anyway.
        weight_ED: (E, D).
        bias_E: (E,) or None.
    """

    input_TD: Tensor
    weight_ED: Tensor
    bias_E: Tensor | None


class Observed(NamedTuple):
    """A forward that a ledger has counted, where backward finds its targets; see `trimtab.ops`.

    Args:
        zero: () that comes from counting in a traced model, or None.
        counts_AGE: (A, G, E) counts of this microbatch.
        num_tokens_G: (G,) valid tokens of each group.
        sequence_of_group_G: (G,) sequence of each group, or None.
        handle: names the ledger row.
        ticket: names the forward.
        num_sequences: B.
        has_z: some objective is a z-loss.
        needs_prob_sums: some objective reads sums of p.
    """

    zero: Tensor | None
    counts_AGE: Tensor
    num_tokens_G: Tensor
    sequence_of_group_G: Tensor | None
    handle: Tensor
    ticket: Tensor
    num_sequences: int
    has_z: bool
    needs_prob_sums: bool


def route(
    logits_TE: Tensor,
    routing: Routing,
    *,
    expert_bias_E: Tensor | None = None,
    replay_ids_TK: Tensor | None = None,
    valid_mask_T: Tensor | None = None,
    group_ids_T: Tensor | None = None,
    num_groups: int = 1,
    target_GE: Tensor | None = None,
    z_weight: Tensor | None = None,
    with_sums: bool = False,
) -> Routed:
    """Route every token; backward adds the gradient of balance objectives with the targets given.

        dL/dz = (d weights / dz)^T g + p h (target_g - sum_j target_gj p_j) + 2 z_weight lse softmax(z)

    Targets are read in backward: tensors that are filled after this call, from its counts, serve as well.

    Args:
        logits_TE: (T, E) logits z, computed with in float32 or float64. Gradient flows. A NaN logit ranks first,
            and its token's weights and gradient are NaN; -inf ranks last.
        routing: settings.
        expert_bias_E: (E,) added for selection only. No gradient.
        replay_ids_TK: (T, K) integer ids in [0, E) to use instead of choosing; unchecked.
        valid_mask_T: (T,) bool; False is neither counted nor balanced, but gets weights as any token.
        group_ids_T: (T,) int64 group of each token in [0, G); None for G contiguous groups of T / G tokens.
        num_groups: G.
        target_GE: (G, E) dL/dp of each group, (1, E) for all tokens, or None without balance objective.
        z_weight: () dL/d(sum of lse^2), or None without z-loss.
        with_sums: also form what may be logged.

    Returns:
        Weights, ids, counts and sums. Equal rows of logits get equal ids.

    Raises:
        ValueError: shapes, dtypes or settings that contradict each other.
    """
    given = {
        "expert_bias_E": expert_bias_E,
        "replay_ids_TK": replay_ids_TK,
        "valid_mask_T": valid_mask_T,
        "group_ids_T": group_ids_T,
        "target_GE": target_GE,
    }
    _check(logits_TE, routing, num_groups, given)
    weights_TK, ids_TK, counts_GE, *sums = route_ops.forward(
        logits_TE.detach(),
        expert_bias_E,
        replay_ids_TK,
        valid_mask_T,
        group_ids_T,
        num_groups,
        with_sums,
        routing,
    )
    if logits_TE.requires_grad and torch.is_grad_enabled():
        weights_TK = FusedRouting.apply(
            logits_TE,
            weights_TK,
            ids_TK,
            group_ids_T,
            valid_mask_T,
            routing,
            routing.sorts_logits(expert_bias_E, replay_ids_TK),
            *(None, None, None, None),
            target_GE,
            z_weight,
            *([None] * 9),
        )
    return Routed(weights_TK, ids_TK, counts_GE, RoutingSums(*sums) if with_sums else None)


def with_gradient(
    logits_TE: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    routing: Routing,
    sorted_logits: bool,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
    observed: Observed,
    gate: Gate | None,
    place: Tensor | None,
) -> Tensor:
    """The weights of a counted forward, with the gradient of everything to the logits.

    Args:
        logits_TE: (T, E) logits. Gradient flows; kept for backward only without ``gate``.
        weights_TK: (T, K) weights that `trimtab.route_ops.forward` formed of them.
        ids_TK: (T, K) int64 ids.
        routing: settings.
        sorted_logits: the first of a token's experts is the one with its largest logit.
        group_ids_T: (T,) group of each token, or None.
        valid_mask_T: (T,) bool, or None.
        observed: what the ledger returned for this forward.
        gate: to compute logits again, or None.
        place: names where logits wait on the host, see `trimtab.host_logits`; None to keep them on the device.
    """
    weights_TK = FusedRouting.apply(
        logits_TE,
        weights_TK,
        ids_TK,
        group_ids_T,
        valid_mask_T,
        routing,
        sorted_logits,
        *(gate or (None, None, None)),
        place,
        *(None, None),
        *observed,
    )
    return weights_TK


class FusedRouting(torch.autograd.Function):
    """Return the weights unchanged; in backward give the logits the gradient of weights and objectives.

    Args:
        logits_TE: (T, E) logits.
        weights_TK: (T, K) weights formed of them, without history.
        ids_TK: (T, K) int64 ids.
        group_ids_T: (T,) or None.
        valid_mask_T: (T,) or None.
        routing: settings.
        sorted_logits: the first of a token's experts is the one with its largest logit.
        gate_input_TD: fields of `Gate`, or three times None.
        gate_weight_ED: same.
        gate_bias_E: same.
        place: as of `with_gradient`.
        target_GE: targets, if no ledger knows them.
        z_weight: same.
        observed: fields of `Observed`, or nine times None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        weights_TK: Tensor,
        ids_TK: Tensor,
        group_ids_T: Tensor | None,
        valid_mask_T: Tensor | None,
        routing: Routing,
        sorted_logits: bool,
        gate_input_TD: Tensor | None,
        gate_weight_ED: Tensor | None,
        gate_bias_E: Tensor | None,
        place: Tensor | None,
        target_GE: Tensor | None,
        z_weight: Tensor | None,
        *observed: Any,
    ) -> Tensor:
        """The weights."""
        zero, counts_AGE, num_tokens_G, sequence_of_group_G, handle, ticket, *settings = observed
        ctx.routing, ctx.settings, ctx.logits_dtype = routing, settings, logits_TE.dtype
        ctx.sorted_logits = sorted_logits
        # Targets may be filled between forward and backward, which saved tensors forbid.
        ctx.targets = (target_GE, z_weight)
        held, rows_T0 = gate_input_TD, None
        if gate_weight_ED is None:
            held, rows_T0 = host_logits.hold(logits_TE, place, ticket)
        ctx.save_for_backward(
            held,
            rows_T0,
            gate_weight_ED,
            gate_bias_E,
            # With few experts 64 bits per id would be a good part of the logits' size.
            ids_TK.to(torch.int16 if logits_TE.shape[1] <= 2**15 else torch.int32),
            group_ids_T,
            valid_mask_T,
            counts_AGE,
            num_tokens_G,
            sequence_of_group_G,
            handle,
            ticket,
        )
        # A new tensor: an input returned as it is would be taken for a view of itself.
        return weights_TK.clone() if zero is None else weights_TK + zero.to(weights_TK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights_TK: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the logits, rounded once."""
        (
            held,
            rows_T0,
            gate_weight_ED,
            gate_bias_E,
            ids_TK,
            group_ids_T,
            valid_mask_T,
            counts_AGE,
            num_tokens_G,
            sequence_of_group_G,
            handle,
            ticket,
        ) = ctx.saved_tensors
        dtype, routing = ctx.logits_dtype, ctx.routing
        if gate_weight_ED is None:
            num_experts = 0 if counts_AGE is None else counts_AGE.shape[2]
            held = host_logits.take(grad_weights_TK, held, rows_T0, num_experts, dtype)
        logits_TE = logits_again(held, gate_weight_ED, gate_bias_E, dtype)
        target_GE, z_weight = ctx.targets
        if handle is not None:
            num_sequences, has_z, needs_prob_sums = ctx.settings
            prob_sums_GE = None
            if needs_prob_sums:
                num_groups = num_tokens_G.shape[0]
                prob_sums_GE = sum_probs(logits_TE, routing.score, group_ids_T, valid_mask_T, num_groups)
            target_GE, z_weight = ops.bind(
                grad_weights_TK,
                handle,
                ticket,
                counts_AGE,
                num_tokens_G,
                sequence_of_group_G,
                num_sequences,
                prob_sums_GE,
                dtype,
            )
            z_weight = z_weight if has_z else None
        grad_TE = route_ops.backward(
            grad_weights_TK,
            logits_TE,
            ids_TK,
            target_GE,
            z_weight,
            group_ids_T,
            valid_mask_T,
            routing,
            ctx.sorted_logits,
        )
        return grad_TE, *([None] * 21)


def _check(logits_TE: Tensor, routing: Routing, num_groups: int, given: dict[str, Tensor | None]) -> None:
    if logits_TE.dim() != 2 or not logits_TE.is_floating_point():
        raise ValueError(
            f"logits_TE is {logits_TE.dtype} of shape {tuple(logits_TE.shape)}, expected floating (T, E); reshape "
            "(B, S, E) logits to (B S, E)"
        )
    num_tokens, num_experts = logits_TE.shape
    routing.check(num_experts)
    if num_groups < 1:
        raise ValueError(f"num_groups={num_groups} must be at least 1, the groups that are told apart")
    if given["group_ids_T"] is None and num_tokens % num_groups:
        raise ValueError(
            f"num_groups={num_groups} must divide the T={num_tokens} tokens into contiguous groups; give "
            "group_ids_T for groups of other sizes"
        )
    target_GE = given["target_GE"]
    targets = num_groups if target_GE is None or len(target_GE) != 1 else 1
    shapes = {
        "expert_bias_E": ((num_experts,), "(E,)"),
        "replay_ids_TK": ((num_tokens, routing.top_k), "(T, K)"),
        "valid_mask_T": ((num_tokens,), "(T,)"),
        "group_ids_T": ((num_tokens,), "(T,)"),
        "target_GE": ((targets, num_experts), "(G, E) or (1, E)"),
    }
    dtypes = {
        "replay_ids_TK": (torch.int64, torch.int32),
        "valid_mask_T": (torch.bool,),
        "group_ids_T": (torch.int64,),
    }
    for name, tensor in given.items():
        if tensor is None:
            continue
        expected, legend = shapes[name]
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}, {legend}")
        if name in dtypes and tensor.dtype not in dtypes[name]:
            raise ValueError(f"{name} is {tensor.dtype}, expected {dtypes[name][0]}")
