"""A copy engine without a device: two streams as queues, on which nothing happens before somebody waits for it.

What stands for device memory and for pinned memory is ordinary memory. A copy's destination holds bytes of 0xFF
(NaN) until its turn comes, and a source that nobody kept may be gone by then, as under a caching allocator.
Whatever a real device would do wrong in silence is noted in ``mistakes``.
"""

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

GARBAGE = 0xFF


def range_of(tensor: Tensor) -> range:
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.numel())


def overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


@dataclass
class Copy:
    """A copy that the side stream has been given."""

    destination: range
    source: range
    device_memory: StorageWeakRef
    kept: Tensor | None = None  # what `keep` was given: the allocator hands its memory to nobody


class SideStream:
    """The engine.

    Args:
        device_type: of the tensors it serves.

    Attributes:
        log: names of the calls, with their sizes.
        mistakes: what would be a race or worse on a device.
        num_pinned: bytes allocated less bytes discarded.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        self.device_type = device_type
        self.log: list[str] = []
        self.mistakes: list[str] = []
        self.num_pinned = 0
        self._lock = threading.RLock()
        self._pinned: list[Tensor] = []
        self._compute: list[Callable[[], None]] = []  # given to compute, not done
        self._compute_done = 0
        self._side: list[Copy | int] = []  # copies, and places of the compute stream to wait for
        self._side_done = 0

    # ------------------------------------------------------------------ what a test does

    def later(self, work: Callable[[], None]) -> None:
        """Give the compute stream something that it does not do yet."""
        self._compute.append(work)

    def run(self, until: int | None = None) -> None:
        """Let the side stream work: to its end, or to an event."""
        with self._lock:
            until = len(self._side) if until is None else until
            while self._side_done < until:
                step = self._side[self._side_done]
                if isinstance(step, Copy):
                    self._run_copy(step)
                else:
                    self._run_compute(step)
                self._side_done += 1

    @property
    def num_waiting(self) -> int:
        """Copies that the side stream has not made."""
        return sum(isinstance(step, Copy) for step in self._side[self._side_done :])

    def count(self, name: str) -> int:
        """Calls of a kind."""
        return sum(entry.split()[0] == name for entry in self.log)

    # ------------------------------------------------------------------ the protocol

    def allocate(self, num_bytes: int) -> Tensor:
        self.log.append(f"allocate {num_bytes}")
        self.num_pinned += num_bytes
        memory = torch.full((num_bytes,), GARBAGE, dtype=torch.uint8)
        self._pinned.append(memory)
        return memory

    def discard(self, num_bytes: int) -> None:
        self.log.append(f"discard {num_bytes}")
        self.num_pinned -= num_bytes

    def side_waits(self, device: torch.device) -> None:
        with self._lock:
            self.log.append("side_waits")
            self._side.append(self._compute_done + len(self._compute))

    def copy(self, destination: Tensor, source: Tensor) -> None:
        with self._lock:
            assert destination.dtype == source.dtype == torch.uint8
            assert destination.numel() == source.numel() > 0
            to_host = self._is_pinned(destination)
            assert to_host != self._is_pinned(source), "a copy is between the device and pinned memory"
            self.log.append(f"{'to_host' if to_host else 'to_device'} {source.numel()}")
            made = Copy(
                range_of(destination),
                range_of(source),
                StorageWeakRef((source if to_host else destination).untyped_storage()),
            )
            if not self._side or isinstance(self._side[-1], Copy):
                self.mistakes.append("a copy did not wait for the compute stream")
            for step in self._side[self._side_done :]:
                if isinstance(step, Copy) and overlap(step.destination, made.destination):
                    self.mistakes.append("memory was used again before its copy was through")
            destination.fill_(GARBAGE)
            self._side.append(made)

    def keep(self, tensor: Tensor) -> None:
        with self._lock:
            self.log.append(f"keep {tensor.numel()}")
            steps = [step for step in self._side[self._side_done :] if isinstance(step, Copy)]
            for step in steps:
                if range_of(tensor) in (step.source, step.destination):
                    step.kept = tensor

    def record(self, device: torch.device) -> int:
        with self._lock:
            self.log.append("record")
            return len(self._side)

    def is_reached(self, event: int) -> bool:
        return self._side_done >= event

    def wait(self, event: int) -> None:
        self.log.append(f"wait {event}")
        self.run(event)

    def compute_waits(self, event: int, device: torch.device) -> None:
        # What torch computes here it computes at once, so that compute has come to this place already.
        with self._lock:
            self.log.append(f"compute_waits {event}")
            self._run_compute(self._compute_done + len(self._compute))
            self.run(event)

    # ------------------------------------------------------------------ inside

    def _is_pinned(self, tensor: Tensor) -> bool:
        return any(overlap(range_of(tensor), range_of(memory)) for memory in self._pinned)

    def _run_compute(self, until: int) -> None:
        while self._compute_done < until:
            self._compute.pop(0)()
            self._compute_done += 1

    def _run_copy(self, copy: Copy) -> None:
        if copy.device_memory.expired():
            self.mistakes.append("a copy touched device memory that had been let go of")
            if any(overlap(copy.destination, range_of(memory)) for memory in self._pinned):
                ctypes.memset(copy.destination.start, GARBAGE, len(copy.destination))
        else:
            ctypes.memmove(copy.destination.start, copy.source.start, len(copy.source))
        copy.kept = None
