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

from trimtab.counts import CountMap, CountsMode, ExecutedCounts, Reading, StepTotals
from trimtab.measure import MeasuredForward, StepNumbers, finish, measure_forward
from trimtab.objective import Objective
from trimtab.ranks import TokenRanks
from trimtab.reduction import CountReduction
from trimtab.row import ForwardsUnderWay, Row, batch_sizes
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
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        accumulation: Accumulation,
        reduction: GradReduction,
        ranks: TokenRanks,
    ) -> None:
        self.objectives = tuple(objectives)
        self.accumulation = accumulation
        self.reduction = reduction
        self.ranks = ranks
        self.sums = CountReduction(ranks, objectives)
        self.rows: list[Row] = []
        self.plan = accumulation  # of the current step
        self.declared = DeclaredTotals()
        self.loss_scale: Tensor | None = None  # what the trainer multiplied the followed loss by
        self.counting = False  # inside a counting pass
        self.measuring = False
        self.under_way: ForwardsUnderWay | None = None  # while several forwards run by turns
        self._read_counts: dict[tuple[int, int, CountsMode], tuple[Tensor, Tensor]] = {}
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
        """Everything but the identity, which a copy must not share."""
        return {key: value for key, value in self.__dict__.items() if key != "id"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore under a new identity."""
        self.__dict__.update(state)
        self._register()

    def new_row(self, name: str, num_experts: int, top_k: int, score: ScoreName) -> int:
        """Open a row for one layer and return its index."""
        maps: list[CountMap] = [ExecutedCounts()]
        maps += [m for o in self.objectives for m in o.maps]
        unique = tuple(dict.fromkeys(maps))
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
    ) -> Tensor:
        """Counts of one microbatch, (A, G, E) int64, added to the row unless this is a recomputation.

        ``executed_GE`` are counts of the executed assignments that the router has made already.

        Raises:
            RuntimeError: the step has had all its microbatches, or forwards run by turns and this is none of
                them or runs the layer again.
        """
        row = self.rows[row_index]
        counts_AGE = self._count(
            row, logits_TE, ids_TK, group_ids_T, valid_mask_T, len(num_tokens_G), executed_GE
        )
        # Inside a backward pass this forward is a recomputation: its tokens are counted already.
        if torch._C._current_graph_task_id() != -1:
            return counts_AGE
        into = row if self.under_way is None else self.under_way.row(ticket, row_index)
        self._check_room(row_index)
        if self.counting:
            into.num_counting += 1
        else:
            into.num_forwards += 1
        counted_ahead = self.plan.order == "counting_pass" and not self.counting
        sizes = batch_sizes(num_tokens_G, sequence_of_group_G, num_sequences)
        if self.sums.is_needed:
            self.sums.observe(
                ticket, row_index, counts_AGE, sizes, adds=not counted_ahead, under_way=into is not row
            )
        if not counted_ahead:
            if not self.sums.sums_totals:
                into.add(counts_AGE.sum(dim=1), sizes)
            if into.statistic is not None:
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
        if len(counted) == 1 and executed_GE is None:
            return counted[0][None]
        # A copy: an operator must not return what it was given.
        return torch.stack(counted)

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
    ) -> tuple[Tensor, Tensor]:
        """Targets of all objectives (G, E) and the z-loss weight (), with the gradient scale in them.

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
        self.sums.settle(self.rows)
        self._check_order(row)
        if half and self.loss_scale is None:
            raise RuntimeError(
                f"{row.name}: the logits are float16, in which gradients of balance losses vanish unless they "
                "follow a loss scale; use balancer.follow(loss) with a gradient scaler, or bfloat16"
            )
        reading = self._reading(
            row_index,
            ticket,
            counts_AGE,
            num_tokens_G,
            sequence_of_group_G,
            num_sequences,
            prob_sums_GE,
            dtype,
        )
        target_GE = reading.num_tokens_G.new_zeros(len(num_tokens_G), row.num_experts)
        z_weight = reading.num_tokens_G.new_zeros(())
        for objective in self.objectives:
            target = objective.targets(reading)
            if target is not None:
                target_GE = target_GE + target
            weight = objective.z_weight(reading)
            if weight is not None:
                z_weight = z_weight + weight
        scale: float | Tensor = self.reduction.factor
        if self.loss_scale is not None:
            share = self.num_microbatches if self.reduction.microbatches == "mean" else 1
            scale = self.loss_scale.to(target_GE.device, dtype) * (scale * share)
        return target_GE * scale, z_weight * scale

    def _reading(
        self,
        row_index: int,
        ticket: int,
        counts_AGE: Tensor,
        num_tokens_G: Tensor,
        sequence_of_group_G: Tensor | None,
        num_sequences: int,
        prob_sums_GE: Tensor | None,
        dtype: torch.dtype,
    ) -> Reading:
        row = self.rows[row_index]
        counts_AGE = self.sums.groups(ticket, row_index, counts_AGE).to(dtype)
        num_tokens_G = num_tokens_G.to(dtype)
        total = self.sums.totals(ticket, row_index)
        all_ranks = None if total is None else (total[0].to(dtype), total[1][0].to(dtype))

        def step_counts(mode: CountsMode) -> tuple[Tensor, Tensor]:
            key = (ticket, row_index, mode)
            if key not in self._read_counts:
                # A schedule may run one backward twice, for inputs and for weights: both read the same.
                self._read_counts[key] = row.step_counts(mode, self.num_microbatches, dtype)
            counts_AE, num_tokens = self._read_counts[key]
            row.note_used(row.load(counts_AE, num_tokens))
            return counts_AE, num_tokens

        return Reading(
            maps=row.maps,
            counts_AGE=counts_AGE,
            num_tokens_G=num_tokens_G,
            sequence_of_group_G=sequence_of_group_G,
            num_sequences=num_sequences,
            top_k=row.top_k,
            totals=self._totals(row, num_tokens_G, sequence_of_group_G, num_sequences, total),
            step_counts=step_counts,
            prob_sums_GE=prob_sums_GE,
            all_ranks=all_ranks,
        )

    def _totals(
        self,
        row: Row,
        num_tokens_G: Tensor,
        sequence_of_group_G: Tensor | None,
        num_sequences: int,
        all_ranks: tuple[Tensor, Tensor] | None,
    ) -> StepTotals:
        """Totals as declared, else those counted where counting is complete, else M times this microbatch's.

        Where counts are not summed over ranks, R times this rank's.
        """
        data_ranks = self.reduction.num_ranks // self.ranks.num_sequence_ranks
        share = 1 if self.sums.sums_totals else data_ranks
        if self.plan.counts_are_complete and row.sizes is not None:
            sizes = row.sizes * share
        else:
            if all_ranks is not None:
                sizes = all_ranks[1]
            else:
                sizes = batch_sizes(num_tokens_G, sequence_of_group_G, num_sequences)
            sizes = sizes * (self.num_microbatches * share)
        counted = sizes.to(num_tokens_G.dtype).unbind()
        declared = (self.declared.num_tokens, self.declared.num_sequences, self.declared.num_documents)
        tokens, sequences, documents = (
            known if total is None else known.new_full((), total)
            for total, known in zip(declared, counted, strict=True)
        )
        return StepTotals(tokens, sequences, documents, self.num_microbatches, data_ranks)

    def _check_order(self, row: Row) -> None:
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

    def finish_step(self) -> list[StepNumbers]:
        """Complete the step's counts over ranks; what was measured of each row.

        Raises:
            RuntimeError: forwards of the step are under way.
        """
        if self.under_way is not None:
            raise RuntimeError("balancer.step() inside balancer.interleaved(...); leave the block first")
        self.sums.settle(self.rows)
        counted = [row for row in self.rows if row.counts_AE is not None]
        if counted and self.ranks.tokens is not None:
            # Other ranks may have run layers that this one did not.
            some = counted[0]
            assert some.counts_AE is not None
            assert some.sizes is not None
            for row in self.rows:
                if row.counts_AE is None:
                    row.add(
                        some.counts_AE.new_zeros(len(row.maps), row.num_experts), torch.zeros_like(some.sizes)
                    )
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
        summed = self.sums.sum_step(tensors)
        pairs = zip(counted, summed[0:num_counts:2], summed[1:num_counts:2], strict=False)
        for row, counts_AE, sizes in pairs:
            row.counts_AE, row.sizes = counts_AE, sizes
        for statistic, histogram_EN in zip(statistics, summed[num_counts:], strict=True):
            statistic.histogram_EN = histogram_EN
        return finish(
            self.objectives,
            [row.measured for row in self.rows],
            self._read_measured,
            self._read_final,
            self.ranks,
        )

    def _read_measured(self, row_index: int, one: MeasuredForward) -> Reading:
        """What a loss sees of one measured microbatch."""
        return self._reading(
            row_index,
            one.ticket,
            one.counts_AGE,
            one.num_tokens_G,
            one.sequence_of_group_G,
            one.num_sequences,
            None,
            one.prob_sums_GE.dtype,
        )

    def _read_final(self, row_index: int) -> Reading:
        """What a loss of step scope sees of the whole step."""
        row = self.rows[row_index]
        assert row.counts_AE is not None
        assert row.num_tokens is not None
        dtype = row.measured[0].prob_sums_GE.dtype
        counts_AE, num_tokens = row.counts_AE.to(dtype), row.num_tokens.to(dtype)
        return Reading(
            maps=row.maps,
            counts_AGE=counts_AE[:, None],
            num_tokens_G=num_tokens[None],
            sequence_of_group_G=None,
            num_sequences=1,
            top_k=row.top_k,
            totals=StepTotals(num_tokens, num_tokens, num_tokens, 1),
            step_counts=lambda mode: (counts_AE, num_tokens),
        )

    def count_error(self, row: Row) -> Tensor | None:
        """max |f_used - f_final| over experts and reads of this step; None if no step scope was read."""
        if row.used_min_AE is None or row.used_max_AE is None or row.counts_AE is None:
            return None
        assert row.num_tokens is not None
        dtype = row.used_min_AE.dtype
        final_AE = row.load(row.counts_AE.to(dtype), row.num_tokens.to(dtype))
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
        self._read_counts = {}
        self.declare(DeclaredTotals())
        self.plan = self.accumulation
        self.loss_scale = None
