"""Copies of device tensors in pinned host memory, made beside the compute.

`HostCopies.send` enqueues a copy and returns at once. What it returns, a `trimtab.host_tensor.HostTensor`,
waits for the copy where it is first used. Pinned memory is a pool: bounded, and used again when the last tensor
that lies in it is gone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.copy_engine import CopyEngine, CudaEngine
from trimtab.host_tensor import HostTensor, Promise
from trimtab.pinned_pool import Buffer, PinnedPool, size_class

DEFAULT_MAX_BYTES = 4 << 30


class HostMemoryError(RuntimeError):
    """Tensors that are still in use fill the pinned memory."""


class HostCopies:
    """Sends tensors to the host without waiting.

    One object may serve a whole process, and several threads. A deep copy, or one that was pickled, has the
    settings and a pool of its own.

    Args:
        engine: makes the copies; None for `trimtab.copy_engine.CudaEngine`, which does nothing before it gets a
            CUDA tensor.
        max_bytes: bound of the pinned memory, of which a tensor takes its size rounded up to a power of two.
        patience_s: seconds that `send` waits for other threads to let tensors go where tensors in use fill the
            pool.

    Raises:
        ValueError: a bound that is not positive, or a negative patience.
    """

    def __init__(
        self,
        engine: CopyEngine | None = None,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        patience_s: float = 0.0,
    ) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} must be at least 1, the bound of the pinned memory")
        if not 0 <= patience_s < float("inf"):
            raise ValueError(f"patience_s={patience_s} must be 0 or more seconds, and finite")
        self.engine = engine or CudaEngine()
        self.pool = PinnedPool(self.engine, max_bytes, patience_s)

    def __getstate__(self) -> dict[str, Any]:
        """The settings; memory and copies stay behind."""
        pool = self.pool
        return {"engine": self.engine, "max_bytes": pool.max_bytes, "patience_s": pool.patience_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with an empty pool."""
        self.engine = state["engine"]
        self.pool = PinnedPool(**state)

    def serves(self, tensor: Tensor) -> bool:
        """Whether a tensor is on a device that copies are made from on a side stream."""
        return tensor.device.type == self.engine.device_type

    def send(self, tensor: Tensor, *, may_change: bool = False) -> Tensor:
        """A copy of a tensor on the host, without history; later changes of the tensor do not reach it.

        Waits for nothing but, where the pool is full, for copies that nobody needs any more and for other
        threads.

        Args:
            tensor: of any shape, strides and dtype; on a CUDA device, unless the engine serves another. Where
                its values lie side by side in memory, whatever their order, they go by one copy of bytes;
                otherwise they are put side by side on the device first.
            may_change: the caller may write to the tensor in place before the copy is through. It is then
                copied on the device first. (Letting go of the tensor is safe without.)

        Returns:
            A `HostTensor`. An ordinary CPU tensor for an empty tensor, for one on the CPU and for one on a
            device that is not served; these copies are made at once.

        Raises:
            HostMemoryError: tensors that are still in use fill the pool.
            ValueError: a tensor subclass, or a sparse or quantised tensor.
        """
        tensor = _plain(tensor)
        if tensor.numel() == 0 or not self.serves(tensor):
            # A tensor made in inference mode could not be saved for the backward of later training.
            with torch.inference_mode(False):
                return tensor.to("cpu", copy=True)
        copy = self.start(tensor.clone() if may_change else tensor)
        if copy is None:
            raise HostMemoryError(self._full(tensor))
        return HostTensor(copy, copy.like)

    def start(self, tensor: Tensor) -> HostCopy | None:
        """Enqueue the copy of a served tensor that is not empty; None if there is no room for it."""
        dense = tensor.detach()
        if not torch.ops.aten.is_non_overlapping_and_dense(dense):
            dense = dense.contiguous()
        source = _bytes(dense)
        buffer = self.pool.take(source.numel())
        if buffer is None:
            return None
        try:
            self.engine.side_waits(dense.device)
            self.engine.copy(buffer.memory[: source.numel()], source)
            self.engine.keep(source)
            buffer.event = self.engine.record(dense.device)
        except BaseException:
            self.pool.give_back(buffer)
            raise
        with torch.inference_mode(False):
            lent = self.pool.lend(buffer, source.numel())
            values = lent.view(dense.dtype).as_strided(dense.shape, dense.stride())
        return HostCopy(self.engine, buffer, values, dense.device)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned memory that the pool has, in use or not; at most ``max_bytes``."""
        return self.pool.num_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of it that tensors in use lie in, or copies are on their way from or to."""
        return self.pool.used_bytes

    def _full(self, tensor: Tensor) -> str:
        needed = size_class(tensor.numel() * tensor.element_size())
        return (
            f"max_bytes={self.pool.max_bytes} of pinned memory, {self.used_bytes} of it in use, have no room for "
            f"{needed} bytes more, a {tensor.dtype} tensor of shape {tuple(tensor.shape)}; let go of earlier host "
            "tensors and their views once they are read, clone() what is kept for long, or raise max_bytes"
        )


class HostCopy(Promise):
    """A copy of a device tensor in pinned memory, there or on its way.

    Args:
        engine: that makes it.
        buffer: it lies in.
        values: the CPU tensor, in memory lent by the pool.
        device: it comes from.
    """

    def __init__(self, engine: CopyEngine, buffer: Buffer, values: Tensor, device: torch.device) -> None:
        super().__init__()
        self.engine, self._buffer, self._values, self._device = engine, buffer, values, device
        self._event = buffer.event

    @property
    def like(self) -> Tensor:
        """Meta tensor of its shape, strides and dtype."""
        values = self._values
        return torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")

    def is_ready(self) -> bool:
        event = self._event
        return event is None or self.engine.is_reached(event)

    def result(self) -> Tensor:
        event = self._event
        if event is not None:
            self.engine.wait(event)
            self._event = None
        return self._values

    def fetch(self) -> tuple[Tensor, Any]:
        """Enqueue the copy back: a tensor on the device, and the event from which on it may be read.

        Compute must wait for the event; letting go of the tensor before is safe.
        """
        values, engine = self._values, self.engine
        fetched = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=self._device)
        destination = _bytes(fetched)
        # Its memory may have been another tensor's, that compute is not through with.
        engine.side_waits(self._device)
        engine.copy(destination, self._buffer.memory[: destination.numel()])
        engine.keep(destination)
        event = engine.record(self._device)
        self._buffer.event = event
        return fetched, event


def _bytes(dense: Tensor) -> Tensor:
    """(n,) uint8: the memory of a tensor without gaps."""
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without history.

    Raises:
        ValueError: it is no ordinary strided tensor.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(
            f"send() got a {type(tensor).__name__} of layout {tensor.layout} and dtype {tensor.dtype}, expected an "
            "ordinary strided tensor; send tensor.to_local() of a DTensor, tensor.to_dense() or tensor.dequantize()"
        )
    return tensor.detach().resolve_conj().resolve_neg()
