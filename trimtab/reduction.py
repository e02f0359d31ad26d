"""Counts summed over ranks: started when a microbatch's forward ends, waited for in backward.

Shapes: A count maps, G finest groups, E experts, L layers.

Data flow of one microbatch: every layer's `observe` lays its counts down here; the end of the model's
forward starts one asynchronous all-reduce for all layers together; the first router backward that needs
any count waits for it. No rank waits in forward, and counts are integers, so sums are the same bits on
every rank whatever the order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trimtab.objective import Objective
from trimtab.ranks import TokenRanks
from trimtab.row import Row


class PackedSum:
    """One asynchronous all-reduce of several integer tensors."""

    def __init__(self, tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        self._shapes = [tensor.shape for tensor in tensors]
        # Layers of one process may lie on several devices; sums are few numbers, and go where they are used.
        self._devices = [tensor.device for tensor in tensors]
        self._flat = torch.cat([tensor.reshape(-1).to(self._devices[0]) for tensor in tensors])
        self._work: Any = dist.all_reduce(self._flat, group=group, async_op=True)

    def wait(self) -> list[Tensor]:
        """The sums, in the shapes of the tensors."""
        self._work.wait()
        parts = self._flat.split([shape.numel() for shape in self._shapes])
        places = zip(parts, self._shapes, self._devices, strict=True)
        return [part.view(shape).to(device) for part, shape, device in places]


@dataclass(slots=True)
class Forward:
    """Counts of one microbatch's forward.

    Args:
        adds: they are added to the step's; not so if a counting pass has counted these tokens already.
        under_way: layers may still follow, so that nobody but its end starts its sums.
        counts: (A, G, E) of this rank's tokens by row; after reduction, of whole sequences.
        sizes: (3,) tokens, sequences and documents of this rank's sequences by row.
        totals: (A, E) counts and (3,) sizes over all ranks by row, after reduction.
    """

    adds: bool
    under_way: bool = False
    counts: dict[int, Tensor] = field(default_factory=dict)
    sizes: dict[int, Tensor] = field(default_factory=dict)
    totals: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    groups_sum: PackedSum | None = None
    totals_sum: PackedSum | None = None
    started: bool = False
    settled: bool = False


class CountReduction:
    """Sums of the current step's counts over ranks, per microbatch.

    Args:
        ranks: who holds which tokens.
        objectives: what reads counts in backward.
    """

    def __init__(self, ranks: TokenRanks, objectives: Sequence[Objective]) -> None:
        self.ranks = ranks
        self.objectives = tuple(objectives)
        in_sequence = ranks.num_sequence_ranks > 1
        self.sums_groups = in_sequence and any(o.reads_groups for o in objectives)
        self.declare(())
        self._forwards: dict[int, Forward] = {}

    def declare(self, totals: Sequence[str]) -> None:
        """Say which totals of the step are known, so that they need no sum; every rank says the same."""
        unknown = any(not set(objective.totals) <= set(totals) for objective in self.objectives)
        self.sums_totals = self.reads_totals or (self.ranks.num_ranks > 1 and unknown)

    @property
    def reads_totals(self) -> bool:
        """Whether totals are summed in each forward even if all totals are declared, as a trainer does."""
        return self.ranks.num_ranks > 1 and any(objective.reads_totals for objective in self.objectives)

    @property
    def is_needed(self) -> bool:
        """Whether backward reads counts of other ranks."""
        return self.sums_groups or self.sums_totals

    def observe(
        self,
        ticket: int,
        row: int,
        counts_AGE: Tensor,
        sizes: Tensor,
        *,
        adds: bool,
        under_way: bool = False,
    ) -> None:
        """Lay down the counts of one layer in one forward."""
        forward = self._forwards.setdefault(ticket, Forward(adds, under_way))
        forward.counts[row], forward.sizes[row] = counts_AGE, sizes

    def start(self, ticket: int, rows: Sequence[Row] = ()) -> None:
        """Start the sums of one forward, which has ended; every rank must.

        Args:
            ticket: the forward.
            rows: those of all layers that some rank may have run in it; this rank's part of one that it did
                not run is zero.
        """
        forward = self._forwards.get(ticket)
        if forward is None or forward.started:
            return
        forward.started, forward.under_way = True, False
        some = next(iter(forward.counts))
        counts_AGE, sizes = forward.counts[some], forward.sizes[some]
        for place, row in enumerate(rows):
            if place not in forward.counts:
                shape = (len(row.maps), counts_AGE.shape[1], row.num_experts)
                forward.counts[place], forward.sizes[place] = (
                    counts_AGE.new_zeros(shape),
                    torch.zeros_like(sizes),
                )
        if rows:
            # In one order on all ranks, whichever layers each of them ran first.
            forward.counts = dict(sorted(forward.counts.items()))
            forward.sizes = dict(sorted(forward.sizes.items()))
        if self.sums_groups:
            assert self.ranks.sequence is not None
            forward.groups_sum = PackedSum(list(forward.counts.values()), self.ranks.sequence)
        if self.sums_totals:
            assert self.ranks.tokens is not None
            # Ranks that share sequences know the same sizes, and one of them speaks.
            speaks = int(self.ranks.is_first_of_sequence)
            tensors = [counts_AGE.sum(dim=1) for counts_AGE in forward.counts.values()]
            tensors += [sizes * speaks for sizes in forward.sizes.values()]
            forward.totals_sum = PackedSum(tensors, self.ranks.tokens)

    def settle(self, rows: Sequence[Row]) -> None:
        """Wait for every sum and add the forwards' totals to the step's, in order of the forwards."""
        for ticket, forward in self._forwards.items():
            if forward.settled or forward.under_way:
                continue
            # Where nobody saw the forward end, as in one compiled graph, the sum starts only now.
            self.start(ticket)
            forward.settled = True
            if forward.groups_sum is not None:
                forward.counts = dict(zip(forward.counts, forward.groups_sum.wait(), strict=True))
                forward.groups_sum = None
            if forward.totals_sum is not None:
                sums = forward.totals_sum.wait()
                half = len(sums) // 2
                pairs = zip(sums[:half], sums[half:], strict=True)
                forward.totals = dict(zip(forward.counts, pairs, strict=True))
                forward.totals_sum = None
                if forward.adds:
                    for row, (counts_AE, sizes) in forward.totals.items():
                        rows[row].add(counts_AE, sizes)

    def groups(self, ticket: int, row: int, counts_AGE: Tensor) -> Tensor:
        """(A, G, E) counts of whole sequences; ``counts_AGE`` is this rank's own."""
        return self._find(ticket, row).counts[row] if self.sums_groups else counts_AGE

    def totals(self, ticket: int, row: int) -> tuple[Tensor, Tensor] | None:
        """(A, E) counts and (3,) sizes of one forward over all ranks; None where nobody asked for them."""
        if not self.sums_totals:
            return None
        totals = self._find(ticket, row).totals
        if row not in totals:
            raise RuntimeError(
                "a router's backward runs inside its model's forward, before the counts of other ranks are known; "
                "run backward after the forward has ended"
            )
        return totals[row]

    def _find(self, ticket: int, row: int) -> Forward:
        forward = self._forwards.get(ticket)
        if forward is None or row not in forward.counts:
            raise RuntimeError(
                "backward runs, but the counts of its forward are gone; call balancer.step() after the optimiser "
                "step, not between forward and backward"
            )
        return forward

    def sum_step(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over all ranks of what only the end of the step needs, in one all-reduce."""
        if self.ranks.tokens is None or not tensors:
            return list(tensors)
        return PackedSum(tensors, self.ranks.tokens).wait()

    def __getstate__(self) -> dict[str, Any]:
        """Copy between steps only: a sum under way belongs to this process.

        Raises:
            RuntimeError: in the middle of a step.
        """
        if self._forwards:
            raise RuntimeError(
                "a model with a balancer over several ranks was copied within a step; copy it between"
            )
        return self.__dict__

    def clear(self) -> None:
        """Forget the step; sums under way are waited for, so that no rank is left alone with one."""
        for forward in self._forwards.values():
            for packed in (forward.groups_sum, forward.totals_sum):
                if packed is not None:
                    packed.wait()
        self._forwards = {}
