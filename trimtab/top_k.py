"""Ids of the k largest of each row, the lowest ids of equal ones: one choice for all devices and algorithms.

Every value becomes an integer in the order of floats, with the complement of its place below it. No two are equal
then, so that no algorithm has anything to choose. On a CPU, where `torch.topk` takes most of a router's time, one
largest integer after the other is taken along vector registers instead.

Shapes: T tokens, E experts, K top-k.
"""

import math

import torch
from torch import Tensor

from trimtab.blocks import is_readable, is_transformed, token_blocks, tokens_per_block

_PLACE = 2**32 - 1  # the bits of a key that hold its column
_TAKEN = torch.iinfo(torch.int64).min  # below every key
# More rounds than this, or fewer elements, and sorting is faster.
_MOST_ROUNDS = 32
_LEAST_ELEMENTS = 2**14


def largest_ids(ranks_TE: Tensor, top_k: int, out_TK: Tensor | None = None) -> Tensor:
    """The k largest of each row, in descending order.

    Args:
        ranks_TE: (T, E) float32 or float64. No gradient; left as it is.
        top_k: K, at most E.
        out_TK: (T, K) int64 to write to.

    Returns:
        (T, K) int64: NaN before all numbers, 0 and -0 equal, of equal values the lowest id first.
    """
    in_rounds = top_k <= _MOST_ROUNDS and ranks_TE.numel() >= _LEAST_ELEMENTS
    if ranks_TE.dtype == torch.float64 or not (in_rounds and is_readable(ranks_TE)):
        ids_TK = _sorted_ids(ranks_TE, top_k)
        return ids_TK if out_TK is None else out_TK.copy_(ids_TK)
    if out_TK is None:
        out_TK = torch.empty(*ranks_TE.shape[:-1], top_k, dtype=torch.int64, device=ranks_TE.device)
    keys_TE = keys_of(ranks_TE)
    for place_T1 in out_TK.split(1, dim=-1):
        largest_T1 = keys_TE.amax(dim=-1, keepdim=True)
        torch.bitwise_and(largest_T1.bitwise_not_(), _PLACE, out=place_T1)
        keys_TE.scatter_(-1, place_T1, _TAKEN)
    return out_TK


def _sorted_ids(ranks_TE: Tensor, top_k: int) -> Tensor:
    # Of float64, a value and its place have no room in one integer; and not every transformation views bits.
    if ranks_TE.dtype == torch.float64 or is_transformed(ranks_TE):
        return ranks_TE.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return keys_of(ranks_TE).topk(top_k, dim=-1).indices


def keys_of(ranks_TE: Tensor) -> Tensor:
    """(T, E) int64 in the order of the values, and against the order of columns where these are equal.

    Args:
        ranks_TE: (T, E) float32. No gradient.
    """
    # Adding 0 makes one zero of two. One NaN, whose sign puts it above infinity.
    order_TE = (ranks_TE + 0.0).nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf).view(torch.int32)
    # Negative floats grow with their magnitude; what flips all bits but the sign turns their order around.
    order_TE.bitwise_xor_((order_TE >> 31).bitwise_and_(torch.iinfo(torch.int32).max))
    places_E = _PLACE - torch.arange(ranks_TE.shape[-1], device=ranks_TE.device)
    return order_TE.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(places_E)


@torch.library.custom_op("trimtab::largest_ids", mutates_args=())
def largest_ids_of_blocks(ranks_TE: Tensor, top_k: int) -> Tensor:
    """`largest_ids` of float32 ranks on a CPU, as an operator that a compiler does not look into."""
    ids_TK = ranks_TE.new_empty(ranks_TE.shape[0], top_k, dtype=torch.int64)
    for ranks_bE, ids_bK in token_blocks(tokens_per_block(ranks_TE, 2), ranks_TE, ids_TK):
        largest_ids(ranks_bE, top_k, ids_bK)
    return ids_TK


@largest_ids_of_blocks.register_fake
def _(ranks_TE: Tensor, top_k: int) -> Tensor:
    return ranks_TE.new_empty(ranks_TE.shape[0], top_k, dtype=torch.int64)
