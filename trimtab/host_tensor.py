"""Host tensors: CPU tensors whose values may still be on their way from a device.

A `HostTensor` knows shape, dtype and strides at once, and waits for its values where they are first needed.
Views of it share its values and do not wait; `torch.stack` and `torch.cat` of host tensors are formed when they
are first used. Everything else sees an ordinary CPU tensor.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten


def is_ready(tensor: Tensor) -> bool:
    """Whether a tensor can be read without waiting: any can but a `HostTensor` whose values are on their way."""
    return not isinstance(tensor, HostTensor) or tensor.promise.is_ready()


def wait(tensor: Tensor) -> Tensor:
    """The ordinary CPU tensor that a `HostTensor` stands for, in the same memory; any other tensor as it is."""
    return tensor.promise.writable() if isinstance(tensor, HostTensor) else tensor


class Promise:
    """A CPU tensor that is there, or will be: a copy on its way, a join of others, or a view."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._joins: weakref.WeakSet[Join] = weakref.WeakSet()
        self.is_exposed = False  # somebody has an ordinary tensor in its memory, and may write to it

    def is_ready(self) -> bool:
        """Whether `result` returns without waiting."""
        raise NotImplementedError

    def result(self) -> Tensor:
        """The ordinary CPU tensor, in the same memory at every call. Waits. To be read only; see `writable`."""
        raise NotImplementedError

    @property
    def root(self) -> Promise:
        """The promise whose memory this one lies in."""
        return self

    def writable(self) -> Tensor:
        """`result` for somebody who may write to it: joins that have taken the present values are formed first."""
        root = self.root
        with root.lock:
            root.is_exposed = True
            joins = list(root._joins)
        for join in joins:
            join.result()
        # A tensor of its own: giving it another shape, or a gradient, is the caller's affair.
        return self.result().detach()

    def taken_by(self, join: Join) -> None:
        """Remember that a join has taken the present values."""
        root = self.root
        with root.lock:
            root._joins.add(join)


class View(Promise):
    """A view of another promise.

    Args:
        base: what is viewed.
        view: makes the view of the base's tensor.
    """

    def __init__(self, base: Promise, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._root = base.root
        # No chain of calls, however often a view is viewed.
        before = base._steps if isinstance(base, View) else ()
        self._steps: tuple[Callable[[Tensor], Tensor], ...] = (*before, view)

    @property
    def root(self) -> Promise:
        return self._root

    def is_ready(self) -> bool:
        return self._root.is_ready()

    def result(self) -> Tensor:
        tensor = self._root.result()
        for step in self._steps:
            tensor = step(tensor)
        return tensor


class Join(Promise):
    """`torch.stack` or `torch.cat` of tensors, formed when it is needed; its inputs are let go then.

    Args:
        inputs: CPU tensors, some of them host tensors. Ordinary ones are copied, as they may change before it
            is formed.
        join: makes the result of ordinary tensors.
    """

    def __init__(self, inputs: Sequence[Tensor], join: Callable[[Sequence[Tensor]], Tensor]) -> None:
        super().__init__()
        self._inputs = [one.promise if isinstance(one, HostTensor) else one.clone() for one in inputs]
        self._join = join
        self._result: Tensor | None = None
        for one in self._inputs:
            if isinstance(one, Promise):
                one.taken_by(self)

    def is_ready(self) -> bool:
        """Whether its inputs are there; forming it is work, but no waiting."""
        return all(not isinstance(one, Promise) or one.is_ready() for one in tuple(self._inputs))

    def result(self) -> Tensor:
        with self.lock:
            if self._result is None:
                ordinary = [one.result() if isinstance(one, Promise) else one for one in self._inputs]
                with torch.no_grad(), torch.inference_mode(False):
                    self._result = self._join(ordinary)
                self._inputs = []
            return self._result


class HostTensor(Tensor):
    """A CPU tensor whose first real use waits for its values.

    Shape, dtype, strides, device, ``len``, ``requires_grad``, views, `torch.stack` and `torch.cat` do not wait;
    the last three give host tensors. Any other operation waits and gives ordinary tensors, and so do
    ``numpy()``, ``tolist()``, ``item()``, printing, copying and pickling. Writing to it waits, and is seen by
    all that share its memory, as with any tensor; its shape cannot be changed in place.

    Args:
        promise: of the values.
        like: meta tensor of its shape, strides and dtype.
    """

    promise: Promise
    like: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, promise: Promise, like: Tensor) -> HostTensor:
        """Shape, strides and dtype alone."""
        # A tensor made in inference mode could not be saved for the backward of later training.
        with torch.inference_mode(False):
            return Tensor._make_wrapper_subclass(
                cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu")
            )

    def __init__(self, promise: Promise, like: Tensor) -> None:
        self.promise, self.like = promise, like

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Views and joins as promises, anything else on ordinary tensors."""
        kwargs = kwargs or {}
        parts = func.decompose(*args, **kwargs)  # in inference mode composite operators come here whole
        if parts is not NotImplemented:
            return parts
        if _is_view(func):
            return _view(func, *args, **kwargs)
        if func in (aten.stack.default, aten.cat.default) and all(map(_can_join, args[0])):
            return _join(func, *args, **kwargs)
        return _run(func, args, kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.promise.result())

    def __format__(self, spec: str) -> str:
        return format(self.promise.result(), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return wait(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.promise.result().clone()
        copied: Tensor = memo[id(self)]
        return copied

    def numpy(self, *, force: bool = False) -> Any:
        """As of an ordinary tensor, in the same memory."""
        return wait(self).numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return wait(self).__array__(*args, **kwargs)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return wait(self).__dlpack__(**kwargs)

    def tolist(self) -> Any:
        """As of an ordinary tensor."""
        return self.promise.result().tolist()

    def data_ptr(self) -> int:
        """As of an ordinary tensor, to the same memory."""
        return wait(self).data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """As of an ordinary tensor; what torch takes for a host tensor's storage is empty."""
        return wait(self).untyped_storage()


def _is_view(func: Any) -> bool:
    aliased = [argument.alias_info for argument in func._schema.arguments if argument.alias_info is not None]
    return bool(aliased) and not any(alias.is_write for alias in aliased)


def _view(func: Any, base: HostTensor, *args: Any, **kwargs: Any) -> Any:
    def view(tensor: Tensor, index: int | None = None) -> Tensor:
        viewed = func(tensor, *args, **kwargs)
        chosen: Tensor = viewed if index is None else viewed[index]
        return chosen

    like = func(base.like, *args, **kwargs)
    if isinstance(like, Tensor):
        return HostTensor(View(base.promise, view), like)
    return [HostTensor(View(base.promise, partial(view, index=index)), one) for index, one in enumerate(like)]


def _can_join(tensor: Tensor) -> bool:
    return isinstance(tensor, HostTensor) or (tensor.device.type == "cpu" and type(tensor) is Tensor)


def _join(func: Any, tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> HostTensor:
    likes = [
        one.like
        if isinstance(one, HostTensor)
        else torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")
        for one in tensors
    ]
    like = func(likes, *args, **kwargs)
    join = Join(tensors, lambda ordinary: func(ordinary, *args, **kwargs))
    if any(isinstance(one, HostTensor) and one.promise.root.is_exposed for one in tensors):
        # Later writes would not be noticed; the values are there, so that nobody waits for them.
        join.result()
    return HostTensor(join, like)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on ordinary tensors; one that writes returns the host tensors it wrote to."""
    written = {id(one): (one, wait(one)) for one in _written(func, args, kwargs)}
    if written and torch.Tag.inplace_view in func.tags:
        raise RuntimeError(
            f"{func} changes the shape of a host tensor in place; use the operator without underscore, or "
            "trimtab.host_tensor.wait(tensor), an ordinary tensor in the same memory"
        )

    def ordinary(tensor: HostTensor) -> Tensor:
        return written[id(tensor)][1] if id(tensor) in written else tensor.promise.result()

    args, kwargs = tree_map_only(HostTensor, ordinary, (args, kwargs))
    hosts = {id(tensor): host for host, tensor in written.values()}
    return tree_map_only(Tensor, lambda tensor: hosts.get(id(tensor), tensor), func(*args, **kwargs))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[HostTensor]:
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    values = [
        given.get(argument.name)
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, HostTensor)]
