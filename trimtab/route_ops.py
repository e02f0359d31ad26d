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
from trimtab.gradient import logit_gradient
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
    with_weights: bool = True,
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
        with_weights: False if the caller has no use for the weights, which then may be (0, K).

    Returns:
        (T, K) weights, (T, K) int64 ids, (G, E) int64 counts, then (G, E) sums of p, (T,) log-sum-exp of the
        logits and (T,) entropy of p, which are empty unless asked for. Floats are in the compute dtype.
    """
    given = (logits_TE, expert_bias_E, replay_ids_TK, valid_mask_T, group_ids_T, num_groups, with_sums)
    if logits_TE.device.type == "cuda":
        results: Forward = torch.ops.trimtab.route_forward(*given, *_options(routing))
        return results
    return plain_forward(*given, routing, with_weights)


def choose_and_weigh(
    logits_TE: Tensor, expert_bias_E: Tensor | None, replay_ids_TK: Tensor | None, routing: Routing
) -> tuple[Tensor, Tensor]:
    """Weights, whose gradient flows as often as it is wanted, and ids, chosen as where more is counted or injected.

    Args:
        logits_TE: (T, E). Gradient flows.
        expert_bias_E: (E,) or None.
        replay_ids_TK: (T, K) int64 ids instead of choosing, or None.
        routing: settings.

    Returns:
        (T, K) weights in the compute dtype and (T, K) int64 ids.
    """
    ids_TK, weights_TK = replay_ids_TK, None
    differentiates = logits_TE.requires_grad and torch.is_grad_enabled()
    if ids_TK is None:
        weights_TK, ids_TK, *_ = forward(
            logits_TE.detach(), expert_bias_E, None, None, None, 0, False, routing, not differentiates
        )
    if weights_TK is None or differentiates:
        weights_TK = weigh(logits_TE, ids_TK, routing, routing.sorts_logits(expert_bias_E, replay_ids_TK))
    return weights_TK, ids_TK


def backward(
    grad_weights_TK: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    target_GE: Tensor | None,
    z_weight: Tensor | None,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
    routing: Routing,
    sorted_logits: bool = False,
) -> Tensor:
    """Gradient of the logits: of the weights, of all balance objectives and of the z-loss.

    Args:
        grad_weights_TK: (T, K) gradient of the weights.
        logits_TE: (T, E) logits of the forward.
        ids_TK: (T, K) integer ids of the forward.
        target_GE: (G, E) dL/dp of each group, (1, E) for all tokens, or None.
        z_weight: () dL/d(sum of lse^2), or None.
        group_ids_T: (T,) int64, or None for contiguous groups.
        valid_mask_T: (T,) bool, or None; where False only the weights' gradient remains.
        routing: settings.
        sorted_logits: the first of a token's ids is its largest logit, which then need not be looked for.

    Returns:
        (T, E) in the logits' dtype, rounded to it once.
    """
    given = (grad_weights_TK, logits_TE, ids_TK, target_GE, z_weight, group_ids_T, valid_mask_T)
    if logits_TE.device.type == "cuda":
        grad_TE: Tensor = torch.ops.trimtab.route_backward(*given, *_options(routing))
        return grad_TE
    return plain_backward(*given, routing, sorted_logits)


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
    with_weights: bool = True,
) -> Forward:
    """`forward` in torch operators."""
    logits_TE = logits_TE.to(compute_dtype(logits_TE.dtype))
    if replay_ids_TK is None:
        ids_TK = choose(logits_TE, routing, expert_bias_E)
    else:
        ids_TK = replay_ids_TK.to(torch.int64)
    if with_weights:
        weights_TK = weigh(logits_TE, ids_TK, routing, routing.sorts_logits(expert_bias_E, replay_ids_TK))
    else:
        weights_TK = logits_TE.new_empty(0, routing.top_k)
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
    sorted_logits: bool = False,
) -> Tensor:
    """`backward` in torch operators."""
    dtype = logits_TE.dtype
    logits_TE = logits_TE.to(compute_dtype(dtype))
    grad_weights_TK = grad_weights_TK.to(logits_TE.dtype)
    target_GE = None if target_GE is None else target_GE.to(logits_TE.dtype)
    z_weight = None if z_weight is None else z_weight.to(logits_TE.dtype)
    ids_TK = ids_TK.to(torch.int64)
    likely_T1 = ids_TK[:, :1]
    objectives = (logits_TE, routing.score, target_GE, z_weight, group_ids_T, valid_mask_T, likely_T1)
    if not routing.weights_are_local:
        # The weights are p themselves: they and the objectives pass the same softmax, together.
        scale = routing.scale
        grad_TK = grad_weights_TK if scale == 1.0 else grad_weights_TK * scale
        return logit_gradient(*objectives, (ids_TK, grad_TK), likely_is_largest=sorted_logits).to(dtype)
    if target_GE is None and z_weight is None:
        grad_TE = torch.zeros_like(logits_TE)
    else:
        grad_TE = logit_gradient(*objectives, likely_is_largest=sorted_logits)
    logits_TK = logits_TE.gather(1, ids_TK)
    derivative_TK = log_score_derivative(logits_TK, routing.score)
    grad_TK = weigh_backward(grad_weights_TK, logits_TK, routing, derivative_TK, sorted_logits)
    return grad_TE.scatter_add_(1, ids_TK, grad_TK).to(dtype)


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
    if kernels is None and replay_ids_TK is not None:
        replay_ids_TK = replay_ids_TK.clone()  # an operator must not return what it was given
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
