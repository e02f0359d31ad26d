"""Instruments that need no clock: operators, bytes held for backward, bytes alive."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trimtab import hooks, ops

_ATEN = torch.ops.aten
_NO_KERNEL = {
    # Of tickets, which are numbers on the host; tests/test_no_sync.py refuses reads of anything else.
    _ATEN._local_scalar_dense,
    _ATEN.detach,
    _ATEN.empty,
    _ATEN.empty_like,
    _ATEN.empty_strided,
    _ATEN.new_empty,
    _ATEN.new_empty_strided,
}


class OpCounter(TorchDispatchMode):
    """Counts aten operators that are not views and do not only allocate: of a GPU about one launch each.

    Custom operators are looked into, so that what they call counts as if it stood outside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        custom = OPDEFS.get(func.name().partition(".")[0])
        if custom is not None:
            with self:
                return custom._init_fn(*args, **kwargs)
        if func.namespace == "aten":
            with self:
                composite = func.decompose(*args, **kwargs)
            if composite is not NotImplemented:
                return composite
            if not func.is_view and func.overloadpacket not in _NO_KERNEL:
                self.names[str(func)] += 1
        return func(*args, **kwargs)


@contextmanager
def unwatched() -> Iterator[None]:
    """Let trimtab run as it does when no mode looks at its operators, though one of this file does."""
    with patch.object(ops, "_is_watched", lambda: False):
        yield


def count_ops(run: Callable[[], Any]) -> int:
    """Operators of one run."""
    with unwatched(), OpCounter() as counter:
        run()
    return counter.names.total()


@dataclass(frozen=True, kw_only=True)
class Line:
    """A number that grows with the layers: ``fixed + per_layer L``, and how far it is from a line at most."""

    fixed: float
    per_layer: float
    error: float

    @classmethod
    def fit(cls, layers: Sequence[int], numbers: Sequence[float]) -> Line:
        """Least squares."""
        columns = torch.stack(
            [torch.ones(len(layers)), torch.tensor(layers, dtype=torch.float32)], dim=1
        ).double()
        want = torch.tensor(numbers, dtype=torch.float64)
        found = torch.linalg.lstsq(columns, want[:, None]).solution[:, 0]
        fixed, per_layer = (round(value, 6) + 0.0 for value in found.tolist())
        return cls(
            fixed=fixed, per_layer=per_layer, error=round((columns @ found - want).abs().max().item(), 6)
        )

    def __sub__(self, other: Line) -> Line:
        return Line(
            fixed=round(self.fixed - other.fixed, 6),
            per_layer=round(self.per_layer - other.per_layer, 6),
            error=self.error + other.error,
        )

    def json(self) -> dict[str, float]:
        """For a result file."""
        return asdict(self)


class _Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def held_bytes(
    forward: Callable[[], Any],
    backward: Callable[[Any], None],
    others: Iterable[Tensor],
    *,
    compiled: bool = False,
) -> int:
    """Bytes of distinct storages that live between forward and backward, but of the result.

    What autograd saves, and in eager whatever else operators made that still lives and whatever else Python holds:
    hooks of autograd's nodes hold tensors too, of which leaf logits were made by no operator.

    Args:
        forward: returns what backward is called with.
        backward: ends it.
        others: tensors that are not counted, though held: parameters, and inputs that every variant holds.
        compiled: forward runs compiled code, which nothing looks into.
    """
    alive: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        held = _Held(tensor)
        alive.add(held)
        return held

    live = LiveBytes()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor),
        # These hooks give a saved tensor as often as it is asked for.
        patch.object(hooks, "saved_tensors_are_packed", lambda: False),
        nullcontext() if compiled else unwatched(),
        nullcontext() if compiled else live,
        new_tensors() as found,
    ):
        result = forward()
        by_python = {} if compiled else _storages(found())
    returned = _storages(tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor))
    storages = {key: nbytes for key, nbytes in (live.made() | by_python).items() if key not in returned}
    storages |= _storages(held.tensor for held in alive)
    for key in _storages(others):
        storages.pop(key, None)
    backward(result)
    return sum(storages.values())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of storages, by address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@contextmanager
def new_tensors() -> Iterator[Callable[[], list[Tensor]]]:
    """Gives what finds the tensors that Python has got inside and still holds, also views of older ones."""
    gc.freeze()  # what there is already is not among the collector's objects then
    try:
        yield lambda: [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    finally:
        gc.unfreeze()


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operators made and that still live, and the most there were at once.

    What an operator allocates for itself while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._made: dict[int, tuple[int, int]] = {}

    def made(self) -> dict[int, int]:
        """Bytes of the storages that operators made and that still live, by address."""
        return dict(self._made.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # What comes from elsewhere is not counted, whatever views of it are returned.
        self._see((args, kwargs), count=False)
        out = func(*args, **kwargs)
        self._see(out, count=True)
        return out

    def _see(self, tree: Any, *, count: bool) -> None:
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, nbytes = storage._cdata, storage.nbytes() if count else 0
            if key not in self._storages:
                self._storages[key] = weakref.ref(storage, partial(self._drop, key, nbytes))
                if count:
                    self._made[key] = storage.data_ptr(), nbytes
                self.now += nbytes
                self.peak = max(self.peak, self.now)

    def _drop(self, key: int, nbytes: int, ref: Any) -> None:
        del self._storages[key]
        self._made.pop(key, None)
        self.now -= nbytes
