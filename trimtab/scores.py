"""Router score functions and what their closed-form gradients need.

Shapes: T tokens, E experts.

Three score functions are in use: softmax (Switch, Mixtral, Qwen), sigmoid (DeepSeek-V3, Llama 4) and
sqrt-softplus (DeepSeek-V4). Balance losses see ``p = s / sum_j s_j``; everything here works on
``log s`` so that p has no epsilon in its normaliser: a router that lowers all its scores together
leaves p, and so the loss, unchanged.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

ScoreName = Literal["softmax", "sigmoid", "sqrt_softplus"]
SCORE_NAMES: tuple[ScoreName, ...] = get_args(ScoreName)

# Below this logit log(softplus(z)) is replaced by its series z - e^z/2; the next term is 5e-17.
_SERIES_BELOW = -18.0


def check_score(name: str) -> None:
    """Raise a ValueError unless ``name`` is one of `SCORE_NAMES`."""
    if name not in SCORE_NAMES:
        raise ValueError(f"score={name!r} is unknown; choose one of {', '.join(map(repr, SCORE_NAMES))}")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype for router arithmetic on logits of ``dtype``: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scores(logits_TE: Tensor, name: ScoreName) -> Tensor:
    """Router scores s: softmax(z), sigmoid(z) or sqrt(softplus(z)).

    Args:
        logits_TE: (..., E) logits; computed in float32, or float64 if given so. Gradient flows.
        name: score function.

    Returns:
        (..., E) scores in the compute dtype; positive, not normalised except for softmax.

    Raises:
        ValueError: unknown ``name``.

    Source: softmax, Fedus et al. 2021 (arXiv:2101.03961); sigmoid, DeepSeek-V3 (arXiv:2412.19437, eq. 15);
        sqrt-softplus, DeepSeek-V4 model code.
    """
    logits_TE = logits_TE.to(compute_dtype(logits_TE.dtype))
    if name == "softmax":
        return logits_TE.softmax(dim=-1)
    if name == "sigmoid":
        return logits_TE.sigmoid()
    return log_scores(logits_TE, name).exp()


def log_scores(logits_TE: Tensor, name: ScoreName) -> Tensor:
    """log s up to a constant per token, finite for every finite logit.

    Args:
        logits_TE: (..., E) logits. Gradient flows.
        name: score function.

    Returns:
        (..., E) in the compute dtype: z (softmax, whose normaliser is the same for all experts),
        log sigmoid(z), or 0.5 log softplus(z).

    Raises:
        ValueError: unknown ``name``.
    """
    check_score(name)
    logits_TE = logits_TE.to(compute_dtype(logits_TE.dtype))
    if name == "softmax":
        return logits_TE
    if name == "sigmoid":
        return F.logsigmoid(logits_TE)
    # The clamp keeps the branch that is not taken finite, in value and in gradient.
    direct = _softplus(logits_TE.clamp(min=_SERIES_BELOW)).log()
    series = logits_TE - 0.5 * logits_TE.clamp(max=_SERIES_BELOW).exp()
    return 0.5 * torch.where(logits_TE < _SERIES_BELOW, series, direct)


def probs(logits_TE: Tensor, name: ScoreName) -> Tensor:
    """Router probabilities p = s / sum_j s_j over all experts, rows sum to 1.

    Args:
        logits_TE: (..., E) logits. Gradient flows.
        name: score function.

    Returns:
        (..., E) in the compute dtype.

    Raises:
        ValueError: unknown ``name``.

    Source: DeepSeek-V3, arXiv:2412.19437, eq. 19 (without the selection bias).
    """
    if name != "sigmoid":
        return log_scores(logits_TE, name).softmax(dim=-1)
    logits_TE = logits_TE.to(compute_dtype(logits_TE.dtype))
    shift_T1 = shift_of_sigmoid(logits_TE.detach().amax(dim=-1, keepdim=True))
    if logits_TE.requires_grad and torch.is_grad_enabled():
        scores_TE = (logits_TE + shift_T1).sigmoid()
        return scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    scores_TE = (logits_TE + shift_T1).sigmoid_()
    return scores_TE.div_(scores_TE.sum(dim=-1, keepdim=True))


def shift_of_sigmoid(largest_T1: Tensor) -> Tensor:
    """What to add to logits so that sigmoid(z) / sum_j sigmoid(z_j) can be formed as it stands.

    Below -36 sigmoid(z) is e^z to the last bit of float64: shifting a whole row up to there leaves p and 1 - s
    unchanged and keeps the sum away from zero, at half the time of softmax(logsigmoid(z)).

    Args:
        largest_T1: (..., 1) largest logit of each row. No gradient.

    Returns:
        (..., 1), zero for rows that reach -36.
    """
    return (-36.0 - largest_T1).clamp_(min=0)


def log_score_derivative(logits_TE: Tensor, name: ScoreName) -> Tensor | None:
    """Slope h = d log s / dz, with the softmax normaliser left out: 1, 1 - sigmoid(z), sigma(z) / (2 softplus(z)).

    Args:
        logits_TE: (..., E) logits. No gradient.
        name: score function.

    Returns:
        (..., E) in the compute dtype, or None for softmax, where h = 1.

    Raises:
        ValueError: unknown ``name``.
    """
    check_score(name)
    logits_TE = logits_TE.to(compute_dtype(logits_TE.dtype))
    if name == "softmax":
        return None
    if name == "sigmoid":
        return (-logits_TE).sigmoid()
    clamped = logits_TE.clamp(min=_SERIES_BELOW)
    direct = clamped.sigmoid() / (2 * _softplus(clamped))
    series = 0.5 - 0.25 * logits_TE.clamp(max=_SERIES_BELOW).exp()
    return torch.where(logits_TE < _SERIES_BELOW, series, direct)


def _softplus(logits: Tensor) -> Tensor:
    # The default threshold of 20, above which softplus turns linear, is an error of 2e-9.
    return F.softplus(logits, threshold=36.0)
