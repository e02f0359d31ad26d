"""Collectives as differentiable operators that compilers and checkpointing see as one node.

Shapes: N rows, D width, R ranks of the group. ``group`` is the name of a process group
(``ProcessGroup.group_name``): operators receive numbers, strings and tensors only.

Each operator's backward is the adjoint of its forward for tensors that differ between ranks:

    gather          all-gather along a dim          backward: reduce_scatter
    reduce_scatter  sum, keep this rank's part      backward: gather
    own_part        keep this rank's part           backward: gather
    exchange_rows   uneven all-to-all of rows       backward: the exchange back

What a tensor's gradient is on each rank (whole, or a partial sum) decides which one is right where; that
is stated in `trimtab.parallel.placements`, which alone calls them on values that cross a boundary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

# Renamed in torch 2.13, which warns of the old names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def resolve(group: str) -> dist.ProcessGroup:
    """The process group of a name."""
    name: Any = group  # the type of names differs between versions of torch
    return _resolve_process_group(name)


@torch.library.custom_op("trimtab::gather", mutates_args=())
def gather(x: Tensor, dim: int, group: str) -> Tensor:
    """Concatenate the ranks' equal parts along ``dim`` in rank order, on every rank."""
    process_group = resolve(group)
    num_ranks = process_group.size()
    x = x.contiguous()
    out = x.new_empty(num_ranks * x.shape[0], *x.shape[1:])
    _all_gather(out, x, group=process_group)
    # A copy where dim is 0 as well would be a waste; elsewhere parts lie one after another and move.
    return out if dim == 0 else torch.cat(out.chunk(num_ranks), dim=dim)


@gather.register_fake
def _(x: Tensor, dim: int, group: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] * resolve(group).size()
    return x.new_empty(shape)


@torch.library.custom_op("trimtab::reduce_scatter", mutates_args=())
def reduce_scatter(x: Tensor, dim: int, group: str) -> Tensor:
    """Sum over ranks and keep this rank's part of ``dim``, which the number of ranks must divide."""
    process_group = resolve(group)
    num_ranks = process_group.size()
    parts = x.contiguous() if dim == 0 else torch.cat(x.chunk(num_ranks, dim=dim))
    out = x.new_empty(parts.shape[0] // num_ranks, *parts.shape[1:])
    _reduce_scatter(out, parts, group=process_group)
    return out


@reduce_scatter.register_fake
def _(x: Tensor, dim: int, group: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] // resolve(group).size()
    return x.new_empty(shape)


@torch.library.custom_op("trimtab::own_part", mutates_args=())
def own_part(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's part along ``dim`` of a value that every rank has; the number of ranks must divide it."""
    process_group = resolve(group)
    part = x.chunk(process_group.size(), dim=dim)[process_group.rank()]
    return part.clone(memory_format=torch.contiguous_format)  # operators return no views


@own_part.register_fake
def _(x: Tensor, dim: int, group: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] // resolve(group).size()
    return x.new_empty(shape)


@torch.library.custom_op("trimtab::exchange_counts", mutates_args=())
def exchange_counts(counts_Re: Tensor, group: str) -> Tensor:
    """Row r is what rank r has for this rank: an all-to-all of equal rows, (R, e) integers. No gradient."""
    out = torch.empty_like(counts_Re, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, counts_Re.contiguous(), group=resolve(group))
    return out


@exchange_counts.register_fake
def _(counts_Re: Tensor, group: str) -> Tensor:
    return torch.empty_like(counts_Re, memory_format=torch.contiguous_format)


@torch.library.custom_op("trimtab::exchange_rows", mutates_args=())
def exchange_rows(x_ND: Tensor, send_R: Tensor, receive_R: Tensor, num_rows: int, group: str) -> Tensor:
    """Uneven all-to-all of rows: rank r gets the next ``send_R[r]`` rows and sends ``receive_R[r]``.

    Args:
        x_ND: (N, D) rows ordered by destination. Gradient flows.
        send_R: (R,) integers that sum to N. Read by the host.
        receive_R: (R,) integers.
        num_rows: sum of ``receive_R`` where it is known beforehand, else -1.
        group: name of the process group.

    Returns:
        (sum of ``receive_R``, D) rows ordered by source.
    """
    send, receive = send_R.tolist(), receive_R.tolist()
    out = x_ND.new_empty(sum(receive), *x_ND.shape[1:])
    dist.all_to_all_single(out, x_ND.contiguous(), receive, send, group=resolve(group))
    return out


@exchange_rows.register_fake
def _(x_ND: Tensor, send_R: Tensor, receive_R: Tensor, num_rows: int, group: str) -> Tensor:
    rows: Any = num_rows
    if isinstance(num_rows, int) and num_rows == -1:
        rows = torch.library.get_ctx().new_dynamic_size()
    return x_ND.new_empty(rows, *x_ND.shape[1:])


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, ctx.dim, ctx.group = inputs


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return reduce_scatter(grad, ctx.dim, ctx.group), None, None


def _reduce_scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return gather(grad, ctx.dim, ctx.group), None, None


def _keep_exchange(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x_ND, send_R, receive_R, _, ctx.group = inputs
    ctx.save_for_backward(send_R, receive_R)
    ctx.num_rows = x_ND.shape[0]


def _exchange_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    send_R, receive_R = ctx.saved_tensors
    return exchange_rows(grad, receive_R, send_R, ctx.num_rows, ctx.group), None, None, None, None


gather.register_autograd(_gather_backward, setup_context=_keep_arguments)
reduce_scatter.register_autograd(_reduce_scatter_backward, setup_context=_keep_arguments)
own_part.register_autograd(_reduce_scatter_backward, setup_context=_keep_arguments)
exchange_rows.register_autograd(_exchange_backward, setup_context=_keep_exchange)
