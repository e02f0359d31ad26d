"""What crosses a boundary between ranks, and what its gradient is there: one table.

Legend, for the ranks of one axis: ``shard`` each rank holds its own tokens (or its own slice); ``whole``
every rank holds the same complete value; ``partial`` every rank holds a part of a sum.

Everything outside attention and experts is sharded over tokens by `dp`, `cp` and `tp` alike, so there is
one rule for parameters: a parameter that is not itself sharded has on each rank the gradient of that
rank's tokens, *partial* over all of `dp`, `cp`, `tp`, and FSDP's reduce-scatter sums it exactly once.
No replica of a router's weight exists that could drift away.

This module alone converts between placements, and between DTensors and local tensors. To read a row: in
forward a value goes from ``outside`` to ``inside``; in backward its gradient, which inside is
``grad_inside``, leaves as ``grad_outside``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trimtab.parallel import collectives


@dataclass(frozen=True, slots=True)
class Crossing:
    """One value that crosses a boundary.

    Args:
        what: the value.
        axis: mesh axis whose ranks differ.
        outside: placement before.
        inside: placement after.
        grad_inside: placement of the gradient that backward brings.
        grad_outside: placement of the gradient that leaves.
        convert: (value, dim, group name) -> value; its backward converts the gradient.
    """

    what: str
    axis: str
    outside: str
    inside: str
    grad_inside: str
    grad_outside: str
    convert: Callable[[Tensor, int, str], Tensor]

    def __call__(self, x: Tensor, *, dim: int, group: dist.ProcessGroup | None) -> Tensor:
        """Convert ``x`` along ``dim``; the identity without a group or with a group of one rank."""
        if group is None or group.size() == 1:
            return x
        return self.convert(x, dim, group.group_name)


def split(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's part of a value that is whole; the gradients of all parts are gathered in backward."""
    out: Tensor = collectives.own_part(x, dim, group)
    return out


def join(x: Tensor, dim: int, group: str) -> Tensor:
    """The whole value from every rank's part; each rank keeps its part of the (whole) gradient."""
    out: Tensor = _Join.apply(x, dim, group)
    return out


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: str) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return collectives.gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return collectives.own_part(grad, ctx.dim, ctx.group), None, None


_SHARD_TO_USE = ("shard", "whole", "partial", "shard", collectives.gather)
_SUM_TO_SHARD = ("partial", "shard", "shard", "whole", collectives.reduce_scatter)

CROSSINGS: dict[str, Crossing] = {
    "attention.input": Crossing("hidden states of all tokens, for this rank's heads", "tp", *_SHARD_TO_USE),
    "attention.output": Crossing("output of this rank's heads, summed over heads", "tp", *_SUM_TO_SHARD),
    "attention.keys": Crossing("keys of all tokens, for this rank's queries", "cp", *_SHARD_TO_USE),
    "attention.values": Crossing("values of all tokens, for this rank's queries", "cp", *_SHARD_TO_USE),
    "experts.input": Crossing("tokens, for this rank's slice of every hidden layer", "etp", *_SHARD_TO_USE),
    # Score after experts: weights multiply partial outputs. Score before: they multiply the input that
    # every rank uses. Either way each rank has a part of their gradient.
    "experts.weights": Crossing("top-k weights of those tokens", "etp", *_SHARD_TO_USE),
    "experts.output": Crossing("expert outputs, summed over hidden slices", "etp", *_SUM_TO_SHARD),
    # Only for host models that keep activations whole over tp; trimtab's trainer has none.
    "block.input": Crossing("input of a MoE block", "tp", "whole", "shard", "shard", "whole", split),
    "block.output": Crossing("output of a MoE block", "tp", "shard", "whole", "whole", "shard", join),
}


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter; its gradient is placed as the parameter is."""
    if isinstance(parameter, DTensor):
        out: Tensor = parameter.to_local(grad_placements=parameter.placements)
        return out
    return parameter


def table() -> str:
    """`CROSSINGS` as a Markdown table."""
    rows = ["| value | axis | forward | gradient |", "|---|---|---|---|"]
    for name, c in CROSSINGS.items():
        rows.append(
            f"| `{name}`: {c.what} | `{c.axis}` | {c.outside} -> {c.inside} | {c.grad_inside} -> {c.grad_outside} |"
        )
    return "\n".join(rows)
