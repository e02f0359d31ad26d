"""Tensors whose values are read when they are asked for, a box at a time.

Code that stacks, joins, cuts and transposes tensors of a checkpoint runs on these unchanged and moves no values:
each result remembers what it is made of. Reading a box of a result reads only what the box needs of each source,
straight into its destination. Any other operation is carried out on whole tensors, when its result is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Offset = tuple[int, ...]
# Fills a tensor with the box of its shape that begins at an offset; converts to the tensor's dtype.
Reader = Callable[[Offset, Tensor], None]


class LazyTensor(Tensor):
    """A tensor without values.

    Args:
        shape: of the whole.
        dtype: that operations on it see.
        read: fills a box.
    """

    read: Reader

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, read: Reader) -> LazyTensor:
        """Shape and dtype alone."""
        device = torch.device("cpu")
        return Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, read: Reader) -> None:
        self.read = read

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Remember the operation."""
        remember = _REMEMBERED.get(func)
        if remember is not None and not kwargs:
            return remember(*args)
        return _computed(func, args, kwargs or {})


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Values of a tensor, which may be lazy.

    Args:
        tensor: any tensor.
        dtype: of the result; None: the tensor's.
    """
    dtype = dtype or tensor.dtype
    if not isinstance(tensor, LazyTensor):
        return tensor.to(dtype)
    values = torch.empty(tensor.shape, dtype=dtype)
    tensor.read((0,) * tensor.dim(), values)
    return values


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """Result of any operation: shapes now, values when one of its results is read."""
    shapes = tree_map_only(LazyTensor, _without_values, (args, kwargs))
    result = func(*shapes[0], **shapes[1])

    def reader(pick: Callable[[Any], Tensor]) -> Reader:
        def read(offset: Offset, out: Tensor) -> None:
            values = tree_map_only(LazyTensor, whole, (args, kwargs))
            out.copy_(_box(pick(func(*values[0], **values[1])), offset, out.shape))

        return read

    if isinstance(result, Tensor):
        return LazyTensor(result.shape, result.dtype, reader(lambda value: value))
    return [LazyTensor(r.shape, r.dtype, reader(itemgetter(i))) for i, r in enumerate(result)]


def _without_values(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _box(values: Tensor, offset: Offset, shape: Sequence[int]) -> Tensor:
    return values[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


# ------------------------------------------------------------------ operations that are remembered


def _same(x: LazyTensor) -> LazyTensor:
    # Not x itself: an operation returns a new tensor.
    return LazyTensor(x.shape, x.dtype, x.read)


def _transpose(x: LazyTensor, dim0: int, dim1: int) -> LazyTensor:
    def swapped(sizes: Sequence[int]) -> tuple[int, ...]:
        order = list(sizes)
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return tuple(order)

    return LazyTensor(
        swapped(x.shape), x.dtype, lambda offset, out: x.read(swapped(offset), out.transpose(dim0, dim1))
    )


def _narrow(x: LazyTensor, dim: int, start: int, length: int) -> LazyTensor:
    def read(offset: Offset, out: Tensor) -> None:
        x.read((*offset[:dim], offset[dim] + start, *offset[dim + 1 :]), out)

    return LazyTensor((*x.shape[:dim], length, *x.shape[dim + 1 :]), x.dtype, read)


def _split(x: LazyTensor, size: int, dim: int = 0) -> list[LazyTensor]:
    d = dim % x.dim()
    return [_narrow(x, d, start, min(size, x.shape[d] - start)) for start in range(0, x.shape[d], size)]


def _split_with_sizes(x: LazyTensor, sizes: Sequence[int], dim: int = 0) -> list[LazyTensor]:
    return [_narrow(x, dim % x.dim(), sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _select(x: LazyTensor, dim: int, index: int) -> LazyTensor:
    d = dim % x.dim()

    def read(offset: Offset, out: Tensor) -> None:
        x.read((*offset[:d], index % x.shape[d], *offset[d:]), out.unsqueeze(d))

    return LazyTensor((*x.shape[:d], *x.shape[d + 1 :]), x.dtype, read)


def _unbind(x: LazyTensor, dim: int = 0) -> list[LazyTensor]:
    return [_select(x, dim, i) for i in range(x.shape[dim])]


def _squeeze(x: LazyTensor, dim: int) -> LazyTensor:
    return _select(x, dim, 0) if x.shape[dim] == 1 else _same(x)


def _cat(parts: Sequence[LazyTensor], dim: int = 0) -> LazyTensor:
    # On the meta device torch checks shapes and finds the dtype.
    joined = torch.cat([_without_values(x) for x in parts], dim)
    d = dim % joined.dim()
    starts = [sum(x.shape[d] for x in parts[:i]) for i in range(len(parts))]

    def read(offset: Offset, out: Tensor) -> None:
        first, end = offset[d], offset[d] + out.shape[d]
        for part, start in zip(parts, starts, strict=True):
            low, high = max(first, start), min(end, start + part.shape[d])
            if low < high:
                piece = out.narrow(d, low - first, high - low)
                part.read((*offset[:d], low - start, *offset[d + 1 :]), piece)

    return LazyTensor(joined.shape, joined.dtype, read)


def _stack(parts: Sequence[LazyTensor], dim: int = 0) -> LazyTensor:
    shapes = {tuple(x.shape) for x in parts}
    if len(shapes) > 1:
        raise RuntimeError(f"tensors of shapes {sorted(shapes)} cannot be stacked")
    (shape,) = shapes
    d = dim % (len(shape) + 1)

    def read(offset: Offset, out: Tensor) -> None:
        inner = (*offset[:d], *offset[d + 1 :])
        for i in range(out.shape[d]):
            parts[offset[d] + i].read(inner, out.select(d, i))

    return LazyTensor((*shape[:d], len(parts), *shape[d:]), parts[0].dtype, read)


_ATEN = torch.ops.aten
_REMEMBERED: dict[Any, Callable[..., Any]] = {
    _ATEN.detach.default: _same,
    _ATEN.alias.default: _same,
    _ATEN.clone.default: _same,
    _ATEN.transpose.int: _transpose,
    _ATEN.split.Tensor: _split,
    _ATEN.split_with_sizes.default: _split_with_sizes,
    _ATEN.select.int: _select,
    _ATEN.unbind.int: _unbind,
    _ATEN.squeeze.dim: _squeeze,
    _ATEN.cat.default: _cat,
    _ATEN.stack.default: _stack,
}
