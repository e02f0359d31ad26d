"""The objectives' gradient, added where a router has its own scores: nothing kept, nothing formed twice.

A hook sees what a router returns, and that is logits and weights, not scores. But the router's softmax or sigmoid
is a node of the autograd graph that it has just built, and what reaches this node in backward is dL/ds. There a
balance loss, whose targets are constants of each group, adds what it is with respect to s, and the node itself does
the rest; the z-loss is added behind it:

    before the node   dL/ds_te += target_ge                                           softmax, whose s are p
                      dL/ds_te += (target_ge - sum_j target_gj s_tj / S_t) / S_t      sigmoid, S_t = sum_j s_tj
    behind the node   dL/dz_te += 2 z_weight lse_t softmax(z_t)_e

A sum S below tiny / eps is of subnormal scores: a token whose sigmoids have all vanished, which such a router
cannot weigh either, gets no balance gradient.

Routers of another score function, whose scores are not in their graph, and traced models, which have no graph yet,
take `trimtab.injection.Injection`.

Shapes: T tokens, E experts, K top-k, G groups of tokens, A count maps, b tokens of a block.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from trimtab import ops
from trimtab.blocks import token_blocks, tokens_per_block
from trimtab.counts import sum_groups
from trimtab.gate import KeptGate, logits_again
from trimtab.gradient import add_z_gradient, log_sum_exp
from trimtab.microbatch import Microbatch
from trimtab.scores import ScoreName, compute_dtype

_NODES: dict[ScoreName, str] = {"softmax": "SoftmaxBackward0", "sigmoid": "SigmoidBackward0"}
# Nodes through which scores may have been formed of the logits.
_PASSING = {"ToCopyBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}
# Nodes whose backward makes a tensor that nobody else holds.
_FRESH = {"TopkBackward0", "GatherBackward0", "IndexBackward0", "SortBackward0"}
_MOST_NODES = 32

_OTHER_WAY = (
    "gradients of losses are added where the router has its scores; attach with keep='logits', which adds them to "
    "the logits"
)


def saved_tensors_are_packed() -> bool:
    """Whether hooks, as of checkpointing, decide what autograd keeps of the forward that runs."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def find_score_node(weights: Tensor, logits: Tensor, score: ScoreName) -> tuple[Node, bool] | None:
    """The node of the scores of all experts that a router formed its weights with.

    Args:
        weights: what the router returned. With history.
        logits: the logits it returned, as it returned them. With history.
        score: score function.

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
        if name == _NODES.get(score):
            made: Any = node._input_metadata[0]
            whole = made.shape[-1] == num_experts and math.prod(made.shape) == logits.numel()
            exact = made.dtype == compute_dtype(logits.dtype)
            if whole and exact and _along_experts(node) and _comes_from(node, source.node, source.output_nr):
                return node, consumer in _FRESH
        reached += [(before, name) for before, _ in node.next_functions if before is not None]
    return None


def _comes_from(node: Node, source: Node, output_nr: int) -> bool:
    before, place = node.next_functions[0]
    while before is not None and before is not source and before.name() in _PASSING:
        before, place = before.next_functions[0]
    return before is source and place == output_nr


def _along_experts(node: Any) -> bool:
    """Whether a softmax runs along the last axis; the attribute is unsigned."""
    return node.name() != _NODES["softmax"] or node._saved_dim in (
        len(node._input_metadata[0].shape) - 1,
        2**64 - 1,
        -1,
    )


def _version(kept: Tensor | None) -> int | None:
    return None if kept is None else kept._version


class ScoreGradient:
    """Hooks of one router's score node, of one forward.

    Args:
        name: of the router.
        handle: names the ledger row.
        score: softmax or sigmoid.
        microbatch: what the tokens are.
        num_sequences: B, or 0 if groups are sequences.
        counts_AGE: (A, G, E) int64 counts of this microbatch.
        needs_prob_sums: some objective reads sums of p.
        in_place: the gradient that reaches the node is nobody else's.
        logits_dtype: of the logits.
    """

    def __init__(
        self,
        name: str,
        handle: Tensor,
        score: ScoreName,
        microbatch: Microbatch,
        num_sequences: int,
        counts_AGE: Tensor,
        *,
        needs_prob_sums: bool,
        in_place: bool,
        logits_dtype: torch.dtype,
    ) -> None:
        tokens_G, sequences_G = microbatch.num_tokens_G, microbatch.sequence_of_group_G
        self.bound = handle, microbatch.ticket, counts_AGE, tokens_G, sequences_G, num_sequences
        self.name = name
        self.score = score
        self.group_ids_T = microbatch.group_ids_T
        self.valid_mask_T = microbatch.valid_mask_T
        self.needs_prob_sums = needs_prob_sums
        self.in_place = in_place
        self.dtype = logits_dtype
        self.lse_T1: Tensor | None = None  # of z-losses at a softmax
        self.gate: KeptGate | None = None  # of z-losses at a sigmoid
        self.versions: list[int | None] = []  # of the gate's tensors
        self.likely_ids_T1: Tensor | None = None
        self._probs_TE: Tensor | None = None  # while the node runs, and only for z-losses
        self._z_weight: Tensor | None = None

    @property
    def has_z(self) -> bool:
        """Whether some objective is a z-loss."""
        return self.lse_T1 is not None or self.gate is not None

    def keep_for_z(self, node: Node, logits_TE: Tensor, ids_TK: Tensor, gate: KeptGate) -> None:
        """Keep what a z-loss needs: T numbers beside p, or logits, which sigmoids do not tell.

        Args:
            node: the node.
            logits_TE: (T, E) logits.
            ids_TK: (T, K) chosen experts.
            gate: input, weight and bias of the gate, to compute logits again from; three times None to keep them.
        """
        logits_TE = logits_TE.detach()
        if self.score == "softmax":
            saved: Any = node
            probs_TE = saved._saved_result.detach().view(logits_TE.shape)
            self.lse_T1 = log_sum_exp(logits_TE, probs_TE, ids_TK[:, :1])
        else:
            self.gate = gate if gate[1] is not None else (logits_TE, None, None)
            self.versions = [_version(kept) for kept in self.gate]
            self.likely_ids_T1 = ids_TK[:, :1].clone()  # a view would hold the ids of all

    def attach(self, node: Node) -> None:
        """Put the hooks on the node."""
        node.register_prehook(self.before)
        if self.has_z:
            node.register_hook(self.after)

    def before(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Add what all balance objectives are with respect to the scores."""
        grad = grads[0]
        if grad is None:
            raise RuntimeError(f"{self.name}: no gradient reaches the router's weights, and {_OTHER_WAY}")
        scores_TE = prob_sums_GE = None
        if self.score == "sigmoid" or self.has_z or self.needs_prob_sums:
            # Of the node that runs: held by these hooks it would hold itself.
            node: Any = torch._C._current_autograd_node()
            if node is None:
                raise RuntimeError(f"{self.name}: backward is compiled, and {_OTHER_WAY}")
            scores_TE = node._saved_result.detach().flatten(0, -2)
        if self.needs_prob_sums and scores_TE is not None:
            shares_TE = scores_TE if self.score == "softmax" else scores_TE / _sums(scores_TE)
            prob_sums_GE = self._prob_sums(shares_TE)
        target_GE, z_weight = ops.bind(grad, *self.bound, prob_sums_GE, self.dtype)
        if self.has_z and z_weight is not None:
            self._probs_TE, self._z_weight = (scores_TE if self.score == "softmax" else None), z_weight
        if target_GE is None:
            return None
        if grad.requires_grad:
            own = _zeros(grad, grad.dtype)
        elif self.in_place and grad.is_contiguous():
            own = grad
        else:
            own = grad.clone(memory_format=torch.contiguous_format)
        add_targets(
            own.view(-1, own.shape[-1]),
            target_GE.to(own.dtype),
            self.group_ids_T,
            self.valid_mask_T,
            scores_TE if self.score == "sigmoid" else None,
        )
        return (_Added.apply(grad, own) if grad.requires_grad else own,)

    def _prob_sums(self, probs_TE: Tensor) -> Tensor:
        if self.valid_mask_T is not None:
            probs_TE = probs_TE.masked_fill(~self.valid_mask_T[:, None], 0)
        return sum_groups(probs_TE, self.group_ids_T, self.bound[3].shape[0])

    def after(self, grads: tuple[Tensor, ...], grad_outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Add the gradient of the z-loss to dL/dz."""
        probs_TE, z_weight = self._probs_TE, self._z_weight
        self._probs_TE = self._z_weight = None
        grad = grads[0]
        if z_weight is None or grad is None:
            return None
        own = _zeros(grad, z_weight.dtype) if grad.requires_grad else grad.to(z_weight.dtype).contiguous()
        grad_TE = own.view(-1, own.shape[-1])
        if self.gate is not None and self.likely_ids_T1 is not None:
            self._check_versions()
            logits_TE = logits_again(*self.gate, self.dtype).to(own.dtype)
            add_z_gradient(grad_TE, logits_TE, z_weight, self.likely_ids_T1, self.valid_mask_T)
        elif self.lse_T1 is not None and probs_TE is not None:
            slope_T1 = self.lse_T1 * z_weight
            if self.valid_mask_T is not None:
                slope_T1 = slope_T1.masked_fill_(~self.valid_mask_T[:, None], 0)
            grad_TE.addcmul_(probs_TE, slope_T1, value=2)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            # The loss, and with it these hooks, may live on.
            self.gate = self.lse_T1 = self.likely_ids_T1 = None
        own = own.to(grad.dtype)
        return (_Added.apply(grad, own) if grad.requires_grad else own, *grads[1:])

    def _check_versions(self) -> None:
        if self.gate is not None and self.versions != [_version(kept) for kept in self.gate]:
            raise RuntimeError(
                f"{self.name}: the router's logits, input or weight were changed in place between forward and "
                "backward, which computes with them again"
            )


def _zeros(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(grad.shape, dtype=dtype, device=grad.device)


class _Added(torch.autograd.Function):
    """The sum of a gradient with history and what the losses add, whose own derivative nobody has formed."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, added: Tensor) -> Tensor:
        return grad + added

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("second derivatives of balance losses and of the z-loss are not available")


def add_targets(
    grad_TE: Tensor,
    target_GE: Tensor,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
    scores_TE: Tensor | None = None,
) -> None:
    """Add each token's target to its row, in place; rows that do not count stay as they are.

    Args:
        grad_TE: (T, E) gradient of the scores.
        target_GE: (G, E) dL/dp of each group, (1, E) for all tokens.
        group_ids_T: (T,) group of each token; None for G contiguous groups of T / G tokens.
        valid_mask_T: (T,) bool, or None.
        scores_TE: (T, E) scores of which p are shares, if these are not p.
    """
    num_tokens, num_experts = grad_TE.shape
    num_groups = target_GE.shape[0]
    rows = tokens_per_block(grad_TE, 1 if scores_TE is None else 2)
    if valid_mask_T is None and (num_groups == 1 or group_ids_T is None):
        # Tokens of the same place in all groups together, so that targets are spread by broadcasting.
        shape = num_groups, num_tokens // max(num_groups, 1), num_experts
        grad_GNE, target_G1E = grad_TE.view(shape), target_GE[:, None]
        if scores_TE is None:
            grad_GNE.add_(target_G1E)
            return
        rows = max(rows // max(num_groups, 1), 1)
        blocks = zip(grad_GNE.split(rows, 1), scores_TE.view(shape).split(rows, 1), strict=True)
        for grad_GnE, scores_GnE in blocks:
            _add_at_sigmoids(grad_GnE, target_G1E, scores_GnE)
        return
    places_T = group_ids_T if num_groups > 1 else None
    if places_T is None:
        places_T = torch.arange(num_groups, device=grad_TE.device)
        places_T = places_T.repeat_interleave(num_tokens // max(num_groups, 1))
    if valid_mask_T is not None:
        # One more group for what does not count.
        places_T = places_T.masked_fill(~valid_mask_T, num_groups)
        target_GE = torch.cat([target_GE, target_GE.new_zeros(1, num_experts)])
    for grad_bE, places_b, scores_bE in token_blocks(rows, grad_TE, places_T, scores_TE):
        target_bE = target_GE.index_select(0, places_b)
        if scores_bE is None:
            grad_bE.add_(target_bE)
        else:
            _add_at_sigmoids(grad_bE, target_bE, scores_bE)


def _add_at_sigmoids(grad_bE: Tensor, target_bE: Tensor, scores_bE: Tensor) -> None:
    """Add (target - sum_j target_j s_j / S) / S, in place."""
    inverse_b1 = _sums(scores_bE).reciprocal_()
    mean_b1 = (scores_bE * target_bE).sum(dim=-1, keepdim=True).mul_(inverse_b1)
    grad_bE.addcmul_(target_bE, inverse_b1).sub_(mean_b1.mul_(inverse_b1))


def _sums(scores_TE: Tensor) -> Tensor:
    """(T, 1) sums; infinite, so that nothing is shared out, where they are not of full precision."""
    limits = torch.finfo(scores_TE.dtype)
    return torch.threshold_(scores_TE.sum(dim=-1, keepdim=True), limits.tiny / limits.eps, math.inf)
