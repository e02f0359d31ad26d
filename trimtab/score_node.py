"""The objectives' gradient, added where a softmax router has its own probabilities: nothing held, nothing repeated.

A hook sees what a router returns, and that is logits and weights, not probabilities. But the router's softmax is a
node of the autograd graph that it has just built, and what reaches this node in backward is dL/dp. There a balance
loss is a constant for each group, and the node itself does the rest; the z-loss is added behind it:

    before the node   dL/dp_te += target_ge
    the node          dL/dz_te = p_te (dL/dp_te - sum_j dL/dp_tj p_tj)
    behind the node   dL/dz_te += 2 z_weight lse_t p_te

Routers of another score function, whose normaliser is not part of their graph, and traced models, which have no
graph yet, take `trimtab.injection.Injection`.

Shapes: T tokens, E experts, G groups of tokens, A count maps.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from trimtab import ops
from trimtab.blocks import token_blocks, tokens_per_block
from trimtab.counts import sum_groups
from trimtab.scores import compute_dtype

# Nodes through which a softmax may have been given the logits.
_PASSING = {"ToCopyBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}
# Nodes whose backward makes a tensor that nobody else holds.
_FRESH = {"TopkBackward0", "GatherBackward0", "IndexBackward0", "SortBackward0"}
_MOST_NODES = 32


def saved_tensors_are_packed() -> bool:
    """Whether hooks, as of checkpointing, decide what autograd keeps of the forward that runs."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def find_score_node(weights: Tensor, logits: Tensor) -> tuple[Node, bool] | None:
    """The node of the softmax over all experts that a router formed its weights with.

    Args:
        weights: what the router returned. With history.
        logits: the logits it returned, as it returned them. With history.

    Returns:
        The node, and whether the gradient that reaches it is nobody else's; None if there is no such node, or it
        computes in less precision than the logits have, or in less than float32.
    """
    if weights.grad_fn is None or not logits.requires_grad or type(logits) is not Tensor:
        return None
    source = get_gradient_edge(logits)
    num_experts = logits.shape[-1]
    reached: list[tuple[Node, str]] = [(weights.grad_fn, "")]
    for number, (node, consumer) in enumerate(reached):
        if node is source.node or number == _MOST_NODES:
            continue
        name = node.name()
        if name == "SoftmaxBackward0":
            made: Any = node._input_metadata[0]
            whole = made.shape[-1] == num_experts and math.prod(made.shape) == logits.numel()
            exact = made.dtype == compute_dtype(logits.dtype)
            if whole and exact and _comes_from(node, source.node, source.output_nr):
                return node, consumer in _FRESH
        reached += [(before, name) for before, _ in node.next_functions if before is not None]
    return None


def _comes_from(node: Node, source: Node, output_nr: int) -> bool:
    before, place = node.next_functions[0]
    while before is not None and before is not source and before.name() in _PASSING:
        before, place = before.next_functions[0]
    return before is source and place == output_nr


class ScoreGradient:
    """Hooks of one router's softmax node, of one forward.

    Args:
        handle: names the ledger row.
        ticket: names the forward.
        logits_TE: (T, E) logits; not kept.
        counts_AGE: (A, G, E) int64 counts of this microbatch.
        num_tokens_G: (G,) valid tokens of each group.
        sequence_of_group_G: (G,) sequence of each group, or None.
        num_sequences: B.
        group_ids_T: (T,) group of each token, or None.
        valid_mask_T: (T,) bool, or None.
        has_z: some objective is a z-loss.
        needs_prob_sums: some objective reads sums of p.
        in_place: the gradient that reaches the node is nobody else's.
    """

    def __init__(
        self,
        handle: Tensor,
        ticket: Tensor,
        logits_TE: Tensor,
        counts_AGE: Tensor,
        num_tokens_G: Tensor,
        sequence_of_group_G: Tensor | None,
        num_sequences: int,
        group_ids_T: Tensor | None,
        valid_mask_T: Tensor | None,
        *,
        has_z: bool,
        needs_prob_sums: bool,
        in_place: bool,
    ) -> None:
        self.bound = handle, ticket, counts_AGE, num_tokens_G, sequence_of_group_G, num_sequences
        self.group_ids_T = group_ids_T
        self.valid_mask_T = valid_mask_T
        self.dtype = logits_TE.dtype
        self.has_z = has_z
        self.needs_prob_sums = needs_prob_sums
        self.in_place = in_place
        # With p, the only thing that log-sum-exps need of the logits: T numbers.
        self.largest_T1 = logits_TE.detach().amax(dim=-1, keepdim=True) if has_z else None
        self._z: tuple[Tensor, Tensor] | None = None  # p and the z-loss's weight, while the node runs

    def attach(self, node: Node) -> None:
        """Put the hooks on the node."""
        node.register_prehook(self.before)
        if self.has_z:
            node.register_hook(self.after)

    def before(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Add the targets of all balance objectives to dL/dp."""
        grad = grads[0]
        if grad is None:
            return None
        probs_TE = prob_sums_GE = None
        if self.has_z or self.needs_prob_sums:
            # Of the node that runs: held by these hooks it would hold itself.
            node: Any = torch._C._current_autograd_node()
            probs_TE = node._saved_result.detach().flatten(0, -2)
        if self.needs_prob_sums and probs_TE is not None:
            counted_TE = probs_TE
            if self.valid_mask_T is not None:
                counted_TE = probs_TE.masked_fill(~self.valid_mask_T[:, None], 0)
            prob_sums_GE = sum_groups(counted_TE, self.group_ids_T, self.bound[3].shape[0])
        target_GE, z_weight = ops.bind(grad, *self.bound, prob_sums_GE, self.dtype)
        if self.has_z and probs_TE is not None and z_weight is not None:
            self._z = probs_TE, z_weight
        if target_GE is None:
            return None
        own = grad if self.in_place and grad.is_contiguous() and not grad.requires_grad else grad.clone()
        _add_targets(
            own.view(-1, own.shape[-1]), target_GE.to(own.dtype), self.group_ids_T, self.valid_mask_T
        )
        return (own,)

    def after(self, grads: tuple[Tensor, ...], grad_outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Add the gradient of the z-loss to dL/dz."""
        z, self._z = self._z, None
        grad = grads[0]
        if z is None or grad is None or self.largest_T1 is None:
            return None
        probs_TE, z_weight = z
        lse_T1 = self.largest_T1.to(probs_TE.dtype) - probs_TE.amax(dim=-1, keepdim=True).log_()
        slope_T1 = lse_T1.mul_(z_weight)
        if self.valid_mask_T is not None:
            slope_T1 = slope_T1.masked_fill_(~self.valid_mask_T[:, None], 0)
        slope = slope_T1.view(*grad.shape[:-1], 1)
        probs = probs_TE.view(grad.shape)
        if grad.dtype != probs.dtype:
            return (grad.to(probs.dtype).addcmul(probs, slope, value=2).to(grad.dtype), *grads[1:])
        own = (
            grad.addcmul(probs, slope, value=2)
            if grad.requires_grad
            else grad.addcmul_(probs, slope, value=2)
        )
        return (own, *grads[1:])


def _add_targets(
    grad_TE: Tensor, target_GE: Tensor, group_ids_T: Tensor | None, valid_mask_T: Tensor | None
) -> None:
    """Add each token's target to its row, in place; rows that do not count stay as they are."""
    num_tokens, num_experts = grad_TE.shape
    num_groups = target_GE.shape[0]
    per_group = num_tokens // max(num_groups, 1)
    if valid_mask_T is None and (num_groups == 1 or group_ids_T is None):
        grad_TE.view(num_groups, per_group, num_experts).add_(target_GE[:, None])
        return
    places_T = group_ids_T if num_groups > 1 else None
    if places_T is None:
        places_T = torch.arange(num_groups, device=grad_TE.device).repeat_interleave(per_group)
    if valid_mask_T is not None:
        # One more group for what does not count.
        places_T = places_T.masked_fill(~valid_mask_T, num_groups)
        target_GE = torch.cat([target_GE, target_GE.new_zeros(1, num_experts)])
    for grad_bE, places_b in token_blocks(tokens_per_block(grad_TE), grad_TE, places_T):
        grad_bE.add_(target_GE.index_select(0, places_b))
