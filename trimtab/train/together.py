"""Work of all ranks that succeeds or fails as one: an error on any rank is an error on every rank.

A rank that raises alone leaves the others in their next collective until the process group's timeout. Here each
rank catches its own error and tells it before anyone goes on. A rank that dies cannot tell; then the others fail
in the collective itself, at once or after that timeout.

In one process, or without a process group, there is one rank and nothing is sent.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
R = TypeVar("R")

_SHOWN = 3


class RanksFailedError(RuntimeError):
    """Some rank failed; every rank raises this, with the same text.

    Args:
        failures: what went wrong on which rank.
        num_ranks: ranks in all.
    """

    def __init__(self, failures: Mapping[int, str], num_ranks: int) -> None:
        super().__init__(_text(failures, num_ranks))


def rank_and_size() -> tuple[int, int]:
    """This rank and the number of ranks; (0, 1) without a process group."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def describe(error: BaseException) -> str:
    """One line for an error of a rank."""
    return f"{type(error).__name__}: {error}"


def on_all_ranks(work: Callable[[], T]) -> T:
    """Call a function on every rank and return this rank's result, if no rank failed.

    Raises:
        RanksFailedError: on every rank, if the function raised on any.
    """
    kept: list[T] = []
    gathered(lambda: kept.append(work()), lambda _: None)
    return kept[0]


def gathered(work: Callable[[], T], conclude: Callable[[list[T]], R]) -> R:
    """Call ``work`` on every rank and ``conclude`` on the first one, with all results.

    Args:
        work: returns what can be pickled.
        conclude: called on rank 0 only, with one result of each rank, in order; not called if ``work`` raised
            anywhere. Returns what can be pickled.

    Returns:
        What ``conclude`` returned, on every rank.

    Raises:
        RanksFailedError: on every rank, if either function raised on any, or if a rank is lost.
    """
    rank, num_ranks = rank_and_size()
    cause: Exception | None = None
    try:
        # Pickled here, because an error in gathering would be this rank's alone.
        told = (pickle.dumps(work()), "")
    except Exception as error:
        told, cause = (b"", describe(error)), error
    everyones = _gather(told, num_ranks)
    outcome: tuple[bytes, dict[int, str]] = (b"", {})
    if rank == 0:
        failures = {other: failure for other, (_, failure) in enumerate(everyones) if failure}
        if not failures:
            try:
                outcome = (pickle.dumps(conclude([pickle.loads(result) for result, _ in everyones])), {})
            except Exception as error:
                failures, cause = {0: describe(error)}, error
        if failures:
            outcome = (b"", failures)
    result, failures = _broadcast(outcome, num_ranks)
    if failures:
        raise RanksFailedError(failures, num_ranks) from cause
    concluded: R = pickle.loads(result)
    return concluded


def _gather(told: tuple[bytes, str], num_ranks: int) -> list[Any]:
    if num_ranks == 1:
        return [told]
    everyones = [None] * num_ranks if dist.get_rank() == 0 else None
    try:
        dist.gather_object(told, everyones, dst=0)
    except RuntimeError as error:
        raise lost(error) from error
    return everyones or []


def _broadcast(outcome: tuple[bytes, dict[int, str]], num_ranks: int) -> tuple[bytes, dict[int, str]]:
    if num_ranks == 1:
        return outcome
    box = [outcome]
    try:
        dist.broadcast_object_list(box, src=0)
    except RuntimeError as error:
        raise lost(error) from error
    return box[0]


def lost(error: RuntimeError) -> RanksFailedError:
    """What an error of a collective means: another rank died or did not come. Known on this rank only."""
    rank, num_ranks = rank_and_size()
    text = describe(error) if num_ranks == 1 else f"another rank is lost ({error})"
    return RanksFailedError({rank: text}, num_ranks)


def _text(failures: Mapping[int, str], num_ranks: int) -> str:
    ranks_of: dict[str, list[int]] = {}
    for rank, failure in sorted(failures.items()):
        ranks_of.setdefault(failure, []).append(rank)
    if num_ranks == 1:
        return next(iter(ranks_of))
    lines = [
        f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))} of {num_ranks}: {failure}"
        for failure, ranks in ranks_of.items()
    ]
    more = [f"and {len(lines) - _SHOWN} other errors"] if len(lines) > _SHOWN else []
    return "; ".join(lines[:_SHOWN] + more)
