"""The ledger: the step's counts, one row per MoE layer, that losses, bias update and metrics read.

Shapes: T tokens, K top-k, E experts, G finest groups, A count maps, M microbatches.

Forward only counts and backward reads, so a row is written by `Ledger.observe` once per real microbatch
and read by `Ledger.bind` when the layer's backward runs. Counts are no buffers of the model: moving,
sharding, compiling or materialising it cannot touch them.
"""

import itertools
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from trimtab.counts import (
    CountMap,
    Reading,
    StepCounts,
    StepTotals,
    TokenGroups,
    load_fraction,
)
from trimtab.measure import (
    MeasuredForward,
    StepNumbers,
    conclude,
    largest_logits,
    lay_down,
    measure_forward,
)
from trimtab.objective import EXECUTED, Objective
from trimtab.ranks import TokenRanks
from trimtab.reading import TotalsMemo, layer_targets, prob_targets, read_layers
from trimtab.reduction import CountReduction
from trimtab.row import ForwardsUnderWay, Row, add_counts, alike
from trimtab.scale import Accumulation, GradReduction
from trimtab.scores import ScoreName

# Operators receive numbers and tensors only; this is how they find their ledger.
_ledgers: "weakref.WeakValueDictionary[int, Ledger]" = weakref.WeakValueDictionary()
_next_id = itertools.count()


def ledger_of(handle: Tensor) -> "tuple[Ledger, int]":
    """The live ledger and the row that a handle names."""
    ledger_id, row = handle.tolist()
    ledger = _ledgers.get(ledger_id)
    if ledger is None:
        raise RuntimeError(
            "the balancer that this forward was counted by is gone; keep the model, or its balancer, until "
            "backward has run"
        )
    return ledger, row


@dataclass(frozen=True, slots=True)
class DeclaredTotals:
    """Totals of the step that the trainer knows beforehand, over all microbatches and ranks."""

    num_tokens: int | None = None
    num_sequences: int | None = None
    num_documents: int | None = None


class Ledger:
    """Counts of one model's MoE layers over one optimiser step.

    Args:
        objectives: what the counts are for.
        accumulation: how microbatches follow each other.
        reduction: how the host trainer treats gradients.
        ranks: who holds which tokens.
        returns: gradients belong to losses that `trimtab.finalize` returns, and are not injected.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        accumulation: Accumulation,
        reduction: GradReduction,
        ranks: TokenRanks,
        *,
        returns: bool = False,
    ) -> None:
        self.objectives = tuple(objectives)
        self.accumulation = accumulation
        self.reduction = reduction
        self.ranks = ranks
        self.returns = returns
        self.sums = CountReduction(ranks, objectives)
        self.rows: list[Row] = []
        self.plan = accumulation  # of the current step
        self.declared = DeclaredTotals()
        self.loss_scale: Tensor | None = None  # what the trainer multiplied the followed loss by
        self.counting = False  # inside a counting pass
        self.measuring = False  # losses of the step
        self.logging = False  # and its largest logit, for the log
        self.numbers: list[StepNumbers] | None = None  # of this step, once its sums over ranks are complete
        self.under_way: ForwardsUnderWay | None = None  # while several forwards run by turns
        self.totals = TotalsMemo()
        self._register()

    @property
    def num_microbatches(self) -> int:
        """M of the current step."""
        return self.plan.num_microbatches

    def _register(self) -> None:
        self.id = next(_next_id)
        _ledgers[self.id] = self

    @property
    def in_step(self) -> bool:
        """Whether a forward of the step has run, or may be running."""
        return self.under_way is not None or any(row.num_forwards or row.num_counting for row in self.rows)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the identity, which a copy must not share.

        Raises:
            RuntimeError: losses that are returned are part of an autograd graph.
        """
        if any(row.terms for row in self.rows):
            raise RuntimeError(
                "a model with losses='returned' was copied within a step; copy it after balancer.step()"
            )
        return {key: value for key, value in self.__dict__.items() if key not in ("id", "totals")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore under a new identity."""
        self.__dict__.update(state)
        self.totals = TotalsMemo()
        self._register()

    def new_row(self, name: str, num_experts: int, top_k: int, score: ScoreName) -> int:
        """Open a row for one layer and return its index."""
        maps: list[CountMap] = [EXECUTED]
        maps += [m for o in self.objectives for m in o.maps]
        unique = tuple(dict.fromkeys(maps))
        # One object for all rows that have the same: see `alike`.
        unique = next((row.maps for row in self.rows if row.maps == unique), unique)
        self.rows.append(Row(name, num_experts, top_k, score, unique))
        return len(self.rows) - 1

    def handle(self, row: int) -> Tensor:
        """A small CPU tensor that names this ledger's row to operators."""
        return torch.tensor([self.id, row], dtype=torch.int64, device="cpu")

    # ---------------------------------------------------------------- forward: count

    def observe(
        self,
        row_index: int,
        ticket: int,
        logits_TE: Tensor,
        ids_TK: Tensor,
        expert_bias_E: Tensor | None,
        group_ids_T: Tensor | None,
        valid_mask_T: Tensor | None,
        num_tokens_G: Tensor,
        sequence_of_group_G: Tensor | None,
        num_sequences: int,
        executed_GE: Tensor | None = None,
        reads: bool = True,
        keeps: bool = False,
    ) -> Tensor:
        """Counts of one microbatch, (A, G, E) int64, added to the row unless this is a recomputation.

        ``executed_GE`` are counts of the executed assignments that the router has made already; ``reads`` is
        whether a backward is expected to read what is counted; ``keeps`` is whether what describes the tokens may
        be kept, so that nobody writes over it.

        Raises:
            RuntimeError: the step has had all its microbatches, or forwards run by turns and this is none of
                them or runs the layer again.
        """
        row = self.rows[row_index]
        counts_AGE = self._count(
            row, logits_TE, ids_TK, group_ids_T, valid_mask_T, num_tokens_G.shape[0], executed_GE
        )
        # Inside a backward pass this forward is a recomputation: its tokens are counted already.
        if torch._C._current_graph_task_id() != -1:
            return counts_AGE
        if self.numbers is not None:
            raise RuntimeError(
                f"{row.name}: a training forward after balancer.finalize(), whose losses are of the whole step; "
                "run all its forwards before, and balancer.step() after the optimiser step"
            )
        into = row if self.under_way is None else self.under_way.row(ticket, row_index)
        self._check_room(row_index)
        if self.counting:
            into.num_counting += 1
        else:
            into.num_forwards += 1
        counted_ahead = self.plan.order == "counting_pass" and not self.counting
        if ticket not in self.sums.forwards:
            self.sums.begin(
                ticket,
                TokenGroups(num_tokens_G, sequence_of_group_G, num_sequences),
                self.rows,
                adds=not counted_ahead,
                under_way=into is not row,
                counting=self.counting,
                keeps=keeps,
            )
        self.sums.observe(ticket, row_index, counts_AGE, reads=reads)
        if into.statistic is not None and not counted_ahead:
            assert expert_bias_E is not None
            into.statistic.add(logits_TE, row.score, row.top_k, expert_bias_E, valid_mask_T)
        if self.measuring and not self.counting:
            into.measured.append(
                measure_forward(
                    ticket,
                    logits_TE,
                    row.score,
                    group_ids_T,
                    valid_mask_T,
                    counts_AGE,
                    num_tokens_G,
                    sequence_of_group_G,
                    num_sequences,
                )
            )
        return counts_AGE

    def end_forward(self, ticket: int) -> None:
        """Start the sums over ranks of one forward's counts; all its layers have been observed."""
        if self.under_way is not None:
            self.under_way.end(ticket)
        self.sums.start(ticket, self.rows)

    def drop_forward(self, ticket: int) -> None:
        """Forget what a forward counted that was broken off by turns with others; nothing if it has ended."""
        if self.under_way is not None and ticket in self.under_way:
            self.under_way.drop(ticket)
            self.sums.drop(ticket)
            for row in self.rows:
                row.terms = [(of, term) for of, term in row.terms if int(of) != ticket]

    def _check_room(self, row_index: int) -> None:
        """Raise if the step has had all its microbatches: its counts and weights would be wrong."""
        row = self.rows[row_index]
        so_far = row.num_counting if self.counting else row.num_forwards
        if self.under_way is not None:
            so_far += self.under_way.num_forwards(row_index) - 1  # this one has begun
        if so_far < self.num_microbatches:
            return
        which = "counting" if self.counting else "training"
        raise RuntimeError(
            f"{row.name}: {which} forward {self.num_microbatches + 1} of a step of "
            f"num_microbatches={self.num_microbatches}; call balancer.step() after each optimiser step, or "
            "balancer.discard_step() after one that was broken off. If the step holds more forwards, attach with "
            "accumulation=M, or call balancer.start_step(num_microbatches=M) before it. A router that runs more "
            "than once in a forward is not served"
        )

    def _count(
        self,
        row: Row,
        logits_TE: Tensor,
        ids_TK: Tensor,
        group_ids_T: Tensor | None,
        valid_mask_T: Tensor | None,
        num_groups: int,
        executed_GE: Tensor | None,
    ) -> Tensor:
        counted = [] if executed_GE is None else [executed_GE]
        for count_map in row.maps[len(counted) :]:
            counted.append(count_map(ids_TK, logits_TE, group_ids_T, valid_mask_T, num_groups))
        return counted[0][None] if len(counted) == 1 else torch.stack(counted)

    # ---------------------------------------------------------------- backward: read

    def bind(
        self,
        row_index: int,
        ticket: int,
        counts_AGE: Tensor,
        num_tokens_G: Tensor,
        sequence_of_group_G: Tensor | None,
        num_sequences: int,
        prob_sums_GE: Tensor | None,
        dtype: torch.dtype,
        half: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Targets of all objectives (G or 1, E) and the z-loss weight (), with the gradient scale in them.

        The first call of a forward forms those of all its layers that are alike. None where no objective has any.

        Raises:
            RuntimeError: the step does not run in the declared order, or float16 logits would lose gradients
                because no loss scale is known.
        """
        row = self.rows[row_index]
        if self.under_way is not None and ticket in self.under_way:
            raise RuntimeError(
                f"{row.name}: backward runs before the forward of its microbatch has ended; leave the block of "
                "balancer.interleaved(...) first, or say run.end() when a microbatch is through its last layer"
            )
        self.settle()
        if half and self.loss_scale is None and not self.returns:
            raise RuntimeError(
                f"{row.name}: the logits are float16, in which gradients of balance losses vanish unless they "
                "follow a loss scale; use balancer.follow(loss) with a gradient scaler, or bfloat16"
            )
        groups = TokenGroups(num_tokens_G, sequence_of_group_G, num_sequences)
        target_GE, z_weight = self._bound(row_index, ticket, counts_AGE, groups, dtype)
        if prob_sums_GE is not None:
            own_GE = prob_targets(self, row_index, ticket, counts_AGE, groups, prob_sums_GE)
            target_GE = own_GE if target_GE is None else target_GE + own_GE
        return target_GE, z_weight

    def _bound(
        self, row_index: int, ticket: int, counts_AGE: Tensor, groups: TokenGroups, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        forward = self.sums.forwards.get(ticket)
        found = None if forward is None else forward.targets.pop(row_index, None)
        fits = found is not None and all(tensor is None or tensor.dtype == dtype for tensor in found)
        # A backward with another scale has begun since targets were formed, or it broke off and is tried again.
        if found is not None and fits and forward is not None and forward.loss_scale is self.loss_scale:
            return found
        if forward is None or row_index not in forward.counts:
            # It was read before (a backward that runs in two passes), or its step has ended.
            return layer_targets(self, [row_index], ticket, [counts_AGE], groups, dtype)[row_index]
        places = next(places for places in alike(self.rows, forward.counts) if row_index in places)
        counts = [forward.counts[place] for place in places]
        forward.loss_scale = self.loss_scale
        forward.targets.update(layer_targets(self, places, ticket, counts, groups, dtype))
        if not self.sums.sums_groups:
            for place in places:
                del forward.counts[place]
        if self.sums.sums_groups or not forward.counts:
            # Nobody is left to read them but a backward that runs twice, which has its own.
            forward.groups = None
        return forward.targets.pop(row_index)

    def settle(self) -> list[Row]:
        """The rows, when the counts of all forwards that have ended have joined them; waits for sums over ranks."""
        self.sums.settle(self.rows)
        return self.rows

    def check_order(self, row: Row) -> None:
        """Raise if counts that were to be complete by now are not: weights and counts would be wrong."""
        plan = self.plan
        promised = plan.order == "counting_pass" or (
            plan.order == "forward_first" and plan.num_microbatches > 1
        )
        if promised and row.num_counted < plan.num_microbatches:
            raise RuntimeError(
                f"{row.name}: backward started after {row.num_counted} of {plan.num_microbatches} microbatches "
                f"were counted, but order={plan.order!r} was declared; run all forwards first, or the counting "
                "pass, or declare order='alternating'"
            )

    # ---------------------------------------------------------------- end of step

    def sum_step(self) -> list[StepNumbers]:
        """Complete the step's counts over ranks, and what was measured of each row, with one collective; once.

        Raises:
            RuntimeError: forwards of the step are under way.
        """
        if self.under_way is not None:
            raise RuntimeError("step() inside balancer.interleaved(...); leave the block first")
        if self.numbers is not None:
            return self.numbers
        self.settle()
        counted = [row for row in self.rows if row.counts_AE is not None]
        if counted and self.ranks.tokens is not None:
            # Other ranks may have run layers that this one did not.
            some = counted[0]
            assert some.counts_AE is not None
            assert some.sizes is not None
            for row in self.rows:
                if row.counts_AE is None:
                    nothing_AE = some.counts_AE.new_zeros(len(row.maps), row.num_experts)
                    add_counts([row], nothing_AE[None], [torch.zeros_like(some.sizes)])
            counted = self.rows
        statistics = [row.statistic for row in counted if row.statistic is not None]
        tensors: list[Tensor] = []
        if not self.sums.sums_totals:
            # Nothing in backward read them, so one sum at the end is enough.
            speaks = int(self.ranks.is_first_of_sequence)
            for row in counted:
                assert row.counts_AE is not None
                assert row.sizes is not None
                tensors += [row.counts_AE, row.sizes * speaks]
        num_counts = len(tensors)
        tensors += [statistic.counts() for statistic in statistics]
        num_integers = len(tensors)
        measured = [place for place, row in enumerate(self.rows) if row.measured]
        if measured and self.ranks.tokens is not None:
            measured = list(range(len(self.rows)))
        for place in measured:
            tensors += self._lay_down(place)
        summed = self.sums.sum_step(tensors)
        pairs = zip(counted, summed[0:num_counts:2], summed[1:num_counts:2], strict=False)
        for row, counts_AE, sizes in pairs:
            row.counts_AE, row.sizes = counts_AE, sizes
        for statistic, histogram_EN in zip(statistics, summed[num_counts:num_integers], strict=True):
            statistic.histogram_EN = histogram_EN
        self.numbers = [StepNumbers() for _ in self.rows]
        per_row = len(self.objectives) + 1
        for i, place in enumerate(measured):
            sums = summed[num_integers + i * per_row : num_integers + (i + 1) * per_row]
            self.numbers[place] = conclude(self.objectives, sums, self._read_final(place))
        return self.numbers

    def finish_step(self) -> list[StepNumbers]:
        """`sum_step`, and the largest logit where the log wants it."""
        numbers = self.sum_step()
        if self.logging:
            maxima = largest_logits([row.measured for row in self.rows], self.ranks)
            for one, logit_max in zip(numbers, maxima, strict=True):
                one.logit_max = logit_max
        return numbers

    def _lay_down(self, place: int) -> list[Tensor]:
        """What one row measured, as this rank's part of the sum."""
        row = self.rows[place]

        def read(one: MeasuredForward) -> Reading:
            groups = TokenGroups(one.num_tokens_G, one.sequence_of_group_G, one.num_sequences)
            return read_layers(self, [place], one.ticket, [one.counts_AGE], groups, one.prob_sums_GE.dtype)

        sums = lay_down(self.objectives, row.measured, read, row.num_experts, self.ranks)
        assert row.counts_AE is not None
        return [values.to(row.counts_AE.device) for values in sums]

    def _read_final(self, row_index: int) -> Reading:
        """What a loss of step scope sees of the whole step."""
        row = self.rows[row_index]
        assert row.counts_AE is not None
        assert row.num_tokens is not None
        counts_AE, num_tokens = row.counts_AE.double(), row.num_tokens.double()
        known = StepCounts(counts_AE, num_tokens, load_fraction(counts_AE, num_tokens, row.top_k))
        return Reading(
            maps=row.maps,
            counts_AGE=counts_AE[:, None],
            num_tokens_G=num_tokens[None],
            sequence_of_group_G=None,
            num_sequences=1,
            top_k=row.top_k,
            totals=StepTotals(num_tokens, num_tokens, num_tokens, 1),
            step_counts=lambda mode: known,
        )

    def count_error(self, row: Row) -> Tensor | None:
        """max |f_used - f_final| over experts and reads of this step; None if no step scope was read."""
        if row.used_min_AE is None or row.used_max_AE is None or row.counts_AE is None:
            return None
        assert row.num_tokens is not None
        dtype = row.used_min_AE.dtype
        final_AE = load_fraction(row.counts_AE.to(dtype), row.num_tokens.to(dtype), row.top_k)
        return torch.maximum(row.used_max_AE - final_AE, final_AE - row.used_min_AE).amax()

    def close_step(self) -> None:
        """Roll all rows over to the next step."""
        short = next((row for row in self.rows if 0 < row.num_forwards < self.num_microbatches), None)
        if short is not None:
            warnings.warn(
                f"{short.name}: the step ended after {short.num_forwards} of num_microbatches="
                f"{self.num_microbatches} training forwards, so its losses were weighted too low; call "
                f"balancer.start_step(num_microbatches={short.num_forwards}) before such a step",
                stacklevel=4,
            )
        for row in self.rows:
            row.close()
        self.discard_step()

    def declare(self, totals: DeclaredTotals) -> None:
        """Take over totals of the coming step; what all ranks know needs no sum over them."""
        self.declared = totals
        self.sums.declare([field.name for field in fields(totals) if getattr(totals, field.name) is not None])

    def discard_step(self) -> None:
        """Forget what the current step counted and declared."""
        for row in self.rows:
            row.clear()
        if self.under_way is not None:
            self.under_way.clear()
        self.sums.clear()
        self.totals.forget_but(self.sums.last_sizes)
        self.numbers = None
        self.declare(DeclaredTotals())
        self.plan = self.accumulation
        self.loss_scale = None
