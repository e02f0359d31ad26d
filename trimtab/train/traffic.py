"""What one optimiser step sends between ranks: collectives of one rank, with their bytes, before any is run.

Shapes: B rows of a microbatch, S length, c = S / cp, s = c / tp tokens of a row on this rank, D model, E experts,
K top-k, A count maps, G groups, M microbatches.

Every number comes from the modules that training would run, divided as it would divide them, and from one rule
for each place that communicates. Tests run real steps and compare. Two numbers are expectations: rows that come
back from other ranks' experts, which are as many as were sent where experts are balanced, and counts of documents,
of which one is assumed in each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from trimtab.integrations.attention_sizes import key_value_sizes
from trimtab.parallel.parameter_groups import parameter_groups
from trimtab.train.engine import Engine, Part

Operation = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"]
_ADJOINT: dict[Operation, Operation] = {
    "all_gather": "reduce_scatter",
    "reduce_scatter": "all_gather",
    "all_to_all": "all_to_all",
}
_WEIGHTS = {"fsdp": "weights", "dp_cp": "attention heads' weights", "efsdp": "experts' weights"}
_INT64 = _FLOAT64 = 8
# Of a microbatch: tokens, sequences, documents. Of a step: those, tokens that balancing counts, and labels.
_NUM_SIZES, _NUM_TOTALS = 3, 5


@dataclass(frozen=True, slots=True)
class Collective:
    """Collectives of one kind that one rank takes part in during one optimiser step.

    Args:
        axis: mesh axis of the group; "world" for all ranks.
        operation: what is done.
        what: what is communicated.
        count: how many.
        num_bytes: of their messages together: what an all-gather returns, a reduce-scatter is given, an all-reduce,
            all-to-all or send holds. On a ring of R ranks each rank sends (R - 1) / R of it, an all-reduce
            twice that.
        measured: it happens only in steps that measure losses for the log.
    """

    axis: str
    operation: Operation
    what: str
    count: int
    num_bytes: int
    measured: bool = False


def step_traffic(engine: Engine) -> list[Collective]:
    """Everything that this rank communicates in one optimiser step, one entry for each kind.

    Pipelines also receive what their neighbours send, and open their connections in the first step. Saving,
    validation and what pipeline stages tell each other for the log are no part of it.
    """
    if engine.mesh is None:
        return []
    found: list[Collective] = []
    for part in engine.parts:
        for rule in (_parameters, _attention, _experts, _hidden_states, _counts):
            found += rule(engine, part)
    found += _loop(engine)
    sums: dict[tuple[Any, ...], tuple[int, int]] = {}
    for one in found:
        key = (one.axis, one.operation, one.what, one.measured)
        count, num_bytes = sums.get(key, (0, 0))
        sums[key] = (count + one.count, num_bytes + one.num_bytes)
    return [
        Collective(axis, operation, what, count, num_bytes, measured)
        for (axis, operation, what, measured), (count, num_bytes) in sums.items()
        if count or num_bytes
    ]


def _times(count: int, axis: str, operation: Operation, what: str, num_bytes: int) -> Collective:
    """``count`` equal collectives of ``num_bytes`` each."""
    return Collective(axis, operation, what, count, count * num_bytes)


@dataclass(frozen=True, slots=True)
class _Passes:
    """How often a step runs through the layers of a part.

    Args:
        forward: forwards.
        again: forwards that backward runs again.
        backward: backwards.
    """

    forward: int
    again: int
    backward: int

    @staticmethod
    def of(engine: Engine) -> _Passes:
        M = engine.run.num_microbatches
        counting = M if engine.run.order == "counting_pass" else 0
        # Selective checkpointing keeps what ranks have exchanged.
        again = M if engine.config.activation_checkpoint.mode == "full" else 0
        return _Passes(M + counting, again, M)

    def crossing(
        self, axis: str, operation: Operation, what: str, num_bytes: int, *, repeats: bool = True
    ) -> Iterator[Collective]:
        """A collective of each forward, with its adjoint in backward.

        Args:
            axis: as in `Collective`.
            operation: in forward.
            what: the value.
            num_bytes: of one message, the same in both directions.
            repeats: forwards that run again in backward reach it.
        """
        forwards = self.forward + (self.again if repeats else 0)
        yield _times(forwards, axis, operation, what, num_bytes)
        yield _times(self.backward, axis, _ADJOINT[operation], f"{what}, gradients", num_bytes)


# -------------------------------------------------------------------- parameters


def _parameters(engine: Engine, part: Part) -> Iterator[Collective]:
    passes = _Passes.of(engine)
    for group in parameter_groups(part.module):
        # A pipeline gathers once and keeps. Otherwise layers are gathered for each forward and each backward (a
        # forward that runs again finds them gathered for its backward), and the root for each backward's end.
        num_gathers = passes.forward + passes.backward
        if engine.run.pipeline is not None:
            num_gathers = 1
        elif group.is_root:
            num_gathers = passes.backward
        weights = _WEIGHTS[group.axis]
        gradients = weights.replace("weights", "gradients")
        if group.num_shards > 1:
            yield _times(num_gathers, group.axis, "all_gather", weights, group.whole_bytes)
            # Gradients are added up over microbatches before they are summed over ranks.
            if group.trained_bytes:
                yield _times(1, group.axis, "reduce_scatter", gradients, group.whole_gradient_bytes)
        if group.num_replicas > 1 and group.trained_bytes:
            yield _times(1, "dp_replicate", "all_reduce", gradients, group.trained_bytes)


# -------------------------------------------------------------------- activations


def _parameter_size(engine: Engine) -> int:
    """Bytes of a parameter, and of a number of the residual stream."""
    return next(engine.parameters()).element_size()


def _product_size(engine: Engine) -> int:
    """Bytes of a number that a product of matrices gives."""
    return _parameter_size(engine) if engine.config.training.mixed_precision == "none" else 2


def _width(part: Part) -> int:
    width: int = part.module.config.get_text_config().hidden_size
    return width


def _attention(engine: Engine, part: Part) -> Iterator[Collective]:
    passes, degrees, B = _Passes.of(engine), engine.run.degrees, engine.run.microbatch_size
    wide, narrow = _parameter_size(engine), _product_size(engine)
    num_inputs = B * len(engine.shard.queries_c) * _width(part)
    num_keys = B * len(engine.shard.keys_S)
    for attention in key_value_sizes(part.module):
        if degrees.tp > 1:
            yield from passes.crossing("tp", "all_gather", "attention's input", num_inputs * wide)
            yield from passes.crossing("tp", "reduce_scatter", "attention's output", num_inputs * narrow)
        if degrees.cp > 1:
            key_bytes = num_keys * attention.key_width * (wide if attention.keys_widen else narrow)
            yield from passes.crossing("cp", "all_gather", "keys", key_bytes)
            value_bytes = num_keys * attention.value_width * narrow
            yield from passes.crossing("cp", "all_gather", "values", value_bytes)


def _experts(engine: Engine, part: Part) -> Iterator[Collective]:
    passes, degrees, D = _Passes.of(engine), engine.run.degrees, _width(part)
    wide, narrow = _parameter_size(engine), _product_size(engine)
    forwards = passes.forward + passes.again
    # Where experts are sliced, a rank works on the tokens of all ranks that hold slices of its experts.
    T = engine.run.microbatch_size * len(engine.shard.own_s) * degrees.etp
    for router in part.routers:
        E, K = router.num_experts, router.top_k
        if degrees.etp > 1:
            yield from passes.crossing("etp", "all_gather", "tokens", T * D * wide)
            yield from passes.crossing("etp", "all_gather", "routing weights", T * K * wide)
            yield _times(forwards, "etp", "all_gather", "expert ids", T * K * _INT64)
            # What runs again stops at the last tensor that backward needs, which is of shared experts or before.
            yield from passes.crossing(
                "etp",
                "reduce_scatter",
                "experts' output",
                T * D * narrow,
                repeats=_has_shared(router.block, router.module, E),
            )
        if degrees.ep > 1:
            yield _times(forwards, "ep", "all_to_all", "rows per expert", E * _INT64)
            yield from passes.crossing("ep", "all_to_all", "rows to experts", T * K * D * wide)
            yield from passes.crossing("ep", "all_to_all", "rows from experts", T * K * D * narrow)


def _has_shared(block: nn.Module, router: nn.Module, num_experts: int) -> bool:
    """Whether a MoE block has parameters beside its router and those that are stacked over its experts."""
    return any(
        parameter.dim() < 2 or parameter.shape[0] != num_experts
        for child in block.children()
        if child is not router
        for parameter in child.parameters()
    )


def _hidden_states(engine: Engine, part: Part) -> Iterator[Collective]:
    plan, M = engine.run.pipeline, engine.run.num_microbatches
    if plan is None:
        return
    numel = engine.run.microbatch_size * len(engine.shard.own_s) * _width(part)
    for stage, what in ((part.stage + 1, "hidden states"), (part.stage - 1, "hidden states, gradients")):
        if 0 <= stage < plan.num_stages and plan.rank_of(stage) != plan.rank_of(part.stage):
            yield _times(M, "pp", "send", what, numel * _parameter_size(engine))


# -------------------------------------------------------------------- counts and the loop


def groups_of_microbatch(engine: Engine, part: Part) -> int:
    """G, groups that counts of a microbatch are kept apart for; of documents, one in each row."""
    assert part.balancer is not None
    return 1 if part.balancer.context.unit is None else engine.run.microbatch_size


def _counts(engine: Engine, part: Part) -> Iterator[Collective]:
    balancer = part.balancer
    if balancer is None or balancer.ranks.tokens is None:
        return
    rows, sums, forwards = balancer.ledger.rows, balancer.ledger.sums, _Passes.of(engine).forward
    counts = sum(len(row.maps) * row.num_experts for row in rows)
    totals = (counts + _NUM_SIZES * len(rows)) * _INT64
    if sums.sums_groups:
        num_bytes = counts * groups_of_microbatch(engine, part) * _INT64
        yield _times(forwards, "sequence", "all_reduce", "counts of sequences", num_bytes)
    if sums.reads_totals:
        yield _times(forwards, "tokens", "all_reduce", "counts", totals)
    at_end = 0 if sums.reads_totals else totals
    for row in rows:
        at_end += 0 if row.statistic is None else row.num_experts * row.statistic.num_bins * _INT64
    if at_end:
        yield _times(1, "tokens", "all_reduce", "counts of the step", at_end)
    if balancer.measure_every:
        # Numerator and denominator of each loss and of the entropy; of losses of step scope sums of p and of lse^2.
        losses = 0
        for row in rows:
            of_step = sum(objective.scope == "step" for objective in balancer.objectives)
            losses += 2 * (len(balancer.objectives) + 1 - of_step) + (row.num_experts + 1) * of_step
        # They join what is summed at the end of each step anyway.
        joins = int(at_end == 0)
        yield Collective("tokens", "all_reduce", "losses", joins, losses * _FLOAT64, measured=True)
        yield Collective("tokens", "all_reduce", "largest logits", 1, len(rows) * _FLOAT64, measured=True)


def _loop(engine: Engine) -> Iterator[Collective]:
    assert engine.mesh is not None
    if engine.mesh.group("tokens") is not None:
        # Of multi-token prediction, label tokens of each depth.
        num_totals = _NUM_TOTALS + engine.num_losses - 1
        yield _times(1, "tokens", "all_reduce", "sizes of the step", num_totals * _INT64)
    for num_bytes in () if engine.shared is None else engine.shared.messages():
        yield _times(1, "pp", "send", "gradients that stages share", num_bytes)
    yield _times(1, "world", "all_reduce", "gradient norm", _FLOAT64)
    # The loss, that of multi-token prediction, and whether either of two signals has reached a rank.
    num_told = min(engine.num_losses, 2) + 2
    yield _times(1, "world", "all_reduce", "loss and signals", num_told * _FLOAT64)
