"""The two operators of fused routing: forward from logits to weights, ids and counts, and the whole way back.

Shapes: T tokens, E experts, K top-k, G groups of tokens (the finest any objective asks for).

``trimtab::route_forward`` and ``trimtab::route_backward`` are one contract with two implementations that agree to
the last few ulps: Triton kernels on CUDA, and elsewhere, or where the kernels cannot serve, the torch functions of
this file. Callers use `forward` and `backward`, which give a compiler the torch functions themselves where there
are no kernels, so that it can fuse them.
"""

from typing import Any

import torch
from torch import Tensor

from trimtab.counts import count_ids, sum_groups
from trimtab.injection import log_sum_exp, logit_gradient, softmax_backward, spread_targets
from trimtab.kernels import kernels_for
from trimtab.routing import Routing, choose, weigh, weigh_backward
from trimtab.scores import compute_dtype, log_score_derivative, probs

Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# `Routing`, as operators can be given it.
_OPTIONS = (
    "int top_k, str score, bool normalize_top_k, float scale, bool score_after_top_k, int num_expert_groups, "
    "int top_k_groups, str group_score"
)


def _options(routing: Routing) -> tuple[Any, ...]:
    return (
        routing.top_k,
        routing.score,
        routing.normalize_top_k,
        routing.scale,
        routing.score_after_top_k,
        routing.num_expert_groups,
        routing.top_k_groups,
        routing.group_score,
    )


def _routing(options: tuple[Any, ...]) -> Routing:
    top_k, score, normalize_top_k, scale, score_after_top_k, num_expert_groups, top_k_groups, group_score = (
        options
    )
    return Routing(
        top_k=top_k,
        score=score,
        normalize_top_k=normalize_top_k,
        scale=scale,
        score_after_top_k=score_after_top_k,
        num_expert_groups=num_expert_groups,
        top_k_groups=top_k_groups,
        group_score=group_score,
    )


def forward(
    logits_TE: Tensor,
    expert_bias_E: Tensor | None,
    replay_ids_TK: Tensor | None,
    valid_mask_T: Tensor | None,
    group_ids_T: Tensor | None,
    num_groups: int,
    with_sums: bool,
    routing: Routing,
) -> Forward:
    """Choose, weigh and count.

    Args:
        logits_TE: (T, E). No gradient.
        expert_bias_E: (E,) or None.
        replay_ids_TK: (T, K) ids instead of choosing, or None.
        valid_mask_T: (T,) bool, or None.
        group_ids_T: (T,) int64, or None for contiguous groups.
        num_groups: G; 0 counts nothing.
        with_sums: form the last three results.
        routing: settings.

    Returns:
        (T, K) weights, (T, K) int64 ids, (G, E) int64 counts, then (G, E) sums of p, (T,) log-sum-exp of the
        logits and (T,) entropy of p, which are empty unless asked for. Floats are in the compute dtype.
    """
    run = torch.ops.trimtab.route_forward if logits_TE.device.type == "cuda" else plain_forward
    options = _options(routing) if logits_TE.device.type == "cuda" else (routing,)
    results: Forward = run(
        logits_TE,
        expert_bias_E,
        replay_ids_TK,
        valid_mask_T,
        group_ids_T,
        num_groups,
        with_sums,
        *options,
    )
    return results


def backward(
    grad_weights_TK: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    target_GE: Tensor | None,
    z_weight: Tensor | None,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
    routing: Routing,
    probs_TE: Tensor | None = None,
) -> Tensor:
    """Gradient of the logits: of the weights, of all balance objectives and of the z-loss.

    Args:
        grad_weights_TK: (T, K) gradient of the weights.
        logits_TE: (T, E) logits of the forward.
        ids_TK: (T, K) int64 ids of the forward.
        target_GE: (G, E) dL/dp of each group, (1, E) for all tokens, or None.
        z_weight: () dL/d(sum of lse^2), or None.
        group_ids_T: (T,) int64, or None for contiguous groups.
        valid_mask_T: (T,) bool, or None; where False only the weights' gradient remains.
        routing: settings.
        probs_TE: (T, E) probabilities if they are at hand; kernels form them again.

    Returns:
        (T, E) in the logits' dtype, rounded to it once.
    """
    given = (grad_weights_TK, logits_TE, ids_TK, target_GE, z_weight, group_ids_T, valid_mask_T)
    if logits_TE.device.type == "cuda":
        grad_TE: Tensor = torch.ops.trimtab.route_backward(*given, *_options(routing))
        return grad_TE
    return plain_backward(*given, routing, probs_TE)


# ---------------------------------------------------------------- in torch


def plain_forward(
    logits_TE: Tensor,
    expert_bias_E: Tensor | None,
    replay_ids_TK: Tensor | None,
    valid_mask_T: Tensor | None,
    group_ids_T: Tensor | None,
    num_groups: int,
    with_sums: bool,
    routing: Routing,
) -> Forward:
    """`forward` in torch operators."""
    logits_TE = logits_TE.to(compute_dtype(logits_TE.dtype))
    if replay_ids_TK is None:
        ids_TK = choose(logits_TE, routing, expert_bias_E)
    else:
        # A copy: an operator must not return what it was given.
        ids_TK = replay_ids_TK.to(torch.int64, copy=True)
    weights_TK = weigh(logits_TE, ids_TK, routing)
    if num_groups:
        counts_GE = count_ids(ids_TK, logits_TE.shape[1], group_ids_T, valid_mask_T, num_groups)
    else:
        counts_GE = ids_TK.new_zeros(0, logits_TE.shape[1])
    if not with_sums:
        nothing = logits_TE.new_empty(0, logits_TE.shape[1]), logits_TE.new_empty(0), logits_TE.new_empty(0)
        return weights_TK, ids_TK, counts_GE, *nothing
    probs_TE = probs(logits_TE, routing.score)
    entropy_T = torch.special.entr(probs_TE).sum(dim=-1)
    if valid_mask_T is not None:
        probs_TE = probs_TE.masked_fill(~valid_mask_T[:, None], 0)
    prob_sums_GE = sum_groups(probs_TE, group_ids_T, num_groups)
    return weights_TK, ids_TK, counts_GE, prob_sums_GE, logits_TE.logsumexp(dim=-1), entropy_T


def plain_backward(
    grad_weights_TK: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    target_GE: Tensor | None,
    z_weight: Tensor | None,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
    routing: Routing,
    probs_TE: Tensor | None = None,
) -> Tensor:
    """`backward` in torch operators."""
    dtype = logits_TE.dtype
    logits_TE = logits_TE.to(compute_dtype(dtype))
    grad_weights_TK = grad_weights_TK.to(logits_TE.dtype)
    target_GE = None if target_GE is None else target_GE.to(logits_TE.dtype)
    z_weight = None if z_weight is None else z_weight.to(logits_TE.dtype)
    balances = target_GE is not None or z_weight is not None
    if probs_TE is None and (balances or not routing.weights_are_local):
        probs_TE = probs(logits_TE, routing.score)
    if not routing.weights_are_local:
        assert probs_TE is not None
        return _softmax_over_all(
            grad_weights_TK * routing.scale,
            logits_TE,
            ids_TK,
            target_GE,
            z_weight,
            group_ids_T,
            valid_mask_T,
            probs_TE,
        ).to(dtype)
    if balances:
        assert probs_TE is not None
        if target_GE is None:
            target_GE = logits_TE.new_zeros(1, logits_TE.shape[1])
        grad_TE = logit_gradient(
            logits_TE, probs_TE, routing.score, target_GE, z_weight, group_ids_T, valid_mask_T
        )
    else:
        grad_TE = torch.zeros_like(logits_TE)
    logits_TK = logits_TE.gather(1, ids_TK)
    derivative_TK = log_score_derivative(logits_TK, routing.score)
    grad_TK = weigh_backward(grad_weights_TK, logits_TK, routing, derivative_TK)
    return grad_TE.scatter_add_(1, ids_TK, grad_TK).to(dtype)


def _softmax_over_all(
    grad_TK: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    target_GE: Tensor | None,
    z_weight: Tensor | None,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
    probs_TE: Tensor,
) -> Tensor:
    """Gradient where the weights are p themselves: they and the objectives pass the same softmax, together."""
    if target_GE is None:
        grad_TE = torch.zeros_like(probs_TE)
    else:
        grad_TE = spread_targets(target_GE, len(probs_TE), group_ids_T)
        if valid_mask_T is not None:
            grad_TE.masked_fill_(~valid_mask_T[:, None], 0)
    softmax_backward(grad_TE.scatter_add_(1, ids_TK, grad_TK), probs_TE)
    if z_weight is not None:
        slope_T1 = z_weight * log_sum_exp(logits_TE, probs_TE)
        if valid_mask_T is not None:
            slope_T1 = slope_T1.masked_fill(~valid_mask_T[:, None], 0)
        grad_TE.addcmul_(probs_TE, slope_T1, value=2)
    return grad_TE


# ---------------------------------------------------------------- as operators


@torch.library.custom_op(
    "trimtab::route_forward",
    mutates_args=(),
    schema="(Tensor logits_TE, Tensor? expert_bias_E, Tensor? replay_ids_TK, Tensor? valid_mask_T, "
    f"Tensor? group_ids_T, int num_groups, bool with_sums, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def route_forward(
    logits_TE: Tensor,
    expert_bias_E: Tensor | None,
    replay_ids_TK: Tensor | None,
    valid_mask_T: Tensor | None,
    group_ids_T: Tensor | None,
    num_groups: int,
    with_sums: bool,
    *options: Any,
) -> Forward:
    """`forward`, with the fields of `Routing` as ``options``."""
    routing = _routing(options)
    kernels = kernels_for(logits_TE, routing.top_k)
    run = plain_forward if kernels is None else kernels.forward
    results: Forward = run(
        logits_TE,
        expert_bias_E,
        replay_ids_TK,
        valid_mask_T,
        group_ids_T,
        num_groups,
        with_sums,
        routing,
    )
    return results


@route_forward.register_fake
def _(
    logits_TE: Tensor,
    expert_bias_E: Tensor | None,
    replay_ids_TK: Tensor | None,
    valid_mask_T: Tensor | None,
    group_ids_T: Tensor | None,
    num_groups: int,
    with_sums: bool,
    *options: Any,
) -> Forward:
    (num_tokens, num_experts), top_k = logits_TE.shape, options[0]
    dtype = compute_dtype(logits_TE.dtype)
    logged_tokens, logged_groups = (num_tokens, num_groups) if with_sums else (0, 0)
    return (
        logits_TE.new_empty(num_tokens, top_k, dtype=dtype),
        logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64),
        logits_TE.new_empty(num_groups, num_experts, dtype=torch.int64),
        logits_TE.new_empty(logged_groups, num_experts, dtype=dtype),
        logits_TE.new_empty(logged_tokens, dtype=dtype),
        logits_TE.new_empty(logged_tokens, dtype=dtype),
    )


@torch.library.custom_op(
    "trimtab::route_backward",
    mutates_args=(),
    schema="(Tensor grad_weights_TK, Tensor logits_TE, Tensor ids_TK, Tensor? target_GE, Tensor? z_weight, "
    f"Tensor? group_ids_T, Tensor? valid_mask_T, {_OPTIONS}) -> Tensor",
)
def route_backward(
    grad_weights_TK: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    target_GE: Tensor | None,
    z_weight: Tensor | None,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
    *options: Any,
) -> Tensor:
    """`backward`, with the fields of `Routing` as ``options``."""
    routing = _routing(options)
    kernels = kernels_for(logits_TE, routing.top_k)
    run = plain_backward if kernels is None else kernels.backward
    grad_TE: Tensor = run(
        grad_weights_TK, logits_TE, ids_TK, target_GE, z_weight, group_ids_T, valid_mask_T, routing
    )
    return grad_TE


@route_backward.register_fake
def _(grad_weights_TK: Tensor, logits_TE: Tensor, *rest: Any) -> Tensor:
    return logits_TE.new_empty(logits_TE.shape)
