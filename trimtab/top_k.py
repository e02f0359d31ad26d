"""Ids of the k largest of each row, as `torch.topk` chooses them, in less time on a CPU.

Shapes: T tokens, E experts, K top-k, b tokens of a block.

`torch.topk` spends most of a router's time on a CPU, and of that a fifth on looking for NaN in every comparison.
Integers in the order of the floats need no such look. The algorithm, and so its choice among equal values, is
the same.
"""

import math

import torch
from torch import Tensor

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
# From so many columns per k on, torch.topk keeps a heap instead, which compares little.
_HEAP_FROM = 64


def by_keys(ranks_TE: Tensor, top_k: int) -> bool:
    """Whether `keys_of` serves these values; none of them is read."""
    if ranks_TE.device.type != "cpu" or ranks_TE.dtype not in _INTEGERS:
        return False
    return ranks_TE.shape[1] < _HEAP_FROM * top_k


def keys_of(ranks_TE: Tensor, out_TE: Tensor | None = None) -> Tensor:
    """(T, E) integers in the order of floats: NaN before all, -0 equal to 0.

    Args:
        ranks_TE: (T, E) float32 or float64. No gradient.
        out_TE: (T, E) of the same dtype, whose memory the integers take; may be ``ranks_TE`` itself.
    """
    # One NaN of a positive sign, which as an integer is above infinity, and one zero.
    out_TE = torch.nan_to_num(ranks_TE, nan=math.nan, posinf=math.inf, neginf=-math.inf, out=out_TE)
    keys_TE = out_TE.add_(0.0).view(_INTEGERS[ranks_TE.dtype])
    sign_bit = torch.iinfo(keys_TE.dtype).bits - 1
    # Negative floats grow with their magnitude; what flips all bits but the sign turns their order around.
    return keys_TE.bitwise_xor_((keys_TE >> sign_bit).bitwise_and_(torch.iinfo(keys_TE.dtype).max))
