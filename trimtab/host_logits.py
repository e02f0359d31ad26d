"""Router logits that wait for backward in host memory: `attach(..., keep="host")`.

Shapes: T tokens, E experts.

Forward sends the logits beside the compute and saves a key in their place; backward fetches them, and starts
fetching those of the layer before, which its backward will want next. So only the first layer of a backward
waits for a copy.

In eager a router calls `hold` and `take` directly. In a traced model they are two operators, opaque to
torch.compile. What is held lives as long as the memory of its key, whoever keeps that: an autograd graph that
is thrown away lets go of its logits, whether backward ran or not.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from trimtab.host_copies import HostCopies, HostCopy
from trimtab.score_node import saved_tensors_are_packed

# Operators receive numbers and tensors only; this is how they find what they are about.
_places: weakref.WeakValueDictionary[int, HostLogits] = weakref.WeakValueDictionary()
_held: dict[int, Held] = {}
_next_id = itertools.count()

# A CUDA graph would replay the kernels without the Python that copies.
_TAGS = (torch.Tag.cudagraph_unsafe,)


class HostLogits:
    """Where the routers of one model leave their logits until backward.

    Args:
        copies: makes the copies. May be shared with other users.
    """

    def __init__(self, copies: HostCopies) -> None:
        self.copies = copies
        self._start()

    def _start(self) -> None:
        self._id = next(_next_id)
        _places[self._id] = self
        # Of each forward what was held last, as long as it is held.
        self._last: weakref.WeakValueDictionary[int, Held] = weakref.WeakValueDictionary()
        self._has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        """The settings; what is held stays behind."""
        return {"copies": self.copies}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with nothing held."""
        self.copies = state["copies"]
        self._start()

    @property
    def device_type(self) -> str:
        """Type of the devices whose logits go to the host."""
        return self.copies.engine.device_type

    def handle(self) -> Tensor:
        """A small CPU tensor that names this object to operators."""
        return torch.tensor([self._id], dtype=torch.int64, device="cpu")

    def hold(self, logits_TE: Tensor, ticket: int) -> Held | None:
        """Start the copy of one layer's logits; None if there are none, or the host has no room for them."""
        if logits_TE.numel() == 0:
            return None
        copy = self.copies.start(logits_TE)
        if copy is None:
            if not self._has_warned:
                warnings.warn(
                    f"max_bytes={self.copies.pool.max_bytes} of pinned memory are full: logits of routers stay on "
                    "the device; give attach() host_copies=HostCopies(max_bytes=...) with more, or keep='input'",
                    stacklevel=2,
                )
                self._has_warned = True
            return None
        held = Held(copy, self._last.get(ticket))
        self._last[ticket] = held
        return held


class Held:
    """Logits of one layer and forward, until backward.

    Args:
        logits: their copy on the host; the logits themselves if they stay on the device.
        before: of the layer before in the same forward.
    """

    def __init__(self, logits: HostCopy | Tensor, before: Held | None) -> None:
        self._logits = logits
        self._before = None if before is None else weakref.ref(before)
        self._lock = threading.Lock()
        self._fetched: tuple[Tensor, Any] | None = None

    @property
    def is_on_host(self) -> bool:
        """Whether the logits left the device."""
        return isinstance(self._logits, HostCopy)

    def take(self) -> Tensor:
        """The logits on the device; may be asked for again. Starts fetching those of the layer before."""
        if isinstance(self._logits, Tensor):
            return self._logits
        with self._lock:
            fetched, event = self._fetched or self._logits.fetch()
            self._fetched = None
        before = None if self._before is None else self._before()
        if before is not None:
            before.prefetch()
        self._logits.engine.compute_waits(event, fetched.device)
        return fetched

    def prefetch(self) -> None:
        """Start fetching, if that has not been done."""
        with self._lock:
            if self._fetched is None and isinstance(self._logits, HostCopy):
                self._fetched = self._logits.fetch()


def hold(logits_TE: Tensor, place: Tensor | None, ticket: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What to save for backward in place of a router's logits.

    Args:
        logits_TE: (T, E) logits. No gradient. Not to be changed in place before backward.
        place: handle of a `HostLogits`; None to keep the logits.
        ticket: () int64 on the CPU, names the forward.

    Returns:
        Two tensors for `take`: a key, and a (T, 0) tensor that tells the number of tokens. Or the logits as
        they are and None: without ``place``; of a tensor subclass; in a recomputation, whose backward follows at
        once; where the host has no room; and where hooks on saved tensors are active, as in the first forward
        of checkpointing, for it is they that decide what is kept.
    """
    if place is None or ticket is None or type(logits_TE) is not Tensor:
        return logits_TE, None
    rows_T0 = logits_TE.new_empty(logits_TE.shape[0], 0)
    if torch.compiler.is_compiling():
        return hold_traced(logits_TE, place, ticket), rows_T0
    held = None if _is_kept_otherwise() else _place(place).hold(logits_TE, int(ticket))
    return (logits_TE, None) if held is None else (_key(held), rows_T0)


def take(grad: Tensor, held: Tensor, rows_T0: Tensor | None, num_experts: int, dtype: torch.dtype) -> Tensor:
    """(T, E) logits that `hold` was given, on their device. To be read only.

    Args:
        grad: incoming gradient; without it a compiler could take the logits in forward.
        held: from `hold`.
        rows_T0: from `hold`.
        num_experts: E.
        dtype: of the logits.

    Raises:
        RuntimeError: the key is a copy of the one that `hold` returned, which is gone.
    """
    if rows_T0 is None:
        return held
    if torch.compiler.is_compiling():
        return take_traced(grad, held, rows_T0, num_experts, dtype)
    return _find(held).take()


@torch.library.custom_op("trimtab::hold", mutates_args=(), tags=_TAGS)
def hold_traced(logits_TE: Tensor, place: Tensor, ticket: Tensor) -> Tensor:
    """`hold` as an operator, which always returns a (1,) int64 key."""
    # A copy: a compiler that plans memory may write to an operator's input as soon as compute has passed it.
    found, logits_TE = _place(place), logits_TE.clone(memory_format=torch.contiguous_format)
    held = None if _is_kept_otherwise() else found.hold(logits_TE, int(ticket))
    return _key(Held(logits_TE, None) if held is None else held)


@hold_traced.register_fake
def _(logits_TE: Tensor, place: Tensor, ticket: Tensor) -> Tensor:
    return place.new_empty(1)


@torch.library.custom_op("trimtab::take", mutates_args=(), tags=_TAGS)
def take_traced(grad: Tensor, key: Tensor, rows_T0: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """`take` as an operator."""
    held = _find(key)
    logits_TE = held.take()
    # A compiler may write to what an operator returns.
    return logits_TE if held.is_on_host else logits_TE.clone()


@take_traced.register_fake
def _(grad: Tensor, key: Tensor, rows_T0: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    return rows_T0.new_empty(rows_T0.shape[0], num_experts, dtype=dtype)


def _place(handle: Tensor) -> HostLogits:
    place = _places.get(int(handle))
    if place is None:
        raise RuntimeError(
            "the balancer that this model was compiled with is gone; keep the model, or its balancer, and call "
            "torch.compiler.reset() after attaching another"
        )
    return place


def _key(held: Held) -> Tensor:
    """(1,) int64 CPU tensor that names what is held, which goes with its memory."""
    key = next(_next_id)
    owner = ctypes.c_int64(key)
    _held[key] = held
    weakref.finalize(owner, _held.pop, key, None).atexit = False
    return torch.frombuffer(owner, dtype=torch.int64)


def _find(key: Tensor) -> Held:
    held = _held.get(int(key))
    if held is None:
        raise RuntimeError(
            "logits that a router sent to the host are gone: hooks on saved tensors gave backward a copy of their "
            "key; attach with keep='logits' or keep='input' under such hooks"
        )
    return held


def _is_kept_otherwise() -> bool:
    """Whether this is a recomputation, or hooks decide what is kept of a forward."""
    return torch._C._current_graph_task_id() != -1 or saved_tensors_are_packed()
