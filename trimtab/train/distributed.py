"""Processes of a run: started by torchrun or alone, and agreed on what only the first of them decides."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def world_size() -> int:
    """Processes of the run: of the process group if there is one, else as torchrun tells; 1 if it does not."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_process_group(device_type: str, timeout_seconds: int) -> torch.device:
    """Join the run's processes: NCCL on GPUs, gloo on CPUs.

    Args:
        device_type: "cpu" or "cuda".
        timeout_seconds: longest wait of a process for the others.

    Returns:
        The device of this process.
    """
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        backend = "cuda:nccl,cpu:gloo" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    return device


def stop_process_group() -> None:
    """Leave the run's processes, all of which have finished.

    Groups of gloo end with their processes: taken down while a peer still reads from them, it would abort.
    """
    if dist.is_initialized() and torch.cuda.is_available():
        dist.destroy_process_group()


def is_first_rank() -> bool:
    """Whether this process is the only one, or the one that writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_first_rank(function: Callable[[], T]) -> T:
    """Call a function on the first rank; its result, or its error, is every rank's.

    Args:
        function: what it returns or raises can be pickled.

    Raises:
        Exception: what the function raised, on all ranks alike, so that none waits for another.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function()
    told: list[tuple[T | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            told = [(function(), None)]
        except Exception as error:
            told = [(None, error)]
    dist.broadcast_object_list(told, src=0)
    result, failure = told[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]
