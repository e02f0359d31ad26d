"""The objectives written out plainly with autograd: what injected gradients are compared with.

Shapes: T tokens, E experts, K top-k, M microbatches.

Slow, memory-hungry and obvious on purpose. ``(task_loss + reference_loss(...)).backward()`` over all
microbatches in one graph is the definition that every fast path must equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.device_losses import CommunicationLevel, DeviceLevel
from trimtab.losses import BatchWise, GlobalBatch, ImportanceCV, SequenceWise, ZLoss
from trimtab.objective import Objective
from trimtab.scores import ScoreName


@dataclass(frozen=True, slots=True)
class RoutedTokens:
    """One layer's routing of one microbatch, with autograd history.

    Args:
        logits_TE: (T, E) logits. Gradient flows.
        ids_TK: (T, K) int64 executed experts.
        sequence_T: (T,) int64 sequence of each token.
        document_T: (T,) int64 document of each token.
        valid_T: (T,) bool, True counts.
    """

    logits_TE: Tensor
    ids_TK: Tensor
    sequence_T: Tensor
    document_T: Tensor
    valid_T: Tensor


def naive_probs(logits_TE: Tensor, score: ScoreName) -> Tensor:
    """(T, E) p = s / sum_j s_j, from the definition of the score."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": torch.exp,
        "sigmoid": torch.sigmoid,
        "sqrt_softplus": lambda z: F.softplus(z, threshold=100).sqrt(),
    }
    scores_TE = functions[score](logits_TE)
    return scores_TE / scores_TE.sum(dim=1, keepdim=True)


def naive_counts(ids_TK: Tensor, num_experts: int) -> Tensor:
    """(E,) assignments of all tokens given, by one-hot."""
    return F.one_hot(ids_TK, num_experts).sum(dim=(0, 1))


def load_balance_loss(probs_TE: Tensor, counts_E: Tensor, slots: float) -> Tensor:
    """Load-balance loss of one group of tokens: sum_e f_e P_e, f_e = E c_e / (slots T).

    Args:
        probs_TE: (T, E) router probabilities, rows sum to 1. Gradient flows.
        counts_E: (E,) counts of the same tokens. No gradient.
        slots: what the counts of one token sum to, K for assignments.

    Returns:
        Scalar, dimensionless: 1.0 at uniform load.

    Raises:
        ValueError: the arguments disagree on E.

    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4 without alpha; f divided by K.
    """
    num_tokens, num_experts = probs_TE.shape
    if counts_E.shape != (num_experts,):
        raise ValueError(
            f"counts have shape {tuple(counts_E.shape)}, expected ({num_experts},) as probs_TE has {num_experts} "
            "experts"
        )
    load_E = num_experts / (slots * num_tokens) * counts_E.to(probs_TE.dtype)
    return (load_E * probs_TE.mean(dim=0)).sum()


def reference_loss(
    objective: Objective,
    microbatches: Sequence[RoutedTokens],
    score: ScoreName,
    step_load: Sequence[Tensor] | None = None,
) -> Tensor:
    """Coefficient times the unscaled loss of one objective over one step of one layer.

    Args:
        objective: what to compute.
        microbatches: the step.
        score: score function.
        step_load: for the global-batch loss, the (E,) load fraction that each microbatch's backward sees;
            None for the exact one.

    Returns:
        Scalar with gradient to the logits.

    Raises:
        ValueError: an objective this module does not know.
    """
    if isinstance(objective, SequenceWise):
        return objective.coef * _grouped_loss(objective, microbatches, score)
    tokens = [int(m.valid_T.sum()) for m in microbatches]
    if isinstance(objective, ZLoss):
        sums = [(torch.logsumexp(m.logits_TE, 1) ** 2)[m.valid_T].sum() for m in microbatches]
        return objective.coef * sum(sums) / sum(tokens)  # type: ignore[return-value]
    probs = [naive_probs(m.logits_TE, score)[m.valid_T] for m in microbatches]
    if isinstance(objective, ImportanceCV):
        importances = [p.sum(dim=0) for p in probs]
        terms = [i.var(correction=0) / i.mean() ** 2 for i in importances]
        return objective.coef * sum(terms) / len(terms)  # type: ignore[return-value]
    if isinstance(objective, BatchWise):
        counts = [_counts(objective.config.assignments, m, m.valid_T) for m in microbatches]
        top_k = microbatches[0].ids_TK.shape[1]
        terms = [load_balance_loss(p, c, top_k) for p, c in zip(probs, counts, strict=True)]
        return objective.coef * sum(terms) / len(terms)  # type: ignore[return-value]
    if isinstance(objective, GlobalBatch):
        total = sum(tokens)
        if step_load is None:
            counts_E = sum(_counts(objective.config.assignments, m, m.valid_T) for m in microbatches)
            slots = microbatches[0].ids_TK.shape[1] * total
            load_E = counts_E.to(probs[0].dtype) * (probs[0].shape[1] / slots)  # type: ignore[union-attr]
            step_load = [load_E] * len(microbatches)
        terms = [(load_E * p).sum() for load_E, p in zip(step_load, probs, strict=True)]
        return objective.coef * sum(terms) / total  # type: ignore[return-value]
    raise ValueError(f"no reference for {type(objective).__name__}")


def _counts(assignments: str, microbatch: RoutedTokens, which_T: Tensor) -> Tensor:
    ids_TK = microbatch.ids_TK
    if assignments == "unbiased":
        ids_TK = microbatch.logits_TE.topk(ids_TK.shape[1], dim=1).indices
    return naive_counts(ids_TK[which_T], microbatch.logits_TE.shape[1])


def _grouped_loss(objective: SequenceWise, microbatches: Sequence[RoutedTokens], score: ScoreName) -> Tensor:
    """Mean over groups of each group's loss, as the papers write it."""
    losses, weights = [], []
    for microbatch in microbatches:
        group_T = microbatch.sequence_T if objective.config.unit == "sequence" else microbatch.document_T
        probs_TE = naive_probs(microbatch.logits_TE, score)
        for group in group_T.unique().tolist():
            member_T = (group_T == group) & microbatch.valid_T
            if not bool(member_T.any()):
                continue
            losses.append(_one_group(objective, microbatch, probs_TE[member_T], member_T))
            weights.append(int(member_T.sum()) if objective.config.weighting == "token" else 1)
    total = sum(loss * weight for loss, weight in zip(losses, weights, strict=True))
    return total / sum(weights)  # type: ignore[return-value]


def _one_group(
    objective: SequenceWise, microbatch: RoutedTokens, probs_TE: Tensor, member_T: Tensor
) -> Tensor:
    top_k, num_experts = microbatch.ids_TK.shape[1], probs_TE.shape[1]
    if not isinstance(objective, DeviceLevel):
        return load_balance_loss(probs_TE, _counts(objective.config.assignments, microbatch, member_T), top_k)
    num_devices = objective.config.num_devices
    experts_per_device = num_experts // num_devices
    probs_TD = probs_TE.view(-1, num_devices, experts_per_device).sum(dim=2)
    if isinstance(objective, CommunicationLevel):
        device_TK = microbatch.ids_TK[member_T] // experts_per_device
        reached_D = torch.stack([(device_TK == d).any(dim=1).sum() for d in range(num_devices)])
        # D / (m T) sum_d reached_d P_d, which is load_balance_loss over devices
        return load_balance_loss(probs_TD, reached_D, objective.config.max_devices_per_token)
    counts_E = _counts(objective.config.assignments, microbatch, member_T)
    load_E = num_experts / (top_k * len(probs_TE)) * counts_E.to(probs_TE.dtype)
    load_D = load_E.view(num_devices, experts_per_device).mean(dim=1)
    return (load_D * probs_TD.mean(dim=0)).sum()
