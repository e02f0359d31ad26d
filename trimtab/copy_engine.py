"""What a copy between a device and the host is made of: pinned memory, a stream beside the compute, events.

`trimtab.host_copies` decides what is copied when; an engine does it. Tests inject engines of their own.

Order of a copy to the host: the side stream waits for the compute stream, which still works on the source; the
copy is enqueued; the source is marked as in use by the side stream; an event is recorded. Nobody has waited so
far.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class CopyEngine(Protocol):
    """Copies on a side stream, of which each device has one. Copies of a device run in the order of their calls.

    Args:
        device_type: type of the devices it serves, as in ``torch.device.type``.
    """

    device_type: str

    def allocate(self, num_bytes: int) -> Tensor:
        """(n,) uint8 page-locked host memory, uninitialised."""

    def discard(self, num_bytes: int) -> None:
        """Give memory back to the system that the caller has let go of: about ``num_bytes``."""

    def side_waits(self, device: torch.device) -> None:
        """What is copied next waits for what the compute stream has been given so far."""

    def copy(self, destination: Tensor, source: Tensor) -> None:
        """Copy bytes on the side stream; one of the two is on the device, both are (n,) uint8. Does not wait."""

    def keep(self, tensor: Tensor) -> None:
        """Nobody gets this device memory while the side stream is not through with what it was given so far."""

    def record(self, device: torch.device) -> Any:
        """An event that is reached when everything copied so far is there."""

    def is_reached(self, event: Any) -> bool:
        """Whether an event is reached. Does not wait."""

    def wait(self, event: Any) -> None:
        """Block this thread until an event is reached."""

    def compute_waits(self, event: Any, device: torch.device) -> None:
        """What the compute stream is given next waits for an event; this thread does not."""


class CudaEngine:
    """Copies by CUDA: one stream per device, made at its first copy. Nothing of CUDA is touched before."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._streams: dict[int, torch.cuda.Stream] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: streams belong to the process."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start without streams."""
        self._streams = {}

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def discard(self, num_bytes: int) -> None:
        # torch keeps page-locked memory that nobody uses; only this frees it. Before 2.13 it was private.
        empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(
            torch._C, "_host_emptyCache", None
        )
        if empty is not None:
            empty()

    def side_waits(self, device: torch.device) -> None:
        self._side(device).wait_stream(torch.cuda.current_stream(device))

    def copy(self, destination: Tensor, source: Tensor) -> None:
        device = source.device if source.is_cuda else destination.device
        with torch.cuda.stream(self._side(device)):
            destination.copy_(source, non_blocking=True)

    def keep(self, tensor: Tensor) -> None:
        tensor.record_stream(self._side(tensor.device))

    def record(self, device: torch.device) -> torch.cuda.Event:
        # A waiting thread sleeps instead of keeping a core busy.
        event = torch.cuda.Event(blocking=True)
        event.record(self._side(device))
        return event

    def is_reached(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())

    def wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def compute_waits(self, event: torch.cuda.Event, device: torch.device) -> None:
        torch.cuda.current_stream(device).wait_event(event)

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = self._streams.get(index)
        if stream is None:
            # Threads that meet here agree on one.
            stream = self._streams.setdefault(index, torch.cuda.Stream(device=index))
        return stream
