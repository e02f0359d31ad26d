"""Bring tokens to their experts and the results back.

A dispatcher is the only part of the layer that knows where experts live. The local one permutes rows; one for
expert parallelism exchanges them between ranks behind the same two calls.

Shape suffixes: T tokens, K top-k, N = T * K rows (token-expert pairs), D model, E experts, e local experts.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class DispatchedTokens(NamedTuple):
    """What the experts of this rank receive.

    Attributes:
        x_ND: (N, D) rows sorted by local expert; within an expert by token, then by top-k slot.
        num_tokens_per_expert_e: (e,) int64 row counts of the local experts, summing to N.
        plan: what `combine` of the same dispatcher needs to undo the dispatch; opaque to everybody else.
    """

    x_ND: Tensor
    num_tokens_per_expert_e: Tensor
    plan: Any


class Dispatcher(Protocol):
    """The two calls the layer makes around its experts."""

    def dispatch(
        self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, *, score_before_experts: bool
    ) -> DispatchedTokens:
        """Copy each token to its K experts.

        Args:
            x_TD: (T, D) tokens. Gradient flows.
            topk_ids_TK: (T, K) int64 expert of each token's slot, in [0, E). No gradient.
            topk_weights_TK: (T, K) weight of each slot. Gradient flows.
            score_before_experts: multiply the experts' input by the weights instead of their output.

        Returns:
            Rows of x's dtype for the local experts.
        """
        ...

    def combine(self, y_ND: Tensor, plan: Any) -> Tensor:
        """Sum each token's K results, weighted unless the weights were applied before the experts.

        Args:
            y_ND: (N, D) results in the order of `DispatchedTokens.x_ND`. Gradient flows.
            plan: the plan of the dispatch these rows came from.

        Returns:
            (T, D) in y's dtype.
        """
        ...


class LocalPlan(NamedTuple):
    """The permutation of a local dispatch.

    Attributes:
        order_N: (N,) int64, flat token-slot index of each sorted row.
        weights_TK: (T, K) weights still to be applied, or None if they were applied to the input.
        top_k: K.
    """

    order_N: Tensor
    weights_TK: Tensor | None
    top_k: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalDispatcher:
    """All experts live on this rank: sort the token-expert pairs by expert, and unsort the results.

    Forward and backward only permute rows and sum over a fixed axis, so both give the same bits on every run,
    and nothing waits for the device.

    Attributes:
        num_experts: E.
    """

    num_experts: int

    def dispatch(
        self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, *, score_before_experts: bool
    ) -> DispatchedTokens:
        """Copy each token to its K experts; see `Dispatcher.dispatch`."""
        top_k = topk_ids_TK.shape[1]
        order_N, inverse_N, num_tokens_per_expert_E = sort_by_expert(topk_ids_TK, self.num_experts)
        x_TKD = x_TD.unsqueeze(1).expand(-1, top_k, -1)
        if score_before_experts:
            # The product is rounded once, from the wider of the two dtypes.
            x_TKD = (x_TKD * topk_weights_TK.unsqueeze(-1)).to(x_TD.dtype)
        x_ND = place_rows(x_TKD.reshape(-1, x_TD.shape[-1]), inverse_N)
        plan = LocalPlan(order_N, None if score_before_experts else topk_weights_TK, top_k)
        return DispatchedTokens(x_ND, num_tokens_per_expert_E, plan)

    def combine(self, y_ND: Tensor, plan: LocalPlan) -> Tensor:
        """Sum each token's K results; see `Dispatcher.combine`."""
        y_TKD = place_rows(y_ND, plan.order_N).unflatten(0, (-1, plan.top_k))
        if plan.weights_TK is not None:
            y_TKD = y_TKD * plan.weights_TK.unsqueeze(-1)
        return y_TKD.sum(dim=1).to(y_ND.dtype)


def sort_by_expert(topk_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the T * K token-expert pairs by expert, keeping the order of tokens within an expert.

    Args:
        topk_ids_TK: (T, K) integer ids in [0, num_experts). No gradient.
        num_experts: E.

    Returns:
        order_N: (N,) int64, flat pair index of each sorted row.
        inverse_N: (N,) int64, sorted row of each flat pair index.
        num_tokens_per_expert_E: (E,) int64 counts, summing to N.
    """
    sorted_ids_N, order_N = torch.sort(topk_ids_TK.flatten(), stable=True)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device)
    # Counts by bisection of the sorted ids: bincount would wait for the device to learn its output size.
    bounds = torch.arange(num_experts + 1, device=order_N.device, dtype=sorted_ids_N.dtype)
    return order_N, inverse_N, torch.searchsorted(sorted_ids_N, bounds).diff()


def place_rows(x_ND: Tensor, target_N: Tensor) -> Tensor:
    """Permute rows, `y[target[n]] = x[n]`, with a backward that adds nothing up.

    Args:
        x_ND: (N, D) rows. Gradient flows.
        target_N: (N,) int64, a permutation of 0 ... N - 1. No gradient.

    Returns:
        (N, D), contiguous.
    """
    # index_copy's backward is a gather; the backward of a gather would be a scatter-add with atomics.
    return torch.empty_like(x_ND, memory_format=torch.contiguous_format).index_copy_(0, target_N, x_ND)
