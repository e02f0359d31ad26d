"""Counts of the forwards under way, their sums over ranks, and how they join the step's.

Shapes: A count maps, G finest groups, E experts, L layers.

Data flow of one microbatch: every layer's `observe` lays its counts down here. Where backward reads counts of
other ranks, the end of the model's forward starts one asynchronous all-reduce for all layers together, and the
first router backward that needs any count waits for it. No rank waits in forward, and counts are integers, so
sums are the same bits on every rank whatever the order. Counts join the step's for all layers at once, when
they are first read or the next forward begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trimtab.counts import CountsMode, TokenGroups, place_of
from trimtab.objective import Objective
from trimtab.ranks import TokenRanks
from trimtab.row import Row, add_counts, alike, stack_layers


class PackedSum:
    """One asynchronous all-reduce of several tensors of one dtype."""

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
        sizes: (3,) tokens, sequences and documents of this rank's sequences.
        adds: they are added to the step's; not so if a counting pass has counted these tokens already.
        groups: of its tokens, until all have read them; None where their tensors may be written over before.
        under_way: layers may still follow, so that nobody but its end starts its sums.
        has_backward: some layer's backward may read it.
        unread: rows whose backward does not, because their logits have no gradient.
        counts: (A, G, E) of this rank's tokens by row; after reduction, of whole sequences. Let go of once
            nobody can read them.
        waiting: rows whose counts have not joined the step's.
        totals: (A, E) counts and (3,) sizes over all ranks by row, after reduction.
        read: what backward has read of the step's counts, for a backward that runs twice: (L, A, E) counts, ()
            or (L,) tokens, and which of these layers a row is.
        loss_scale: that was known when targets were formed.
        targets: (G or 1, E) targets and z-loss weights () by row, from the first router backward to the row's own.
    """

    sizes: Tensor
    adds: bool
    groups: TokenGroups | None = None
    under_way: bool = False
    has_backward: bool = True
    unread: list[int] = field(default_factory=list)
    counts: dict[int, Tensor] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    totals: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    groups_sum: PackedSum | None = None
    totals_sum: PackedSum | None = None
    started: bool = False
    settled: bool = False
    read: dict[tuple[int, CountsMode, torch.dtype], tuple[Tensor, Tensor, int]] = field(default_factory=dict)
    loss_scale: Tensor | None = None
    targets: dict[int, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)


class CountReduction:
    """Counts of the current step's forwards, and their sums over ranks.

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
        self.forwards: dict[int, Forward] = {}
        self._unsettled: dict[int, Forward] = {}
        self._last: tuple[TokenGroups, Any] | None = None  # groups of the last forward, and where it ran

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

    def begin(
        self,
        ticket: int,
        groups: TokenGroups,
        rows: Sequence[Row],
        *,
        adds: bool,
        under_way: bool,
        counting: bool,
        keeps: bool,
    ) -> None:
        """Begin a forward; what those before it counted joins the step's, if that needs no sum.

        Args:
            ticket: names the forward.
            groups: of its tokens.
            rows: of all layers.
            adds: as of `Forward`.
            under_way: same.
            counting: it has no backward.
            keeps: nobody writes over what the groups are made of.
        """
        if not self.is_needed:
            self.settle(rows)
        has_backward = bool(self.objectives) and not counting
        groups = self._known(groups) if keeps else groups
        kept = groups if keeps else None
        self.forwards[ticket] = Forward(groups.sizes, adds, kept, under_way, has_backward)

    def _known(self, groups: TokenGroups) -> TokenGroups:
        """The last forward's groups if these are the same and made in the same place, or else these."""
        place = place_of(groups.num_tokens_G.device)
        if place is None:
            return groups
        if self._last is None or self._last[1] != place or not self._last[0].are(groups):
            self._last = groups, place
        return self._last[0]

    @property
    def last_sizes(self) -> Tensor | None:
        """(3,) sizes of the last forward, which the next one may share."""
        return None if self._last is None else self._last[0].sizes

    def observe(self, ticket: int, row: int, counts_AGE: Tensor, *, reads: bool) -> None:
        """Lay down the counts of one layer in one forward, which its backward reads or does not."""
        forward = self._unsettled[ticket] = self.forwards[ticket]
        forward.counts[row] = counts_AGE
        forward.waiting.append(row)
        if not reads:
            forward.unread.append(row)

    def drop(self, ticket: int) -> None:
        """Forget a forward that was broken off."""
        self.forwards.pop(ticket, None)
        self._unsettled.pop(ticket, None)

    def start(self, ticket: int, rows: Sequence[Row] = ()) -> None:
        """Start the sums of one forward, which has ended; every rank must.

        Args:
            ticket: the forward.
            rows: those of all layers that some rank may have run in it; this rank's part of one that it did
                not run is zero.
        """
        forward = self.forwards.get(ticket)
        if forward is None or forward.started:
            return
        forward.started, forward.under_way = True, False
        if not self.is_needed:
            return
        sizes = dict.fromkeys(forward.counts, forward.sizes)
        counts_AGE = next(iter(forward.counts.values()))
        for place, row in enumerate(rows):
            if place not in forward.counts:
                shape = (len(row.maps), counts_AGE.shape[1], row.num_experts)
                forward.counts[place] = counts_AGE.new_zeros(shape)
                sizes[place] = torch.zeros_like(forward.sizes)
        if rows:
            # In one order on all ranks, whichever layers each of them ran first.
            forward.counts = dict(sorted(forward.counts.items()))
        if self.sums_groups:
            assert self.ranks.sequence is not None
            forward.groups_sum = PackedSum(list(forward.counts.values()), self.ranks.sequence)
        if self.sums_totals:
            assert self.ranks.tokens is not None
            # Ranks that share sequences know the same sizes, and one of them speaks.
            speaks = int(self.ranks.is_first_of_sequence)
            tensors = [counts_AGE.sum(dim=1) for counts_AGE in forward.counts.values()]
            tensors += [sizes[p].to(counts.device) * speaks for p, counts in forward.counts.items()]
            forward.totals_sum = PackedSum(tensors, self.ranks.tokens)

    def settle(self, rows: Sequence[Row]) -> None:
        """Wait for every sum and add the forwards' counts to the step's, in order of the forwards."""
        for ticket, forward in list(self._unsettled.items()):
            if forward.under_way:
                continue
            if self.is_needed and not forward.settled:
                # Where nobody saw the forward end, as in one compiled graph, the sum starts only now.
                self.start(ticket)
                self._wait(forward)
            _join(forward, rows)
            del self._unsettled[ticket]
            if not forward.has_backward:
                del self.forwards[ticket]
            elif not self.sums_groups:
                for place in forward.unread:
                    forward.counts.pop(place, None)
                forward.unread = []

    def _wait(self, forward: Forward) -> None:
        forward.settled = True
        local = forward.counts
        if forward.groups_sum is not None:
            forward.counts = dict(zip(local, forward.groups_sum.wait(), strict=True))
            forward.groups_sum = None
        if forward.totals_sum is not None:
            sums = forward.totals_sum.wait()
            half = len(sums) // 2
            pairs = zip(sums[:half], sums[half:], strict=True)
            forward.totals = dict(zip(local, pairs, strict=True))
            forward.totals_sum = None
            forward.waiting = list(local)
        elif self.sums_groups:
            # What joins the step's are this rank's own tokens.
            forward.totals = {
                place: (local[place].sum(dim=1), forward.sizes.to(local[place].device))
                for place in forward.waiting
            }

    def groups(self, ticket: int, places: Sequence[int], counts: Sequence[Tensor]) -> Tensor:
        """(L, A, G, E) counts of whole sequences.

        Args:
            ticket: names the forward.
            places: of the layers' rows.
            counts: (A, G, E) of this rank's own tokens, of each layer.
        """
        if self.sums_groups:
            counts = [self._find(ticket, place).counts[place] for place in places]
        return stack_layers(counts)

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
        forward = self.forwards.get(ticket)
        if forward is None or (row not in forward.counts and row not in forward.totals):
            raise RuntimeError(
                "backward runs, but the counts of its forward are gone; call balancer.step() after the optimiser "
                "step, not between forward and backward"
            )
        return forward

    def sum_step(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over all ranks of what only the end of the step needs, in one all-reduce.

        Counts travel as float64 where losses go with them, exact to 2^53.
        """
        if self.ranks.tokens is None or not tensors:
            return list(tensors)
        if not any(tensor.is_floating_point() for tensor in tensors):
            return PackedSum(tensors, self.ranks.tokens).wait()
        sums = PackedSum([tensor.double() for tensor in tensors], self.ranks.tokens).wait()
        return [total.to(tensor.dtype) for total, tensor in zip(sums, tensors, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        """Copy between steps only: a sum under way belongs to this process.

        Raises:
            RuntimeError: in the middle of a step.
        """
        if self.forwards and self.ranks.num_ranks > 1:
            raise RuntimeError(
                "a model with a balancer over several ranks was copied within a step; copy it between"
            )
        return {**self.__dict__, "_last": None}

    def clear(self) -> None:
        """Forget the step; sums under way are waited for, so that no rank is left alone with one."""
        for forward in self.forwards.values():
            for packed in (forward.groups_sum, forward.totals_sum):
                if packed is not None:
                    packed.wait()
        self.forwards, self._unsettled = {}, {}


def _join(forward: Forward, rows: Sequence[Row]) -> None:
    """Add the counts that wait for it to the step's."""
    waiting, forward.waiting = forward.waiting, []
    if not forward.adds:
        return
    if forward.settled:
        counts = {place: forward.totals[place][0] for place in waiting if place in forward.totals}
    else:
        counts = {place: forward.counts[place] for place in waiting}
    for places in alike(rows, counts):
        stacked = stack_layers([counts[place] for place in places])
        joining = [rows[place] for place in places]
        if forward.settled:
            add_counts(joining, stacked, [forward.totals[place][1] for place in places])
        else:
            sizes = forward.sizes.to(stacked.device)
            add_counts(joining, stacked.sum(dim=2), [sizes] * len(places))
