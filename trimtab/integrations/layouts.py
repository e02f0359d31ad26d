"""Layouts of what router modules return: how logits, weights and ids are read off it and put in.

Shapes: T tokens, E experts, K top-k.

Module-level functions of plain tensor code, because the hooks that call them are traced by torch.compile and a
closure per layer would recompile for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Unpacked = tuple[Tensor, Tensor, Tensor]
Unpack = Callable[[Any, int], Unpacked]
Repack = Callable[[Any, Tensor], Any]
Replace = Callable[[Any, Tensor, Tensor], Any]


def unpack_common(output: Any, top_k: int) -> Unpacked:
    """(logits_TE, weights_TK, ids_TK, ...) of the layout nearly every family shares."""
    return output[0], output[1], output[2]


def repack_common(output: Any, weights_TK: Tensor) -> Any:
    """The same output with ``weights_TK`` in place of the weights; further elements are kept."""
    return (output[0], weights_TK, *output[2:])


def replace_common(output: Any, weights_TK: Tensor, ids_TK: Tensor) -> Any:
    """The same output with other weights and ids; logits and further elements are kept."""
    return (output[0], weights_TK, ids_TK, *output[3:])


def unpack_dense_scores(output: Any, top_k: int) -> Unpacked:
    """(logits_TE, scores_TE, ids_TK) from Llama 4's (scores_TE, logits_TE).

    The weights are the whole (T, E) tensor that scales the expert inputs, zero at unselected experts. The
    layout carries no indices, so they are the top-k of the logits, as in the router.
    """
    return output[1], output[0], output[1].detach().topk(top_k, dim=-1).indices


def repack_dense_scores(output: Any, weights_TE: Tensor) -> Any:
    """(weights_TE, logits_TE): Llama 4's layout with other weights."""
    return (weights_TE, output[1])


def replace_dense_scores(output: Any, weights_TK: Tensor, ids_TK: Tensor) -> Any:
    """(weights_TE, logits_TE): Llama 4's layout with other experts, by which alone it names them."""
    return (torch.zeros_like(output[0]).scatter(1, ids_TK, weights_TK), output[1])


def unpack_probabilities(output: Any, top_k: int) -> Unpacked:
    """(log probs_TE, weights_TK, ids_TK) from (probs_TE, weights_TK, ids_TK).

    softmax(log p) = p, value and gradient, so balance losses are exact. The logits' common shift is lost:
    logsumexp is 0, and a z-loss on these logits is meaningless (`Family.exact_logits` is False).
    """
    # A probability that underflowed is the smallest there is: the gradient of log 0 would be NaN.
    return output[0].clamp(min=torch.finfo(output[0].dtype).tiny).log(), output[1], output[2]
