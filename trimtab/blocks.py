"""Blocks of tokens: what a CPU computes of (T, E) values piece by piece, so that temporaries stay in its cache.

Shapes: T tokens, E experts, b tokens of a block.

A temporary of a whole (T, E) costs a CPU more than the arithmetic on it, most of it in pages that the system hands
out and takes back. Elsewhere, and under a compiler, which fuses what touches the same elements, all tokens are one
block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**19  # 2 MB of float32
_ROWS = 64


def is_readable(tensor: Tensor) -> bool:
    """Whether Python may branch on values: they lie in the host's memory, and no transformation is looking."""
    if type(tensor) is not Tensor or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not is_transformed(tensor)


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transformation of functions, as `torch.vmap`, stands behind it; False under a compiler."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def tokens_per_block(logits_TE: Tensor, num_temporaries: int = 1) -> int:
    """b, at least 1: T or more where one block serves.

    Args:
        logits_TE: (T, E); none of its values is read.
        num_temporaries: of the block's size, that are alive together.
    """
    if torch.compiler.is_compiling() or logits_TE.device.type != "cpu":
        return max(logits_TE.shape[0], 1)
    num_tokens, num_experts = logits_TE.shape
    elements = num_tokens * num_experts * num_temporaries
    # From half a block on two blocks: each saves half of a temporary and costs a few operators.
    num_blocks = max(2, -(-elements // BLOCK_ELEMENTS)) if 2 * elements > BLOCK_ELEMENTS else 1
    rows = -(-num_tokens // num_blocks)
    # Whole vector registers: the rest of a vector may be rounded otherwise, and blocks must change no bit.
    return max(-(-rows // _ROWS) * _ROWS, 1)


def token_blocks(num_tokens_of_block: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The blocks of tensors that have one row per token, side by side; views, and None for None.

    Args:
        num_tokens_of_block: b.
        tensors: (T, ...) each, or None, but not the first.
    """
    first = tensors[0]
    assert first is not None
    if num_tokens_of_block >= first.shape[0]:
        yield tensors
        return
    pieces = [None if tensor is None else tensor.split(num_tokens_of_block) for tensor in tensors]
    for place in range(-(-first.shape[0] // num_tokens_of_block)):
        yield tuple(None if piece is None else piece[place] for piece in pieces)
