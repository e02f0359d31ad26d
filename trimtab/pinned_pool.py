"""A bounded pool of pinned host memory, lent as ordinary tensors and taken back when the last of them is gone."""

from __future__ import annotations

import ctypes
import queue
import threading
import weakref
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from trimtab.copy_engine import CopyEngine

SMALLEST = 512  # bytes; ids and weights of a few tokens share a size with each other


def size_class(num_bytes: int) -> int:
    """Bytes of the buffer that holds ``num_bytes``: the next power of two.

    torch rounds pinned memory up to powers of two itself, so a closer fit would only be counted wrongly.
    """
    return max(SMALLEST, 1 << (num_bytes - 1).bit_length())


@dataclass(slots=True, eq=False)
class Buffer:
    """Pinned memory.

    Args:
        memory: (n,) uint8.
        event: of the last copy from or to it; None if none is on its way.
    """

    memory: Tensor
    event: Any = None

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.memory.numel()


class PinnedPool:
    """Buffers by size, bounded together.

    A buffer that nobody refers to any more is free as soon as the last copy from or to it is through.

    Args:
        engine: allocates, and knows when copies are through.
        max_bytes: bound of all buffers together, in use or not.
        patience_s: seconds to wait for another thread to let go of a buffer if all are in use.
    """

    def __init__(self, engine: CopyEngine, max_bytes: int, patience_s: float) -> None:
        self.engine = engine
        self.max_bytes = max_bytes
        self.patience_s = patience_s
        self.num_bytes = 0
        self._lock = threading.Lock()
        self._free: dict[int, list[Buffer]] = {}
        self._on_their_way: list[Buffer] = []  # nobody refers to them, but a copy may not be through
        # Finalizers put buffers here, in whatever thread, even one that is inside this pool: they must not lock.
        self._let_go: queue.SimpleQueue[Buffer] = queue.SimpleQueue()

    def take(self, num_bytes: int) -> Buffer | None:
        """A buffer of at least ``num_bytes`` that nobody uses; None if those in use leave no room.

        Waits where the pool is full: for copies of buffers that nobody refers to any more, in the order in which
        they were let go of, then for other threads to let go of one.
        """
        wanted = size_class(num_bytes)
        with self._lock:
            deadline = monotonic() + self.patience_s
            while True:
                self._collect()
                buffer = self._free_buffer(wanted)
                if buffer is not None or wanted > self.max_bytes:
                    return buffer
                if self._on_their_way:
                    # Waiting may be interrupted, and the buffer must be in one place and one alone.
                    self.engine.wait(self._on_their_way[0].event)
                    self._is_free(self._on_their_way.pop(0))
                elif not self._await_let_go(deadline):
                    return None

    def give_back(self, buffer: Buffer) -> None:
        """Take back a buffer that was not lent; a copy may be on its way to it."""
        self._let_go.put(buffer)

    def lend(self, buffer: Buffer, num_bytes: int) -> Tensor:
        """The buffer's first bytes, an (n,) uint8 tensor; the buffer comes back when nothing lies in that memory.

        Args:
            buffer: from `take`. Whoever starts another copy from or to it sets its event.
            num_bytes: n, at least 1.
        """
        # Storage that torch makes of foreign memory holds the owner of that memory, and lets go of it when the last
        # tensor and view is gone, whichever thread or graph held it.
        owner = (ctypes.c_ubyte * buffer.num_bytes).from_address(buffer.memory.data_ptr())
        weakref.finalize(owner, self._let_go.put, buffer).atexit = False
        return torch.frombuffer(owner, dtype=torch.uint8, count=num_bytes)

    @property
    def used_bytes(self) -> int:
        """Bytes of buffers that are referred to, or that copies are on their way from or to."""
        with self._lock:
            self._collect()
            return self.num_bytes - sum(b.num_bytes for buffers in self._free.values() for b in buffers)

    def _collect(self) -> None:
        """Sort out what was let go of."""
        while True:
            try:
                self._on_their_way.append(self._let_go.get_nowait())
            except queue.Empty:
                break
        for buffer in list(self._on_their_way):
            if buffer.event is None or self.engine.is_reached(buffer.event):
                self._on_their_way.remove(buffer)
                self._is_free(buffer)

    def _is_free(self, buffer: Buffer) -> None:
        buffer.event = None
        self._free.setdefault(buffer.num_bytes, []).append(buffer)

    def _free_buffer(self, wanted: int) -> Buffer | None:
        buffers = self._free.get(wanted)
        if buffers:
            return buffers.pop()
        if wanted > self.max_bytes:
            return None
        if self.num_bytes + wanted > self.max_bytes:
            # A larger one serves as well, and costs no allocation, for which the driver may stop the device.
            larger = min(
                (size for size, buffers in self._free.items() if buffers and size > wanted), default=0
            )
            if larger:
                return self._free[larger].pop()
            self._discard(self.num_bytes + wanted - self.max_bytes)
        if self.num_bytes + wanted > self.max_bytes:
            return None
        # Memory made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            buffer = Buffer(self.engine.allocate(wanted))
        self.num_bytes += wanted
        return buffer

    def _discard(self, num_bytes: int) -> None:
        """Give free buffers back to the system, if they are enough to make room."""
        free = sum(size * len(buffers) for size, buffers in self._free.items())
        if free < num_bytes:
            return
        freed = 0
        for buffers in self._free.values():
            while buffers and freed < num_bytes:
                freed += buffers.pop().num_bytes
        self.num_bytes -= freed
        self.engine.discard(freed)

    def _await_let_go(self, deadline: float) -> bool:
        timeout = deadline - monotonic()
        if timeout <= 0:
            return False
        try:
            self._on_their_way.append(self._let_go.get(timeout=timeout))
        except queue.Empty:
            return False
        return True
